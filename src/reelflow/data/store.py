"""Samples on disk: tensors of one shape, decoded or encoded once and read in any order ever after; `Stores` join shapes.

    STORE/shard-00000.safetensors   rows 0 ... stacked key by key, and what is known of each row
    STORE/store.json                what made the store, its keys and its shards; written last

A store without `store.json` was never finished and may be written again. Shards are memory-mapped: reading a row touches
that row alone. The fingerprint says what the rows were made from, so that stale ones are refused, not trained on.
"""

import hashlib
import json
import os
from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate, zip_longest
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Int64
from safetensors import SafetensorError, safe_open
from torch import Tensor

from reelflow.config import configuration, from_dict, to_dict
from reelflow.data.folder import ClipSpec, has_proportions, list_videos, read_captions, read_windows
from reelflow.data.video import probe
from reelflow.errors import ConfigError, DataError, MediaError, nearest
from reelflow.models.weights import write_tensors

__all__ = [
    "BuildReport",
    "Store",
    "Stores",
    "as_json",
    "build_clip_store",
    "described",
    "difference",
    "file_digest",
    "sync",
    "write_store",
]

INDEX = "store.json"
SHARD_BYTES = 128 << 20  # what a shard of decoded clips may take in memory while it fills


@configuration
class _Key:
    shape: tuple[int, ...]  # of one row
    dtype: str


@configuration
class _Index:
    """The contents of `store.json`."""

    format: Literal[1]
    fingerprint: dict[str, Any]
    keys: dict[str, _Key]
    num_rows: int
    samples_per_shard: int
    shard_bytes: tuple[int, ...]  # the size of each shard's file
    rejected: tuple[str, ...]  # sources that gave no sample, and why

    def __post_init__(self) -> None:
        if self.num_rows < 1 or self.samples_per_shard < 1 or not self.keys:
            raise ConfigError("a store has at least one key and one row")
        if len(self.shard_bytes) != -(-self.num_rows // self.samples_per_shard):
            raise ConfigError(f"{len(self.shard_bytes)} shards cannot hold {self.num_rows} rows")

    def rows_of(self, shard: int) -> int:
        return min(self.samples_per_shard, self.num_rows - shard * self.samples_per_shard)


def write_store(
    folder: Path,
    samples: Iterable[dict[str, Tensor]],
    *,
    fingerprint: dict[str, Any],
    meta: Iterable[dict[str, Any]] | None = None,
    samples_per_shard: int = 512,
) -> None:
    """Write `samples` as the rows of a new store, holding at most one shard in memory.

    `fingerprint` (JSON values) says what the samples were made from; `meta` gives one JSON object per sample.

    Raises:
        DataError: the folder holds a finished store or something else, samples differ in keys, shapes or dtypes, there
            are none, `meta` is not of their number, or the disk is full.
    """
    writer = _Writer(folder, fingerprint, samples_per_shard)
    if meta is None:
        for sample in samples:
            writer.add(sample, {})
    else:
        for sample, known in zip_longest(samples, meta):
            if sample is None or known is None:
                more, fewer = ("samples", "meta") if known is None else ("meta", "samples")
                raise DataError(
                    f"cannot write {folder}: more {more} than {fewer} (there are {writer.num_rows} of those)"
                )
            writer.add(sample, known)
    writer.finish()


class Store:
    """A finished store; rows are read in any order, also from several threads."""

    def __init__(self, folder: Path, index: _Index) -> None:
        self.folder = folder
        self._index = index
        self._shards: dict[int, _Shard] = {}

    @classmethod
    def open(cls, folder: Path, *, fingerprint: dict[str, Any] | None = None) -> "Store":
        """Open a store; with `fingerprint`, only one that was made from exactly that.

        Raises:
            DataError: it is missing, unfinished or damaged, or was made from something else (the difference is named).
        """
        path = folder / INDEX
        try:
            index = from_dict(_Index, json.loads(path.read_bytes()))
        except FileNotFoundError:
            state = "was never finished" if folder.is_dir() else "does not exist"
            raise DataError(f"the store {folder} {state} (no {INDEX}); write it again") from None
        except (OSError, ValueError, RecursionError, ConfigError) as error:
            raise DataError(f"{path} cannot be read: {error}; remove {folder} and write it again") from error
        for shard, expected in enumerate(index.shard_bytes):
            file = _shard_path(folder, shard)
            found = file.stat().st_size if file.is_file() else 0
            if found != expected:
                raise DataError(f"{file} has {found:,} of {expected:,} bytes; remove {folder} and write it again")
        if fingerprint is not None:
            differs = difference(index.fingerprint, as_json(fingerprint))
            if differs:
                raise DataError(
                    f"{folder} was made from something else: {differs}; remove it to make it anew, or go back to what made it"
                )
        return cls(folder, index)

    def __len__(self) -> int:
        return self._index.num_rows

    @property
    def fingerprint(self) -> dict[str, Any]:
        """What the rows were made from."""
        return self._index.fingerprint

    @property
    def keys(self) -> tuple[str, ...]:
        """The names of the tensors that every row has."""
        return tuple(self._index.keys)

    @property
    def rejected(self) -> tuple[str, ...]:
        """Sources that gave no row, one "name: why" each."""
        return self._index.rejected

    def shape(self, key: str) -> tuple[int, ...]:
        """Return the shape of every row.

        Raises:
            DataError: there is no such key.
        """
        self._check(key)
        return self._index.keys[key].shape

    def batch(self, key: str, rows: Int64[Tensor, " N"]) -> Tensor:
        """Gather rows, in the order asked and as often as asked: N, then the shape of one row.

        Raises:
            DataError: there is no such key or row, or a shard is damaged.
        """
        self._check(key)
        if not len(rows):
            return self._place(0)[0].tensors[key][:0].clone()
        places = [self._place(row) for row in rows.tolist()]
        return torch.stack([shard.tensors[key][offset] for shard, offset in places])

    def meta(self, row: int) -> dict[str, Any]:
        """Return what was noted of a row.

        Raises:
            DataError: there is no such row, or its shard is damaged.
        """
        shard, offset = self._place(row)
        return shard.meta[offset]

    def _check(self, key: str) -> None:
        if key not in self._index.keys:
            raise DataError(f"{self.folder} has no {key!r}; {nearest(key, self.keys)}")

    def _place(self, row: int) -> tuple["_Shard", int]:
        if not 0 <= row < len(self):
            raise DataError(f"{self.folder} has rows 0 to {len(self) - 1}, not {row}")
        number, offset = divmod(row, self._index.samples_per_shard)
        if number not in self._shards:
            self._shards[number] = _Shard.open(_shard_path(self.folder, number), self._index, number)
        return self._shards[number], offset


class Stores:
    """Several stores as one, the rows of each after those of the one before; each may have a shape of its own.

    Raises:
        DataError: there is no store, or two differ in their keys.
    """

    def __init__(self, stores: Sequence[Store]) -> None:
        if not stores:
            raise DataError("there are no stores to read")
        for store in stores[1:]:
            if set(store.keys) != set(stores[0].keys):
                raise DataError(
                    f"{store.folder} has {', '.join(sorted(store.keys))}, and {stores[0].folder} "
                    f"{', '.join(sorted(stores[0].keys))}; stores that are read as one have the same keys"
                )
        self.stores = tuple(stores)
        self._starts = [0, *accumulate(map(len, stores))]

    def __len__(self) -> int:
        return self._starts[-1]

    def batch(self, key: str, row: int) -> Tensor:
        """Return one row: 1, then its shape.

        Raises:
            DataError: there is no such key or row, or a shard is damaged.
        """
        store, own = self.place(row)
        return store.batch(key, torch.tensor([own]))

    def shape(self, key: str, row: int) -> tuple[int, ...]:
        """Return the shape of one row, which no shard is opened for.

        Raises:
            DataError: there is no such key or row.
        """
        return self.place(row)[0].shape(key)

    def meta(self, row: int) -> dict[str, Any]:
        """Return what was noted of a row.

        Raises:
            DataError: there is no such row, or its shard is damaged.
        """
        store, own = self.place(row)
        return store.meta(own)

    def place(self, row: int) -> tuple[Store, int]:
        """Return the store of a row, and which row it is there.

        Raises:
            DataError: there is no such row.
        """
        if not 0 <= row < len(self):
            raise DataError(f"the stores have rows 0 to {len(self) - 1}, not {row}")
        number = bisect_right(self._starts, row) - 1
        return self.stores[number], row - self._starts[number]


@dataclass(frozen=True)
class _Shard:
    tensors: dict[str, Tensor]  # memory-mapped
    meta: list[dict[str, Any]]

    @classmethod
    def open(cls, path: Path, index: _Index, number: int) -> "_Shard":
        rows = index.rows_of(number)
        try:
            with safe_open(path, framework="pt") as file:
                tensors = {key: file.get_tensor(key) for key in index.keys}
                meta = json.loads(file.metadata()["meta"])
        except (OSError, SafetensorError, ValueError, TypeError, KeyError, RuntimeError, RecursionError) as error:
            raise DataError(f"{path} is damaged ({error}); remove {path.parent} and write it again") from error
        found = {key: (tuple(value.shape), _name(value.dtype)) for key, value in tensors.items()}
        expected = {key: ((rows, *one.shape), one.dtype) for key, one in index.keys.items()}
        well_noted = isinstance(meta, list) and len(meta) == rows and all(isinstance(known, dict) for known in meta)
        if found != expected or not well_noted:
            raise DataError(f"{path} does not hold what {INDEX} says; remove {path.parent} and write it again")
        return cls(tensors, meta)


class _Writer:
    """Fills one shard after the other; `finish` makes the folder a store."""

    def __init__(self, folder: Path, fingerprint: dict[str, Any], samples_per_shard: int) -> None:
        if samples_per_shard < 1:
            raise DataError(f"samples_per_shard must be at least 1, got {samples_per_shard}")
        self.folder, self.fingerprint, self.samples_per_shard = folder, as_json(fingerprint), samples_per_shard
        self.num_rows = 0
        self.shard: dict[str, Tensor] = {}  # rows of the shard that is being filled
        self.meta: list[dict[str, Any]] = []
        self.shard_bytes: list[int] = []
        self._claim()

    def _claim(self) -> None:
        if (self.folder / INDEX).exists():
            raise DataError(f"{self.folder} holds a finished store; remove it first, or choose another folder")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            left = sorted(self.folder.iterdir())
        except OSError as error:
            raise DataError(f"cannot write a store to {self.folder}: {error.strerror}") from error
        for path in left:
            if not (path.match("shard-*.safetensors") or path.name == f".{INDEX}.partial"):
                raise DataError(f"{self.folder} holds {path.name}, which is no part of a store; choose another folder")
        for path in left:  # of a store that was never finished: nothing is lost
            path.unlink()

    def add(self, sample: dict[str, Tensor], meta: dict[str, Any]) -> None:
        if not self.num_rows:
            if not sample:
                raise DataError(f"cannot write {self.folder}: sample 0 has no tensors")
            self.shard = {k: torch.empty(self.samples_per_shard, *v.shape, dtype=v.dtype) for k, v in sample.items()}
        if described(sample) != (first := described({key: rows[0] for key, rows in self.shard.items()})):
            raise DataError(
                f"samples must be alike: sample {self.num_rows} is {described(sample)}, those before it are {first}"
            )
        for key, value in sample.items():
            self.shard[key][len(self.meta)] = value
        self.meta.append(meta)
        self.num_rows += 1
        if len(self.meta) == self.samples_per_shard:
            self._flush()

    def _flush(self) -> None:
        path = _shard_path(self.folder, len(self.shard_bytes))
        rows = {key: value[: len(self.meta)] for key, value in self.shard.items()}
        try:
            write_tensors(rows, path, metadata={"meta": json.dumps(self.meta)})
            sync(path)
        except (OSError, SafetensorError) as error:
            raise DataError(f"cannot write {path}: {error}") from error
        self.shard_bytes.append(path.stat().st_size)
        self.meta = []

    def finish(self, *, rejected: tuple[str, ...] = ()) -> None:
        if not self.num_rows:
            raise DataError(f"cannot write {self.folder}: there are no samples")
        keys = {key: _Key(tuple(rows.shape[1:]), _name(rows.dtype)) for key, rows in self.shard.items()}
        if self.meta:
            self._flush()
        index = _Index(
            1, self.fingerprint, keys, self.num_rows, self.samples_per_shard, tuple(self.shard_bytes), rejected
        )
        partial = self.folder / f".{INDEX}.partial"
        try:
            partial.write_text(json.dumps(to_dict(index), indent=1))
            sync(partial)
            os.replace(partial, self.folder / INDEX)
        except OSError as error:
            raise DataError(f"cannot write {self.folder / INDEX}: {error.strerror}") from error


# --- clips -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class BuildReport:
    """What became of a folder of videos."""

    num_clips: int
    num_files: int  # accepted or not
    rejected: tuple[str, ...]  # one "name: why" each
    reused: bool  # the store was there already


def build_clip_store(
    videos: Path,
    spec: ClipSpec,
    out: Path,
    *,
    among: Sequence[ClipSpec] = (),
    on_file: Callable[[int, int], None] | None = None,
) -> BuildReport:
    """Decode every clip of the videos in a folder once, into a store with the key "frames" (uint8, T H W 3).

    Each row's meta has "caption", "file" (relative to `videos`) and "start" (seconds). A file that is broken or too
    short is skipped and listed; a video whose proportions are nearer to those of another clip of `among` is not for this
    store. A finished store of the same videos, captions and spec is used as it is; videos are
    told apart by name, size, and the bytes at their beginning and end. `on_file(done, total)` follows along.

    Raises:
        DataError: there is no clip at all, or `out` is a store of something else.
    """
    paths = list_videos(videos)
    captions = read_captions(videos, paths)
    names = [path.relative_to(videos).as_posix() for path in paths]
    digest = hashlib.sha256()
    for path, name in zip(paths, names, strict=True):
        digest.update(
            os.fsencode(name) + b"\0" + file_digest(path) + captions[path].text.encode("utf-8", "surrogatepass") + b"\0"
        )
    fingerprint: dict[str, Any] = {"clip": to_dict(spec), "videos": {"files": len(paths), "digest": digest.hexdigest()}}
    if among:
        fingerprint["among"] = [to_dict(each) for each in among]
    if (out / INDEX).exists():
        store = Store.open(out, fingerprint=fingerprint)
        return BuildReport(len(store), len(paths), store.rejected, reused=True)

    clip_bytes = spec.num_frames * spec.height * spec.width * 3
    writer = _Writer(out, fingerprint, samples_per_shard=max(1, min(512, SHARD_BYTES // clip_bytes)))
    rejected = []
    for done, (path, name) in enumerate(zip(paths, names, strict=True)):
        before = writer.num_rows
        try:
            if among and not has_proportions(probe(path), spec, among):
                continue
            for start, frames in read_windows(path, spec):
                writer.add({"frames": frames}, {"caption": captions[path].text, "file": name, "start": start})
        except MediaError as error:
            kept = f" (clips before that, {writer.num_rows - before}, are kept)" if writer.num_rows > before else ""
            rejected.append(f"{name}: " + str(error).removeprefix(f"{path}: ") + kept)
        if on_file:
            on_file(done + 1, len(paths))
    if not writer.num_rows:
        more = f"; and {len(rejected) - 3} more" if len(rejected) > 3 else ""
        raise DataError(f"no clip in the {len(paths)} videos of {videos}: {'; '.join(rejected[:3])}{more}")
    writer.finish(rejected=tuple(rejected))
    return BuildReport(writer.num_rows, len(paths), tuple(rejected), reused=False)


def file_digest(path: Path) -> bytes:
    """Hash a file's size and its first and last 64 KiB: gigabytes of video are not read just to recognise them."""
    edge = 1 << 16
    with path.open("rb") as file:
        head, size = file.read(edge), os.fstat(file.fileno()).st_size
        file.seek(max(len(head), size - edge))
        return hashlib.sha256(size.to_bytes(8, "big") + head + file.read(edge)).digest()


# --- small parts -----------------------------------------------------------------------------------------------------


def _shard_path(folder: Path, number: int) -> Path:
    return folder / f"shard-{number:05d}.safetensors"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def described(sample: dict[str, Tensor]) -> str:
    """Say which tensors there are, of which types and shapes."""
    return ", ".join(f"{key} {_name(value.dtype)}{list(value.shape)}" for key, value in sorted(sample.items()))


def as_json(values: dict[str, Any]) -> dict[str, Any]:
    """Return what comes back when values are written as JSON: lists for tuples, text for the names of entries."""
    return json.loads(json.dumps(values))


def difference(before: Any, now: Any, path: str = "") -> str | None:
    """Name the first entry in which two fingerprints differ, and both values."""
    if isinstance(before, dict) and isinstance(now, dict):
        differences = (
            difference(before.get(name), now.get(name), f"{path}.{name}".lstrip(".")) for name in {**before, **now}
        )
        return next(filter(None, differences), None)
    return None if before == now else f"{path} was {_short(before)}, now {_short(now)}"


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 24 else f"{text[:20]}..."


def sync(path: Path) -> None:
    """Wait until a file or folder is on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
