"""A tiny run to kill: python toy_run.py FOLDER WHERE COUNT, WHERE one of loss, step, fsync, rename.

The process sends itself SIGKILL at the COUNT-th visit to that place, which is as abrupt as it gets and hits the same
instant every time.
"""

import os
import signal
import sys
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor, nn
from torch.nn import functional as F

from reelflow.data.loader import ShuffledBatches
from reelflow.training.loop import Loss, TrainingConfig, TrainingResult, train
from reelflow.training.optim import OptimizerConfig

OPTIMIZER = OptimizerConfig(lr=1e-2, muon_lr=0.02, warmup_steps=3, decay="cosine", weight_decay=0.1)
CONFIG = TrainingConfig(
    steps=24,
    batch_size=4,
    accumulate=2,
    optimizer=OPTIMIZER,
    seed=7,
    ema_decay=0.9,
    log_every=2,
    validate_every=5,
    checkpoint_every=5,
    preview_every=10,
)
SILENT = Console(quiet=True)


class Toy(nn.Module):
    """A convolution in channels-last memory, a dropout that draws from torch's global generator, and a readout."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1).to(memory_format=torch.channels_last)
        self.hidden = nn.Linear(8, 16)
        self.out = nn.Linear(16, 3)
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.calls += 1
        x = F.dropout(F.silu(self.conv(x)), 0.1, self.training).mean(dim=(2, 3))
        return self.out(F.silu(self.hidden(x)))


class ToyTask:
    flops_per_sample = 0.0

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.model = Toy()

    def loss(self, batch: Tensor, generator: torch.Generator) -> Loss:
        noise = torch.randn(batch.shape, generator=generator)
        error = self.model(batch + 0.1 * noise) - batch.mean(dim=(2, 3))
        return Loss(error.square().mean(), {"bias": error.mean()}, num_tokens=64 * len(batch), num_samples=len(batch))

    def validate(self, generator: torch.Generator) -> dict[str, object]:
        x = torch.randn(8, 3, 8, 8, generator=generator)
        torch.rand(1)  # a careless global draw must not disturb the training
        return {"loss": (self.model(x) - x.mean(dim=(2, 3))).square().mean().item(), "rows": [{"bin": 0}]}

    def preview(self, folder: Path, step: int) -> None:
        (folder / f"{step}.txt").write_text(str(self.model.out.bias.tolist()))


def is_hidden(name: str, parameter: nn.Parameter) -> bool:
    return name in ("conv.weight", "hidden.weight")


def toy_batches(*, seed: int = 3, batch_size: int = 4, prefetch: int = 2) -> ShuffledBatches[Tensor]:
    clips = torch.randn(11, 3, 8, 8, generator=torch.Generator().manual_seed(1))

    def collate(indices: Tensor, generator: torch.Generator) -> Tensor:
        flip = torch.rand(len(indices), 1, 1, 1, generator=generator) < 0.5
        return torch.where(flip, clips[indices].flip(3), clips[indices])

    return ShuffledBatches(len(clips), batch_size, collate, seed=seed, prefetch=prefetch)


def run_toy(folder: Path, *, task: ToyTask | None = None, config: TrainingConfig = CONFIG, **options) -> TrainingResult:
    with toy_batches(batch_size=config.batch_size) as batches:
        return train(task or ToyTask(), batches, config, folder, hidden=is_hidden, **{"console": SILENT, **options})


def killing(place, count: int):
    """Wrap the function `place`: its `count`-th call is the last thing this process does."""
    visits = 0

    def wrapped(*args, **kwargs):
        nonlocal visits
        visits += 1
        if visits == count:
            os.kill(os.getpid(), signal.SIGKILL)
        return place(*args, **kwargs)

    return wrapped


if __name__ == "__main__":
    folder, where, count = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    task, options = ToyTask(), {}
    if where == "loss":
        task.loss = killing(task.loss, count)
    elif where == "step":
        options["on_step"] = killing(lambda step: None, count)
    elif where == "fsync":
        os.fsync = killing(os.fsync, count)
    elif where == "rename":
        Path.rename = killing(Path.rename, count)
    run_toy(folder, task=task, **options)
