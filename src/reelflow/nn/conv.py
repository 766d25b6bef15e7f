"""Convolutions and resampling that never look ahead in time, over a whole clip or over a stream of chunks.

Every operation here maps `(x, state)` to `(y, state)`. The state is a value, never hidden in a module:

    None     the whole clip at once: nothing is kept (training, parallel in time)
    START    a stream begins: frame 0 is at hand, nothing came before
    (...)    what the operation remembers of the frames it has seen

Any cutting of a clip into chunks gives the frames of the whole clip, because an operation knows only "is this frame
0" and "what came just before", never the index of a chunk. Two streams are two states.
"""

from collections.abc import Iterable
from typing import Any, Literal, Protocol

import torch
from einops import rearrange, reduce, repeat
from jaxtyping import Float
from torch import Tensor, nn

__all__ = ["START", "Causal", "CausalConv3d", "CausalSequence", "DownShuffle", "State", "TimePadding", "UpShuffle"]

Video = Float[Tensor, "B C T H W"]
Output = Float[Tensor, "B D T2 H2 W2"]
State = tuple[Any, ...] | None
START: tuple[Any, ...] = ()
TimePadding = Literal["zeros", "first"]


class Causal(Protocol):
    """What a causal operation looks like."""

    def __call__(self, x: Tensor, state: State) -> tuple[Tensor, State]: ...


class CausalConv3d(nn.Module):
    """Convolution padded in time on the left only (with zeros or the first frame) and on both sides in space.

    Remembers its last `kernel_time - 1` input frames.
    """

    def __init__(
        self, in_channels: int, out_channels: int, kernel: tuple[int, int], *, time_padding: TimePadding = "first"
    ) -> None:
        super().__init__()
        time, space = kernel
        self.past = time - 1
        self.time_padding: TimePadding = time_padding
        self.conv = nn.Conv3d(in_channels, out_channels, (time, space, space), padding=(0, space // 2, space // 2))

    def forward(self, x: Video, state: State) -> tuple[Float[Tensor, "B D T H W"], State]:
        if self.past == 0:
            return self.conv(x), state
        if state:
            before = state[0]
        elif self.time_padding == "first":
            before = x[:, :, :1].expand(-1, -1, self.past, -1, -1)
        else:
            before = x.new_zeros(()).expand(*x.shape[:2], self.past, *x.shape[3:])
        x = torch.cat([before, x], dim=2)
        return self.conv(x), None if state is None else (x[:, :, -self.past :].clone(),)


class CausalSequence(nn.ModuleList):
    """Causal operations one after the other; the state is the tuple of theirs."""

    def __init__(self, layers: Iterable[nn.Module]) -> None:
        super().__init__(layers)

    def forward(self, x: Video, state: State) -> tuple[Output, State]:
        after = []
        for layer, before in zip(self, state or len(self) * (state,), strict=True):
            x, new = layer(x, before)
            after.append(new)
        return x, None if state is None else tuple(after)


class DownShuffle(nn.Module):
    """Halve (or divide by any factor) time and space: convolve, fold each cell into channels, add a shortcut.

    The shortcut folds the input and averages groups of channels, so the layer starts near a mean pool (Chen et al.
    2024, DC-AE, sec. 3.2). Frame 0 is repeated in front, so that it fills a latent frame alone: T = 1 + f k frames
    become 1 + k. A chunk after the first must hold a multiple of `time` frames.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        space: int,
        time: int,
        kernel: int = 3,
        time_padding: TimePadding = "first",
    ) -> None:
        super().__init__()
        cells = space * space * time
        self.space, self.time, self.out_channels = space, time, out_channels
        self.conv = CausalConv3d(in_channels, out_channels // cells, (kernel, kernel), time_padding=time_padding)

    def forward(self, x: Video, state: State) -> tuple[Output, State]:
        y, after = self.conv(x, state[0] if state else state)
        if not state and self.time > 1:
            x, y = self._alone(x), self._alone(y)
        shortcut = reduce(self._fold(x), "B (C g) T H W -> B C T H W", "mean", C=self.out_channels)
        return self._fold(y) + shortcut, None if state is None else (after,)

    def _alone(self, x: Video) -> Output:
        return torch.cat([x[:, :, :1].expand(-1, -1, self.time - 1, -1, -1), x], dim=2)

    def _fold(self, x: Video) -> Output:
        pattern = "B C (T t) (H h) (W w) -> B (C t h w) T H W"
        return rearrange(x, pattern, t=self.time, h=self.space, w=self.space)


class UpShuffle(nn.Module):
    """Undo `DownShuffle`'s shapes: convolve, unfold channels into cells, add the repeated input.

    At the start of a stream the first `time - 1` frames are dropped, so 1 + k latent frames become 1 + f k.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        space: int,
        time: int,
        kernel: int = 3,
        time_padding: TimePadding = "first",
    ) -> None:
        super().__init__()
        cells = space * space * time
        self.space, self.time, self.copies = space, time, out_channels * cells // in_channels
        self.conv = CausalConv3d(in_channels, out_channels * cells, (kernel, kernel), time_padding=time_padding)

    def forward(self, x: Video, state: State) -> tuple[Output, State]:
        y, after = self.conv(x, state[0] if state else state)
        y = self._unfold(y + repeat(x, "B C T H W -> B (C g) T H W", g=self.copies))
        return (y if state else y[:, :, self.time - 1 :]), None if state is None else (after,)

    def _unfold(self, x: Video) -> Output:
        pattern = "B (C t h w) T H W -> B C (T t) (H h) (W w)"
        return rearrange(x, pattern, t=self.time, h=self.space, w=self.space)
