"""Compare whole systems with the reference's pipelines: same prompts, noise and steps, same latents and frames.

Errors are max |ours - theirs| / rms(theirs), in float32. The bound is 1e-4, or three times what the reference itself
loses against float64 where that is more.
"""

from collections.abc import Callable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from parity import error, promoted, randomise
from PIL import Image
from torch import Tensor

import reelflow
from reelflow.generation.published import PublishedSampling

BOUND = 1e-4
MEASURED: dict[str, list[tuple[float, float]]] = {}
"""Errors of latents and of frames, by the pipeline's class: what docs/parity.md is made of."""


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def tiny_picture(seed: int, height: int, width: int) -> tuple[Image.Image, Tensor]:
    """Return a random picture, as the reference takes it and as ours does."""
    levels = torch.randint(0, 256, (height, width, 3), generator=torch.Generator().manual_seed(seed))
    return Image.fromarray(levels.byte().numpy()), (levels / 127.5 - 1).permute(2, 0, 1)[None]


def check(
    reference: Any,
    folder: Path,
    theirs: Mapping[str, Any],
    ours: Mapping[str, Any],
    *,
    unpacked: Callable[[Tensor], Tensor] = lambda latents: latents,
) -> None:
    """Save the reference's pipeline, load it as ours, run both, and hold the bounds.

    `theirs` are the arguments of the reference's call, `ours` those of `generate`, fields of its sampling among them;
    seeded generators, where the reference draws on the way, are made by functions of no arguments. `unpacked` makes
    B C T H W of its latents.
    """
    for name in ("transformer", "transformer_2", "vae"):
        if getattr(reference, name, None) is not None:
            randomise(getattr(reference, name), seed=len(name))
    reference.set_progress_bar_config(disable=True)
    reference.save_pretrained(folder)
    system = reelflow.load(folder)
    latents, frames = _run(reference, theirs)
    said = _sampled(ours)
    made = system.generate(**said, output="latents"), system.generate(**said)
    errors = error(made[0], unpacked(latents)), error(made[1], frames)
    MEASURED.setdefault(type(reference).__name__, []).append(errors)
    if max(errors) > BOUND:
        floor = _floor(reference, theirs, (latents, frames))
        assert errors[0] <= max(BOUND, 3 * floor[0]), (errors, floor)
        assert errors[1] <= max(BOUND, 3 * floor[1]), (errors, floor)


def _floor(reference: Any, arguments: Mapping[str, Any], narrow: tuple[Tensor, Tensor]) -> tuple[float, float]:
    """Return what the reference loses against float64, from the same draws; some of its schedulers keep to float32."""
    real = torch.randn

    def randn(*shape: Any, dtype: torch.dtype | None = None, **options: Any) -> Tensor:
        return real(*shape, dtype=narrow[0].dtype, **options).to(dtype)

    networks = [part for part in reference.components.values() if isinstance(part, torch.nn.Module)]
    wider = {name: value.double() if isinstance(value, Tensor) else value for name, value in arguments.items()}
    try:
        with promoted(), mock.patch.object(torch, "randn", randn):
            for network in networks:
                network.double()
            wide = _run(reference, wider)
    finally:  # tests share encoders
        for network in networks:
            network.float()
    return error(narrow[0], wide[0]), error(narrow[1], wide[1])


def _run(reference: Any, arguments: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    latents = reference(**_fresh(arguments), output_type="latent")[0]
    frames = reference(**_fresh(arguments), output_type="pt")[0]
    frames = frames[:, None] if frames.ndim == 4 else frames  # a picture is a clip of one frame
    return latents, 2 * frames.movedim(-3, 1) - 1


def _sampled(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Put the fields of a sampling into one; a guidance is written as one number, or one for each network."""
    names = {field.name for field in fields(PublishedSampling)} & arguments.keys()
    values = {name: arguments[name] for name in names}
    if isinstance(values.get("guidance_scale"), int | float):
        values["guidance_scale"] = (float(values["guidance_scale"]),)
    return {k: v for k, v in arguments.items() if k not in names} | {"sampling": PublishedSampling(**values)}


def _fresh(arguments: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value() if callable(value) else value for name, value in arguments.items()}
