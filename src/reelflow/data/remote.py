"""Files far away: ranges of bytes through fsspec, and a folder that keeps whole files."""

import errno
import hashlib
import os
import re
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from threading import Lock
from typing import Any

from fsspec.implementations.local import LocalFileSystem

from reelflow.config import configuration
from reelflow.errors import ConfigError, DataError

__all__ = ["Cache", "CacheFolder", "fetch"]

PAUSES = (0.5, 2.0)  # seconds between attempts to read what is far away
STALE = 3600.0  # seconds after which an unfinished download is nobody's
KEPT = re.compile(r"[0-9a-f]{64}\.tar|\.[0-9a-f]{64}\.\d+\.partial")


@configuration
class Cache:
    """A folder that keeps whole shards of remote sets, those read last, up to `max_bytes` in all.

    Several sets and processes may share it; then each may pass the limit by the shard it is fetching.
    """

    folder: str
    max_bytes: int


def fetch(fs: Any, path: str, shown: str, *, start: int | None = None, end: int | None = None) -> bytes:
    """Read a file or a range of it; what is far away is asked for three times.

    Raises:
        DataError: it is missing or cannot be read; the message calls it `shown`.
    """
    for pause in (None,) if isinstance(fs, LocalFileSystem) else (*PAUSES, None):
        try:
            if not isinstance(fs, LocalFileSystem):
                return fs.cat_file(path, start=start, end=end)
            with open(path, "rb", buffering=0) as file:  # in a quarter of the driver's time
                file.seek(start or 0)
                return file.read(-1 if end is None else end - (start or 0))
        except FileNotFoundError:
            raise DataError(f"{shown} does not exist") from None
        except Exception as error:  # drivers raise what their libraries raise
            if pause is None:
                raise DataError(f"{shown} cannot be read: {error}") from error
            time.sleep(pause)
    raise AssertionError


class CacheFolder:
    """Files by their SHA-256, so that none is taken for another; the ones read last, up to a size.

    Raises:
        ConfigError: the largest file is too large for it, or the folder cannot be made.
    """

    def __init__(self, cache: Cache, largest: int) -> None:
        if cache.max_bytes < largest:
            raise ConfigError(
                f"a cache of {cache.max_bytes:,} bytes cannot hold a shard of {largest:,}; nearest: max_bytes={largest}"
            )
        self.folder, self.max_bytes = Path(cache.folder), cache.max_bytes
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(
                f"cannot keep shards in {self.folder}: {error.strerror}; choose another folder"
            ) from error
        self.lock = Lock()
        self.unlike: set[str] = set()  # files that arrive with another hash: ranges of them are fetched one by one

    def read(
        self, sha256: str, num_bytes: int, start: int, size: int, download: Callable[[Path], None]
    ) -> bytes | None:
        """Return a range of a file, which is downloaded if need be; None if it is not to be had whole.

        Raises:
            ConfigError: the disk is full.
        """
        path = self._path(sha256)
        for _ in range(2):
            try:
                with path.open("rb") as file:
                    with suppress(OSError):
                        os.utime(path)  # read last
                    file.seek(start)
                    return file.read(size)
            except FileNotFoundError:  # not fetched yet, or another process made room
                if not self._fetched(sha256, num_bytes, download):
                    return None
        return None

    def forget(self, sha256: str) -> None:
        """Remove a file that is damaged here."""
        self._path(sha256).unlink(missing_ok=True)

    def _path(self, sha256: str) -> Path:
        return self.folder / f"{sha256}.tar"

    def _fetched(self, sha256: str, num_bytes: int, download: Callable[[Path], None]) -> bool:
        path, partial = self._path(sha256), self.folder / f".{sha256}.{os.getpid()}.partial"
        with self.lock:
            if sha256 in self.unlike or path.exists():
                return path.exists()
            try:
                self._make_room(num_bytes)
                download(partial)
                with partial.open("rb") as file:
                    whole = hashlib.file_digest(file, "sha256").hexdigest() == sha256
                if whole:
                    os.replace(partial, path)
                else:
                    self.unlike.add(sha256)
                return whole
            except Exception as error:  # of any driver; reading the range alone will say what is wrong there
                if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
                    raise ConfigError(
                        f"cannot keep shards in {self.folder}: {error.strerror}; lower max_bytes, or choose another folder"
                    ) from error
                return False
            finally:
                with suppress(OSError):
                    partial.unlink(missing_ok=True)

    def _make_room(self, num_bytes: int) -> None:
        found = []
        for path in self.folder.iterdir():
            if KEPT.fullmatch(path.name):
                with suppress(FileNotFoundError):
                    found.append((path.stat().st_mtime, path.stat().st_size, path))
        used = sum(size for _, size, _ in found)
        for changed, size, path in sorted(found):
            if used + num_bytes <= self.max_bytes:
                return
            if path.suffix == ".tar" or changed < time.time() - STALE:
                path.unlink(missing_ok=True)
                used -= size
