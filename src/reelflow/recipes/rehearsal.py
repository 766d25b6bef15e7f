"""What a plan needs to know of this machine: found by doing a little of everything that a run does, on made-up data."""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from torch import Tensor

from reelflow.config import to_dict
from reelflow.data.folder import list_videos, read_windows
from reelflow.data.loader import ShuffledBatches
from reelflow.data.worlds import AT_ONCE, render_world
from reelflow.errors import MediaError
from reelflow.models.blocks import Dual, Single
from reelflow.models.dit import VideoDiT
from reelflow.models.vae import CausalVAE, Posterior
from reelflow.planning.memory import example
from reelflow.planning.rates import Rates, clock
from reelflow.planning.step import Precision
from reelflow.planning.walk import Kernel
from reelflow.recipes.forecast import Media, Trained, autoencoder_task, cast, step_of, update_of
from reelflow.recipes.recipe import FolderData, Recipe
from reelflow.recipes.sets import ShardsData
from reelflow.recipes.world import world
from reelflow.training.autoencoder import AutoencoderTask, draw_crops
from reelflow.training.flow import FlowTask, LatentBatch, inner_matrix
from reelflow.training.loop import Task, train

__all__ = [
    "Rehearsal",
    "machine_bytes",
    "measure_media",
    "measured_media",
    "measured_rates",
    "peak_bytes",
    "probe",
    "process_bytes",
    "rehearse",
]

VIDEOS = 8  # of a folder, that are decoded


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


def rehearse(
    recipe: Recipe, trained: Trained, *, steps: int = 4, between: Callable[[], object] = lambda: None
) -> Rehearsal:
    """Train one of a recipe's networks for a few steps on random data, as it would be trained.

    `between` is called after the second step and after each that follows, whose seconds it does not count for. The peak is
    that of the whole process, so that only the first call of a process tells it.
    """
    task, batches = _rehearsed(recipe, trained)
    stage = recipe.vae if trained == "autoencoder" else recipe.dit
    training = replace(stage.training, steps=steps, validate_every=0, preview_every=0, checkpoint_every=0)
    hidden = task.hidden if isinstance(task, AutoencoderTask) else inner_matrix
    begins: list[float] = []
    ends: list[float] = []

    def look(step: int) -> None:
        ends.append(clock())
        if step > 1:
            between()
        begins.append(clock())

    with tempfile.TemporaryDirectory() as folder, batches:
        train(
            task,
            batches,
            training,
            Path(folder) / "run",
            hidden=hidden,
            on_step=look,
            console=Console(quiet=True),
        )
    seconds = [end - begin for begin, end in zip(begins[1:], ends[2:], strict=False)]
    return Rehearsal(seconds, peak_bytes())


def _rehearsed(recipe: Recipe, trained: Trained) -> tuple[Task[Any], ShuffledBatches[Any]]:
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    if trained == "autoencoder":
        vae_training, clip = recipe.vae.training, recipe.clip
        extents = (clip.num_frames, clip.height, clip.width, 3)

        def crops(rows: Tensor, draws: torch.Generator) -> Tensor:
            clips = torch.randint(0, 256, (len(rows), *extents), dtype=torch.uint8, generator=draws)
            return draw_crops(clips, recipe.vae.loss, draws)

        batches = ShuffledBatches(vae_training.batch_size, vae_training.batch_size, crops, seed=0, prefetch=0)
        return autoencoder_task(recipe, partial(CausalVAE, recipe.vae.model)), batches
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


def peak_bytes() -> int:
    """Return the most that this process has had in memory."""
    return _resident_bytes("VmHWM")


def _resident_bytes(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(name))


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
        "import reelflow.recipes.runs",  # which takes some memory by itself
        "from reelflow.cli.main import keep_freed_memory",
        "from reelflow.recipes.rehearsal import probe",
        "keep_freed_memory()",
        f"torch.set_num_threads({torch.get_num_threads()})",
        f"print(probe({precision!r}))",
    )
    return int(_told(lines))


def measured_rates(precision: Precision = "fp32") -> Rates:
    """Return the rates of this machine's operations, with what a call costs found on the step of a small network."""
    base = probe_recipe(precision)
    small = replace(base.dit.model, dim=32, num_heads=2, rope=(4, 6, 6))
    recipe = replace(base, dit=replace(base.dit, model=small, training=replace(base.dit.training, batch_size=1)))
    task, batches = _rehearsed(recipe, "transformer")
    batch, generator = next(batches), torch.Generator().manual_seed(0)
    move = update_of(recipe.dit.training, inner_matrix)(task.model)

    def step() -> None:
        with cast(precision):
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


def measured_media(recipe: Recipe) -> Media | None:
    """Return what `measure_media` finds in a process of its own; None where nothing is decoded, or nothing is there."""
    data = recipe.data
    if isinstance(data, ShardsData) or (isinstance(data, FolderData) and not Path(data.folder).is_dir()):
        return None
    lines = (
        "import json, sys, torch",
        "import reelflow.recipes.runs",  # which takes some memory by itself
        "from reelflow.cli.main import keep_freed_memory",
        "from reelflow.config import from_dict",
        "from reelflow.recipes.recipe import Recipe",
        "from reelflow.recipes.rehearsal import measure_media",
        "keep_freed_memory()",
        f"torch.set_num_threads({torch.get_num_threads()})",
        "print(json.dumps(measure_media(from_dict(Recipe, json.loads(sys.stdin.read())))))",
    )
    return Media(*json.loads(_told(lines, json.dumps(to_dict(recipe)))))


def measure_media(recipe: Recipe) -> Media:
    """Render and decode a few clips of a recipe's world, or decode some videos of its folder, and say what that took.

    Peaks are those of this process, so that only the first call of a process tells them.

    Raises:
        DataError: the folder has no videos.
    """
    data = recipe.data
    assert not isinstance(data, ShardsData)
    before = _resident_bytes("VmRSS")
    with tempfile.TemporaryDirectory() as folder:
        start, rendered = time.perf_counter(), 0
        if isinstance(data, FolderData):
            videos = list_videos(Path(data.folder))
        else:
            rendered = min(AT_ONCE, data.num_clips)
            learned, _ = data.combinations
            render_world(Path(folder) / "w", data.world, num_clips=rendered, combinations=learned, seed=data.seed)
            videos = list_videos(Path(folder) / "w")
        render_seconds, render_peak = time.perf_counter() - start, peak_bytes()
        start, clips = time.perf_counter(), 0
        some = videos[:: -(-len(videos) // VIDEOS)] if isinstance(data, FolderData) else videos
        for path in some:
            try:
                clips += sum(1 for _ in read_windows(path, recipe.clip))
            except MediaError:
                continue
        return Media(
            num_clips=max(1, round(clips * len(videos) / len(some))),
            render_seconds=render_seconds / max(1, rendered),
            render_peak=render_peak,
            decode_seconds=(time.perf_counter() - start) / max(1, clips),
            decode_peak=peak_bytes(),
            kept=max(0, _resident_bytes("VmRSS") - before),
        )


def _told(lines: Sequence[str], given: str = "") -> str:
    """Return the last line that a process of its own prints."""
    command = [sys.executable, "-c", "\n".join(lines)]
    told = subprocess.run(command, capture_output=True, text=True, check=True, input=given)
    return told.stdout.splitlines()[-1]
