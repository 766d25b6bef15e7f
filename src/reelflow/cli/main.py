"""The command line: `reelflow COMMAND ...`, and what becomes of errors.

Exit status: 0 done, 1 done but not as hoped, 2 refused (one line on standard error says why), 130 stopped by Ctrl-C.
"""

import ctypes
import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from reelflow.cli.compare import compare
from reelflow.cli.convert import convert
from reelflow.cli.data import data
from reelflow.cli.encode import encode
from reelflow.cli.evaluate import evaluate
from reelflow.cli.families import families
from reelflow.cli.generate import generate
from reelflow.cli.plan import plan
from reelflow.cli.plot import plot
from reelflow.cli.terminal import INTERRUPTED
from reelflow.cli.train import train
from reelflow.cli.vae import vae
from reelflow.errors import ReelflowError

__all__ = ["app", "main", "run"]

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None, no_args_is_help=True)
for command in (generate, train, encode, evaluate, plan, compare, families, convert):
    app.command()(command)
app.add_typer(data, name="data")
app.add_typer(plot, name="plot")
app.add_typer(vae, name="vae")


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for the run, its clips and index.html.")] = Path("demo"),
) -> int:
    """Learn to make videos on this CPU. Writes a page that shows how well, and exits with 1 when it is not well enough."""
    from reelflow.cli.terminal import stdout
    from reelflow.recipes.demo import demo as run_demo

    return 0 if run_demo(out, console=stdout()) else 1


def _print_version(asked: bool) -> bool:
    if asked:
        from importlib.metadata import version

        print(f"reelflow {version('reelflow')}")
        raise typer.Exit
    return asked


@app.callback()
def reelflow(
    *,
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_print_version, is_eager=True)
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show where an error came from; goes anywhere.")] = False,
) -> None:
    """Train, sample, stream and evaluate video diffusion transformers."""


def run(arguments: Sequence[str]) -> int:
    """Carry out one command line and return its exit status; errors become one line on standard error."""
    arguments = list(arguments)
    options = arguments[: arguments.index("--")] if "--" in arguments else arguments
    debug = "--debug" in options
    if debug:
        arguments.remove("--debug")
    try:
        status = app(arguments, prog_name="reelflow", standalone_mode=False)
        return status if isinstance(status, int) else 0
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        raise
    except Exception as error:
        if debug:
            traceback.print_exc()
        message, status = _explain(error)
        print("error: " + " ".join(message.split()), file=sys.stderr)
        return status


def keep_freed_memory() -> None:
    """Tell glibc to keep up to 2 GiB of freed memory for the next tensors, where there is glibc.

    A training step frees and takes again hundreds of megabytes; going through the kernel each time costs a page fault
    for every 4 KiB, which is a tenth to a fifth of a step on a CPU (docs/log.md).
    """
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return
    trim_threshold, top_pad, mmap_threshold = -1, -2, -3
    mallopt(mmap_threshold, 1 << 25)  # the most that glibc allows
    mallopt(trim_threshold, 2**31 - 1)
    mallopt(top_pad, 1 << 26)


def _explain(error: Exception) -> tuple[str, int]:
    """Return what to say about an error, and the exit status."""
    if isinstance(error, ReelflowError):
        return str(error), 2
    if isinstance(error, OSError):
        return f"{error.filename}: {error.strerror}" if error.filename else str(error.strerror or error), 2
    if hasattr(error, "format_message"):  # typer's own: a misspelt option, a missing argument
        return f"{error.format_message()} (see --help)", 2
    return f"{type(error).__name__}: {error}; this is a fault of reelflow, and --debug shows where", 1


def main() -> None:
    """Run the command line of this process."""
    keep_freed_memory()
    try:
        status = run(sys.argv[1:])
        sys.stdout.flush()
    except BrokenPipeError:  # who reads the output, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 1
    sys.exit(status)
