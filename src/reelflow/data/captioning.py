"""Captions by a model that looks at frames: many clips at once, at a pace the server allows, none asked for twice.

Who is asked is a function from JPEG pictures to text (`reelflow.conditioning.chat.Describer`, or your own). What it said is
handed over as it comes, so that the caller can write it down before the next; who fails is named and the others go on.
"""

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import av
import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor

from reelflow.config import configuration
from reelflow.data.video import probe, read_clip
from reelflow.errors import ConfigError, DataError, ReelflowError

__all__ = ["Captioning", "Described", "Span", "describe", "jpeg", "pictures"]


@configuration
class Captioning:
    """How clips are shown to a model, and how often it is asked.

    Raises:
        ConfigError: a number is out of range.
    """

    num_pictures: int = 6  # evenly spaced over the clip
    side: int = 384  # pixels, the shorter side of a picture that is larger
    per_minute: float = 120.0  # questions that are begun
    parallel: int = 4  # questions under way
    give_up: int = 10  # clips that fail one after the other

    def __post_init__(self) -> None:
        for name, least in (("num_pictures", 1), ("side", 16), ("parallel", 1), ("give_up", 1)):
            if getattr(self, name) < least:
                raise ConfigError(
                    f"captioning.{name} must be at least {least}, got {getattr(self, name)}; nearest: {least}"
                )
        if not 0 < self.per_minute <= 1e6:
            raise ConfigError(f"captioning.per_minute must be above 0, got {self.per_minute}; nearest: 1")


class Span(NamedTuple):
    """A part of a file."""

    key: str
    path: Path
    start: float  # seconds
    seconds: float


class Described(NamedTuple):
    """What became of one question: a caption, or why there is none."""

    key: str
    caption: str
    reason: str | None


def describe(
    spans: Sequence[Span],
    ask: Callable[[Sequence[bytes]], str],
    config: Captioning,
    *,
    stopped: Callable[[], bool] = lambda: False,
) -> Iterator[Described]:
    """Yield a caption or a failure for each span, as they come; when `stopped`, finish what is under way and end.

    Raises:
        DataError: `give_up` spans in a row failed.
    """
    pace, row = _Pace(60 / config.per_minute), 0

    def one(span: Span) -> Described:
        try:
            shown = pictures(span, config.num_pictures, config.side)
            pace()
            return Described(span.key, ask(shown), None)
        except ReelflowError as error:
            return Described(span.key, "", str(error))

    left = iter(spans)
    with ThreadPoolExecutor(config.parallel, thread_name_prefix="captions") as pool:
        under_way: set[Future[Described]] = set()
        while True:
            while not stopped() and len(under_way) < config.parallel and (span := next(left, None)) is not None:
                under_way.add(pool.submit(one, span))
            if not under_way:
                return
            done, under_way = wait(under_way, return_when=FIRST_COMPLETED)
            for answer in (future.result() for future in done):
                row = row + 1 if answer.reason else 0
                yield answer
                if row == config.give_up:
                    raise DataError(
                        f"{row} captions in a row failed, the last because of: {answer.reason}; what was captioned is kept, "
                        f"and the same command goes on"
                    )


def pictures(span: Span, count: int, side: int) -> list[bytes]:
    """Return `count` frames of a span as JPEG, evenly spaced from its beginning, the shorter side at most `side` pixels.

    Raises:
        MediaError: they cannot be read.
    """
    info = probe(span.path)
    scale = min(1.0, side / min(info.height, info.width))
    size = (max(16, round(info.height * scale / 2) * 2), max(16, round(info.width * scale / 2) * 2))
    clip = read_clip(span.path, num_frames=count, fps=count / span.seconds, start=span.start, size=size)
    return [jpeg(frame) for frame in clip.frames]


def jpeg(frame: UInt8[Tensor, "H W 3"] | UInt8[np.ndarray, "H W 3"]) -> bytes:
    """Encode a picture."""
    pixels = np.ascontiguousarray(frame.numpy() if isinstance(frame, torch.Tensor) else frame)
    encoder: Any = av.CodecContext.create("mjpeg", "w")
    encoder.height, encoder.width = pixels.shape[:2]
    encoder.pix_fmt, encoder.time_base = "yuvj444p", Fraction(1)
    encoder.options = {"qmin": "2", "qmax": "4"}
    picture = av.VideoFrame.from_ndarray(pixels, format="rgb24").reformat(format="yuvj444p")
    return b"".join(bytes(packet) for packet in encoder.encode(picture) + encoder.encode(None))


class _Pace:
    """Lets callers from any thread pass no more often than every `seconds`."""

    def __init__(self, seconds: float) -> None:
        self.seconds, self.lock, self.next = seconds, threading.Lock(), 0.0

    def __call__(self) -> None:
        with self.lock:
            now = time.monotonic()
            turn = max(now, self.next)
            self.next = turn + self.seconds
        time.sleep(turn - now)
