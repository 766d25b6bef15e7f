"""Convolutions and resampling that never look ahead in time, over a whole clip or over a stream of chunks.

Every operation here maps `(x, state)` to `(y, state)`. The state is a value, never hidden in a module:

    None     the whole clip at once: nothing is kept (training, parallel in time)
    START    a stream begins: frame 0 is at hand, nothing came before
    (...)    what the operation remembers of the frames it has seen

Any cutting of a clip into chunks gives the frames of the whole clip, because an operation knows only "is this frame
0" and "what came just before", never the index of a chunk. Two streams are two states. What divides time by f takes
1 + f k frames at first and f k later.
"""

from collections.abc import Iterable
from typing import Any, Literal, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from einops import rearrange, reduce, repeat
from jaxtyping import Float
from torch import Tensor, nn

from reelflow.errors import ConfigError

__all__ = [
    "SEEN",
    "START",
    "Causal",
    "CausalConv3d",
    "CausalSequence",
    "Conv3d",
    "Drop",
    "Fold",
    "FoldOrder",
    "Given",
    "Lead",
    "Nearest",
    "SpacePadding",
    "State",
    "TimeDown",
    "TimePadding",
    "TimeUp",
    "Unfold",
    "refuse_state",
]

Video = Float[Tensor, "B C T H W"]
Output = Float[Tensor, "B D T2 H2 W2"]
State = tuple[Any, ...] | None
START: tuple[Any, ...] = ()
SEEN: tuple[Any, ...] = (None,)
"""The state of an operation that remembers only that frame 0 is past."""

TimePadding = Literal["zeros", "first", "zeros_around", "ends"]
"""What a kernel sees beyond the clip: a past of zeros or of the first frame; or, looking ahead too, zeros on both
sides or the first and the last frame."""
SpacePadding = Literal["zeros", "replicate", "after"]
"""Zeros or the border on all four sides; or one row and one column of zeros, below and to the right."""
FoldOrder = Literal["channel", "cell"]
"""Which index runs slowest among folded channels: the old channel, or the place in the cell (t, then h, then w)."""


class Given(NamedTuple):
    """What a network is told beside its input."""

    time: Float[Tensor, " B"] | None = None  # in units of its own
    shifts: Float[Tensor, "B norms 2 C"] | None = None  # what the time makes of norms: a shift and a scale of each
    generator: torch.Generator | None = None
    latents: Float[Tensor, "B C T H W"] | None = None  # that are decoded, in the decoder's units


class Causal(Protocol):
    """What a causal operation looks like."""

    def __call__(self, x: Tensor, state: State) -> tuple[Tensor, State]: ...


def refuse_state(state: State, reason: str) -> None:
    """Raise a ConfigError if a stream is asked of an operation that needs the whole clip."""
    if state is not None:
        raise ConfigError(f"{reason}, so no stream of chunks gives its result; pass the whole clip at once")


class Conv3d(nn.Conv3d):
    """`nn.Conv3d`; where its kernel is one frame long, over the frames as pictures, which CPUs do faster."""

    def forward(self, input: Video) -> Output:
        if self.kernel_size[0] > 1 or self.stride[0] > 1:
            return super().forward(input)
        frames = input.movedim(2, 1)
        step, pad = self.stride[1:], self.padding[1:]
        assert isinstance(pad, tuple)
        out = F.conv2d(frames.flatten(0, 1), self.weight[:, :, 0], self.bias, step, pad)
        return out.unflatten(0, frames.shape[:2]).movedim(1, 2)


class CausalConv3d(nn.Module):
    """Convolution padded in time on the left only (with zeros or the first frame) and on both sides in space.

    `kernel` and `stride` are (time, space). Remembers its last `kernel - stride` input frames. A stride in time leaves frame
    0 alone, or with first="cell" begins a cell with it. The time paddings that look ahead take no state.

    Raises:
        ConfigError: a state is of another model or shape.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel: tuple[int, int],
        *,
        stride: tuple[int, int] = (1, 1),
        time_padding: TimePadding = "first",
        space_padding: SpacePadding = "zeros",
        bias: bool = True,
        first: Literal["alone", "cell"] = "alone",
    ) -> None:
        super().__init__()
        time, space = kernel
        self.kept = max(0, time - stride[0])
        self.past = time - 1 if first == "alone" else self.kept
        self.time_padding: TimePadding = time_padding
        around, after = (space - 1) // 2, space - stride[1]
        beyond = {"zeros": (0, 0), "replicate": (around, around), "after": (0, after)}[space_padding]
        self.beyond = 2 * beyond  # left, right, above, below: what the convolution does not pad itself
        self.mode = "replicate" if space_padding == "replicate" else "constant"
        own = around if space_padding == "zeros" else 0
        steps = (stride[0], stride[1], stride[1])
        kernels = (time, space, space)
        self.conv = Conv3d(in_channels, out_channels, kernels, stride=steps, padding=(0, own, own), bias=bias)

    def forward(self, x: Video, state: State) -> tuple[Output, State]:
        if self.time_padding in ("zeros_around", "ends"):
            refuse_state(state if self.past else None, "a convolution looks at later frames")
            return self.conv(self._pad_space(self._pad_around(x))), state
        if state and self.kept:
            x = torch.cat([_checked(state, x, self.kept), x], dim=2)
        past = 0 if state else self.past
        after = None if state is None else (self._last(x),) if self.kept else SEEN if self.past else state
        return self.conv(self._pad_past(x, past)), after

    # Padding takes one pass where it can, and keeps channels last: a tensor that is expanded would not.

    def _pad_past(self, x: Tensor, past: int) -> Tensor:
        if self.time_padding == "zeros" and self.mode == "constant":
            return F.pad(x, (*self.beyond, past, 0)) if past or any(self.beyond) else x
        if self.time_padding == "first" and self.mode == "replicate":
            return F.pad(x, (*self.beyond, past, 0), mode="replicate")
        if past:
            x = F.pad(x, (0, 0, 0, 0, past, 0)) if self.time_padding == "zeros" else _with_first(x, past)
        return self._pad_space(x)

    def _pad_space(self, x: Tensor) -> Tensor:
        return F.pad(x, (*self.beyond, 0, 0), mode=self.mode) if any(self.beyond) else x

    def _pad_around(self, x: Tensor) -> Tensor:
        before, after = self.past - self.past // 2, self.past // 2
        if self.time_padding == "zeros_around":
            return F.pad(x, (0, 0, 0, 0, before, after))
        return torch.cat([*before * [x[:, :, :1]], x, *after * [x[:, :, -1:]]], dim=2)

    def _last(self, x: Tensor) -> Tensor:
        """Return the frames to remember, some of which may be padding."""
        if (lacking := self.kept - x.shape[2]) > 0:
            x = F.pad(x, (0, 0, 0, 0, lacking, 0)) if self.time_padding == "zeros" else _with_first(x, lacking)
        return x[:, :, x.shape[2] - self.kept :].clone()


def _with_first(x: Tensor, times: int) -> Tensor:
    """Put the first frame so many times before a video."""
    return torch.cat([*times * [x[:, :, :1]], x], dim=2)


def _checked(state: tuple[Any, ...], x: Tensor, frames: int) -> Tensor:
    """Return the frames a state holds, if they are those before `x`."""
    before = state[0]
    expected = (*x.shape[:2], frames, *x.shape[3:])
    if not isinstance(before, Tensor) or before.shape != expected or before.dtype != x.dtype:
        found = f"{tuple(before.shape)} {before.dtype}" if isinstance(before, Tensor) else type(before).__name__
        raise ConfigError(
            f"the state is of another model, batch, size or precision: a convolution expected {expected} {x.dtype}, "
            f"found {found}; continue a stream as it began"
        )
    return before


class CausalSequence(nn.ModuleList):
    """Causal operations one after the other; the state is the tuple of theirs.

    `given` goes to those that are `conditioned`, as a third argument.

    Raises:
        ConfigError: a state has another number of parts.
    """

    def __init__(self, layers: Iterable[nn.Module]) -> None:
        super().__init__(layers)
        self.conditioned = any(getattr(layer, "conditioned", False) for layer in self)

    def forward(self, x: Video, state: State, given: Given = Given()) -> tuple[Output, State]:
        if state and len(state) != len(self):
            raise ConfigError(f"the state has {len(state)} parts and the network {len(self)}; it is of another model")
        after = []
        for layer, before in zip(self, state or len(self) * (state,), strict=True):
            conditioned = getattr(layer, "conditioned", False)
            x, new = layer(x, before, given) if conditioned else layer(x, before)
            after.append(new)
        return x, None if state is None else tuple(after)


class TimeDown(nn.Module):
    """Halve time by a convolution over three frames that passes frame 0 as it is.

        y = [x0] ++ [conv(x0, x1, x2), conv(x2, x3, x4), ...]

    Remembers one frame.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv3d(channels, channels, (3, 1, 1), stride=(2, 1, 1))

    def forward(self, x: Video, state: State) -> tuple[Output, State]:
        after = None if state is None else (x[:, :, -1:].clone(),)
        if state:
            return self.conv(torch.cat([_checked(state, x, 1), x], dim=2)), after
        first = x[:, :, :1]
        return (torch.cat([first, self.conv(x)], dim=2) if x.shape[2] > 1 else first), after


class TimeUp(nn.Module):
    """Double time by a causal convolution over three frames to twice the channels, a half for each of two frames.

    Frame 0 is passed as it is and no convolution sees it: zeros come before frame 1. Remembers two frames.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv3d(channels, 2 * channels, (3, 1, 1))

    def forward(self, x: Video, state: State) -> tuple[Output, State]:
        if state:
            first, rest = x[:, :, :0], torch.cat([_checked(state, x, 2), x], dim=2)
        else:
            first, rest = x[:, :, :1], F.pad(x[:, :, 1:], (0, 0, 0, 0, 2, 0))
        after = None if state is None else (rest[:, :, -2:].clone(),)
        if rest.shape[2] == 2:
            return first, after
        pairs = rearrange(self.conv(rest), "B (f C) T H W -> B T f H W C", f=2).flatten(1, 2).movedim(-1, 1)
        return torch.cat([first, pairs], dim=2), after


class Nearest(nn.Module):
    """Repeat each position `space` times along height and width, and each frame but frame 0 `time` times.

    With first="odd", frame 0 is repeated too where a stream begins with an even number of frames.
    """

    def __init__(self, space: int, time: int, *, first: Literal["alone", "odd"] = "alone") -> None:
        super().__init__()
        self.space, self.time, self.first = space, time, first

    def forward(self, x: Video, state: State) -> tuple[Output, State]:
        if self.time > 1:
            alone = 0 if state or (self.first == "odd" and x.shape[2] % 2 == 0) else 1
            parts = [self._repeat(x[:, :, :alone], 1)] if alone else []
            x = torch.cat([*parts, self._repeat(x[:, :, alone:], self.time)], dim=2)
        else:
            x = self._repeat(x, 1)
        return x, None if state is None else SEEN

    def _repeat(self, x: Tensor, time: int) -> Tensor:
        return repeat(x, "B C T H W -> B (T t) (H h) (W w) C", t=time, h=self.space, w=self.space).movedim(-1, 1)


class Lead(nn.Module):
    """Put frames of zeros before the first of a stream."""

    def __init__(self, frames: int) -> None:
        super().__init__()
        self.frames = frames

    def forward(self, x: Video, state: State) -> tuple[Output, State]:
        x = x if state else F.pad(x, (0, 0, 0, 0, self.frames, 0))
        return x, None if state is None else SEEN


class Drop(nn.Module):
    """Drop the first frames of a stream, which its first chunk has to hold."""

    def __init__(self, frames: int) -> None:
        super().__init__()
        self.frames = frames

    def forward(self, x: Video, state: State) -> tuple[Output, State]:
        return x if state else x[:, :, self.frames :], None if state is None else SEEN


class Fold(nn.Module):
    """Fold cells of `time` frames and `space` x `space` positions into channels.

    With `channels`, neighbouring ones are averaged to that many. Frame 0 fills a cell with `time - 1` frames before it:
    copies of itself ("repeat") or zeros ("zeros"); or it is folded in space only ("alone", of averages), perhaps unless a
    stream begins with an even number of frames ("odd").
    """

    def __init__(
        self,
        *,
        space: int,
        time: int,
        first: Literal["repeat", "zeros", "alone", "odd"] = "repeat",
        order: FoldOrder = "channel",
        channels: int = 0,
    ) -> None:
        super().__init__()
        self.space, self.time, self.first, self.channels = space, time, first, channels
        self.cell = "(C t h w)" if order == "channel" else "(t h w C)"

    def forward(self, x: Video, state: State) -> tuple[Output, State]:
        after = None if state is None else SEEN
        if state or self.time == 1 or (self.first == "odd" and x.shape[2] % 2 == 0):
            return self._fold(x, self.time), after
        first = x[:, :, :1]
        if self.first in ("alone", "odd"):
            parts = [self._fold(first, 1), *([self._fold(x[:, :, 1:], self.time)] if x.shape[2] > 1 else [])]
            return torch.cat(parts, dim=2), after
        before = self.time - 1
        x = _with_first(x, before) if self.first == "repeat" else F.pad(x, (0, 0, 0, 0, before, 0))
        return self._fold(x, self.time), after

    def _fold(self, x: Tensor, time: int) -> Tensor:
        sizes = {"t": time, "h": self.space, "w": self.space}
        cells = rearrange(x, f"B C (T t) (H h) (W w) -> B T H W {self.cell}", **sizes)
        if self.channels:
            cells = reduce(cells, "B T H W (C g) -> B T H W C", "mean", C=self.channels)
        return cells.movedim(-1, 1)


class Unfold(nn.Module):
    """Undo `Fold`'s shapes: unfold channels into cells, after copying each of them to fill `channels` outputs, if given.

    At the start of a stream the first `time - 1` frames are dropped ("drop"), so 1 + k frames become 1 + f k, or they stay
    ("keep"); or frame 0 is unfolded in space only, and the first of its channels are kept ("alone").
    """

    def __init__(
        self,
        *,
        space: int,
        time: int,
        first: Literal["drop", "keep", "alone"] = "drop",
        order: FoldOrder = "channel",
        channels: int = 0,
    ) -> None:
        super().__init__()
        self.space, self.time, self.first, self.channels = space, time, first, channels
        self.cell = "(C t h w)" if order == "channel" else "(t h w C)"

    def forward(self, x: Video, state: State) -> tuple[Output, State]:
        after = None if state is None else SEEN
        if state or self.time == 1 or self.first == "keep":
            return self._unfold(x, self.time), after
        if self.first == "drop":
            return self._unfold(x, self.time)[:, :, self.time - 1 :], after
        width = self.channels or x.shape[1] // (self.space**2 * self.time)
        parts = [self._unfold(x[:, :, :1], 1)[:, :width]]
        parts += [self._unfold(x[:, :, 1:], self.time)] if x.shape[2] > 1 else []
        return torch.cat(parts, dim=2), after

    def _unfold(self, x: Tensor, time: int) -> Tensor:
        x = x.permute(0, 2, 3, 4, 1)
        if self.channels:
            x = repeat(x, "B T H W C -> B T H W (C g)", g=self.channels * self.space**2 * time // x.shape[-1])
        sizes = {"t": time, "h": self.space, "w": self.space}
        return rearrange(x, f"B T H W {self.cell} -> B (T t) (H h) (W w) C", **sizes).movedim(-1, 1)
