"""A folder of videos: which files it has, what their captions are, and what would become of each.

A caption comes from `name.txt` beside the video, else from `metadata.csv` or `metadata.jsonl` in the folder (columns
`file_name` and `caption`), else from the name of the sub-folder. A video is cut into clips that do not overlap.
"""

import csv
import io
import json
import math
import unicodedata
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NamedTuple

from jaxtyping import UInt8
from torch import Tensor

from reelflow.config import configuration
from reelflow.data.video import VideoInfo, probe, read_clip
from reelflow.errors import ConfigError, DataError, MediaError

__all__ = [
    "Caption",
    "ClipSpec",
    "FileReport",
    "has_proportions",
    "inspect_folder",
    "list_videos",
    "read_captions",
    "read_windows",
]

SUFFIXES = (
    ".3gp",
    ".avi",
    ".flv",
    ".gif",
    ".m4v",
    ".mkv",
    ".mov",
    ".mp4",
    ".mpeg",
    ".mpg",
    ".ogv",
    ".ts",
    ".webm",
    ".wmv",
)
FILE_COLUMNS = ("file_name", "file")
CAPTION_COLUMNS = ("caption", "text", "prompt")
PIECE_BYTES = 256 << 20  # decoded frames held at once; longer videos are read piece by piece


@configuration
class ClipSpec:
    """The clips that are made of videos, whatever their own size and frame rate.

    Raises:
        ConfigError: a value is out of range.
    """

    num_frames: int
    height: int  # pixels
    width: int
    fps: float

    def __post_init__(self) -> None:
        for name in ("num_frames", "height", "width"):
            if getattr(self, name) < 1:
                raise ConfigError(f"clip.{name} must be at least 1, got {getattr(self, name)}")
        if not 0 < self.fps < math.inf:
            raise ConfigError(f"clip.fps must be a positive number of frames per second, got {self.fps}")

    @property
    def seconds(self) -> float:
        return self.num_frames / self.fps


class Caption(NamedTuple):
    """A caption, possibly empty, and what its reader should know about where it came from."""

    text: str
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class FileReport:
    """What would become of one file."""

    path: Path  # relative to the folder
    accepted: bool
    num_clips: int
    caption: str
    notes: tuple[str, ...]
    reason: str | None  # why it is rejected
    tokens: int  # of all its clips


def list_videos(folder: Path) -> list[Path]:
    """List the videos in a folder and its sub-folders, sorted; names that begin with a dot are ignored.

    Raises:
        DataError: the folder is missing or has no videos.
    """
    if not folder.is_dir():
        known = [path.name for path in folder.parent.iterdir() if path.is_dir()] if folder.parent.is_dir() else []
        close = get_close_matches(folder.name, known, n=1)
        hint = f"; did you mean {folder.with_name(close[0])}?" if close else ""
        raise DataError(f"{folder} is {'a file' if folder.exists() else 'missing'}, expected a folder of videos{hint}")
    found = [path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file()]
    visible = [path for path in found if not any(part.startswith(".") for part in path.relative_to(folder).parts)]
    if not visible:
        raise DataError(f"{folder} has no videos; looked for {', '.join(SUFFIXES)}")
    return sorted(visible)


def read_captions(folder: Path, paths: list[Path]) -> dict[Path, Caption]:
    """Return the caption of every video.

    Raises:
        DataError: a text or metadata file cannot be read (the line is named), or there are two metadata files.
    """
    source, listed = _read_metadata(folder)
    captions = {}
    for path in paths:
        sidecar, entry = path.with_suffix(".txt"), listed.get(_key(path.relative_to(folder).as_posix()))
        if sidecar.is_file():
            text = _read_text(sidecar).strip()
            notes = [f"{sidecar.name} is empty"] if not text else []
            if entry is not None:
                notes.append(f"caption from {sidecar.name}, not from {source}")
            captions[path] = Caption(text, tuple(notes))
        elif entry is not None:
            captions[path] = Caption(entry, () if entry else (f"empty caption in {source}",))
        elif path.parent != folder:
            captions[path] = Caption(path.parent.name, ("caption from the folder's name",))
        else:
            captions[path] = Caption("", ("no caption",))
    return captions


def inspect_folder(folder: Path, spec: ClipSpec, *, tokens_per_clip: int = 0) -> list[FileReport]:
    """Say for every video what would become of it; of a long one, only its ends are decoded.

    Raises:
        DataError: the folder is missing, has no videos, or its captions cannot be read.
    """
    paths = list_videos(folder)
    captions = read_captions(folder, paths)
    reports = []
    for path in paths:
        relative, (caption, notes) = path.relative_to(folder), captions[path]
        try:
            info = probe(path)
            num_frames = _count(path, info, spec)
        except MediaError as error:
            reason = str(error).removeprefix(f"{path}: ")
            reports.append(FileReport(relative, False, 0, caption, notes, reason, 0))
            continue
        num_clips = num_frames // spec.num_frames
        notes = (*_changes(info, spec, num_frames), *notes)
        reports.append(FileReport(relative, True, num_clips, caption, notes, None, num_clips * tokens_per_clip))
    return reports


def read_windows(path: Path, spec: ClipSpec) -> Iterator[tuple[float, UInt8[Tensor, "T H W 3"]]]:
    """Decode the clips of a video one after the other: where each starts (seconds), and its frames.

    Raises:
        MediaError: the file is broken, or shorter than one clip.
    """
    step = spec.num_frames * max(1, PIECE_BYTES // (spec.num_frames * spec.height * spec.width * 3))
    expected = _expected(probe(path), spec)
    last = max(0, expected - spec.num_frames) // step * step  # the piece that reads on to the end
    for first in range(0, last + 1, step):
        clip = read_clip(
            path,
            num_frames=step if first < last else None,
            fps=spec.fps,
            start=first / spec.fps,
            size=(spec.height, spec.width),
        )
        if len(clip.frames) < spec.num_frames and not first:
            raise MediaError(_too_short(len(clip.frames), spec))
        for begin in range(0, len(clip.frames) - spec.num_frames + 1, spec.num_frames):
            yield (first + begin) / spec.fps, clip.frames[begin : begin + spec.num_frames]


def has_proportions(info: VideoInfo, spec: ClipSpec, among: Sequence[ClipSpec]) -> bool:
    """Say whether no clips of `among` have proportions nearer to a video's than those of `spec`, by ratio."""
    own = math.log(info.width / info.height)
    distances = [abs(math.log(each.width / each.height) - own) for each in (spec, *among)]
    return distances[0] <= min(distances) + 1e-9


# --- what would become of a video ------------------------------------------------------------------------------------


def _expected(info: VideoInfo, spec: ClipSpec) -> int:
    """Tell from the header alone how many frames a video has at the frame rate of the clips; 0 when it is silent."""
    return max(0, math.ceil((info.duration - 1e-3) * spec.fps)) if info.duration else 0  # headers round to 1 ms


def _count(path: Path, info: VideoInfo, spec: ClipSpec) -> int:
    """Count frames at the frame rate of the clips, believing the header only when the last clip is seen to be there.

    Raises:
        MediaError: there are too few for one clip, or they cannot be decoded.
    """
    expected = _expected(info, spec)
    used = expected // spec.num_frames * spec.num_frames
    if used:
        with suppress(MediaError):
            read_clip(path, num_frames=1, fps=spec.fps, start=(used - 1) / spec.fps)
            return expected
    num_frames = len(read_clip(path, fps=spec.fps, size=(spec.height, spec.width)).frames)
    if num_frames < spec.num_frames:
        raise MediaError(_too_short(num_frames, spec))
    return num_frames


def _too_short(num_frames: int, spec: ClipSpec) -> str:
    return f"too short: has {num_frames / spec.fps:.1f} s, needs {spec.seconds:.1f} s"


def _changes(info: VideoInfo, spec: ClipSpec, num_frames: int) -> tuple[str, ...]:
    notes = []
    if abs(info.fps - spec.fps) > 1e-3:
        notes.append(f"resampled {info.fps:g} -> {spec.fps:g} fps")
    num_clips, left = divmod(num_frames, spec.num_frames)
    if num_clips > 1:
        notes.append(f"cut into {num_clips} clips")
    if left:
        notes.append(f"last {left / spec.fps:.1f} s left out")
    if (info.width, info.height) != (spec.width, spec.height):
        wide, high = info.width * spec.height, info.height * spec.width  # equal when the aspect ratio is kept
        cropped = round(100 * (1 - min(wide, high) / max(wide, high)))
        crop = f", {cropped} % cropped" if cropped else ""
        notes.append(f"resized {info.width}x{info.height} -> {spec.width}x{spec.height}{crop}")
    return tuple(notes)


# --- captions --------------------------------------------------------------------------------------------------------


def _read_metadata(folder: Path) -> tuple[str, dict[str, str]]:
    """Return the name of the folder's metadata file and the captions in it, by file; nothing where there is none."""
    found = [folder / name for name in ("metadata.csv", "metadata.jsonl") if (folder / name).is_file()]
    if not found:
        return "", {}
    if len(found) > 1:
        raise DataError(f"{folder} has metadata.csv and metadata.jsonl; keep one of them")
    path = found[0]
    captions: dict[str, str] = {}
    for line, record in (_csv_records if path.suffix == ".csv" else _json_records)(path):
        file, caption = (_field(record, columns, path, line) for columns in (FILE_COLUMNS, CAPTION_COLUMNS))
        if _key(file) in captions:
            raise DataError(f"{path}, line {line}: {file} is named a second time")
        captions[_key(file)] = caption.strip()
    return path.name, captions


def _csv_records(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    reader = csv.DictReader(io.StringIO(_read_text(path), newline=""), strict=True)
    try:
        for record in reader:
            if None in record or None in record.values():
                raise DataError(
                    f"{path}, line {reader.line_num}: expected {len(reader.fieldnames or ())} cells; "
                    f"put a caption that has commas in double quotes"
                )
            yield reader.line_num, record
    except csv.Error as error:
        raise DataError(f"{path}, line {reader.line_num + 1}: {error}") from error  # of the record that went wrong


def _json_records(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    for line, text in enumerate(_read_text(path).split("\n"), start=1):
        if text.strip():
            try:
                record = json.loads(text)
            except (ValueError, RecursionError) as error:
                raise DataError(f"{path}, line {line}: not JSON ({error})") from error
            if not isinstance(record, dict):
                raise DataError(f'{path}, line {line}: expected an object such as {{"file_name": ..., "caption": ...}}')
            yield line, record


def _field(record: dict[str, Any], columns: tuple[str, ...], path: Path, line: int) -> str:
    value = next((record[column] for column in columns if column in record), None)
    if not isinstance(value, str):
        raise DataError(f"{path}, line {line}: expected text under {' or '.join(columns)}, found {', '.join(record)}")
    return value


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        line = path.read_bytes()[: error.start].count(b"\n") + 1
        raise DataError(f"{path}, line {line}: not UTF-8; save it as UTF-8") from error
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error


def _key(name: str) -> str:
    """Spell a relative path in one way: accents are composed differently from one file system to the next."""
    return unicodedata.normalize("NFC", Path(name).as_posix())
