"""Which part of a clip an autoencoder takes at a time, so that it stays within a budget of memory.

    whole clip                exact
    chunks in time            exact: a stream; or, where layers look ahead, windows whose ends are thrown away
    tiles in space, of those  exact where layers see a finite way and tiles overlap by it; else blended, an approximation

All in latents: 1 of time and 1 x 1 of space are what becomes of one.
"""

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from reelflow.errors import ConfigError
from reelflow.models.coder import (
    Act,
    Attention,
    Conv,
    Drop,
    Fold,
    Groups,
    Layer,
    Lead,
    Nearest,
    Res,
    Skip,
    Standard,
    Timed,
    Unfold,
    factor,
)

__all__ = ["Budgeted", "Reach", "choose", "grows", "in_bytes", "reach", "readable"]

Reach = tuple[int, int] | None
"""How many latents before and after its own what becomes of one depends on; None: on all."""
LEAST_TILE = 8  # latents; smaller ones see too little to be alike where they meet
FAR = 2**20
UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}


@dataclass(frozen=True)
class Budgeted:
    """How a clip is encoded or decoded: so many latents of time at once, in tiles that overlap."""

    chunk: int
    tile: tuple[int, int]  # height and width
    overlap: int
    exact: bool
    peak: int  # bytes beside the weights and what is given, the result among them if it is collected


def in_bytes(memory: int | str) -> int:
    """Read a number of bytes, such as 4000000000, "4GB" or "4GiB".

    Raises:
        ConfigError: it is written otherwise, or is none.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(|[kmgt]i?)b?\s*", str(memory).lower())
    size = int(float(match[1]) * UNITS[match[2]]) if match else 0
    if size < 1:
        raise ConfigError(f"memory is a positive number of bytes, such as 4GiB or 500MB, got {memory!r}")
    return size


def readable(size: int) -> str:
    """Say a number of bytes in MiB, or GiB if it is one or more."""
    return f"{size / 2**30:.3g} GiB" if size >= 2**30 else f"{size / 2**20:.3g} MiB"


def grows(layers: Iterable[Layer]) -> bool:
    """Return whether what a stream remembers grows with its length."""
    return any(isinstance(layer, Attention) and layer.sees != "frame" for layer in layers)


def reach(layers: Sequence[Layer], axis: Literal["time", "space"], way: Literal["encode", "decode"]) -> Reach:
    """Return how far layers see; in time, those of decoders only, whose frame 0 stands alone."""
    f = factor(layers, axis)
    if way == "encode":
        needed = _needed(layers, axis, (FAR, FAR)) if axis == "space" else None
        return None if needed is None else (FAR - needed[0] // f, needed[1] // f - FAR)
    own = (f * FAR, f * FAR + f - 1) if axis == "space" else (f * (FAR - 1) + 1, f * FAR)
    needed = _needed(layers, axis, own)
    return None if needed is None else (FAR - needed[0], needed[1] - FAR)


Interval = tuple[int, int]


def _needed(layers: Iterable[Layer], axis: Literal["time", "space"], found: Interval) -> Interval | None:
    """Return the first and the last position that go into those of the result."""
    before = _needed_in_space if axis == "space" else _needed_in_time
    for layer in reversed(tuple(layers)):
        if isinstance(layer, Skip):
            ways = [_needed(each, axis, found) for each in (layer.layers, layer.shortcut)]
            if ways[0] is None or ways[1] is None:
                return None
            found = min(ways[0][0], ways[1][0]), max(ways[0][1], ways[1][1])
        else:
            inner = _needed(layer.layers, axis, found) if isinstance(layer, Timed) else before(layer, found)
            if inner is None:
                return None
            found = inner
    return found


def _needed_in_space(layer: Layer, found: Interval) -> Interval | None:
    low, high = found
    match layer:
        case Conv(kernel=(_, size), stride=(_, step)):
            left = 0 if layer.pad.space == "after" else (size - 1) // 2
            return low * step - left, high * step - left + size - 1
        case Res(kernels=((_, first), (_, second))):
            around = (first - 1) // 2 + (second - 1) // 2
            return None if layer.noise or isinstance(layer.norm, Groups) else (low - around, high + around)
        case Act() if isinstance(layer.norm, Groups):
            return None
        case Attention():
            return None if layer.sees != "pixel" or isinstance(layer.norm, Groups) else found
        case Nearest() | Unfold():
            return low // layer.space, high // layer.space
        case Fold():
            return low * layer.space, high * layer.space + layer.space - 1
    return found


def _needed_in_time(layer: Layer, found: Interval) -> Interval | None:
    low, high = found
    norm = getattr(layer, "norm", None)
    if isinstance(norm, Groups) and norm.over != "frame":
        return None
    match layer:
        case Conv(stride=(1, _)):
            before, after = _beyond(layer, layer.kernel[0])
            return low - before, high + after
        case Res(noise=False):
            sides = [_beyond(layer, kernel[0]) for kernel in layer.kernels]
            return low - sum(side[0] for side in sides), high + sum(side[1] for side in sides)
        case Unfold(first="drop"):  # frame f k is the last that becomes of frame k; a window's first frame is of these
            return low // layer.time, -(-high // layer.time)
        case Conv() | Res() | Lead() | Drop() | Standard() | Fold():
            return None
        case Attention():
            return found if layer.sees == "frame" else None
    return found if layer.time == 1 else None


def _beyond(layer: Conv | Res, kernel: int) -> tuple[int, int]:
    after = (kernel - 1) // 2 if layer.pad.time in ("zeros_around", "ends") else 0
    return kernel - 1 - after, after


def choose(
    peak: Callable[[int, tuple[int, int]], int],
    extent: tuple[int, int, int],
    memory: int,
    *,
    chunks: bool,
    sees: Reach,
) -> Budgeted:
    """Choose what fits: the whole clip, else the largest chunk, else the largest tile and then chunk.

    `peak` tells of a chunk and a tile; `chunks` says whether there are any, and `sees` is the reach in space.

    Raises:
        ConfigError: nothing fits; says what would.
    """
    t, *size = extent
    whole = (size[0], size[1])
    if (found := peak(t, whole)) <= memory:
        return Budgeted(t, whole, 0, exact=True, peak=found)
    least = 1 if chunks else t
    smallest = peak(least, whole) if chunks else found
    if smallest <= memory:
        chunk, found = _longest(least, t, memory, peak, whole)
        return Budgeted(chunk, whole, 0, exact=True, peak=found)

    around = None if sees is None else sum(sees)
    for exact in (True, False):
        side = LEAST_TILE if not exact else FAR if around is None else around + 1
        if side >= max(whole):
            continue

        def tile(side: int, exact: bool = exact) -> tuple[tuple[int, int], int]:
            overlap = around or 0 if exact else side // 4
            return (_even(whole[0], side, overlap), _even(whole[1], side, overlap)), overlap

        def weigh(side: int) -> int:
            return peak(least, tile(side)[0])

        smallest = min(smallest, weigh(side))
        if weigh(side) > memory:
            continue
        side, found = _largest(side, max(whole), memory, weigh, lambda n: min(n, whole[0]) * min(n, whole[1]))
        sides, overlap = tile(side)
        chunk = t
        if chunks and (found := peak(t, sides)) > memory:
            chunk, found = _longest(least, t, memory, peak, sides)
        return Budgeted(chunk, sides, overlap, exact=exact, peak=found)
    would = -(-smallest // 2**20)
    raise ConfigError(f"nothing fits in {readable(memory)}; the smallest memory that would do is {would} MiB")


def _even(length: int, side: int, overlap: int) -> int:
    """Return the side of as many tiles of equal size as it takes with this one."""
    if side >= length:
        return length
    count = -(-(length - overlap) // (side - overlap))
    return -(-(length + (count - 1) * overlap) // count)


def _longest(
    low: int, high: int, memory: int, peak: Callable[[int, tuple[int, int]], int], sides: tuple[int, int]
) -> tuple[int, int]:
    """Return about the longest chunk that fits in tiles of these sides, and its peak."""
    return _largest(low, high, memory, lambda n: peak(n, sides), lambda n: n)


def _largest(
    low: int, high: int, memory: int, peak: Callable[[int], int], work: Callable[[int], int]
) -> tuple[int, int]:
    """Return about the largest number that fits, and its peak, between one that does and one that does not.

    A peak is the largest of sums that are linear in the work: below its secant, which therefore finds what fits.
    """
    fits, lacks = peak(low), peak(high)
    for _ in range(2):
        share = (memory - fits) / max(1, lacks - fits)
        limit = work(low) + share * (work(high) - work(low))
        guess = max((n for n in range(low + 1, high) if work(n) <= limit), default=low)
        if guess == low:
            break
        found = peak(guess)
        low, fits, high, lacks = (guess, found, high, lacks) if found <= memory else (low, fits, guess, found)
    return low, fits
