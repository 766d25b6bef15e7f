"""A tiny transformer's run, on any mesh, in float64 so that meshes can be compared; and to kill:

    python flow_run.py FOLDER RANKS WHERE COUNT RANK [stream], under torchrun or with its environment, WHERE as in toy_run.py

With "stream" it learns packed rows of a stream of samples. Process RANK sends itself SIGKILL at the COUNT-th visit of that
place; but if FOLDER/killed exists, which it leaves, it does not.
"""

import os
import sys
from contextlib import contextmanager
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

from reelflow.data.loader import Packed, ShuffledBatches, Size
from reelflow.data.shards import Sample
from reelflow.data.stream import Grouped, ShardedBatches, Sizes
from reelflow.errors import DataError
from reelflow.models.blocks import Dual, Single
from reelflow.models.condition import Condition
from reelflow.models.context import Refine
from reelflow.models.dit import DiTConfig, VideoDiT
from reelflow.models.vae import Posterior
from reelflow.nn.embed import Number
from reelflow.nn.patterns import Gated
from reelflow.parallel.mesh import MeshConfig, Workers, alone, start
from reelflow.parallel.shard import ParallelConfig, parallelize
from reelflow.training import optim
from reelflow.training.flow import FlowConfig, FlowTask, LatentBatch, inner_matrix
from reelflow.training.loop import TrainingConfig, TrainingResult, train
from reelflow.training.optim import OptimizerConfig

NETWORK = DiTConfig(
    in_channels=2,
    dim=12,
    num_heads=2,
    layers=(Dual(mlp_ratio=2.0, attend=Gated("token")), Single(mlp_ratio=2.0)),
    rope=(2, 2, 2),
    time=Number(channels=6),
    context=Refine(5, depth=1, mlp_ratio=2.0),
)
UNGATED = replace(NETWORK, layers=(Dual(mlp_ratio=2.0), Single(mlp_ratio=2.0)))  # the tensor dimension deals no gates
CONFIG = TrainingConfig(
    steps=6,
    batch_size=2,
    accumulate=4,
    optimizer=OptimizerConfig(lr=1e-2, muon_lr=0.02, warmup_steps=2, decay="cosine", weight_decay=0.1, eps=1e-4),
    seed=5,
    ema_decay=0.9,
    log_every=2,
    validate_every=3,
    checkpoint_every=2,
)
SHAPES = ((1, 4, 6), (3, 2, 4), (2, 4, 4), (2, 2, 6))  # of latents; clip n is of shape n mod 4
QUIET = Console(quiet=True)


def clip(number: int) -> LatentBatch:
    g = torch.Generator().manual_seed(number)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=g, dtype=torch.float64)

    mean = normal(1, 2, *SHAPES[number % len(SHAPES)])
    mask = torch.arange(3)[None] < 1 + number % 3
    return LatentBatch(
        Posterior(mean, torch.full_like(mean, -2.0)), Condition(context=normal(1, 3, 5), context_mask=mask)
    )


def same_shape(numbers: list[int]) -> LatentBatch:
    parts = [clip(4 * number) for number in numbers]
    posterior = Posterior(*(torch.cat(part) for part in zip(*(p.posterior for p in parts), strict=True)))
    context = torch.cat([part.condition.context for part in parts])
    return LatentBatch(
        posterior, Condition(context=context, context_mask=torch.cat([p.condition.context_mask for p in parts]))
    )


def flow_task(network: DiTConfig, workers: Workers, parallel: ParallelConfig) -> FlowTask:
    torch.manual_seed(0)
    model = VideoDiT(network).double()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    null = Condition(
        context=torch.zeros(1, 3, 5, dtype=torch.float64), context_mask=torch.tensor([[True, False, False]])
    )
    config = FlowConfig(image_fraction=0.2)
    return FlowTask(parallelize(model, workers, parallel), config, null=null, validation=same_shape([50, 51]))


def run_flow(
    folder: Path,
    mesh: MeshConfig = MeshConfig(),
    *,
    config: TrainingConfig = CONFIG,
    network: DiTConfig = NETWORK,
    packed: bool = False,
    stream: bool = False,
    dealt: bool = True,
    bad: tuple[int, ...] = (),
    workers: Workers | None = None,
    **options,
) -> TrainingResult:
    """Train; the losses of the batches `bad` are not finite."""
    workers = workers or (alone() if mesh.world_size == 1 else start(mesh, "cpu"))

    def collate(rows: Tensor, generator: torch.Generator) -> LatentBatch | list[LatentBatch]:
        numbers = rows.tolist()
        if packed:  # rows of one to three clips
            return [clip(number) for number in numbers * 2][: 1 + numbers[0] % 3]
        return same_shape(numbers)

    task = flow_task(network, workers, ParallelConfig(mesh))
    loader = packed_stream() if stream else ShuffledBatches(17, config.batch_size, collate, seed=3, prefetch=1)
    with loader as batches, exact_muon():
        if bad:
            task.loss = exploding(task, [batches.batch(number) for number in bad])
        given = batches if dealt else Undealt(batches)
        return train(task, given, config, folder, hidden=inner_matrix, workers=workers, **{"console": QUIET, **options})


class Numbers:
    """The numbers of clips as samples, which cannot all be read."""

    name, identity, groups = "numbers", "numbers", (7, 5, 5)

    def read(self, number: int) -> Sample:
        if number == 3:
            raise DataError("3 is torn")
        return Sample(f"{number}", {"number": torch.tensor(number)})


def packed_stream() -> ShardedBatches[list[LatentBatch]]:
    """Rows of clips of several shapes; a step takes about as much as a reservoir holds."""

    def collate(samples: list[Sample], generators: list[torch.Generator]) -> list[LatentBatch]:
        return [clip(int(sample.tensors["number"])) for sample in samples]

    sizes = [Size(shape, prod(shape), float(prod(shape) ** 2)) for shape in SHAPES]
    grouped = Grouped(Packed(60), [Sizes(sizes, torch.arange(17) % len(SHAPES))], reservoir=12)
    return ShardedBatches([Numbers()], grouped, collate, seed=3, window=2, prefetch=1, on_skip=lambda _: None)


@contextmanager
def exact_muon():
    """Orthogonalise in float64, in which sums may be taken in any order."""
    before = optim._fast_dtype
    optim._fast_dtype = lambda matrices: matrices.dtype
    try:
        yield
    finally:
        optim._fast_dtype = before


def exploding(task: FlowTask, bad: list[LatentBatch]):
    loss = task.loss

    def wrapped(batch, generator):
        found = loss(batch, generator)
        if any(torch.equal(batch.posterior.mean, other.posterior.mean) for other in bad):
            return replace(found, value=found.value * float("inf"))
        return found

    return wrapped


class Undealt:
    """Batches that cannot be dealt."""

    def __init__(self, batches: ShuffledBatches) -> None:
        self.batches = batches

    def __next__(self):
        return next(self.batches)

    def state_dict(self):
        return self.batches.state_dict()

    def load_state_dict(self, state):
        self.batches.load_state_dict(state)


def fatal(where: str, count: int) -> dict[str, Any]:
    """Let the `count`-th visit of a place be the last thing this process does; return options of `train`."""
    from toy_run import killing

    if where == "step":
        return {"on_step": killing(lambda step: None, count)}
    os.fsync = killing(os.fsync, count)
    return {}


if __name__ == "__main__":
    folder, ranks, where, count, rank = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3], *map(int, sys.argv[4:6])
    torch.set_num_threads(1)
    options = {}
    if int(os.environ["RANK"]) == rank and not (folder / "killed").exists():
        folder.mkdir(exist_ok=True)
        (folder / "killed").touch()
        options = fatal(where, count)
    mesh = MeshConfig(shard=ranks)
    patience = 180.0 if "TORCHELASTIC_RUN_ID" in os.environ else 30.0  # a restarted process imports torch first
    with start(mesh, "cpu", timeout=patience) as workers:
        run_flow(folder, mesh, workers=workers, stream="stream" in sys.argv[6:], **options)
