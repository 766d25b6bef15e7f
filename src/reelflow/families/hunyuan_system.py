"""HunyuanVideo's way from prompts to clips: a language model's features, a pooled vector, guidance told as a number.

A first frame is seen by the language model, and enters the network beside the noisy latents or in place of the first of
them. Noise leans towards it, by a thousandth. Where it stands beside, one latent frame more is made, and dropped.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from reelflow.conditioning.pictured import PicturedReading, PretrainedPictured
from reelflow.conditioning.pretrained import Reading
from reelflow.conditioning.text import TextFeatures
from reelflow.errors import CheckpointError
from reelflow.families.schedulers import sigmas_of
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
from reelflow.models.dit import VideoDiT
from reelflow.models.vae import CausalVAE

__all__ = ["beside", "image_to_video", "text_to_video"]

ASPECTS = (
    "1. The main content and theme of the video."
    "2. The color, shape, size, texture, quantity, text, and spatial relationships of the objects."
    "3. Actions, events, behaviors temporal relationships, physical movement changes of the objects."
    "4. background environment, light, style and atmosphere."
    "5. camera angles, movements, and transitions used in the video:<|eot_id|>"
)
PROMPT = Reading(
    length=256,
    template=(
        "<|start_header_id|>system<|end_header_id|>\n\nDescribe the video by detailing the following aspects: "
        + ASPECTS
        + "<|start_header_id|>user<|end_header_id|>\n\n{}<|eot_id|>"
    ),
    crop=95,
    layer=2,
)
PICTURED = PicturedReading(
    length=256,
    template=(
        "<|start_header_id|>system<|end_header_id|>\n\n<image>\n"
        "Describe the video by detailing the following aspects according to the reference image: "
        + ASPECTS
        + "\n\n<|start_header_id|>user<|end_header_id|>\n\n{}<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    ),
    crop=103,
    header=4,
    header_end="<|end_header_id|>",
    picture_tokens=576,
    every=2,
    layer=2,
)
POOLED = Reading(length=77, mask_encoder=False, pooled="output")
DEFAULTS = Defaults(num_steps=50, guidance_scale=1.0, clip=(129, 720, 1280), fps=24.0)
LEAN = 0.001


def text_to_video(folder: SystemFolder) -> System:
    """Read a HunyuanVideoPipeline."""
    text, beside_text = folder.text(PROMPT), vector_and_number(folder)

    def conditions(asked: Asked) -> Conditions:
        def told(prompts: Sequence[str]) -> Condition:
            return text(prompts).condition() + beside_text(prompts, asked)

        return Conditions(told(asked.prompts), told(asked.negative) if asked.guided else None)

    return _system(folder, folder.transformer(), folder.vae(), conditions, guidance=6.0)


def image_to_video(folder: SystemFolder) -> System:
    """Read a HunyuanVideoImageToVideoPipeline, whose network has the picture beside the latents or as the first of them.

    Raises:
        CheckpointError: the network reads no picture.
    """
    network, vae, beside_text = folder.transformer(), folder.vae(), vector_and_number(folder)
    instead = network.config.out_groups == "first"
    if not instead and network.config.extra_channels != vae.config.latent_channels + 1:
        raise CheckpointError(f"{folder.folder} makes pictures move, but its transformer reads none")
    read = pictured(folder)
    cond, uncond = replace(PICTURED, every=4 if instead else 2), PICTURED

    def conditions(asked: Asked) -> Conditions:
        first, image = first_latents(asked, vae), first_frame(asked)[:, :, 0]
        frame = Condition() if instead else Condition(channels=beside(first, asked.latent_shape[1]))

        def told(reading: PicturedReading, prompts: Sequence[str], pictures: Tensor) -> Condition:
            return read(reading, prompts, pictures).condition() + beside_text(prompts, asked) + frame

        return Conditions(
            told(cond, asked.prompts, image),
            told(uncond, asked.negative, torch.full_like(image, -1)) if asked.guided else None,
            known=first if instead else None,
            start=lambda noise: noise.lerp(first.to(noise), LEAN),
        )

    return _system(folder, network, vae, conditions, guidance=1.0, picture="must", frames_before=0 if instead else 1)


def pictured(folder: SystemFolder) -> Callable[[PicturedReading, Sequence[str], Tensor], TextFeatures]:
    """Return a reader of prompts with pictures, whose weights are read when it is first called."""
    encoder, tokenizer, processor = map(folder.part, ("text_encoder", "tokenizer", "image_processor"))
    load = cache(
        lambda: PretrainedPictured.load(
            encoder, tokenizer, processor, PICTURED, dtype=folder.dtype, device=folder.device
        )
    )

    def read(reading: PicturedReading, prompts: Sequence[str], pictures: Tensor) -> TextFeatures:
        loaded = load()
        return PretrainedPictured(loaded.tokenizer, loaded.processor, loaded.encoder, reading)(prompts, pictures)

    return read


def vector_and_number(folder: SystemFolder) -> Callable[[Sequence[str], Asked], Condition]:
    """Return what gives the vector of prompts, and the guidance that a network is told."""
    text = folder.text(POOLED, "text_encoder_2", "tokenizer_2")

    def condition(prompts: Sequence[str], asked: Asked) -> Condition:
        scale = asked.embedded_guidance
        numbers = None if scale is None else torch.full((len(prompts), 1), scale)
        return Condition(vector=text(prompts).pooled, numbers=numbers)

    return condition


def beside(first: Float[Tensor, "B C 1 h w"], num_frames: int) -> Float[Tensor, "B extra {num_frames} h w"]:
    """Return the channels beside the noisy latents: those of the first frame, then 1 where they are; 0 elsewhere."""
    return F.pad(torch.cat([first, torch.ones_like(first[:, :1])], dim=1), (0, 0, 0, 0, 0, num_frames - 1))


def _system(
    folder: SystemFolder,
    network: VideoDiT,
    vae: CausalVAE,
    conditions: Callable[[Asked], Conditions],
    *,
    guidance: float,
    picture: Literal["none", "must"] = "none",
    frames_before: int = 0,
) -> System:
    walk = folder.walk()
    frames, height, width = DEFAULTS.clip
    return System(
        experts=(Expert(network),),
        vae=vae,
        walk=walk,
        defaults=replace(
            DEFAULTS,
            clip=(frames - frames_before * vae.config.temporal_stride, height, width),
            embedded_guidance=guidance if network.config.numbers else None,
        ),
        conditions=conditions,
        times=lambda num_steps, grid: walk.times(num_steps, sigmas=sigmas_of(num_steps)),
        picture=picture,
        frames_before=frames_before,
    )


SYSTEMS = {"HunyuanVideoPipeline": text_to_video, "HunyuanVideoImageToVideoPipeline": image_to_video}
