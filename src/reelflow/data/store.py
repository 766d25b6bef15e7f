"""Samples on disk, ready to be drawn in any order: shards of stacked tensors, memory-mapped.

    store.json                what is inside, and the fingerprint of what made it; written last
    shard-00000.safetensors   the tensors of the first samples, stacked along a new first axis
    shard-00000.jsonl         what is known of each of them besides (a caption), one JSON value a line

A folder without `store.json` is unfinished and is never read. One class serves decoded clips and latents alike.
"""

import bisect
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Int64, Shaped
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from reelflow.config import configuration, from_dict, to_dict
from reelflow.data.folder import ClipSpec, FileReport, digest_folder, inspect_files
from reelflow.data.video import read_clip
from reelflow.errors import ConfigError, DataError, MediaError

__all__ = ["BuildReport", "Sample", "Skipped", "Store", "build_clip_store", "write_store"]

FORMAT = 1
INDEX = "store.json"
CLIPS = "clips"  # the key of decoded frames


class Sample(NamedTuple):
    """One entry of a store."""

    tensors: Mapping[str, Tensor]
    meta: Any = None  # any JSON value


class Skipped(NamedTuple):
    """Something that should have become a sample, and why it did not."""

    source: str
    reason: str


@configuration
class _Row:
    """One tensor of a sample."""

    dtype: str
    shape: tuple[int, ...]


@configuration
class _Shard:
    num_samples: int
    num_bytes: int


@configuration
class _Index:
    """The content of `store.json`."""

    format: int
    fingerprint: dict[str, Any]
    rows: dict[str, _Row]
    shards: tuple[_Shard, ...]
    skipped: tuple[tuple[str, str], ...]


def write_store(
    folder: str | os.PathLike[str],
    samples: Iterable[Sample | Skipped],
    *,
    fingerprint: Mapping[str, Any],
    num_samples_per_shard: int = 256,
) -> "Store":
    """Write samples as they come, one shard in memory at a time, and open the finished store.

    All samples have the same keys, shapes and dtypes. What comes as `Skipped` is listed in the store. `fingerprint`
    (JSON values) says what made the samples. An unfinished store in `folder` is written anew.

    Raises:
        ConfigError: `num_samples_per_shard` is not positive.
        DataError: the folder holds a store or anything else, samples differ or there are none, or the disk is full.
    """
    folder = Path(folder)
    if num_samples_per_shard < 1:
        raise ConfigError(f"num_samples_per_shard must be at least 1, got {num_samples_per_shard}")
    _clear_unfinished(folder)
    rows: dict[str, _Row] = {}
    stacks: dict[str, Tensor] = {}
    metas: list[Any] = []
    shards: list[_Shard] = []
    skipped: list[tuple[str, str]] = []

    def flush() -> None:
        shards.append(_write_shard(folder, len(shards), {k: v[: len(metas)] for k, v in stacks.items()}, metas))
        metas.clear()

    for sample in samples:
        if isinstance(sample, Skipped):
            skipped.append((sample.source, sample.reason))
            continue
        found = {k: _Row(str(v.dtype).removeprefix("torch."), tuple(v.shape)) for k, v in sample.tensors.items()}
        if not stacks:
            rows = found
            stacks = {
                k: v.new_empty((num_samples_per_shard, *v.shape), device="cpu") for k, v in sample.tensors.items()
            }
        if found != rows or not rows:
            number = len(metas) + sum(shard.num_samples for shard in shards)
            raise DataError(
                f"sample {number} holds {_describe(found)}, the first holds {_describe(rows)}; all must agree"
            )
        for key, tensor in sample.tensors.items():
            stacks[key][len(metas)] = tensor.detach()
        metas.append(sample.meta)
        if len(metas) == num_samples_per_shard:
            flush()
    if metas:
        flush()
    if not shards:
        why = f"; {len(skipped)} were skipped, the first: {skipped[0][0]}: {skipped[0][1]}" if skipped else ""
        raise DataError(f"{folder}: no samples to store{why}")
    index = _Index(FORMAT, dict(fingerprint), rows, tuple(shards), tuple(skipped))
    with _finished(folder / INDEX) as part:
        part.write_text(json.dumps(to_dict(index), indent=1) + "\n", encoding="utf-8")
    return Store.open(folder, fingerprint)


class Store:
    """A finished store, read through memory maps: opening costs little, and only what is drawn is read.

    `keys`, `fingerprint` and `skipped` say what is inside; `len()` counts the samples.
    """

    def __init__(self, folder: Path, index: _Index, shards: list[dict[str, Tensor]]) -> None:
        self.folder = folder
        self.fingerprint = index.fingerprint
        self.skipped = [Skipped(*entry) for entry in index.skipped]
        self._rows, self._shards = index.rows, shards
        self._ends = list(accumulate(shard.num_samples for shard in index.shards))
        self._metas = lru_cache(maxsize=None)(self._read_metas)

    @classmethod
    def open(cls, folder: str | os.PathLike[str], fingerprint: Mapping[str, Any] | None = None) -> "Store":
        """Open a store; with `fingerprint`, only one that was made by exactly this.

        Raises:
            DataError: there is no finished store, a file of it is damaged, or it was made by something else.
        """
        folder = Path(folder)
        index = _read_index(folder)
        if fingerprint is not None:
            _refuse_other(folder, index.fingerprint, json.loads(json.dumps(dict(fingerprint))))
        return cls(folder, index, [_map_shard(folder, k, shard, index.rows) for k, shard in enumerate(index.shards)])

    def __len__(self) -> int:
        return self._ends[-1]

    @property
    def keys(self) -> list[str]:
        return list(self._rows)

    def shape(self, key: str) -> tuple[int, ...]:
        """Return the shape of one sample's tensor."""
        return self._rows[key].shape

    def batch(self, key: str, indices: Int64[Tensor, " B"] | Sequence[int]) -> Shaped[Tensor, "B *shape"]:
        """Gather the tensors of these samples, in this order, as a copy.

        Raises:
            IndexError: an index is not in 0 ... len - 1.
        """
        wanted = indices.tolist() if isinstance(indices, Tensor) else indices
        rows = [self._shards[shard][key][row] for shard, row in map(self._locate, wanted)]
        return torch.stack(rows) if rows else self._shards[0][key].new_empty((0, *self.shape(key)))

    def meta(self, index: int) -> Any:
        """Return what was stored beside the tensors of this sample.

        Raises:
            IndexError: the index is not in 0 ... len - 1.
            DataError: the file is damaged.
        """
        shard, row = self._locate(index)
        return self._metas(shard)[row]

    def _locate(self, index: int) -> tuple[int, int]:
        if not 0 <= index < len(self):
            raise IndexError(f"{self.folder} holds samples 0 to {len(self) - 1}, asked for {index}")
        shard = bisect.bisect_right(self._ends, index)
        return shard, index - (self._ends[shard - 1] if shard else 0)

    def _read_metas(self, shard: int) -> list[Any]:
        path = _shard_path(self.folder, shard, "jsonl")
        try:
            metas = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        except (OSError, ValueError) as error:
            raise DataError(f"{path}: cannot be read: {error}") from error
        expected = self._ends[shard] - (self._ends[shard - 1] if shard else 0)
        if len(metas) != expected:
            raise DataError(f"{path}: damaged: {expected} lines expected, found {len(metas)}")
        return metas


class BuildReport(NamedTuple):
    """What became of a folder of videos."""

    store: Store
    num_clips: int
    skipped: list[Skipped]  # files, and windows of files, that gave no clip
    reused: bool  # the store was there already


def build_clip_store(
    folder: str | os.PathLike[str],
    spec: ClipSpec,
    out: str | os.PathLike[str],
    *,
    max_clips_per_file: int | None = None,
    on_file: Callable[[int, FileReport], None] | None = None,
) -> BuildReport:
    """Decode every usable clip in `folder` once into a store: key "clips", uint8 "T H W 3".

    `meta` is {"file", "start" (seconds), "caption", "caption_from"}. Files that cannot be used are skipped and listed.
    A finished store of the same files, captions and spec is reused. `on_file(number, report)` is called as each file's
    turn comes.

    Raises:
        DataError: there are no videos or none that can be used, or `out` holds a store made from something else.
    """
    folder, out = Path(folder), Path(out)
    fingerprint = {"clips": to_dict(spec) | {"max_clips_per_file": max_clips_per_file}, "files": digest_folder(folder)}
    reused = (out / INDEX).exists()
    if reused:
        store = Store.open(out, fingerprint)
    else:
        samples = _decode_folder(folder, spec, max_clips_per_file, on_file)
        store = write_store(out, samples, fingerprint=fingerprint)
    return BuildReport(store, len(store), store.skipped, reused)


def _decode_folder(
    folder: Path, spec: ClipSpec, max_clips_per_file: int | None, on_file: Callable[[int, FileReport], None] | None
) -> Iterator[Sample | Skipped]:
    for number, report in enumerate(inspect_files(folder, spec, max_clips_per_file=max_clips_per_file)):
        if on_file:
            on_file(number, report)
        if not report.accepted:
            yield Skipped(report.name, report.reason)
        for start in map(spec.start_of, range(report.num_clips)):
            try:
                clip = read_clip(
                    folder / report.name,
                    num_frames=spec.num_frames,
                    fps=spec.fps,
                    start=start,
                    size=(spec.height, spec.width),
                )
            except MediaError as error:
                yield Skipped(report.name, str(error))
                continue
            about = {
                "file": report.name,
                "start": start,
                "caption": report.caption,
                "caption_from": report.caption_from,
            }
            yield Sample({CLIPS: clip.frames}, about)


# ---- files ---------------------------------------------------------------------------------------------------------


def _shard_path(folder: Path, number: int, suffix: str) -> Path:
    return folder / f"shard-{number:05d}.{suffix}"


def _clear_unfinished(folder: Path) -> None:
    """Make `folder` an empty folder, provided that it holds nothing but an unfinished store."""
    if (folder / INDEX).exists():
        raise DataError(f"{folder} already holds a finished store; remove it, or write elsewhere")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        ours = re.compile(r"shard-\d{5,}\.(safetensors|jsonl)(\.part)?|store\.json\.part")
        for path in list(folder.iterdir()):
            if not ours.fullmatch(path.name):
                raise DataError(f"{folder} holds {path.name}, which is no part of a store; give an empty folder")
        for path in folder.iterdir():
            path.unlink()
    except OSError as error:
        raise DataError(f"cannot write to {folder}: {error.strerror}") from error


@contextmanager
def _finished(path: Path) -> Iterator[Path]:
    """Yield a name to write to, and put the file, safely on disk, under its own name."""
    part = path.with_name(path.name + ".part")
    try:
        yield part
        with part.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(part, path)
    except (OSError, SafetensorError) as error:
        raise DataError(f"cannot write {path}: {error}") from error
    finally:
        part.unlink(missing_ok=True)


def _write_shard(folder: Path, number: int, stacks: dict[str, Tensor], metas: list[Any]) -> _Shard:
    path = _shard_path(folder, number, "safetensors")
    with _finished(path) as part:
        save_file(stacks, part)
    with _finished(_shard_path(folder, number, "jsonl")) as part:
        part.write_text("".join(json.dumps(meta) + "\n" for meta in metas), encoding="utf-8")
    return _Shard(len(metas), path.stat().st_size)


def _read_index(folder: Path) -> _Index:
    path = folder / INDEX
    if not path.is_file():
        raise DataError(f"{folder} holds no finished store (there is no {INDEX}); build it, or build it anew")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(values, dict) and values.get("format") != FORMAT:
            raise DataError(f"{path}: format {values.get('format')!r}, this version reads {FORMAT}; build it anew")
        index = from_dict(_Index, values)
    except (OSError, ValueError, RecursionError, ConfigError) as error:
        raise DataError(f"{path}: damaged: {error}") from error
    if not index.rows or not index.shards or any(shard.num_samples < 1 for shard in index.shards):
        raise DataError(f"{path}: damaged: it names no samples")
    return index


def _map_shard(folder: Path, number: int, shard: _Shard, rows: dict[str, _Row]) -> dict[str, Tensor]:
    path = _shard_path(folder, number, "safetensors")
    try:
        size = path.stat().st_size
        if size != shard.num_bytes:
            raise DataError(f"{path}: damaged: {shard.num_bytes} bytes expected, found {size}")
        with safe_open(path, "pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not iterable itself)
    except (OSError, SafetensorError) as error:
        raise DataError(f"{path}: cannot be read: {error}") from error
    expected = {key: _Row(row.dtype, (shard.num_samples, *row.shape)) for key, row in rows.items()}
    found = {k: _Row(str(v.dtype).removeprefix("torch."), tuple(v.shape)) for k, v in tensors.items()}
    if found != expected:
        raise DataError(f"{path}: damaged: {_describe(expected)} expected, found {_describe(found)}")
    return tensors


def _refuse_other(folder: Path, stored: Any, asked: Any, path: str = "") -> None:
    """Raise for the first entry in which two fingerprints differ."""
    if isinstance(stored, dict) and isinstance(asked, dict):
        for key in sorted(stored.keys() | asked.keys()):
            _refuse_other(folder, stored.get(key), asked.get(key), f"{path}.{key}" if path else key)
    elif stored != asked:
        raise DataError(
            f"{folder} was made by something else: its {path} is {json.dumps(stored)}, asked for {json.dumps(asked)}; "
            "remove it to build it anew, or use another folder"
        )


def _describe(rows: Mapping[str, _Row]) -> str:
    return ", ".join(f"{key} {row.dtype} {row.shape}" for key, row in sorted(rows.items())) or "nothing"
