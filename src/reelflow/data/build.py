"""From a folder of videos to the clips worth keeping: each video scanned once, on this machine or on many.

    scan -> shots -> clips with measures   one line of a journal for each video, so that a killed build goes on
    judge, find duplicates                 over the whole set, in the order of names; costs nothing to repeat

`recipes/build.py` captions and encodes what is kept. Work is handed out by an `Engine`: `in_process`, or Ray Data
(`on_ray`), which is imported here and nowhere else. On a cluster all machines see the same folders.
"""

import fcntl
import hashlib
import json
import logging
import math
import os
import socket
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from pydantic import TypeAdapter, ValidationError

from reelflow.config import configuration, to_dict
from reelflow.data.filters import Filters, Measures, judge, measure, near_duplicates
from reelflow.data.folder import ClipSpec
from reelflow.data.shots import ShotDetection, find_shots, scan
from reelflow.data.store import file_digest
from reelflow.errors import ConfigError, DataError, MediaError

__all__ = [
    "Analysis",
    "Candidate",
    "Engine",
    "Journal",
    "Rejection",
    "Selection",
    "Source",
    "analyse",
    "clips_of",
    "identify",
    "in_process",
    "on_ray",
    "select",
]


# Engines

Work = Callable[[str], str]


@runtime_checkable
class Engine(Protocol):
    """Applies work to items and yields the results as they come, in any order.

    Each worker calls `make` once, which may be slow (loading a network); both it and the items must be picklable. With
    `gpu`, each worker gets one where there are any.
    """

    def __call__(self, make: Callable[[], Work], items: Sequence[str], *, gpu: bool = False) -> Iterator[str]: ...


def in_process(make: Callable[[], Work], items: Sequence[str], *, gpu: bool = False) -> Iterator[str]:
    """Work here, one item after the other: an `Engine`."""
    if items:
        yield from map(make(), items)


@contextmanager
def on_ray(*, workers: int | None = None, address: str | None = None) -> Iterator[Engine]:
    """Start Ray on this machine, or join the cluster at `address`, and yield an `Engine` of `workers` (None: every core).

    Raises:
        ConfigError: Ray is not installed, there is no cluster at the address, or `workers` is below 1.
    """
    if workers is not None and workers < 1:
        raise ConfigError(f"workers must be at least 1, got {workers}; 0 on the command line works without Ray")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is told to anybody
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # else it reports on its own workings
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise ConfigError(
            f"building on several cores needs Ray ({error}): pip install 'reelflow[data]'; or work in one process: --workers 0"
        ) from error
    if address not in (None, "auto"):
        _check_address(address)  # Ray itself would try for many minutes
    start = partial(ray.init, log_to_driver=False, logging_level=logging.ERROR)
    try:
        if address is None:
            cores = workers or os.cpu_count()
            start(address="local", num_cpus=cores, include_dashboard=False, object_store_memory=100 << 20)
        else:
            start(address=address)
    except (ConnectionError, ValueError) as error:
        raise ConfigError(f"no Ray cluster at {address}: {error}; start one with: ray start --head") from error
    try:
        cores = int(ray.cluster_resources().get("CPU", 1))
        yield _RayEngine(min(workers or cores, cores))
    finally:
        ray.shutdown()


def _check_address(address: str) -> None:
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdigit():
        raise ConfigError(f"a Ray cluster's address is host:port, such as head:6379, or auto, got {address!r}")
    try:
        socket.create_connection((host, int(port)), timeout=10).close()
    except (OSError, OverflowError) as error:
        raise ConfigError(f"no Ray cluster at {address}: {error}; start one with: ray start --head") from error


class _RayEngine:
    def __init__(self, workers: int) -> None:
        self.workers = workers

    def __call__(self, make: Callable[[], Work], items: Sequence[str], *, gpu: bool = False) -> Iterator[str]:
        import ray
        from ray.data import ActorPoolStrategy, DataContext

        if not items:
            return
        with warnings.catch_warnings():  # of Ray, about defaults of its own
            warnings.simplefilter("ignore", DeprecationWarning)
            context = DataContext.get_current()
        context.enable_progress_bars = False
        context.print_on_execution_start = False
        logging.getLogger("ray.data").setLevel(logging.ERROR)
        gpus = int(ray.cluster_resources().get("GPU", 0)) if gpu else 0
        workers = min(gpus or self.workers, len(items))
        # A block is what is lost when the build is killed: as few items as the scheduler can bear.
        rows = ray.data.from_items([{"item": item} for item in items], override_num_blocks=min(len(items), 4096))
        done = rows.map(
            _Worker,  # type: ignore[arg-type]
            fn_constructor_args=(make,),
            compute=ActorPoolStrategy(size=workers),
            num_cpus=1,
            num_gpus=1 if gpus else 0,
        )
        for row in done.iter_rows():
            yield row["result"]


class _Worker:
    def __init__(self, make: Callable[[], Work]) -> None:
        self.work = make()

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        return {"result": self.work(row["item"])}


# journals


class Journal:
    """A file of JSON lines that grows by whole lines and survives a kill; a torn last line is cut off.

    Raises:
        DataError: it cannot be written, or another process is writing it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("a+b")
        except OSError as error:
            raise DataError(f"cannot write {path}: {error.strerror}") from error
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self._file.close()
            raise DataError(
                f"another build is writing to {path.parent}; wait for it, or choose another folder"
            ) from error

    def lines(self) -> Iterator[bytes]:
        """Yield the whole lines there are, and cut off what follows them."""
        self._file.seek(0)
        end = 0
        for line in self._file:
            if not line.endswith(b"\n"):
                self._file.truncate(end)
                return
            end += len(line)
            yield line

    def add(self, line: bytes) -> None:
        """Append a line, and see it on the disk.

        Raises:
            DataError: the disk is full.
        """
        try:
            self._file.write(line.rstrip(b"\n") + b"\n")
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            raise DataError(f"cannot write {self.path}: {error.strerror}") from error

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


# one video


@dataclass(frozen=True)
class Source:
    """A video, and a hash of its size and of the bytes at its beginning and end."""

    path: Path
    name: str  # relative to the folder
    digest: str


@configuration
class Candidate:
    """A clip that could be taken."""

    id: str  # a hash of the file's contents and of the span
    shot: int  # of the file, from 0
    start: float  # seconds
    measures: Measures


@configuration
class Analysis:
    """What one video holds; `error` where it could not be read."""

    key: str  # of the file's contents and of all that the analysis depends on
    error: str | None
    seconds: float
    shots: tuple[tuple[float, float], ...]  # seconds
    clips: tuple[Candidate, ...]


@dataclass(frozen=True)
class Rejection:
    """A file, or a clip of it, that is not taken, and why: a kind, a colon, and the particulars."""

    path: Path
    file: str  # relative to the folder
    reason: str
    clip: Candidate | None = None

    @property
    def kind(self) -> str:
        return self.reason.partition(":")[0]


def identify(path: Path, folder: Path) -> Source:
    """Recognise a video by its contents: a file that was renamed, moved or touched is the same.

    Raises:
        MediaError: it cannot be read.
    """
    try:
        return Source(path, path.relative_to(folder).as_posix(), file_digest(path).hex())
    except OSError as error:
        raise MediaError(f"{path}: cannot be read: {error.strerror}") from error


def analyse(
    sources: Sequence[Source],
    spec: ClipSpec,
    detection: ShotDetection,
    *,
    journal: Journal,
    engine: Engine = in_process,
    on_file: Callable[[int, int], None] | None = None,
    stopped: Callable[[], bool] = lambda: False,
) -> dict[str, Analysis]:
    """Return what is in each source, by digest; those the journal knows are not read again.

    When `stopped`, what is there so far comes back. `on_file(done, total)` follows along.

    Raises:
        DataError: the journal cannot be written.
    """
    settings = json.dumps([to_dict(spec), to_dict(detection)], sort_keys=True)
    keys = {_hash(source.digest, settings): source for source in sources}
    found: dict[str, Analysis] = {}
    for line in journal.lines():
        with suppress(ValidationError):  # of another version
            analysis = _adapter().validate_json(line)
            if analysis.key in keys:
                found[keys[analysis.key].digest] = analysis
    items = [
        json.dumps({"key": key, "path": str(source.path.absolute()), "digest": source.digest})
        for key, source in keys.items()
        if source.digest not in found
    ]
    for result in engine(partial(_analyser, spec, detection), items):
        journal.add(result.encode())
        analysis = _adapter().validate_json(result)
        found[keys[analysis.key].digest] = analysis
        if on_file:
            on_file(len(found), len(keys))
        if stopped():
            break
    return found


def clips_of(
    path: Path, digest: str, spec: ClipSpec, detection: ShotDetection
) -> tuple[float, list[tuple[float, float]], list[Candidate]]:
    """Return how long a video is, its shots, and the clips they give, one after the other from the beginning of each shot.

    Clips begin a quarter of a frame late, so that rounded clocks never show the frame before.

    Raises:
        MediaError: the file is broken or truncated.
    """
    scanned = scan(path)
    fps, shots = scanned.fps, find_shots(scanned, detection)
    clips = []
    for place, shot in enumerate(shots):
        begin = (shot.first + 0.25) / fps
        available = math.floor(((shot.end - 0.1) / fps - begin) * spec.fps) + 1
        for number in range(available // spec.num_frames):
            start = round(begin + number * spec.seconds, 6)
            first = int(start * fps)
            end = min(shot.end, math.floor((start + (spec.num_frames - 1) / spec.fps) * fps) + 1)
            measures = measure(scanned, path, first, max(end, first + 1))
            clips.append(Candidate(_hash(digest, f"{start} {spec.num_frames} {spec.fps}")[:32], place, start, measures))
    return len(scanned) / fps, [(shot.first / fps, shot.end / fps) for shot in shots], clips


def _analyser(spec: ClipSpec, detection: ShotDetection) -> Work:
    """Make the function that a worker applies to each file."""

    def work(item: str) -> str:
        given = json.loads(item)
        path = Path(given["path"])
        try:
            seconds, shots, clips = clips_of(path, given["digest"], spec, detection)
            error = None
        except MediaError as problem:
            seconds, shots, clips, error = 0.0, [], [], str(problem).removeprefix(f"{path}: ")
        analysis = Analysis(given["key"], error, seconds, tuple(shots), tuple(clips))
        return _adapter().dump_json(analysis).decode()

    return work


# the whole set


@dataclass(frozen=True)
class Selection:
    """The clips that are taken, with their sources, and what is not."""

    kept: tuple[tuple[Source, Candidate], ...]
    rejected: tuple[Rejection, ...]


def select(
    sources: Sequence[Source],
    analyses: dict[str, Analysis],
    spec: ClipSpec,
    filters: Filters,
    *,
    taken: frozenset[str] | set[str] = frozenset(),
) -> Selection:
    """Judge every clip, and keep the first of those that are alike: `taken` ids come first, then names, then time.

    Sources without an analysis (a build that was stopped) are left out.
    """
    rejected: list[Rejection] = []
    passed: list[tuple[Source, Candidate]] = []
    seen: dict[str, str] = {}  # digest -> name
    for source in sources:
        if source.digest in seen:
            reason = f"duplicate: the same file as {seen[source.digest]}"
            rejected.append(Rejection(source.path, source.name, reason))
            continue
        seen[source.digest] = source.name
        analysis = analyses.get(source.digest)
        if analysis is None:
            continue
        if analysis.error is not None:
            rejected.append(Rejection(source.path, source.name, f"unreadable: {analysis.error}"))
        elif not analysis.clips:
            longest = max((end - begin for begin, end in analysis.shots), default=0.0)
            reason = (
                f"too short: the longest of its shots ({len(analysis.shots)}) has {longest:.2f} s, "
                f"needs {spec.seconds:.2f} s"
            )
            rejected.append(Rejection(source.path, source.name, reason))
        for clip in analysis.clips:
            fault = judge(clip.measures, filters)
            if fault is None:
                passed.append((source, clip))
            else:
                rejected.append(Rejection(source.path, source.name, fault, clip))
    if filters.duplicate_bits is not None:
        passed.sort(key=lambda pair: pair[1].id not in taken)  # stable: the rest stays in order
        groups = [(source.name, clip.shot) for source, clip in passed]
        like = near_duplicates([clip.measures.hash for _, clip in passed], filters.duplicate_bits, groups)
        for item, earlier in like.items():
            (source, clip), (other, original) = passed[item], passed[earlier]
            reason = f"duplicate: of {other.name} at {original.start:.2f} s"
            rejected.append(Rejection(source.path, source.name, reason, clip))
        passed = [pair for item, pair in enumerate(passed) if item not in like]
    order = {source.name: place for place, source in enumerate(sources)}
    passed.sort(key=lambda pair: (order[pair[0].name], pair[1].start))
    rejected.sort(key=lambda one: (order[one.file], one.clip.start if one.clip else -1.0))
    return Selection(tuple(passed), tuple(rejected))  # each in the order of names, then of time


def _hash(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


@lru_cache(maxsize=1)
def _adapter() -> TypeAdapter:
    return TypeAdapter(Analysis)
