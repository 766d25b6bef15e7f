"""The task of an adapter: a `FlowTask` whose network stays as it is, and whose adapter learns.

Its checkpoints hold the adapter alone. On a mesh the network's weights are spread as for other training, without gradients
and moments; the adapter is small, whole in every process, and the loop sums its gradients. What the adapter does to the
output on fixed noise is asked early in the run and at each validation, so that one without effect is known before the run
is over.
"""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from reelflow.diffusion.process import as_read
from reelflow.errors import ConfigError
from reelflow.models.adapters import Adapter, apply
from reelflow.models.packing import told_shape
from reelflow.parallel.mesh import Workers, alone
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
    With several `workers` the network is spread already (`reelflow.parallel`), and every process has the same adapter.

    Raises:
        ConfigError: `probe_after` is below 1, or the network's heads are dealt.
    """

    def __init__(
        self, flow: FlowTask, adapter: Adapter, *, probe_after: int = 50, workers: Workers | None = None
    ) -> None:
        if probe_after < 1:
            raise ConfigError(
                f"an adapter changes nothing before its first step; probe_after is at least 1, got {probe_after}"
            )
        self.workers = workers or alone()
        if self.workers.config.tensor > 1:
            raise ConfigError(
                f"an adapter changes whole maps, and tensor={self.workers.config.tensor} cuts them; nearest: tensor=1, with "
                "as many more of shard or sequence"
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
            seen, now = int(self.model.batches), self.workers.data_size  # batches that others have at hand among them
            self.probed = seen + now > self.probe_after  # else a run that goes on would be asked again
            if seen <= self.probe_after < seen + now:
                loss.parts["change"] = torch.tensor(self._judged())
        self.model.batches += self.workers.data_size
        return loss

    def validate(self, generator: torch.Generator) -> dict[str, Any]:
        return {**self.flow.validate(generator), "change": self._judged()}

    def preview(self, folder: Path, step: int) -> None:
        self.flow.preview(folder, step)

    def _judged(self) -> float:
        """Return `change`, and warn where it is too small to see."""
        change = self.change()
        if change < NO_EFFECT and self.workers.is_first:
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
        with torch.compiler.set_stance("force_eager"):  # what is compiled has the adapter in it
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
        latents = batch.posterior.mean
        condition = told_shape(batch.condition, self.flow.config.tells, latents)
        noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(PROBE_SEED), dtype=latents.dtype)
        found = []
        for time in PROBE_TIMES:
            t = torch.full(latents.shape[:1], self.flow.time_at(time))
            x = as_read(space.process, space.mix(latents, noise, t), t)
            found.append(self.flow.ask(x, t, condition).float())
        return torch.stack(found)
