"""`run` carries a recipe out in a folder, stage by stage.

    RUN/recipe.json     the recipe
    RUN/videos/         rendered clips and captions (recipes on the synthetic world)
    RUN/clips/          every clip decoded once
    RUN/vae/            the autoencoder's training
    RUN/latents/        every clip's posterior and text features
    RUN/latents_prior/  what the pretrained model makes of its own class (recipes of a subject)
    RUN/dit/            the transformer's training
    RUN/adapter/        what was learned, in PEFT's format (recipes of an adapter)
    RUN/model/          the finished model

Each stage is finished or continued, never done twice: killed at any moment, the same command goes on.
"""

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn
from torch import Tensor

from reelflow.conditioning.text import words_of
from reelflow.config import from_dict, to_dict
from reelflow.data.folder import ClipSpec
from reelflow.data.loader import Packed, Plan, ShuffledBatches, Size
from reelflow.data.shards import ShardSet
from reelflow.data.store import Store, Stores, build_clip_store, write_store
from reelflow.data.stream import ShardedBatches, Sizes
from reelflow.data.video import write_contact_sheet
from reelflow.data.worlds import render_world
from reelflow.diffusion.timesteps import shift_for
from reelflow.errors import CheckpointError, ConfigError, DataError
from reelflow.evaluation.perceptual import efficientnet_lite0, pyramid_distance
from reelflow.evaluation.rebuilt import measure_rebuilt
from reelflow.families.adapters import save_adapter
from reelflow.families.autoencoders import load_vae
from reelflow.generation.pipeline import ModelCard, Pipeline, fingerprint, model_folder, read_card, to_frames
from reelflow.models.adapters import merge, new_adapter
from reelflow.models.condition import Condition
from reelflow.models.dit import VideoDiT
from reelflow.models.inflate import inflate, inflated
from reelflow.models.linear import fit_linear
from reelflow.models.vae import CausalVAE, Posterior
from reelflow.models.weights import files_sha256, load_weights
from reelflow.parallel.device import moved, take_device
from reelflow.parallel.mesh import Workers, alone, start
from reelflow.parallel.shard import parallelize
from reelflow.planning.cost import vae_cost
from reelflow.recipes.files import write_json, write_whole_tensors
from reelflow.recipes.recipe import FolderData, Recipe, SubjectData, WorldData
from reelflow.recipes.sets import ShardsData, aside_of, mean_flops, open_sets, sharded_batches, sizes_of
from reelflow.training.adapter import AdapterTask
from reelflow.training.autoencoder import (
    AutoencoderTask,
    Reference,
    draw_crops,
    frame_latents,
    to_float,
)
from reelflow.training.flow import FlowTask, LatentBatch, Preserved, clip_sizes, inner_matrix
from reelflow.training.loop import TrainingConfig, train
from reelflow.training.meters import RunLog

__all__ = [
    "Clips",
    "Run",
    "best_weights",
    "claim",
    "parts_of_condition",
    "pretrained_autoencoder",
    "run",
    "set_aside",
    "train_autoencoder",
    "trained_autoencoder",
]

POINT = -30.0  # log-variance of latents that are known exactly


@dataclass(frozen=True)
class Run:
    """A finished run, or one that was interrupted and waits to be continued."""

    folder: Path
    model: Path | None  # None when interrupted
    seconds: dict[str, float]  # by stage


def run(recipe: Recipe, folder: Path, *, device: str = "auto", console: Console | None = None) -> Run:
    """Carry out `recipe` in `folder`, or go on where an earlier call stopped; `device` is as `take_device` reads it.

    Started by torchrun, the transformer is trained by all processes as `dit.parallel` says; the rest is done by the first,
    in a folder that all of them see. A stopped run may go on with another mesh, and on another device.

    Raises:
        ConfigError: the folder holds a run of another recipe, the mesh is not of as many processes as there are, or there is
            no such device.
        DataError: there is nothing to learn from.
    """
    recipe.dit.parallel.check(recipe.dit.model, int(os.environ.get("WORLD_SIZE", "1")))
    with start(recipe.dit.parallel.mesh, take_device(device)) as workers:
        console = (console or Console()) if workers.is_first else Console(quiet=True)
        return _Runner(recipe, folder, console, workers).go()


def train_autoencoder(
    recipe: Recipe, folder: Path, *, device: str = "auto", console: Console | None = None
) -> Path | None:
    """Carry out `recipe` up to its autoencoder and return the file of its weights, or None if it was interrupted.

    `run` goes on from there.

    Raises:
        ConfigError: as `run`.
        DataError: as `run`.
    """
    runner = _Runner(recipe, folder, console or Console(), alone(take_device(device)))
    return None if runner.autoencoder() is None else folder / "vae" / "final.safetensors"


def trained_autoencoder(folder: Path) -> tuple[Recipe, Path] | None:
    """Return the recipe of a run that has trained an autoencoder, and the file of its weights; None if it has not.

    Raises:
        CheckpointError: the run was not made by this version.
    """
    weights, path = folder / "vae" / "final.safetensors", folder / "recipe.json"
    if not (weights.is_file() and path.is_file()):
        return None
    try:
        return from_dict(Recipe, json.loads(path.read_text())), weights
    except (OSError, ValueError, RecursionError, ConfigError) as error:
        raise CheckpointError(f"{path} is not a recipe this version reads: {error}") from error


def pretrained_autoencoder(folder: Path) -> CausalVAE:
    """Return the autoencoder of a run or model folder of ours, or of a published folder, in float32.

    Raises:
        CheckpointError: the folder holds none.
    """
    if (folder / "model_index.json").is_file():
        return load_vae(folder / "vae", dtype=torch.float32)
    if (folder / "config.json").is_file():
        return load_vae(folder, dtype=torch.float32)
    whole = any((folder / name).is_file() for name in ("model.json", "model/model.json"))
    if not whole and (found := trained_autoencoder(folder)) is not None:
        vae = CausalVAE(found[0].vae.model)
        load_weights(found[1], vae)
        return vae
    return Pipeline.load(folder).vae


class Clips(NamedTuple):
    """Some rows of a store of clips."""

    store: Store
    rows: Tensor

    def captions(self) -> list[str]:
        return [str(self.store.meta(row)["caption"]) for row in self.rows.tolist()]


def set_aside(store: Store, data: FolderData, clip: ClipSpec) -> tuple[Clips, Clips]:
    """Return the clips of a folder to learn from, and those set aside.

    Raises:
        DataError: nothing is left to learn from.
    """
    if len(store) <= data.num_validation:
        raise DataError(
            f"{data.folder} gives {len(store)} clips of {clip.num_frames} frames, and {data.num_validation} are to be set "
            f"aside; add videos, or set data.num_validation to at most {max(0, len(store) - 1)}"
        )
    order = torch.randperm(len(store), generator=torch.Generator().manual_seed(0))
    return Clips(store, order[data.num_validation :]), Clips(store, order[: data.num_validation])


def claim(folder: Path, name: str, values: dict[str, Any], *, may_change: str = "/") -> None:
    """Write what a run depends on into its folder, or find the same there, but for what begins with `may_change`.

    Raises:
        ConfigError: the folder holds a run of something else, or no run.
    """
    path = folder / name
    if path.is_file():
        differences = [
            difference
            for difference in _differences(json.loads(path.read_text()), values)
            if not difference.startswith(may_change)
        ]
        if differences:
            raise ConfigError(
                f"{folder} is a run of another recipe ({'; '.join(differences[:3])}); go on with the old values, or "
                f"choose another folder"
            )
        return
    if folder.exists() and any(not found.name.endswith(".partial") for found in folder.iterdir()):
        raise ConfigError(f"{folder} holds files that are no run; choose another folder")
    folder.mkdir(parents=True, exist_ok=True)
    write_json(path, values)


class Prepared(NamedTuple):
    """All that the transformer learns from."""

    captions: list[str]
    vae: CausalVAE
    latents: Stores | list[ShardSet]
    unseen: Store
    prior: Store | None
    finished: bool  # the model is there already


class _Runner:
    def __init__(self, recipe: Recipe, folder: Path, console: Console, workers: Workers) -> None:
        self.recipe, self.folder, self.console, self.workers = recipe, folder, console, workers
        self.device = workers.device
        self.seconds_file = folder / "seconds.json"

    def go(self) -> Run:
        model = self.folder / "model"
        prepared = self.workers.first("prepared", self._prepare)
        if prepared is None:
            return Run(self.folder, None, self._seconds())
        if not prepared.finished:
            dit = self._transformer(prepared)
            if dit is None:
                return Run(self.folder, None, self._seconds())
            if self.workers.is_first:
                Pipeline(self._card(prepared.captions), prepared.vae, dit).save(model)
        return Run(self.folder, model, self._seconds())

    def _prepare(self) -> "Prepared | None":
        """Make all that the transformer learns from, or find it made; None if that was interrupted."""
        self._claim()
        if isinstance(self.recipe.data, ShardsData):
            return self._open_shards(self.recipe.data)
        learned, unseen = self._clips()
        asked = [] if self.recipe.dit.prior is None else list(self.recipe.dit.prior.prompts)
        self.recipe.text(learned.captions() + unseen.captions() + asked)  # one that is too long stops the run here
        vae = self._autoencoder(learned, unseen)
        if vae is None:
            return None
        unseen_latents = self._latents(vae, unseen, "latents_unseen")
        shapes = {"latents": learned, **{f"latents_{k}": each for k, each in enumerate(self._also(unseen), start=1)}}
        latents = Stores([self._latents(vae, clips, name) for name, clips in shapes.items()])
        finished = (self.folder / "model").exists()
        prior = None if finished else self._prior(vae)
        return Prepared(learned.captions(), vae, latents, unseen_latents, prior, finished)

    def _open_shards(self, data: ShardsData) -> "Prepared":
        path = self.recipe.vae.pretrained
        assert path is not None
        vae, _ = self._pretrained(path)
        file = model_folder(Path(path)) / "vae.safetensors"
        sets, aside = open_sets(data, made_by=[_digest(vae), files_sha256([file])])
        unseen = aside_of(aside, data.num_validation, self.folder / "latents_unseen")
        shape, wanted = unseen.shape("mean"), (vae.config.latent_channels, *self.recipe.latent_shape(self.recipe.clip))
        if shape != wanted:
            raise DataError(f"{aside.name} holds latents of {list(shape)}, the recipe's clip gives {list(wanted)}")
        for each, sizes in zip(sets, self._sizes(sets), strict=True):
            self._check_sizes(each.name, sizes)
        return Prepared([], vae, sets, unseen, None, (self.folder / "model").exists())

    def _card(self, captions: list[str]) -> ModelCard:
        words = {word for caption in captions for word in words_of(caption)}
        if self.recipe.dit.pretrained is not None:
            words.update(read_card(Path(self.recipe.dit.pretrained)).words)
        return self.recipe.card(tuple(sorted(words)))

    def autoencoder(self) -> CausalVAE | None:
        self._claim()
        return self._autoencoder(*self._clips())

    # The folder, and what has been spent in it

    def _claim(self) -> None:
        claim(self.folder, "recipe.json", to_dict(self.recipe), may_change="dit.parallel.")

    def _seconds(self) -> dict[str, float]:
        return json.loads(self.seconds_file.read_text()) if self.seconds_file.is_file() else {}

    @contextmanager
    def _stage(self, name: str, title: str) -> Iterator[Callable[[int, int], None]]:
        """Show a stage's progress and add its time to what earlier sittings spent on it."""
        start = time.perf_counter()
        columns = ("[progress.description]{task.description}", BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=self.console, transient=True, disable=not self.console.is_terminal) as progress:
            task = progress.add_task(title, total=None)
            yield lambda done, total: progress.update(task, completed=done, total=total)
        seconds = time.perf_counter() - start
        self._spent(name, self._seconds().get(name, 0.0) + seconds)
        self.console.print(f"{title}: {seconds:.0f} s", highlight=False)

    def _spent(self, name: str, seconds: float) -> None:
        if self.workers.is_first:
            write_json(self.seconds_file, {**self._seconds(), name: round(seconds, 2)})

    # Clips

    def _clips(self) -> tuple[Clips, Clips]:
        """Return the clips to learn from and the clips set aside."""
        data = self.recipe.data
        if isinstance(data, ShardsData):
            raise ConfigError("an autoencoder learns from clips, and shards hold latents; nearest: data.kind=folder")
        if not isinstance(data, FolderData):
            self._render(data)
            learned = self._decoded(self.folder / "videos", "clips")
            unseen = self._decoded(self.folder / "videos_unseen", "clips_unseen")
            return Clips(learned, torch.arange(len(learned))), Clips(unseen, torch.arange(len(unseen)))
        return set_aside(self._decoded(Path(data.folder), "clips"), data, self.recipe.clip)

    def _also(self, unseen: Clips) -> list[Clips]:
        """Return the clips of the other shapes, but of videos from which clips are set aside."""
        data, found = self.recipe.data, []
        rendered = not isinstance(data, FolderData)
        videos = Path(data.folder) if isinstance(data, FolderData) else self.folder / "videos"
        aside = set() if rendered else {unseen.store.meta(row)["file"] for row in unseen.rows.tolist()}
        for number, spec in enumerate(self.recipe.also, start=1):
            store = self._decoded(videos, f"clips_{number}", spec)
            rows = [row for row in range(len(store)) if store.meta(row)["file"] not in aside]
            if not rows:
                raise DataError(
                    f"every video of {videos} that gives clips of {spec.width}x{spec.height} has clips set aside; leave "
                    f"that shape out of also, or add videos"
                )
            found.append(Clips(store, torch.tensor(rows)))
        return found

    def _render(self, data: WorldData | SubjectData) -> None:
        learned, held_out = data.combinations
        parts = (("videos", data.num_clips, learned, 0), ("videos_unseen", data.num_validation, held_out, 1))
        for name, num_clips, combinations, offset in parts:
            target, partial = self.folder / name, self.folder / f".{name}.partial"
            if target.exists():
                continue
            shutil.rmtree(partial, ignore_errors=True)
            with self._stage("render", f"rendering {num_clips:,} clips of the world") as on_clip:
                render_world(
                    partial,
                    data.world,
                    num_clips=num_clips,
                    combinations=combinations,
                    seed=data.seed + offset,
                    on_clip=on_clip,
                )
            if isinstance(data, SubjectData):
                for caption in partial.glob("*.txt"):
                    caption.write_text(data.named(caption.read_text()))
            partial.rename(target)

    def _decoded(self, videos: Path, name: str, spec: ClipSpec | None = None) -> Store:
        recipe, spec = self.recipe, spec or self.recipe.clip
        among = (recipe.clip, *recipe.also) if recipe.also else ()
        with self._stage("decode", f"decoding {videos.name}") as on_file:
            report = build_clip_store(videos, spec, self.folder / name, among=among, on_file=on_file)
        for reason in report.rejected:
            self.console.print(f"skipped {reason}", highlight=False)
        return Store.open(self.folder / name)

    # The autoencoder

    def _autoencoder(self, learned: Clips, unseen: Clips) -> CausalVAE | None:
        """Return the trained autoencoder, or None when training was interrupted."""
        stage, final = self.recipe.vae, self.folder / "vae" / "final.safetensors"
        if stage.pretrained is None:
            torch.manual_seed(stage.training.seed)
            vae, reference = CausalVAE(stage.model), None
        else:
            vae, reference = self._pretrained(stage.pretrained)
            if not stage.tuned:
                return vae
        if final.is_file():
            load_weights(final, vae)
            return vae.to(self.device).eval()
        if stage.start == "linear":  # on the CPU: the same on every device, where an eigenvector may have another sign
            with self._stage("autoencoder", "fitting a projection"):
                fit_linear(vae, (to_float(learned.store.batch("frames", part)) for part in _spread(learned, 512)))
        vae.to(self.device)
        if not any(weight.requires_grad for weight in vae.parameters()):  # pixels, or a projection alone
            vae.eval()
            with self._stage("encode", "measuring the latents"):
                self._fit_statistics(vae, learned)
            final.parent.mkdir(exist_ok=True)
            if stage.start == "linear":
                self._report(self._task(vae, unseen, reference))
            write_whole_tensors(final, vae.state_dict())
            return vae
        task = self._task(vae, unseen, reference)
        self.console.rule("autoencoder")
        num_batches = stage.training.steps * stage.training.accumulate
        with ShuffledBatches(
            len(learned.rows),
            stage.training.batch_size,
            lambda rows, generator: draw_crops(
                learned.store.batch("frames", learned.rows[rows]),
                stage.loss,
                generator,
                progress=batches.consumed / num_batches,  # of this very batch, as none is read ahead
            ),
            seed=stage.training.seed,
            prefetch=0,  # a second pool of threads would cost a tenth of a step; the crops take less
        ) as batches:
            result = train(
                task,
                batches,
                stage.training,
                self.folder / "vae",
                hidden=task.hidden,
                console=self.console,
            )
        self._spent("autoencoder", result.seconds)
        if result.interrupted:
            return None
        load_weights(best_weights(result.checkpoint), task.model)
        vae.eval()
        if stage.loss.learned == "all":
            with self._stage("encode", "measuring the latents"):
                self._fit_statistics(vae, learned)
        write_whole_tensors(final, vae.state_dict())
        return vae

    def _task(self, vae: CausalVAE, unseen: Clips, reference: Reference | None) -> AutoencoderTask:
        stage = self.recipe.vae
        validation = unseen.store.batch("frames", unseen.rows[:32])
        cost = vae_cost(stage.model, stage.loss.crop_frames, stage.loss.crop_size, stage.loss.crop_size)

        def preview(folder: Path, step: int) -> None:
            shown = to_float(moved(validation[:4], self.device))
            pairs = torch.stack([shown, vae.decode(vae.encode(shown).mean).float()], dim=1).flatten(0, 1)
            write_contact_sheet(folder / f"{step:08d}.png", [to_frames(clip).numpy() for clip in pairs], columns=6)

        perceptual = (
            efficientnet_lite0().to(self.device) if stage.perceptual == "efficientnet-lite0" else pyramid_distance
        )
        return AutoencoderTask(
            vae,
            stage.loss,
            validation=validation,
            flops_per_sample=3.0 * (cost.encode_flops + cost.decode_flops),
            perceptual=perceptual,
            reference=reference,
            measure=partial(measure_rebuilt, perceptual=perceptual),
            previewer=preview,
        )

    def _report(self, task: AutoencoderTask) -> None:
        """Log how well an autoencoder that needs no training rebuilds unseen clips."""
        with torch.no_grad():
            values = task.validate(torch.Generator())
        log = RunLog(self.folder / "vae", resumed_from=0)
        log.write(0, "validation", values)
        log.close()
        self.console.print(f"unseen clips rebuilt at {values['psnr']:.2f} dB", highlight=False)

    def _pretrained(self, path: str) -> tuple[CausalVAE, Reference]:
        """Return the autoencoder of a folder, inflated if need be, and a function to its latents of single frames."""
        stage, vae = self.recipe.vae, pretrained_autoencoder(Path(path)).to(self.device)
        own = vae.config
        reference = frame_latents(deepcopy(vae).eval(), stage.model.temporal_stride)
        if own != stage.model:
            halvings = stage.model.temporal_stride.bit_length() - 1
            try:
                fits = inflated(own, halvings=halvings) == stage.model
            except ConfigError:
                fits = False
            if not fits:
                raise ConfigError(
                    f"the autoencoder of {path} has another shape than vae.model; copy its configuration, or inflate it"
                )
            vae = inflate(vae, halvings=halvings)
        return vae.eval(), reference

    def _fit_statistics(self, vae: CausalVAE, clips: Clips) -> None:
        """Measure the latents' mean and std over (at most 256) clips, and give them to the autoencoder."""
        with torch.no_grad(), self._autocast(self.recipe.vae.training):
            means = [vae.encode(self._floats(clips, part)).mean.float() for part in _spread(clips, 256)]
        values = torch.cat(means).transpose(0, 1).flatten(1)
        vae.set_statistics(values.mean(1), values.std(1))

    def _floats(self, clips: Clips, rows: Tensor) -> Tensor:
        return to_float(moved(clips.store.batch("frames", rows), self.device))

    def _autocast(self, training: TrainingConfig) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=training.precision == "bf16")

    # Latents

    def _latents(self, vae: CausalVAE, clips: Clips, name: str) -> Store:
        """Cache every clip's posterior and text features, bound to the autoencoder that made them."""
        folder = self.folder / name
        made_by = {"vae": _digest(vae), "clips": clips.store.fingerprint, "text": to_dict(self.recipe.text)}
        if (folder / "store.json").is_file():
            return Store.open(folder, fingerprint=made_by)
        shutil.rmtree(folder, ignore_errors=True)  # begun and not finished: nothing is lost
        captions = clips.captions()

        def samples(on_clip: Callable[[int, int], None]) -> Iterator[dict[str, Tensor]]:
            done = 0
            for part, caption in zip(clips.rows.split(8), _split(captions, 8), strict=True):
                with torch.no_grad(), self._autocast(self.recipe.vae.training):
                    mean, logvar = (half.half().cpu() for half in vae.encode(self._floats(clips, part)))
                text = parts_of_condition(self.recipe.text(caption).condition())
                for index in range(len(part)):
                    yield {
                        "mean": mean[index],
                        "logvar": logvar[index],
                        **{name: part[index] for name, part in text.items()},
                    }
                done += len(part)
                on_clip(done, len(clips.rows))

        with self._stage("encode", f"encoding {len(clips.rows):,} clips") as on_clip:
            write_store(
                folder, samples(on_clip), fingerprint=made_by, meta=[{"caption": caption} for caption in captions]
            )
        return Store.open(folder, fingerprint=made_by)

    def _sizes(self, sets: list[ShardSet]) -> list[Sizes]:
        return sizes_of(sets, self.recipe.dit.model, context_tokens=self.recipe.text.context_tokens)

    def _check_sizes(self, name: str, sizes: Sizes) -> None:
        """Refuse clips of shapes that the recipe has no way with."""
        recipe, wanted = self.recipe, self.recipe.latent_shape(self.recipe.clip)
        for shape, tokens, _ in sizes.found:
            if recipe.dit.batches is None and shape != wanted:
                raise DataError(
                    f"{name} holds latents of {shape} frames, rows and columns, the recipe's clip gives {wanted}; for clips of "
                    f"several shapes set dit.batches, to {{kind: packed, tokens: {tokens}}} at least"
                )
            shift_for(recipe.dit.flow.shift, tokens - recipe.text.context_tokens)

    # The transformer

    def _untrained(self) -> VideoDiT:
        """Return the transformer as it begins, drawn on the CPU."""
        stage = self.recipe.dit
        torch.manual_seed(stage.training.seed)
        if stage.pretrained is not None:
            return self._pretrained_transformer(stage.pretrained).to(self.device)
        return VideoDiT(stage.model).to(self.device)

    def _transformer(self, prepared: "Prepared") -> VideoDiT | None:
        """Return the trained transformer, or None when training was interrupted."""
        stage, vae, latents, unseen = self.recipe.dit, prepared.vae, prepared.latents, prepared.unseen
        dit, adapter = self._untrained(), None
        if stage.adapter is not None:  # before weights are spread, whose lengths it may begin with
            adapter = new_adapter(dit, stage.adapter, torch.Generator().manual_seed(stage.training.seed))
        dit = parallelize(dit, self.workers, stage.parallel)
        data, rows, sizes = self.recipe.data, list[Size](), list[Sizes]()
        if isinstance(latents, Stores):
            extents = [(t, h, w) for _, t, h, w in (latents.shape("mean", row) for row in range(len(latents)))]
            rows = clip_sizes(stage.model, extents, context_tokens=self.recipe.text.context_tokens)
            flops = sum(size.flops for size in rows) / len(rows)
        else:
            assert isinstance(data, ShardsData)
            sizes = self._sizes(latents)
            flops = mean_flops(sizes, data.weights)

        def preview(folder: Path, step: int) -> None:
            prompts = [str(unseen.meta(row)["caption"]) for row in range(min(4, len(unseen)))]
            clips = Pipeline(self._card(prompts), vae, dit).generate(prompts)
            write_contact_sheet(folder / f"{step:08d}.png", [to_frames(clip).numpy() for clip in clips], columns=6)

        null = self.recipe.text([""]).condition()
        prior = prepared.prior

        def batch(store: Store, rows: Tensor) -> LatentBatch:
            posterior = Posterior(*(store.batch(key, rows).float() for key in ("mean", "logvar")))
            stored: dict[str, Any] = {name: store.batch(name, rows) for name in parts_of_condition(null)}
            return LatentBatch(posterior, Condition(**stored))

        def subject(rows: Tensor) -> LatentBatch | list[LatentBatch]:
            assert isinstance(latents, Stores)
            stores, own = zip(*map(latents.place, rows.tolist()), strict=True)
            if isinstance(stage.batches, Packed):
                return [batch(store, torch.tensor([row])) for store, row in zip(stores, own, strict=True)]
            return batch(stores[0], torch.tensor(own))

        def collate(rows: Tensor, generator: torch.Generator) -> LatentBatch | list[LatentBatch] | Preserved:
            if stage.prior is None or prior is None:
                return subject(rows)
            drawn = torch.randint(len(prior), (len(rows),), generator=generator)
            return Preserved(subject(rows), batch(prior, drawn), stage.prior.weight)

        flow = FlowTask(
            dit,
            stage.flow,
            null=null,
            validation=batch(unseen, torch.arange(min(32, len(unseen)))),
            flops_per_sample=flops,
            previewer=preview,
            device=self.device,
        )
        task: FlowTask | AdapterTask = flow
        if adapter is not None:
            task = AdapterTask(flow, adapter, workers=self.workers)
        self.console.rule("transformer")
        seed, size = stage.training.seed, stage.training.batch_size
        loader: ShuffledBatches[Any] | ShardedBatches[Any]
        if isinstance(data, ShardsData):
            assert isinstance(latents, list)
            loader = sharded_batches(latents, data, stage.batches or size, sizes, seed=seed, on_skip=self.console.print)
        else:  # no prefetch: a batch takes a millisecond, less than a second pool of threads would cost
            plan = size if stage.batches is None else Plan(stage.batches, rows)
            loader = ShuffledBatches(len(latents), plan, collate, seed=seed, prefetch=0)
        with loader as batches:
            result = train(
                task,
                batches,
                stage.training,
                self.folder / "dit",
                hidden=inner_matrix if stage.adapter is None else lambda name, weight: False,
                workers=self.workers,
                data=_hash_of(
                    [store.fingerprint for store in (*latents.stores, unseen)]
                    if isinstance(latents, Stores)
                    else [each.identity for each in latents]
                ),
                console=self.console,
            )
        self._spent("transformer", result.seconds)
        if result.interrupted:
            return None
        if not self.workers.is_first:  # which alone has a use for the whole
            return dit
        if self.workers.mesh is not None:
            dit = VideoDiT(stage.model) if adapter is None else self._untrained()
        load_weights(best_weights(result.checkpoint), dit if adapter is None else task.model)
        if isinstance(task, AdapterTask):
            task.applied.undo()
            shutil.rmtree(self.folder / "adapter", ignore_errors=True)  # of a run that was killed before its model
            times = None if stage.flow.times == (0.0, 1.0) else stage.flow.times
            save_adapter(task.model.adapter, dit, self.folder / "adapter", times=times)
            merge(dit, [(task.model.adapter, 1.0)])
        return dit.eval()

    def _prior(self, vae: CausalVAE) -> Store | None:
        """Cache latents of what the transformer makes of its class before it is trained on, and show some of it."""
        stage, recipe = self.recipe.dit, self.recipe
        if stage.prior is None or stage.pretrained is None:
            return None
        prior, folder = stage.prior, self.folder / "latents_prior"
        made_by = {
            "model": fingerprint(Path(stage.pretrained)),
            "prior": to_dict(prior),
            "sampling": to_dict(recipe.sampling),
            "text": to_dict(recipe.text),
        }
        if (folder / "store.json").is_file():
            return Store.open(folder, fingerprint=made_by)
        shutil.rmtree(folder, ignore_errors=True)  # begun and not finished
        pipeline = Pipeline(self._card([]), vae, self._untrained())
        prompts = [prior.prompts[index % len(prior.prompts)] for index in range(prior.num_clips)]

        def samples(on_clip: Callable[[int, int], None]) -> Iterator[dict[str, Tensor]]:
            for done in range(0, len(prompts), 16):
                part = prompts[done : done + 16]
                latents = pipeline.generate(part, seed=prior.seed + done, output="latents").half().cpu()
                text = parts_of_condition(recipe.text(part).condition())
                for index in range(len(part)):
                    yield {
                        "mean": latents[index],
                        "logvar": torch.full_like(latents[index], POINT),
                        **{name: value[index] for name, value in text.items()},
                    }
                on_clip(done + len(part), len(prompts))

        meta = [{"caption": text, "seed": prior.seed + index} for index, text in enumerate(prompts)]
        with self._stage("prior", f"making {len(prompts):,} clips of the class") as on_clip:
            write_store(folder, samples(on_clip), fingerprint=made_by, meta=meta)
        store = Store.open(folder)
        with torch.no_grad():
            first = moved(store.batch("mean", torch.arange(min(8, len(store)))).float(), self.device)
            shown = vae.decode(first).float()
        write_contact_sheet(folder / "clips.png", [to_frames(clip).numpy() for clip in shown], columns=6)
        return store

    def _pretrained_transformer(self, path: str) -> VideoDiT:
        """Return the transformer of a folder, once it fits the recipe.

        Raises:
            ConfigError: it has another shape, or reads other text.
        """
        found = Pipeline.load(Path(path))
        own, asked = (
            {"dit.model": card.dit, "dit.flow.tells": card.tells, "text": card.text, "vae.model": card.vae}
            for card in (found.card, self.recipe.card())
        )
        if other := [name for name in own if own[name] != asked[name]]:
            raise ConfigError(f"{', '.join(other)} of {path} differ from the recipe's; copy them")
        return found.dit


def _spread(clips: Clips, most: int) -> tuple[Tensor, ...]:
    """Return at most so many rows, spread over all, in batches of 8."""
    return clips.rows[torch.linspace(0, len(clips.rows) - 1, min(most, len(clips.rows))).long()].split(8)


def best_weights(checkpoint: Path) -> Path:
    """Return the averaged weights of a checkpoint, or the plain ones where no average was kept."""
    return next(path for path in (checkpoint / "ema.safetensors", checkpoint / "weights.safetensors") if path.is_file())


def parts_of_condition(condition: Condition) -> dict[str, Any]:
    """Return what a condition has, by the names of its fields."""
    found = {field.name: getattr(condition, field.name) for field in fields(condition)}
    return {name: part for name, part in found.items() if part is not None}


def _split(items: list[str], size: int) -> list[list[str]]:
    return [items[start : start + size] for start in range(0, len(items), size)]


def _digest(model: CausalVAE) -> str:
    """Return a hash of a model's weights, to tell one from another."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(name.encode() + value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _hash_of(values: object) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def _differences(before: object, now: object, path: str = "") -> list[str]:
    """Name the values in which two recipes differ."""
    if isinstance(before, dict) and isinstance(now, dict):
        names = {**before, **now}
        return [
            d for name in names for d in _differences(before.get(name), now.get(name), f"{path}.{name}".lstrip("."))
        ]
    return [] if before == now else [f"{path} was {before}, now {now}"]
