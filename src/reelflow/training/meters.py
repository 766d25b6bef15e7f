"""What a run says about itself while it trains: how fast, how far, how well.

FLOP/s are the task's FLOPs per sample times samples per second; their share is of a peak *measured* on this machine
with large matrix products. Everything goes to `log.jsonl`, to TensorBoard where it is installed, and to the console.
"""

import json
import math
import os
import secrets
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from jaxtyping import Float
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from reelflow.errors import CheckpointError, ConfigError

__all__ = [
    "BinnedMean",
    "Display",
    "RunLog",
    "Throughput",
    "duration",
    "measure_peak_flops",
    "peak_device_bytes",
    "peak_memory_bytes",
]


class Throughput:
    """Rates since the last `read()`, not counting what happens inside `aside()` (validation, previews, checkpoints)."""

    def __init__(self, *, flops_per_sample: float = 0.0, peak_flops: float = 0.0) -> None:
        self.flops_per_sample, self.peak_flops = flops_per_sample, peak_flops
        self._restart()

    def _restart(self) -> None:
        self._start = time.perf_counter()
        self._aside = self._waited = 0.0
        self._steps = self._samples = self._tokens = 0

    def waited(self, seconds: float) -> None:
        """Count time the step could not begin for want of data."""
        self._waited += seconds

    def consumed(self, *, num_samples: int, num_tokens: int) -> None:
        """Count what one batch held."""
        self._samples += num_samples
        self._tokens += num_tokens

    def stepped(self) -> None:
        """Count one step."""
        self._steps += 1

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Leave the time spent inside out of all rates."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self._aside += time.perf_counter() - start

    def read(self) -> dict[str, float]:
        """Return the rates and start over: seconds per step, samples and tokens per second, the share of time spent
        waiting for data, and with known FLOPs the FLOP/s and their share of the measured peak."""
        seconds = max(time.perf_counter() - self._start - self._aside, 1e-9)
        rates = {
            "step_seconds": seconds / max(self._steps, 1),
            "samples_per_second": self._samples / seconds,
            "tokens_per_second": self._tokens / seconds,
            "data_wait": self._waited / seconds,
        }
        if self.flops_per_sample:
            rates["flops_per_second"] = self.flops_per_sample * rates["samples_per_second"]
            if self.peak_flops:
                rates["peak_share"] = rates["flops_per_second"] / self.peak_flops
        self._restart()
        return rates


def measure_peak_flops(dtype: torch.dtype, device: torch.device, *, seconds: float = 0.3) -> float:
    """Return the FLOP/s of square matrix products, 2 n^3 / time, the fastest seen within `seconds`."""
    on_cpu = device.type == "cpu"
    size = 1024 if on_cpu else 8192  # long enough for the launch not to count
    a = torch.ones(size, size, dtype=dtype, device=device)
    if not on_cpu:  # whose clock follows what the numbers cost: products of ones would be a tenth too fast
        a = a.normal_(generator=torch.Generator(device).manual_seed(0))
    best, deadline = math.inf, time.perf_counter() + seconds
    while time.perf_counter() < deadline or best == math.inf:
        _wait_for(device)
        start = time.perf_counter()
        a @ a
        _wait_for(device)
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def _wait_for(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def peak_memory_bytes() -> int:
    """Return the largest resident size this process has had; 0 where the system does not tell."""
    if os.name != "posix":
        return 0
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def peak_device_bytes(device: torch.device) -> dict[str, int]:
    """Return the most that tensors have taken on an accelerator, to be logged; nothing for a CPU."""
    if device.type == "cpu":
        return {}
    return {"peak_device_bytes": torch.accelerator.max_memory_allocated(device)}


def duration(seconds: float) -> str:
    """Phrase a duration: 42 s, 3:07, 1:02:33."""
    hours, rest = divmod(round(seconds), 3600)
    if not hours and rest < 60:
        return f"{rest} s"
    return f"{hours}:{rest // 60:02d}:{rest % 60:02d}" if hours else f"{rest // 60}:{rest % 60:02d}"


class BinnedMean:
    """Mean and standard error of a loss in equal bins of t over [0, 1]; a loss that falls hides where it falls."""

    def __init__(self, num_bins: int) -> None:
        if num_bins < 1:
            raise ConfigError(f"num_bins must be at least 1, got {num_bins}")
        self.num_bins = num_bins
        self._values: list[list[float]] = [[] for _ in range(num_bins)]

    def add(self, t: Float[Tensor, " B"], losses: Float[Tensor, " B"]) -> None:
        """Take in one loss per sample, at its t in [0, 1]."""
        bins = (t.double() * self.num_bins).long().clamp(0, self.num_bins - 1)
        for index, loss in zip(bins.tolist(), losses.tolist(), strict=True):
            self._values[index].append(loss)

    def rows(self) -> list[dict[str, Any]]:
        """Return one row per bin: bin, t (its range), count, mean (None when empty), stderr (None below two)."""
        return [
            {
                "bin": index,
                "t": [index / self.num_bins, (index + 1) / self.num_bins],
                "count": len(values),
                "mean": torch.tensor(values, dtype=torch.float64).mean().item() if values else None,
                "stderr": torch.tensor(values, dtype=torch.float64).std().item() / math.sqrt(len(values))
                if len(values) > 1
                else None,
            }
            for index, values in enumerate(self._values)
        ]


class RunLog:
    """`log.jsonl` and TensorBoard events in a run's folder, continued after step `resumed_from`.

    Each line is an object with "step" and "kind". What an interrupted run wrote after the step it is resumed from is
    dropped, so steps never repeat. Numbers that are not finite are written as null. Numbers also go to Weights & Biases
    where `wandb` names a project; a resumed run goes on there, as one run.

    Raises:
        CheckpointError: `log.jsonl` holds something else than such lines.
        ConfigError: `wandb` is asked for and is not installed.
    """

    def __init__(
        self,
        folder: Path,
        *,
        resumed_from: int,
        wandb: str | None = None,
        config: dict[str, Any] | None = None,
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / "log.jsonl"
        _drop_after(self.path, resumed_from)
        self._board = _tensorboard(folder / "tensorboard", purge_step=resumed_from + 1)
        self._wandb = None if wandb is None else _wandb(folder, wandb, config or {})

    def write(self, step: int, kind: str, values: dict[str, Any]) -> None:
        """Append one line, and the numbers in it to TensorBoard as kind/name.

        Raises:
            CheckpointError: the line could not be written (the disk is full, say).
        """
        plain = _jsonable(values)
        try:
            with self.path.open("a") as file:
                print(json.dumps({"step": step, "kind": kind, **plain}), file=file)
        except OSError as error:
            raise CheckpointError(f"could not write to {self.path}: {error}; free some space and resume") from error
        numbers = {f"{kind}/{name}": value for name, value in plain.items() if isinstance(value, (int, float))}
        if self._board is not None:
            for name, value in numbers.items():
                self._board.add_scalar(name, value, step)
            self._board.flush()
        if self._wandb is not None:
            self._wandb.log(numbers, step=step)

    def close(self) -> None:
        """Finish the TensorBoard file, and the run at Weights & Biases."""
        if self._board is not None:
            self._board.close()
        if self._wandb is not None:
            self._wandb.finish()


def _drop_after(path: Path, step: int) -> None:
    if not path.exists():
        return
    kept = []
    lines = path.read_text().splitlines(keepends=True)
    for number, line in enumerate(lines, 1):
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line)
        except (ValueError, KeyError, TypeError) as error:
            if number == len(lines):  # the run was killed while writing it
                break
            raise CheckpointError(f"{path}, line {number}, is not a line of a run's log: {line[:60]!r}") from error
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text("".join(kept))
    os.replace(partial, path)


def _tensorboard(folder: Path, *, purge_step: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(folder), purge_step=purge_step)


def _wandb(folder: Path, project: str, config: dict[str, Any]) -> Any:
    try:
        wandb = import_module("wandb")
    except ImportError as error:
        raise ConfigError(
            "wandb names a project, but wandb is not installed: pip install 'reelflow[wandb]', or set wandb to null"
        ) from error
    named = folder / "wandb_id.txt"
    if not named.exists():
        named.write_text(secrets.token_hex(8))
    return wandb.init(project=project, id=named.read_text(), resume="allow", dir=str(folder), config=config)


def _jsonable(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _jsonable(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_jsonable(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


class Display:
    """A live progress bar on a terminal, plain lines elsewhere."""

    def __init__(self, console: Console, *, total_steps: int, step: int) -> None:
        self._console = console
        self._live = Progress(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(),
            TimeRemainingColumn(compact=True),
            TextColumn("{task.description}"),
            console=console,
            refresh_per_second=4,
            disable=not console.is_terminal,
        )
        self._task = self._live.add_task("", total=total_steps, completed=step)

    def __enter__(self) -> "Display":
        self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._live.stop()

    def stepped(self, step: int) -> None:
        """Move the bar."""
        if not self._live.disable:
            self._live.update(self._task, completed=step)

    def report(self, step: int, text: str) -> None:
        """Show the latest numbers: beside the bar, or as a line."""
        if self._live.disable:
            self.note(f"step {step:>7,}  {text}")
        else:
            self._live.update(self._task, description=text)

    def note(self, text: str) -> None:
        """Print a line that stays."""
        self._console.print(text, highlight=False, markup=False, soft_wrap=True)
