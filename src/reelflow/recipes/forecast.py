"""What a recipe's run takes, told before it begins: memory, time and money, stage by stage; and what to change.

Training steps, what is evaluated without gradients, and what is encoded are walked without data (`reelflow.planning.step`);
operations are timed one by one on this machine (`reelflow.planning.rates`). What a process takes beside its tensors, what
Python needs for a call, and rendering and decoding are measured (`reelflow.recipes.rehearsal`).

    resident = process + the most that this stage or an earlier one put on the heap + pages of large tensors + mapped files
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from reelflow.config import set_values
from reelflow.data.store import SHARD_BYTES
from reelflow.evaluation.perceptual import pyramid_distance
from reelflow.evaluation.rebuilt import measure_rebuilt
from reelflow.generation.sampling import count_evaluations
from reelflow.models.dit import DiTConfig, VideoDiT
from reelflow.models.vae import CausalVAE
from reelflow.nn.patchify import token_grid
from reelflow.parallel.recompute import recompute_blocks
from reelflow.planning.memory import example
from reelflow.planning.rates import Rates
from reelflow.planning.step import (
    Batch,
    Once,
    Precision,
    Step,
    Update,
    run_deep,
    run_once,
    shaped,
    train_step,
    transformer,
    transformer_step,
)
from reelflow.recipes.recipe import FolderData, Recipe
from reelflow.recipes.sets import ShardsData
from reelflow.training.autoencoder import AutoencoderTask, frame_latents, to_float
from reelflow.training.ema import Ema
from reelflow.training.flow import NUM_BINS, inner_matrix
from reelflow.training.loop import TrainingConfig
from reelflow.training.optim import Hidden, build_optimizers

__all__ = [
    "CLIPS",
    "Change",
    "Forecast",
    "Media",
    "Stage",
    "autoencoder_task",
    "cast",
    "changes",
    "forecast",
    "step_of",
    "trained_stage",
    "update_of",
]

Trained = Literal["autoencoder", "transformer"]
ENCODED = 8  # clips that are encoded at a time
MEASURED = 256  # clips that an autoencoder's statistics are of, at most
VALIDATED, SHOWN, PRIOR = 32, 4, 16  # clips at a time
CLIPS = 1000  # of a folder that is not there


@dataclass(frozen=True)
class Stage:
    """One kind of work in a run: how often it is done, how long that takes each time, and the most memory it needs."""

    name: str
    unit: str
    count: int
    seconds_each: float
    peak: int  # bytes, of the process as well
    pages: int = 0  # of them, of tensors so large that they have pages of their own, which go when they go
    files: int = 0  # bytes of the files it maps, beside the peak: the system takes them back where memory is short
    step: Step | None = None  # where something is trained
    apart: bool = False  # in a process of its own, after the run

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
    def resident(self) -> tuple[int, ...]:
        """Bytes that the process has in memory at each stage's peak: what was freed stays, and mapped files count."""
        together = [0 if stage.apart else stage.peak - stage.pages for stage in self.stages]
        kept = accumulate(together, max)
        return tuple(
            max(stage.peak, 0 if stage.apart else heap + stage.pages) + stage.files
            for stage, heap in zip(self.stages, kept, strict=True)
        )

    @property
    def fullest(self) -> int:
        """Which stage has the most in memory."""
        return max(range(len(self.stages)), key=lambda index: self.resident[index])


class Media(NamedTuple):
    """What rendering and decoding took here, on a few clips in a process of their own: seconds of each, and peaks."""

    num_clips: int  # that there are, as far as these tell
    render_seconds: float
    render_peak: int
    decode_seconds: float
    decode_peak: int
    kept: int  # bytes that the process had more of after it all


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
        update_of(training, inner_matrix),
        batch=training.batch_size,
        accumulate=training.accumulate,
        precision=training.precision,
        masked=bool(text.context_tokens),
        prepare=prepare,
    )


def _autoencoder_step(recipe: Recipe) -> Step:
    stage, training = recipe.vae, recipe.vae.training
    found: list[AutoencoderTask] = []

    def build() -> tuple[nn.Module, Sequence[Batch]]:
        task = autoencoder_task(recipe, partial(shaped, partial(CausalVAE, stage.model)))
        found[:] = [task]
        generator = torch.Generator()
        frames, size = max(stage.loss.crops, key=lambda crop: crop[0] * crop[1] ** 2)

        def loss(batch: int, frames: int) -> Tensor:
            return task.loss(torch.ones(batch, 3, frames, size, size), generator).value

        images = stage.loss.image_fraction if frames > 1 else 0.0
        clips = Batch(partial(loss, training.batch_size, frames), 1 - images)
        if not images:
            return task.model, [clips]
        # As many pixels, but more latents: time does not divide a single frame.
        return task.model, [Batch(partial(loss, training.batch_size * frames, 1), images), clips]

    def update(model: nn.Module) -> Callable[[], object]:
        return update_of(training, found[0].hidden)(model)

    return train_step(build, update, accumulate=training.accumulate, precision=training.precision)


def update_of(training: TrainingConfig, hidden: Hidden) -> Update:
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


def autoencoder_task(recipe: Recipe, make: Callable[[], Any], *, num_validation: int = 1) -> AutoencoderTask:
    """Return the task that an autoencoder made by `make` learns, with clips of nothing set aside."""
    stage, clip = recipe.vae, recipe.clip
    reference = frame_latents(make(), stage.model.temporal_stride) if stage.loss.identity else None
    vae = make()
    frames = torch.zeros(num_validation, clip.num_frames, clip.height, clip.width, 3, dtype=torch.uint8)
    return AutoencoderTask(
        vae,
        stage.loss,
        validation=frames,
        perceptual=pyramid_distance,
        reference=reference,
        measure=partial(measure_rebuilt, perceptual=pyramid_distance),
    )


def cast(precision: Precision) -> Any:
    """Return what a forward pass in a precision is done in."""
    return torch.autocast("cpu", torch.bfloat16) if precision == "bf16" else nullcontext()


def forecast(recipe: Recipe, rates: Rates, process: int, media: Media | None = None) -> Forecast:
    """Predict all stages of a run; without `media`, neither rendering nor decoding.

    Raises:
        ConfigError: the shapes do not fit each other.
    """
    process += 0 if media is None else media.kept
    return Forecast(tuple(_Predicted(recipe, rates, process, media).stages()), process)


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
        step.pages,
        step=step,
    )


@dataclass(frozen=True)
class _Predicted:
    recipe: Recipe
    rates: Rates
    process: int
    media: Media | None

    def stages(self) -> Iterator[Stage]:
        recipe = self.recipe
        if isinstance(recipe.data, ShardsData):
            yield from self.transformer()
        else:
            if self.media is not None:
                yield from self.pictures(self.media)
            if self.trains_autoencoder:
                yield from self.autoencoder()
            yield self.latents()
            if recipe.dit.prior is not None:
                peak, pages, seconds = self.made(PRIOR, decoded=False)
                yield Stage("prior", "clip", recipe.dit.prior.num_clips, seconds / PRIOR, self.process + peak, pages)
            yield from self.transformer()
        peak, pages, seconds = self.made(1)
        yield Stage("sample", "clip", 1, seconds, self.process + peak, pages, apart=True)

    @property
    def trains_autoencoder(self) -> bool:
        vae = self.recipe.vae
        return vae.tuned or (vae.pretrained is None and bool(vae.model.encoder))

    @property
    def num_clips(self) -> int:
        data = self.recipe.data
        if isinstance(data, FolderData | ShardsData):
            return CLIPS if self.media is None else self.media.num_clips
        return data.num_clips + data.num_validation

    @property
    def num_validation(self) -> int:
        return min(VALIDATED, self.recipe.data.num_validation)

    @property
    def clip_bytes(self) -> int:
        """Of all decoded clips."""
        clip = self.recipe.clip
        return self.num_clips * clip.num_frames * clip.height * clip.width * 3

    @property
    def latent_bytes(self) -> int:
        """Of the posterior and the text of one clip, as they are stored."""
        recipe = self.recipe
        latents, _, condition = example(
            recipe.dit.model, recipe.latent_shape(recipe.clip), recipe.text.context_tokens, device="meta"
        )
        parts = (condition.context, condition.vector, condition.label)
        return 2 * 2 * latents.numel() + sum(0 if part is None else part.nbytes for part in parts)

    def pictures(self, media: Media) -> Iterator[Stage]:
        """Tell of rendering and decoding; a shard of clips fills before it is written."""
        if not isinstance(self.recipe.data, FolderData):
            yield Stage("render", "clip", self.num_clips, media.render_seconds, media.render_peak)
        shard = min(SHARD_BYTES, self.clip_bytes)
        yield Stage("decode", "clip", self.num_clips, media.decode_seconds, media.decode_peak + shard, shard)

    def autoencoder(self) -> Iterator[Stage]:
        recipe, training = self.recipe, self.recipe.vae.training
        trained = trained_stage(recipe, "autoencoder", self.rates, self.process)
        yield replace(trained, files=self.clip_bytes)
        assert trained.step is not None
        beside = self.process + trained.step.average + trained.step.states

        def evaluated(look: Callable[[AutoencoderTask], object]) -> Once:
            def run() -> None:
                make = partial(shaped, partial(CausalVAE, recipe.vae.model))
                task = autoencoder_task(recipe, make, num_validation=self.num_validation)
                with _averaged(task.model, training):
                    look(task)

            return run_once(run)

        def shown(task: AutoencoderTask) -> None:
            clips = to_float(task.validation[:SHOWN])
            torch.stack([clips, task.vae.decode(task.vae.encode(clips).mean).float()], dim=1).flatten(0, 1)

        for unit, every, look in (
            ("validation", training.validate_every, _validate),
            ("preview", training.preview_every, shown),
        ):
            if every:
                once = evaluated(look)
                seconds, times = self.rates.seconds(once.kernels, once.num_calls), -(-training.steps // every)
                yield Stage("autoencoder", unit, times, seconds, beside + once.peak, once.pages, self.clip_bytes)

    def latents(self) -> Stage:
        """Tell of encoding: all clips, and before them those that statistics are of."""
        recipe, clip = self.recipe, self.recipe.clip

        def encode() -> None:
            vae: Any = shaped(partial(CausalVAE, recipe.vae.model))
            with cast(recipe.vae.training.precision):
                vae.encode(torch.ones(ENCODED, 3, clip.num_frames, clip.height, clip.width))

        once, shard = run_once(encode), min(512, self.num_clips) * self.latent_bytes
        learned = recipe.vae.pretrained is None
        count = self.num_clips + (min(MEASURED, self.num_clips) if learned else 0)
        seconds = self.rates.seconds(once.kernels, once.num_calls) / ENCODED * count / self.num_clips
        peak = self.process + once.peak + shard
        return Stage("latents", "clip", self.num_clips, seconds, peak, once.pages, self.clip_bytes)

    def transformer(self) -> Iterator[Stage]:
        recipe, training = self.recipe, self.recipe.dit.training
        trained = trained_stage(recipe, "transformer", self.rates, self.process)
        vae = _bytes(partial(CausalVAE, recipe.vae.model))
        files = 0 if isinstance(recipe.data, ShardsData) else self.num_clips * self.latent_bytes
        files += self.clip_bytes if self.trains_autoencoder else 0  # mapped until Python collects what read them
        yield replace(trained, peak=trained.peak + vae, files=files)
        assert trained.step is not None
        beside = self.process + trained.step.average + trained.step.states

        def validate(config: DiTConfig) -> None:
            latents, words = recipe.latent_shape(recipe.clip), recipe.text.context_tokens
            make = transformer(config, latents, words, batch=self.num_validation, masked=bool(words))
            model, (batch,) = make()
            with _averaged(model, training):
                batch.loss()

        if training.validate_every:
            once, times = run_deep(recipe.dit.model, validate), -(-training.steps // training.validate_every)
            seconds = NUM_BINS * self.rates.seconds(once.kernels, once.num_calls)
            yield Stage("transformer", "validation", times, seconds, beside + vae + once.peak, once.pages, files)
        if training.preview_every:
            peak, pages, seconds = self.made(SHOWN, averaged=True)
            times = -(-training.steps // training.preview_every)
            yield Stage("transformer", "preview", times, seconds, beside + peak, pages, files)

    def made(self, batch: int, *, decoded: bool = True, averaged: bool = False) -> tuple[int, int, float]:
        """Return the bytes, those of them in pages of their own, and the seconds of clips that are made at once.

        Both networks' weights are among the bytes, and if `averaged` a copy of the transformer's. An evaluation counts
        guidance's second one as another.
        """
        recipe = self.recipe
        sampling, latents = recipe.sampling, recipe.latent_shape(recipe.clip)
        tokens = token_grid(latents, recipe.dit.model.patch).num_tokens
        evaluations = count_evaluations(sampling, recipe.dit.flow.parameterization, tokens)

        def evaluate(config: DiTConfig) -> None:
            model = VideoDiT(config)
            with cast(sampling.precision):
                model(*example(config, latents, recipe.text.context_tokens, batch=batch))

        def decode() -> None:
            vae: Any = shaped(partial(CausalVAE, recipe.vae.model))
            with cast(sampling.precision):
                vae.decode(torch.ones(batch, recipe.vae.model.latent_channels, *latents)).float().clamp(-1, 1)

        asked = run_deep(recipe.dit.model, evaluate)
        dit, vae = _bytes(partial(VideoDiT, recipe.dit.model)), _bytes(partial(CausalVAE, recipe.vae.model))
        seconds = evaluations * self.rates.seconds(asked.kernels, asked.num_calls)
        peaks = [(asked.peak + vae, asked.pages)]
        if decoded:
            shown = run_once(decode)
            seconds += self.rates.seconds(shown.kernels, shown.num_calls)
            peaks.append((shown.peak + dit, shown.pages))
        peak, pages = max(peaks)
        return peak + (dit if averaged else 0), pages, seconds


def _validate(task: AutoencoderTask) -> None:
    log = logging.getLogger(AutoencoderTask.__module__)
    log.disabled, before = True, log.disabled  # there is nothing to be said of the health of a network without data
    try:
        task.validate(torch.Generator())
    finally:
        log.disabled = before


@contextmanager
def _averaged(model: nn.Module, training: TrainingConfig) -> Iterator[None]:
    """Evaluate as the loop does: with averages in the place of the weights, which are put aside."""
    own = [] if training.ema_decay is None else [weight.detach().clone() for weight in model.parameters()]
    with cast(training.precision):
        yield
    del own


def _bytes(make: Callable[[], nn.Module]) -> int:
    with torch.device("meta"):
        model = make()
    return sum(part.nbytes for part in (*model.parameters(), *model.buffers()))


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
