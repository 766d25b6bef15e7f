"""Where one shot ends and the next begins, from small pictures of every frame.

A hard cut is a step between neighbouring frames that stands out from the steps around it (an adaptive threshold), a flash
is two such steps that lead back to where they began. A fade or dissolve is found by what it is: frames between whose pixels
those in the middle are a mixture of both ends, p = (1 - a) first + a last. The frames of a transition belong to no shot.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Float32, UInt8
from torch.nn.functional import adaptive_avg_pool2d

from reelflow.config import configuration
from reelflow.data.video import VideoInfo, probe, read_clip
from reelflow.errors import ConfigError

__all__ = ["Scan", "Shot", "ShotDetection", "find_shots", "scan"]

SHORT_SIDE = 144  # of the pictures that are decoded; what is kept of them is smaller
GREY_SIDE = 36
MAX_FPS = 60.0
CLOSER = 4  # looks a second
PIECE = 512  # frames decoded at once
BINS = 16  # of each channel's histogram
LUMA = np.array([0.299, 0.587, 0.114], np.float32)


@configuration
class ShotDetection:
    """How far a step must stand out to be a cut; the distance of two frames is 0 (equal) to 1.

    Raises:
        ConfigError: a value is out of range.
    """

    least: float = 0.08  # a cut is at least so far
    ratio: float = 3.5  # and so many times the median step nearby
    nearby: float = 0.5  # seconds to either side
    fade: float = 0.1  # the ends of a fade or dissolve are at least so far apart; 0 looks for none
    fade_seconds: float = 1.0  # over which, and over half of which, a transition is looked for

    def __post_init__(self) -> None:
        for name, low, high in (("least", 0, 1), ("ratio", 1, 1e3), ("nearby", 0, 60), ("fade_seconds", 0, 60)):
            if not low < getattr(self, name) <= high:
                raise ConfigError(
                    f"shots.{name} must be above {low} and at most {high:g}, got {getattr(self, name)}; nearest: {high:g}"
                )
        if not 0 <= self.fade <= 1:
            raise ConfigError(f"shots.fade must be between 0 and 1, got {self.fade}; nearest: 0 or 1")


class Shot(NamedTuple):
    """Frames `first` up to, but not including, `end` of a scan."""

    first: int
    end: int


@dataclass(frozen=True)
class Scan:
    """A video reduced to what shots and filters look at: 2 to 4 KB a frame."""

    fps: float  # the file's own average rate, at most 60
    info: VideoInfo
    grey: UInt8[np.ndarray, "T h w"]  # the shorter side is 36
    colours: Float32[np.ndarray, "T bins"]  # histograms of red, green and blue, each of sum 1/3
    every: int  # of so many frames, the first is looked at more closely
    edges: UInt8[np.ndarray, "S sides"]  # the brightest value of each row, then of each column, of the decoded picture
    lines: UInt8[np.ndarray, "S bytes"]  # bit maps of thin bright or dark lines in it
    size: tuple[int, int]  # height and width of the decoded picture

    def __len__(self) -> int:
        return len(self.grey)


def scan(path: Path) -> Scan:
    """Decode a video once, small.

    Raises:
        MediaError: the file is broken or truncated.
    """
    info = probe(path)
    fps = min(info.fps, MAX_FPS)
    short = min(info.height, info.width)
    long = min(4.0, max(info.height, info.width) / short)
    sides = tuple(round(SHORT_SIDE * (1 if side == short else long)) for side in (info.height, info.width))
    size = (sides[0], sides[1])
    expected = info.num_frames_at(fps)
    every = max(1, round(fps / CLOSER))
    piece = max(1, PIECE // every) * every
    last = max(0, expected - piece // 8) // piece * piece  # this piece reads on to the end
    parts = []
    for first in range(0, last + 1, piece):
        clip = read_clip(path, num_frames=piece if first < last else None, fps=fps, start=first / fps, size=size)
        parts.append(_reduced(clip.frames.numpy(), every))
    grey, colours, edges, lines = (np.concatenate(column) for column in zip(*parts, strict=True))
    return Scan(fps, info, grey, colours, every, edges, lines, size)


def find_shots(scanned: Scan, detection: ShotDetection) -> list[Shot]:
    """Split a video into its shots, in order.

    The frames of a fade or dissolve lie in no shot; a flash (up to three frames, after which the picture is as before) splits
    nothing.
    """
    count = len(scanned)
    cuts = _cuts(scanned, detection)
    inside = np.ones(count + 1, bool)  # frames that belong to a shot
    for first, end in _transitions(scanned, detection, cuts):
        inside[first:end] = False
    inside[count] = False
    shots, begin = [], None
    for frame in range(count + 1):
        if begin is not None and (not inside[frame] or frame in cuts):
            shots.append(Shot(begin, frame))
            begin = None
        if begin is None and inside[frame]:
            begin = frame
    return shots


def _distance(scanned: Scan, a: np.ndarray, b: np.ndarray) -> Float32[np.ndarray, " N"]:
    """Return how far frames `a` are from frames `b`: the geometric mean of what pixels and colours say.

    A fast camera moves pixels and keeps the colours; a change of exposure does the opposite less often.
    """
    pixels = np.abs(scanned.grey[a].astype(np.float32) - scanned.grey[b]).mean((1, 2)) / 255
    colours = np.abs(scanned.colours[a] - scanned.colours[b]).sum(1) / 2
    return np.sqrt(pixels * colours)


def _steps(scanned: Scan) -> Float32[np.ndarray, " _"]:
    """Return how far each frame is from the one before it; `steps[k]` leads from frame k to k + 1."""
    order = np.arange(len(scanned))
    return _distance(scanned, order[1:], order[:-1])


def _cuts(scanned: Scan, detection: ShotDetection) -> set[int]:
    """Return the frames that begin a shot after a hard cut."""
    steps = _steps(scanned)
    reach = max(2, round(detection.nearby * scanned.fps))
    found = []
    for k in np.flatnonzero(steps >= detection.least):
        around = np.concatenate([steps[max(0, k - reach) : k], steps[k + 1 : k + 1 + reach]])
        if steps[k] >= detection.ratio * (np.median(around) if len(around) else 0):
            found.append(int(k) + 1)
    cuts, index = set(), 0
    while index < len(found):
        frame = found[index]
        back = [
            later
            for later in found[index + 1 :]
            if later - frame <= 3
            and _distance(scanned, np.array([frame - 1]), np.array([later]))[0] < detection.least / 2
        ]
        if back:  # a flash: the picture after it is the one before it
            index = found.index(back[-1]) + 1
        else:
            cuts.add(frame)
            index += 1
    return cuts


def _transitions(scanned: Scan, detection: ShotDetection, cuts: set[int]) -> list[tuple[int, int]]:
    """Return the frames of fades and dissolves, as ranges that may overlap."""
    if not detection.fade:
        return []
    cut = np.zeros(len(scanned), int)
    cut[sorted(cuts)] = 1
    passed = np.cumsum(cut)  # cuts up to and with a frame
    steps, found = _steps(scanned), []
    for part in (1, 2):
        span = max(4, round(detection.fade_seconds * scanned.fps / part))
        order = np.arange(max(0, len(scanned) - span))
        far = _distance(scanned, order, order + span) >= detection.fade
        for first in np.flatnonzero(far & (passed[order] == passed[order + span])).tolist():
            mixed = _mixture(scanned.grey[first : first + span + 1].astype(np.float32))
            if mixed is None:
                continue
            begin, end = first + mixed[0], first + mixed[1]
            around = [
                np.median(side)
                for side in (steps[max(0, first - span) : first], steps[first + span :][:span])
                if len(side)
            ]
            if steps[begin - 1 : end].mean() >= 2 * min(around, default=0):
                found.append((begin, end))
    return found


def _mixture(grey: Float32[np.ndarray, "T h w"]) -> tuple[int, int] | None:
    """Return which frames mix the first and the last, if those in the middle do: a moving camera makes no such pictures."""
    change = grey[-1] - grey[0]
    between = grey[1:-1] - grey[0]
    share = (between * change).sum((1, 2)) / max(1.0, float(np.square(change).sum()))  # of the last, by least squares
    middle = int(np.abs(share - 0.5).argmin())
    rest, size = np.abs(between[middle] - share[middle] * change), np.abs(change)
    # Nothing is left where nothing moves; where something does, most pixels still agree.
    if not 0.2 <= share[middle] <= 0.8 or np.median(rest) > 0.2 * np.median(size) or rest.mean() > 0.3 * size.mean():
        return None
    mixed = np.flatnonzero((share > 0.1) & (share < 0.9)) + 1
    return int(mixed[0]), int(mixed[-1]) + 1


def _reduced(frames: UInt8[np.ndarray, "T H W 3"], every: int) -> tuple[np.ndarray, ...]:
    """Return the columns of a `Scan`."""
    height, width = frames.shape[1:3]
    sides = tuple(max(1, round(side * GREY_SIDE / SHORT_SIDE)) for side in (height, width))
    small = adaptive_avg_pool2d(rearrange(torch.from_numpy(frames), "T H W C -> T C H W").float(), sides)
    grey = np.rint(rearrange(small, "T C h w -> T h w C").numpy() @ LUMA).astype(np.uint8)
    levels = (small.numpy() * (BINS / 256)).astype(np.int64).clip(0, BINS - 1)  # T C h w
    offsets = BINS * (np.arange(len(frames))[:, None] * 3 + np.arange(3))[..., None, None]
    counts = np.bincount((levels + offsets).ravel(), minlength=len(frames) * 3 * BINS)
    colours = (counts.reshape(len(frames), -1) / (3 * sides[0] * sides[1])).astype(np.float32)
    luma = frames[::every] @ LUMA
    edges = np.concatenate([luma.max(2), luma.max(1)], axis=1).astype(np.uint8)
    return grey, colours, edges, np.packbits(_lines(luma).reshape(len(luma), -1), axis=1)


def _lines(luma: Float32[np.ndarray, "T H W"], *, contrast: float = 48.0, thickness: int = 5) -> np.ndarray:
    """Mark where brightness steps up (down) and within `thickness` pixels to the right down (up) again: a thin line."""
    step = np.zeros(luma.shape, np.float32)
    step[:, :, 1:-1] = luma[:, :, 2:] - luma[:, :, :-2]
    up, down = step > contrast, step < -contrast
    found = np.zeros(luma.shape, bool)
    for offset in range(1, thickness + 1):
        found[:, :, :-offset] |= up[:, :, :-offset] & down[:, :, offset:]
        found[:, :, :-offset] |= down[:, :, :-offset] & up[:, :, offset:]
    return found
