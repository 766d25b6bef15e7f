"""How noise becomes a clip, as a value of recipes, model cards and provenance: the times, the sampler, the guidance.

    Sampling(num_steps=12, guidance_scale=6.0, sampler=UniPC(order=3), guidance=Guidance(interval=(0.1, 0.9)))

`sampler_of` and `guided_by` make functions of it.
"""

import math
from functools import partial
from typing import Annotated, Literal

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from reelflow.config import configuration
from reelflow.diffusion.guidance import (
    AdaptiveProjection,
    Rule,
    Scale,
    away_from,
    away_from_fitted,
    over_frames,
    rescale,
    steered,
    within,
    zero_start,
)
from reelflow.diffusion.process import Parameterization, Predict
from reelflow.diffusion.samplers import (
    Generators,
    Restart,
    Sampler,
    adams_bashforth,
    ancestral,
    ddim,
    dpm2m,
    dpm2m_sde,
    dpm2s,
    euler,
    euler_maruyama,
    heun,
    midpoint,
    restart,
    unipc,
)
from reelflow.diffusion.timesteps import LinearSchedule, Schedule, Shift, inference_times, shift_for
from reelflow.errors import ConfigError

__all__ = [
    "AdamsBashforth",
    "Ancestral",
    "Ddim",
    "Dpm2m",
    "Dpm2mSde",
    "Dpm2s",
    "Euler",
    "EulerMaruyama",
    "Guidance",
    "Heun",
    "Method",
    "Midpoint",
    "Projection",
    "Restarted",
    "Sampling",
    "UniPC",
    "count_evaluations",
    "guided_by",
    "sampler_of",
]

# Samplers: each class stands for the function of `reelflow.diffusion.samplers` that its kind names.


@configuration
class Euler:
    kind: Literal["euler"] = "euler"


@configuration
class Heun:
    kind: Literal["heun"] = "heun"


@configuration
class Midpoint:
    kind: Literal["midpoint"] = "midpoint"


@configuration
class Dpm2s:
    kind: Literal["dpm2s"] = "dpm2s"


@configuration
class Dpm2m:
    kind: Literal["dpm2m"] = "dpm2m"


@configuration
class UniPC:
    order: Literal[1, 2, 3] = 2
    scale: Literal["bh1", "bh2"] = "bh2"
    kind: Literal["unipc"] = "unipc"


@configuration
class AdamsBashforth:
    order: Literal[2, 3] = 2
    kind: Literal["adams_bashforth"] = "adams_bashforth"


@configuration
class Ddim:
    eta: float = 1.0  # share of the noise that is drawn anew, 0 to 1
    kind: Literal["ddim"] = "ddim"

    def __post_init__(self) -> None:
        _check_share("eta", self.eta)


@configuration
class Ancestral:
    variance: Literal["small", "large"] = "small"  # where the network has learned none
    kind: Literal["ancestral"] = "ancestral"


@configuration
class EulerMaruyama:
    level: float = 1.0  # of the noise; 0 is euler
    kind: Literal["euler_maruyama"] = "euler_maruyama"

    def __post_init__(self) -> None:
        if not 0 <= self.level < math.inf:
            raise ConfigError(f"level must be at least 0 and finite, got {self.level}; 0 draws no noise")


@configuration
class Dpm2mSde:
    eta: float = 1.0  # share of the noise that is drawn anew, 0 to 1
    kind: Literal["dpm2m_sde"] = "dpm2m_sde"

    def __post_init__(self) -> None:
        _check_share("eta", self.eta)


BY_KIND = Field(discriminator="kind")
Deterministic = Euler | Heun | Midpoint | Dpm2s | Dpm2m | UniPC | AdamsBashforth


@configuration
class Restarted:
    restarts: tuple[Restart, ...]  # low, high (rows of the times, 0 to num_steps), repeats
    sampler: Annotated[Deterministic, BY_KIND] = Heun()
    kind: Literal["restart"] = "restart"


Method = Annotated[Deterministic | Ddim | Ancestral | EulerMaruyama | Dpm2mSde | Restarted, BY_KIND]


def sampler_of(method: Method, generators: Generators) -> Sampler:
    """Return the sampler that a method stands for; what it draws comes from `generators`."""
    match method:
        case Euler():
            return euler
        case Heun():
            return heun
        case Midpoint():
            return midpoint
        case Dpm2s():
            return dpm2s
        case Dpm2m():
            return dpm2m
        case UniPC(order=order, scale=scale):
            return partial(unipc, order=order, scale=scale)
        case AdamsBashforth(order=order):
            return partial(adams_bashforth, order=order)
        case Ddim(eta=eta):
            return partial(ddim, generator=generators, eta=eta)
        case Ancestral(variance=variance):
            return partial(ancestral, generator=generators, variance=variance)
        case EulerMaruyama(level=level):
            return partial(euler_maruyama, generator=generators, level=level)
        case Dpm2mSde(eta=eta):
            return partial(dpm2m_sde, generator=generators, eta=eta)
        case Restarted(restarts=restarts, sampler=inner):
            return partial(restart, generator=generators, restarts=restarts, sampler=sampler_of(inner, generators))


# Guidance


@configuration
class Projection:
    """Options of `reelflow.diffusion.guidance.AdaptiveProjection` (APG)."""

    eta: float = 0.0
    threshold: float | None = None
    momentum: float = 0.0


@configuration
class Guidance:
    """Options of classifier-free guidance, none by default.

    CFG-zero* is difference="fitted" with zero_until=0.04.
    """

    interval: tuple[float, float] = (0.0, 1.0)  # of t; outside, the conditional prediction alone
    first_scale: float | None = None  # of the first latent frame at hand; linear up to guidance_scale, the last frame's
    difference: Literal["plain", "fitted"] | Projection = "plain"  # from which the lead is taken
    rescale: float = 0.0  # share of the conditional standard deviation that is restored
    zero_until: float = 0.0  # t; before it velocities are 0


def guided_by(
    guidance: Guidance,
    cond: Predict,
    uncond: Predict,
    *,
    scale: float,
    num_frames: int,
    parameterization: Parameterization,
) -> Predict:
    """Lead `cond` away from `uncond`, for one run over clips of `num_frames` latent frames (a projection remembers).

    Raises:
        ConfigError: an option is out of range.
    """
    first = guidance.first_scale
    strength: Scale = scale if first is None else over_frames(first, scale, num_frames)
    lead: Rule
    match guidance.difference:
        case "plain":
            lead = away_from(uncond, scale=strength)
        case "fitted":
            lead = away_from_fitted(uncond, scale=strength)
        case Projection(eta=eta, threshold=threshold, momentum=momentum):
            lead = AdaptiveProjection(
                uncond,
                scale=strength,
                eta=eta,
                threshold=threshold,
                momentum=momentum,
                parameterization=parameterization,
            )
    predict = steered(cond, within(lead, *guidance.interval), rescale(phi=guidance.rescale))
    return zero_start(predict, until=guidance.zero_until) if guidance.zero_until else predict


# All of it


@configuration
class Sampling:
    """How noise becomes a clip.

    Raises:
        ConfigError: a value is out of range.
    """

    num_steps: int = 24
    guidance_scale: float = 3.0  # 1 = off
    shift: Shift = 1.0  # > 1 spends more steps near noise
    sampler: Method = Euler()
    guidance: Guidance = Guidance()
    schedule: Schedule = LinearSchedule()  # before the shift
    precision: Literal["fp32", "bf16"] = "fp32"

    def __post_init__(self) -> None:
        if not 0 <= self.guidance_scale < math.inf:
            raise ConfigError(
                f"guidance_scale must be at least 0 and finite, got {self.guidance_scale}; 1 turns guidance off"
            )
        shift = self.shift if isinstance(self.shift, int | float) else 1.0
        inference_times(self.num_steps, shift=shift, schedule=self.schedule)
        guided_by(
            self.guidance,
            lambda x, t: x,
            lambda x, t: x,
            scale=self.guidance_scale,
            num_frames=1,
            parameterization=Parameterization(),
        )
        restarts = self.sampler.restarts if isinstance(self.sampler, Restarted) else ()
        highs = [high for _, high, _ in restarts]
        if highs != sorted(highs) or not all(
            0 <= r.low < r.high <= self.num_steps and r.repeats >= 0 for r in restarts
        ):
            raise ConfigError(
                f"a restart falls back from a row high to a row low before it, within rows 0 to {self.num_steps}, 0 or "
                f"more times, and they come in rising order of high; got {[tuple(r) for r in restarts]}"
            )

    @property
    def steps_walked(self) -> int:
        """`num_steps`, and those that restarts walk again."""
        restarts = self.sampler.restarts if isinstance(self.sampler, Restarted) else ()
        return self.num_steps + sum(repeats * (high - low) for low, high, repeats in restarts)

    def times(self, parameterization: Parameterization, num_tokens: int) -> Float[Tensor, " steps"]:
        """Return the times of a clip of `num_tokens` tokens, from 0 to 1.

        Raises:
            ConfigError: the shift does not reach there, or a network so parameterised cannot be sampled so.
        """
        process, prediction = parameterization.process, parameterization.prediction
        if prediction == "noise" and bool(process.alpha(torch.zeros(())) == 0):
            raise ConfigError(
                "a noise prediction says nothing of the data at t = 0, where this process has none; "
                "nearest: prediction v, or a process without zero terminal SNR"
            )
        if self.guidance.zero_until and prediction != "velocity":
            raise ConfigError(f"zero_until makes velocities 0, but the network predicts {prediction}; nearest: 0.0")
        return inference_times(self.num_steps, shift=shift_for(self.shift, num_tokens), schedule=self.schedule)


def count_evaluations(sampling: Sampling, parameterization: Parameterization, num_tokens: int) -> int:
    """Return how often one chunk of a clip asks the network, found by a rehearsal on two frames of one value."""
    asked = 0

    def network(x: Tensor, t: Tensor) -> Tensor:
        nonlocal asked
        asked += 1
        return torch.zeros_like(x).repeat(1, 2 if parameterization.learned_variance else 1, 1, 1, 1)

    predict = guided_by(
        sampling.guidance,
        lambda x, t: network(x, t),
        lambda x, t: network(x, t),
        scale=sampling.guidance_scale,
        num_frames=2,
        parameterization=parameterization,
    )
    walk = sampler_of(sampling.sampler, torch.Generator())
    times = sampling.times(parameterization, num_tokens)
    walk(predict, torch.zeros(1, 1, 2, 1, 1), times, parameterization=parameterization)
    return asked


def _check_share(name: str, value: float) -> None:
    if not 0 <= value <= 1:
        raise ConfigError(f"{name} must be between 0 and 1, got {value}; nearest: {min(max(value, 0.0), 1.0)}")
