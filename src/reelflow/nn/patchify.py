"""Latents become spacetime tokens, and tokens become latents again."""

from collections.abc import Sequence
from typing import NamedTuple

from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from reelflow.errors import ConfigError

__all__ = ["Grid", "Patch", "patchify", "token_grid", "unpatchify"]


class Patch(NamedTuple):
    """Extent of one patch in latent positions."""

    t: int
    h: int
    w: int


class Grid(NamedTuple):
    """Extent of a clip in tokens."""

    t: int
    h: int
    w: int

    @property
    def num_tokens(self) -> int:
        return self.t * self.h * self.w


def token_grid(shape: Sequence[int], patch: Patch) -> Grid:
    """Return the token grid of latents with extents (T, H, W).

    Raises:
        ConfigError: an extent is not a multiple of the patch.
    """
    for name, extent, size in zip(("frames", "height", "width"), shape, patch, strict=True):
        if extent < 1 or extent % size:
            below = extent // size * size
            options = f"{below} or {below + size}" if below else f"{size}"
            raise ConfigError(
                f"latent {name} must be a multiple of the patch ({size}), got {extent}; nearest: {options}"
            )
    return Grid(*(extent // size for extent, size in zip(shape, patch, strict=True)))


def patchify(latents: Float[Tensor, "B C T H W"], patch: Patch) -> Float[Tensor, "B N D"]:
    """Cut latents into non-overlapping patches, scanning T, then H, then W; channels order (C, t, h, w)."""
    return rearrange(latents, "B C (T t) (H h) (W w) -> B (T H W) (C t h w)", t=patch.t, h=patch.h, w=patch.w)


def unpatchify(tokens: Float[Tensor, "B N D"], grid: Grid, patch: Patch) -> Float[Tensor, "B C T H W"]:
    """Undo `patchify`."""
    return rearrange(
        tokens,
        "B (T H W) (C t h w) -> B C (T t) (H h) (W w)",
        T=grid.t,
        H=grid.h,
        W=grid.w,
        t=patch.t,
        h=patch.h,
        w=patch.w,
    )
