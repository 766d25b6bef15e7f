"""The task of an adapter: a `FlowTask` whose network stays as it is, and whose adapter learns.

Its checkpoints hold the adapter alone. What the adapter does to the output on fixed noise is asked early in the run and at
each validation, so that one without effect is known before the run is over.
"""

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from reelflow.diffusion.process import as_read
from reelflow.errors import ConfigError
from reelflow.models.adapters import Adapter, apply
from reelflow.models.packing import shape_numbers
from reelflow.training.flow import FlowTask, LatentBatch, Preserved
from reelflow.training.loop import Loss

__all__ = ["AdapterTask", "AdapterTensors"]

LOG = logging.getLogger(__name__)
PROBE_SEED = 1_000_033
PROBE_TIMES = (0.25, 0.5, 0.75)  # of the way along the times that are drawn
NO_EFFECT = 1e-4  # of the output's norm


class AdapterTensors(nn.Module):
    """An adapter whose tensors are parameters, which is what a training loop moves and keeps; and the batches it saw."""

    batches: Tensor

    def __init__(self, adapter: Adapter) -> None:
        super().__init__()
        self.adapter = adapter.map(lambda x: nn.Parameter(x.detach().clone()))
        for name, value in self.adapter.tensors():
            assert isinstance(value, nn.Parameter)
            self.register_parameter(name.replace(".", "/"), value)
        self.register_buffer("batches", torch.zeros((), dtype=torch.int64))

    def unmoved(self) -> list[str]:
        """Return the names of the maps that the adapter does not change yet."""
        changed = (
            (name, any(bool(update.up.any()) for update in found)) for name, found in self.adapter.updates.items()
        )
        return [name for name, moved in changed if not moved]


class AdapterTask:
    """Training of an adapter (see `reelflow.training.loop.Task`); `flow` is the task of its network, which is frozen.

    `change` is how far the adapter moves the output, as a share of its norm, on fixed noise and clips. It is among the parts
    of the loss once, after `probe_after` batches, and of every validation; where it is too small to see, a warning says so.

    Raises:
        ConfigError: `probe_after` is below 1.
    """

    def __init__(self, flow: FlowTask, adapter: Adapter, *, probe_after: int = 50) -> None:
        if probe_after < 1:
            raise ConfigError(
                f"an adapter changes nothing before its first step; probe_after is at least 1, got {probe_after}"
            )
        self.flow = flow
        self.probe_after = probe_after
        self.probed = False
        self.model = AdapterTensors(adapter)
        self.flops_per_sample = flow.flops_per_sample * 2 / 3  # the weights' gradients are not computed
        flow.model.requires_grad_(False)
        self.applied = apply(flow.model, [(self.model.adapter, 1.0)])

    def loss(self, batch: LatentBatch | Sequence[LatentBatch] | Preserved, generator: torch.Generator) -> Loss:
        loss = self.flow.loss(batch, generator)
        if not self.probed:
            seen = int(self.model.batches)
            self.probed = seen >= self.probe_after  # else a run that goes on would be asked again
            if seen == self.probe_after:
                loss.parts["change"] = torch.tensor(self._judged())
        self.model.batches += 1
        return loss

    def validate(self, generator: torch.Generator) -> dict[str, Any]:
        return {**self.flow.validate(generator), "change": self._judged()}

    def preview(self, folder: Path, step: int) -> None:
        self.flow.preview(folder, step)

    def _judged(self) -> float:
        """Return `change`, and warn where it is too small to see."""
        change = self.change()
        if change < NO_EFFECT:
            still, maps = self.model.unmoved(), len(self.model.adapter.updates)
            LOG.warning(
                "the adapter changes the output by %.1g of its norm after %d batches, which nobody will see%s: raise lr, or "
                "choose other targets",
                change,
                int(self.model.batches),
                f" ({len(still)} of {maps} maps have learned nothing, such as {still[0]})" if still else "",
            )
        return change

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
            t = torch.full(latents.shape[:1], self.flow.time_at(time))
            x = as_read(space.process, space.mix(latents, noise, t), t)
            found.append(self.flow.ask(x, t, condition).float())
        return torch.stack(found)
