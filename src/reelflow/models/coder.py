"""Layers of a video autoencoder, as values: an encoder, or a decoder, is a tuple of them.

    Conv        a causal convolution, perhaps strided
    Res         norm, SiLU, convolution, twice, around the input
    Act         norm, SiLU
    Attention   among the positions of a frame, those of all frames so far, or one through the frames so far
    Waves       sines and cosines of the channels beside them
    TimeDown    time by a convolution that passes frame 0;  TimeUp  its mirror
    Nearest     repeated positions and frames
    Fold        cells into channels, or their means;  Unfold  its mirror
    Tile        all channels again and again
    Haar        sums and differences of a cell's places
    Standard    no mean and unit variance, by constants of channels and frames
    Lead, Drop  frames of zeros before the first; the first frames away
    Take        some channels, scaled
    Skip        layers, and a shortcut of other layers added to them
    Timed       layers whose norms the time shifts and scales

Each takes the channels that the one before gives, builds its module, which maps `(x, state)` to `(y, state)` as
`reelflow.nn.conv` says, and knows by how much it divides or multiplies space and time, and whether it streams.
"""

from collections.abc import Iterable, Iterator, Sequence
from math import pi, prod
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from reelflow.config import configuration
from reelflow.errors import ConfigError
from reelflow.nn import conv
from reelflow.nn.attention import attend, split_heads
from reelflow.nn.conv import (
    Before,
    CausalConv3d,
    CausalSequence,
    FoldOrder,
    Given,
    SpacePadding,
    State,
    TimePadding,
    refuse_state,
    write,
)
from reelflow.nn.embed import Number, NumberEmbedding
from reelflow.nn.norm import ChannelRMSNorm, Norm

__all__ = [
    "Act",
    "Attention",
    "ChannelNorm",
    "Conv",
    "Drop",
    "Fold",
    "Given",
    "GroupNorm",
    "Groups",
    "Haar",
    "Layer",
    "Lead",
    "Nearest",
    "Padding",
    "Part",
    "Res",
    "ResBlock",
    "Shifted",
    "Skip",
    "Standard",
    "Take",
    "Tile",
    "TimeDown",
    "TimeUp",
    "Timed",
    "Unfold",
    "Waves",
    "build_layers",
    "factor",
    "obstacles",
    "width_after",
]

Video = Float[Tensor, "B C T H W"]
Output = Float[Tensor, "B D T2 H2 W2"]
Kernel = tuple[int, int]  # in time and in space
ROWS = 2**15  # of a batch in one call of attention: some kernels refuse more than 2^16


@configuration
class Padding:
    """What convolutions see beyond the clip."""

    time: TimePadding = "first"
    space: SpacePadding = "zeros"


@configuration
class Groups:
    """A norm over groups of channels (Wu & He 2018), with the statistics of each frame, the whole clip, or a piece of it.

    The pieces are those that `reelflow.models.vae.Pieces` cuts. Of `given` channels above 0, its weights follow from maps
    of the latents that are decoded, each spread over the positions and frames that become of it (Zheng et al. 2022, MoVQ).
    """

    num: int = 32
    over: Literal["frame", "clip", "piece"] = "frame"
    eps: float = 1e-6
    given: int = 0


@configuration
class Shifted:
    """A norm, then a scale and a shift of each channel that the time and a table say (`Timed`)."""

    norm: Norm = Norm("rms")


ChannelNorm = Norm | Groups | Shifted


@configuration
class Conv:
    """A convolution to `channels`."""

    channels: int
    kernel: Kernel = (3, 3)
    stride: Kernel = (1, 1)
    pad: Padding = Padding()
    bias: bool = True
    first: Literal["alone", "cell"] = "alone"  # what a stride in time makes of frame 0
    kind: Literal["conv"] = "conv"

    @property
    def time(self) -> int:
        return self.stride[0]

    @property
    def space(self) -> int:
        return self.stride[1]

    def width(self, channels: int) -> int:
        return self.channels

    def build(self, channels: int) -> CausalConv3d:
        return CausalConv3d(
            channels,
            self.channels,
            self.kernel,
            stride=self.stride,
            time_padding=self.pad.time,
            space_padding=self.pad.space,
            bias=self.bias,
            first=self.first,
        )

    @property
    def obstacle(self) -> str:
        return _looks_ahead(self.pad) if self.kernel[0] > 1 else ""


@configuration
class Res:
    """A `ResBlock` to `channels`, whose two convolutions have these kernels.

    Where the width changes, a norm may come before the projection of the input. `noise` adds to what each convolution gives
    a picture of noise, the same in all channels and frames, by a learned measure of each channel. Of what is added to the
    input, all may be kept, or a learned share in (0, 1), half of it at the start.
    """

    channels: int
    norm: ChannelNorm = Norm("rms", affine=True)
    kernels: tuple[Kernel, Kernel] = ((3, 3), (3, 3))
    pad: Padding = Padding()
    projected: Norm | None = None
    noise: bool = False
    added: Literal["all", "share"] = "all"
    bias: bool = True  # of the convolutions
    kind: Literal["res"] = "res"
    time: ClassVar[int] = 1
    space: ClassVar[int] = 1

    def width(self, channels: int) -> int:
        _check_norm(self.norm, channels)
        _check_norm(self.norm, self.channels)
        return self.channels

    def build(self, channels: int) -> nn.Module:
        return ResBlock(channels, self)

    @property
    def obstacle(self) -> str:
        noise = "its noise is the same in all frames" if self.noise else ""
        return _looks_ahead(self.pad) or _sees_clip(self.norm) or noise


@configuration
class Act:
    """A norm, unless there is none, and SiLU."""

    norm: ChannelNorm | None = Norm("rms", affine=True)
    kind: Literal["act"] = "act"
    time: ClassVar[int] = 1
    space: ClassVar[int] = 1

    def width(self, channels: int) -> int:
        _check_norm(self.norm, channels)
        return channels

    def build(self, channels: int) -> nn.Module:
        return Pointwise(channels, self.norm)

    @property
    def obstacle(self) -> str:
        return _sees_clip(self.norm)


@configuration
class Attention:
    """Attention, normed before and added to its input.

    Each position sees those of its frame; or of all frames up to its own ("past"), or itself in these ("pixel"), whose keys
    a stream keeps. Queries and keys may have length one in each head.
    """

    sees: Literal["frame", "past", "pixel"] = "frame"
    norm: ChannelNorm = Norm("rms", affine=True)
    heads: int = 1
    lengths: Literal["free", "one"] = "free"
    bias: bool = True  # of queries, keys and values
    kind: Literal["attention"] = "attention"
    time: ClassVar[int] = 1
    space: ClassVar[int] = 1

    def width(self, channels: int) -> int:
        _check_norm(self.norm, channels)
        if channels % self.heads:
            near = max(1, round(channels / self.heads)) * self.heads
            raise ConfigError(f"{channels} channels do not divide into {self.heads} heads; nearest: {near}")
        return channels

    def build(self, channels: int) -> nn.Module:
        return AttentionBlock(channels, self)

    @property
    def obstacle(self) -> str:
        return _sees_clip(self.norm)


@configuration
class Waves:
    """Set beside the channels x the sines, then the cosines, of 2 pi 2^n x for `count` n from `first`."""

    first: int = 6
    count: int = 2
    kind: Literal["waves"] = "waves"
    time: ClassVar[int] = 1
    space: ClassVar[int] = 1
    obstacle: ClassVar[str] = ""

    def width(self, channels: int) -> int:
        return channels * (1 + 2 * self.count)

    def build(self, channels: int) -> nn.Module:
        return WaveChannels(self)


@configuration
class Take:
    """Keep the first `channels`, `scale` times."""

    channels: int
    scale: float = 1.0
    kind: Literal["take"] = "take"
    time: ClassVar[int] = 1
    space: ClassVar[int] = 1
    obstacle: ClassVar[str] = ""

    def width(self, channels: int) -> int:
        if channels < self.channels:
            raise ConfigError(f"cannot keep {self.channels} of {channels} channels; nearest: {channels}")
        return self.channels

    def build(self, channels: int) -> nn.Module:
        return FirstChannels(self)


@configuration
class Lead:
    """Put `frames` frames of zeros before the first (`reelflow.nn.conv.Lead`)."""

    frames: int
    kind: Literal["lead"] = "lead"
    time: ClassVar[int] = 1
    space: ClassVar[int] = 1
    obstacle: ClassVar[str] = ""

    def width(self, channels: int) -> int:
        return channels

    def build(self, channels: int) -> nn.Module:
        return conv.Lead(self.frames)


@configuration
class Drop:
    """Drop the first `frames` frames (`reelflow.nn.conv.Drop`)."""

    frames: int
    kind: Literal["drop"] = "drop"
    time: ClassVar[int] = 1
    space: ClassVar[int] = 1
    obstacle: ClassVar[str] = ""

    def width(self, channels: int) -> int:
        return channels

    def build(self, channels: int) -> nn.Module:
        return conv.Drop(self.frames)


@configuration
class TimeDown:
    """Halve time by a convolution that passes frame 0 (`reelflow.nn.conv.TimeDown`)."""

    kind: Literal["time_down"] = "time_down"
    time: ClassVar[int] = 2
    space: ClassVar[int] = 1
    obstacle: ClassVar[str] = ""

    def width(self, channels: int) -> int:
        return channels

    def build(self, channels: int) -> nn.Module:
        return conv.TimeDown(channels)


@configuration
class TimeUp:
    """Double time by a convolution that passes frame 0 (`reelflow.nn.conv.TimeUp`)."""

    kind: Literal["time_up"] = "time_up"
    time: ClassVar[int] = 2
    space: ClassVar[int] = 1
    obstacle: ClassVar[str] = ""

    def width(self, channels: int) -> int:
        return channels

    def build(self, channels: int) -> nn.Module:
        return conv.TimeUp(channels)


@configuration
class Nearest:
    """Repeat positions, and frames but frame 0 (`reelflow.nn.conv.Nearest`)."""

    space: int = 2
    time: int = 1
    first: Literal["alone", "odd"] = "alone"
    kind: Literal["nearest"] = "nearest"
    obstacle: ClassVar[str] = ""

    def width(self, channels: int) -> int:
        return channels

    def build(self, channels: int) -> nn.Module:
        return conv.Nearest(self.space, self.time, first=self.first)


@configuration
class Fold:
    """Fold cells into channels, all of them (0) or averaged to `channels` (`reelflow.nn.conv.Fold`)."""

    space: int = 2
    time: int = 1
    channels: int = 0
    first: Literal["repeat", "zeros", "alone", "odd"] = "repeat"
    order: FoldOrder = "channel"
    kind: Literal["fold"] = "fold"
    obstacle: ClassVar[str] = ""

    def width(self, channels: int) -> int:
        folded = channels * self.space**2
        whole = folded * self.time
        alone = folded if self.first in ("alone", "odd") else whole
        if self.channels and (whole % self.channels or alone % self.channels):
            raise ConfigError(
                f"{alone} folded channels cannot be averaged to {self.channels}, which does not divide them"
            )
        if self.first in ("alone", "odd") and not self.channels and self.time > 1:
            raise ConfigError("frame 0 folded alone has fewer channels than the others; give channels to average to")
        return self.channels or whole

    def build(self, channels: int) -> nn.Module:
        return conv.Fold(space=self.space, time=self.time, first=self.first, order=self.order, channels=self.channels)


@configuration
class Unfold:
    """Unfold channels into cells, each copied until there are `channels`, if given (`reelflow.nn.conv.Unfold`)."""

    space: int = 2
    time: int = 1
    channels: int = 0
    first: Literal["drop", "keep", "alone"] = "drop"
    order: FoldOrder = "channel"
    kind: Literal["unfold"] = "unfold"
    obstacle: ClassVar[str] = ""

    def width(self, channels: int) -> int:
        cells = self.space**2 * self.time
        fewest = self.channels * (self.space**2 if self.first == "alone" else cells)
        if self.channels and (fewest % channels or self.channels * cells % channels):
            raise ConfigError(f"{channels} channels cannot be copied to {fewest}, of which they are no divisor")
        if not self.channels and channels % cells:
            near = max(1, round(channels / cells)) * cells
            raise ConfigError(f"{channels} channels cannot be unfolded into cells of {cells}; nearest: {near}")
        return self.channels or channels // cells

    def build(self, channels: int) -> nn.Module:
        return conv.Unfold(space=self.space, time=self.time, first=self.first, order=self.order, channels=self.channels)


@configuration
class Tile:
    """All channels, one after the other, as often as they fit into `channels`."""

    channels: int
    kind: Literal["tile"] = "tile"
    time: ClassVar[int] = 1
    space: ClassVar[int] = 1
    obstacle: ClassVar[str] = ""

    def width(self, channels: int) -> int:
        if self.channels % channels:
            near = max(1, round(self.channels / channels)) * channels
            raise ConfigError(f"{channels} channels do not fill {self.channels} evenly; nearest: {near}")
        return self.channels

    def build(self, channels: int) -> nn.Module:
        return Tiles(self.channels // channels)


@configuration
class Haar:
    """The means of cells of 2 x 2 x 2, then of their differences along w, h, h and w, and so on: t slowest; or back.

    Comes after Fold(2, 2, order="cell"), and, back ("up"), before such an Unfold (Haar 1910).
    """

    way: Literal["down", "up"]
    kind: Literal["haar"] = "haar"
    time: ClassVar[int] = 1
    space: ClassVar[int] = 1
    obstacle: ClassVar[str] = ""

    def width(self, channels: int) -> int:
        if channels % 8:
            near = max(1, round(channels / 8)) * 8
            raise ConfigError(f"{channels} channels are no cells of 2 x 2 x 2; nearest: {near}")
        return channels

    def build(self, channels: int) -> nn.Module:
        return HaarCells(self)


@configuration
class Standard:
    """(x - mean) / std, or ("up") back, where each channel has constants for each of a clip's first frames.

    Those of a channel lie together. Longer clips are refused.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    way: Literal["down", "up"]
    kind: Literal["standard"] = "standard"
    time: ClassVar[int] = 1
    space: ClassVar[int] = 1
    obstacle: ClassVar[str] = ""

    def width(self, channels: int) -> int:
        if len(self.mean) != len(self.std) or not self.mean or len(self.mean) % channels:
            raise ConfigError(
                f"{len(self.mean)} means and {len(self.std)} stds are not as many for each of {channels} channels"
            )
        if not min(self.std) > 0:
            raise ConfigError(f"every std must be positive, got {min(self.std)}")
        return channels

    def build(self, channels: int) -> nn.Module:
        return StandardFrames(channels, self)


Part = (
    Conv
    | Res
    | Act
    | Attention
    | Waves
    | Tile
    | Take
    | Lead
    | Drop
    | TimeDown
    | TimeUp
    | Nearest
    | Fold
    | Unfold
    | Haar
    | Standard
)


@configuration
class Skip:
    """Layers, and a shortcut around them that is added to their result."""

    layers: tuple["Part | Skip", ...]
    shortcut: tuple[Part, ...] = ()  # (): the input itself
    kind: Literal["skip"] = "skip"

    @property
    def time(self) -> int:
        return factor(self.layers, "time")

    @property
    def space(self) -> int:
        return factor(self.layers, "space")

    def width(self, channels: int) -> int:
        around, through = width_after(self.shortcut, channels), width_after(self.layers, channels)
        if around != through:
            raise ConfigError(f"a shortcut gives {around} channels beside layers that give {through}; make them equal")
        return through

    def build(self, channels: int) -> nn.Module:
        return SkipBlock(build_layers(self.layers, channels), build_layers(self.shortcut, channels))

    @property
    def obstacle(self) -> str:
        return next((layer.obstacle for layer in (*self.layers, *self.shortcut) if layer.obstacle), "")


@configuration
class Timed:
    """Layers of one kind and width, whose `Shifted` norms share an embedding of the time."""

    layers: tuple[Res | Act, ...]
    kind: Literal["timed"] = "timed"
    time: ClassVar[int] = 1
    space: ClassVar[int] = 1

    def __post_init__(self) -> None:
        if len({type(layer) for layer in self.layers}) != 1 or not all(
            isinstance(layer.norm, Shifted) for layer in self.layers
        ):
            raise ConfigError("timed layers are one or more, all Res or all Act, with Shifted norms")

    def width(self, channels: int) -> int:
        through = width_after(self.layers, channels)
        if any(layer.width(channels) != channels for layer in self.layers):
            raise ConfigError(f"timed layers keep the width, here {channels}, as their norms share what the time says")
        return through

    def build(self, channels: int) -> nn.Module:
        norms = 2 if isinstance(self.layers[0], Res) else 1
        return TimedBlock(build_layers(self.layers, channels), norms, channels)

    @property
    def obstacle(self) -> str:
        return next((layer.obstacle for layer in self.layers if layer.obstacle), "")


Layer = Part | Skip | Timed


def build_layers(layers: Sequence[Layer], channels: int) -> CausalSequence:
    """Build layers, the first of which gets `channels`."""

    def modules() -> Iterator[nn.Module]:
        width = channels
        for layer in layers:
            yield layer.build(width)
            width = layer.width(width)

    return CausalSequence(modules())


def width_after(layers: Iterable[Layer], channels: int) -> int:
    """Return the channels that come out.

    Raises:
        ConfigError: a layer cannot take what the one before gives.
    """
    for index, layer in enumerate(layers):
        try:
            channels = layer.width(channels)
        except ConfigError as error:
            raise ConfigError(f"layer {index} ({layer.kind}): {error}") from error
    return channels


def factor(layers: Iterable[Layer], axis: Literal["space", "time"]) -> int:
    """Return by how much layers divide, or multiply, an axis."""
    return prod(getattr(layer, axis) for layer in layers)


def obstacles(layers: Iterable[Layer], name: str) -> tuple[str, ...]:
    """Name the layers that cannot be streamed exactly, and say why."""
    return tuple(f"{name}[{i}] ({layer.kind}): {layer.obstacle}" for i, layer in enumerate(layers) if layer.obstacle)


def _looks_ahead(pad: Padding) -> str:
    return "its convolution looks at later frames" if pad.time in ("zeros_around", "ends") else ""


def _sees_clip(norm: ChannelNorm | None) -> str:
    if not isinstance(norm, Groups) or norm.over == "frame":
        return ""
    return "its norm sees all frames" if norm.over == "clip" else "its norm sees pieces of the clip"


def _reads_given(norm: ChannelNorm | None) -> bool:
    return isinstance(norm, Shifted) or (isinstance(norm, Groups) and norm.given > 0)


def _check_norm(norm: ChannelNorm | None, channels: int) -> None:
    if isinstance(norm, Groups) and channels % norm.num:
        near = max(1, round(channels / norm.num)) * norm.num
        raise ConfigError(f"{channels} channels do not divide into {norm.num} groups; nearest: {near}")


class GroupNorm(nn.GroupNorm):
    """Group norm of a video, over each frame, a piece, or the clip, of which there is then no stream."""

    def __init__(self, channels: int, spec: Groups) -> None:
        super().__init__(spec.num, channels, eps=spec.eps)
        self.over = spec.over

    def forward(self, x: Video, state: State = None) -> Video:
        if self.over == "frame":
            frames = x.movedim(2, 1)
            flat = frames.flatten(0, 1)
            if len(flat) == 1:  # its stride is never used, but by it PyTorch takes channels last for first, and copies
                flat = flat.as_strided(flat.shape, (flat[0].numel(), *flat.stride()[1:]))
            return super().forward(flat).unflatten(0, frames.shape[:2]).movedim(1, 2)
        if self.over == "clip":
            refuse_state(state, "a norm sees all frames")
        return super().forward(x)


class GivenNorm(nn.Module):
    """Group norm, scaled and shifted by maps of the latents."""

    def __init__(self, channels: int, spec: Groups) -> None:
        super().__init__()
        self.norm = GroupNorm(channels, spec)
        self.scale, self.shift = conv.Conv3d(spec.given, channels, 1), conv.Conv3d(spec.given, channels, 1)

    def forward(self, x: Video, state: State, given: Given) -> Video:
        assert given.latents is not None, "the autoencoder gives them"
        z, (T, H, W) = given.latents, x.shape[2:]
        t, h, w = z.shape[2:]
        frames = torch.arange(T, device=x.device)
        alone = T % 2 if T > 1 else 0  # an odd piece begins with a frame that has a latent to itself
        frames = torch.where(frames < alone, 0, alone + (frames - alone) * (t - alone) // max(1, T - alone))
        scale, shift = (  # a position's map is spread over what becomes of it, not the position mapped after
            each(z)[:, :, frames, :, None, :, None] for each in (self.scale, self.shift)
        )
        y = self.norm(x, state).unflatten(4, (w, W // w)).unflatten(3, (h, H // h))
        return torch.addcmul(shift, y, scale).flatten(5, 6).flatten(3, 4)


class PositionNorm(nn.Module):
    """Norm over the channels of each position."""

    def __init__(self, channels: int, spec: Norm) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels, eps=spec.eps, elementwise_affine=spec.affine)

    def forward(self, x: Video) -> Video:
        return self.norm(x.movedim(1, -1)).movedim(-1, 1)


class ShiftedNorm(nn.Module):
    """Norm, then x * (1 + scale) + shift, of the `place`-th pair of vectors and a table that is zero at the start.

    (AdaLN-single: Chen et al. 2023, PixArt-alpha, sec. 2.3.)
    """

    conditioned = True

    def __init__(self, channels: int, spec: Shifted, place: int) -> None:
        super().__init__()
        self.place = place
        self.norm = _build_norm(spec.norm, channels)
        self.table = nn.Parameter(torch.zeros(2, channels))

    def forward(self, x: Video, state: State, given: Given) -> Video:
        assert given.shifts is not None, "a Timed layer gives them"
        shift, scale = (given.shifts[:, self.place] + self.table)[..., None, None, None].unbind(1)
        return torch.addcmul(shift, self.norm(x), 1 + scale)


def _build_norm(norm: ChannelNorm, channels: int, place: int = 0) -> nn.Module:
    if isinstance(norm, Shifted):
        return ShiftedNorm(channels, norm, place)
    if isinstance(norm, Groups):
        return GivenNorm(channels, norm) if norm.given else GroupNorm(channels, norm)
    if norm.kind == "rms":
        return ChannelRMSNorm(channels, eps=norm.eps, elementwise_affine=norm.affine)
    return PositionNorm(channels, norm)


def _activation(norm: nn.Module | None, state: State, given: Given) -> Before:
    """Return a norm, if any, and SiLU."""

    def act(x: Tensor) -> Tensor:
        y = x if norm is None else _normed(norm, x, state, given)
        return F.silu(y, inplace=y is not x and not y.requires_grad)

    return Before(act, not (isinstance(norm, GivenNorm) or (isinstance(norm, GroupNorm) and norm.over != "frame")))


def _normed(norm: nn.Module, x: Tensor, state: State, given: Given = Given()) -> Tensor:
    if isinstance(norm, GivenNorm | ShiftedNorm):
        return norm(x, state, given)
    return norm(x, state) if isinstance(norm, GroupNorm) else norm(x)


class ResBlock(nn.Module):
    """norm, SiLU, conv, twice, on top of the input (or its 1 x 1 projection when the width changes)."""

    def __init__(self, in_channels: int, spec: Res) -> None:
        super().__init__()
        channels, (first, second), pad = spec.channels, spec.kernels, spec.pad
        self.norm1 = _build_norm(spec.norm, in_channels)
        self.conditioned = spec.noise or isinstance(self.norm1, GivenNorm | ShiftedNorm)
        self.conv1 = Conv(channels, first, pad=pad, bias=spec.bias).build(in_channels)
        self.noise1 = Noise(channels) if spec.noise else None
        self.norm2 = _build_norm(spec.norm, channels, place=1)
        self.conv2 = Conv(channels, second, pad=pad, bias=spec.bias).build(channels)
        self.noise2 = Noise(channels) if spec.noise else None
        nn.init.zeros_(self.conv2.conv.weight)
        around = spec.projected if in_channels != channels else None
        self.norm3 = nn.Identity() if around is None else _build_norm(around, in_channels)
        self.shortcut = (
            nn.Identity() if in_channels == channels else conv.Conv3d(in_channels, channels, 1, bias=spec.bias)
        )
        self.share = nn.Parameter(torch.zeros(1)) if spec.added == "share" else None

    def forward(self, x: Video, state: State, given: Given = Given()) -> tuple[Output, State]:
        first, second = state or (state, state)
        y, first = self.conv1.padded(x, first, _activation(self.norm1, state, given))
        y = self.conv1.conv(y)
        y = y if self.noise1 is None else self.noise1(y, state, given)
        y, second = self.conv2.padded(y, second, _activation(self.norm2, state, given))
        y = self.conv2.conv(y)
        y = y if self.noise2 is None else self.noise2(y, state, given)
        y = y if self.share is None else torch.sigmoid(self.share) * y
        x = self.shortcut(self.norm3(x))
        y = x + y if y.requires_grad or x.requires_grad or x.dtype != y.dtype else y.add_(x)
        return y, None if state is None else (first, second)


class Noise(nn.Module):
    """A picture of noise, added to all frames by a measure of each channel that is zero at the start."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.measure = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Video, state: State, given: Given) -> Video:
        refuse_state(state, "noise is the same in all frames")
        noise = torch.randn(x.shape[-2:], generator=given.generator, dtype=x.dtype, device=x.device)
        return torch.addcmul(x, self.measure[:, None, None, None], noise)


class Pointwise(nn.Module):
    """norm, SiLU."""

    def __init__(self, channels: int, norm: ChannelNorm | None) -> None:
        super().__init__()
        self.norm = None if norm is None else _build_norm(norm, channels)
        self.conditioned = isinstance(self.norm, GivenNorm | ShiftedNorm)

    def forward(self, x: Video, state: State, given: Given = Given()) -> tuple[Video, State]:
        act = _activation(self.norm, state, given)
        if not act.by_frame or torch.is_grad_enabled():
            return act.make(x), state
        out = torch.empty_like(x)
        write(out, x, act)
        return out, state


class AttentionBlock(nn.Module):
    """Attention on top of the input; that to earlier frames remembers keys and values."""

    def __init__(self, channels: int, spec: Attention) -> None:
        super().__init__()
        self.spec = spec
        self.tokens = {"frame": "(B T) (H W) C", "past": "B (T H W) C", "pixel": "(B H W) T C"}[spec.sees]
        self.norm = _build_norm(spec.norm, channels)
        self.qkv = nn.Linear(channels, 3 * channels, bias=spec.bias)
        self.out = nn.Linear(channels, channels)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, x: Video, state: State) -> tuple[Video, State]:
        B, _, T, H, W = x.shape
        tokens = rearrange(_normed(self.norm, x, state), f"B C T H W -> {self.tokens}")
        q, k, v = (split_heads(part, self.spec.heads) for part in self.qkv(tokens).chunk(3, dim=-1))
        if self.spec.lengths == "one":
            q, k = F.normalize(q, dim=-1, eps=1e-5), F.normalize(k, dim=-1, eps=1e-5)
        if self.spec.sees == "frame":
            y = attend(q, k, v)
        else:
            if state:
                k, v = torch.cat([state[0], k], dim=2), torch.cat([state[1], v], dim=2)
            y = self._past(q, k, v, H * W if self.spec.sees == "past" else 1)
            state = None if state is None else (k, v)
        return x + rearrange(self.out(y), f"{self.tokens} -> B C T H W", B=B, T=T, H=H, W=W), state

    def _past(self, q: Tensor, k: Tensor, v: Tensor, frame: int) -> Tensor:
        """Attend to frames, of so many tokens, up to one's own."""
        past = k.shape[2] - q.shape[2]
        if frame == 1:
            seen = torch.ones(1, 1, q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril(past)
            rows = zip(*(x.split(ROWS) for x in (q, k, v)), strict=True)
            return torch.cat([attend(*each, mask=seen) for each in rows])
        parts = []
        for part in q.split(frame, dim=2):  # a frame at a time: no mask, and half of the work of one
            past += frame
            parts.append(attend(part, k[:, :, :past], v[:, :, :past]))
        return torch.cat(parts, dim=1)


class FirstChannels(nn.Module):
    """The first channels, scaled."""

    def __init__(self, spec: Take) -> None:
        super().__init__()
        self.spec = spec

    def forward(self, x: Video, state: State) -> tuple[Output, State]:
        return x[:, : self.spec.channels] * self.spec.scale, state


class WaveChannels(nn.Module):
    """Channels, and their sines and cosines."""

    def __init__(self, spec: Waves) -> None:
        super().__init__()
        self.factors = tuple(2 * pi * 2.0**n for n in range(spec.first, spec.first + spec.count))

    def forward(self, x: Video, state: State) -> tuple[Output, State]:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        angles = torch.stack([factor * wide for factor in self.factors], dim=2).flatten(1, 2)
        return torch.cat([wide, angles.sin(), angles.cos()], dim=1).to(x.dtype), state


class Tiles(nn.Module):
    """All channels, so many times."""

    def __init__(self, times: int) -> None:
        super().__init__()
        self.times = times

    def forward(self, x: Video, state: State) -> tuple[Output, State]:
        return x.repeat(1, self.times, 1, 1, 1), state


class HaarCells(nn.Module):
    """Sums and differences along the three axes of a cell, whose eighth is the mean."""

    def __init__(self, spec: Haar) -> None:
        super().__init__()
        self.factor = 0.125 if spec.way == "down" else 1.0

    def forward(self, x: Video, state: State) -> tuple[Video, State]:
        cells = x.movedim(1, -1).unflatten(-1, (2, 2, 2, -1))
        for axis in (-4, -3, -2):
            first, second = cells.unbind(axis)
            cells = torch.stack([first + second, first - second], dim=axis)
        return self.factor * cells.flatten(-4).movedim(-1, 1), state


class StandardFrames(nn.Module):
    """A mean and a std for each frame; remembers how many frames it has seen."""

    def __init__(self, channels: int, spec: Standard) -> None:
        super().__init__()
        self.channels, self.spec = channels, spec

    def forward(self, x: Video, state: State) -> tuple[Video, State]:
        seen = state[0] if state else 0
        known, until = len(self.spec.mean) // self.channels, seen + x.shape[2]
        if until > known:
            raise ConfigError(f"latents have statistics in {known} frames, got {until}; pass a shorter clip")
        mean, std = (
            torch.tensor(values, dtype=x.dtype, device=x.device).view(self.channels, known, 1, 1)[:, seen:until]
            for values in (self.spec.mean, self.spec.std)
        )
        return x * std + mean if self.spec.way == "up" else (x - mean) / std, None if state is None else (until,)


class TimedBlock(nn.Module):
    """Layers that are told what their norms do at a time."""

    conditioned = True

    def __init__(self, layers: CausalSequence, norms: int, channels: int) -> None:
        super().__init__()
        self.layers, self.pairs = layers, (norms, 2, channels)
        self.embed = NumberEmbedding(Number(scale=1.0), 2 * norms * channels)

    def forward(self, x: Video, state: State, given: Given) -> tuple[Video, State]:
        assert given.time is not None, "the autoencoder gives it"
        shifts = self.embed(given.time[:, None]).unflatten(-1, self.pairs).squeeze(1)
        return self.layers(x, state, given._replace(shifts=shifts))


class SkipBlock(nn.Module):
    """Layers, and a shortcut added to them."""

    def __init__(self, layers: CausalSequence, shortcut: CausalSequence) -> None:
        super().__init__()
        self.layers, self.shortcut = layers, shortcut

    def forward(self, x: Video, state: State) -> tuple[Output, State]:
        through, around = state or (state, state)
        y, through = self.layers(x, through)
        z, around = self.shortcut(x, around)
        return y + z, None if state is None else (through, around)
