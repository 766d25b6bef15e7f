"""Which times to train on, how far to shift them, and which times to stop at when sampling: three kinds of values.

    draw_times(LogitNormal(), 64, generator, shift=shift_for(SquareRootShift(1024), num_tokens))
    inference_times(50, shift=7.0, schedule=LinearQuadraticSchedule())

A shift s moves mass to the noise end: sigma' = s sigma / (1 + (s - 1) sigma) with sigma = 1 - t, that is
logit t' = logit t - ln s (Esser et al. 2024, sec. 5.3.2).
"""

import math
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from reelflow.config import configuration
from reelflow.errors import ConfigError

__all__ = [
    "BetaSchedule",
    "CosMap",
    "ExponentialShift",
    "KarrasSchedule",
    "LinearQuadraticSchedule",
    "LinearSchedule",
    "LogitNormal",
    "Mode",
    "Schedule",
    "Shift",
    "SquareRootShift",
    "TableSchedule",
    "TableShift",
    "TimeDistribution",
    "Uniform",
    "draw_times",
    "inference_times",
    "shift_for",
    "shift_times",
    "shifted_density",
]

Values = Float[Tensor, "*shape"]


@configuration
class Uniform:
    """All times alike."""

    kind: Literal["uniform"] = "uniform"

    def quantile(self, u: Values) -> Values:
        return u

    def cdf(self, t: Values) -> Values:
        return t

    def density(self, t: Values) -> Values:
        return torch.ones_like(t)


@configuration
class LogitNormal:
    """Times whose logit is normal (Esser et al. 2024, eq. 19); shifted by s, the mean falls by ln s.

    Raises:
        ConfigError: `std` is not positive, or a value is not finite.
    """

    mean: float = 0.0  # of logit t; negative leans towards noise
    std: float = 1.0
    kind: Literal["logit_normal"] = "logit_normal"

    def __post_init__(self) -> None:
        if not math.isfinite(self.mean):
            raise ConfigError(f"mean must be finite, got {self.mean}; nearest: 0, centred")
        _check_positive("std", self.std, "nearest: 1, as usual")

    def quantile(self, u: Values) -> Values:
        return torch.sigmoid(self.mean + self.std * torch.special.ndtri(u))

    def cdf(self, t: Values) -> Values:
        return torch.special.ndtr((t.logit() - self.mean) / self.std)

    def density(self, t: Values) -> Values:
        z = (t.logit() - self.mean) / self.std
        density = torch.exp(-z.square() / 2) / (self.std * math.sqrt(2 * math.pi) * t * (1 - t))
        return density.masked_fill((t == 0) | (t == 1), 0.0)


@configuration
class Mode:
    """Times gathered at the middle (scale > 0) or at the ends (scale < 0), with heavy tails (Esser et al. 2024, eq. 20).

    Their time runs the other way, but the distribution is its own mirror image.

    Raises:
        ConfigError: `scale` is outside [-1, 2 / (pi - 2)], where the density would be negative.
    """

    scale: float
    kind: Literal["mode"] = "mode"

    def __post_init__(self) -> None:
        low, high = -1.0, 2 / (math.pi - 2)
        if not low <= self.scale <= high:
            near = min(max(low, self.scale), high) if math.isfinite(self.scale) else 0.0
            raise ConfigError(
                f"scale of a mode must lie between -1 and 2 / (pi - 2) = 1.752, got {self.scale}; nearest: {near:.5g}"
            )

    def quantile(self, u: Values) -> Values:
        return u + self.scale * (u - torch.sin(math.pi / 2 * u).square())

    def cdf(self, t: Values) -> Values:
        return _invert(self.quantile, t)

    def density(self, t: Values) -> Values:
        return 1 / (1 + self.scale * (1 - math.pi / 2 * torch.sin(math.pi * self.cdf(t))))


@configuration
class CosMap:
    """Times whose log signal-to-noise ratio is that of a cosine schedule (Esser et al. 2024, eq. 21)."""

    kind: Literal["cosmap"] = "cosmap"

    def quantile(self, u: Values) -> Values:
        angle = math.pi / 2 * u
        return angle.sin() / (angle.sin() + angle.cos())

    def cdf(self, t: Values) -> Values:
        return torch.atan2(t, 1 - t) * (2 / math.pi)

    def density(self, t: Values) -> Values:
        return 2 / (math.pi * (t.square() + (1 - t).square()))


TimeDistribution = Uniform | LogitNormal | Mode | CosMap
"""Each has `quantile(u)`, its inverse `cdf(t)` and the derivative of that, `density(t)`, all on [0, 1]."""


def draw_times(
    distribution: TimeDistribution,
    num: int,
    generator: torch.Generator,
    *,
    shift: float = 1.0,
    stratified: bool = True,
) -> Float[Tensor, " {num}"]:
    """Draw times, then shift them; one from each of `num` equal parts in rising order, or else independently.

    Stratified, each part of the distribution gets its share of every batch, which takes noise out of the loss and its
    gradient (as for variational diffusion: Kingma et al. 2021, app. I.1).

    Raises:
        ConfigError: `num` is less than 1, or `shift` is not positive.
    """
    if num < 1:
        raise ConfigError(f"the number of times to draw must be at least 1, got {num}; nearest: 1")
    u = torch.rand(num, generator=generator, device=generator.device)
    if stratified:
        u = (torch.arange(num, device=generator.device) + u) / num
    return shift_times(distribution.quantile(u.double()).float(), shift)


def shift_times(t: Values, shift: float) -> Values:
    """Move times towards noise (shift > 1) or data (shift < 1); 0 and 1 stay.

    Raises:
        ConfigError: `shift` is not positive and finite.
    """
    _check_positive("shift", shift, "nearest: 1, no shift")
    return t / (t + shift * (1 - t))


def shifted_density(distribution: TimeDistribution, t: Values, *, shift: float) -> Values:
    """Return the density at t of times drawn and then shifted: p(t0) dt0/dt, where t0 is what the shift takes to t.

    Of a logit-normal it is the density of the logit-normal whose mean is less by ln shift.

    Raises:
        ConfigError: `shift` is not positive.
    """
    return distribution.density(shift_times(t, 1 / shift)) * shift / (1 + (shift - 1) * t).square()


@configuration
class SquareRootShift:
    """A shift that keeps the uncertainty about the data when there are more tokens of it (Esser et al. 2024, eq. 23).

    `shift` at `tokens`, and elsewhere times the square root of the ratio of tokens.
    """

    tokens: int
    shift: float = 1.0
    kind: Literal["square_root"] = "square_root"

    def __post_init__(self) -> None:
        _check_tokens(self.tokens)
        _check_positive("shift", self.shift, "nearest: 1, no shift")

    def at(self, num_tokens: int) -> float:
        return self.shift * math.sqrt(num_tokens / self.tokens)


@configuration
class ExponentialShift:
    """The shift e^mu, with mu on the line through (tokens, mu) at two counts of tokens, and beyond them.

    Published with mu from 0.5 at 256 to 1.15 at 4,096 tokens for images, and from 0.95 at 1,024 to 2.05 at 4,096 for
    video. Mind the line's far end: the first is e^20 at 118,000 tokens.
    """

    tokens: tuple[int, int]
    mu: tuple[float, float]
    kind: Literal["exponential"] = "exponential"

    def __post_init__(self) -> None:
        for tokens in self.tokens:
            _check_tokens(tokens)
        if self.tokens[0] == self.tokens[1]:
            raise ConfigError(
                f"a line needs two different counts of tokens, got {self.tokens}; "
                f"nearest: ({self.tokens[0]}, {self.tokens[1] + 1})"
            )
        if not all(map(math.isfinite, self.mu)):
            raise ConfigError(f"mu must be finite, got {self.mu}; 0 means no shift")

    def at(self, num_tokens: int) -> float:
        (low, high), (start, end) = self.tokens, self.mu
        mu = start + (end - start) * (num_tokens - low) / (high - low)
        return math.exp(mu) if mu < 700 else math.inf


@configuration
class TableShift:
    """A shift for each resolution, as (tokens, shift) in rising order; between rows ln shift is linear in ln tokens.

    What lies outside the table is refused, not guessed.
    """

    rows: tuple[tuple[int, float], ...]
    kind: Literal["table"] = "table"

    def __post_init__(self) -> None:
        if not self.rows:
            raise ConfigError("a table of shifts needs at least one row (tokens, shift); nearest: ((1024, 1.0),)")
        for tokens, shift in self.rows:
            _check_tokens(tokens)
            _check_positive("shift", shift, "nearest: 1, no shift")
        for (before, _), (after, _) in pairwise(self.rows):
            if after <= before:
                raise ConfigError(f"tokens of a table must rise, got {before} before {after}; nearest: {before + 1}")

    def at(self, num_tokens: int) -> float:
        low, high = self.rows[0][0], self.rows[-1][0]
        if not low <= num_tokens <= high:
            raise ConfigError(
                f"the table of shifts reaches from {low} to {high} tokens, got {num_tokens}; "
                f"nearest: {low if num_tokens < low else high}"
            )
        right = next(index for index, (tokens, _) in enumerate(self.rows) if num_tokens <= tokens)
        if num_tokens == self.rows[right][0]:
            return self.rows[right][1]
        (low, start), (high, end) = self.rows[right - 1 : right + 1]
        return start * (end / start) ** (math.log(num_tokens / low) / math.log(high / low))


Shift = float | SquareRootShift | ExponentialShift | TableShift
"""A number, or a function of the number of video tokens; `shift_for` makes a number of either."""


def shift_for(shift: Shift, num_tokens: int) -> float:
    """Return the shift for a clip of `num_tokens` tokens.

    Raises:
        ConfigError: a table does not reach there, or what comes out is not positive and finite.
    """
    _check_tokens(num_tokens)
    value = shift if isinstance(shift, int | float) else shift.at(num_tokens)
    _check_positive("shift", value, "nearest: 1, no shift")
    return float(value)


@configuration
class LinearSchedule:
    """Evenly spaced times."""

    kind: Literal["linear"] = "linear"

    def between(self, num_steps: int) -> Float[Tensor, " {num_steps}-1"]:
        return torch.linspace(0, 1, num_steps + 1, dtype=torch.float64)[1:-1]


@configuration
class LinearQuadraticSchedule:
    """Half of the steps linear up to t = `threshold`, the rest quadratic, with one slope where they meet.

    So fifty steps take the first steps of a thousand, where the picture is laid out (Polyak et al. 2024, sec. 3.4.2).
    Of an odd number of steps the smaller half is linear.

    Raises:
        ConfigError: `threshold` is outside (0, 0.5]; 0.5 is linear throughout.
    """

    threshold: float = 0.025
    kind: Literal["linear_quadratic"] = "linear_quadratic"

    def __post_init__(self) -> None:
        if not 0 < self.threshold <= 0.5:
            near = 0.5 if self.threshold > 0.5 else 0.025
            raise ConfigError(f"threshold must be above 0 and at most 0.5, got {self.threshold}; nearest: {near}")

    def between(self, num_steps: int) -> Float[Tensor, " {num_steps}-1"]:
        step, half = _steps(num_steps), num_steps // 2
        slope = self.threshold / half
        bend = (1 - slope * num_steps) / (num_steps - half) ** 2
        return slope * step + bend * (step - half).clamp(min=0).square()


@configuration
class KarrasSchedule:
    """Times whose ratio sigma / alpha = (1 - t) / t has an evenly spaced 1/rho-th power (Karras et al. 2022, eq. 5).

    The first of them, where one part in `ratio_max` is data, is put at t = 0; the last is followed by t = 1.

    Raises:
        ConfigError: `rho` or a ratio is not positive, or `ratio_max` does not exceed `ratio_min`.
    """

    rho: float = 7.0
    ratio_max: float = 80.0
    ratio_min: float = 0.002
    kind: Literal["karras"] = "karras"

    def __post_init__(self) -> None:
        _check_positive("rho", self.rho, "nearest: 7, as published")
        _check_positive("ratio_max", self.ratio_max, "nearest: 80, as published")
        _check_positive("ratio_min", self.ratio_min, "nearest: 0.002, as published")
        if not self.ratio_min < self.ratio_max:
            raise ConfigError(
                f"ratio_max must exceed ratio_min, got {self.ratio_max} and {self.ratio_min}; "
                f"nearest: {self.ratio_min} and {self.ratio_max}"
            )

    def between(self, num_steps: int) -> Float[Tensor, " {num_steps}-1"]:
        start, end = self.ratio_max ** (1 / self.rho), self.ratio_min ** (1 / self.rho)
        return 1 / (1 + (start + _steps(num_steps) / (num_steps - 1) * (end - start)) ** self.rho)


@configuration
class BetaSchedule:
    """Evenly spaced quantiles of a beta distribution: more steps at both ends (Lee et al. 2024, arXiv 2407.12173).

    Raises:
        ConfigError: `alpha` (the noise end) or `beta` (the data end) is outside (0, 20].
    """

    alpha: float = 0.6
    beta: float = 0.6
    kind: Literal["beta"] = "beta"

    def __post_init__(self) -> None:
        for name, value in (("alpha", self.alpha), ("beta", self.beta)):
            if not 0 < value <= 20:  # the series below is exact to rounding up to here
                near = 20 if value > 20 else 0.6
                raise ConfigError(f"{name} must be above 0 and at most 20, got {value}; nearest: {near}")

    def between(self, num_steps: int) -> Float[Tensor, " {num_steps}-1"]:
        return _invert(partial(_beta_cdf, a=self.alpha, b=self.beta), _steps(num_steps) / num_steps)


@configuration
class TableSchedule:
    """Times found by search for one number of steps, spread over any other (as Sabour et al. 2024, Align Your Steps).

    `ratios` are sigma / alpha = (1 - t) / t, from noise to data. Between them the logarithm, which is -logit t, is linear
    in the step. The first is put at t = 0, the last at t = 1.

    Raises:
        ConfigError: there are fewer than two ratios, or they do not fall, or are not positive.
    """

    ratios: tuple[float, ...]
    kind: Literal["table"] = "table"

    def __post_init__(self) -> None:
        if len(self.ratios) < 2:
            raise ConfigError(f"a table needs at least two ratios, got {self.ratios}; nearest: (80.0, 0.002)")
        for ratio in self.ratios:
            _check_positive("every ratio", ratio, "put 0.002 or so at the end, it becomes t = 1")
        for before, after in pairwise(self.ratios):
            if not after < before:
                raise ConfigError(
                    f"ratios must fall from noise to data, got {before} before {after}; "
                    f"nearest: {tuple(sorted(set(self.ratios), reverse=True))}"
                )

    def between(self, num_steps: int) -> Float[Tensor, " {num_steps}-1"]:
        logs = torch.tensor(self.ratios, dtype=torch.float64).log()
        place = _steps(num_steps) * (len(self.ratios) - 1) / num_steps
        left = place.long()
        return torch.sigmoid(-torch.lerp(logs[left], logs[left + 1], place - left))


Schedule = LinearSchedule | LinearQuadraticSchedule | KarrasSchedule | BetaSchedule | TableSchedule
"""Each has `between(num_steps)`: for two steps or more, the times strictly between 0 and 1, one fewer than steps."""


def inference_times(
    num_steps: int,
    *,
    shift: float = 1.0,
    schedule: Schedule = LinearSchedule(),
    last_sigma: float | None = None,
    device: torch.device | str = "cpu",
) -> Float[Tensor, " {num_steps}+1"]:
    """Return num_steps + 1 strictly rising times from 0 (noise) to 1 (data): the schedule's, then shifted.

    With `last_sigma`, all times but the end are then stretched so that the last step starts at t = 1 - last_sigma.

    Raises:
        ConfigError: fewer than one step (two with `last_sigma`), a `last_sigma` outside (0, 1), or times so close to an
            end that float64 cannot tell them apart.
    """
    if num_steps < 1:
        raise ConfigError(f"num_steps must be at least 1, got {num_steps}; nearest: 1")
    times = torch.cat([torch.zeros(1), schedule.between(num_steps) if num_steps > 1 else torch.zeros(0), torch.ones(1)])
    times = shift_times(times.double(), shift)
    if last_sigma is not None:
        if num_steps == 1:
            raise ConfigError(
                "with last_sigma num_steps must be at least 2, got 1, which starts at sigma 1; nearest: 2"
            )
        if not 0 < last_sigma < 1:
            raise ConfigError(f"last_sigma must lie between 0 and 1, got {last_sigma}; nearest: 0.1, or None")
        times[:-1] *= (1 - last_sigma) / times[-2]
    if not bool((times.diff() > 0).all()):
        raise ConfigError(
            f"{schedule} with shift {shift} puts two of {num_steps + 1} times in one place; nearest: a shift closer to 1, "
            f"fewer steps, or LinearSchedule()"
        )
    return times.to(device)


def _check_positive(name: str, value: float, way_out: str) -> None:
    if not 0 < value < math.inf:
        raise ConfigError(f"{name} must be positive{' and finite' if value > 0 else ''}, got {value}; {way_out}")


def _check_tokens(num_tokens: int) -> None:
    if num_tokens < 1:
        raise ConfigError(f"the number of tokens must be at least 1, got {num_tokens}; nearest: 1")


def _steps(num_steps: int) -> Float[Tensor, " {num_steps}-1"]:
    return torch.arange(1, num_steps, dtype=torch.float64)


def _invert(rising: Callable[[Tensor], Tensor], values: Values) -> Values:
    """Find where in [0, 1] a rising function takes `values`, by halving down to float64."""
    low, high = torch.zeros_like(values), torch.ones_like(values)
    for _ in range(60):
        middle = (low + high) / 2
        below = rising(middle) < values
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    return low.masked_fill(values >= 1, 1.0)


def _beta_cdf(t: Values, a: float, b: float) -> Values:
    """Return the regularised incomplete beta function I_t(a, b), from the half where its series is short."""
    half = t.clamp(max=0.5), (1 - t).clamp(max=0.5)
    return torch.where(t <= 0.5, _lower_beta_cdf(half[0], a, b), 1 - _lower_beta_cdf(half[1], b, a))


def _lower_beta_cdf(t: Values, a: float, b: float) -> Values:
    """Return I_t(a, b) for t <= 1/2, by a series without cancellation (DLMF 8.17.8)."""
    n = torch.arange(256, dtype=t.dtype, device=t.device)
    series = 1 + (t[..., None] * (a + b + n) / (a + 1 + n)).cumprod(-1).sum(-1)
    log_beta = math.lgamma(a) + math.lgamma(b) - math.lgamma(a + b)
    return t**a * (1 - t) ** b * series / (a * math.exp(log_beta))
