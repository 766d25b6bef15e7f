"""The transformer's task: predict the velocity of noisy latents, for clips, images and continuations alike.

One draw of t per clip; in a share of the batches the first latent frames are given (t = 1 there, no loss there), which
teaches image-to-video and continuation, and in another share only frame 0 is used, which is an image. Text is dropped
now and then, so that guidance has an unconditional branch.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from reelflow.config import configuration
from reelflow.diffusion.process import mix, velocity_of
from reelflow.diffusion.timesteps import draw_logit_normal, draw_uniform
from reelflow.errors import ConfigError
from reelflow.models.condition import Condition
from reelflow.models.dit import VideoDiT
from reelflow.models.vae import Posterior
from reelflow.nn.patchify import token_grid
from reelflow.training.loop import Loss
from reelflow.training.meters import BinnedMean

__all__ = ["FlowConfig", "FlowTask", "LatentBatch"]

NUM_BINS = 8


@configuration
class FlowConfig:
    """What is drawn beside the data at each training step."""

    time: Literal["logit_normal", "uniform"] = "logit_normal"
    mean: float = 0.0  # of logit t
    std: float = 1.0
    shift: float = 1.0
    condition_dropout: float = 0.1  # share of samples trained without condition
    given_fraction: float = 0.2  # share of batches whose first latent frames are given
    max_given: int = 2  # latent frames
    image_fraction: float = 0.0  # share of batches cut to frame 0

    def __post_init__(self) -> None:
        for name in ("condition_dropout", "given_fraction", "image_fraction"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{name} is a share between 0 and 1, got {getattr(self, name)}")
        if not self.std > 0 or not self.shift > 0:
            raise ConfigError(f"std and shift must be positive, got {self.std} and {self.shift}")
        if self.max_given < 1:
            raise ConfigError(f"max_given must be at least 1, got {self.max_given}")


@dataclass(frozen=True)
class LatentBatch:
    """Cached posteriors (so that every epoch draws new latents) and what the clips are conditioned on."""

    posterior: Posterior
    condition: Condition


class FlowTask:
    """Rectified-flow training of a `VideoDiT` (see `reelflow.training.loop.Task`).

    `null` is the condition of nothing, one row; `validation` is a fixed batch of unseen clips; `previewer` writes
    samples into a folder.

    Raises:
        ConfigError: images or given frames are asked of a model whose patch spans several latent frames.
    """

    def __init__(
        self,
        model: VideoDiT,
        config: FlowConfig,
        *,
        null: Condition,
        validation: LatentBatch,
        flops_per_sample: float = 0.0,
        previewer: Callable[[Path, int], None] | None = None,
    ) -> None:
        if model.config.patch.t > 1 and (config.given_fraction or config.image_fraction):
            raise ConfigError(
                f"a patch of {model.config.patch.t} latent frames has no frame alone: "
                f"set given_fraction and image_fraction to 0, or patch.t to 1"
            )
        self.model = model
        self.config = config
        self.null = null
        self.validation = validation
        self.flops_per_sample = flops_per_sample
        self.previewer = previewer

    def loss(self, batch: LatentBatch, generator: torch.Generator) -> Loss:
        latents = batch.posterior.sample(generator)
        kind = torch.rand((), generator=generator).item()
        given, frames = 0, latents.shape[2]
        if kind < self.config.image_fraction:
            latents = latents[:, :, :1]
        elif kind < self.config.image_fraction + self.config.given_fraction and frames > 1:
            given = int(torch.randint(1, min(self.config.max_given, frames - 1) + 1, (), generator=generator))
        keep = torch.rand(latents.shape[0], generator=generator) >= self.config.condition_dropout
        condition = batch.condition.where(keep, self.null).trimmed()
        errors = self._errors(latents, self._draw_times(latents.shape[0], generator), condition, generator, given)
        tokens = token_grid(latents.shape[2:], self.model.config.patch).num_tokens
        return Loss(errors.mean(), {}, num_tokens=latents.shape[0] * tokens, num_samples=latents.shape[0])

    def validate(self, generator: torch.Generator) -> dict[str, Any]:
        """Return the loss on fixed latents and noise: its mean, and its mean and error in bins of t."""
        latents = self.validation.posterior.sample(generator)
        bins = BinnedMean(NUM_BINS)
        for index in range(NUM_BINS):
            t = (index + torch.rand(latents.shape[0], generator=generator)) / NUM_BINS
            bins.add(t, self._errors(latents, t, self.validation.condition, generator, 0))
        rows = bins.rows()
        return {"loss": sum(row["mean"] for row in rows) / NUM_BINS, "bins": rows}

    def preview(self, folder: Path, step: int) -> None:
        if self.previewer is not None:
            self.previewer(folder, step)

    def _draw_times(self, num: int, generator: torch.Generator) -> Float[Tensor, " B"]:
        if self.config.time == "uniform":
            return draw_uniform(num, generator, shift=self.config.shift)
        return draw_logit_normal(num, generator, mean=self.config.mean, std=self.config.std, shift=self.config.shift)

    def _errors(
        self,
        latents: Float[Tensor, "B C T H W"],
        t: Float[Tensor, " B"],
        condition: Condition,
        generator: torch.Generator,
        given: int,
    ) -> Float[Tensor, " B"]:
        """Return each sample's mean squared error of the velocity, over the frames that are not given."""
        noise = torch.randn(latents.shape, generator=generator, dtype=latents.dtype)
        if given:
            t = t[:, None].repeat(1, latents.shape[2])
            t[:, :given] = 1
        velocity = self.model(mix(latents, noise, t), t, condition).float()
        errors = (velocity - velocity_of(latents, noise)).square()
        return errors[:, :, given:].mean(dim=(1, 2, 3, 4))
