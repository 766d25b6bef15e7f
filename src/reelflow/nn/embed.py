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
from reelflow.nn.patchify import Patch, patchify
from reelflow.nn.rope import Coordinates, Steps, check_axes, grid_positions, token_positions

__all__ = [
    "Apart",
    "ApartEmbedding",
    "Learned",
    "LearnedPositions",
    "Number",
    "NumberEmbedding",
    "SinCos",
    "VectorEmbedding",
    "grid_sinusoid",
    "sinusoid",
]

Wave = Literal["cos", "sin"]


def sinusoid(
    x: Float[Tensor, "*shape"], dim: int, *, max_period: float = 10_000.0, first: Wave = "cos", closed: bool = False
) -> Float[Tensor, "*shape {dim}"]:
    """Return [cos(x f_k), sin(x f_k)] with f_k = max_period^(-k / (dim / 2)), in float32 at least (Vaswani et al. 2017).

    `first` = "sin" puts the sines first. `closed` spaces the frequencies so that the last one is 1 / max_period.

    Raises:
        ConfigError: `dim` is odd.
    """
    if dim % 2:
        raise ConfigError(f"a sinusoid has an even number of channels, got {dim}; nearest: {dim - 1} or {dim + 1}")
    half = dim // 2
    dtype = torch.promote_types(x.dtype, torch.float32)
    step = -math.log(max_period) / max(half - closed, 1)
    frequencies = torch.exp(torch.arange(half, dtype=dtype, device=x.device) * step)
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
    coordinates: Coordinates = Steps()
    order: Literal["thw", "twh"] = "thw"  # of the axes' channels
    before: int = 0  # the block that they are added before
    still: bool = True  # added to a clip of one frame too
    kind: Literal["sincos"] = "sincos"

    def __post_init__(self) -> None:
        if self.split is not None:
            check_axes(self.split, sum(self.split) // 2 * 2, parts="sin-cos parts", whole="width")
        if not self.max_period > 0:
            raise ConfigError(f"max_period must be positive, got {self.max_period}; 10000 is usual")
        if self.before < 0:
            raise ConfigError(f"blocks are counted from 0, got before={self.before}")

    def vectors(self, grid: Sequence[int], dim: int, device: torch.device) -> Float[Tensor, "N D"]:
        """Return one vector for each token of a (T, H, W) grid, in float64."""
        positions = token_positions(self.coordinates, grid, device=device)
        split = self.split
        if self.order == "twh":
            positions = positions[:, [0, 2, 1]]
            split = None if split is None else (split[0], split[2], split[1])
        return grid_sinusoid(positions, dim, max_period=self.max_period, split=split, first=self.first)


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
        ConfigError: an extent is below 1, or tables of single axes are frozen or have vectors for a context.
    """

    size: tuple[int, int, int]  # tokens along t, h, w
    form: Literal["axes", "grid"] = "axes"  # a table for each axis, summed; or one vector for each place of the grid
    beyond: Literal["refuse", "interpolate"] = "refuse"  # a longer axis: refuse, or stretch its table from end to end
    at: Literal["corner", "centre"] = "corner"  # where a smaller grid lies in the table
    context: int = 0  # tokens of the context that have vectors too, in the same table, before the grid's
    frozen: bool = False  # never trained, but kept as a checkpoint has them; sinusoids until one is read
    every: bool = False  # added before every block, not before the first alone
    kind: Literal["learned"] = "learned"

    def __post_init__(self) -> None:
        if min(self.size) < 1:
            raise ConfigError(f"a position table holds at least 1 token along each axis, got {self.size}")
        if (self.form == "axes" and (self.context or self.frozen)) or self.context < 0:
            raise ConfigError(
                f"vectors for a context, and frozen ones, need one for each place; got form={self.form!r}, "
                f'context={self.context}, frozen={self.frozen}; nearest: form="grid"'
            )


class LearnedPositions(nn.Module):
    """The tables of `Learned`."""

    def __init__(self, config: Learned, dim: int) -> None:
        super().__init__()
        self.config = config
        own: list[tuple[int, ...]] = [(0,), (1,), (2,)] if config.form == "axes" else [(0, 1, 2)]
        self.own = own  # the axes along which each table extends; it has extent 1 along the others
        if config.form == "axes":
            shapes = [[n if axis in axes else 1 for axis, n in enumerate(config.size)] for axes in own]
        else:
            shapes = [[config.context + math.prod(config.size)]]  # the context's tokens, then the grid's in scan order
        starts = [nn.init.normal_(torch.empty(*shape, dim), std=0.02) for shape in shapes]
        if config.frozen:
            waves = grid_sinusoid(grid_positions(*config.size), dim).to(starts[0].dtype)
            starts = [F.pad(waves, (0, 0, config.context, 0))]
        self.tables = nn.ParameterList(nn.Parameter(start, requires_grad=not config.frozen) for start in starts)

    def forward(self, grid: Sequence[int]) -> Float[Tensor, "N D"]:
        """Return one vector for each token of a (T, H, W) grid, in scan order.

        Raises:
            ConfigError: the grid is larger than the tables and `beyond` is "refuse".
        """
        total = self.tables[0].new_zeros(1)
        for axes, table in zip(self.own, self.tables, strict=True):
            if self.config.form == "grid":
                table = table[self.config.context :].unflatten(0, self.config.size)
            for axis in axes:
                table = self._fit(table, axis, grid[axis])
            total = total + table
        return total.flatten(0, 2)

    def of_context(self, length: int) -> Float[Tensor, "L D"]:
        """Return one vector for each of the context's `length` tokens.

        Raises:
            ConfigError: the table is for another number of them.
        """
        if length != self.config.context:
            raise ConfigError(f"the position table is for {self.config.context} context tokens, got {length}")
        return self.tables[0][:length]

    def _fit(self, table: Tensor, axis: int, length: int) -> Tensor:
        rows = table.shape[axis]
        if length <= rows:
            return table.narrow(axis, (rows - length) // 2 if self.config.at == "centre" else 0, length)
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


@configuration
class Apart:
    """Maps of their own for the patches of channels beside the latents: one for each of `parts`, runs of channels.

    Raises:
        ConfigError: there is no part, or an empty one.
    """

    parts: tuple[int, ...]
    twice: bool = False  # a second map, without a bias, follows each

    def __post_init__(self) -> None:
        if min(self.parts, default=0) < 1:
            raise ConfigError(f"every part has at least 1 channel, and there is at least 1 part; got {self.parts}")


class ApartEmbedding(nn.Module):
    """The maps of `Apart`, to tokens which are summed; all are zero at the start."""

    def __init__(self, config: Apart, patch: Patch, dim: int) -> None:
        super().__init__()
        self.config, self.patch = config, patch
        self.maps = nn.ModuleList(nn.Linear(part * math.prod(patch), dim) for part in config.parts)
        self.then = nn.ModuleList(nn.Linear(dim, dim, bias=False) for _ in config.parts if config.twice)
        for last in self.then if config.twice else self.maps:
            for parameter in last.parameters():
                nn.init.zeros_(parameter)

    def forward(self, x: Float[Tensor, "B C T H W"]) -> Float[Tensor, "B N D"]:
        parts = zip(x.split(self.config.parts, dim=1), self.maps, strict=True)
        tokens = [embed(patchify(part, self.patch)) for part, embed in parts]
        if self.config.twice:
            tokens = [then(part) for part, then in zip(tokens, self.then, strict=True)]
        return sum(tokens[1:], start=tokens[0])


class VectorEmbedding(nn.Module):
    """Linear, SiLU, linear: from a feature vector to the width of the modulation vector."""

    def __init__(self, in_dim: int, dim: int) -> None:
        super().__init__()
        self.up = nn.Linear(in_dim, dim)
        self.down = nn.Linear(dim, dim)

    def forward(self, x: Float[Tensor, "*shape I"]) -> Float[Tensor, "*shape D"]:
        return self.down(F.silu(self.up(x)))


@configuration
class Number:
    """How a number becomes a vector: the sinusoid of scale * x, or of scale * (1 - x), and a `VectorEmbedding`.

    A thousand times t in [0, 1] is usual for times (Peebles & Xie 2023).

    Raises:
        ConfigError: `channels` is odd or below 2.
    """

    channels: int = 256  # of the sinusoid
    scale: float = 1000.0
    counts: Literal["x", "1 - x"] = "x"
    closed: bool = False  # the last frequency is 1 / 10000, not a step short of it
    clean: bool = True  # told to tokens at t = 1 too

    def __post_init__(self) -> None:
        if self.channels < 2 or self.channels % 2:
            near = max(2, self.channels // 2 * 2)
            raise ConfigError(f"a sinusoid has an even number of channels, got {self.channels}; nearest: {near}")


class NumberEmbedding(nn.Module):
    """Embed a number, the time for one, as `Number` says."""

    def __init__(self, config: Number, dim: int) -> None:
        super().__init__()
        self.config = config
        self.mlp = VectorEmbedding(config.channels, dim)

    def forward(self, x: Float[Tensor, "B groups"]) -> Float[Tensor, "B groups D"]:
        config = self.config
        angle = config.scale * (x if config.counts == "x" else 1 - x)
        return self.mlp(sinusoid(angle, config.channels, closed=config.closed).to(self.mlp.up.weight.dtype))
