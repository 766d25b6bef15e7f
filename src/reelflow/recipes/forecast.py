"""What training a recipe takes, told before its first step: memory, time and money, stage by stage; and what to change.

Both networks' steps are walked without data (`reelflow.planning.step`); their operations are timed one by one on this machine
(`reelflow.planning.rates`). What a process takes beside its tensors, and what Python needs for a call, are measured on a
network of their own (`PROBE`), whatever the recipe.
"""

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from rich.console import Console
from torch import Tensor, nn

from reelflow.config import set_values
from reelflow.data.loader import ShuffledBatches
from reelflow.evaluation.perceptual import pyramid_distance
from reelflow.generation.sampling import count_evaluations
from reelflow.models.blocks import Dual, Single
from reelflow.models.dit import VideoDiT
from reelflow.models.vae import CausalVAE, Posterior
from reelflow.nn.patchify import token_grid
from reelflow.parallel.recompute import recompute_blocks
from reelflow.planning.memory import example
from reelflow.planning.rates import Rates, clock
from reelflow.planning.step import Precision, Step, Update, run_once, shaped, train_step, transformer_step
from reelflow.planning.walk import Kernel
from reelflow.recipes.recipe import Recipe, WorldData
from reelflow.recipes.world import world
from reelflow.training.autoencoder import AutoencoderTask, draw_crops, frame_latents
from reelflow.training.ema import Ema
from reelflow.training.flow import FlowTask, LatentBatch, inner_matrix
from reelflow.training.loop import Task, TrainingConfig, train
from reelflow.training.optim import Hidden, build_optimizers

__all__ = [
    "Change",
    "Forecast",
    "Rehearsal",
    "Stage",
    "changes",
    "forecast",
    "machine_bytes",
    "measured_rates",
    "probe",
    "process_bytes",
    "rehearse",
    "step_of",
    "trained_stage",
]

Trained = Literal["autoencoder", "transformer"]
ENCODED = 8  # clips that are encoded at a time
CLIPS = 1000  # of a folder, whose clips are not counted before it is read


@dataclass(frozen=True)
class Stage:
    """One stage of a run: how often something is done, how long that takes each time, and the most memory it needs."""

    name: str
    unit: str
    count: int
    seconds_each: float
    peak: int  # bytes, of the process as well
    flops_each: float = 0.0
    step: Step | None = None  # where something is trained

    @property
    def seconds(self) -> float:
        return self.count * self.seconds_each


@dataclass(frozen=True)
class Forecast:
    """All stages of a run, and what the process takes in all of them."""

    stages: tuple[Stage, ...]
    process: int

    @property
    def seconds(self) -> float:
        return sum(stage.seconds for stage in self.stages)

    @property
    def peak(self) -> int:
        return max(stage.peak for stage in self.stages)


@dataclass(frozen=True)
class Change:
    """Something that makes a stage smaller, and what the whole of it takes then."""

    stage: str
    text: str  # what to do; as PATH=VALUE where the recipe has a value for it
    peak: int
    seconds: float


def step_of(recipe: Recipe, trained: Trained) -> Step:
    """Walk a training step of one of a recipe's networks.

    Raises:
        ConfigError: the shapes do not fit each other.
    """
    if trained == "autoencoder":
        return _autoencoder_step(recipe)
    training, text = recipe.dit.training, recipe.text

    def prepare(model: VideoDiT) -> None:
        recompute_blocks(model.blocks, recipe.dit.parallel.recompute)

    return transformer_step(
        recipe.dit.model,
        recipe.latent_shape(recipe.clip),
        text.context_tokens,
        _update(training, inner_matrix),
        batch=training.batch_size,
        accumulate=training.accumulate,
        precision=training.precision,
        masked=bool(text.context_tokens),
        prepare=prepare,
    )


def _autoencoder_step(recipe: Recipe) -> Step:
    stage, training = recipe.vae, recipe.vae.training
    found: list[AutoencoderTask] = []

    def build() -> tuple[nn.Module, Callable[[], Tensor]]:
        task = _autoencoder_task(recipe, partial(shaped, partial(CausalVAE, stage.model)))
        found[:] = [task]
        generator = torch.Generator()
        frames, size = max(stage.loss.crops, key=lambda crop: crop[0] * crop[1] ** 2)

        def loss() -> Tensor:
            return task.loss(torch.ones(training.batch_size, 3, frames, size, size), generator).value

        return task.model, loss

    def update(model: nn.Module) -> Callable[[], object]:
        return _update(training, found[0].hidden)(model)

    return train_step(build, update, accumulate=training.accumulate, precision=training.precision)


def _update(training: TrainingConfig, hidden: Hidden) -> Update:
    """Return what the training loop does with gradients."""

    def update(model: nn.Module) -> Callable[[], None]:
        optimizers = build_optimizers(model, training.optimizer, hidden=hidden)
        ema = None if training.ema_decay is None else Ema(model, training.ema_decay)
        params = [p for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]]

        def move() -> None:
            with torch.no_grad():
                grads = [p.grad for p in params if p.grad is not None]
                torch.stack(torch._foreach_norm(grads))
                if training.optimizer.grad_clip is not None:
                    torch._foreach_mul_(grads, 0.5)
            for optimizer in optimizers:
                optimizer.step()
            if ema is not None:
                ema.update(0)

        return move

    return update


def forecast(recipe: Recipe, rates: Rates, process: int) -> Forecast:
    """Predict all stages of a run.

    Raises:
        ConfigError: the shapes do not fit each other.
    """
    stages = []
    if recipe.vae.tuned or (recipe.vae.pretrained is None and recipe.vae.model.encoder):
        stages.append(trained_stage(recipe, "autoencoder", rates, process))
    stages.append(_latents(recipe, rates, process))
    stages.append(trained_stage(recipe, "transformer", rates, process))
    stages.append(_samples(recipe, rates, process))
    return Forecast(tuple(stages), process)


def trained_stage(recipe: Recipe, trained: Trained, rates: Rates, process: int) -> Stage:
    """Predict the training of one of a recipe's networks, by one process."""
    step = step_of(recipe, trained)
    training = (recipe.vae if trained == "autoencoder" else recipe.dit).training
    return Stage(
        trained,
        "step",
        training.steps,
        rates.seconds(step.passes) + rates.seconds(step.moves, step.num_calls),
        process + step.run_peak(checkpoints=bool(training.checkpoint_every)),
        step=step,
    )


def _latents(recipe: Recipe, rates: Rates, process: int) -> Stage:
    clip, data = recipe.clip, recipe.data

    def encode() -> None:
        vae: Any = shaped(partial(CausalVAE, recipe.vae.model))
        with _cast(recipe.vae.training.precision):
            vae.encode(torch.ones(ENCODED, 3, clip.num_frames, clip.height, clip.width))

    peak, kernels, calls = run_once(encode)
    seconds = rates.seconds(kernels, calls) / ENCODED
    count = data.num_clips + data.num_validation if isinstance(data, WorldData) else CLIPS
    return Stage("latents", "clip", count, seconds, process + peak)


def _samples(recipe: Recipe, rates: Rates, process: int) -> Stage:
    """Predict one generated clip: an evaluation counts guidance's second one as another."""
    latents = recipe.latent_shape(recipe.clip)
    tokens = token_grid(latents, recipe.dit.model.patch).num_tokens
    evaluations = count_evaluations(recipe.sampling, recipe.dit.flow.parameterization, tokens)

    def evaluate() -> None:
        model = VideoDiT(recipe.dit.model)
        with _cast(recipe.sampling.precision):
            model(*example(recipe.dit.model, latents, recipe.text.context_tokens))

    def decode() -> None:
        vae: Any = shaped(partial(CausalVAE, recipe.vae.model))
        with _cast(recipe.sampling.precision):
            vae.decode(torch.ones(1, recipe.vae.model.latent_channels, *latents))

    peaks, seconds = [], 0.0
    for run, count in ((evaluate, evaluations), (decode, 1)):
        peak, kernels, calls = run_once(run)
        peaks.append(peak)
        seconds += count * rates.seconds(kernels, calls)
    return Stage("samples", "clip", 1, seconds, process + sum(peaks))


def _cast(precision: Precision) -> Any:
    return torch.autocast("cpu", torch.bfloat16) if precision == "bf16" else nullcontext()


# What to change


def changes(recipe: Recipe, trained: Trained, memory: int, rates: Rates, process: int) -> list[Change]:
    """Return what makes a network's training fit into so many bytes, the fastest first.

    Each is the least of its kind that fits: of smaller batches the largest, of processes the fewest. Processes are taken
    to have a machine as this one each, and to cost no time to talk to each other.
    """
    if memory <= process:
        return []
    name = "vae" if trained == "autoencoder" else "dit"
    training = getattr(recipe, name).training
    found: list[Change] = []

    def tried(assignments: Sequence[str]) -> bool:
        stage = trained_stage(set_values(recipe, assignments), trained, rates, process)
        if stage.peak <= memory:
            found.append(Change(trained, " ".join(assignments), stage.peak, stage.seconds))
        return stage.peak <= memory

    half = [f"{name}.training.precision=bf16"] if training.precision == "fp32" else []
    kept = trained == "transformer" and recipe.dit.parallel.recompute != "blocks"
    again = ["dit.parallel.recompute=blocks"] if kept else []
    for kind in dict.fromkeys(map(tuple, ([], half, again, [*half, *again]))):
        if kind and tried(kind):
            continue
        for parts in (n for n in range(2, training.batch_size + 1) if training.batch_size % n == 0):
            smaller = {"batch_size": training.batch_size // parts, "accumulate": training.accumulate * parts}
            if tried([*kind, *(f"{name}.training.{field}={value}" for field, value in smaller.items())]):
                break
    spread = _spread(recipe, memory, rates, process) if trained == "transformer" else None
    if spread is not None:
        found.append(spread)
    return sorted(found, key=lambda change: change.seconds)


def _spread(recipe: Recipe, memory: int, rates: Rates, process: int) -> Change | None:
    """Return the fewest processes that can share a transformer's weights and the batches of a step, and fit.

    Each has a share of weights, average, states and gradients, and one block's weights and gradients whole.
    """
    training = recipe.dit.training
    samples = training.batch_size * training.accumulate
    for size in (n for n in range(2, samples + 1) if samples % n == 0):
        batch = min(training.batch_size, samples // size)
        if samples // size % batch:
            continue
        part = replace(training, batch_size=batch, accumulate=samples // size // batch)
        step = step_of(replace(recipe, dit=replace(recipe.dit, training=part)), "transformer")
        block = 2 * step.weights // max(1, len(recipe.dit.model.layers))
        gradients = -(-step.gradients // size)
        own = replace(
            step,
            weights=-(-step.weights // size),
            average=-(-step.average // size),
            states=-(-step.states // size),
            gradients=gradients,
            activations=step.activations - step.gradients + gradients + block,
        )
        peak = process + own.run_peak(checkpoints=bool(part.checkpoint_every))
        if peak <= memory:
            seconds = rates.seconds(step.passes, step.num_calls) + rates.seconds(step.moves) / size
            deal = f"dit.parallel.mesh.shard={size} dit.training.batch_size={batch} dit.training.accumulate={samples // batch}"
            torchrun = f"torchrun --nproc-per-node {size}"
            return Change("transformer", f"{torchrun} and {deal}", peak, part.steps * seconds)
    return None


# Measured on this machine


def machine_bytes() -> int:
    """Return the memory of this machine, or of the container if that is less."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = Path("/sys/fs/cgroup/memory.max")
    text = limit.read_text().strip() if limit.is_file() else "max"
    return total if text == "max" else min(total, int(text))


class Rehearsal(NamedTuple):
    """A few steps of real training: seconds of each after the second, and the most that the process held, in bytes."""

    seconds: list[float]
    peak: int


def rehearse(recipe: Recipe, trained: Trained, *, steps: int = 4) -> Rehearsal:
    """Train one of a recipe's networks for a few steps on random data, as it would be trained.

    The peak is that of the whole process, so that only the first call of a process tells it.
    """
    task, batches = _rehearsed(recipe, trained)
    stage = recipe.vae if trained == "autoencoder" else recipe.dit
    training = replace(stage.training, steps=steps, validate_every=0, preview_every=0, checkpoint_every=0)
    hidden = task.hidden if isinstance(task, AutoencoderTask) else inner_matrix
    marks: list[float] = []
    with tempfile.TemporaryDirectory() as folder, batches:
        train(
            task,
            batches,
            training,
            Path(folder) / "run",
            hidden=hidden,
            on_step=lambda _: marks.append(clock()),
            console=Console(quiet=True),
        )
    seconds = [after - before for before, after in pairwise(marks[1:])]
    return Rehearsal(seconds, _peak_bytes())


def _rehearsed(recipe: Recipe, trained: Trained) -> tuple[Task[Any], ShuffledBatches[Any]]:
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    if trained == "autoencoder":
        vae_training, clip = recipe.vae.training, recipe.clip
        extents = (clip.num_frames, clip.height, clip.width, 3)

        def crops(rows: Tensor, draws: torch.Generator) -> Tensor:
            clips = torch.randint(0, 256, (len(rows), *extents), dtype=torch.uint8, generator=draws)
            return draw_crops(clips, replace(recipe.vae.loss, image_fraction=0.0), draws)

        batches = ShuffledBatches(vae_training.batch_size, vae_training.batch_size, crops, seed=0, prefetch=0)
        return _autoencoder_task(recipe, partial(CausalVAE, recipe.vae.model)), batches
    training = recipe.dit.training
    shape = (recipe.vae.model.latent_channels, *recipe.latent_shape(recipe.clip))

    def latents(rows: Tensor, draws: torch.Generator) -> LatentBatch:
        mean = torch.randn(len(rows), *shape, generator=draws)
        context = example(
            recipe.dit.model, (1, *recipe.dit.model.patch[1:]), recipe.text.context_tokens, batch=len(rows)
        )
        condition = context[2]
        if recipe.text.context_tokens:
            mask = torch.ones(len(rows), recipe.text.context_tokens, dtype=torch.bool)
            mask[1:, -1] = False
            condition = replace(condition, context_mask=mask)
        return LatentBatch(Posterior(mean, torch.full_like(mean, -6.0)), condition)

    null = latents(torch.zeros(1), generator).condition
    flow = replace(recipe.dit.flow, given_fraction=0.0, image_fraction=0.0)
    task = FlowTask(VideoDiT(recipe.dit.model), flow, null=null, validation=latents(torch.zeros(1), generator))
    return task, ShuffledBatches(training.batch_size, training.batch_size, latents, seed=0, prefetch=0)


def _autoencoder_task(recipe: Recipe, make: Callable[[], Any]) -> AutoencoderTask:
    stage, clip = recipe.vae, recipe.clip
    reference = frame_latents(make(), stage.model.temporal_stride) if stage.loss.identity else None
    vae = make()
    frames = torch.zeros(1, clip.num_frames, clip.height, clip.width, 3, dtype=torch.uint8)
    return AutoencoderTask(vae, stage.loss, validation=frames, perceptual=pyramid_distance, reference=reference)


def _peak_bytes() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def probe_recipe(precision: Precision) -> Recipe:
    """Return a recipe with a transformer to measure a process with, whatever the recipe in question."""
    base = world()
    model = replace(base.dit.model, dim=256, num_heads=4, rope=(16, 24, 24), layers=(Dual(), Single()))
    training = replace(base.dit.training, precision=precision, batch_size=12, checkpoint_every=0)
    return replace(base, dit=replace(base.dit, model=model, training=training))


def probe(precision: Precision) -> int:
    """Train a small network here, and return what this process took at its peak beside what its tensors did."""
    recipe = probe_recipe(precision)
    measured = rehearse(recipe, "transformer").peak
    return measured - step_of(recipe, "transformer").run_peak(checkpoints=False)


def process_bytes(precision: Precision) -> int:
    """Return what a training process takes beside its tensors, as found by `probe` in a process of its own."""
    lines = (
        "import torch",
        "from reelflow.cli.main import keep_freed_memory",
        "from reelflow.recipes.forecast import probe",
        "keep_freed_memory()",
        f"torch.set_num_threads({torch.get_num_threads()})",
        f"print(probe({precision!r}))",
    )
    told = subprocess.run([sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True, check=True)
    return int(told.stdout.split()[-1])


def measured_rates(precision: Precision = "fp32") -> Rates:
    """Return the rates of this machine's operations, with what a call costs found on the step of a small network."""
    base = probe_recipe(precision)
    small = replace(base.dit.model, dim=32, num_heads=2, rope=(4, 6, 6))
    recipe = replace(base, dit=replace(base.dit, model=small, training=replace(base.dit.training, batch_size=1)))
    task, batches = _rehearsed(recipe, "transformer")
    batch, generator = next(batches), torch.Generator().manual_seed(0)
    move = _update(recipe.dit.training, inner_matrix)(task.model)

    def step() -> None:
        with _cast(precision):
            value = task.loss(batch, generator).value
        value.backward()
        move()
        for parameter in task.model.parameters():
            parameter.grad = None

    walked = step_of(recipe, "transformer")
    kernels: dict[Kernel, int | float] = {**walked.passes}
    for kernel, count in walked.moves.items():
        kernels[kernel] = kernels.get(kernel, 0) + count
    return Rates.measure(step, kernels, round(walked.num_calls))
