"""The doors for pixels: video files and images become clips, and clips become files, all through PyAV.

Reading decodes no more than the window asked for and takes frames by their timestamps, so that a file of variable
frame rate plays at its true speed. What comes out is upright, opaque, full-range RGB. Writing is atomic: under the
final name there is either nothing new or the finished file.
"""

import itertools
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import av
import numpy as np
import torch
from av.stream import Discard, Disposition
from av.video.reformatter import ColorPrimaries, ColorRange, Colorspace, ColorTrc, Interpolation, VideoReformatter
from einops import rearrange
from jaxtyping import Float, UInt8
from torch import Tensor

from reelflow.errors import ConfigError, MediaError, nearest

__all__ = [
    "VIDEO_SUFFIXES",
    "Clip",
    "VideoInfo",
    "VideoWriter",
    "probe",
    "read_clip",
    "write_contact_sheet",
    "write_image",
    "write_video",
]

# What a folder is searched for; a file named outright is read whatever its suffix.
VIDEO_SUFFIXES = (
    *(".mp4", ".m4v", ".mov", ".webm", ".mkv", ".avi", ".gif", ".mpg", ".mpeg"),
    *(".ts", ".m2ts", ".mts", ".wmv", ".flv", ".ogv", ".3gp", ".mxf"),
)

SMALL = 512 * 512  # pixels per frame up to which threads cost more than they bring
REFUSED_FORMATS = {"tty", "hls", "dash", "concat", "imf"}  # text shown as pixels, and lists that name other files
DARK_GREY = 32


@dataclass(frozen=True)
class Clip:
    """Frames as they are shown, with their rate and where they came from."""

    frames: UInt8[Tensor, "T H W 3"]
    fps: float | int  # hertz; the average where the rate varies
    source: str  # provenance: a file, a prompt, a seed

    def to_float(self) -> Float[Tensor, "3 T H W"]:
        """Return the frames as float32 in [-1, 1]: 0 becomes -1, 255 becomes 1."""
        return rearrange(self.frames, "T H W C -> C T H W").contiguous() / 127.5 - 1

    @classmethod
    def from_float(cls, pixels: Float[Tensor, "3 T H W"], *, fps: float | int, source: str) -> "Clip":
        """Round values in [-1, 1] to the nearest of 256 levels, clipping what lies outside; undoes `to_float` exactly.

        Raises:
            MediaError: a value is NaN or infinite.
        """
        if not pixels.isfinite().all():
            raise MediaError(f"{source}: the clip holds NaN or infinite values and cannot be shown")
        levels = ((pixels.detach().float() + 1) * 127.5).round().clamp(0, 255).to("cpu", torch.uint8)
        return cls(rearrange(levels, "C T H W -> T H W C").contiguous(), fps, source)


class VideoInfo(NamedTuple):
    """What a file says about itself, with its first frame decoded to be sure."""

    height: int  # as shown, after rotation
    width: int
    num_frames: int | None  # None where the container does not say
    duration: float  # seconds
    fps: float  # average, hertz
    codec: str
    rotation: int  # degrees clockwise that turn the stored picture upright: 0, 90, 180 or 270 (180 where mirrored)
    variable_rate: bool  # a hint: the average rate differs from the nominal one by more than 1 %
    has_alpha: bool

    def num_frames_at(self, fps: float | int) -> int:
        """Return how many frames `read_clip` finds at this rate: the instants k / fps before the end."""
        return max(1, math.ceil(self.duration * fps - 0.1))


def probe(path: str | os.PathLike[str]) -> VideoInfo:
    """Describe a video or an image file at the cost of decoding one frame.

    Where the container states no duration (a browser's recording) the packets are walked through, not decoded.

    Raises:
        MediaError: the file is missing, empty, broken, or holds no picture.
    """
    path = Path(path)
    with _opened(path) as (container, stream):
        time, frame = next(_decoded(container, stream, start=0.0))
        if frame is None:
            raise MediaError(f"{path}: the video stream holds no frame that can be decoded")
        seconds = _claimed_seconds(container, stream) or (container.duration or 0) / av.time_base
        if not seconds:
            first = frame.pts or 0
            ends = [p.pts + (p.duration or 0) for p in container.demux(stream) if p.pts is not None]
            seconds = time + float((max(ends, default=first) - first) * stream.time_base)
        upright = _Upright(frame)
        height, width = (frame.width, frame.height) if upright.transposed else (frame.height, frame.width)
        rate, nominal = _rate(stream), stream.base_rate
        return VideoInfo(
            height=height,
            width=width,
            num_frames=stream.frames or None,
            duration=max(seconds, 1 / rate),
            fps=rate,
            codec=stream.codec_context.name,
            rotation=upright.rotation,
            variable_rate=bool(nominal) and abs(float(nominal) / rate - 1) > 0.01,
            has_alpha=_has_alpha(frame),
        )


def read_clip(
    path: str | os.PathLike[str],
    *,
    num_frames: int | None = None,
    fps: float | int | None = None,
    start: float | int = 0.0,
    size: tuple[int, int] | None = None,
) -> Clip:
    """Read the `num_frames` frames (None: all there are) shown from `start` seconds on.

    With `fps`, frame k is the one on the screen at start + k / fps: the last whose timestamp is not later. Equal means
    within half a tick of the file's clock (containers round), at most a tenth of a frame. Without `fps`, every frame is
    taken as it comes and `Clip.fps` is the average rate. An image is a clip of one frame.

    Rotation and mirroring from the file are applied, transparent pixels are laid over black, untagged colours are
    BT.709 from 720 lines on and BT.601 below, and pixels count as square. `size` = (height, width) scales with
    antialiasing, keeping the aspect, until the picture covers it, then crops the centre.

    Raises:
        ConfigError: a count, a rate, a time or a size is out of range.
        MediaError: the file is missing, empty, broken, truncated, holds no picture, or is too short.
    """
    path = Path(path)
    _check_window(num_frames, fps, start, size)
    for begin in (start, 0.0) if start else (0.0,):
        with _opened(path) as (container, stream):
            decoded = _decoded(container, stream, start=begin)
            first = next(decoded)
            # A seek may land behind its target where an index is missing or wrong: then walk from the beginning.
            if begin and first[0] > start:
                continue
            picture, rate = _Picture(size), _rate(stream)
            slack = min(float(stream.time_base) / 2, 0.1 / rate)
            shown = _shown(itertools.chain([first], decoded), start=float(start), fps=fps, slack=slack)
            frames = [picture(frame, path) for frame in itertools.islice(shown, num_frames)]
            break
    if len(frames) < (num_frames or 1):
        asked = f"{num_frames or 'some'} frames" + (f" at {fps:g} fps" if fps else "")
        raise MediaError(f"{path}: asked for {asked} from {start:g} s on, found {len(frames)}")
    if len({frame.shape for frame in frames}) > 1:
        raise MediaError(f"{path}: the frame size changes within the window; give a size to bring all frames to")
    return Clip(torch.from_numpy(np.stack(frames)), float(fps or rate), str(path))


def _check_window(
    num_frames: int | None, fps: float | int | None, start: float | int, size: tuple[int, int] | None
) -> None:
    if num_frames is not None and num_frames < 1:
        raise ConfigError(f"num_frames must be at least 1, got {num_frames}")
    if fps is not None and not 0 < fps < math.inf:
        raise ConfigError(f"fps must be positive, got {fps}")
    if not 0 <= start < math.inf:
        raise ConfigError(f"start must be a time in seconds from 0 on, got {start}")
    if size is not None and min(size) < 1:
        raise ConfigError(f"size (height, width) must be at least 1 x 1, got {size[0]} x {size[1]}")


@contextmanager
def _opened(path: Path) -> Iterator[tuple[Any, Any]]:
    """Open a file and yield (container, its first video stream); what goes wrong inside is a MediaError naming it."""
    if not path.exists():
        names = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        raise MediaError(f"{path}: no such file; {nearest(path.name, names) if names else 'nor such a folder'}")
    if not path.is_file():
        raise MediaError(f"{path} is not a file; give a video or an image")
    if path.stat().st_size == 0:
        raise MediaError(f"{path}: the file is empty (0 bytes)")
    try:
        # An absolute path is never taken for a protocol (`concat:...`); "none": `%03d` in a name is just a name.
        options = {"protocol_whitelist": "file", "pattern_type": "none"}
        with av.open(str(path.absolute()), options=options, metadata_errors="replace") as container:
            if REFUSED_FORMATS & set(container.format.name.split(",")):
                raise MediaError(f"{path}: {container.format.long_name} is text, not video")
            videos = [s for s in container.streams.video if not s.disposition & Disposition.attached_pic]
            if not videos:
                kinds = sorted({s.type for s in container.streams if s.type != "video"})
                raise MediaError(f"{path}: no video stream, only {' and '.join(kinds) or 'a header'}")
            stream = videos[0]
            for other in container.streams:
                other.discard = Discard.default if other is stream else Discard.all
            if stream.codec_context is None:
                raise MediaError(f"{path}: no decoder for its video codec")
            yield container, stream
    except (av.FFmpegError, OSError) as error:
        raise MediaError(f"{path}: cannot be read: {error.strerror or error}") from error


def _decoded(container: Any, stream: Any, *, start: float | int) -> Iterator[tuple[float, av.VideoFrame | None]]:
    """Yield (seconds since the stream's beginning, frame) from a key frame at or before `start`, then (end, None).

    Raises:
        MediaError: the frames end well before the header says.
    """
    decoder = stream.codec_context
    if stream.metadata.get("alpha_mode") == "1" and decoder.name in ("vp8", "vp9"):
        # FFmpeg's own decoders drop the transparency of these; libvpx keeps it.
        decoder = av.CodecContext.create({"vp8": "libvpx", "vp9": "libvpx-vp9"}[decoder.name], "r")
    elif decoder.width * decoder.height <= SMALL:
        decoder.thread_count = 1
    else:
        decoder.thread_type = "AUTO"
    origin, rate, tick = stream.start_time, _rate(stream), float(stream.time_base)
    if start > 0 and origin is not None:
        with suppress(av.FFmpegError):  # not seekable: decode from the beginning
            container.seek(origin + int(start / stream.time_base), stream=stream)
    end = 0.0
    frames = (frame for packet in container.demux(stream) for frame in decoder.decode(packet))
    for index, frame in enumerate(frames):
        if frame.pts is None:
            time = index / rate  # a raw stream without a clock
        else:
            origin = frame.pts if origin is None else origin
            time = (frame.pts - origin) * tick
        end = time + (frame.duration * tick or 1 / rate)
        yield time, frame
    claimed = _claimed_seconds(container, stream) or 0
    if claimed - end > max(2 / rate, 0.05 * claimed):
        raise MediaError(
            f"{container.name}: truncated: the header promises {claimed:.2f} s, the file holds {end:.2f} s"
        )
    yield end, None


def _shown(
    frames: Iterator[tuple[float, av.VideoFrame | None]], *, start: float, fps: float | int | None, slack: float
) -> Iterator[av.VideoFrame]:
    """Yield what is on the screen at start + k / fps, or, without fps, at `start` and every frame thereafter."""
    held, wanted = None, start
    count = 0
    for time, frame in frames:
        while held is not None and wanted + slack < time:
            yield held
            count += 1
            wanted = time if fps is None else start + count / fps
        held = frame


def _rate(stream: Any) -> float:
    """Return the average rate, counted where the header allows it: FFmpeg guesses a GIF's from its first frames."""
    if stream.frames and stream.duration:
        return float(stream.frames / (stream.duration * stream.time_base))
    return float(stream.average_rate or stream.guessed_rate or 25)


def _claimed_seconds(container: Any, stream: Any) -> float | None:
    """Return how long the header says the video is; None where it says nothing of this stream alone."""
    if stream.duration:
        return float(stream.duration * stream.time_base)
    return container.duration / av.time_base if container.duration and len(container.streams) == 1 else None


def _threads(frame: av.VideoFrame) -> int:
    """Threads for converting a frame; 0 lets FFmpeg choose."""
    return 1 if frame.width * frame.height <= SMALL else 0


def _has_alpha(frame: av.VideoFrame) -> bool:
    return frame.format.name == "pal8" or any(component.is_alpha for component in frame.format.components)


class _Upright:
    """How a stored picture is turned and mirrored to be shown, from the display matrix [a b; c d] of its frame.

    A stored pixel (x, y) is shown at (a x + c y, b x + d y), y downwards; any other angle goes to the nearest quarter.
    """

    def __init__(self, frame: av.VideoFrame) -> None:
        self.rotation = -round(frame.rotation / 90) * 90 % 360
        try:
            matrix: Any = frame.side_data.get("DISPLAYMATRIX")
        except ValueError:  # a kind of side data PyAV has no name for (a photo's EXIF): what it says of turning remains
            a, b, c, d = {0: (1, 0, 0, 1), 90: (0, 1, -1, 0), 180: (-1, 0, 0, -1), 270: (0, -1, 1, 0)}[self.rotation]
        else:
            entries = np.frombuffer(bytes(matrix), np.int32).tolist() if matrix is not None else (1, 0, 0, 0, 1)
            a, b, c, d = (entries[k] for k in (0, 1, 3, 4))
        self.transposed = abs(b) + abs(c) > abs(a) + abs(d)
        down, right = (b, c) if self.transposed else (d, a)
        self.flips = tuple(axis for axis, sign in ((0, down), (1, right)) if sign < 0)

    def __call__(self, pixels: np.ndarray) -> np.ndarray:
        return np.flip(pixels.swapaxes(0, 1) if self.transposed else pixels, self.flips)


class _Picture:
    """Turns decoded frames into upright RGB arrays "H W 3", scaled and cropped to `size` where one is given."""

    def __init__(self, size: tuple[int, int] | None) -> None:
        self.size = size
        self.convert = VideoReformatter()  # keeps its tables from frame to frame
        self.upright: _Upright | None = None

    def __call__(self, frame: av.VideoFrame, path: Path) -> np.ndarray:
        if frame.is_corrupt:
            raise MediaError(f"{path}: the frame at {frame.time or 0:.3f} s is damaged")
        self.upright = self.upright or _Upright(frame)
        if frame.colorspace == Colorspace.DEFAULT and frame.height >= 720:
            frame.colorspace = Colorspace.ITU709
        if _has_alpha(frame):
            pixels = self.convert.reformat(frame, format="rgba", threads=_threads(frame)).to_ndarray()
            rgb, alpha = pixels[..., :3], pixels[..., 3:].astype(np.uint16)
            frame = av.VideoFrame.from_ndarray(((rgb * alpha + 127) // 255).astype(np.uint8), format="rgb24")
        height, width = self.covering(frame)
        # Scaling filters chroma as well; at equal size the plain path is exact where colours are flat, and fast.
        scaled = (height, width) != (frame.height, frame.width)
        filters = Interpolation.BICUBIC | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT
        converted = self.convert.reformat(
            frame,
            width=width,
            height=height,
            format="rgb24",
            interpolation=filters if scaled else None,
            threads=_threads(frame),
        )
        pixels = self.upright(converted.to_ndarray())
        if self.size:
            top, left = ((have - want) // 2 for have, want in zip(pixels.shape, self.size, strict=False))
            pixels = pixels[top : top + self.size[0], left : left + self.size[1]]
        return pixels

    def covering(self, frame: av.VideoFrame) -> tuple[int, int]:
        """Return the stored height and width to scale to, so that the upright picture just covers the size asked for."""
        assert self.upright is not None
        if self.size is None:
            return frame.height, frame.width
        height, width = self.size[::-1] if self.upright.transposed else self.size
        scale = max(height / frame.height, width / frame.width)
        return max(height, round(frame.height * scale)), max(width, round(frame.width * scale))


class _Encoding(NamedTuple):
    container: str
    codec: str
    pixels: str
    options: dict[str, str]
    subsampled: bool = False  # 4:2:0 holds one colour for 2 x 2 pixels, so that sizes must be even


_ENCODINGS = {
    ".mp4": _Encoding("mp4", "libx264", "yuv420p", {"crf": "18", "preset": "veryfast"}, subsampled=True),
    ".webm": _Encoding(
        "webm", "libvpx-vp9", "yuv420p", {"crf": "24", "b": "0", "deadline": "good", "cpu-used": "4"}, subsampled=True
    ),
    ".gif": _Encoding("gif", "gif", "pal8", {}),
    ".mkv": _Encoding("matroska", "ffv1", "bgr0", {"level": "1"}),  # lossless; level 3 slices, and fails on thin frames
}


def write_video(path: str | os.PathLike[str], frames: np.ndarray | Tensor, *, fps: float | int) -> None:
    """Write uint8 frames "T H W 3" in the encoding the suffix names; an existing file is replaced by the finished one.

    .mp4 is h264 (yuv420p, crf 18, index in front), .webm VP9, .gif a palette per frame, .mkv lossless FFV1, and .png an
    image, for T = 1. Frames of up to 512 x 512 pixels are encoded in one thread: the bytes depend on nothing else.

    Raises:
        ConfigError: the suffix, the rate, or the frames' shape, dtype or size (odd, in .mp4 and .webm) will not do.
        MediaError: the folder is missing, or the disk is full; no partial file is left.
    """
    if Path(path).suffix.lower() == ".png":
        pixels = _checked_frames(frames)
        if len(pixels) != 1:
            raise ConfigError(f"{path}: a .png holds one frame, got {len(pixels)}; .mkv and .gif hold many")
        return write_image(path, pixels[0])
    with VideoWriter(path, fps=fps) as writer:
        writer.write(frames)


class VideoWriter:
    """Writes a video as its frames come, in memory that does not grow; a context manager.

    Leaving the block finishes the file and puts it under its name. An exception inside leaves nothing behind, except
    KeyboardInterrupt: what was written so far is finished and kept, and the interrupt goes on its way. Suffixes,
    encodings and errors are those of `write_video` (but for .png); suffix, rate and folder are checked at once.
    """

    def __init__(self, path: str | os.PathLike[str], *, fps: float | int) -> None:
        self.path = Path(path)
        suffix = self.path.suffix.lower()
        if suffix not in _ENCODINGS:
            raise ConfigError(
                f"{path}: cannot write {suffix or 'a file without suffix'}; {nearest(suffix, _ENCODINGS)}"
            )
        if not 0.001 <= fps <= 1000:
            raise ConfigError(f"fps must be between 0.001 and 1000, got {fps}")
        self.num_frames = 0
        self._encoding = _ENCODINGS[suffix]
        self._rate = Fraction(fps).limit_denominator(1001)
        self._part = _part(self.path)
        self._size: tuple[int, int] | None = None
        self._container: Any = None

    def __enter__(self) -> "VideoWriter":
        return self

    def write(self, frames: np.ndarray | Tensor) -> None:
        """Append uint8 frames "T H W 3" (T >= 0), all of one size."""
        for frame in _checked_frames(frames):
            if self._size is None:
                self._begin(*frame.shape[:2])
            if self._size != frame.shape[:2]:
                raise ConfigError(
                    f"{self.path}: all frames must have one size, {self._size} at first, now {frame.shape[:2]}"
                )
            with _disk(self.path):
                picture = av.VideoFrame.from_ndarray(frame, format="rgb24")
                picture.pts, picture.time_base = self.num_frames, 1 / self._rate
                self._mux(self._convert(picture))
            self.num_frames += 1

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        keep = kind is None or issubclass(kind, KeyboardInterrupt)
        try:
            if keep and self.num_frames:
                with _disk(self.path):
                    self._mux(None)
                    self._container.close()
                    os.replace(self._part, self.path)
            elif kind is None:
                raise ConfigError(f"{self.path}: no frames to write")
        finally:
            if self._container is not None:
                with suppress(av.FFmpegError, OSError):
                    self._container.close()
            self._part.unlink(missing_ok=True)

    def _begin(self, height: int, width: int) -> None:
        encoding = self._encoding
        if encoding.subsampled and (height % 2 or width % 2):
            low, high = (height // 2 * 2, width // 2 * 2), (-(-height // 2) * 2, -(-width // 2) * 2)
            near = " or ".join(f"{h} x {w}" for h, w in (low, high) if h and w)
            raise ConfigError(
                f"{self.path}: {self.path.suffix} needs an even height and width, got {height} x {width}; "
                f"nearest: {near}; .mkv (lossless) takes any size"
            )
        with _disk(self.path):
            # bitexact keeps dates and random ids out of the file
            options = {"fflags": "+bitexact"} | ({"movflags": "+faststart"} if encoding.container == "mp4" else {})
            self._container = av.open(str(self._part.absolute()), "w", format=encoding.container, options=options)
            self._stream = self._container.add_stream(encoding.codec, rate=self._rate, options=dict(encoding.options))
            self._stream.width, self._stream.height, self._stream.pix_fmt = width, height, encoding.pixels
            self._stream.codec_context.time_base = 1 / self._rate
            if width * height <= SMALL:
                self._stream.codec_context.thread_count = 1
            if encoding.subsampled:
                context = self._stream.codec_context
                context.colorspace, context.color_range = Colorspace.ITU709, ColorRange.MPEG
                context.color_primaries, context.color_trc = ColorPrimaries.BT709, ColorTrc.BT709
            self._size = (height, width)
            self._reformatter = VideoReformatter()
            self._palette = _palette_graph(height, width, 1 / self._rate) if encoding.pixels == "pal8" else None

    def _convert(self, picture: av.VideoFrame) -> av.VideoFrame:
        if self._palette is not None:
            self._palette.vpush(picture)
            return self._palette.vpull()
        if self._encoding.subsampled:
            # AREA averages the four pixels that share a chroma sample, which is what readers undo.
            return self._reformatter.reformat(
                picture,
                format=self._encoding.pixels,
                dst_colorspace=Colorspace.ITU709,
                dst_color_range=ColorRange.MPEG,
                interpolation=Interpolation.AREA,
                threads=_threads(picture),
            )
        return self._reformatter.reformat(picture, format=self._encoding.pixels, threads=_threads(picture))

    def _mux(self, picture: av.VideoFrame | None) -> None:
        self._container.mux(self._stream.encode(picture))


def _palette_graph(height: int, width: int, time_base: Fraction) -> Any:
    """Build the filters that give every frame its own 256 colours, so that nothing waits for the whole clip."""
    graph = av.filter.Graph()
    source = graph.add_buffer(width=width, height=height, format=av.VideoFormat("rgb24"), time_base=time_base)
    split, generate = graph.add("split"), graph.add("palettegen", "stats_mode=single")
    use, sink = graph.add("paletteuse", "new=1"), graph.add("buffersink")
    source.link_to(split)
    split.link_to(generate, 0, 0)
    split.link_to(use, 1, 0)
    generate.link_to(use, 0, 1)
    use.link_to(sink)
    graph.configure()
    return graph


def write_image(path: str | os.PathLike[str], image: np.ndarray | Tensor) -> None:
    """Write uint8 "H W 3" as a .png, atomically.

    Raises:
        ConfigError: the suffix is not .png, or the image is not uint8 "H W 3".
        MediaError: the folder is missing, or the disk is full.
    """
    path = Path(path)
    if path.suffix.lower() != ".png":
        raise ConfigError(f"{path}: images are written as .png, got {path.suffix or 'no suffix'}")
    (pixels,) = _checked_frames(image[None])
    encoder: Any = av.CodecContext.create("png", "w")
    encoder.height, encoder.width = pixels.shape[:2]
    encoder.pix_fmt, encoder.time_base = "rgb24", Fraction(1)
    packets = encoder.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")) + encoder.encode(None)
    part = _part(path)
    try:
        with _disk(path):
            part.write_bytes(b"".join(bytes(packet) for packet in packets))
            os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def write_contact_sheet(
    path: str | os.PathLike[str], clips: Sequence[np.ndarray | Tensor], *, columns: int, gap: int = 2
) -> None:
    """Write a .png with a row for each clip (uint8 "T H W 3"): `columns` frames, evenly spaced from first to last.

    A clip of fewer frames repeats some. Tiles are `gap` pixels apart on dark grey.

    Raises:
        ConfigError: there are no clips or columns, or the clips differ in size.
        MediaError: the file cannot be written.
    """
    rows = [_checked_frames(clip) for clip in clips]
    if not rows or columns < 1 or gap < 0 or not all(len(row) for row in rows):
        raise ConfigError(f"{path}: nothing to show: {len(rows)} clips in {columns} columns, gap {gap}")
    if len({row.shape[1:] for row in rows}) > 1:
        raise ConfigError(f"{path}: clips must have one size, got {sorted({row.shape[1:3] for row in rows})}")
    height, width = rows[0].shape[1:3]
    sheet = np.full((len(rows) * (height + gap) - gap, columns * (width + gap) - gap, 3), DARK_GREY, np.uint8)
    for i, row in enumerate(rows):
        for j, k in enumerate(np.linspace(0, len(row) - 1, columns).round().astype(int)):
            top, left = i * (height + gap), j * (width + gap)
            sheet[top : top + height, left : left + width] = row[k]
    write_image(path, sheet)


def _checked_frames(frames: np.ndarray | Tensor) -> np.ndarray:
    shape, dtype = tuple(frames.shape), str(frames.dtype).removeprefix("torch.")
    if len(shape) != 4 or shape[3] != 3 or 0 in shape[1:] or dtype != "uint8":
        raise ConfigError(
            f'frames must be uint8 "T H W 3", got {dtype} {shape}; Clip.from_float makes them of [-1, 1] "3 T H W"'
        )
    return np.ascontiguousarray(frames.cpu().numpy() if isinstance(frames, Tensor) else frames)


def _part(path: Path) -> Path:
    """Return the name under which a file grows until it is finished."""
    if not path.parent.is_dir():
        raise MediaError(f"cannot write {path}: the folder {path.parent} does not exist")
    if path.is_dir():
        raise MediaError(f"cannot write {path}: it is a folder")
    return path.with_name(f".{path.name}.{os.getpid()}.part")


@contextmanager
def _disk(path: Path) -> Iterator[None]:
    try:
        yield
    except (av.FFmpegError, OSError) as error:
        raise MediaError(f"cannot write {path}: {error.strerror or error}") from error
