"""The whole line on one machine: learn the synthetic world, make clips nobody has seen, score them, show them.

    OUT/run/            the training run, continued where an earlier call stopped
    OUT/clips/          what was generated, as mp4
    OUT/results.json    every number
    OUT/index.html      the page to look at

Every number has a target and a floor below which the demo counts as failed.
"""

import json
import os
import platform
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Float, UInt8
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn.functional import pad

from reelflow.config import from_dict, to_dict
from reelflow.data.store import Store
from reelflow.data.video import write_image, write_video
from reelflow.data.worlds import REACH, Combination, Scene, World, analyse, prompt, split_combinations
from reelflow.errors import ConfigError
from reelflow.evaluation.frechet import PixelPyramid, frechet_between
from reelflow.evaluation.pixels import first_frame_agreement, flicker, psnr, ssim
from reelflow.evaluation.world import PromptScores, score_prompts
from reelflow.generation.pipeline import Pipeline, to_frames
from reelflow.recipes.files import write_json
from reelflow.recipes.page import Animation, Reconstruction, Results, Sample, Target, write_page
from reelflow.recipes.recipe import Recipe, WorldData
from reelflow.recipes.runs import run
from reelflow.recipes.world import world
from reelflow.training.autoencoder import to_float
from reelflow.training.meters import duration, peak_memory_bytes

__all__ = ["demo"]

BATCH = 32  # clips generated at once
SEED_HELD_OUT, SEED_FAMILIAR, SEED_ANIMATED, SEED_LONG = 0, 10_000, 20_000, 30_000  # clip i draws from seed + i
NUM_SHOWN = 4  # reconstructions and animations on the page
GAP = 2  # pixels between clips shown side by side
MISS = (0.6, -0.7, -0.7)  # the frame around a clip that does not show what was asked


def demo(
    out: Path = Path("demo"),
    *,
    console: Console | None = None,
    recipe: Recipe | None = None,
    per_prompt: int = 8,
    num_familiar: int = 48,
    num_animated: int = 32,
    long_frames: int = 65,
) -> bool:
    """Train (or go on training), generate, score, and write the page; return whether no number is missed by far.

    `per_prompt` clips are made of every held-out combination, `num_familiar` of combinations that were trained on,
    `num_animated` from the first frames of unseen clips, and one of `long_frames` frames of each held-out combination
    that circles. Interrupted training returns False; the same call goes on. What an earlier call made is replaced.

    Raises:
        ConfigError: the recipe has no synthetic world, the long clip has an impossible length, or `out` holds
            something else.
    """
    console, recipe = console or Console(), recipe or world()
    if not isinstance(recipe.data, WorldData):
        raise ConfigError(
            f"the demo scores clips of the synthetic world, got a recipe on data.kind = {recipe.data.kind}"
        )
    recipe.vae.model.latent_shape(long_frames, recipe.clip.height, recipe.clip.width)
    if out.exists() and not out.is_dir():
        raise ConfigError(f"{out} is a file; choose a folder")
    strangers = sorted(p.name for p in out.iterdir() if p.name != "run") if out.is_dir() else []
    if strangers and not (out / "run" / "recipe.json").is_file():
        raise ConfigError(f"{out} holds {strangers[0]}, which is no demo's; choose another folder")

    finished = run(recipe, out / "run", console=console)
    if finished.model is None:
        console.print("Training was interrupted; the same command goes on where it stopped.")
        return False
    (out / "clips").mkdir(exist_ok=True)
    exhibition = _Exhibition(Pipeline.load(finished.model), recipe.data, out, console, dict(finished.seconds))
    results = exhibition.open(per_prompt, num_familiar, num_animated, long_frames)
    write_json(out / "results.json", to_dict(results))
    write_page(out / "index.html", results, finished.folder)
    console.print(_table(results.targets))
    console.print(f"Look at {out / 'index.html'}", highlight=False)
    return not any(target.missed_widely for target in results.targets)


class _Exhibition:
    """A trained model, the real clips it never saw, and a folder for what is made of both."""

    def __init__(
        self, pipeline: Pipeline, data: WorldData, out: Path, console: Console, seconds: dict[str, float]
    ) -> None:
        self.pipeline, self.world, self.out, self.console, self.seconds = pipeline, data.world, out, console, seconds
        self.fps = pipeline.card.clip.fps
        self.learned, self.held_out = split_combinations(seed=data.seed)
        store, some = Store.open(out / "run" / "clips_unseen"), Store.open(out / "run" / "clips")
        truth = json.loads((out / "run" / "videos_unseen" / "world.json").read_text())["clips"]
        scenes = {clip["file"]: from_dict(Scene, clip["scene"]) for clip in truth}
        self.scenes = [scenes[store.meta(row)["file"]] for row in range(len(store))]
        self.real = to_float(store.batch("frames", torch.arange(len(store))))
        self.real_learned = to_float(some.batch("frames", torch.arange(min(len(store), len(some)))))

    def open(self, per_prompt: int, num_familiar: int, num_animated: int, long_frames: int) -> Results:
        """Make and measure everything that is shown."""
        asked = [combination for combination in self.held_out for _ in range(per_prompt)]
        with self._stage("new prompts", f"{len(asked)} clips of combinations held out of training"):
            made = self._generate(asked, SEED_HELD_OUT)
            samples, scores = self._exhibit("asked", made, asked)
            wall = self._wall(made, samples, per_prompt)

        familiar = [self.learned[i * len(self.learned) // num_familiar] for i in range(num_familiar)]
        with self._stage("known prompts", f"{num_familiar} clips of combinations trained on"):
            scores_familiar = score_prompts(_frames(self._generate(familiar, SEED_FAMILIAR)), familiar)

        animations, scores_animated, first_frame = self._animate(num_animated)
        reconstructions, fidelity, likeness = self._rebuild()

        circling = [combination for combination in self.held_out if combination.motion == "circling"]
        with self._stage("long clips", f"{len(circling)} clips of {long_frames} frames"):
            made_long = self._generate(circling, SEED_LONG, num_frames=long_frames)
            long, _ = self._exhibit("long", made_long, circling)

        with self._stage("comparison", "generated against real clips"):
            scores_real = score_prompts(_frames(self.real), [scene.combination for scene in self.scenes])
            pyramid = PixelPyramid(num_frames=made.shape[2], size=(made.shape[3], made.shape[4]))
            measures: dict[str, float | str] = {
                "Known prompts: colour, shape, motion, all three": _shares(scores_familiar),
                "From a picture: colour, shape, motion, all three": _shares(scores_animated),
                "SSIM of reconstructions": likeness,
                "Flicker of generated clips": flicker(made).mean().item(),
                "Flicker of long clips": flicker(made_long).mean().item(),
                "Flicker of real clips": flicker(self.real).mean().item(),
                "Generated against real": str(frechet_between([made], [self.real], pyramid, frame_stride=1)),
                "Real against real": str(frechet_between([self.real_learned], [self.real], pyramid, frame_stride=1)),
            }
        return Results(
            command=shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
            machine=_machine(),
            targets=(
                Target("Unseen clips reconstructed", fidelity, 30.0, 27.0, "dB"),
                Target("New prompts: colour", 100 * scores.colour, 98.0, 90.0, "%"),
                Target("New prompts: shape", 100 * scores.shape, 90.0, 60.0, "%"),
                Target("New prompts: motion", 100 * scores.motion, 95.0, 75.0, "%"),
                Target("New prompts: all three", 100 * scores.all, 85.0, 50.0, "%"),
                Target("Real clips: all three", 100 * scores_real.all, 100.0, 98.0, "%"),
                Target("From a picture: first frame", first_frame, 28.0, 25.0, "dB"),
                Target("From a picture: motion", 100 * scores_animated.motion, 90.0, 60.0, "%"),
                Target("Time", sum(self.seconds.values()) / 60, 10.0, None, "min", at_most=True),
                Target("Peak memory", peak_memory_bytes() / 2**30, 6.0, None, "GiB", at_most=True),
            ),
            seconds=self.seconds,
            measures=measures,
            samples=tuple(samples),
            per_prompt=per_prompt,
            wall=wall,
            reconstructions=tuple(reconstructions),
            animations=tuple(animations),
            long=tuple(long),
            long_frames=long_frames,
        )

    def _animate(self, num: int) -> tuple[list[Animation], PromptScores, float]:
        """Let the first frames of unseen clips move: every second one as it did, the others some other way."""
        num = min(num, len(self.real))
        pictures = self.real[:num, :, 0]
        asked = [scene.combination for scene in self.scenes[:num]]
        for i in range(1, num, 2):
            asked[i] = asked[i]._replace(motion=_another_motion(self.world, self.scenes[i]))
        with self._stage("pictures", f"{num} clips from a given first frame"):
            clips = self._generate(asked, SEED_ANIMATED, pictures=pictures)
            agreement = first_frame_agreement(clips, pictures)
            samples, scores = self._exhibit("animated", clips, asked)
            animations = []
            for i, sample in enumerate(samples[:NUM_SHOWN]):
                file = f"clips/given-{i:03d}.png"
                write_image(self.out / file, to_frames(pictures[i, :, None])[0])
                animations.append(Animation(file, sample, agreement[i].item()))
        return animations, scores, agreement.mean().item()

    @torch.no_grad()
    def _rebuild(self) -> tuple[list[Reconstruction], float, float]:
        """Send every unseen clip through the autoencoder; return the first few, the mean PSNR, and the SSIM of 16."""
        vae = self.pipeline.vae
        with self._stage("reconstruction", f"{len(self.real)} clips through the autoencoder"):
            rebuilt = torch.cat([vae.decode(vae.encode(part).mean).clamp(-1, 1) for part in self.real.split(4)])
            fidelity, likeness = psnr(rebuilt, self.real), ssim(rebuilt[:16], self.real[:16])
            shown = []
            for i in range(min(NUM_SHOWN, len(rebuilt))):
                pair = torch.cat([pad(self.real[i], (0, GAP)), rebuilt[i]], dim=3)  # side by side
                caption = prompt(*self.scenes[i].combination)
                shown.append(Reconstruction(self._write(f"rebuilt-{i:03d}", pair), caption, fidelity[i].item()))
        return shown, fidelity.mean().item(), likeness.mean().item()

    def _generate(
        self,
        asked: Sequence[Combination],
        seed: int,
        *,
        pictures: Float[Tensor, "B 3 H W"] | None = None,
        num_frames: int | None = None,
    ) -> Float[Tensor, "B 3 T H W"]:
        """Make a clip of each combination, in batches; clip i draws its noise from seed + i."""
        prompts = [prompt(*combination) for combination in asked]
        clips = []
        for i in range(0, len(prompts), BATCH):
            part = slice(i, i + BATCH)
            image = None if pictures is None else pictures[part]
            clips.append(self.pipeline.generate(prompts[part], num_frames=num_frames, image=image, seed=seed + i))
        return torch.cat(clips)

    def _exhibit(
        self, name: str, clips: Float[Tensor, "B 3 T H W"], asked: Sequence[Combination]
    ) -> tuple[list[Sample], PromptScores]:
        """Write clips to files, and read each back."""
        samples = []
        for i, (clip, frames, wanted) in enumerate(zip(clips, _frames(clips), asked, strict=True)):
            read = analyse(frames)
            samples.append(
                Sample(
                    self._write(f"{name}-{i:03d}-{'-'.join(wanted)}", clip),
                    prompt(*wanted),
                    wanted._asdict(),
                    {"colour": read.colour, "shape": read.shape, "motion": read.motion},
                )
            )
        return samples, score_prompts(_frames(clips), asked)

    def _wall(self, clips: Float[Tensor, "B 3 T H W"], samples: Sequence[Sample], columns: int) -> str:
        """Write all clips as one video, with a red frame around those that do not show what was asked."""
        followed = torch.tensor([sample.followed for sample in samples]).view(-1, 1, 1, 1, 1)
        frame = torch.where(followed, 0.0, torch.tensor(MISS).view(3, 1, 1, 1))
        framed = pad(clips, 4 * (GAP,)).copy_(frame)
        framed[..., GAP:-GAP, GAP:-GAP] = clips
        return self._write(
            "all", rearrange(framed, "(rows columns) C T H W -> C T (rows H) (columns W)", columns=columns)
        )

    def _write(self, name: str, clip: Float[Tensor, "3 T H W"]) -> str:
        file = f"clips/{name}.mp4"
        write_video(self.out / file, to_frames(clip), fps=self.fps)
        return file

    @contextmanager
    def _stage(self, name: str, title: str) -> Iterator[None]:
        start = time.perf_counter()
        with self.console.status(title):
            yield
        self.seconds[name] = round(time.perf_counter() - start, 2)
        self.console.print(f"{title}: {duration(self.seconds[name])}", highlight=False)


def _another_motion(world: World, scene: Scene) -> str:
    """Name the straight motion, not the scene's own, that has most room before it at the start; without room, "still"."""
    x, y = world.trajectory(scene)[0]
    room = {"left": x, "right": world.width - 1 - x, "up": y, "down": world.height - 1 - y}
    room.pop(scene.motion, None)
    motion = max(room, key=lambda name: room[name])
    slowest = 1.2 * world.size / 64 * (world.num_frames - 1)
    return motion if room[motion] > REACH[scene.shape] * scene.radius + slowest else "still"


def _frames(clips: Float[Tensor, "B 3 T H W"]) -> list[UInt8[np.ndarray, "T H W 3"]]:
    return [to_frames(clip).numpy() for clip in clips]


def _shares(scores: PromptScores) -> str:
    return ", ".join(f"{share:.0%}" for share in (scores.colour, scores.shape, scores.motion, scores.all))


def _machine() -> dict[str, str | int]:
    return {
        "cores": os.cpu_count() or 0,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "Python": platform.python_version(),
        "system": platform.platform(terse=True),
        "processor": platform.machine(),
    }


def _table(targets: Sequence[Target]) -> Table:
    table = Table("", "measured", "target", "")
    for column in table.columns[1:3]:
        column.justify = "right"
    for target in targets:
        style = "green" if target.met else "red" if target.missed_widely else "yellow"
        table.add_row(target.name, target.shown, target.wanted, f"[{style}]{target.verdict}")
    return table
