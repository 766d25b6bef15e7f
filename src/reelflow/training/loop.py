"""One training loop that knows no model and no data.

A task brings the model and its loss, a loader brings batches, and the loop brings everything that is the same for
all of them: steps, averages, validation, logs, checkpoints. A run that is killed and started again ends with the same
weights, bit for bit, as one that was left alone: whatever a step depends on is in the checkpoint.

A step is `accumulate` batches, which are dealt to as many processes as there are. All that is drawn for a batch depends
on its number alone, so every number of processes learns the same, but for the order in which floats are summed. (To draw
for a large batch everywhere, and keep a part, would have each process read all of it; to draw for each sample by itself
would be slow.) The loss is the mean over the step's samples, wherever they were.
"""

import json
import math
import signal
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any, Literal, NamedTuple, Protocol, TypeVar, runtime_checkable

import torch
from jaxtyping import Float
from rich.console import Console
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from reelflow.config import configuration, to_dict
from reelflow.errors import CheckpointError, ConfigError, ReelflowError
from reelflow.parallel.device import moved
from reelflow.parallel.mesh import Workers, alone
from reelflow.parallel.shard import norms
from reelflow.training import checkpoint
from reelflow.training.ema import Ema
from reelflow.training.guard import Guard, Watch, seed_draws, write_batch
from reelflow.training.meters import (
    Display,
    RunLog,
    Throughput,
    duration,
    measure_peak_flops,
    peak_device_bytes,
    peak_memory_bytes,
)
from reelflow.training.optim import (
    Hidden,
    OptimizerConfig,
    build_optimizers,
    is_matrix,
    schedule,
    set_learning_rates,
)
from reelflow.training.origin import differences, origin
from reelflow.training.parts import here
from reelflow.training.peers import Peers

__all__ = ["Batches", "Best", "Dealt", "Loss", "Skipping", "Task", "TrainingConfig", "TrainingResult", "train"]

Batch_co = TypeVar("Batch_co", covariant=True)
Batch_contra = TypeVar("Batch_contra", contravariant=True)
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
        """Return the loss of one batch, every draw taken from `generator` (the CPU's, whatever the model's device)."""

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


@runtime_checkable
class Dealt(Protocol):
    """Batches that can be dealt; of others every process reads all, and uses its own."""

    def deal(self, part: int, parts: int) -> None:
        """From now on hand out only batches `part`, `part` + `parts`, ...; the position still counts all of them."""


@runtime_checkable
class Skipping(Protocol):
    """Batches that leave out what cannot be read; their state has under "skipped" what that was, and how often."""

    skipped: dict[str, int]


@configuration
class TrainingConfig:
    """How long, how often and how exactly to train. An interval of 0 means never; the end of a run always validates
    and writes a checkpoint. Intervals, the guard and wandb may change when a run is resumed, nothing else may."""

    steps: int
    batch_size: int  # samples per batch of the loader; a step sees batch_size * accumulate, on all processes together
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
    guard: Guard = Guard()
    wandb: str | None = None  # project of Weights & Biases that the log goes to as well

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "accumulate", "log_every", "keep_last"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("seed", "validate_every", "preview_every", "checkpoint_every"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name} must not be negative, got {getattr(self, name)}")
        if self.ema_decay is not None and not 0 <= self.ema_decay < 1:
            raise ConfigError(f"ema_decay must lie in [0, 1), got {self.ema_decay}")

    def check(self, data_size: int) -> None:
        """Refuse a step whose batches cannot be dealt evenly to `data_size` readers; needs no process group.

        Raises:
            ConfigError: `accumulate` is not a multiple of `data_size`.
        """
        if self.accumulate % data_size:
            samples = self.batch_size * self.accumulate
            fitting = [n for n in range(data_size, samples + 1, data_size) if samples % n == 0]
            nearest = min(fitting, key=lambda n: abs(n - self.accumulate), default=None)
            way = (
                f"accumulate={data_size}"
                if nearest is None
                else f"batch_size={samples // nearest}, accumulate={nearest}, which are as many samples"
            )
            raise ConfigError(
                f"{data_size} processes cannot share the accumulate={self.accumulate} batches of a step evenly; "
                f"nearest: {way}"
            )


MAY_CHANGE = {"log_every", "validate_every", "preview_every", "checkpoint_every", "keep_last", "wandb"}
MAY_CHANGE |= {"guard.spike", "guard.window", "guard.patience"}


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
    skipped: int  # steps that the guard did not let pass
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
    workers: Workers | None = None,
    data: str = "",
    on_step: Callable[[int], None] | None = None,
    console: Console | None = None,
) -> TrainingResult:
    """Train `task.model` for `config.steps` steps, continuing from the newest whole checkpoint in `folder`.

    Ctrl-C finishes the step at hand, writes a checkpoint and returns; a second one raises KeyboardInterrupt at once.
    `hidden` says which weights Muon moves. `on_step` hears the number of steps done. Progress goes to `console`
    (standard output by default; `Console(quiet=True)` for silence).

    With several `workers` every process calls this, its model spread already (`reelflow.parallel`); the first alone
    speaks and writes the log. `data` is a hash of the data: when a run is resumed, what changed of data, code and
    libraries is said.

    Raises:
        ConfigError: the folder holds a run with another configuration, or, with `resume=False`, any run; or a step's
            batches cannot be dealt evenly.
        CheckpointError: a checkpoint cannot be written, or belongs to another model.
        ReelflowError: the guard stopped the run, or another process was lost, which is named.
    """
    workers = workers or alone(next(task.model.parameters()).device)
    config.check(workers.data_size)
    console = (console or Console()) if workers.is_first else Console(quiet=True)
    with workers.naming_failures():
        run = _Run(task, batches, config, folder, hidden, workers, console)
        run.resume_or_begin(data, resume=resume)
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
        workers: Workers,
        console: Console,
    ) -> None:
        self.task, self.batches, self.config, self.folder, self.console = task, batches, config, folder, console
        self.workers, self.peers = workers, Peers(workers)
        self.saver = checkpoint.Saver(folder, workers)
        self.model = task.model
        self.optimizers = build_optimizers(self.model, config.optimizer, hidden=hidden)
        self.params = [p for optimizer in self.optimizers for group in optimizer.param_groups for p in group["params"]]
        names = {id(parameter): name for name, parameter in self.model.named_parameters()}
        self.blocks = [_block(names[id(parameter)]) for parameter in self.params]
        self.device = workers.device
        self.dtype = torch.bfloat16 if config.precision == "bf16" else torch.float32
        self.ema = None if config.ema_decay is None else Ema(self.model, config.ema_decay)
        self.generator = torch.Generator()  # on the CPU: the same draws on every device
        self.watch = Watch(config.guard)
        self.step = 0
        self.stop = False
        self.best: Best | None = None
        self.earlier_seconds = 0.0
        self.sums: dict[str, tuple[float, float]] = {}  # since the last log line: totals and what to divide them by,
        self.parts: dict[str, tuple[float, float]] = {}  # of all processes; and those of this one
        self.norms: dict[str, float] = {}  # of the last step's gradient, by block
        self.dealt = workers.data_size == 1
        if not self.dealt and isinstance(batches, Dealt):
            batches.deal(workers.data_rank, workers.data_size)
            self.dealt = True

    # Beginning and continuing

    def resume_or_begin(self, data: str, *, resume: bool) -> None:
        made_by = self.peers.first(lambda: origin(data=data, world_size=self.workers.world_size))
        found, torn = self.peers.first(lambda: checkpoint.latest(self.folder))
        exists = self.peers.first(lambda: (self.folder / "log.jsonl").exists())
        if not resume and (found or torn or exists):
            raise ConfigError(f"{self.folder} already holds a run; resume it, or choose another folder")
        for line in torn:
            self.say(f"{line}; using the one before")
        self.origin = made_by
        if found is None:
            return
        state = self.peers.together(lambda: checkpoint.read_state(found))
        for line in differences(state.get("origin", {}), made_by):
            self.say(f"since {found.name}: {line}")
        self.peers.together(partial(self.restore, found, state))

    def restore(self, found: Path, state: dict[str, Any]) -> None:
        try:
            _refuse_changes(state["config"], to_dict(self.config), found)
            checkpoint.restore(found, model=self.model, ema=self.ema, optimizers=self.optimizers, workers=self.workers)
            self.batches.load_state_dict(state["loader"])
            self.step, self.earlier_seconds = state["step"], state["seconds"]
            self.watch.load_state_dict(state["watch"])
            self.best = None if state["best"] is None else Best(*state["best"])
            self.sums = {name: (total, count) for name, (total, count) in state["sums"].items()}
            parts = {name: (total, count) for name, (total, count) in state["parts"].items()}
            self.parts = parts if self.workers.is_first else {}
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{found} was not written by this version's training loop: {error!r}") from error

    def save(self, seconds: float) -> Path:
        return self.saver.save(
            self.step,
            model=self.model,
            ema=self.ema,
            optimizers=self.optimizers,
            state={
                "config": to_dict(self.config),
                "origin": self.origin,
                "loader": self.batches.state_dict() | self.unreadable(),
                "seconds": seconds,
                "watch": self.watch.state_dict(),
                "best": self.best,
                "sums": self.sums,
                "parts": self.all_parts(),
            },
            keep_last=self.config.keep_last,
            keep=[] if self.best is None else [self.best.step],
        )

    def say(self, text: str) -> None:
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    # One step

    def train_step(self, meter: Throughput, interrupted: threading.Event) -> None:
        """Advance by one step; if the guard refuses it, leave the weights as they are."""
        config, workers = self.config, self.workers
        usual = config.batch_size * config.accumulate * workers.config.sequence  # samples, one for each who counts them
        alone_in_step = config.accumulate == workers.world_size == 1
        total = torch.zeros(3, dtype=torch.float64)  # the loss, samples, tokens
        kept: dict[int, Any] = {}
        parts: list[tuple[dict[str, Tensor], int]] = []
        for number in self.numbers():
            start = time.perf_counter()
            batch = self.next_batch(number)
            meter.waited(time.perf_counter() - start)
            seed_draws(self.generator, config.seed, number)
            with self.autocast():
                loss = self.task.loss(batch, self.generator)
            (loss.value if alone_in_step else loss.value / (usual / loss.num_samples)).backward()
            told = {"loss": loss.value, **loss.parts}
            parts.append(({name: x.detach() for name, x in told.items()}, loss.num_samples))
            total[1:3] += torch.tensor([loss.num_samples, loss.num_tokens])
            if self.watch.last_chance:
                kept[number] = batch
        self.sum_gradients()
        grads = [p.grad for p in self.params if p.grad is not None]
        each = norms(grads, workers)
        # The first wait for the device, which by now knows all that it is to do.
        means = [_floats(values) for values, _ in parts]
        total[0] = sum(values["loss"] * count for values, (_, count) in zip(means, parts, strict=True))
        value, samples, tokens = (total if workers.mesh is None else workers.sum(total.to(workers.device))).tolist()
        self.stop = workers.agree(interrupted.is_set())
        meter.consumed(
            num_samples=round(samples / workers.config.sequence), num_tokens=round(tokens / workers.config.sequence)
        )
        scale = 1.0 if alone_in_step else usual / samples  # batches may be larger or smaller than usual
        each = scale * each.cpu()
        loss_value, norm = value / samples, torch.linalg.vector_norm(each).item()
        refused = self.watch.refuses(loss_value, norm)
        if not refused:
            clip = config.optimizer.grad_clip
            if clip is not None:
                scale *= min(1.0, clip / (norm + 1e-6))
            if scale != 1:
                torch._foreach_mul_(here(grads), scale)
            set_learning_rates(self.optimizers, schedule(config.optimizer, self.step, config.steps))
            for optimizer in self.optimizers:
                optimizer.step()
            if self.ema is not None:
                self.ema.update(self.step)
            _add(self.sums, {"loss": loss_value, "grad_norm": norm}, 1.0)
            for values, (_, count) in zip(means, parts, strict=True):
                _add(self.parts, {name: x for name, x in values.items() if name != "loss"}, float(count))
            if (self.step + 1) % config.log_every == 0:
                blocks = [block for block, p in zip(self.blocks, self.params, strict=True) if p.grad is not None]
                self.norms = _by_block(blocks, each)
        for parameter in self.params:
            parameter.grad = None
        self.step += 1
        meter.stepped()
        if self.watch.in_a_row == config.guard.patience:
            self.give_up(refused, kept)

    def sum_gradients(self) -> None:
        """Add up the gradients of weights that every process has whole; where weights are spread, FSDP has done so."""
        plain = [p for p in self.params if not isinstance(p, DTensor)]
        if self.workers.mesh is None or not plain:
            return
        given = self.workers.sum(torch.tensor([float(p.grad is not None) for p in plain], device=self.device))
        found = [p for p, count in zip(plain, given.tolist(), strict=True) if count]
        for p in found:
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        grads = [p.grad for p in found if p.grad is not None]
        summed = self.workers.sum(torch.cat([grad.flatten() for grad in grads]))
        for grad, part in zip(grads, summed.split([grad.numel() for grad in grads]), strict=True):
            grad.copy_(part.view(grad.shape))

    def numbers(self) -> range:
        """Return which of the run's batches this process takes in the step at hand."""
        first, count = self.step * self.config.accumulate, self.config.accumulate
        return range(first + self.workers.data_rank, first + count, self.workers.data_size)

    def next_batch(self, number: int) -> Any:
        if self.dealt:
            return next(self.batches)
        rank, size = self.workers.data_rank, self.workers.data_size
        return [next(self.batches) for _ in range(size)][rank]

    def all_parts(self) -> dict[str, tuple[float, float]]:
        """Return the sums of the loss's parts over all processes."""
        merged: dict[str, tuple[float, float]] = {}
        for parts in self.peers.gather(self.parts):
            for name, (total, count) in parts.items():
                before = merged.get(name, (0.0, 0.0))
                merged[name] = before[0] + total, before[1] + count
        return merged

    def give_up(self, why: str, kept: Mapping[int, Any]) -> None:
        """End the run, and leave what is needed to see the last step again."""
        folder, workers = self.folder / f"stopped-{self.step:08d}", self.workers
        self.peers.together(lambda: folder.mkdir(parents=True, exist_ok=True))
        checkpoint.write_weights(folder / checkpoint.WEIGHTS, self.model, workers, self.peers)
        batches = sorted({number for numbers in self.peers.gather(list(kept)) for number in numbers})

        def write() -> None:
            if workers.rank % (workers.config.sequence * workers.config.tensor) == 0:
                for number, batch in kept.items():
                    write_batch(folder / f"batch-{number}.safetensors", batch)
            if workers.is_first:
                told = {"step": self.step, "why": why, "seed": self.config.seed, "batches": batches}
                (folder / "stopped.json").write_text(json.dumps({**told, "precision": self.config.precision}))

        self.peers.together(write)
        raise ReelflowError(
            f"{self.config.guard.patience} steps in a row, up to step {self.step}, were left out; of the last, {why}. Its "
            f"batches and the weights are in {folder} (reelflow.training.guard.replay shows one again); the last checkpoint in "
            f"{self.folder} is from before: lower lr or muon_lr, lengthen warmup_steps, use precision fp32, or widen guard"
        )

    def autocast(self) -> Any:
        return torch.autocast(self.device.type, self.dtype) if self.config.precision == "bf16" else nullcontext()

    # All steps

    def go(self, on_step: Callable[[int], None] | None) -> TrainingResult:
        config, start, first = self.config, time.perf_counter(), self.step
        measured = self.task.flops_per_sample and self.workers.is_first
        peak = self.workers.world_size * measure_peak_flops(self.dtype, self.device) if measured else 0.0
        meter = Throughput(flops_per_sample=self.task.flops_per_sample, peak_flops=peak)
        self.folder.mkdir(parents=True, exist_ok=True)
        log = None
        if self.workers.is_first:
            log = RunLog(self.folder, resumed_from=self.step, wandb=config.wandb, config=to_dict(config))
        display = Display(self.console, total_steps=config.steps, step=self.step)
        saved = self.folder / f"step-{self.step:08d}" if self.step else None
        self.model.train()
        try:
            with display, _interruptible() as interrupted:
                display.note(self.header(peak))
                while self.step < config.steps and not self.stop:
                    self.train_step(meter, interrupted)
                    display.stepped(self.step)
                    last = self.step == config.steps
                    if last or self.step % config.log_every == 0:
                        seconds_per_step = (time.perf_counter() - start) / (self.step - first)
                        values = self.read(meter, eta_seconds=seconds_per_step * (config.steps - self.step))
                        if log is not None:
                            log.write(self.step, "train", values)
                        display.report(self.step, _line(values))
                    with meter.aside():
                        loss = None
                        if config.validate_every and (last or self.step % config.validate_every == 0):
                            loss = self.validate(log, display)
                        if config.preview_every and (last or self.step % config.preview_every == 0):
                            self.preview()
                        due = config.checkpoint_every and self.step % config.checkpoint_every == 0
                        if last or due or self.stop:
                            if loss is not None and (self.best is None or loss < self.best.loss):
                                self.best = Best(self.step, loss)
                            saved = self.save(self.earlier_seconds + time.perf_counter() - start)
                    if on_step is not None:
                        on_step(self.step)
            self.saver.wait()
        finally:
            with suppress(Exception):  # what came before is the reason; the checkpoint at hand is finished if it can be
                self.saver.wait()
            if log is not None:
                log.close()
        assert saved is not None
        return TrainingResult(
            step=self.step,
            interrupted=self.step < config.steps,
            best=self.best,
            seconds=self.earlier_seconds + time.perf_counter() - start,
            skipped=self.watch.skipped,
            log=self.folder / "log.jsonl",
            checkpoint=saved,
        )

    def read(self, meter: Throughput, *, eta_seconds: float) -> dict[str, Any]:
        """Return the means since the last log line, the rates, and start both over."""
        sums = {**self.sums, **self.all_parts()}
        by_block = {f"grad_norm/{block}": norm for block, norm in self.norms.items()}
        self.sums, self.parts, self.norms = {}, {}, {}
        return {
            **{name: total / count for name, (total, count) in sums.items()},
            **by_block,
            "lr_fraction": schedule(self.config.optimizer, self.step - 1, self.config.steps),
            "skipped": self.watch.skipped,
            **{f"samples_{name}": sum(found.values()) for name, found in self.unreadable().items()},
            **meter.read(),
            "eta_seconds": eta_seconds,
            "peak_memory_bytes": peak_memory_bytes(),
            **peak_device_bytes(self.device),
        }

    def unreadable(self) -> dict[str, dict[str, int]]:
        """Return what could not be read and how often, of all processes, each batch counted once."""
        if not isinstance(self.batches, Skipping):
            return {}
        rank, alike = self.workers.rank, self.workers.config.sequence * self.workers.config.tensor
        counts = rank % alike == 0 if self.dealt else rank == 0
        total: Counter[str] = Counter()
        for found in self.peers.gather(self.batches.skipped if counts else {}):
            total.update(found)
        return {"skipped": dict(total)}

    def validate(self, log: RunLog | None, display: Display) -> float | None:
        """Log what the task finds, and return its "loss" if it names a finite one."""
        with self.evaluating():
            values = self.task.validate(torch.Generator().manual_seed(VALIDATION_SEED))
        if log is not None:
            log.write(self.step, "validation", values)
        numbers = {name: value for name, value in values.items() if isinstance(value, (int, float))}
        display.note(f"step {self.step:>7,}  validation  " + "  ".join(f"{k} {v:.4g}" for k, v in numbers.items()))
        loss = numbers.get("loss")
        return loss if loss is not None and math.isfinite(loss) else None

    def preview(self) -> None:
        """Let the task show something; all processes take part, and what the first leaves is kept."""
        with tempfile.TemporaryDirectory() as elsewhere, self.evaluating():
            folder = self.folder / "previews" if self.workers.is_first else Path(elsewhere)
            folder.mkdir(exist_ok=True)
            self.task.preview(folder, self.step)

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Averaged weights, evaluation mode, no gradients; and nothing the training draws from is touched."""
        on_cpu = self.device.type == "cpu"
        draws = torch.random.fork_rng(
            [] if on_cpu else [self.device], device_type="cuda" if on_cpu else self.device.type
        )
        averaged = nullcontext() if self.ema is None else self.ema.swapped_in()
        self.model.eval()
        try:
            with draws, averaged, torch.no_grad(), self.autocast():
                yield
            for module in self.model.modules():
                if isinstance(module, FSDPModule):  # drop what was gathered of the averages
                    module.reshard()
        finally:
            self.model.train()

    def header(self, peak: float) -> str:
        counts = [sum(p.numel() for g in o.param_groups for p in g["params"]) for o in self.optimizers]
        shares = " + ".join(f"{n:,} by {type(o).__name__}" for o, n in zip(self.optimizers, counts, strict=True))
        text = f"{self.config.steps:,} steps in {self.config.precision} on {self.device}; weights moved: {shares}"
        if self.workers.world_size > 1:
            text += f"; {self.workers.world_size} processes read {self.workers.data_size} batches at a time"
        if peak:
            many = f" x {self.workers.world_size} processes" if self.workers.world_size > 1 else ""
            text += (
                f"\nFLOP/s = {self.task.flops_per_sample:.3g} per sample (forward and backward) x samples/s; "
                f"peak = 2 n^3 / seconds of an n x n matrix product{many} = {peak / 1e9:,.0f} GFLOP/s, measured now"
            )
        return text


def _floats(values: Mapping[str, Tensor]) -> dict[str, float]:
    """Fetch scalars from the device, in one go."""
    device = values["loss"].device
    scalars = (x.full_tensor() if isinstance(x, DTensor) else moved(x, device) for x in values.values())
    return dict(zip(values, torch.stack([x.float() for x in scalars]).tolist(), strict=True))


def _add(sums: dict[str, tuple[float, float]], values: Mapping[str, float], weight: float) -> None:
    for name, value in values.items():
        total, count = sums.get(name, (0.0, 0.0))
        sums[name] = total + weight * value, count + weight


def _block(name: str) -> str:
    """Return the block a parameter belongs to: its path up to the first number, or the first part of it."""
    parts = name.replace("/", ".").split(".")
    number = next((place for place, part in enumerate(parts) if part.isdigit()), 0)
    return ".".join(parts[: number + 1])


def _by_block(blocks: Sequence[str], norms: Tensor) -> dict[str, float]:
    squares: dict[str, float] = {}
    for block, norm in zip(blocks, norms.tolist(), strict=True):
        squares[block] = squares.get(block, 0.0) + norm**2
    return {block: math.sqrt(square) for block, square in squares.items()}


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
    if values.get("samples_skipped"):
        shown.append(f"{values['samples_skipped']} samples unreadable")
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
