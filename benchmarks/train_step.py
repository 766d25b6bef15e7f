"""What the training loop costs over the bare step: forward, backward, clip, optimiser.

The transformer of the recipe `world`, in turn: some bare steps, some steps of `reelflow.training.loop.train` (with
logging, averaged weights, the finiteness check and a loader), and so on; medians of single steps. FLOPs of a step are
3 x batch x (4 D per pair of query and key that meet + 2 tokens x weights of every linear map); see
`reelflow.planning.cost`.
"""

import statistics
import tempfile
import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import torch
from rich.console import Console

from reelflow.data.loader import ShuffledBatches
from reelflow.models.dit import VideoDiT
from reelflow.models.vae import Posterior
from reelflow.planning.cost import dit_cost
from reelflow.recipes.world import world
from reelflow.training.flow import FlowTask, LatentBatch
from reelflow.training.loop import train
from reelflow.training.optim import build_optimizers

ROUNDS, STEPS = 5, 12


def main() -> None:
    recipe = world()
    config = replace(recipe.dit.training, steps=STEPS, validate_every=0, preview_every=0, checkpoint_every=0)
    shape = recipe.vae.model.latent_shape(recipe.clip.num_frames, recipe.clip.height, recipe.clip.width)
    text = recipe.text(config.batch_size * ["a red ring moving left"])

    def batch(rows: torch.Tensor, generator: torch.Generator) -> LatentBatch:
        mean = torch.randn(len(rows), *shape, generator=generator)
        return LatentBatch(Posterior(mean, torch.full_like(mean, -6.0)), text.condition())

    def task() -> FlowTask:
        torch.manual_seed(0)
        fixed = batch(torch.arange(config.batch_size), torch.Generator().manual_seed(0))
        return FlowTask(
            VideoDiT(recipe.dit.model), recipe.dit.flow, null=recipe.text([""]).condition(), validation=fixed
        )

    def bare() -> list[float]:
        job, generator = task(), torch.Generator().manual_seed(0)
        optimizers = build_optimizers(job.model, config.optimizer)
        seconds = []
        for _ in range(STEPS):
            one = batch(torch.arange(config.batch_size), generator)
            start = time.perf_counter()
            with torch.autocast("cpu", torch.bfloat16):
                value = job.loss(one, generator).value
            value.backward()
            torch.nn.utils.clip_grad_norm_(job.model.parameters(), 1.0)
            for optimizer in optimizers:
                optimizer.step()
            for parameter in job.model.parameters():
                parameter.grad = None
            seconds.append(time.perf_counter() - start)
        return seconds[2:]

    def loop() -> list[float]:
        marks = [time.perf_counter()]
        loader = ShuffledBatches(config.batch_size, config.batch_size, batch, seed=0, prefetch=0)
        with tempfile.TemporaryDirectory() as folder, loader as batches:
            train(
                task(),
                batches,
                config,
                Path(folder) / "run",
                on_step=lambda _: marks.append(time.perf_counter()),
                console=Console(quiet=True),
            )
        return [b - a for a, b in pairwise(marks)][2:-1]  # the last step writes a checkpoint

    rows: dict[str, list[float]] = {"bare": [], "loop": []}
    for _ in range(ROUNDS):
        rows["bare"] += bare()
        rows["loop"] += loop()
    flops = 3 * config.batch_size * dit_cost(recipe.dit.model, shape[1:], len(text.mask[0])).flops
    bare_seconds, loop_seconds = (statistics.median(rows[name]) for name in ("bare", "loop"))
    print(__doc__)
    print(f"{flops / 1e9:.1f} GFLOP a step, batch {config.batch_size}, {torch.get_num_threads()} threads")
    for name, seconds in (("bare", bare_seconds), ("loop", loop_seconds)):
        print(f"{name:6} {1e3 * seconds:8.1f} ms a step  {flops / seconds / 1e9:6.0f} GFLOP/s")
    print(f"loop / bare = {loop_seconds / bare_seconds:.3f}")


if __name__ == "__main__":
    main()
