"""One training loop that knows no model and no data.

A task brings the model and its loss, a loader brings batches, and the loop brings everything that is the same for
all of them: steps, averages, validation, logs, checkpoints. A run that is killed and started again ends with the same
weights, bit for bit, as one that was left alone: whatever a step depends on is in the checkpoint.
"""

import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Literal, NamedTuple, Protocol, TypeVar, runtime_checkable

import torch
from jaxtyping import Float
from rich.console import Console
from torch import Tensor, nn

from reelflow.config import configuration, to_dict
from reelflow.errors import CheckpointError, ConfigError, ReelflowError
from reelflow.training import checkpoint
from reelflow.training.ema import Ema
from reelflow.training.meters import Display, RunLog, Throughput, duration, measure_peak_flops, peak_memory_bytes
from reelflow.training.optim import (
    Hidden,
    OptimizerConfig,
    build_optimizers,
    is_matrix,
    schedule,
    set_learning_rates,
)

__all__ = ["Batches", "Best", "Loss", "Task", "TrainingConfig", "TrainingResult", "train"]

Batch_co = TypeVar("Batch_co", covariant=True)
Batch_contra = TypeVar("Batch_contra", contravariant=True)
NOT_FINITE_LIMIT = 10  # steps in a row before a run is given up
VALIDATION_SEED = 1_000_003  # the same noise at every validation of every run


@dataclass
class Loss:
    """What a task makes of one batch: the mean loss to minimise, named parts to log, and how much was in it."""

    value: Float[Tensor, ""]
    parts: dict[str, Tensor]  # scalars; detached by the loop
    num_tokens: int
    num_samples: int


@runtime_checkable
class Task(Protocol[Batch_contra]):
    """A model and what is asked of it. `model` is the plain module, also when `loss` runs a compiled wrapper of it."""

    flops_per_sample: float  # forward and backward; 0 when unknown

    @property
    def model(self) -> nn.Module: ...

    def loss(self, batch: Batch_contra, generator: torch.Generator) -> Loss:
        """Return the loss of one batch, every draw taken from `generator` (on the model's device)."""

    def validate(self, generator: torch.Generator) -> dict[str, Any]:
        """Return numbers and tables; "loss", when among them, decides which checkpoint is kept as the best.

        Called with the averaged weights, in evaluation mode, without gradients, with the same draws every time.
        """

    def preview(self, folder: Path, step: int) -> None:
        """Write something to look at into `folder`; called like `validate`."""


@runtime_checkable
class Batches(Protocol[Batch_co]):
    """An endless iterator whose position can be saved, such as `reelflow.data.loader.ShuffledBatches`."""

    def __next__(self) -> Batch_co: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...


@configuration
class TrainingConfig:
    """How long, how often and how exactly to train. An interval of 0 means never; the end of a run always validates
    and writes a checkpoint. Intervals may change when a run is resumed, nothing else may."""

    steps: int
    batch_size: int  # samples per batch of the loader; a step sees batch_size * accumulate
    optimizer: OptimizerConfig
    seed: int
    accumulate: int = 1
    ema_decay: float | None = 0.999
    precision: Literal["fp32", "bf16"] = "fp32"  # of the forward pass; weights and averages are float32
    log_every: int = 10
    validate_every: int = 0
    preview_every: int = 0
    checkpoint_every: int = 0
    keep_last: int = 2  # checkpoints, beside the best one

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "accumulate", "log_every", "keep_last"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("seed", "validate_every", "preview_every", "checkpoint_every"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name} must not be negative, got {getattr(self, name)}")
        if self.ema_decay is not None and not 0 <= self.ema_decay < 1:
            raise ConfigError(f"ema_decay must lie in [0, 1), got {self.ema_decay}")


MAY_CHANGE = {"log_every", "validate_every", "preview_every", "checkpoint_every", "keep_last"}


class Best(NamedTuple):
    """The checkpoint with the lowest validation loss, among those of steps that were also validated."""

    step: int
    loss: float


@dataclass(frozen=True)
class TrainingResult:
    """How a run ended, and where what it left can be found."""

    step: int
    interrupted: bool
    best: Best | None
    seconds: float  # of all sittings together
    skipped: int  # steps whose loss or gradient was not finite
    log: Path
    checkpoint: Path


def train(
    task: Task[Any],
    batches: Batches[Any],
    config: TrainingConfig,
    folder: Path,
    *,
    resume: bool = True,
    hidden: Hidden = is_matrix,
    on_step: Callable[[int], None] | None = None,
    console: Console | None = None,
) -> TrainingResult:
    """Train `task.model` for `config.steps` steps, continuing from the newest whole checkpoint in `folder`.

    Ctrl-C finishes the step at hand, writes a checkpoint and returns; a second one raises KeyboardInterrupt at once.
    `hidden` says which weights Muon moves. `on_step` hears the number of steps done. Progress goes to `console`
    (standard output by default; `Console(quiet=True)` for silence).

    Raises:
        ConfigError: the folder holds a run with another configuration, or, with `resume=False`, any run.
        CheckpointError: a checkpoint cannot be written, or belongs to another model.
        ReelflowError: the loss or the gradient was not finite for ten steps in a row.
    """
    run = _Run(task, batches, config, folder, hidden, console or Console())
    run.resume_or_begin(resume=resume)
    return run.go(on_step)


class _Run:
    """The state of one run. Everything a step depends on is either a pure function of the step or in `save`."""

    def __init__(
        self,
        task: Task[Any],
        batches: Batches[Any],
        config: TrainingConfig,
        folder: Path,
        hidden: Hidden,
        console: Console,
    ) -> None:
        self.task, self.batches, self.config, self.folder, self.console = task, batches, config, folder, console
        self.model = task.model
        self.optimizers = build_optimizers(self.model, config.optimizer, hidden=hidden)
        self.params = [p for optimizer in self.optimizers for group in optimizer.param_groups for p in group["params"]]
        self.device = self.params[0].device
        self.dtype = torch.bfloat16 if config.precision == "bf16" else torch.float32
        self.ema = None if config.ema_decay is None else Ema(self.model, config.ema_decay)
        self.generator = torch.Generator(self.device).manual_seed(config.seed)
        self.step = 0
        self.skipped = self.skipped_in_a_row = 0
        self.best: Best | None = None
        self.earlier_seconds = 0.0
        self.sums: dict[str, tuple[Tensor, int]] = {}  # of losses since the last log line, on the device, and how many

    # Beginning and continuing

    def resume_or_begin(self, *, resume: bool) -> None:
        found, torn = checkpoint.latest(self.folder)
        if not resume and (found or torn or (self.folder / "log.jsonl").exists()):
            raise ConfigError(f"{self.folder} already holds a run; resume it, or choose another folder")
        for line in torn:
            self.console.print(f"{line}; using the one before", highlight=False, markup=False, soft_wrap=True)
        if found is None:
            torch.manual_seed(self.config.seed)  # for draws inside the model that take no generator, such as dropout
            return
        state = checkpoint.read_state(found)
        try:
            _refuse_changes(state["config"], to_dict(self.config), found)
            checkpoint.restore(
                found,
                model=self.model,
                ema=self.ema,
                optimizers=self.optimizers,
                generators={"run": self.generator},
            )
            self.batches.load_state_dict(state["loader"])
            self.step, self.earlier_seconds = state["step"], state["seconds"]
            self.skipped, self.skipped_in_a_row = state["skipped"]
            self.best = None if state["best"] is None else Best(*state["best"])
            self.sums = {
                name: (torch.tensor(total, dtype=torch.float32, device=self.device), count)
                for name, (total, count) in state["summed"].items()
            }
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{found} was not written by this version's training loop: {error!r}") from error

    def save(self, seconds: float) -> Path:
        path = checkpoint.save(
            self.folder,
            self.step,
            model=self.model,
            ema=self.ema,
            optimizers=self.optimizers,
            generators={"run": self.generator},
            state={
                "config": to_dict(self.config),
                "loader": self.batches.state_dict(),
                "seconds": seconds,
                "skipped": [self.skipped, self.skipped_in_a_row],
                "best": self.best,
                "summed": {name: [total.item(), count] for name, (total, count) in self.sums.items()},
            },
        )
        best = [] if self.best is None else [self.best.step]
        checkpoint.prune(self.folder, keep_last=self.config.keep_last, keep=best)
        return path

    # One step

    def train_step(self, meter: Throughput) -> None:
        """Advance by one step; if the loss or the gradient is not finite, leave the weights as they are."""
        config, count = self.config, self.config.accumulate
        values: dict[str, Tensor] = {}
        for _ in range(count):
            start = time.perf_counter()
            batch = next(self.batches)
            meter.waited(time.perf_counter() - start)
            with self.autocast():
                loss = self.task.loss(batch, self.generator)
            (loss.value if count == 1 else loss.value / count).backward()
            meter.consumed(num_samples=loss.num_samples, num_tokens=loss.num_tokens)
            for name, value in {"loss": loss.value, **loss.parts}.items():
                part = value.detach().float() / count
                values[name] = values[name] + part if name in values else part
        grads = [p.grad for p in self.params if p.grad is not None]
        norm = values["grad_norm"] = torch.nn.utils.get_total_norm(grads, foreach=True)
        if torch.isfinite(norm + values["loss"]):  # the one wait for the device in a step
            if config.optimizer.grad_clip is not None:
                torch.nn.utils.clip_grads_with_norm_(self.params, config.optimizer.grad_clip, norm, foreach=True)
            set_learning_rates(self.optimizers, schedule(config.optimizer, self.step, config.steps))
            for optimizer in self.optimizers:
                optimizer.step()
            if self.ema is not None:
                self.ema.update(self.step)
            for name, x in values.items():
                total, times = self.sums.get(name, (torch.zeros_like(x), 0))
                self.sums[name] = total + x, times + 1
            self.skipped_in_a_row = 0
        else:
            self.skipped += 1
            self.skipped_in_a_row += 1
        for parameter in self.params:
            parameter.grad = None
        self.step += 1
        meter.stepped()
        if self.skipped_in_a_row == NOT_FINITE_LIMIT:
            raise ReelflowError(
                f"the loss or its gradient was not finite for {NOT_FINITE_LIMIT} steps in a row, up to step "
                f"{self.step}; the last checkpoint in {self.folder} is from before: lower lr or muon_lr, lengthen "
                f"warmup_steps, or use precision fp32"
            )

    def autocast(self) -> Any:
        return torch.autocast(self.device.type, self.dtype) if self.config.precision == "bf16" else nullcontext()

    # All steps

    def go(self, on_step: Callable[[int], None] | None) -> TrainingResult:
        config, start, first = self.config, time.perf_counter(), self.step
        peak = measure_peak_flops(self.dtype, self.device) if self.task.flops_per_sample else 0.0
        meter = Throughput(flops_per_sample=self.task.flops_per_sample, peak_flops=peak)
        log = RunLog(self.folder, resumed_from=self.step)
        display = Display(self.console, total_steps=config.steps, step=self.step)
        saved = self.folder / f"step-{self.step:08d}" if self.step else None
        self.model.train()
        try:
            with display, _interruptible() as interrupted:
                display.note(self.header(peak))
                stop = False
                while self.step < config.steps and not stop:
                    self.train_step(meter)
                    display.stepped(self.step)
                    last = self.step == config.steps
                    if last or self.step % config.log_every == 0:
                        seconds_per_step = (time.perf_counter() - start) / (self.step - first)
                        values = self.read(meter, eta_seconds=seconds_per_step * (config.steps - self.step))
                        log.write(self.step, "train", values)
                        display.report(self.step, _line(values))
                    stop = interrupted.is_set()
                    with meter.aside():
                        loss = None
                        if config.validate_every and (last or self.step % config.validate_every == 0):
                            loss = self.validate(log, display)
                        if config.preview_every and (last or self.step % config.preview_every == 0):
                            self.preview()
                        due = config.checkpoint_every and self.step % config.checkpoint_every == 0
                        if last or due or stop:
                            if loss is not None and (self.best is None or loss < self.best.loss):
                                self.best = Best(self.step, loss)
                            saved = self.save(self.earlier_seconds + time.perf_counter() - start)
                    if on_step is not None:
                        on_step(self.step)
        finally:
            log.close()
        assert saved is not None
        return TrainingResult(
            step=self.step,
            interrupted=self.step < config.steps,
            best=self.best,
            seconds=self.earlier_seconds + time.perf_counter() - start,
            skipped=self.skipped,
            log=log.path,
            checkpoint=saved,
        )

    def read(self, meter: Throughput, *, eta_seconds: float) -> dict[str, Any]:
        """Return the means since the last log line, the rates, and start both over."""
        values: dict[str, Any] = {name: total.item() / count for name, (total, count) in self.sums.items()}
        self.sums = {}
        return {
            **values,
            "lr_fraction": schedule(self.config.optimizer, self.step - 1, self.config.steps),
            "skipped": self.skipped,
            **meter.read(),
            "eta_seconds": eta_seconds,
            "peak_memory_bytes": peak_memory_bytes(),
        }

    def validate(self, log: RunLog, display: Display) -> float | None:
        """Log what the task finds, and return its "loss" if it names a finite one."""
        with self.evaluating():
            values = self.task.validate(torch.Generator(self.device).manual_seed(VALIDATION_SEED))
        log.write(self.step, "validation", values)
        numbers = {name: value for name, value in values.items() if isinstance(value, (int, float))}
        display.note(f"step {self.step:>7,}  validation  " + "  ".join(f"{k} {v:.4g}" for k, v in numbers.items()))
        loss = numbers.get("loss")
        return loss if loss is not None and math.isfinite(loss) else None

    def preview(self) -> None:
        folder = self.folder / "previews"
        folder.mkdir(exist_ok=True)
        with self.evaluating():
            self.task.preview(folder, self.step)

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Averaged weights, evaluation mode, no gradients; and nothing the training draws from is touched."""
        devices = [self.device] if self.device.type == "cuda" else []
        averaged = nullcontext() if self.ema is None else self.ema.swapped_in()
        self.model.eval()
        try:
            with torch.random.fork_rng(devices), averaged, torch.no_grad(), self.autocast():
                yield
        finally:
            self.model.train()

    def header(self, peak: float) -> str:
        counts = [sum(p.numel() for g in o.param_groups for p in g["params"]) for o in self.optimizers]
        shares = " + ".join(f"{n:,} by {type(o).__name__}" for o, n in zip(self.optimizers, counts, strict=True))
        text = f"{self.config.steps:,} steps in {self.config.precision} on {self.device}; weights moved: {shares}"
        if peak:
            text += (
                f"\nFLOP/s = {self.task.flops_per_sample:.3g} per sample (forward and backward) x samples/s; "
                f"peak = 2 n^3 / seconds of an n x n matrix product = {peak / 1e9:,.0f} GFLOP/s, measured now"
            )
        return text


def _line(values: Mapping[str, Any]) -> str:
    shown = [f"{name} {values[name]:.4g}" for name in ("loss", "grad_norm") if name in values]
    shown.append(f"{values['samples_per_second']:.3g} samples/s")
    if values["tokens_per_second"]:
        shown.append(f"{values['tokens_per_second']:,.0f} tokens/s")
    shown.append(f"data wait {values['data_wait']:.0%}")
    if "peak_share" in values:
        shown.append(f"{values['flops_per_second'] / 1e9:,.0f} GFLOP/s ({values['peak_share']:.0%} of peak)")
    if values["skipped"]:
        shown.append(f"{values['skipped']} skipped")
    return "  ".join([*shown, f"{duration(values['eta_seconds'])} left"])


def _refuse_changes(before: dict[str, Any], now: dict[str, Any], folder: Path) -> None:
    old, new = dict(_leaves(before)), dict(_leaves(now))
    changed = [
        f"{name} was {old.get(name)}, now {new.get(name)}"
        for name in {**old, **new}
        if name not in MAY_CHANGE and (name not in old or name not in new or old[name] != new[name])
    ]
    if changed:
        raise ConfigError(
            f"{folder} was trained with another configuration: {'; '.join(changed)}; resume with the old values, or "
            f"start a new run in another folder"
        )


def _leaves(values: dict[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{path}{name}.")
        else:
            yield path + name, value


@contextmanager
def _interruptible() -> Iterator[threading.Event]:
    """Turn the first Ctrl-C into a set event; the second raises KeyboardInterrupt as usual."""
    interrupted = threading.Event()
    if threading.current_thread() is not threading.main_thread():  # only the main thread may receive signals
        yield interrupted
        return

    def note(number: int, frame: FrameType | None) -> None:
        if interrupted.is_set():
            raise KeyboardInterrupt
        interrupted.set()

    before = signal.signal(signal.SIGINT, note)
    try:
        yield interrupted
    finally:
        signal.signal(signal.SIGINT, before)
