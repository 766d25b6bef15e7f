"""One comparison at equal compute: every variant learns the same small world, for the same training FLOPs, seed by seed.

    OUT/comparison.json           the configuration
    OUT/shared/                   the clips, the autoencoder's training, every clip's latents, and what real clips score
    OUT/runs/VARIANT-SEED/        a training run
    OUT/results/VARIANT-SEED.json what became of it; a run that has one is done
    OUT/results.json, index.html, *.svg       all of it, and the page that shows it

Variants differ in the one thing that their entry in `variants` names. A run takes as many steps as the budget pays for,
by the count of `planning/cost.py`; what is not in that count (norms, activations, memory traffic) shows in the seconds.
"""

import itertools
import json
import math
import multiprocessing
import os
import platform
import queue
import shutil
import signal
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, UInt8
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors.torch import load_file
from torch import Tensor

from reelflow.conditioning.text import HashedWords
from reelflow.config import configuration, from_dict, to_dict
from reelflow.data.loader import ShuffledBatches
from reelflow.data.video import write_contact_sheet
from reelflow.data.worlds import COLOURS, MOTIONS, SHAPES, Combination, Reading, World, analyse, prompt
from reelflow.diffusion.process import (
    Parameterization,
    Predict,
    RectifiedFlow,
    VariancePreserving,
    combine,
    levels,
    log_snr,
)
from reelflow.diffusion.timesteps import LogitNormal, Uniform
from reelflow.errors import ConfigError, ReelflowError, nearest
from reelflow.evaluation.frechet import PixelPyramid, frechet_between
from reelflow.evaluation.pixels import flicker, jitter
from reelflow.generation.pipeline import to_frames
from reelflow.generation.sampling import Sampling, guided_by, sampler_of
from reelflow.models.blocks import Attend, Branches, FeedForward, gate_values
from reelflow.models.condition import Condition
from reelflow.models.dit import DiTConfig, VideoDiT
from reelflow.models.vae import CausalVAE, Posterior, Stage, VAEConfig, staged
from reelflow.models.weights import load_weights
from reelflow.nn.embed import SinCos
from reelflow.nn.patchify import Patch, token_grid
from reelflow.nn.patterns import Full, Gated, Pattern, Space, Time, Window
from reelflow.planning.cost import DiTCost, dit_cost, vae_cost
from reelflow.recipes.compare_page import SCALES, USUAL, Facts, Outcome, Report, Scores, write_report
from reelflow.recipes.files import write_json, write_whole_tensors
from reelflow.training.autoencoder import AutoencoderConfig, AutoencoderTask, draw_crops, to_float
from reelflow.training.flow import FlowConfig, FlowTask, LatentBatch, inner_matrix
from reelflow.training.loop import TrainingConfig, train
from reelflow.training.optim import OptimizerConfig

__all__ = [
    "Comparison",
    "Data",
    "Variant",
    "chroma",
    "compare",
    "outside",
    "picture_spread",
    "place_spread",
    "variants",
    "velocity_error",
]

LEVELS = 8  # of tau, at which the validation error is taken
BATCH = 16  # clips sampled or encoded at once
QUIET = Console(quiet=True)


@configuration
class Data:
    """A corner of the synthetic world at two sizes; every combination of the names is trained on and asked for.

    Raises:
        ConfigError: a name is unknown, or the analyser could not read such clips.
    """

    colours: tuple[str, ...]
    shapes: tuple[str, ...]
    motions: tuple[str, ...]
    num_frames: int
    small: int  # pixels, height and width
    large: int
    num_clips: int  # to learn from, at each size
    num_validation: int
    contrast: float = 0.25  # of the backdrop
    seed: int = 0

    def __post_init__(self) -> None:
        for names, known in ((self.colours, COLOURS), (self.shapes, SHAPES), (self.motions, MOTIONS)):
            if not names or len(set(names)) < len(names):
                raise ConfigError(f"give at least one of {', '.join(known)}, each once; got {list(names)}")
            for name in names:
                if name not in known:
                    raise ConfigError(f"unknown name {name!r}; {nearest(name, known)}")
        if min(self.num_clips, self.num_validation) < 2 * len(self.combinations):
            raise ConfigError(
                f"num_clips and num_validation must be at least {2 * len(self.combinations)}, two clips of each combination, "
                f"got {self.num_clips} and {self.num_validation}"
            )
        for size in (self.small, self.large):
            self.world(size)

    @property
    def combinations(self) -> tuple[Combination, ...]:
        return tuple(itertools.starmap(Combination, itertools.product(self.colours, self.shapes, self.motions)))

    def world(self, size: int) -> World:
        return World(height=size, width=size, num_frames=self.num_frames, contrast=self.contrast)


@configuration
class Variant:
    """One side of a comparison: attention of both branches in each block, what is learned, where, and at which size."""

    title: str
    attention: tuple[tuple[Pattern, Pattern], ...]
    flow: FlowConfig
    size: int  # pixels
    space: Literal["latent", "pixel"] = "latent"
    patch: Patch = Patch(1, 2, 2)
    budgets: float = 1.0  # of compute; the same for all that are compared
    also: tuple[tuple[str, Sampling], ...] = ()  # sampled in these ways too

    def ways(self, usual: Sampling) -> dict[str, Sampling]:
        return {USUAL: usual, **dict(self.also)}


@configuration
class Comparison:
    """All that the comparison depends on.

    Raises:
        ConfigError: a variant is unknown, or a part does not fit another.
    """

    data: Data
    teraflops: float  # of training, forward and backward: one budget
    vae: VAEConfig
    vae_loss: AutoencoderConfig
    vae_training: TrainingConfig
    text: HashedWords
    dim: int
    num_heads: int
    rope: tuple[int, int, int]
    depth: int  # blocks of two branches of attention and one MLP
    mlp_ratio: float
    batch_size: int
    optimizer: OptimizerConfig
    ema_decay: float
    precision: Literal["fp32", "bf16"]
    sampling: Sampling  # but for what a variant says
    clips_per_prompt: int  # sampled, in each way
    seeds: tuple[int, ...] = (0, 1, 2)
    only: tuple[str, ...] = ()  # variants to run; none named: all

    def __post_init__(self) -> None:
        if not 0 < self.teraflops < math.inf:
            raise ConfigError(f"teraflops must be positive, got {self.teraflops}; nearest: 1")
        if self.depth < 2 or self.depth % 2:
            raise ConfigError(f"depth must be even, got {self.depth}; nearest: {max(2, self.depth + 1)}")
        if self.clips_per_prompt < 2:
            raise ConfigError(f"a spread needs 2 clips of a prompt, got {self.clips_per_prompt}; nearest: 2")
        if not self.seeds or min(self.seeds) < 0 or len(set(self.seeds)) < len(self.seeds):
            raise ConfigError(f"seeds are different numbers from 0, at least one, got {list(self.seeds)}; nearest: [0]")
        known = variants(self)
        for name in self.only:
            if name not in known:
                raise ConfigError(f"no variant is called {name!r}; {nearest(name, known)}")
        for variant in self.chosen.values():
            if self.steps(variant) < 1:
                least = 3e-12 * self.batch_size * self.cost(variant).flops
                raise ConfigError(
                    f"{self.teraflops:g} teraflops do not pay for one step of {variant.title!r}; nearest: {least:.3g}"
                )

    @property
    def chosen(self) -> dict[str, Variant]:
        return {name: variant for name, variant in variants(self).items() if not self.only or name in self.only}

    def shape(self, variant: Variant) -> tuple[int, int, int, int]:
        """Return (C, t, h, w) of what the transformer works on."""
        if variant.space == "pixel":
            return 3, self.data.num_frames, variant.size, variant.size
        return self.vae.latent_shape(self.data.num_frames, variant.size, variant.size)

    def model(self, variant: Variant) -> DiTConfig:
        return DiTConfig(
            in_channels=self.shape(variant)[0],
            dim=self.dim,
            num_heads=self.num_heads,
            layers=tuple(
                Branches((Attend(first), Attend(second), FeedForward(ratio=self.mlp_ratio)))
                for first, second in variant.attention
            ),
            patch=variant.patch,
            rope=self.rope,
            absolute=(SinCos(max_period=100.0),),
            theta=100.0,
            activation="relu2",
            vector_dim=self.text.dim,
        )

    def cost(self, variant: Variant) -> DiTCost:
        return dit_cost(self.model(variant), self.shape(variant)[1:], 0)

    def steps(self, variant: Variant) -> int:
        """Return how many steps the budget pays for; a step costs three forward passes of the batch."""
        return int(variant.budgets * self.teraflops * 1e12 / (3 * self.batch_size * self.cost(variant).flops))


def comparison() -> Comparison:
    """Five kinds of attention, two objectives, three laws of time at two sizes, two spaces, five guidances; not yet run."""
    return Comparison(
        data=Data(
            colours=("red", "blue"),
            shapes=("disc", "triangle", "ring"),
            motions=("still", "right", "down"),
            num_frames=9,
            small=32,
            large=48,
            num_clips=1536,
            num_validation=192,
        ),
        teraflops=3.0,
        vae=staged(
            latent_channels=8,
            patch=4,
            conv="factorised",
            resample_kernel=1,
            encoder=(Stage(64, 0, time=2), Stage(128, 2)),
            decoder=(Stage(128, 2), Stage(64, 1, time=2)),
        ),
        vae_loss=AutoencoderConfig(crop_frames=9, crop_size=24, kl=1e-3),
        vae_training=TrainingConfig(
            steps=500,
            batch_size=12,
            optimizer=_learn(lr=2e-3),
            seed=0,
            ema_decay=0.98,
            precision="bf16",
        ),
        text=HashedWords(dim=96, max_words=8),
        dim=64,
        num_heads=2,
        rope=(8, 12, 12),
        depth=4,
        mlp_ratio=4.0,
        batch_size=16,
        optimizer=_learn(lr=3e-3),
        ema_decay=0.98,
        precision="bf16",
        sampling=Sampling(num_steps=16, guidance_scale=3.5, precision="bf16"),
        clips_per_prompt=3,
    )


def _learn(lr: float) -> OptimizerConfig:
    return OptimizerConfig(lr=lr, muon_lr=0.02, muon_iterations=4, warmup_steps=20, decay="linear", final_fraction=0.02)


def variants(c: Comparison) -> dict[str, Variant]:
    """Return every variant by name. The first is the base: each other differs from it in one thing.

    The three of the large size, and the two in pixels, differ from the base in that too, and are compared with each other.
    """
    flow = FlowConfig(
        parameterization=Parameterization(RectifiedFlow(), "velocity"), time=LogitNormal(), given_fraction=0.0
    )
    uniform, shifted = replace(flow, time=Uniform()), replace(flow, shift=3.0)
    v = replace(uniform, parameterization=Parameterization(VariancePreserving(), "v"))
    full, factorised = (Full(), Full()), (Space(), Time())
    windows = (Window(3, 2, 2), Window(3, 2, 2, shift=(1, 1, 1)))
    few = ("4 steps", replace(c.sampling, num_steps=4))
    noisy = ("shift 3", replace(c.sampling, shift=3.0))
    scales = tuple((f"guidance {w:g}", replace(c.sampling, guidance_scale=w)) for w in SCALES)
    base = Variant("full 3D", c.depth * (full,), flow, c.data.small, also=(few, noisy, *scales))
    plain = replace(base, also=(few, noisy))
    large = replace(base, size=c.data.large, budgets=2.0, also=(noisy,))
    pixel = replace(base, title="pixel space", space="pixel", patch=Patch(1, 8, 8), also=())
    data = replace(flow, parameterization=Parameterization(RectifiedFlow(), "data"))
    return {
        "full": base,
        "factorised": replace(base, title="factorised", attention=c.depth * (factorised,), also=()),
        "gated": replace(base, title="gated", attention=c.depth * ((Gated(), Gated()),), also=()),
        "window": replace(base, title="window", attention=c.depth * (windows,), also=()),
        "periodic": replace(base, title="periodic", attention=c.depth // 2 * (factorised, full), also=()),
        "v_prediction": replace(plain, title="v-prediction, VP", flow=v, also=(few,)),
        "uniform": replace(plain, title="uniform", flow=uniform),
        "shifted": replace(plain, title="logit-normal, shift 3", flow=shifted),
        "large": replace(large, title="logit-normal"),
        "large_uniform": replace(large, title="uniform", flow=uniform),
        "large_shifted": replace(large, title="logit-normal, shift 3", flow=shifted),
        "pixel": pixel,
        "pixel_data": replace(pixel, title="pixel space, data predicted", flow=data),
    }


# --- running -------------------------------------------------------------------------------------------------------


Hear = Callable[[float], None]
"""Told how far a piece of work has come, from 0 to 1."""


def compare(
    config: Comparison, out: Path, *, jobs: int = 1, console: Console | None = None, command: str = "reelflow compare"
) -> bool:
    """Carry out what is not done yet, and write the page; return False when Ctrl-C came before the end.

    Every run is one process's work on one thread, so results do not depend on `jobs`; with two or more, each process
    keeps to one core.

    Raises:
        ConfigError: `out` holds another comparison or something else, or `jobs` is below 1.
        ReelflowError: a run failed; the others go on first.
    """
    if jobs < 1:
        raise ConfigError(f"jobs must be at least 1, got {jobs}; nearest: 1")
    console = console or Console()
    _claim(config, out)
    runs = [(name, seed) for seed in config.seeds for name in config.chosen]
    stages = [[SHARED]] if not (out / "shared" / "facts.json").is_file() else []
    stages.append([run for run in runs if not _result(out, *run).is_file()])
    for todo in stages:
        title = "shared clips and autoencoder" if todo == [SHARED] else f"{len(runs)} runs"
        finished = len(runs) - len(todo) if todo != [SHARED] else 0
        with _progress(console, title, finished, finished + len(todo)) as tell:
            if not todo:
                continue
            if not (_here(config, out, todo, tell) if jobs == 1 else _apart(config, out, todo, jobs, tell)):
                return False
    report = Report(
        command=command,
        machine=_machine(),
        settings=to_dict(config),
        facts=from_dict(Facts, json.loads((out / "shared" / "facts.json").read_text())),
        outcomes=tuple(from_dict(Outcome, json.loads(_result(out, *run).read_text())) for run in runs),
    )
    write_report(out, report)
    console.print(f"Look at {out / 'index.html'}", highlight=False)
    return True


Run = tuple[str, int]
SHARED: Run = ("shared", 0)
MAY_CHANGE = ("seeds", "only")  # other runs of the same comparison


def _claim(config: Comparison, out: Path) -> None:
    path, values = out / "comparison.json", to_dict(config)
    if path.is_file():
        before = json.loads(path.read_text())
        for name in values:
            if name not in MAY_CHANGE and before.get(name) != values[name]:
                raise ConfigError(
                    f"{out} is a comparison with another {name} ({before.get(name)}, now {values[name]}); go on with the old "
                    f"values, or choose another folder"
                )
    elif out.exists() and (not out.is_dir() or any(not found.name.startswith(".") for found in out.iterdir())):
        raise ConfigError(f"{out} holds something that is no comparison; choose another folder")
    for name in ("shared", "runs", "results"):
        (out / name).mkdir(parents=True, exist_ok=True)
    write_json(path, values)


def _result(out: Path, name: str, seed: int) -> Path:
    return out / "results" / f"{name}-{seed}.json"


def _work(config: Comparison, out: Path, run: Run, hear: Hear) -> bool:
    """Do one piece of work on one thread; return whether it was finished."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return _share(config, out, hear) if run == SHARED else _run(config, out, *run, hear)
    finally:
        torch.set_num_threads(threads)


def _here(config: Comparison, out: Path, todo: Sequence[Run], tell: Callable[[Run, float], None]) -> bool:
    return all(_work(config, out, run, partial(tell, run)) for run in todo)


def _apart(config: Comparison, out: Path, todo: Sequence[Run], jobs: int, tell: Callable[[Run, float], None]) -> bool:
    """Let `jobs` processes take the work from a queue."""
    context = multiprocessing.get_context("spawn")
    tasks, heard, stop = context.Queue(), context.Queue(), context.Event()
    for run in todo:
        tasks.put(run)
    workers = [
        context.Process(target=_worker, args=(to_dict(config), out, core, tasks, heard, stop), daemon=True)
        for core in range(min(jobs, len(todo)))
    ]
    for worker in workers:
        tasks.put(None)
        worker.start()
    errors: list[str] = []
    done = 0
    while True:
        try:
            alive = any(worker.is_alive() for worker in workers)
            try:
                run, share, error = heard.get(timeout=0.2)
            except queue.Empty:
                if alive:
                    continue
                break
            done += share == 1.0
            errors += [f"{run[0]}, seed {run[1]}: {error}"] if error else []
            tell(run, share)
        except KeyboardInterrupt:
            if stop.is_set():
                for worker in workers:
                    worker.terminate()
                raise
            stop.set()
    if errors:
        raise ReelflowError("; ".join(errors))
    if done < len(todo) and not stop.is_set():
        raise ReelflowError(f"a process died after {done} of {len(todo)} pieces of work; the same command goes on")
    return done == len(todo)


def _worker(values: dict[str, Any], out: Path, core: int, tasks: Any, heard: Any, stop: Any) -> None:
    """Work until nothing is left. Ctrl-C reaches the training loop, which returns; what comes after it is finished first."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cores[core % len(cores)]})
    config, parent = from_dict(Comparison, values), os.getppid()
    while (run := tasks.get()) is not None and not stop.is_set():

        def hear(share: float, run: Run = run) -> None:
            if os.getppid() != parent:
                os._exit(1)  # nobody is left to hear
            heard.put((run, min(share, 0.999), ""))

        try:
            if not _work(config, out, run, hear):
                stop.set()
                return
            heard.put((run, 1.0, ""))
        except KeyboardInterrupt:
            stop.set()
            return
        except Exception as error:
            where = traceback.extract_tb(error.__traceback__)[-1]
            heard.put((run, 0.0, f"{type(error).__name__}: {error} ({where.name}, line {where.lineno})"))


@contextmanager
def _progress(console: Console, title: str, finished: int, total: int) -> Iterator[Callable[[Run, float], None]]:
    """Show runs, counted in parts, with rate and time left; on a terminal a bar, elsewhere a line for each."""
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[count]}"), TimeRemainingColumn())
    start, shares = time.perf_counter(), dict[Run, float]()
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(title, total=total, completed=finished, count=f"{finished}/{total}")

        def tell(run: Run, share: float) -> None:
            shares[run] = share
            seconds, whole = time.perf_counter() - start, sum(shares.values())
            count = finished + sum(part == 1.0 for part in shares.values())
            rate = f"{whole / seconds * 60:.2g}/min" if whole else ""
            bar.update(task, completed=finished + whole, count=f"{count}/{total} {rate}")
            if share == 1.0:
                left = (total - finished - whole) * seconds / whole
                console.print(
                    f"{run[0]}, seed {run[1]}: {count} of {total} after {seconds:.0f} s, {rate}, {left:.0f} s left",
                    highlight=False,
                )

        yield tell


def _machine() -> dict[str, str | int]:
    return {
        "cores": os.cpu_count() or 0,
        "threads per run": 1,
        "torch": torch.__version__,
        "Python": platform.python_version(),
        "system": platform.platform(terse=True),
        "processor": platform.machine(),
    }


# --- what all runs share -------------------------------------------------------------------------------------------


class Clips(NamedTuple):
    """The clips of one size: those to learn from, then those for validation."""

    frames: UInt8[Tensor, "N T H W 3"]
    number: Tensor  # of each clip's combination
    mean: Float[Tensor, "N C t h w"]  # of its posterior
    logvar: Float[Tensor, "N C t h w"]


def _share(config: Comparison, out: Path, hear: Hear) -> bool:
    """Render the clips, train the autoencoder, encode every clip, and score real and rebuilt ones."""
    folder, data, start = out / "shared", config.data, time.process_time()
    sizes = (data.small, data.large)
    rendered = {size: _render(data, size) for size in sizes}
    torch.manual_seed(config.vae_training.seed)
    vae = CausalVAE(config.vae)
    task = AutoencoderTask(vae, config.vae_loss, validation=rendered[data.large][data.num_clips :][:32])

    def crops(rows: Tensor, generator: torch.Generator) -> Tensor:
        size = sizes[int(torch.randint(len(sizes), (), generator=generator))]
        return draw_crops(rendered[size][rows], config.vae_loss, generator)

    ends = ("encoder.0.", f"encoder.{len(vae.encoder) - 1}.", "decoder.0.", f"decoder.{len(vae.decoder) - 1}.")
    steps = config.vae_training.steps
    with ShuffledBatches(data.num_clips, config.vae_training.batch_size, crops, seed=0, prefetch=0) as batches:
        trained = train(
            task,
            batches,
            config.vae_training,
            folder / "vae",
            hidden=lambda name, weight: weight.ndim >= 2 and not name.startswith(ends),
            on_step=lambda step: hear(0.8 * step / steps),
            console=QUIET,
        )
    if trained.interrupted:
        return False
    load_weights(_averaged(trained.checkpoint), vae)
    vae.eval()
    combinations = data.combinations
    real, rebuilt, fidelity = {}, {}, {}
    with torch.no_grad(), _autocast(config.vae_training.precision):
        posteriors = {size: _encode(vae, frames) for size, frames in rendered.items()}
        means = torch.cat([p.mean[: data.num_clips].transpose(0, 1).flatten(1) for p in posteriors.values()], dim=1)
        vae.set_statistics(means.mean(1), means.std(1))
        posteriors = {size: _encode(vae, frames) for size, frames in rendered.items()}
    for size, frames in rendered.items():
        posterior, numbers = posteriors[size], _numbers(data)
        unseen, asked = slice(data.num_clips, None), [combinations[n] for n in numbers[data.num_clips :].tolist()]
        with torch.no_grad(), _autocast(config.vae_training.precision):
            raw = torch.cat([vae.decode(part).float() for part in posterior.mean[unseen].split(BATCH)])
        truth, other = to_float(frames[unseen]), to_float(frames[: data.num_validation])
        real[str(size)] = _scores(truth, asked, against=other)
        rebuilt[str(size)] = _scores(raw, asked, against=other)
        error = (raw.clamp(-1, 1) - truth).square().mean(dim=(1, 2, 3, 4))
        fidelity[str(size)] = (10 * torch.log10(4 / error)).mean().item()
        write_whole_tensors(
            folder / f"clips-{size}.safetensors",
            {"frames": frames, "number": numbers, "mean": posterior.mean, "logvar": posterior.logvar},
        )
    write_whole_tensors(folder / "vae.safetensors", vae.state_dict())
    cost = vae_cost(config.vae, config.vae_loss.crop_frames, config.vae_loss.crop_size, config.vae_loss.crop_size)
    per_step = 3 * config.vae_training.batch_size * (cost.encode_flops + cost.decode_flops)
    facts = Facts(
        psnr=fidelity,
        vae_teraflops=per_step * steps / 1e12,
        vae_parameters=cost.num_parameters,
        compression=vae_cost(config.vae, data.num_frames, data.small, data.small).compression,
        seconds=time.process_time() - start,
        real=real,
        rebuilt=rebuilt,
    )
    write_json(folder / "facts.json", to_dict(facts))
    return True


def _numbers(data: Data) -> Tensor:
    """Return the number of each clip's combination; they take turns."""
    return torch.arange(data.num_clips + data.num_validation) % len(data.combinations)


def _render(data: Data, size: int) -> UInt8[Tensor, "N T H W 3"]:
    world = data.world(size)
    clips = []
    for index, number in enumerate(_numbers(data).tolist()):
        rng = np.random.default_rng([data.seed, size, index])
        clips.append(world.render(world.draw_scene(rng, **data.combinations[number]._asdict())).frames)
    return torch.from_numpy(np.stack(clips))


def _encode(vae: CausalVAE, frames: UInt8[Tensor, "N T H W 3"]) -> Posterior:
    parts = [vae.encode(to_float(part)) for part in frames.split(BATCH)]
    return Posterior(torch.cat([p.mean.float() for p in parts]), torch.cat([p.logvar.float() for p in parts]))


def _load(out: Path, size: int) -> Clips:
    return Clips(**load_file(out / "shared" / f"clips-{size}.safetensors"))


def _averaged(checkpoint: Path) -> Path:
    return checkpoint / "ema.safetensors"


def _autocast(precision: str) -> torch.autocast:
    return torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16")


# --- one run -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Space:
    """What the transformer works on, of unit variance, and the way back to pixels (not clamped)."""

    posterior: Posterior
    decode: Callable[[Tensor], Tensor]


def _space(config: Comparison, out: Path, variant: Variant, clips: Clips) -> _Space:
    if variant.space == "pixel":
        pixels = to_float(clips.frames)
        std, mean = torch.std_mean(pixels[: config.data.num_clips], dim=(0, 2, 3, 4), keepdim=True)
        pixels = pixels.sub_(mean).div_(std)
        return _Space(Posterior(pixels, torch.full_like(pixels, -torch.inf)), lambda x: x * std + mean)
    vae = CausalVAE(config.vae)
    load_weights(out / "shared" / "vae.safetensors", vae)
    vae.eval()
    return _Space(Posterior(clips.mean, clips.logvar), vae.decode)


def _run(config: Comparison, out: Path, name: str, seed: int, hear: Hear) -> bool:
    """Train a variant, sample it in all its ways, and write what became of it; return False if interrupted."""
    variant, data = config.chosen[name], config.data
    clips = _load(out, variant.size)
    space = _space(config, out, variant, clips)
    vectors = config.text([prompt(*combination) for combination in data.combinations]).pooled
    assert vectors is not None
    torch.manual_seed(seed)
    model = VideoDiT(config.model(variant))
    cost, steps, folder = config.cost(variant), config.steps(variant), out / "runs" / f"{name}-{seed}"
    shutil.rmtree(folder, ignore_errors=True)  # a run that was stopped begins anew: its seconds are measured whole

    def batch(rows: Tensor) -> LatentBatch:
        posterior = Posterior(space.posterior.mean[rows], space.posterior.logvar[rows])
        return LatentBatch(posterior, Condition(vector=vectors[clips.number[rows]]))

    unseen = torch.arange(data.num_clips, len(clips.number))
    null = Condition(vector=config.text([""]).pooled)
    task = FlowTask(model, variant.flow, null=null, validation=batch(unseen[:BATCH]))
    ways, first = variant.ways(config.sampling), [time.process_time(), 0]  # and the steps done by then

    def on_step(step: int) -> None:
        if not first[1]:
            first[:] = time.process_time(), step
        if step % 8 == 0:
            hear(step / steps * 0.8)

    with ShuffledBatches(data.num_clips, config.batch_size, lambda rows, _: batch(rows), seed=seed, prefetch=0) as read:
        trained = train(
            task,
            read,
            TrainingConfig(
                steps=steps,
                batch_size=config.batch_size,
                optimizer=config.optimizer,
                seed=seed,
                ema_decay=config.ema_decay,
                precision=config.precision,
                keep_last=1,
            ),
            folder,
            resume=False,
            hidden=inner_matrix,
            on_step=on_step,
            console=QUIET,
        )
    per_step = (time.process_time() - first[0]) / max(1, steps - first[1])
    if trained.interrupted:
        return False
    load_weights(_averaged(trained.checkpoint), model)
    model.eval()

    asked = [combination for combination in data.combinations for _ in range(config.clips_per_prompt)]
    vector = vectors.repeat_interleave(config.clips_per_prompt, dim=0)
    parameterization, shape = variant.flow.parameterization, (len(asked), *config.shape(variant))
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    against = to_float(clips.frames[unseen])
    made, scores = dict[Sampling, Tensor](), dict[str, Scores]()
    with torch.no_grad(), _autocast(config.precision):
        error = velocity_error(
            lambda x, t, rows: model(x, t, batch(unseen[rows]).condition).float(),
            space.posterior.mean[unseen],
            parameterization,
        )
    for number, (key, way) in enumerate(ways.items()):
        with torch.no_grad(), _autocast(way.precision):
            if way not in made:
                parts = zip(noise.split(BATCH), vector.split(BATCH), strict=True)
                made[way] = torch.cat([_sample(model, *part, null, way, parameterization) for part in parts])
            raw = torch.cat([space.decode(part).float() for part in made[way].split(BATCH)])
        scores[key] = _scores(raw, asked, against=against)
        hear(0.8 + 0.2 * (number + 1) / len(ways))
        if key == USUAL:
            write_contact_sheet(
                out / "runs" / f"{name}-{seed}.png", list(_frames(raw)[:: 2 * config.clips_per_prompt]), columns=5
            )
    usual = config.sampling
    apart = {
        key: (made[way] - made[usual]).square().mean().item()
        for key, way in ways.items()
        if way != usual and way == replace(usual, num_steps=way.num_steps)
    }
    outcome = Outcome(
        variant=name,
        title=variant.title,
        seed=seed,
        size=variant.size,
        steps=steps,
        teraflops=3e-12 * steps * config.batch_size * cost.flops,
        attention_gigaflops=cost.attention_flops / 1e9,
        other_gigaflops=cost.matrix_flops / 1e9,
        seconds=per_step * steps,
        num_tokens=cost.num_tokens,
        num_frames=token_grid(config.shape(variant)[1:], variant.patch).t,
        num_parameters=cost.num_parameters,
        validation=error,
        scores=scores,
        few_steps_error=apart,
        gates=gate_values(model),
    )
    write_json(_result(out, name, seed), to_dict(outcome))
    return True


def _sample(
    model: VideoDiT,
    noise: Float[Tensor, "B C T H W"],
    vector: Float[Tensor, "B V"],
    null: Condition,
    way: Sampling,
    parameterization: Parameterization,
) -> Float[Tensor, "B C T H W"]:
    def under(condition: Condition) -> Predict:
        return lambda x, t: model(x, t, condition).float()

    assert null.vector is not None
    predict = guided_by(
        way.guidance,
        under(Condition(vector=vector)),
        under(Condition(vector=null.vector.expand(len(vector), -1))),
        scale=way.guidance_scale,
        num_frames=noise.shape[2],
        parameterization=parameterization,
    )
    times = way.times(parameterization, token_grid(noise.shape[2:], model.config.patch).num_tokens)
    x = combine((levels(parameterization.process, times[:1]).sigma, noise))
    walk = sampler_of(way.sampler, torch.Generator().manual_seed(0))
    return walk(predict, x, times, parameterization=parameterization)


def _frames(clips: Float[Tensor, "N 3 T H W"]) -> UInt8[Tensor, "N T H W 3"]:
    return torch.stack([to_frames(clip) for clip in clips])


# --- what is measured ----------------------------------------------------------------------------------------------


def _scores(
    raw: Float[Tensor, "N 3 T H W"], asked: Sequence[Combination], *, against: Float[Tensor, "M 3 T H W"]
) -> Scores:
    """Measure clips as a decoder gave them (not clamped), clip i made for `asked[i]`, beside real ones."""
    clips = raw.clamp(-1, 1)
    read = [analyse(frames.numpy()) for frames in _frames(clips)]
    right = {
        name: [getattr(r, name) == getattr(a, name) for r, a in zip(read, asked, strict=True)]
        for name in asked[0]._fields
    }
    everything = [all(each) for each in zip(*right.values(), strict=True)]
    groups = [[i for i, a in enumerate(asked) if a == combination] for combination in dict.fromkeys(asked)]
    pyramid = PixelPyramid(num_frames=clips.shape[2], size=(clips.shape[3], clips.shape[4]))
    return Scores(
        num_clips=len(clips),
        **{name: float(np.mean(values)) for name, values in right.items()},
        all=float(np.mean(everything)),
        flicker=flicker(clips).mean().item(),
        jitter=jitter(clips).mean().item(),
        chroma=chroma(clips),
        outside=outside(raw),
        picture_spread=picture_spread(clips, groups),
        place_spread=place_spread(read, groups, size=min(clips.shape[3:])),
        frechet=frechet_between([clips], [against], pyramid, frame_stride=1).value,
    )


def velocity_error(
    predict: Callable[[Tensor, Tensor, Tensor], Tensor],
    data: Float[Tensor, "N C T H W"],
    parameterization: Parameterization,
    *,
    seed: int = 0,
) -> float:
    """Return the mean squared error of the velocity that a network implies, at the same noise and the same signal-to-noise
    ratios for every process: those of rectified flow at t = 1/16, 3/16, .. 15/16.

    `predict` is called with x, t and the rows of the clips. Comparable wherever the data are the same.
    """
    generator, process = torch.Generator().manual_seed(seed), parameterization.process
    total = 0.0
    for level in range(LEVELS):
        tau = torch.full((BATCH,), (level + 0.5) / LEVELS, dtype=torch.float64)
        t = process.time_at(log_snr(RectifiedFlow(), tau)).float()
        for start in range(0, len(data), BATCH):
            part = data[start : start + BATCH]
            noise, at = torch.randn(part.shape, generator=generator), t[: len(part)]
            x = parameterization.mix(part, noise, at)
            seen = parameterization.estimate(x, predict(x, at, torch.arange(start, start + len(part))), at)
            errors = (seen.data - seen.noise - part + noise).square()
            total += errors.mean(dim=(1, 2, 3, 4)).sum().item()
    return total / (LEVELS * len(data))


def chroma(clips: Float[Tensor, "N 3 T H W"]) -> float:
    """Return the mean over pixels of (largest - smallest of R, G and B) / 2: 0 for grey, 1 for pure colours."""
    return (clips.amax(1) - clips.amin(1)).mean().item() / 2


def outside(raw: Float[Tensor, "N 3 T H W"]) -> float:
    """Return the share of pixels with a channel outside [-1, 1], which will be clipped."""
    return (raw.abs() > 1).any(1).double().mean().item()


def picture_spread(clips: Float[Tensor, "N 3 T H W"], groups: Sequence[Sequence[int]]) -> float:
    """Return the root-mean-square difference / 2 of two clips of a prompt (0 alike, 1 black and white), over all pairs."""
    pairs = [pair for group in groups for pair in itertools.combinations(group, 2)]
    return float(np.mean([(clips[i] - clips[j]).square().mean().sqrt().item() / 2 for i, j in pairs]))


def place_spread(read: Sequence[Reading], groups: Sequence[Sequence[int]], *, size: int) -> float | None:
    """Return how far apart the objects of two clips of a prompt are, each at its mean place, in shares of the view.

    Pairs of which an object was not found count nothing; None if no pair is left.
    """
    places = [r.trajectory[np.isfinite(r.trajectory[:, 0])] for r in read]
    pairs = [pair for group in groups for pair in itertools.combinations(group, 2)]
    found = [(i, j) for i, j in pairs if len(places[i]) and len(places[j])]
    apart = [float(np.hypot(*(places[i].mean(0) - places[j].mean(0)))) / size for i, j in found]
    return float(np.mean(apart)) if apart else None
