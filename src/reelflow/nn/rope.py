"""Rotary positions: where each token stands, how fast each channel pair turns, and the turning itself.

    grid        -> positions (B) N axes      `Steps`, `Spans`, `Centred`, `Inscribed`, `Squared`, or your own
    positions   -> table (B) (heads) N half 2: cos and sin of position * frequency, one frequency for each pair
    table, x    -> x with the channel pair (2i, 2i + 1) turned by its angle

By default head channels are split between the axes (T, H, W), and pair i of an axis with m channels has the frequency
theta^(-2i / m) (Su et al. 2021, eq. 34, per axis). To run beyond the length an axis was trained on, `Interpolate`,
`Ntk`, `Yarn` and `Riflex` change its frequencies. Tokens scan T, then H, then W.

Checkpoints that pair channel i with i + m / 2 (the half layout) hold the same rotation with channels in another order;
`interleaved_from_half` turns them round.
"""

import math
from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from reelflow.config import configuration
from reelflow.errors import ConfigError

__all__ = [
    "Centred",
    "Coordinates",
    "Extension",
    "Inscribed",
    "Interpolate",
    "Ntk",
    "Riflex",
    "Rope",
    "Spans",
    "Squared",
    "Steps",
    "Stretch",
    "Yarn",
    "apply_rope",
    "axial_frequencies",
    "check_axes",
    "full_width_frequencies",
    "grid_positions",
    "half_from_interleaved",
    "interleaved_from_half",
    "mixed_rope_table",
    "permute_channels",
    "rope_frequencies",
    "rope_table",
    "token_positions",
]

# One table for all, one per sample, or one per sample and head.
Rope = Float[Tensor, "N half 2"] | Float[Tensor, "#B N half 2"] | Float[Tensor, "#B #heads N half 2"]
Triple = tuple[float, float, float]


def check_axes(axes: Sequence[int], head_dim: int, *, parts: str = "rope parts", whole: str = "head dim") -> None:
    """Refuse a split that does not fill the head with even parts; `parts` and `whole` name them in the message.

    Raises:
        ConfigError: the parts are odd, negative, or do not sum to `head_dim`.
    """
    if any(part < 0 or part % 2 for part in axes) or sum(axes) != head_dim:
        fits = head_dim + head_dim % 2
        part = fits // len(axes) // 2 * 2
        split = (fits - (len(axes) - 1) * part, *(len(axes) - 1) * (part,))
        raise ConfigError(
            f"{parts} must be even and sum to the {whole} {head_dim}, got {tuple(axes)} (sum {sum(axes)}); "
            f"for example {split}{'' if fits == head_dim else f' with a {whole} of {fits}'}"
        )


# Positions: where a token stands.


@configuration
class Steps:
    """Positions that grow by `step` from `start` along t, h, w, whatever the size of the grid.

    A step of 1/s interpolates by s; start -1 and step 2/m is a fraction of m in [-1, 1]. With `time` "seconds" step[0]
    is the step of one second: the trained token rate keeps positions in step with the clock at any other rate.

    Raises:
        ConfigError: a step is not positive, or `first` is not in (0, 1].
    """

    step: Triple = (1.0, 1.0, 1.0)
    start: Triple = (0.0, 0.0, 0.0)
    time: Literal["tokens", "seconds"] = "tokens"
    first: float = 1.0  # duration of the first token in tokens: 1 / stride if the autoencoder keeps frame 0 alone
    at: Literal["edge", "centre"] = "edge"  # of the cell that a token covers
    kind: Literal["steps"] = "steps"

    def __post_init__(self) -> None:
        if not min(self.step) > 0:
            raise ConfigError(f"steps must be positive, got {self.step}; 1 counts tokens")
        if not 0 < self.first <= 1:
            raise ConfigError(f"first is a part of a token in (0, 1], got {self.first}; 1 is a whole one")

    def line(self, grid: Sequence[int]) -> tuple[Triple, Triple]:
        return self.step, self.start


@configuration
class Spans:
    """Along each axis equal cells fill a span (low, high), however many they are; `None` counts tokens from 0.

    (0, 1) and (-1, 1) are fractions of the clip; (0, n) shows any grid as the reference grid of n tokens.

    Raises:
        ConfigError: a span does not rise.
    """

    t: tuple[float, float] | None
    h: tuple[float, float] | None
    w: tuple[float, float] | None
    at: Literal["edge", "centre"] = "centre"  # of the cell that a token covers
    kind: Literal["spans"] = "spans"

    def __post_init__(self) -> None:
        for axis, span in zip("thw", (self.t, self.h, self.w), strict=True):
            if span is not None and not span[0] < span[1]:
                raise ConfigError(f"a span must rise from low to high, got {axis}={span}; nearest: {span[::-1]}")

    def line(self, grid: Sequence[int]) -> tuple[Triple, Triple]:
        lows, steps = [], []
        for span, cells in zip((self.t, self.h, self.w), grid, strict=True):
            low, high = (0.0, float(cells)) if span is None else span
            steps.append((high - low) / cells)
            lows.append(low if span is None or self.at == "edge" else low + steps[-1] / 2)
        return (steps[0], steps[1], steps[2]), (lows[0], lows[1], lows[2])


@configuration
class Centred:
    """Time counts tokens from 0; rows and columns are centres of square cells around 0.

    A cell has side 1, or with `area` the side sqrt(area / (H W)) that gives every grid the same area.

    Raises:
        ConfigError: `area` is not positive.
    """

    area: float | None = None
    kind: Literal["centred"] = "centred"

    def __post_init__(self) -> None:
        if self.area is not None and not self.area > 0:
            raise ConfigError(f"area must be positive, got {self.area}; null gives cells of side 1")

    def line(self, grid: Sequence[int]) -> tuple[Triple, Triple]:
        _, height, width = grid
        side = 1.0 if self.area is None else math.sqrt(self.area / (height * width))
        return (1.0, side, side), (0.0, (1 - height) / 2 * side, (1 - width) / 2 * side)


@configuration
class Inscribed:
    """Time counts tokens from 0; rows and columns fill the largest box of their proportions inside `h` x `w` tokens.

    The box has whole sides and lies in the middle. Along a side from a to b, n tokens stand evenly from a to
    b (n - 1) / n, as published code has it: edges of equal cells if a = 0, and a little apart from them otherwise.

    Raises:
        ConfigError: a side is below 1.
    """

    h: int
    w: int
    kind: Literal["inscribed"] = "inscribed"

    def __post_init__(self) -> None:
        if min(self.h, self.w) < 1:
            raise ConfigError(f"a box has sides of at least 1 token, got {self.h} x {self.w}")

    def line(self, grid: Sequence[int]) -> tuple[Triple, Triple]:
        _, height, width = grid
        scale = min(self.h / height, self.w / width)
        steps, starts = [1.0], [0.0]
        for side, n in ((self.h, height), (self.w, width)):
            box = round(n * scale)
            start = float(round((side - box) / 2))
            steps.append(((start + box) * (n - 1) / n - start) / max(n - 1, 1))
            starts.append(start)
        return (steps[0], steps[1], steps[2]), (starts[0], starts[1], starts[2])


@configuration
class Squared:
    """Time counts tokens from 0; rows and columns are edges of equal cells along sides of `side` n / sqrt(H W).

    n is sqrt(H W) rounded: whatever its proportions, a clip is shown as a square of n x n tokens, which has the side
    `side` if n is exact.

    Raises:
        ConfigError: `side` is not positive.
    """

    side: float
    kind: Literal["squared"] = "squared"

    def __post_init__(self) -> None:
        if not self.side > 0:
            raise ConfigError(f"side must be positive, got {self.side}; 32 shows every clip as 32 x 32 tokens")

    def line(self, grid: Sequence[int]) -> tuple[Triple, Triple]:
        _, height, width = grid
        root = math.sqrt(height * width)
        side = self.side * round(root) / root
        return (1.0, side / height, side / width), (0.0, 0.0, 0.0)


Coordinates = Steps | Spans | Centred | Inscribed | Squared


def grid_positions(
    num_frames: int, height: int, width: int, *, device: torch.device | None = None
) -> Float[Tensor, "N 3"]:
    """Return the integer (t, h, w) of every token of a grid, in scan order."""
    axes = [torch.arange(n, dtype=torch.float64, device=device) for n in (num_frames, height, width)]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).flatten(0, 2)


def token_positions(
    coordinates: Coordinates,
    grid: Sequence[int],
    *,
    token_rate: float | Float[Tensor, "B"] | None = None,
    device: torch.device | None = None,
) -> Float[Tensor, "*B N 3"]:
    """Return the (t, h, w) of every token of a (T, H, W) grid: one grid, or one per sample if `token_rate` is per sample.

    `token_rate` is tokens per second along time, fps / (temporal stride * patch); only positions in seconds depend on it.

    Raises:
        ConfigError: positions in seconds without a positive token rate.
    """
    cells = grid_positions(*grid, device=device)
    step, start = (torch.tensor(x, dtype=torch.float64, device=device) for x in coordinates.line(grid))
    if isinstance(coordinates, Steps):
        begin = cells - torch.tensor([1 - coordinates.first, 0, 0], dtype=torch.float64, device=device)
        edges = begin.clamp(min=0)
        cells = edges if coordinates.at == "edge" else (edges + begin + 1) / 2
        if coordinates.time == "seconds":
            rate = torch.as_tensor(0.0 if token_rate is None else token_rate, dtype=torch.float64)
            if not bool((rate > 0).all()):
                raise ConfigError(
                    f"positions in seconds need a positive token_rate, got {token_rate}; 24 fps / 4 is 6.0"
                )
            rate = rate.to(device)
            step = step / torch.stack([rate, torch.ones_like(rate), torch.ones_like(rate)], dim=-1)[..., None, :]
    return start + cells * step


# Frequencies: how fast a pair turns.


@configuration
class Interpolate:
    """Slow every pair down by the ratio of lengths (Chen et al. 2023, position interpolation)."""

    kind: Literal["interpolate"] = "interpolate"

    def extend(self, frequencies: Float[Tensor, "half"], trained: float, length: float) -> Float[Tensor, "half"]:
        return frequencies * (trained / length)


@configuration
class Ntk:
    """Keep the fastest pair, slow the slowest one down by the ratio s of lengths, and those between by powers of s.

    The same as theta' = theta * s^(m / (m - 2)) for m channels (bloc97 2023; Peng et al. 2023, def. 1).
    """

    kind: Literal["ntk"] = "ntk"

    def extend(self, frequencies: Float[Tensor, "half"], trained: float, length: float) -> Float[Tensor, "half"]:
        if len(frequencies) == 1:
            raise ConfigError("the NTK extension needs two pairs, got an axis of 2 channels; nearest: 4")
        power = torch.arange(len(frequencies), dtype=frequencies.dtype, device=frequencies.device)
        return frequencies * (trained / length) ** (power / (len(frequencies) - 1))


@configuration
class Yarn:
    """Keep pairs that turned often over the trained length, interpolate those that turned seldom (Peng et al. 2023).

    A pair of `fast` turns or more is kept, one of `slow` or less is interpolated, the mean is linear in turns between
    (def. 2, "NTK by parts"). Queries and keys grow by 1 + temperature * ln(length / trained) each (eq. 22); the paper
    has temperature 0.1.

    Raises:
        ConfigError: not 0 < slow < fast, or a negative temperature.
    """

    slow: float = 1.0
    fast: float = 32.0
    temperature: float = 0.0
    kind: Literal["yarn"] = "yarn"

    def __post_init__(self) -> None:
        if not 0 < self.slow < self.fast:
            raise ConfigError(
                f"turns must satisfy 0 < slow < fast, got {self.slow} and {self.fast}; for example 1 and 32"
            )
        if self.temperature < 0:
            raise ConfigError(f"temperature must not be negative, got {self.temperature}; nearest: 0 (none)")

    def extend(self, frequencies: Float[Tensor, "half"], trained: float, length: float) -> Float[Tensor, "half"]:
        turns = trained * frequencies / (2 * math.pi)
        keep = ((turns - self.slow) / (self.fast - self.slow)).clamp(0, 1)
        return frequencies * (keep + (1 - keep) * (trained / length))


@configuration
class Riflex:
    """Slow down one pair, the intrinsic one, until its period exceeds the new length (Zhao et al. 2025, eq. 7 and 8).

    It is the pair whose period is nearest to `repeats_after`, the position at which clips that are too long begin to
    repeat themselves. The new length becomes `margin` of its period; a pair already as slow stays.

    Raises:
        ConfigError: `repeats_after` is not positive, or `margin` is not in (0, 1).
    """

    repeats_after: float
    margin: float = 0.9
    kind: Literal["riflex"] = "riflex"

    def __post_init__(self) -> None:
        if not self.repeats_after > 0:
            raise ConfigError(
                f"repeats_after must be positive, got {self.repeats_after}; for example the trained length"
            )
        if not 0 < self.margin < 1:
            raise ConfigError(f"margin is a part of a period in (0, 1), got {self.margin}; nearest published: 0.9")

    def extend(self, frequencies: Float[Tensor, "half"], trained: float, length: float) -> Float[Tensor, "half"]:
        intrinsic = (2 * math.pi / frequencies - self.repeats_after).abs().argmin()
        chosen = torch.arange(len(frequencies), device=frequencies.device) == intrinsic
        return torch.where(chosen, frequencies.clamp(max=self.margin * 2 * math.pi / length), frequencies)


Extension = Interpolate | Ntk | Yarn | Riflex


@configuration
class Stretch:
    """An axis trained on `trained` and used on `length`, in units of position, with the extension that makes it fit.

    At the trained length nothing changes.

    Raises:
        ConfigError: `length` is below `trained`, or `trained` is not positive.
    """

    by: Extension
    trained: float
    length: float

    def __post_init__(self) -> None:
        if not self.trained > 0:
            raise ConfigError(f"the trained length must be positive, got {self.trained}")
        if not self.length >= self.trained:
            raise ConfigError(
                f"an extension reaches beyond the trained length {self.trained}, got {self.length}; "
                f"nearest: {self.trained}; a shorter axis needs none"
            )


def rope_frequencies(
    channels: int, theta: float = 10_000.0, *, stretch: Stretch | None = None, device: torch.device | None = None
) -> Float[Tensor, "half"]:
    """Return the angle per position of each pair of one axis, theta^(-2i / channels), fastest first, in float64.

    Raises:
        ConfigError: `channels` is odd or negative, `theta` is not positive, or the extension needs more channels.
    """
    if channels < 0 or channels % 2:
        raise ConfigError(
            f"a rope axis has an even number of channels, got {channels}; nearest: {max(0, channels + 1)}"
        )
    if not theta > 0:
        raise ConfigError(f"theta must be positive, got {theta}; 10000 is usual")
    exponent = torch.arange(0, channels, 2, dtype=torch.float64, device=device) / max(channels, 1)
    frequencies = theta**-exponent
    if stretch is None or channels == 0 or stretch.length == stretch.trained:
        return frequencies
    return stretch.by.extend(frequencies, stretch.trained, stretch.length)


def axial_frequencies(
    axes: Sequence[int],
    *,
    theta: float | Sequence[float] = 10_000.0,
    stretch: Sequence[Stretch | None] = (),
    device: torch.device | None = None,
) -> Float[Tensor, "axes half"]:
    """Return the frequency of each pair (column) along each axis (row): each pair belongs to one axis, in blocks.

    `theta` and `stretch` are one for each axis; a single theta and no stretch serve all.

    Raises:
        ConfigError: `theta` or `stretch` is of another number than the axes, or as `rope_frequencies`.
    """
    thetas = [theta] * len(axes) if isinstance(theta, (int, float)) else list(theta)
    stretches = list(stretch) or [None] * len(axes)
    for name, given in (("theta", thetas), ("stretch", stretches)):
        if len(given) != len(axes):
            raise ConfigError(f"{name} takes one value or one per axis ({len(axes)}), got {len(given)}")
    rows = zip(axes, thetas, stretches, strict=True)
    return torch.block_diag(*(rope_frequencies(m, base, stretch=s, device=device)[None] for m, base, s in rows))


def full_width_frequencies(
    dim: int, num_heads: int, *, num_axes: int = 3, theta: float = 10_000.0, device: torch.device | None = None
) -> Float[Tensor, "axes heads half"]:
    """Return frequencies that run over the whole width, so that heads differ, for `mixed_rope_table`.

    n = dim // (2 axes) frequencies rise geometrically from pi/2 to theta pi/2, for positions in [-1, 1]; axes take turns
    with each. The dim - 2 n axes channels left over come first and do not turn.

    Raises:
        ConfigError: heads do not cut the width into even parts, `dim` has no pair for each axis, or theta is not positive.
    """
    if num_heads < 1 or dim < 1 or dim % (2 * num_heads):
        near = max(1, round(dim / (2 * max(num_heads, 1)))) * 2 * max(num_heads, 1)
        raise ConfigError(f"width {dim} does not cut into {num_heads} heads of even size; nearest: {near}")
    if not theta > 0:
        raise ConfigError(f"theta must be positive, got {theta}; 10000 is usual")
    count = dim // (2 * num_axes)
    if count < 1:
        raise ConfigError(f"{num_axes} axes need a width of at least {2 * num_axes}, got {dim}")
    turns = theta ** torch.linspace(0, 1, count, dtype=torch.float64, device=device) * (math.pi / 2)
    matrix = torch.kron(turns[None], torch.eye(num_axes, dtype=torch.float64, device=device))
    return F.pad(matrix, (dim // 2 - count * num_axes, 0)).unflatten(1, (num_heads, -1))


# Tables and their use.


def rope_table(
    positions: Float[Tensor, "*B N axes"],
    axes: Sequence[int],
    *,
    theta: float | Sequence[float] = 10_000.0,
    stretch: Sequence[Stretch | None] = (),
) -> Float[Tensor, "*B N half 2"]:
    """Return (cos, sin) for each token and channel pair, `axes` channels for each axis.

    Angles are computed in float64, so that a long clip does not blur its last positions. `theta` and `stretch` as in
    `axial_frequencies`; a `Yarn` temperature multiplies the whole table.

    Raises:
        ConfigError: as `axial_frequencies`.
    """
    frequencies = axial_frequencies(axes, theta=theta, stretch=stretch, device=positions.device)
    growth = 1.0
    for s in stretch:
        if s is not None and isinstance(s.by, Yarn):
            growth *= 1 + s.by.temperature * math.log(s.length / s.trained)
    return _table(positions.double() @ frequencies) * growth


def mixed_rope_table(
    positions: Float[Tensor, "N axes"] | Float[Tensor, "B N axes"], frequencies: Float[Tensor, "axes heads half"]
) -> Float[Tensor, "#B heads N half 2"]:
    """Return (cos, sin) with a frequency for each axis, head and pair: a pair turns with all axes at once.

    Learned frequencies are a parameter that starts, for example, as `axial_frequencies(...)` repeated for each head.
    Angles are computed in the type of `frequencies`, in float32 at least.
    """
    wide = frequencies.to(torch.promote_types(frequencies.dtype, torch.float32))
    angles = torch.einsum("... n a, a h p -> ... h n p", positions.to(wide.dtype), wide)
    return _table(angles if positions.ndim == 3 else angles[None])


def _table(angles: Tensor) -> Tensor:
    return torch.stack([angles.cos(), angles.sin()], dim=-1)


def apply_rope(x: Float[Tensor, "B heads N d"], rope: Rope) -> Float[Tensor, "B heads N d"]:
    """Turn each channel pair (2i, 2i + 1) of each token by its angle, in float32 at least.

    A table of 4 dimensions is one per sample, of 5 one per sample and head.
    A pair is a complex number and its turn one product, which on a CPU is five times as fast as four half-products.
    """
    if rope.ndim == 4:
        rope = rope[:, None]
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    turned = torch.view_as_complex(wide.unflatten(-1, (-1, 2)).contiguous()) * torch.view_as_complex(
        rope.to(wide.dtype)
    )
    return torch.view_as_real(turned).flatten(-2).to(x.dtype)


# Layouts: the same rotation with channels in another order.


def interleaved_from_half(blocks: Sequence[int]) -> Int[Tensor, "d"]:
    """Return the order in which to read channels in the half layout to have them interleaved: new[i] = old[order[i]].

    Within each block of m channels, half pairs are (i, i + m / 2):

        half         a0 a1 a2 b0 b1 b2
        interleaved  a0 b0 a1 b1 a2 b2

    `blocks` is (head_dim,) where all first halves come before all second halves, the axes where each axis has its own
    halves. Applied to the rows of q and k projections (`permute_channels`), a checkpoint is turned round at load.

    Raises:
        ConfigError: a block is odd or negative.
    """
    for block in blocks:
        if block < 0 or block % 2:
            raise ConfigError(f"blocks must be even to have halves, got {tuple(blocks)}; nearest: {max(0, block + 1)}")
    parts = torch.arange(sum(blocks)).split(list(blocks))
    return torch.cat([part.view(2, -1).T.flatten() for part in parts])


def half_from_interleaved(blocks: Sequence[int]) -> Int[Tensor, "d"]:
    """Return the order that undoes `interleaved_from_half`, for export.

    Raises:
        ConfigError: a block is odd or negative.
    """
    return interleaved_from_half(blocks).argsort()


def permute_channels(weight: Float[Tensor, "out *rest"], order: Int[Tensor, "d"]) -> Float[Tensor, "out *rest"]:
    """Reorder the channels of each head, along the rows of a q or k projection, its bias, or the weight of its norm.

    Raises:
        ConfigError: the rows are not a whole number of heads.
    """
    if weight.shape[0] % len(order):
        raise ConfigError(f"{weight.shape[0]} rows are not a whole number of heads of {len(order)} channels")
    return weight.unflatten(0, (-1, len(order)))[:, order.to(weight.device)].flatten(0, 1)
