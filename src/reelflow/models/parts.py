"""A clip through an autoencoder part by part: as chunks of a stream, as windows that look ahead, as tiles.

Places are given in latents, whichever way a clip goes: latent 0 stands beside frame 0, and latent k > 0 beside the `time`
frames that end with frame `time` k; in space one stands beside `space` x `space` pixels.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from reelflow.models.budget import Budgeted, Reach
from reelflow.nn.conv import START, State, owned

__all__ = ["Span", "Way", "chunks", "collect", "frames", "ramp", "spans", "window"]

Video = Float[Tensor, "B C T H W"]
Output = Float[Tensor, "B D T2 H2 W2"]


@dataclass(frozen=True)
class Way:
    """A way through an autoencoder: a step along it, and how far it sees from what becomes of a latent."""

    step: Callable[[Tensor, State], tuple[Tensor, State]]
    to: Literal["latents", "pixels"]
    time: int
    space: int
    streams: bool
    window: Reach = None  # in time
    sees: Reach = None  # in space


def frames(first: int, last: int, time: int) -> slice:
    """Return the frames beside the latents from `first` up to `last`."""
    return slice(time * (first - 1) + 1 if first else 0, time * (last - 1) + 1)


def chunks(way: Way, x: Video, cuts: Sequence[int]) -> Iterator[Output]:
    """Yield what becomes of latents cuts[0] = 0 to cuts[1], of those to cuts[2], and so on; without gradients."""
    decodes = way.to == "pixels"
    state: State = START if len(cuts) > 2 else None
    for first, last in pairwise(cuts):
        with torch.no_grad():  # not around all, as a decorator: that would keep each part while the next is made
            if state is None:
                y = way.step(x, None)[0]
            elif way.streams:
                part = slice(first, last) if decodes else frames(first, last, way.time)
                state = owned(state)  # no name holds what is used up
                y, state = way.step(x[:, :, part], state)
            else:
                y = window(way, x, first, last)
        yield y
        del y


def window(way: Way, latents: Video, first: int, last: int, start: int = 0) -> Output:
    """Decode the latents from `first` to `last`, with as many around them as they depend on; `start` is the first given."""
    assert way.window is not None, "else nothing but the whole clip gives the result"
    before, after = way.window
    begin = max(0, first - before)
    y = way.step(latents[:, :, begin - start : last + after - start], None)[0]
    kept = frames(first, last, way.time)
    return y[:, :, kept.start - way.time * begin : kept.stop - way.time * begin]


@torch.no_grad()
def collect(way: Way, x: Video, plan: Budgeted, result: tuple[int, ...]) -> Output:
    """Return what becomes of a clip or of latents, B C T H W, chunk by chunk and tile by tile."""
    decodes = way.to == "pixels"
    here, there = (1, way.space) if decodes else (way.space, 1)
    *_, h, w = result if not decodes else x.shape
    t = x.shape[2] if decodes else result[2]
    cuts = [*range(0, t, plan.chunk), t]
    if plan.tile == (h, w):
        if plan.chunk == t:
            return way.step(x, None)[0]
        out, at = x.new_empty(result), 0
        for part in chunks(way, x, cuts):
            out[:, :, at : at + part.shape[2]] = part
            at += part.shape[2]
            del part
        return out
    out = x.new_zeros(result)
    before = way.sees[0] if plan.exact and way.sees is not None else 0
    for rows in spans(h, plan.tile[0], plan.overlap, before):
        for columns in spans(w, plan.tile[1], plan.overlap, before):
            tile = x[..., rows.read(here), columns.read(here)]
            shares = ramp(rows, h, plan.overlap, there, x)[:, None] * ramp(columns, w, plan.overlap, there, x)
            at = 0
            for part in chunks(way, tile, cuts):
                place = out[:, :, at : at + part.shape[2]]
                at += part.shape[2]
                if plan.exact:
                    place[..., rows.kept(there), columns.kept(there)] = part[
                        ..., rows.kept(there, rows.start), columns.kept(there, columns.start)
                    ]
                else:
                    place[..., rows.read(there), columns.read(there)].addcmul_(part, shares)
                del part
    return out


class Span(NamedTuple):
    """The latents from `start` to `stop` along an axis, of which those from `first` to `last` are kept."""

    start: int
    stop: int
    first: int
    last: int

    def read(self, scale: int) -> slice:
        """Return its positions, `scale` for a latent."""
        return slice(self.start * scale, self.stop * scale)

    def kept(self, scale: int, origin: int = 0) -> slice:
        """Return the positions that are kept, counted from a latent."""
        return slice((self.first - origin) * scale, (self.last - origin) * scale)


def spans(length: int, tile: int, overlap: int, before: int = 0) -> list[Span]:
    """Cut an axis into tiles that overlap; neighbours meet `before` latents after the second one begins."""
    starts = range(0, max(1, length - overlap), tile - overlap) if tile < length else range(1)
    edges = [0, *(start + before for start in starts[1:]), length]
    return [
        Span(start, min(start + tile, length), first, last)
        for start, first, last in zip(starts, edges, edges[1:], strict=False)
    ]


def ramp(span: Span, length: int, overlap: int, scale: int, like: Tensor) -> Tensor:
    """Return the share of each position of a tile, `scale` for a latent: linear over overlaps, where two add up to 1."""
    share = torch.ones((span.stop - span.start) * scale, dtype=like.dtype, device=like.device)
    rise = (torch.arange(overlap * scale, dtype=like.dtype, device=like.device) + 0.5) / max(1, overlap * scale)
    if span.start:
        share[: len(rise)] *= rise
    if span.stop < length:
        share[len(share) - len(rise) :] *= rise.flip(0)
    return share
