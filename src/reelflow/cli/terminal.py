"""What the commands share: lines, tables, a progress bar, Ctrl-C, and refusing to overwrite."""

import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from reelflow.errors import ConfigError, MediaError

__all__ = ["INTERRUPTED", "Device", "interruptible", "new_file", "parse_size", "progress_bar", "stdout", "warn"]

INTERRUPTED = 130  # the exit status of a command that Ctrl-C ended
Device = Annotated[
    str, typer.Option(help="Where to compute: cpu, cuda, cuda:1; auto is the accelerator, where there is one.")
]


def stdout() -> Console:
    """Return a console for tables: as wide as the terminal, and wide enough in a pipe."""
    return Console(highlight=False, width=None if sys.stdout.isatty() else 160)


def warn(text: str) -> None:
    """Print one line that is not an error, on standard error."""
    print(f"warning: {text}", file=sys.stderr)


@contextmanager
def progress_bar(title: str, unit: str) -> Iterator[Callable[[int, int], None]]:
    """Show a bar with rate and time left on a terminal, nothing elsewhere; yields `update(done, total)`."""
    columns = (
        *(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()),
        *(TextColumn("{task.fields[rate]}"), TimeRemainingColumn(compact=True)),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as progress:
        task = progress.add_task(title, total=None, rate="")

        def update(done: int, total: int) -> None:
            speed = progress.tasks[0].speed
            progress.update(task, completed=done, total=total, rate=f"{speed:.3g} {unit}/s" if speed else "")

        yield update


@contextmanager
def interruptible(notice: str) -> Iterator[threading.Event]:
    """Turn the first Ctrl-C into `notice` and a set event; the second raises KeyboardInterrupt as usual."""
    interrupted = threading.Event()
    if threading.current_thread() is not threading.main_thread():  # only the main thread may receive signals
        yield interrupted
        return

    def note(number: int, frame: FrameType | None) -> None:
        if interrupted.is_set():
            raise KeyboardInterrupt
        interrupted.set()
        print(notice, file=sys.stderr)

    before = signal.signal(signal.SIGINT, note)
    try:
        yield interrupted
    finally:
        signal.signal(signal.SIGINT, before)


def new_file(path: Path, *suffixes: str, overwrite: bool) -> None:
    """Refuse a file that could not be written in the end, or that would replace another.

    Raises:
        ConfigError: another suffix is needed.
        MediaError: it exists, or its folder does not.
    """
    if suffixes and path.suffix.lower() not in suffixes:
        raise ConfigError(f"{path} must end in {' or '.join(suffixes)}, got {path.suffix or 'no suffix'}")
    if not path.parent.is_dir():
        raise MediaError(f"cannot write {path}: the folder {path.parent} does not exist")
    if path.is_dir():
        raise MediaError(f"cannot write {path}: it is a folder")
    if path.exists() and not overwrite:
        raise MediaError(f"{path} exists; choose another name, or replace it with --overwrite")


def parse_size(text: str) -> tuple[int, int]:
    """Read HEIGHTxWIDTH.

    Raises:
        ConfigError: it is written otherwise.
    """
    match = re.fullmatch(r"\s*(\d+)\s*[x×]\s*(\d+)\s*", text)
    if not match:
        raise ConfigError(f"a size is HEIGHTxWIDTH in pixels, such as 64x64, got {text!r}")
    return int(match[1]), int(match[2])
