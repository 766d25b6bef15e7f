"""Wan's way from prompts to clips: UMT5 features, classifier-free guidance, two experts in 2.2's larger models.

A first frame enters 2.1 and the larger models of 2.2 beside the noisy latents: four channels that say which frames are
given, and the latents of a clip of that frame and grey ones; 2.1 also attends to its CLIP features. The smallest model
of 2.2 is given its latents as frame 0, at t = 1.
"""

from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from reelflow.conditioning.pretrained import Reading
from reelflow.conditioning.text import TextFeatures
from reelflow.families.system import (
    Asked,
    Conditions,
    Defaults,
    Expert,
    System,
    SystemFolder,
    first_frame,
    first_latents,
)
from reelflow.models.condition import Condition
from reelflow.models.vae import CausalVAE

__all__ = ["PROMPT", "image_to_video", "text_to_video"]

PROMPT = Reading(length=512, padding="zeros", cleaning="web")
DEFAULTS = Defaults(num_steps=50, guidance_scale=5.0, clip=(81, 480, 832), fps=16.0)


def text_to_video(folder: SystemFolder) -> System:
    """Read a WanPipeline."""
    text = folder.text(PROMPT)
    walk = folder.walk()

    def conditions(asked: Asked) -> Conditions:
        return Conditions(_read(text(asked.prompts)), _read(text(asked.negative)) if asked.guided else None)

    return System(
        experts=experts(folder),
        vae=folder.vae(),
        walk=walk,
        defaults=DEFAULTS,
        conditions=conditions,
        times=lambda num_steps, grid: walk.times(num_steps),
    )


def image_to_video(folder: SystemFolder) -> System:
    """Read a WanImageToVideoPipeline."""
    system = text_to_video(folder)
    text, vae = system.conditions, system.vae
    first = bool(folder.index.get("expand_timesteps"))
    picture = folder.image("image_encoder", "image_processor", layer=1) if folder.has("image_encoder") else None

    def conditions(asked: Asked) -> Conditions:
        told = text(asked)
        if first:
            return replace(told, known=first_latents(asked, vae))
        frame = Condition(
            channels=beside(asked, vae), image=None if picture is None else picture(first_frame(asked)[:, :, 0])
        )
        return replace(told, cond=told.cond + frame, uncond=None if told.uncond is None else told.uncond + frame)

    return replace(system, conditions=conditions, picture="must")


def experts(folder: SystemFolder) -> tuple[Expert, ...]:
    """Read the networks: one, or for 2.2's larger models one for high and one for low noise."""
    ratio = folder.index.get("boundary_ratio")
    if ratio is None:
        return (Expert(folder.transformer()),)
    if not folder.has("transformer"):
        return (Expert(folder.transformer("transformer_2")),)
    return (Expert(folder.transformer(), until=1 - ratio), Expert(folder.transformer("transformer_2")))


def beside(asked: Asked, vae: CausalVAE) -> Float[Tensor, "B C t h w"]:
    """Return the channels beside the noisy latents: which of a latent's frames are given, and what they are."""
    first = first_frame(asked).to(next(vae.parameters()))
    clip = torch.cat(
        [first, first.new_zeros(1, 3, 1, 1, 1).expand(len(first), -1, asked.num_frames - 1, *first.shape[3:])], dim=2
    )
    latents = vae.encode(clip).mean
    given = latents.new_zeros(len(latents), vae.config.temporal_stride, *latents.shape[2:])
    given[:, :, 0] = 1
    return torch.cat([given, latents], dim=1)


def _read(features: TextFeatures) -> Condition:
    return Condition(context=features.tokens)


SYSTEMS = {"WanPipeline": text_to_video, "WanImageToVideoPipeline": image_to_video}
