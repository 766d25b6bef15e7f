"""The transformer's task: see through the noise of latents, for clips, images and continuations alike.

One draw of t per clip; in a share of the batches the first latent frames are given (t = 1 there, no loss there), which
teaches image-to-video and continuation, and in another share only frame 0 is used, which is an image. Text is dropped
now and then, so that guidance has an unconditional branch.

A batch is clips of one shape, or a sequence of single clips of any shapes, which go through the network as one row
(`reelflow.models.packing`). Every clip of a row has its own draws, the same as if it came alone, and counts once in the
loss, whatever its size.

Beside clips of a subject, a batch may bring clips that the network made itself before (`Preserved`), and the loss is of both.

All that is random is drawn on the CPU, where batches come from, and goes to the network's device together with the latents:
the same noise on every device. For a clip of 32,000 tokens (of 2 x 2 latents of 16 channels) these are two copies of 8 MiB,
while the device still has the step before to do.

At t = 1 every process has the data itself and no noise. A published table of steps is no exception: its step 0, which
still has some, stands before t = 1, so a given frame is one that no step has reached.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from reelflow.config import configuration
from reelflow.data.loader import Size
from reelflow.diffusion import timesteps
from reelflow.diffusion.process import (
    Parameterization,
    Process,
    RectifiedFlow,
    VariancePreserving,
    as_read,
    mix,
)
from reelflow.diffusion.timesteps import LogitNormal, Shift, TimeDistribution, draw_times, shift_for, shift_times
from reelflow.diffusion.weighting import Uniform, Weighting, loss_weight, variational_bound
from reelflow.errors import ConfigError
from reelflow.models.blocks import Gate
from reelflow.models.condition import Condition
from reelflow.models.dit import DiTConfig, VideoDiT
from reelflow.models.packing import Clip, ShapeNumber, pack, told_shape
from reelflow.models.vae import Posterior
from reelflow.nn.patchify import token_grid
from reelflow.parallel.device import moved
from reelflow.planning.cost import dit_cost
from reelflow.training.loop import Loss
from reelflow.training.meters import BinnedMean

__all__ = ["FlowConfig", "FlowTask", "LatentBatch", "Preserved", "clip_sizes", "inner_matrix"]

NUM_BINS = 8
LAST_TIME = 1 - 2**-24  # the last of float32 before 1, which is for what is given
BOUND_SHARE = 1e-3  # of the variational bound in the loss (Nichol & Dhariwal 2021, eq. 16)
BOUND_STEPS = 1000  # of which the bound is the sum, where the process has no table of steps


@configuration
class FlowConfig:
    """What the network is asked for, and what is drawn beside the data at each training step.

    A process with a table of steps is trained at those alone: each t that is drawn stands for the step at or before it.
    """

    parameterization: Parameterization = Parameterization()
    time: TimeDistribution = LogitNormal()
    shift: Shift = 1.0  # a number, or a function of how many tokens the batch's clips have
    times: tuple[float, float] = (0.0, 1.0)  # no others are drawn: those that one of two networks works at
    weighting: Weighting = Uniform()
    condition_dropout: float = 0.1  # share of samples trained without condition
    given_fraction: float = 0.2  # share of batches whose first latent frames are given
    max_given: int = 2  # latent frames
    image_fraction: float = 0.0  # share of batches cut to frame 0
    tells: tuple[ShapeNumber, ...] = ()  # of a clip's shape, which the network is told as its first numbers

    def __post_init__(self) -> None:
        for name in ("condition_dropout", "given_fraction", "image_fraction"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{name} is a share between 0 and 1, got {getattr(self, name)}")
        if isinstance(self.shift, int | float):
            shift_for(self.shift, 1)
        if self.max_given < 1:
            raise ConfigError(f"max_given must be at least 1, got {self.max_given}")
        low, high = self.times
        if not 0 <= low < high <= 1:
            raise ConfigError(f"times go from a lower to a higher t in [0, 1], got {low} and {high}; nearest: 0 and 1")


@dataclass(frozen=True)
class LatentBatch:
    """Cached posteriors (so that every epoch draws new latents) and what the clips are conditioned on, on the CPU."""

    posterior: Posterior
    condition: Condition


@dataclass(frozen=True)
class Preserved:
    """Clips to learn, and clips that the network made before, whose loss is added in some weight.

    loss = own + weight * prior (Ruiz et al. 2023, DreamBooth, eq. 2).
    """

    own: LatentBatch | Sequence[LatentBatch]
    prior: LatentBatch
    weight: float


def clip_sizes(config: DiTConfig, shapes: Sequence[tuple[int, int, int]], *, context_tokens: int) -> list[Size]:
    """Return what clips of latent extents (t, h, w) take, for a `Plan` of batches.

    Raises:
        ConfigError: as `dit_cost`.
    """
    costs = {shape: dit_cost(config, shape, context_tokens) for shape in set(shapes)}
    found = {shape: Size(shape, cost.num_tokens + context_tokens, 3.0 * cost.flops) for shape, cost in costs.items()}
    return [found[shape] for shape in shapes]


def inner_matrix(name: str, weight: Tensor) -> bool:
    """Say whether a weight of a `VideoDiT` is one for Muon: a matrix of its blocks, but of modulation or a gate."""
    inside = name.startswith("blocks.") and ".modulation." not in name and ".gate." not in name
    return inside and weight.ndim == 2


class FlowTask:
    """Diffusion training of a `VideoDiT` (see `reelflow.training.loop.Task`).

    `null` is the condition of nothing, one row; `validation` is a fixed batch of unseen clips; `previewer` writes
    samples into a folder; `token_rate` is of all clips, latent frames a second, where positions are in seconds. `device`
    is where the network computes, by default where its weights are.

    Raises:
        ConfigError: images or given frames are asked of a model whose patch spans several latent frames.
    """

    def __init__(
        self,
        model: VideoDiT,
        config: FlowConfig,
        *,
        null: Condition,
        validation: LatentBatch | Sequence[LatentBatch],
        flops_per_sample: float = 0.0,
        previewer: Callable[[Path, int], None] | None = None,
        token_rate: float | None = None,
        device: torch.device | None = None,
    ) -> None:
        if model.config.patch.t > 1 and (config.given_fraction or config.image_fraction):
            raise ConfigError(
                f"a patch of {model.config.patch.t} latent frames has no frame alone: "
                f"set given_fraction and image_fraction to 0, or patch.t to 1"
            )
        if len(config.tells) > len(model.config.numbers):
            raise ConfigError(
                f"a network of {len(model.config.numbers)} numbers cannot be told {', '.join(config.tells)}; "
                f"nearest: {len(config.tells)} in its numbers, or tells=()"
            )
        self.model = model
        self.config = config
        self.space = config.parameterization
        self.null = null
        self.validation = validation
        self.flops_per_sample = flops_per_sample
        self.previewer = previewer
        self.token_rate = token_rate
        self.device = next(model.parameters()).device if device is None else device

    def loss(self, batch: LatentBatch | Sequence[LatentBatch] | Preserved, generator: torch.Generator) -> Loss:
        if isinstance(batch, Preserved):
            own, prior = self.loss(batch.own, generator), self.loss(batch.prior, generator)
            return Loss(
                own.value + batch.weight * prior.value,
                {**own.parts, "own": own.value, "prior": prior.value},
                num_tokens=own.num_tokens + prior.num_tokens,
                num_samples=own.num_samples + prior.num_samples,
            )
        draws = [self._draw(part, generator) for part in _parts(batch)]
        errors, bounds = self._errors(draws, packed=not isinstance(batch, LatentBatch))
        t = torch.cat([draw.t for draw in draws])
        weights = loss_weight(self.config.weighting, self.space.process, self.space.prediction, t)
        value, parts = (weights.to(errors) * errors).mean(), _alphas(self.model)
        if bounds is not None:
            parts |= {"error": value, "bound": bounds.mean()}
            value = value + BOUND_SHARE * parts["bound"]
        num_tokens = sum(len(draw.t) * self._num_tokens(draw.latents) for draw in draws)
        return Loss(value, parts, num_tokens=num_tokens, num_samples=len(t))

    def validate(self, generator: torch.Generator) -> dict[str, Any]:
        """Return the unweighted error on fixed latents and noise: its mean, and its mean and error in bins of t.

        The bins divide the times that are drawn.
        """
        parts = [(part.posterior.sample(generator), part.condition) for part in _parts(self.validation)]
        bins = BinnedMean(NUM_BINS)
        for index in range(NUM_BINS):
            drawn, draws = [], []
            for latents, condition in parts:
                share = (index + torch.rand(latents.shape[0], generator=generator)) / NUM_BINS
                drawn.append(share)
                t = _on_table(self.space.process, self.time_at(share))
                draws.append(self._mixed(latents, t, condition, generator, 0))
            packed = not isinstance(self.validation, LatentBatch)
            bins.add(torch.cat(drawn), self._errors(draws, packed=packed).error)
        rows = [{**row, "t": [self.time_at(share) for share in row["t"]]} for row in bins.rows()]
        return {"loss": sum(row["mean"] for row in rows) / NUM_BINS, "bins": rows}

    def preview(self, folder: Path, step: int) -> None:
        if self.previewer is not None:
            self.previewer(folder, step)

    def ask(self, x: Float[Tensor, "B C T H W"], t: Tensor, condition: Condition) -> Float[Tensor, "B C_out T H W"]:
        """Return the network's answer, on its device, wherever the rest is."""
        rate = {} if self.token_rate is None else {"token_rate": self.token_rate}
        return self.model(self._here(x), self._here(t), condition.map(self._here), **rate)

    def _ask_for_row(self, clips: Sequence[Clip]) -> Sequence[Float[Tensor, "1 C_out _ _ _"]]:
        """Return the network's answers to clips packed in one row, whose layout is found on the CPU."""
        row = pack(clips)
        there = tuple(replace(clip, condition=clip.condition.map(self._here)) for clip in row.clips)
        condition, places = row.condition.map(self._here), self._here(row.context_places)
        return self.model.forward_packed(replace(row, clips=there, condition=condition, context_places=places))

    def _here(self, x: Tensor) -> Tensor:
        return moved(x, self.device)

    def time_at(self, share: Any) -> Any:
        """Return the t that lies a share of the way along the times that are drawn."""
        low, high = self.config.times
        return low + (high - low) * share

    def _num_tokens(self, latents: Tensor) -> int:
        """Tokens of each clip."""
        return token_grid(latents.shape[2:], self.model.config.patch).num_tokens

    def _draw(self, batch: LatentBatch, generator: torch.Generator) -> "_Draw":
        """Draw all that is random in a training step for clips of one shape."""
        latents = batch.posterior.sample(generator)
        kind = torch.rand((), generator=generator).item()
        given, frames = 0, latents.shape[2]
        if kind < self.config.image_fraction:
            latents = latents[:, :, :1]
        elif kind < self.config.image_fraction + self.config.given_fraction and frames > 1:
            given = int(torch.randint(1, min(self.config.max_given, frames - 1) + 1, (), generator=generator))
        keep = torch.rand(latents.shape[0], generator=generator) >= self.config.condition_dropout
        condition = batch.condition.where(keep, self.null).trimmed()
        shift = shift_for(self.config.shift, self._num_tokens(latents))
        t = _draw_times(self.config, latents.shape[0], generator, shift).clamp(max=LAST_TIME)
        return self._mixed(latents, _on_table(self.space.process, t), condition, generator, given)

    def _mixed(
        self,
        latents: Float[Tensor, "B C T H W"],
        t: Float[Tensor, " B"],
        condition: Condition,
        generator: torch.Generator,
        given: int,
    ) -> "_Draw":
        """Mix noise into clips as of t, but for their first, given frames; and tell of the clips' shape.

        The condition stays where it is.
        """
        space, noise = self.space, torch.randn(latents.shape, generator=generator, dtype=latents.dtype)
        times = t
        if given:
            times = t[:, None].repeat(1, latents.shape[2])
            times[:, :given] = 1
        condition = told_shape(condition, self.config.tells, latents)
        latents, noise, t, times = map(self._here, (latents, noise, t, times))
        # A lerp is exact where data and noise agree, and rounds less than the sum that other processes take.
        mixed = mix if isinstance(space.process, RectifiedFlow) else space.mix
        return _Draw(latents, noise, t, times, mixed(latents, noise, times), condition, given)

    def _errors(self, draws: "Sequence[_Draw]", *, packed: bool) -> "_Errors":
        """Ask the network about clips, one shape at a time or all as one row, and judge all but the given frames."""
        space = self.space
        asked = [(as_read(space.process, draw.x, draw.times), draw.times.float(), draw.condition) for draw in draws]
        outputs = (
            self._ask_for_row([Clip(*each, token_rate=self.token_rate) for each in asked])
            if packed
            else [self.ask(*asked[0])]
        )
        errors, bounds = [], []
        for draw, output in zip(draws, map(_wide, outputs), strict=True):
            answer, variance = space.split(draw.latents, output)
            error = (answer - space.target(draw.latents, draw.noise, draw.times)).square()
            errors.append(error[:, :, draw.given :].mean(dim=(1, 2, 3, 4)))
            if variance is not None:
                latents, x, answered = (part[:, :, draw.given :] for part in (draw.latents, draw.x, output))
                bounds.append(_bounds(space, latents, x, answered, draw.t))
        return _Errors(torch.cat(errors), torch.cat(bounds) if bounds else None)


def _wide(x: Tensor) -> Tensor:
    """Give errors float32 at least to be summed in."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _parts(batch: LatentBatch | Sequence[LatentBatch]) -> Sequence[LatentBatch]:
    return [batch] if isinstance(batch, LatentBatch) else batch


class _Draw(NamedTuple):
    """Clips of one shape, the noise mixed into them, and when; on the network's device, but for the condition."""

    latents: Float[Tensor, "B C T H W"]
    noise: Float[Tensor, "B C T H W"]
    t: Float[Tensor, " B"]
    times: Float[Tensor, " B"] | Float[Tensor, "B T"]  # t, or that of each frame
    x: Float[Tensor, "B C T H W"]
    condition: Condition
    given: int  # frames


class _Errors(NamedTuple):
    """Each sample's mean squared error of the prediction; and its bound, if the variance is learned."""

    error: Float[Tensor, " B"]
    bound: Float[Tensor, " B"] | None


def _bounds(
    space: Parameterization,
    latents: Float[Tensor, "B C T H W"],
    x: Float[Tensor, "B C T H W"],
    output: Float[Tensor, "B C_out T H W"],
    t: Float[Tensor, " B"],
) -> Float[Tensor, " B"]:
    """Return the variational bound in nats per element, over all steps, as estimated from the step at t."""
    num_steps = space.process.num_steps if isinstance(space.process, VariancePreserving) else BOUND_STEPS
    t_next = torch.where(t < 1 - 1.5 / num_steps, t + 1 / num_steps, 1)  # exactly 1 after the last step, which is free
    return _wide(num_steps * variational_bound(space, latents, x, output, t, t_next).mean(dim=(1, 2, 3, 4)))


def _alphas(model: VideoDiT) -> dict[str, Tensor]:
    """Return what `gate_values` does, to be logged, without waiting for the device."""
    gates = ((name, gate) for name, gate in model.named_modules() if isinstance(gate, Gate))
    return {
        f"alpha/{name.removesuffix('.gate')}": (gate.last if gate.logit is None else gate.logit.sigmoid()).mean()
        for name, gate in gates
    }


def _draw_times(config: FlowConfig, num: int, generator: torch.Generator, shift: float) -> Float[Tensor, " {num}"]:
    """Draw times as the distribution has them among those that are asked for.

    Raises:
        ConfigError: it has none there.
    """
    if config.times == (0.0, 1.0):
        return draw_times(config.time, num, generator, shift=shift)
    ends = shift_times(torch.tensor(config.times, dtype=torch.float64), 1 / shift)
    low, high = config.time.cdf(ends).to(generator.device)
    if not low < high:
        raise ConfigError(
            f"{config.time} with shift {shift:g} has no times between {config.times[0]} and {config.times[1]}; "
            f"nearest: time.kind=uniform, which has all"
        )
    u = torch.lerp(low, high, draw_times(timesteps.Uniform(), num, generator).double())
    return shift_times(config.time.quantile(u), shift).float().clamp(*config.times)


def _on_table(process: Process, t: Float[Tensor, " B"]) -> Float[Tensor, " B"]:
    """Move times back to the nearest steps, if the process has a table of them."""
    if not isinstance(process, VariancePreserving) or process.continuous:
        return t
    return process.t_of(process.step_of(t).ceil())
