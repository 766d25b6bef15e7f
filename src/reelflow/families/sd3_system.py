"""Stable Diffusion 3's way from prompts to pictures: three encoders' features in one row, classifier-free guidance.

Two CLIP models give 77 tokens, side by side and filled up with zeros, and T5 the tokens behind them; nothing is masked.
Without T5 these are zeros, which the network sees.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from reelflow.conditioning.pretrained import Reading
from reelflow.errors import ConfigError
from reelflow.families.schedulers import mu_of
from reelflow.families.system import Asked, Conditions, Defaults, Expert, System, SystemFolder, one_frame
from reelflow.models.condition import Condition
from reelflow.models.dit import DiTConfig
from reelflow.nn.embed import Learned
from reelflow.nn.patchify import Grid

__all__ = ["LONG", "SHORT", "text_to_picture"]

SHORT = Reading(length=77, layer=1, mask_encoder=False, padding="encoded", pooled="projection")
LONG = Reading(length=256, mask_encoder=False, padding="encoded")


def text_to_picture(folder: SystemFolder) -> System:
    """Read a StableDiffusion3Pipeline, with or without its third encoder."""
    network, vae, walk = folder.transformer(), folder.vae(), folder.walk()
    first, second = folder.text(SHORT), folder.text(SHORT, "text_encoder_2", "tokenizer_2")
    third = folder.text(LONG, "text_encoder_3", "tokenizer_3") if folder.has("text_encoder_3") else None
    side = folder.json("transformer/config.json").get("sample_size", 128) * vae.config.spatial_stride
    scheduler = folder.json("scheduler/scheduler_config.json")

    def read(prompts: Sequence[str]) -> Condition:
        one, two = first(prompts), second(prompts)
        assert one.pooled is not None
        assert two.pooled is not None
        short = torch.cat([one.tokens, two.tokens], dim=2)
        short = F.pad(short, (0, network.config.context_dim - short.shape[2]))
        long = short.new_zeros(len(short), LONG.length, short.shape[2]) if third is None else third(prompts).tokens
        return Condition(
            context=torch.cat([short, long.to(short)], dim=1), vector=torch.cat([one.pooled, two.pooled], dim=1)
        )

    def conditions(asked: Asked) -> Conditions:
        return Conditions(read(asked.prompts), read(asked.negative) if asked.guided else None)

    def check(asked: Asked) -> None:
        one_frame(asked)
        _check_table(asked, network.config, vae.config.spatial_stride)

    def times(num_steps: int, grid: Grid) -> torch.Tensor:
        dynamic = bool(scheduler.get("use_dynamic_shifting"))
        return walk.times(num_steps, mu=mu_of(scheduler, grid.num_tokens) if dynamic else None)

    return System(
        experts=(Expert(network),),
        vae=vae,
        walk=walk,
        defaults=Defaults(num_steps=28, guidance_scale=7.0, clip=(1, side, side), fps=1.0),
        conditions=conditions,
        times=times,
        check=check,
    )


def _check_table(asked: Asked, network: DiTConfig, stride: int) -> None:
    """Refuse pictures that are larger than the table of positions."""
    (positions,) = network.absolute
    assert isinstance(positions, Learned)
    for name, asked_for, patch, most in zip(
        ("height", "width"), (asked.height, asked.width), network.patch[1:], positions.size[1:], strict=True
    ):
        largest = most * patch * stride
        if asked_for > largest:
            raise ConfigError(
                f"{name} must be at most {largest} (the table of positions holds {most} tokens), got {asked_for}; "
                f"nearest: {largest}"
            )


SYSTEMS = {"StableDiffusion3Pipeline": text_to_picture}
