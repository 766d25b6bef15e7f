"""Numbers become vectors: sinusoids of times and positions, learned tables, and the two-layer map that follows a time."""

import math
from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from reelflow.config import configuration
from reelflow.errors import ConfigError
from reelflow.nn.rope import check_axes

__all__ = ["Learned", "LearnedPositions", "SinCos", "TimeEmbedding", "VectorEmbedding", "grid_sinusoid", "sinusoid"]

Wave = Literal["cos", "sin"]


def sinusoid(
    x: Float[Tensor, "*shape"], dim: int, *, max_period: float = 10_000.0, first: Wave = "cos"
) -> Float[Tensor, "*shape {dim}"]:
    """Return [cos(x f_k), sin(x f_k)] with f_k = max_period^(-k / (dim / 2)), in float32 at least (Vaswani et al. 2017).

    `first` = "sin" puts the sines first.

    Raises:
        ConfigError: `dim` is odd.
    """
    if dim % 2:
        raise ConfigError(f"a sinusoid has an even number of channels, got {dim}; nearest: {dim - 1} or {dim + 1}")
    half = dim // 2
    dtype = torch.promote_types(x.dtype, torch.float32)
    frequencies = torch.exp(torch.arange(half, dtype=dtype, device=x.device) * (-math.log(max_period) / max(half, 1)))
    angles = x.to(dtype)[..., None] * frequencies
    waves = [angles.cos(), angles.sin()]
    return torch.cat(waves if first == "cos" else waves[::-1], dim=-1)


@configuration
class SinCos:
    """Fixed sinusoids added to tokens: how `grid_sinusoid` lays them out.

    Raises:
        ConfigError: a part is odd or negative, or `max_period` is not positive.
    """

    split: tuple[int, int, int] | None = None  # channels of t, h, w; null gives an even share each
    first: Wave = "cos"
    max_period: float = 10_000.0
    kind: Literal["sincos"] = "sincos"

    def __post_init__(self) -> None:
        if self.split is not None:
            check_axes(self.split, sum(self.split) // 2 * 2, parts="sin-cos parts", whole="width")
        if not self.max_period > 0:
            raise ConfigError(f"max_period must be positive, got {self.max_period}; 10000 is usual")


def grid_sinusoid(
    positions: Float[Tensor, "*B N axes"],
    dim: int,
    *,
    max_period: float = 10_000.0,
    split: Sequence[int] | None = None,
    first: Wave = "cos",
) -> Float[Tensor, "*B N {dim}"]:
    """Return the sinusoids of every axis side by side, in the order of the columns of `positions`.

    An axis has its channels of `split`; without one, an even share, and what is left over is zero. The 2D tables of
    image transformers are positions[:, [2, 1]] (columns before rows), each half of the width, sines first.

    Raises:
        ConfigError: the split is not even parts that sum to `dim`, one for each axis.
    """
    axes = positions.shape[-1]
    if split is None:
        split = axes * (dim // axes // 2 * 2,)
    elif len(split) != axes:
        raise ConfigError(f"split takes one part per axis ({axes}), got {tuple(split)}")
    else:
        check_axes(split, dim, parts="sin-cos parts", whole="width")
    columns = zip(positions.unbind(-1), split, strict=True)
    parts = [sinusoid(axis, part, max_period=max_period, first=first) for axis, part in columns]
    return F.pad(torch.cat(parts, dim=-1), (0, dim - sum(split)))


@configuration
class Learned:
    """Learned vectors added to tokens, for grids up to `size`.

    Raises:
        ConfigError: an extent is below 1.
    """

    size: tuple[int, int, int]  # tokens along t, h, w
    form: Literal["axes", "grid"] = "axes"  # a table for each axis, summed; or one vector for each place of the grid
    beyond: Literal["refuse", "interpolate"] = "refuse"  # a longer axis: refuse, or stretch its table from end to end
    kind: Literal["learned"] = "learned"

    def __post_init__(self) -> None:
        if min(self.size) < 1:
            raise ConfigError(f"a position table holds at least 1 token along each axis, got {self.size}")


class LearnedPositions(nn.Module):
    """The tables of `Learned`; a grid smaller than they are reads their first rows."""

    def __init__(self, config: Learned, dim: int) -> None:
        super().__init__()
        self.config = config
        own: list[tuple[int, ...]] = [(0,), (1,), (2,)] if config.form == "axes" else [(0, 1, 2)]
        self.own = own  # the axes along which each table extends; it has extent 1 along the others
        self.tables = nn.ParameterList(
            nn.init.normal_(
                torch.empty(*(n if axis in axes else 1 for axis, n in enumerate(config.size)), dim), std=0.02
            )
            for axes in own
        )

    def forward(self, grid: Sequence[int]) -> Float[Tensor, "N D"]:
        """Return one vector for each token of a (T, H, W) grid, in scan order.

        Raises:
            ConfigError: the grid is larger than the tables and `beyond` is "refuse".
        """
        total = self.tables[0].new_zeros(1)
        for axes, table in zip(self.own, self.tables, strict=True):
            for axis in axes:
                table = self._fit(table, axis, grid[axis])
            total = total + table
        return total.flatten(0, 2)

    def _fit(self, table: Tensor, axis: int, length: int) -> Tensor:
        rows = table.shape[axis]
        if length <= rows:
            return table.narrow(axis, 0, length)
        if self.config.beyond == "refuse":
            raise ConfigError(
                f"the position table holds {rows} tokens along {'thw'[axis]}, got {length}; nearest: {rows}, "
                'or beyond="interpolate"'
            )
        place = torch.linspace(0, rows - 1, length, dtype=torch.float64, device=table.device)
        below = place.floor().long()
        above = (below + 1).clamp(max=rows - 1)
        weight = (place - below).to(table.dtype).view(-1, *(table.ndim - 1 - axis) * (1,))
        return torch.lerp(table.index_select(axis, below), table.index_select(axis, above), weight)


class VectorEmbedding(nn.Module):
    """Linear, SiLU, linear: from a feature vector to the width of the modulation vector."""

    def __init__(self, in_dim: int, dim: int) -> None:
        super().__init__()
        self.up = nn.Linear(in_dim, dim)
        self.down = nn.Linear(dim, dim)

    def forward(self, x: Float[Tensor, "*shape I"]) -> Float[Tensor, "*shape D"]:
        return self.down(F.silu(self.up(x)))


class TimeEmbedding(nn.Module):
    """Embed t in [0, 1] by the sinusoid of 1000 t (Peebles & Xie 2023) and a `VectorEmbedding`."""

    def __init__(self, dim: int, frequencies: int = 256) -> None:
        super().__init__()
        self.frequencies = frequencies
        self.mlp = VectorEmbedding(frequencies, dim)

    def forward(self, t: Float[Tensor, "B groups"]) -> Float[Tensor, "B groups D"]:
        return self.mlp(sinusoid(1000 * t, self.frequencies).to(self.mlp.up.weight.dtype))
