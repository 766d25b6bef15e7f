"""A user's own folder of videos: which files there are, what each is called, and what would become of it.

A caption is looked for in a sidecar (`name.txt` beside `name.mp4`), then in `metadata.csv`, then in `metadata.jsonl`
at the top of the folder, and last the sub-folder's name serves as a class. A file that cannot be used never stops the
others: it is reported with the reason.
"""

import csv
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, NamedTuple

from reelflow.config import configuration
from reelflow.data.video import VIDEO_SUFFIXES, VideoInfo, probe
from reelflow.errors import ConfigError, DataError, MediaError, nearest

__all__ = [
    "METADATA_FILES",
    "ClipSpec",
    "FileReport",
    "digest_folder",
    "inspect_files",
    "inspect_folder",
    "list_videos",
]

METADATA_FILES = ("metadata.csv", "metadata.jsonl")
FILE_COLUMNS = ("file_name", "file")
CAPTION_COLUMNS = ("caption", "text", "prompt")


@configuration
class ClipSpec:
    """The clips a model is trained on."""

    num_frames: int
    height: int
    width: int
    fps: float  # hertz

    def __post_init__(self) -> None:
        for name in ("num_frames", "height", "width"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not 0 < self.fps < float("inf"):
            raise ConfigError(f"fps must be positive, got {self.fps}")

    def start_of(self, clip: int) -> float:
        """Return the second at which the clip of this number begins; clips of one file do not overlap."""
        return clip * self.num_frames / self.fps


class FileReport(NamedTuple):
    """What would become of one file."""

    name: str  # relative to the folder, with forward slashes
    num_clips: int  # 0: rejected
    reason: str  # why it is rejected, or empty
    notes: tuple[str, ...]  # what is done to it, in words
    caption: str
    caption_from: Literal["sidecar", "metadata", "folder", "nothing"]
    tokens: int | None  # of all its clips; None where the cost of a clip is not known
    info: VideoInfo | None  # None where the file cannot be read

    @property
    def accepted(self) -> bool:
        return self.num_clips > 0


class _Caption(NamedTuple):
    text: str
    source: Literal["sidecar", "metadata", "folder", "nothing"]
    file: str = ""  # the metadata file it stands in
    notes: tuple[str, ...] = ()


def list_videos(folder: Path) -> list[Path]:
    """Return the video files in `folder` and below, sorted by path; hidden files and folders are passed over.

    Raises:
        DataError: there is no such folder, or no video in it.
    """
    if not folder.is_dir():
        siblings = [p.name for p in folder.parent.iterdir() if p.is_dir()] if folder.parent.is_dir() else []
        hint = nearest(folder.name, siblings) if siblings else f"there is no {folder.parent} with folders either"
        raise DataError(f"{folder} is not a folder; {hint}")
    videos = sorted(
        path
        for path in folder.rglob("*")
        if path.suffix.lower() in VIDEO_SUFFIXES
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    )
    if not videos:
        raise DataError(f"no videos in {folder}; looked for {' '.join(VIDEO_SUFFIXES)}")
    return videos


def inspect_folder(
    folder: Path, spec: ClipSpec, *, tokens_per_clip: int | None = None, max_clips_per_file: int | None = None
) -> list[FileReport]:
    """Say for every video in `folder`, and every one its metadata names, what would become of it. See `inspect_files`.

    Raises:
        DataError: there is no such folder, no video in it, or its metadata cannot be read.
    """
    return list(inspect_files(folder, spec, tokens_per_clip=tokens_per_clip, max_clips_per_file=max_clips_per_file))


def inspect_files(
    folder: Path, spec: ClipSpec, *, tokens_per_clip: int | None = None, max_clips_per_file: int | None = None
) -> Iterator[FileReport]:
    """Yield a report for each file, at the cost of decoding one frame.

    A video gives as many clips as fit one after the other at the rate asked for, up to `max_clips_per_file`. What is
    broken further on shows only when it is decoded.
    """
    if max_clips_per_file is not None and max_clips_per_file < 1:
        raise ConfigError(f"max_clips_per_file must be at least 1, got {max_clips_per_file}")
    videos, metadata = list_videos(folder), _read_metadata(folder)
    for path in videos:
        name = path.relative_to(folder).as_posix()
        try:
            caption, info = _caption(path, folder, metadata), probe(path)
        except (MediaError, DataError) as error:
            yield FileReport(name, 0, str(error), (), "", "nothing", None, None)
            continue
        num_frames = info.num_frames_at(spec.fps)
        num_clips = min(num_frames // spec.num_frames, max_clips_per_file or num_frames)
        reason, notes = "", (*_changes(info, spec, num_clips), *caption.notes)
        if not num_clips:
            found = f"{info.duration:.2f} s hold {num_frames} frames at {spec.fps:g} fps"
            reason, notes = f"too short: {found}, {spec.num_frames} are needed", caption.notes
        tokens = None if tokens_per_clip is None else num_clips * tokens_per_clip
        yield FileReport(name, num_clips, reason, notes, caption.text, caption.source, tokens, info)
    present = {path.relative_to(folder).as_posix() for path in videos}
    for name, caption in metadata.items():
        if name not in present:
            fault = "is not a kind of video we know" if (folder / name).exists() else "does not exist"
            reason = f"named in {caption.file}, but {fault}"
            yield FileReport(name, 0, reason, (), caption.text, caption.source, None, None)


def digest_folder(folder: Path) -> str:
    """Return a hash of what clips and captions are made of: the videos' names, sizes and times, the captions' text.

    Raises:
        DataError: there is no such folder, or no video in it.
    """
    digest = hashlib.sha256()
    for path in list_videos(folder):
        about, sidecar = path.stat(), path.with_suffix(".txt")
        text = sidecar.read_bytes() if sidecar.is_file() else None
        digest.update(repr((path.relative_to(folder).as_posix(), about.st_size, about.st_mtime_ns, text)).encode())
    for path in (folder / name for name in METADATA_FILES):
        digest.update(repr((path.name, path.read_bytes() if path.is_file() else None)).encode())
    return digest.hexdigest()


def _changes(info: VideoInfo, spec: ClipSpec, num_clips: int) -> Iterator[str]:
    """Yield, in words, what is done to a video to make it clips."""
    if info.rotation:
        yield f"turned by {info.rotation} degrees"
    if abs(info.fps / spec.fps - 1) > 0.01 or info.variable_rate:
        repeats = ", repeating frames" if info.fps < 0.99 * spec.fps else ""
        varying = " (variable)" if info.variable_rate else ""
        yield f"resampled {info.fps:.4g}{varying} -> {spec.fps:g} fps{repeats}"
    if (info.height, info.width) != (spec.height, spec.width):
        scale = max(spec.height / info.height, spec.width / info.width)
        cropped = 1 - spec.height * spec.width / (info.height * info.width * scale * scale)
        verb = "enlarged" if scale > 1 else "resized"
        lost = f", {cropped:.0%} cropped" if cropped >= 0.005 else ""
        yield f"{verb} {info.width}x{info.height} -> {spec.width}x{spec.height}{lost}"
    unused = info.duration - spec.start_of(num_clips)
    if unused > 1 / spec.fps:
        yield f"cut to {num_clips} x {spec.num_frames} frames, the last {unused:.2f} s are not used"


def _caption(path: Path, folder: Path, metadata: dict[str, _Caption]) -> _Caption:
    """Find the caption of a video, and say where sources disagree.

    Raises:
        DataError: the sidecar is not UTF-8 text.
    """
    listed, sidecar = metadata.get(path.relative_to(folder).as_posix()), path.with_suffix(".txt")
    if sidecar.is_file():
        try:
            text = _one_line(sidecar.read_text(encoding="utf-8-sig"))
        except (UnicodeDecodeError, OSError) as error:
            raise DataError(f"{sidecar}: cannot be read as UTF-8 text") from error
        differs = listed is not None and listed.text != text
        notes = (f"caption from {sidecar.name}; {listed.file} says otherwise",) if listed and differs else ()
        caption = _Caption(text, "sidecar", notes=notes)
    elif listed:
        caption = listed
    elif path.parent != folder:
        caption = _Caption(_one_line(path.parent.name.replace("_", " ")), "folder")
    else:
        return _Caption("", "nothing", notes=("no caption",))
    return caption if caption.text else caption._replace(notes=(*caption.notes, "the caption is empty"))


def _read_metadata(folder: Path) -> dict[str, _Caption]:
    """Return the caption of each file that the metadata names.

    Raises:
        DataError: a metadata file is not CSV or JSON lines in UTF-8, or lacks a column.
    """
    found: dict[str, _Caption] = {}
    for path in (folder / name for name in METADATA_FILES):
        for line, row in _rows(path) if path.is_file() else ():
            name = next((row[column] for column in FILE_COLUMNS if column in row), None)
            text = next((row[column] for column in CAPTION_COLUMNS if column in row), None)
            if not isinstance(name, str) or not isinstance(text, str):
                wanted = f"{' or '.join(FILE_COLUMNS)}, and {' or '.join(CAPTION_COLUMNS)}"
                raise DataError(f"{path}: line {line} needs text in {wanted}; found {sorted(row)}")
            first = found.setdefault(Path(name).as_posix(), _Caption(_one_line(text), "metadata", path.name))
            if first.text != _one_line(text):
                twice = f"captioned twice; the first, from {first.file}, is taken"
                found[Path(name).as_posix()] = first._replace(notes=(twice,))
    return found


def _rows(path: Path) -> Iterator[tuple[int, dict[str, object]]]:
    """Yield (line number, columns) of a .csv or .jsonl file."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            if path.suffix == ".csv":
                reader = csv.DictReader(file)
                for row in reader:
                    yield reader.line_num, {str(column): value for column, value in row.items()}
                return
            for number, line in enumerate(file, start=1):
                if line.strip():
                    row = json.loads(line)
                    yield number, row if isinstance(row, dict) else {}
    except (UnicodeDecodeError, json.JSONDecodeError, csv.Error, OSError) as error:
        raise DataError(f"{path}: cannot be read: {error}") from error


def _one_line(text: str) -> str:
    return " ".join(text.split())
