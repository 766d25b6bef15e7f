"""Clips of any length, size and shape, images among them, as one row of tokens: nothing padded, cropped or resized.

    video     [ clip 0 | clip 1 | clip 2 ... ]     each token placed by its own clip's grid, told its own clip's t
    context   [ text 0 | text 1 | text 2 ... ]     real tokens only
    attention clip i and text i see each other and nothing else

`VideoDiT.forward_packed` computes on the row what `VideoDiT` computes on each clip alone (Dehghani et al. 2023, NaViT,
for images; Brooks et al. 2024). Positions in blocks, refiners and learned tables are each clip's own.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from reelflow.errors import ConfigError
from reelflow.models.condition import Condition, stack_conditions

__all__ = ["Clip", "Packed", "ShapeNumber", "pack", "shape_numbers", "told_shape"]

ShapeNumber = Literal["aspect", "frames"]  # width / height, latent frames: with a fixed rate, the duration


@dataclass(frozen=True)
class Clip:
    """One clip, with all that `VideoDiT` is given of it."""

    latents: Float[Tensor, "B C T H W"]  # B = 1, here and in the condition
    t: Float[Tensor, "B"] | Float[Tensor, "B groups"]
    condition: Condition
    token_rate: float | None = None


@dataclass(frozen=True)
class Packed:
    """Clips for one row. `condition` has a row for each, with contexts padded; only the real tokens go on."""

    clips: tuple[Clip, ...]
    condition: Condition  # but for channels and residual, which are as large as the clips
    context_lengths: tuple[int, ...]  # real tokens of each clip's context
    context_places: Int[Tensor, " L"]  # where these are among the padded contexts, laid end to end


def pack(clips: Sequence[Clip]) -> Packed:
    """Return clips as the input of `VideoDiT.forward_packed`.

    Raises:
        ConfigError: there is no clip, or only some of them have one of the parts of a condition.
    """
    if not clips:
        raise ConfigError("a row has at least one clip, got none")
    if any(clip.latents.shape[0] != 1 for clip in clips):
        raise ConfigError("a clip to be packed is a batch of one; cut larger batches, one clip for each row")
    for name in ("channels", "residual"):
        if len({getattr(clip.condition, name) is None for clip in clips}) > 1:
            raise ConfigError(f"cannot pack: only some of the clips have condition.{name}")
    condition = stack_conditions([replace(clip.condition, channels=None, residual=None) for clip in clips])
    masks = [source.real() for source in condition.sources]
    real = torch.cat(masks, dim=1) if masks else torch.zeros(len(clips), 0, dtype=torch.bool)
    return Packed(tuple(clips), condition, tuple(real.sum(1).tolist()), real.flatten().nonzero()[:, 0])


def shape_numbers(which: Sequence[ShapeNumber], latents: Float[Tensor, "B C T H W"]) -> Float[Tensor, "B numbers"]:
    """Return what a network may be told of the shape of clips, for the numbers of their `Condition`."""
    frames, height, width = latents.shape[2:]
    values = [{"aspect": width / height, "frames": float(frames)}[number] for number in which]
    return torch.tensor([values], dtype=latents.dtype, device=latents.device).expand(latents.shape[0], -1)


def told_shape(condition: Condition, which: Sequence[ShapeNumber], latents: Float[Tensor, "B C T H W"]) -> Condition:
    """Return a condition whose numbers begin with those of the shape of clips."""
    if not which:
        return condition
    told, more = shape_numbers(which, latents), condition.numbers
    return replace(condition, numbers=told if more is None else torch.cat([told, more], dim=1))
