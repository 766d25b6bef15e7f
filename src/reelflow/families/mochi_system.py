"""Mochi's way from prompts to clips: T5's features, classifier-free guidance, half of the steps spent near the noise.

Steps are even up to t = 0.025, and grow from there on.
"""

from dataclasses import replace

from reelflow.conditioning.pretrained import Reading
from reelflow.diffusion.timesteps import LinearQuadraticSchedule
from reelflow.families.schedulers import sigmas_of
from reelflow.families.system import Asked, Conditions, Defaults, Expert, System, SystemFolder

__all__ = ["PROMPT", "text_to_video"]

PROMPT = Reading(length=256)
DEFAULTS = Defaults(num_steps=64, guidance_scale=4.5, clip=(19, 480, 848), fps=30.0)
SCHEDULE = LinearQuadraticSchedule(threshold=0.025)


def text_to_video(folder: SystemFolder) -> System:
    """Read a MochiPipeline; its folder says whether an empty prompt is read, or is nothing."""
    nothing = bool(folder.index.get("force_zeros_for_empty_prompt"))
    text, walk = folder.text(replace(PROMPT, empty=None) if nothing else PROMPT), folder.walk()

    def conditions(asked: Asked) -> Conditions:
        return Conditions(text(asked.prompts).condition(), text(asked.negative).condition() if asked.guided else None)

    # theirs rounds sigmas to float32, which moves the first times, near 0, by a hundred-thousandth
    return System(
        experts=(Expert(folder.transformer()),),
        vae=folder.vae(),
        walk=walk,
        defaults=DEFAULTS,
        conditions=conditions,
        times=lambda num_steps, grid: walk.times(num_steps, sigmas=sigmas_of(num_steps, SCHEDULE).float()),
    )


SYSTEMS = {"MochiPipeline": text_to_video}
