"""The task of an adapter: a `FlowTask` whose network stays as it is, and whose adapter learns.

Its checkpoints hold the adapter alone. Each validation asks what the adapter does to the output on fixed noise, so that
one without effect is known before the run is over.
"""

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from reelflow.diffusion.process import as_read
from reelflow.models.adapters import Adapter, apply
from reelflow.models.packing import shape_numbers
from reelflow.training.flow import FlowTask, LatentBatch
from reelflow.training.loop import Loss

__all__ = ["AdapterTask", "AdapterTensors"]

LOG = logging.getLogger(__name__)
PROBE_SEED = 1_000_033
PROBE_TIMES = (0.25, 0.5, 0.75)
NO_EFFECT = 1e-4  # of the output's norm


class AdapterTensors(nn.Module):
    """An adapter whose tensors are parameters, which is what a training loop moves and keeps."""

    def __init__(self, adapter: Adapter) -> None:
        super().__init__()
        self.adapter = adapter.map(lambda x: nn.Parameter(x.detach().clone()))
        for name, value in self.adapter.tensors():
            assert isinstance(value, nn.Parameter)
            self.register_parameter(name.replace(".", "/"), value)


class AdapterTask:
    """Training of an adapter (see `reelflow.training.loop.Task`); `flow` is the task of its network, which is frozen.

    `validate` adds `change`: how far the adapter moves the output, as a share of its norm, on fixed noise and clips.
    """

    def __init__(self, flow: FlowTask, adapter: Adapter) -> None:
        self.flow = flow
        self.model = AdapterTensors(adapter)
        self.flops_per_sample = flow.flops_per_sample * 2 / 3  # the weights' gradients are not computed
        flow.model.requires_grad_(False)
        self.applied = apply(flow.model, [(self.model.adapter, 1.0)])

    def loss(self, batch: LatentBatch | Sequence[LatentBatch], generator: torch.Generator) -> Loss:
        return self.flow.loss(batch, generator)

    def validate(self, generator: torch.Generator) -> dict[str, Any]:
        change = self.change()
        if change < NO_EFFECT:
            LOG.warning(
                "the adapter changes the output by %.1g of its norm, which nobody will see: raise lr, or choose other targets",
                change,
            )
        return {**self.flow.validate(generator), "change": change}

    def preview(self, folder: Path, step: int) -> None:
        self.flow.preview(folder, step)

    @torch.no_grad()
    def change(self) -> float:
        """Return |with - without| / |without| of the network's outputs on fixed noise."""
        told = self._outputs()
        self.applied.undo()
        try:
            plain = self._outputs()
        finally:
            self.applied = apply(self.flow.model, [(self.model.adapter, 1.0)])
        return float((told - plain).norm() / plain.norm().clamp_min(torch.finfo(plain.dtype).tiny))

    def _outputs(self) -> Tensor:
        """Ask the network about the (first) clips of the validation at three times."""
        given, space = self.flow.validation, self.flow.space
        batch = given if isinstance(given, LatentBatch) else given[0]
        latents, condition = batch.posterior.mean, batch.condition
        if self.flow.config.tells:
            told, more = shape_numbers(self.flow.config.tells, latents), condition.numbers
            condition = replace(condition, numbers=told if more is None else torch.cat([told, more], dim=1))
        noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(PROBE_SEED), dtype=latents.dtype)
        found = []
        for time in PROBE_TIMES:
            t = torch.full(latents.shape[:1], time)
            x = as_read(space.process, space.mix(latents, noise, t), t)
            found.append(self.flow.model(x, t, condition).float())
        return torch.stack(found)
