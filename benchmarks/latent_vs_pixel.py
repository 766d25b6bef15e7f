"""One training step on the same clips, in latent and in pixel space: seconds, FLOPs and memory.

Run: python benchmarks/latent_vs_pixel.py (OMP_NUM_THREADS=1 for one thread). The transformer of the recipe `world`
(without its stem) reads 17 x 64 x 64 clips: as latents of the causal autoencoder, or as pixels cut into patches. Patch
4 x 16 x 16 gives pixels the latents' grid of tokens; as in the autoencoder, frame 0 then stands for itself and for what
the first patch lacks. Smaller patches give what pixel space needs to draw fine things. Each row is a process of its
own, timed for some seconds, medians are shown; memory is the process's peak less that before the model was built:
weights, gradients, the optimisers' moments and activations. A row too long to run is counted only. The optimisers' work
depends on weights alone and is timed once.
"""

import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import torch

from reelflow.cli.main import keep_freed_memory
from reelflow.models.dit import DiTConfig, VideoDiT
from reelflow.models.vae import CausalVAE, Posterior
from reelflow.nn.patchify import Patch
from reelflow.planning.cost import dit_cost, vae_cost
from reelflow.recipes.world import world
from reelflow.training.flow import FlowConfig, FlowTask, LatentBatch
from reelflow.training.optim import build_optimizers

RECIPE = world()
BATCH, WORDS = 4, 5
FRAMES, HEIGHT, WIDTH = RECIPE.clip.num_frames, RECIPE.clip.height, RECIPE.clip.width
SECONDS = 2.0


class Row(NamedTuple):
    """What a model reads: `shape` (C, T, H, W) cut into patches."""

    shape: tuple[int, int, int, int]
    patch: Patch
    measured: bool = True

    @property
    def config(self) -> DiTConfig:
        return replace(RECIPE.dit.model, in_channels=self.shape[0], patch=self.patch, stem=0)


PIXELS = (3, FRAMES, HEIGHT, WIDTH)
ROWS = {
    "latent": Row(RECIPE.vae.model.latent_shape(FRAMES, HEIGHT, WIDTH), RECIPE.dit.model.patch),
    "pixel, same tokens": Row((3, FRAMES + 3, HEIGHT, WIDTH), Patch(4, 16, 16)),
    "pixel, patch 16": Row(PIXELS, Patch(1, 16, 16)),
    "pixel, patch 8": Row(PIXELS, Patch(1, 8, 8)),
    "pixel, patch 4": Row(PIXELS, Patch(1, 4, 4)),
    "pixel, patch 2": Row(PIXELS, Patch(1, 2, 2), measured=False),
}
ENCODE, OPTIMIZERS = "encode", "optimisers"


def peak_mib() -> float:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1024**2 if sys.platform == "darwin" else 1024)


def seconds_of(step: Callable[[], None]) -> list[float]:
    """Time a step for some seconds, the first left out, which warms up; one longer than that counts by itself."""
    seconds: list[float] = []
    while sum(seconds) < SECONDS:
        start = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - start)
    return seconds[1:] or seconds


def training(row: Row, *, optimizing: bool = False) -> list[float]:
    """Time forward, backward and the clipping of gradients; or the optimisers, by the mean of the recipe's cycle."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    mean = torch.randn(BATCH, *row.shape, generator=generator)
    text = RECIPE.text(BATCH * ["a red ring moving left"])
    batch = LatentBatch(Posterior(mean, torch.full_like(mean, -6.0)), text.condition())
    flow = FlowConfig(condition_dropout=0.0, given_fraction=0.0)
    task = FlowTask(VideoDiT(row.config), flow, null=RECIPE.text([""]).condition(), validation=batch)
    config = RECIPE.dit.training.optimizer
    optimizers = build_optimizers(task.model, config)

    def backward() -> None:
        for parameter in task.model.parameters():
            parameter.grad = None
        with torch.autocast("cpu", torch.bfloat16):
            value = task.loss(batch, generator).value
        value.backward()
        torch.nn.utils.clip_grad_norm_(task.model.parameters(), 1.0)

    def optimize() -> None:
        for optimizer in config.muon_every * optimizers:
            optimizer.step()

    seconds = seconds_of(backward)
    optimize()  # takes the memory for its moments
    return [s / config.muon_every for s in seconds_of(optimize)] if optimizing else seconds


def encode() -> list[float]:
    """Time the encoding of the batch's clips."""
    vae = CausalVAE(RECIPE.vae.model).eval()
    clips = torch.zeros(BATCH, *PIXELS)

    def step() -> None:
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            vae.encode(clips)

    return seconds_of(step)


def measure(name: str) -> None:
    """Print MiB and the seconds of each step of one row in this process."""
    keep_freed_memory()
    before = peak_mib()
    if name == ENCODE:
        seconds = encode()
    else:
        seconds = training(ROWS["latent" if name == OPTIMIZERS else name], optimizing=name == OPTIMIZERS)
    print(peak_mib() - before, *seconds)


def main() -> None:
    cost = {name: dit_cost(row.config, row.shape[1:], WORDS) for name, row in ROWS.items()}
    vae = vae_cost(RECIPE.vae.model, FRAMES, HEIGHT, WIDTH)
    names = (*(name for name, row in ROWS.items() if row.measured), ENCODE, OPTIMIZERS)
    ms, mib = dict[str, float](), dict[str, float]()  # of a batch
    for name in names:
        done = subprocess.run([sys.executable, __file__, name], check=True, capture_output=True, text=True)
        mib[name], *seconds = map(float, done.stdout.split())
        ms[name] = 1e3 * statistics.median(seconds)

    threads = f"{torch.get_num_threads()} threads, torch {torch.__version__}"
    print(
        f"{len(RECIPE.dit.model.layers)} blocks of width {RECIPE.dit.model.dim}, {BATCH} clips a step, bfloat16, {threads}"
    )
    print("FLOP of forward and backward = 3 * (4 D * pairs of query and key that meet + 2 * tokens * weights)")
    print("FLOP of encoding = 2 * multiply-adds of every convolution (both a clip, planning/cost.py)\n")
    print(f"{'a clip':>20} {'tokens':>7} {'GFLOP':>8} {'ms':>9} {'x latent':>9} {'GFLOP/s':>8} {'MiB a step':>11}")
    flops = {name: 3 * c.flops for name, c in cost.items()} | {ENCODE: vae.encode_flops}
    for name, flop in flops.items():
        line = f"{name:>20} {cost[name].num_tokens if name in cost else '':>7} {flop / 1e9:>8.2f}"
        if name in ms:
            line += f" {ms[name] / BATCH:>9.1f} {ms[name] / ms['latent']:>9.1f} {BATCH * flop / ms[name] / 1e6:>8.0f}"
            line += f" {mib[name]:>11.0f}"
        print(line)
    print(f"\nThe optimisers take {ms[OPTIMIZERS]:.1f} ms a step besides, whatever the batch.")
    print(
        f"Latents hold {vae.compression:.0f} times fewer values than clips; a clip is encoded once, not at each step."
    )


if __name__ == "__main__":
    if len(sys.argv) == 2:
        measure(sys.argv[1])
    else:
        main()
