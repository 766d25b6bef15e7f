"""What is measured of a clip before it is taken, what is asked of it, and which clips are too much alike.

Measures come from a `Scan` and are numbers with units; `Filters` holds the thresholds, so that a clip can be judged again
without being decoded again. Duplicates are found among all clips of a set by a perceptual hash.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch.nn.functional import adaptive_avg_pool2d

from reelflow.config import configuration
from reelflow.data.shots import GREY_SIDE, Scan
from reelflow.data.video import read_clip
from reelflow.errors import ConfigError

__all__ = ["HASH_BITS", "Filters", "Measures", "find_bars", "judge", "measure", "near_duplicates", "perceptual_hash"]

HASH_BITS = 3 * 64
DARK = 24.0  # levels: the brightest a bar may be, with what an encoder adds
CELL = 8  # pixels of the decoded picture, the side of a cell that text may fill


@configuration
class Filters:
    """What is asked of a clip; None asks nothing.

    Raises:
        ConfigError: a threshold is negative, or `duplicate_bits` more than a hash could tell.
    """

    min_motion: float | None = 0.005  # shorter picture sides per second
    max_motion: float | None = 2.0
    max_flicker: float | None = 8.0  # levels of 255
    max_bars: float | None = 0.02  # share of the picture
    max_text: float | None = 0.05  # share of the picture; a heuristic: thin lines that stay where they are, in rows
    duplicate_bits: int | None = 20  # of 192: clips that differ in no more are the same

    def __post_init__(self) -> None:
        for name in ("min_motion", "max_motion", "max_flicker", "max_bars", "max_text"):
            if (value := getattr(self, name)) is not None and not 0 <= value < float("inf"):
                raise ConfigError(f"filters.{name} must be at least 0, or null to ask nothing, got {value}; nearest: 0")
        if self.duplicate_bits is not None and not 0 <= self.duplicate_bits <= HASH_BITS // 4:
            raise ConfigError(
                f"filters.duplicate_bits must be between 0 and {HASH_BITS // 4} of {HASH_BITS}, got {self.duplicate_bits}"
            )


@configuration
class Measures:
    """What a clip is like."""

    motion: float  # shorter picture sides per second, mean over the picture and the clip
    flicker: float  # levels of 255: the greatest jump of the mean brightness out of its trend
    bars: tuple[int, int, int, int]  # black rows and columns of the file's picture: top, bottom, left, right
    bars_share: float  # of the picture
    text: float  # share of the picture
    hash: str  # 48 hexadecimal digits


def measure(scanned: Scan, path: Path, first: int, end: int) -> Measures:
    """Measure frames `first` up to `end` (not included) of a scan.

    Where there seem to be black bars, one frame of the file at `path` is decoded at its own size to count their rows.

    Raises:
        MediaError: that frame cannot be read.
    """
    grey = scanned.grey[first:end].astype(np.float32)
    bars, height, width = (0, 0, 0, 0), scanned.info.height, scanned.info.width
    looks = slice(first // scanned.every, -(-end // scanned.every))  # a look may be a little before or after the clip
    seen = _bars(scanned.edges[looks].max(0), scanned.size[0])
    if any(seen):
        middle = (first + end) // 2 / scanned.fps
        luma = _luma(read_clip(path, num_frames=1, start=middle).frames[0].numpy())
        bars = find_bars(luma)
        scale = max(height / scanned.size[0], width / scanned.size[1])
        most = [int((side + 1) * scale) for side in seen]  # this frame may be darker than others
        bars = (min(bars[0], most[0]), min(bars[1], most[1]), min(bars[2], most[2]), min(bars[3], most[3]))
    inner = (height - bars[0] - bars[1]) * (width - bars[2] - bars[3])
    return Measures(
        motion=round(_motion(grey) * scanned.fps / GREY_SIDE, 5),
        flicker=round(_flicker(grey), 3),
        bars=bars,
        bars_share=round(1 - inner / (height * width), 4),
        text=round(_text_share(scanned, looks), 4),
        hash=perceptual_hash(grey[[0, len(grey) // 2, len(grey) - 1]]),
    )


def judge(measures: Measures, filters: Filters) -> str | None:
    """Say why a clip is not taken, or None."""

    def above(value: float, most: float | None) -> bool:
        return most is not None and value > most

    if above(measures.bars_share, filters.max_bars):
        top, bottom, left, right = measures.bars
        return (
            f"black bars: {top} + {bottom} rows, {left} + {right} columns, "
            f"{measures.bars_share:.1%} > {filters.max_bars:.1%}"
        )
    if filters.min_motion is not None and measures.motion < filters.min_motion:
        return f"too still: motion {measures.motion:.3g} < {filters.min_motion:g} sides/s"
    if above(measures.motion, filters.max_motion):
        return f"too wild: motion {measures.motion:.3g} > {filters.max_motion:g} sides/s"
    if above(measures.flicker, filters.max_flicker):
        return f"flicker: {measures.flicker:.3g} > {filters.max_flicker:g} levels"
    if above(measures.text, filters.max_text):
        return f"text: {measures.text:.1%} > {filters.max_text:.1%}"
    return None


# --- one clip --------------------------------------------------------------------------------------------------------


def _motion(grey: np.ndarray) -> float:
    """Return how fast brightness moves, in pixels per frame: what changes in time over what changes in space.

    That is the mean normal flow |I_t| / |grad I|, weighted by |grad I|; two levels of gradient are added so that the noise
    of flat pictures is not motion. It grows with speed as long as a step is not longer than what moves is wide.
    """
    if len(grey) < 2:
        return 0.0
    down, right = np.gradient(grey, axis=(1, 2))
    return float(np.abs(np.diff(grey, axis=0)).mean() / (np.hypot(down, right).mean() + 2))


def _flicker(grey: np.ndarray) -> float:
    mean = grey.mean((1, 2))
    return float(np.abs(mean[1:-1] - (mean[2:] + mean[:-2]) / 2).max()) if len(mean) > 2 else 0.0


def find_bars(luma: np.ndarray) -> tuple[int, int, int, int]:
    """Count the black rows (H W, 0 to 255) above and below, and the black columns left and right; only pairs count.

    A picture that is dark all over has none, nor has one with a dark edge on one side alone.
    """
    return _bars(np.concatenate([luma.max(1), luma.max(0)]), len(luma))


def _bars(brightest: np.ndarray, height: int) -> tuple[int, int, int, int]:
    counts = []
    for side in (brightest[:height], brightest[height:]):
        bright = np.flatnonzero(side > DARK)
        before, after = (int(bright[0]), len(side) - 1 - int(bright[-1])) if len(bright) else (0, 0)
        counts += [before, after] if before and after else [0, 0]
    return counts[0], counts[1], counts[2], counts[3]


def _text_share(scanned: Scan, looks: slice) -> float:
    """Return the share of the picture filled by rows of cells with thin lines that stay put: a guess at titles and logos.

    What is still and finely textured (a bookshelf before a fixed camera) looks the same.
    """
    height, width = scanned.size
    still = np.bitwise_and.reduce(scanned.lines[looks], axis=0)
    lines = np.unpackbits(still, count=height * width).reshape(height, width)
    rows, columns = height // CELL, width // CELL
    cells = lines[: rows * CELL, : columns * CELL].reshape(rows, CELL, columns, CELL).mean((1, 3)) >= 0.08
    run = cells[:, :-2] & cells[:, 1:-1] & cells[:, 2:]
    filled = np.zeros_like(cells)
    for offset in range(3):
        filled[:, offset : columns - 2 + offset] |= run
    return float(filled.mean()) if filled.size else 0.0


def _luma(frame: np.ndarray) -> np.ndarray:
    return frame.astype(np.float32) @ np.array([0.299, 0.587, 0.114], np.float32)


# --- the whole set ---------------------------------------------------------------------------------------------------


def perceptual_hash(grey: np.ndarray) -> str:
    """Hash three grey pictures "3 h w": each is averaged to 8 x 9 cells, and a bit says that a cell's right neighbour is brighter.

    Brighter by 2 levels at least, so that flat parts give the same bits whatever an encoder made of them.
    """
    cells = adaptive_avg_pool2d(torch.from_numpy(np.ascontiguousarray(grey))[:, None].float(), (8, 9))[:, 0].numpy()
    return np.packbits(cells[:, :, 1:] - cells[:, :, :-1] > 2).tobytes().hex()


def near_duplicates(hashes: Sequence[str], bits: int, groups: Sequence[object]) -> dict[int, int]:
    """Return which items are like an earlier one, and which: at most `bits` bits apart, the earlier one being kept itself.

    Items of one group (the clips of one shot: moments that follow each other) are never duplicates of each other. Every pair
    is compared, most of them by a third of their bits only, which are too far apart already.
    """
    found: dict[int, int] = {}
    codes = np.frombuffer(bytes.fromhex("".join(hashes)), np.uint64).reshape(len(hashes), HASH_BITS // 64)
    kept, first = np.empty(len(hashes), int), np.empty(len(hashes), np.uint64)
    count = 0
    for item, group in enumerate(groups):
        near = kept[np.flatnonzero(np.bitwise_count(first[:count] ^ codes[item, 0]) <= bits)]
        alike = near[np.bitwise_count(codes[near] ^ codes[item]).sum(1) <= bits]
        original = next((other for other in alike.tolist() if groups[other] != group), None)
        if original is not None:
            found[item] = original
        else:
            kept[count], first[count] = item, codes[item, 0]
            count += 1
    return found
