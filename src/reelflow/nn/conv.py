"""Convolutions and resampling that never look ahead in time, over a whole clip or over a stream of chunks.

Every operation here maps `(x, state)` to `(y, state)`. The state is a value, never hidden in a module:

    None     the whole clip at once: nothing is kept (training, parallel in time)
    START    a stream begins: frame 0 is at hand, nothing came before
    (...)    what the operation remembers of the frames it has seen
    [...]    the same, which is used up: frames are free when they have been read (`owned`)

Any cutting of a clip into chunks gives the frames of the whole clip, because an operation knows only "is this frame
0" and "what came just before", never the index of a chunk. Two streams are two states. What divides time by f takes
1 + f k frames at first and f k later.
"""

from collections.abc import Callable, Iterable
from typing import Any, Literal, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from einops import rearrange, reduce, repeat
from jaxtyping import Float
from torch import Tensor, nn

from reelflow.errors import ConfigError
from reelflow.nn import quick_conv

__all__ = [
    "SEEN",
    "START",
    "Before",
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
    "owned",
    "refuse_state",
    "write",
]

Video = Float[Tensor, "B C T H W"]
Output = Float[Tensor, "B D T2 H2 W2"]
Padded = Float[Tensor, "B C T2 H2 W2"]
State = tuple[Any, ...] | list[Any] | None
START: tuple[Any, ...] = ()
SEEN: tuple[Any, ...] = (None,)
"""The state of an operation that remembers only that frame 0 is past."""

TimePadding = Literal["zeros", "first", "zeros_around", "ends"]
"""What a kernel sees beyond the clip: a past of zeros or of the first frame; or, looking ahead too, zeros on both
sides or the first and the last frame."""
SpacePadding = Literal["zeros", "replicate", "after"]
"""Zeros or the border on all four sides; or one row and one column of zeros, below and to the right."""
VALUES = 2**18  # that are normed at once: what a core keeps close
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


class Before(NamedTuple):
    """What is made of frames before they are convolved; of any by themselves, or of all at once."""

    make: Callable[[Tensor], Tensor]
    by_frame: bool


def write(out: Video, x: Video, before: Before | None) -> None:
    """Write x, or what is made of it; some frames at a time, so that no more than these are there twice."""
    step = max(1, VALUES * x.shape[2] // max(1, x.numel())) if before is not None and before.by_frame else x.shape[2]
    for start in range(0, x.shape[2], max(1, step)):
        frames = x[:, :, start : start + step]
        out[:, :, start : start + step] = frames if before is None else before.make(frames)


def refuse_state(state: State, reason: str) -> None:
    """Raise a ConfigError if a stream is asked of an operation that needs the whole clip."""
    if state is not None:
        raise ConfigError(f"{reason}, so no stream of chunks gives its result; pass the whole clip at once")


def owned(state: State) -> State:
    """Return a state that whoever continues the stream may use up, so that old and new never lie side by side."""
    return [owned(part) if isinstance(part, tuple | list) else part for part in state] if state else state


class Conv3d(nn.Conv3d):
    """`nn.Conv3d`; of kernels one frame long, or three without gradients, over the frames as pictures: CPUs are faster."""

    def forward(self, input: Video) -> Output:
        (time, height, width), (step_in_time, *steps) = self.kernel_size, self.stride
        assert isinstance(self.padding, tuple)
        step, pad = (steps[0], steps[1]), (self.padding[1], self.padding[2])
        quick = time == 3 and step_in_time == 1 and height * width > 1 and input.shape[2] > 2
        if quick and not self.padding[0] and quick_conv.can(input, self.weight):
            return quick_conv.causal(input, self.weight, self.bias, step, pad)
        if time > 1 or step_in_time > 1:
            return super().forward(input)
        frames = input.movedim(2, 1)
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
        x, state = self.padded(x, state)
        return self.conv(x), state

    def padded(self, x: Video, state: State, before: Before | None = None) -> tuple[Padded, State]:
        """Return what is convolved: x, or what is made of it before, and the frames and borders around."""
        ahead = self.time_padding in ("zeros_around", "ends")
        if ahead:
            refuse_state(state if self.past else None, "a convolution looks at later frames")
        learns = torch.is_grad_enabled() and (x.requires_grad or self.conv.weight.requires_grad)
        if not learns and (before or self.past or any(self.beyond)):
            return self._written(x, state, before)
        x = x if before is None else before.make(x)
        if ahead:
            return self._pad_space(self._pad_around(x)), state
        if state and self.kept:
            x = torch.cat([_taken(state, x, self.kept), x], dim=2)
        past = 0 if state else self.past
        after = None if state is None else (self._last(x),) if self.kept else SEEN if self.past else state
        return self._pad_past(x, past), after

    def _written(self, x: Tensor, state: State, before: Before | None) -> tuple[Tensor, State]:
        """Write it once, into its place."""
        ahead = self.past // 2 if self.time_padding in ("zeros_around", "ends") else 0
        past = self.kept if state else self.past - ahead
        (B, C, T, H, W), (left, right, above, below) = x.shape, self.beyond
        out = x.new_empty((B, past + T + ahead, above + H + below, left + W + right, C)).movedim(-1, 1)
        inner = out[..., above : above + H, left : left + W]
        write(inner[:, :, past : past + T], x, before)
        if state and past:
            inner[:, :, :past] = _taken(state, x, past)
        elif self.time_padding in ("first", "ends"):
            inner[:, :, :past] = inner[:, :, past : past + 1]
            inner[:, :, past + T :] = inner[:, :, past + T - 1 : past + T]
        else:
            inner[:, :, :past] = 0
            inner[:, :, past + T :] = 0
        after: State = SEEN if self.past else state
        if state is None:
            after = None
        elif self.kept:
            after = (inner[:, :, past + T - self.kept :].clone(),)
        rims = (  # columns first: the rows' ends are theirs
            (out[..., :left], out[..., left : left + 1]),
            (out[..., left + W :], out[..., left + W - 1 : left + W]),
            (out[..., :above, :], out[..., above : above + 1, :]),
            (out[..., above + H :, :], out[..., above + H - 1 : above + H, :]),
        )
        for rim, edge in rims:
            if rim.numel():
                rim[:] = edge if self.mode == "replicate" else 0
        return out, after

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


def _taken(state: tuple[Any, ...] | list[Any], x: Tensor, frames: int) -> Tensor:
    """Return the frames a state holds, if they are those before `x`."""
    before = state.pop() if isinstance(state, list) else state[0]
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
        after: list[State] = []
        layers, repeated = list(self), None
        for layer, then, before in zip(layers, [*layers, None][1:], state or len(self) * (state,), strict=True):
            conditioned, new = getattr(layer, "conditioned", False), before
            if repeated is not None and isinstance(layer, CausalConv3d):
                x, repeated = repeated[0].convolved(x, layer, repeated[1]), None
            elif isinstance(layer, Nearest) and isinstance(then, CausalConv3d) and layer.goes_into(then, x, before):
                repeated, new = (layer, before), None if before is None else SEEN
            else:
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
            return self.conv(torch.cat([_taken(state, x, 1), x], dim=2)), after
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
            first, rest = x[:, :, :0], torch.cat([_taken(state, x, 2), x], dim=2)
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
        x = _repeated(x, 1, self.space) if self.time == 1 else self._in_time(x, state, self.space)
        return x, None if state is None else SEEN

    def goes_into(self, conv: CausalConv3d, x: Tensor, state: State) -> bool:
        """Say whether `convolved` may do both."""
        time, space = conv.conv.kernel_size[:2]
        alone = time == 1 or (time == 3 and state is None and self.time == 2 and self.first == "alone")
        same = conv.conv.stride == (1, 1, 1) and conv.past == time - 1 and (time == 1 or conv.time_padding == "first")
        around = not any(conv.beyond) or conv.mode == "replicate"
        return self.space == 2 and space == 3 and alone and same and around and quick_conv.can(x, conv.conv.weight)

    def convolved(self, x: Video, conv: CausalConv3d, state: State) -> Output:
        """Return what a convolution makes of the repeated positions, without repeating them; the state is its own."""
        x = quick_conv.doubled(x, conv.conv.weight, conv.conv.bias, conv.mode)
        return x if conv.past or self.time == 1 else self._in_time(x, state, 1)

    def _in_time(self, x: Tensor, state: State, space: int) -> Tensor:
        alone = 0 if state or (self.first == "odd" and x.shape[2] % 2 == 0) else 1
        if not alone:
            return _repeated(x, self.time, space)
        return torch.cat([_repeated(x[:, :, :1], 1, space), _repeated(x[:, :, 1:], self.time, space)], dim=2)


def _repeated(x: Tensor, time: int, space: int) -> Tensor:
    return repeat(x, "B C T H W -> B (T t) (H h) (W w) C", t=time, h=space, w=space).movedim(-1, 1)


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
