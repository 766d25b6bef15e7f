"""CogVideoX's way from prompts to clips: T5's features, those of padding too, and classifier-free guidance.

The latents of a first frame stand beside the noisy ones, zeros after them. Where the clip's are odd, 1.5 makes a latent
frame more, before them, and drops it; the picture then stands beside that one, as published.
"""

from dataclasses import replace

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from reelflow.conditioning.pretrained import Reading
from reelflow.families.system import Asked, Conditions, Defaults, Expert, System, SystemFolder, drawn_first
from reelflow.models.condition import Condition
from reelflow.models.vae import CausalVAE

__all__ = ["PROMPT", "image_to_video", "text_to_video"]

PROMPT = Reading(length=226, mask_encoder=False, padding="encoded")
DEFAULTS = Defaults(num_steps=50, guidance_scale=6.0, clip=(49, 480, 720), fps=8.0)
LATER = replace(DEFAULTS, clip=(81, 768, 1360), fps=16.0)
OFFSET = 2.0  # the number that 1.5 is told beside a picture


def text_to_video(folder: SystemFolder) -> System:
    """Read a CogVideoXPipeline."""
    text, walk, network = folder.text(PROMPT), folder.walk(), folder.transformer()

    def conditions(asked: Asked) -> Conditions:
        cond = Condition(context=text(asked.prompts).tokens)
        return Conditions(cond, Condition(context=text(asked.negative).tokens) if asked.guided else None)

    return System(
        experts=(Expert(network),),
        vae=folder.vae(),
        walk=walk,
        defaults=DEFAULTS if network.config.patch.t == 1 else LATER,
        conditions=conditions,
        times=lambda num_steps, grid: walk.times(num_steps),
        fills_patches=True,
    )


def image_to_video(folder: SystemFolder) -> System:
    """Read a CogVideoXImageToVideoPipeline."""
    system = text_to_video(folder)
    config = system.experts[0].network.config
    divided = bool(folder.json("vae/config.json").get("invert_scale_latents"))

    def conditions(asked: Asked) -> Conditions:
        told = system.conditions(asked)
        frame = Condition(
            channels=beside(asked, system.vae, divided=divided),
            numbers=torch.full((len(asked.prompts), 1), OFFSET) if config.numbers else None,
        )
        return replace(told, cond=told.cond + frame, uncond=None if told.uncond is None else told.uncond + frame)

    return replace(system, conditions=conditions, picture="must")


def beside(asked: Asked, vae: CausalVAE, *, divided: bool) -> Float[Tensor, "B C t h w"]:
    """Return the latents of the first frame, and zeros after it.

    `divided`: by the factor that all other latents are multiplied with, as 1.5 was trained.
    """
    first = drawn_first(asked, vae)
    if divided:
        first = first * vae.latent_std.square().view(1, -1, 1, 1, 1)
    return F.pad(first, (0, 0, 0, 0, 0, asked.latent_shape[1] - 1))


SYSTEMS = {"CogVideoXPipeline": text_to_video, "CogVideoXImageToVideoPipeline": image_to_video}
