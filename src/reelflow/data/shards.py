"""Samples in shards: tar files that WebDataset reads too, written once, read in any order, here or far away.

    SET/shard-00000.tar    KEY.safetensors, KEY.json and perhaps more (KEY.mp4), one sample after the other
    SET/shard-00000.json   where each sample lies in the tar, and the SHA-256 of its bytes
    SET/index.json         what made the set, its shards, their sizes and hashes, and the shapes of the tensors of every
                           sample; replaced after each shard

A sample is one range of bytes, so it can be read and checked without the rest of its shard. A shard that `index.json`
does not name is not there: a writer that was killed loses the shard it was filling and nothing else.
"""

import hashlib
import json
import math
import os
import re
import tarfile
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Set
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import accumulate, groupby
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple, TypeVar

import torch
from fsspec.core import url_to_fs
from jaxtyping import Int64
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from reelflow.config import configuration, from_dict, to_dict
from reelflow.data.remote import Cache, CacheFolder, fetch
from reelflow.data.store import Store, as_json, described, difference, sync
from reelflow.errors import ConfigError, DataError

__all__ = [
    "Sample",
    "Shapes",
    "ShardSet",
    "ShardWriter",
    "ShardsReport",
    "StoreSamples",
    "inspect_shards",
    "shards_from_store",
]

INDEX = "index.json"
BLOCK = 512  # of a tar file
END = bytes(2 * BLOCK)
KEY = re.compile(r"[A-Za-z0-9_-]{1,80}")  # WebDataset ends a key at the first dot
RUN = re.compile(r"(\d{1,9})(?:\*(\d{1,9}))?")
SUFFIX = re.compile(r"[a-z0-9]{1,15}")
LISTINGS = 64  # kept in memory, of the shards read last

T = TypeVar("T")


@dataclass(frozen=True)
class Sample:
    """Named tensors, what is known of them (a JSON object), and files that belong to them, by suffix ("mp4").

    `key` is up to 80 letters, digits, hyphens and underscores, and tells the sample from all others of its set.
    """

    key: str
    tensors: dict[str, Tensor]
    meta: dict[str, Any] = field(default_factory=dict)
    files: dict[str, bytes] = field(default_factory=dict)


class Shapes(NamedTuple):
    """The shapes that a tensor has in a set, in order, and which of them it has in each sample."""

    found: tuple[tuple[int, ...], ...]
    which: Int64[Tensor, " N"]


@configuration
class _Place:
    """One sample in a tar: its bytes, headers and all, and where each member's contents begin and how long they are."""

    key: str
    start: int
    size: int
    sha256: str
    members: dict[str, tuple[int, int]]  # counted from `start`


class _Filled(NamedTuple):
    """A sample in the shard at hand."""

    place: _Place
    shapes: tuple[tuple[str, tuple[int, ...]], ...]
    digest: Any  # of the tar up to the sample's end


@configuration
class _Listing:
    samples: tuple[_Place, ...]


@configuration
class _Shard:
    name: str  # without suffix
    num_samples: int
    num_bytes: int
    sha256: str  # of the tar
    listing_sha256: str
    shapes: tuple[dict[str, tuple[int, ...]], ...]  # of the tensors: the kinds of sample there are
    kinds: str  # of the samples in turn; "0*512 1 0*3": 512 of the first kind, one of the second, three of the first


@configuration
class _Index:
    format: Literal[2]
    fingerprint: dict[str, Any]
    finished: bool
    shards: tuple[_Shard, ...] = ()
    rejected: tuple[str, ...] = ()  # sources that gave no sample, and why


class ShardWriter:
    """Writes samples to a new set, or goes on with one of the same fingerprint, unfinished or finished.

    A shard ends when it has `shard_bytes`, or by `flush()`, and is safe from then on. Left without `finish()`, by an
    exception too, the set keeps every whole sample and waits to be continued; nothing reads it before it is finished.
    `fingerprint` (JSON values) says what the samples are made from.

    Raises:
        ConfigError: `shard_bytes` is below 1.
        DataError: the folder holds a set of something else, a damaged one, or shards of none; or another process is
            writing to it.
    """

    def __init__(self, folder: Path, *, fingerprint: dict[str, Any], shard_bytes: int = 256 << 20) -> None:
        if shard_bytes < 1:
            raise ConfigError(f"shard_bytes must be at least 1, got {shard_bytes}")
        self.folder, self.shard_bytes = folder, shard_bytes
        self._filled: list[_Filled] = []  # the shard at hand
        self._tar: BinaryIO | None = None
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._lock = _locked(folder)
        except OSError as error:
            raise DataError(f"cannot write shards to {folder}: {error.strerror}") from error
        try:
            self._index = self._claim(as_json(fingerprint))
        except BaseException as error:
            self._lock.close()
            if isinstance(error, OSError):
                raise DataError(f"cannot write shards to {folder}: {error.strerror}") from error
            raise

    def _claim(self, fingerprint: dict[str, Any]) -> _Index:
        self._keys: set[str] = set()
        ours = [path for path in self.folder.iterdir() if re.fullmatch(r"shard-\d{5,}\.(tar|json)", path.name)]
        for path in self.folder.glob(".*.partial"):
            path.unlink()
        if not (self.folder / INDEX).exists():
            if ours:
                raise DataError(f"{self.folder} holds {ours[0].name} but no {INDEX}; choose another folder")
            index = _Index(2, fingerprint, finished=False)
            self._replace({INDEX: _json(index)})
            return index
        index = _parsed(_Index, (self.folder / INDEX).read_bytes(), str(self.folder / INDEX))
        if differs := difference(index.fingerprint, fingerprint):
            raise DataError(
                f"{self.folder} was made from something else: {differs}; go on with what made it, or choose another folder"
            )
        for shard in index.shards:
            tar, listing = (self.folder / f"{shard.name}{suffix}" for suffix in (".tar", ".json"))
            found = tar.stat().st_size if tar.is_file() else 0
            if found != shard.num_bytes or not listing.is_file():
                raise DataError(
                    f"{self.folder} is not whole: {tar.name} has {found:,} of {shard.num_bytes:,} bytes, or {listing.name} "
                    f"is missing; restore them, or choose another folder"
                )
            self._keys.update(place.key for place in _read_listing(listing.read_bytes(), shard, str(listing)).samples)
        named = {shard.name for shard in index.shards}
        for path in ours:
            if path.stem not in named:  # written, but its writer was killed before the index knew
                path.unlink()
        return index

    def __len__(self) -> int:
        return len(self._keys)

    def __contains__(self, key: str) -> bool:
        return key in self._keys

    @property
    def keys(self) -> Set[str]:
        """The keys of all samples in the set, those of the shard at hand among them."""
        return self._keys

    def add(self, sample: Sample) -> None:
        """Append a sample.

        Raises:
            DataError: its key is there already or no key, it cannot be written as safetensors and JSON, a value is not
                finite, or the disk is full.
        """
        if sample.key in self._keys:
            raise DataError(f"{self.folder} has a sample {sample.key!r} already")
        data, members = _packed(sample)
        start, digest = self._end()
        digest.update(data)
        try:
            if self._tar is None:
                self._tar = self._partial(f"{self._next()}.tar").open("wb", buffering=0)
            _write(self._tar, start, data)
        except OSError as error:
            raise DataError(f"cannot write {self.folder / self._next()}.tar: {error.strerror}") from error
        place = _Place(sample.key, start, len(data), hashlib.sha256(data).hexdigest(), members)
        shapes = tuple((name, tuple(x.shape)) for name, x in sorted(sample.tensors.items()))
        self._filled.append(_Filled(place, shapes, digest))  # at once: an interrupted `add` has added all or nothing
        self._keys.add(sample.key)
        if start + len(data) >= self.shard_bytes:
            self.flush()

    def flush(self) -> None:
        """End the shard at hand, if it has a sample: all that was added is safe from here on.

        Raises:
            DataError: the disk is full.
        """
        if not self._filled:
            return
        assert self._tar is not None
        name, (size, digest) = self._next(), self._end()
        digest.update(END)
        listing = _json(_Listing(tuple(filled.place for filled in self._filled)))
        kinds: dict[tuple[tuple[str, tuple[int, ...]], ...], int] = {}
        each = [kinds.setdefault(filled.shapes, len(kinds)) for filled in self._filled]
        shard = _Shard(
            name=name,
            num_samples=len(self._filled),
            num_bytes=size + len(END),
            sha256=digest.hexdigest(),
            listing_sha256=hashlib.sha256(listing).hexdigest(),
            shapes=tuple(dict(kind) for kind in kinds),
            kinds=_runs(each),
        )
        index = replace(self._index, finished=False, shards=(*self._index.shards, shard))
        try:
            _write(self._tar, size, END)
            self._tar.truncate(size + len(END))
            os.fsync(self._tar.fileno())
            self._replace({f"{name}.json": listing, INDEX: _json(index)}, tar=f"{name}.tar")
        except OSError as error:
            raise DataError(f"cannot write {self.folder / name}.tar: {error.strerror}") from error
        self._index = index
        self._filled = []
        self._tar.close()
        self._tar = None

    def finish(self, *, rejected: tuple[str, ...] = ()) -> None:
        """Make the set one that can be read; `rejected` names sources that gave no sample, and why.

        Raises:
            DataError: there are no samples, or the disk is full.
        """
        self.flush()
        if not self._index.shards:
            raise DataError(f"cannot finish {self.folder}: there are no samples")
        self._index = replace(self._index, finished=True, rejected=rejected)
        try:
            self._replace({INDEX: _json(self._index)})
        except OSError as error:
            raise DataError(f"cannot write {self.folder / INDEX}: {error.strerror}") from error

    def close(self) -> None:
        """End the shard at hand and let others write; called on leaving `with`."""
        try:
            self.flush()
        finally:
            if self._tar is not None:
                self._tar.close()
                self._tar = None
                self._partial(f"{self._next()}.tar").unlink(missing_ok=True)
            self._lock.close()

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _next(self) -> str:
        return f"shard-{1 + max((int(shard.name[6:]) for shard in self._index.shards), default=-1):05d}"

    def _end(self) -> tuple[int, Any]:
        """Return the size of the shard at hand, and a hash of it to go on with."""
        if not self._filled:
            return 0, hashlib.sha256()
        place, _, digest = self._filled[-1]
        return place.start + place.size, digest.copy()

    def _partial(self, name: str) -> Path:
        return self.folder / f".{name}.partial"

    def _replace(self, files: dict[str, bytes], *, tar: str | None = None) -> None:
        """Put whole files in place, the index last; nothing moves before all of them are on the disk."""
        for name, data in files.items():
            with self._partial(name).open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        for name in ([tar] if tar else []) + [name for name in files if name != INDEX]:
            os.replace(self._partial(name), self.folder / name)
        sync(self.folder)
        os.replace(self._partial(INDEX), self.folder / INDEX)
        sync(self.folder)


class ShardSet:
    """A finished set of shards; samples are read by number, also from several threads."""

    def __init__(self, url: str, index: _Index, index_sha256: str, cache: Cache | None) -> None:
        self.name, self._index, self.identity = url, index, index_sha256
        self._fs, self._root = url_to_fs(url)
        self._starts = [0, *accumulate(shard.num_samples for shard in index.shards)]
        self._listing = lru_cache(maxsize=LISTINGS)(self._load_listing)
        self._cached = None if cache is None else CacheFolder(cache, max(shard.num_bytes for shard in index.shards))

    @classmethod
    def open(
        cls, url: str | Path, *, fingerprint: dict[str, Any] | None = None, cache: Cache | None = None
    ) -> "ShardSet":
        """Open a folder, or any URL that fsspec has a driver for; with `fingerprint`, only a set made from exactly that.

        Without a cache a sample is fetched alone, with one its shard is.

        Raises:
            ConfigError: there is no driver for the URL, or the cache cannot hold the largest shard.
            DataError: the set is missing, unfinished or damaged, or was made from something else (the difference is named).
        """
        url = str(url).rstrip("/")
        try:
            fs, root = url_to_fs(url)
        except (ImportError, ValueError) as error:
            raise ConfigError(f"cannot read {url}: {error}") from error
        data = fetch(fs, f"{root}/{INDEX}", f"{url}/{INDEX}")
        index = _parsed(_Index, data, f"{url}/{INDEX}")
        if not index.finished or not index.shards:
            raise DataError(f"the shards in {url} were never finished; go on writing them")
        differs = None if fingerprint is None else difference(index.fingerprint, as_json(fingerprint))
        if differs:
            raise DataError(f"{url} was made from something else: {differs}")
        return cls(url, index, hashlib.sha256(data).hexdigest(), cache)

    def __len__(self) -> int:
        return self._starts[-1]

    @property
    def groups(self) -> tuple[int, ...]:
        """How many samples each shard has."""
        return tuple(shard.num_samples for shard in self._index.shards)

    @property
    def num_bytes(self) -> int:
        """The size of all shards together."""
        return sum(shard.num_bytes for shard in self._index.shards)

    @property
    def fingerprint(self) -> dict[str, Any]:
        """What the samples were made from."""
        return self._index.fingerprint

    @property
    def rejected(self) -> tuple[str, ...]:
        """Sources that gave no sample, one "name: why" each."""
        return self._index.rejected

    def keys(self) -> Iterator[str]:
        """Yield the key of every sample, by number.

        Raises:
            DataError: a shard's listing is damaged.
        """
        for number in range(len(self._index.shards)):
            yield from (place.key for place in self._listing(number).samples)

    def shapes(self, name: str) -> Shapes:
        """Return the shapes of a tensor, which the index knows.

        Raises:
            DataError: a sample has no such tensor, or the index is damaged.
        """
        found = {kind[name] for shard in self._index.shards for kind in shard.shapes if name in kind}
        order = {shape: number for number, shape in enumerate(sorted(found))}
        parts = []
        for shard in self._index.shards:
            missing = next((kind for kind in shard.shapes if name not in kind), None)
            if missing is not None:
                raise DataError(f"{self.name}/{shard.name}.tar has samples without {name!r}, of {', '.join(missing)}")
            own = torch.tensor([order[kind[name]] for kind in shard.shapes])
            parts.append(own[_kinds_of(shard, f"{self.name}/{INDEX}")])
        return Shapes(tuple(order), torch.cat(parts))

    def read(self, number: int) -> Sample:
        """Read and check one sample.

        Raises:
            DataError: there is no such sample, or it is damaged; the message names the shard and the key.
            ConfigError: the disk of the cache is full.
        """
        if not 0 <= number < len(self):
            raise DataError(f"{self.name} has samples 0 to {len(self) - 1}, not {number}")
        shard_number = bisect_right(self._starts, number) - 1
        shard = self._index.shards[shard_number]
        place = self._listing(shard_number).samples[number - self._starts[shard_number]]
        what = f"{self.name}/{shard.name}.tar: {place.key}"
        data = None
        if self._cached:
            data = self._cached.read(
                shard.sha256, shard.num_bytes, place.start, place.size, lambda to: self._download(shard, to)
            )
            if data is not None and not _is_whole(data, place):
                self._cached.forget(shard.sha256)  # the origin may be whole
                data = None
        if data is None:
            path, shown = self._named(f"{shard.name}.tar")
            data = fetch(self._fs, path, shown, start=place.start, end=place.start + place.size)
            if len(data) != place.size:
                raise DataError(f"{what} is cut short, at {len(data):,} of {place.size:,} bytes")
            if not _is_whole(data, place):
                raise DataError(f"{what} has other bytes than were written (SHA-256)")
        return _unpacked(data, place, what)

    def _named(self, file: str) -> tuple[str, str]:
        return f"{self._root}/{file}", f"{self.name}/{file}"

    def _load_listing(self, number: int) -> _Listing:
        shard = self._index.shards[number]
        path, shown = self._named(f"{shard.name}.json")
        return _read_listing(fetch(self._fs, path, shown), shard, shown)

    def _download(self, shard: _Shard, to: Path) -> None:
        self._fs.get_file(f"{self._root}/{shard.name}.tar", str(to))


class StoreSamples:
    """The rows of a store as samples, whose keys are the numbers of the rows."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.name = str(store.folder)
        self.groups = (len(store),)  # memory-mapped: rows need not be read in the order in which they lie
        self.identity = hashlib.sha256(json.dumps([store.fingerprint, len(store)]).encode()).hexdigest()

    def __len__(self) -> int:
        return len(self.store)

    def shapes(self, name: str) -> Shapes:
        """Return the shape of a tensor, which all rows share.

        Raises:
            DataError: there is no such tensor.
        """
        return Shapes((self.store.shape(name),), torch.zeros(len(self), dtype=torch.int64))

    def read(self, number: int) -> Sample:
        """Read and check one row.

        Raises:
            DataError: there is no such row, its shard is damaged, or a value is not finite.
        """
        row = torch.tensor([number])
        tensors = {key: self.store.batch(key, row)[0] for key in self.store.keys}
        _check_finite(tensors, f"{self.name}: row {number}")
        return Sample(f"{number:08d}", tensors, self.store.meta(number))


def shards_from_store(
    store: Store, folder: Path, *, shard_bytes: int = 256 << 20, on_sample: Callable[[int, int], None] | None = None
) -> ShardSet:
    """Write the rows of a store as shards, or go on where an earlier call stopped; the fingerprint is the store's.

    `on_sample(done, total)` follows along.

    Raises:
        ConfigError: `shard_bytes` is below 1.
        DataError: as `ShardWriter`; or a row is damaged.
    """
    rows = StoreSamples(store)
    with ShardWriter(folder, fingerprint=store.fingerprint, shard_bytes=shard_bytes) as writer:
        for row in range(len(store)):
            if f"{row:08d}" not in writer:
                writer.add(rows.read(row))
            if on_sample:
                on_sample(row + 1, len(store))
        writer.finish(rejected=store.rejected)
    return ShardSet.open(folder)


@dataclass(frozen=True)
class ShardsReport:
    """What is in a set."""

    num_samples: int
    num_shards: int
    num_bytes: int
    kinds: dict[str, int]  # the tensors of a sample ("mean float32[4, 2, 8, 8]"), and how many samples have these
    bad: tuple[str, ...]  # one line for each sample that cannot be used


def inspect_shards(url: str | Path, *, on_sample: Callable[[int, int], None] | None = None) -> ShardsReport:
    """Read and check every sample of a set; `on_sample(done, total)` follows along.

    Raises:
        ConfigError, DataError: as `ShardSet.open`.
    """
    shards = ShardSet.open(url)
    kinds: Counter[str] = Counter()
    bad = []
    for number in range(len(shards)):
        try:
            kinds[described(shards.read(number).tensors)] += 1
        except DataError as error:
            bad.append(str(error))
        if on_sample:
            on_sample(number + 1, len(shards))
    return ShardsReport(len(shards), len(shards.groups), shards.num_bytes, dict(kinds.most_common()), tuple(bad))


# --- a sample as bytes -----------------------------------------------------------------------------------------------


def _packed(sample: Sample) -> tuple[bytes, dict[str, tuple[int, int]]]:
    """Return the members of a sample as they stand in a tar, and where the contents of each are."""
    what = f"sample {sample.key!r}"
    if not KEY.fullmatch(sample.key):
        raise DataError(f"{what}: a key is 1 to 80 letters, digits, hyphens and underscores")
    for suffix in sample.files:
        if not SUFFIX.fullmatch(suffix) or suffix in ("safetensors", "json"):
            raise DataError(f"{what}: {suffix!r} cannot be the suffix of a file; mp4 can")
    if not sample.tensors:
        raise DataError(f"{what} has no tensors")
    _check_finite(sample.tensors, what)
    try:
        own = {
            name: x.detach().cpu().clone(memory_format=torch.contiguous_format) for name, x in sample.tensors.items()
        }
        contents = {"safetensors": save(own), "json": json.dumps(sample.meta, allow_nan=False).encode(), **sample.files}
    except (SafetensorError, TypeError, ValueError, RecursionError) as error:
        raise DataError(f"{what} cannot be written: {error}") from error
    parts, members, at = [], {}, 0
    for suffix, content in contents.items():
        info = tarfile.TarInfo(f"{sample.key}.{suffix}")
        info.size = len(content)
        parts += [info.tobuf(tarfile.USTAR_FORMAT), content, bytes(-len(content) % BLOCK)]
        members[suffix] = (at + BLOCK, len(content))
        at += sum(map(len, parts[-3:]))
    return b"".join(parts), members


def _unpacked(data: bytes, place: _Place, what: str) -> Sample:
    contents = {suffix: data[start : start + size] for suffix, (start, size) in place.members.items()}
    try:
        tensors, meta = dict(sorted(load(contents.pop("safetensors")).items())), json.loads(contents.pop("json"))
    except (SafetensorError, KeyError, ValueError, TypeError, RecursionError) as error:
        raise DataError(f"{what} cannot be read: {error}") from error
    if not isinstance(meta, dict):
        raise DataError(f"{what} has no JSON object beside its tensors")
    _check_finite(tensors, what)
    return Sample(place.key, tensors, meta, contents)


def _is_whole(data: bytes, place: _Place) -> bool:
    return hashlib.sha256(data).hexdigest() == place.sha256


def _check_finite(tensors: dict[str, Tensor], what: str) -> None:
    """Refuse what is not finite: one such value makes an extreme of its tensor so, and extremes are found fast."""
    for name, x in tensors.items():
        if (
            x.is_floating_point()
            and x.numel()
            and not all(map(math.isfinite, map(float, torch.aminmax(x.float() if x.itemsize == 1 else x))))
        ):
            raise DataError(f"{what}: {name} has values that are not finite")


# --- files ----------------------------------------------------------------------------------------


def _json(value: object) -> bytes:
    return json.dumps(to_dict(value)).encode()


def _parsed(cls: type[T], data: bytes, what: str) -> T:
    try:
        return from_dict(cls, json.loads(data))
    except (ValueError, RecursionError, ConfigError) as error:
        raise DataError(f"{what} is damaged: {error}") from error


def _read_listing(data: bytes, shard: _Shard, what: str) -> _Listing:
    if hashlib.sha256(data).hexdigest() != shard.listing_sha256:
        raise DataError(f"{what} has other bytes than were written (SHA-256)")
    return _parsed(_Listing, data, what)


def _runs(kinds: Iterable[int]) -> str:
    counted = ((kind, len(list(run))) for kind, run in groupby(kinds))
    return " ".join(f"{kind}*{count}" if count > 1 else str(kind) for kind, count in counted)


def _kinds_of(shard: _Shard, what: str) -> Int64[Tensor, " N"]:
    """Return which of a shard's kinds each sample is of."""
    runs = [RUN.fullmatch(run) for run in shard.kinds.split(" ")]
    kinds = [int(run[1]) for run in runs if run]
    counts = [int(run[2] or 1) for run in runs if run]
    if len(kinds) < len(runs) or max(kinds) >= len(shard.shapes) or sum(counts) != shard.num_samples:
        raise DataError(
            f"{what} is damaged: {shard.name} has {shard.num_samples} samples of kinds {shard.kinds[:40]!r}"
        )
    return torch.tensor(kinds).repeat_interleave(torch.tensor(counts))


def _write(file: BinaryIO, start: int, data: bytes) -> None:
    file.seek(start)
    rest = memoryview(data)
    while rest:
        rest = rest[file.write(rest) :]


def _locked(folder: Path) -> BinaryIO:
    """Return a file that is locked until it is closed, or its process ends in whatever way."""
    import fcntl  # not everywhere, and reading does not need it

    file = (folder / ".lock").open("wb")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        file.close()
        if isinstance(error, BlockingIOError):
            raise DataError(
                f"{folder} is being written by another process; wait for it, or choose another folder"
            ) from None
        raise
    return file
