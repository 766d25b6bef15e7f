"""An adapter of a published system, learned from a folder of clips.

    RUN/tuning.json     all that the run depends on
    RUN/clips/          every clip decoded once
    RUN/latents/        every clip's posterior, by the system's own autoencoder, and features of its own text encoders
    RUN/dit/            the training
    RUN/adapter/        what was learned, as diffusers loads it

The network keeps its process and its way of reading time; what is drawn are times of the expert that learns.
"""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console
from torch import Tensor

from reelflow.config import configuration, to_dict
from reelflow.data.folder import ClipSpec
from reelflow.data.loader import ShuffledBatches
from reelflow.data.store import Store, build_clip_store, write_store
from reelflow.diffusion.process import RectifiedFlow
from reelflow.diffusion.timesteps import LogitNormal, Shift, TimeDistribution
from reelflow.errors import ConfigError
from reelflow.families.adapters import NETWORKS, save_adapter
from reelflow.families.system import Asked, Conditions, System
from reelflow.families.systems import load_system, sketch_system
from reelflow.generation.published import PublishedPipeline, PublishedSampling
from reelflow.models.adapters import LoRA, new_adapter
from reelflow.models.condition import Condition
from reelflow.models.vae import Posterior
from reelflow.models.weights import files_sha256, load_weights
from reelflow.parallel.device import take_device
from reelflow.recipes.recipe import FolderData
from reelflow.recipes.runs import Clips, best_weights, claim, parts_of_condition, set_aside
from reelflow.training.adapter import AdapterTask
from reelflow.training.autoencoder import to_float
from reelflow.training.flow import FlowConfig, FlowTask, LatentBatch, clip_sizes
from reelflow.training.loop import TrainingConfig, train
from reelflow.training.optim import OptimizerConfig

__all__ = ["Tuning", "times_of", "tune", "tuning"]

KEPT = ("context", "context_mask", "vector", "numbers")  # of a condition, in the cache


@configuration
class Tuning:
    """An adapter of a published system, as diffusers writes it in a folder, and what it is learned from.

    Raises:
        ConfigError: `times` are no range.
    """

    system: str
    data: FolderData
    clip: ClipSpec
    adapter: LoRA
    training: TrainingConfig
    network: Literal["transformer", "transformer_2"] = "transformer"
    time: TimeDistribution = LogitNormal()
    shift: Shift = 1.0
    times: tuple[float, float] | None = None  # that are drawn; None: all that the network works at
    condition_dropout: float = 0.1

    def __post_init__(self) -> None:
        FlowConfig(
            time=self.time,
            shift=self.shift,
            times=self.times or (0.0, 1.0),
            condition_dropout=self.condition_dropout,
            given_fraction=0.0,
        )


def tuning(system: str, data: str) -> Tuning:
    """Return a LoRA of rank 16 on clips of the system's usual size, 1,000 steps of one clip.

    Raises:
        CheckpointError: the folder holds no system known here.
    """
    usual = sketch_system(system).defaults
    frames, height, width = usual.clip
    return Tuning(
        system=system,
        data=FolderData(folder=data, num_validation=2),
        clip=ClipSpec(num_frames=frames, height=height, width=width, fps=usual.fps),
        adapter=LoRA(rank=16, targets=("attention", "mlp")),
        training=TrainingConfig(
            steps=1000,
            batch_size=1,
            optimizer=OptimizerConfig(lr=1e-4, muon_lr=None, warmup_steps=20, decay="constant"),
            seed=0,
            ema_decay=None,
            precision="bf16",
            validate_every=100,
            checkpoint_every=100,
        ),
    )


def times_of(system: System, network: str, asked: tuple[float, float] | None) -> tuple[float, float]:
    """Return the times that a network of a system learns: those asked for, or all that it works at.

    Raises:
        ConfigError: the system has no such network, or another one works at some of these times.
    """
    known = NETWORKS[: len(system.experts)]
    if network not in known:
        raise ConfigError(f"the system has no {network}; nearest: network={known[-1]}")
    index = known.index(network)
    low, high = 0.0 if index == 0 else system.experts[index - 1].until, system.experts[index].until
    if asked is None:
        return low, high
    if asked[0] < low or asked[1] > high:
        near = max(low, asked[0]), min(high, asked[1])
        raise ConfigError(
            f"{network} works from t = {low:g} to {high:g} (0 is noise), and times {asked[0]:g} to {asked[1]:g} are asked for; "
            f"nearest: {' to '.join(f'{each:g}' for each in (near if near[0] < near[1] else (low, high)))}"
        )
    return asked


def tune(config: Tuning, folder: Path, *, device: str = "auto", console: Console | None = None) -> Path | None:
    """Learn an adapter in `folder`, or go on where an earlier call stopped; return its folder, or None if interrupted.

    `device` is as `take_device` reads it.

    Raises:
        CheckpointError: the system cannot be read.
        ConfigError: the system cannot be taught so, or makes no such clips; the folder holds another run; or there is no such
            device.
        DataError: there is nothing to learn from.
    """
    console = console or Console()
    made = folder / "adapter"
    times, place = _check(config), take_device(device)
    claim(folder, "tuning.json", to_dict(config))
    if made.is_dir():
        return made
    report = build_clip_store(Path(config.data.folder), config.clip, folder / "clips")
    for reason in report.rejected:
        console.print(f"skipped {reason}", highlight=False)
    learned, unseen = set_aside(Store.open(folder / "clips"), config.data, config.clip)
    system = load_system(config.system, dtype=torch.float32, device=place)
    network = system.experts[NETWORKS.index(config.network)].network
    told = _conditions(system, config, [""])
    null = told.cond.to("cpu")
    store = _encoded(system, config, learned, folder / "latents")
    aside = _encoded(system, config, unseen, folder / "latents_unseen")

    def batch(store: Store, rows: Tensor) -> LatentBatch:
        posterior = Posterior(*(store.batch(key, rows) for key in ("mean", "logvar")))
        stored: dict[str, Any] = {name: store.batch(name, rows) for name in parts_of_condition(null)}
        return LatentBatch(posterior, Condition(**stored))

    shape, context = store.batch("mean", torch.zeros(1, dtype=torch.int64)).shape, null.context
    size = clip_sizes(
        network.config, [(shape[2], shape[3], shape[4])], context_tokens=0 if context is None else context.shape[1]
    )
    flow = FlowTask(
        network,
        FlowConfig(
            parameterization=system.walk.parameterization,
            time=config.time,
            shift=config.shift,
            times=times,
            condition_dropout=config.condition_dropout,
            given_fraction=0.0,
        ),
        null=null,
        validation=batch(aside, torch.arange(min(8, len(aside)))),
        flops_per_sample=size[0].flops,
        token_rate=told.token_rate,
    )
    task = AdapterTask(flow, new_adapter(network, config.adapter, torch.Generator().manual_seed(config.training.seed)))
    with ShuffledBatches(
        len(store),
        config.training.batch_size,
        lambda rows, _: batch(store, rows),
        seed=config.training.seed,
        prefetch=0,
    ) as batches:
        result = train(
            task, batches, config.training, folder / "dit", hidden=lambda name, weight: False, console=console
        )
    if result.interrupted:
        return None
    load_weights(best_weights(result.checkpoint), task.model)
    task.applied.undo()
    save_adapter(
        task.model.adapter,
        network,
        made,
        layout="diffusers",  # which calls the second of two networks like the first; the times tell
        times=None if times == (0.0, 1.0) else times,
    )
    return made


def _check(config: Tuning) -> tuple[float, float]:
    """Refuse what cannot be learned before anything is read or written, and return the times to learn."""
    system = sketch_system(config.system)
    for wrong, why in (
        (system.picture == "must", "it only makes pictures move, which is not taught yet"),
        (not isinstance(system.walk.parameterization.process, RectifiedFlow), "it is no rectified flow"),
        (system.walk.inverted, "its times run the other way"),
        (bool(system.frames_before) or system.fills_patches, "it makes latents before the clip's"),
        (system.next_time, "its network is told where a step leads to"),
    ):
        if wrong:
            raise ConfigError(f"{config.system} cannot be taught so: {why}; nearest: a system of text to video")
    clip = config.clip
    PublishedPipeline(system).check(
        [""], num_frames=clip.num_frames, sampling=PublishedSampling(height=clip.height, width=clip.width)
    )
    return times_of(system, config.network, config.times)


def _conditions(system: System, config: Tuning, prompts: list[str]) -> Conditions:
    """Return what a network is told of prompts.

    Raises:
        ConfigError: more than a cache keeps.
    """
    clip = config.clip
    shape = PublishedPipeline(system).latent_shape(clip.num_frames, clip.height, clip.width)
    with torch.no_grad():
        told = system.conditions(
            Asked(
                prompts=prompts,
                negative=len(prompts) * [""],
                num_frames=clip.num_frames,
                height=clip.height,
                width=clip.width,
                fps=clip.fps,
                image=None,
                embedded_guidance=system.defaults.embedded_guidance,
                latent_shape=shape,
                generators=[torch.Generator().manual_seed(0) for _ in prompts],
                guided=False,
            )
        )
    more = [name for name in parts_of_condition(told.cond) if name not in KEPT]
    if more or told.known is not None or told.start is not None:
        raise ConfigError(f"{config.system} tells its network more than a cache keeps: {', '.join(more) or 'latents'}")
    return told


def _encoded(system: System, config: Tuning, clips: Clips, folder: Path) -> Store:
    """Cache every clip's posterior and text features, bound to what made them."""
    vae = Path(config.system) / "vae"
    made_by = {"vae": files_sha256(sorted(vae.glob("*.safetensors"))), "clips": clips.store.fingerprint}
    if (folder / "store.json").is_file():
        return Store.open(folder, fingerprint=made_by)
    shutil.rmtree(folder, ignore_errors=True)  # begun and not finished: nothing is lost
    captions = clips.captions()

    def samples() -> Iterator[dict[str, Tensor]]:
        for row, caption in zip(clips.rows.split(1), captions, strict=True):
            with torch.no_grad():
                frames = clips.store.batch("frames", row).to(system.vae.latent_std.device)
                posterior = Posterior(*(half.cpu() for half in system.vae.encode(to_float(frames))))
            told = parts_of_condition(_conditions(system, config, [caption]).cond.to("cpu"))
            yield {
                "mean": posterior.mean[0],
                "logvar": posterior.logvar[0],
                **{name: part[0] for name, part in told.items()},
            }

    write_store(folder, samples(), fingerprint=made_by, meta=[{"caption": caption} for caption in captions])
    return Store.open(folder)
