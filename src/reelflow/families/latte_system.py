"""Latte's way from prompts to clips: T5's features of a cleaned caption, classifier-free guidance, DDIM.

Nothing is masked. What lies beyond a prompt is cut off if it is the only one, and zeros else; what lies beyond the
negative prompt is as T5 gives it, cut at the same place.
"""

from reelflow.conditioning.pretrained import Reading
from reelflow.families.system import Asked, Conditions, Defaults, Expert, System, SystemFolder, with_variance
from reelflow.models.condition import Condition

__all__ = ["PROMPT", "text_to_video"]

PROMPT = Reading(length=120, cleaning="caption")
DEFAULTS = Defaults(num_steps=50, guidance_scale=7.5, clip=(16, 512, 512), fps=8.0)


def text_to_video(folder: SystemFolder) -> System:
    """Read a LattePipeline."""
    network, text = folder.transformer(), folder.text(PROMPT)
    walk = with_variance(folder.walk(), network)

    def conditions(asked: Asked) -> Conditions:
        read = text(asked.prompts)
        length = int(read.mask.sum()) if len(asked.prompts) == 1 else PROMPT.length
        tokens = read.tokens.where(read.mask[..., None], 0.0)
        return Conditions(
            Condition(context=tokens[:, :length]),
            Condition(context=text(asked.negative).tokens[:, :length]) if asked.guided else None,
        )

    return System(
        experts=(Expert(network),),
        vae=folder.vae(),
        walk=walk,
        defaults=DEFAULTS,
        conditions=conditions,
        times=lambda num_steps, grid: walk.times(num_steps),
    )


SYSTEMS = {"LattePipeline": text_to_video}
