"""How data and noise are mixed, and what a network that has seen the mixture is asked for.

    x_t = alpha(t) data + sigma(t) noise        t = 0 is noise, t = 1 is data

A process gives alpha and sigma; a `Parameterization` adds what the output of a network means. The time may differ per
frame: then a clean first frame, a finished chunk, or a mask is nothing but "t = 1 here".

Every process is rectified flow seen through a scale and a change of time: z = x / (alpha + sigma) is
tau data + (1 - tau) noise with tau = alpha / (alpha + sigma), and dz/dtau = data - noise.
"""

import math
from collections.abc import Callable
from functools import lru_cache, reduce
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from reelflow.config import configuration
from reelflow.errors import ConfigError

__all__ = [
    "Estimate",
    "Levels",
    "Parameterization",
    "Preconditioning",
    "Predict",
    "Prediction",
    "Process",
    "RectifiedFlow",
    "VarianceExploding",
    "VariancePreserving",
    "along_frames",
    "as_read",
    "combine",
    "levels",
    "log_snr",
    "mix",
    "preconditioning",
    "reverse_variances",
]

Latents = Float[Tensor, "B C T H W"]
Time = Float[Tensor, " B"] | Float[Tensor, "B T"]
Levelled = Float[Tensor, "B_or_1 1 T_or_1 1 1"]
Predict = Callable[[Float[Tensor, "B C T H W"], Tensor], Float[Tensor, "B C_out T H W"]]
"""A network under its conditions: output = predict(x, t)."""


@configuration
class RectifiedFlow:
    """The straight line x_t = t data + (1 - t) noise (Liu et al. 2023, eq. 1; Lipman et al. 2023, sigma_min = 0)."""

    kind: Literal["rectified_flow"] = "rectified_flow"

    def alpha(self, t: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        return t.double()

    def sigma(self, t: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        return 1 - t.double()

    def time_at(self, log_snr: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """Return the time at which ln(alpha^2 / sigma^2) is `log_snr`."""
        return torch.sigmoid(log_snr.double() / 2)


BETAS = {"linear": (1e-4, 0.02), "scaled_linear": (0.00085, 0.012)}
COSINE_OFFSET = 0.008


@configuration
class VariancePreserving:
    """alpha^2 + sigma^2 = 1, with alpha^2 = abar, the running product of 1 - beta over `num_steps` published steps.

    linear (Ho et al. 2020) and scaled_linear (Rombach et al. 2022) say how beta, or its root, rises between `betas`;
    cosine is Nichol & Dhariwal 2021, eq. 17, with beta at most 0.999. Then abar <- abar / (r + (1 - r) abar) divides
    the SNR by r = `snr_shift`, and `zero_terminal_snr` moves alpha affinely so that the last step is pure noise and
    the first stays (Lin et al. 2024, alg. 1).

    Step n = 0 .. num_steps - 1 (data to noise) stands at t = 1 - (n + 1) / num_steps, so that t = 1 is the data itself
    and even times are the published "trailing" steps. Between two steps alpha is linear in t. `continuous` takes the
    limit of infinitely many steps in place of the table. Without zero terminal SNR, a little data is left at t = 0.

    Raises:
        ConfigError: a number is out of range, or betas are given to the cosine schedule.
    """

    kind: Literal["variance_preserving"] = "variance_preserving"
    schedule: Literal["linear", "scaled_linear", "cosine"] = "linear"
    num_steps: int = 1000
    betas: tuple[float, float] | None = None  # the first and the last; None: as published with the schedule
    snr_shift: float = 1.0
    zero_terminal_snr: bool = False
    continuous: bool = False

    def __post_init__(self) -> None:
        if self.num_steps < 2:
            raise ConfigError(f"num_steps must be at least 2, got {self.num_steps}")
        if not 0 < self.snr_shift < math.inf:
            raise ConfigError(f"snr_shift must be positive, got {self.snr_shift}; 1 means no shift")
        if self.schedule == "cosine":
            if self.betas is not None:
                raise ConfigError(f"the cosine schedule has no betas to set, got {self.betas}; nearest: None")
            return
        first, last = self._betas
        if not 0 < first < last < 1:
            raise ConfigError(
                f"betas must rise within (0, 1), got {first} and {last}; published: {BETAS[self.schedule]}"
            )

    def alpha(self, t: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        t = t.double()
        if self.continuous:
            return self._bent(self._limit(t))
        table, place = _alpha_table(self).to(t.device), t * self.num_steps
        left = place.floor().clamp(0, self.num_steps - 1).long()
        return torch.lerp(table[left], table[left + 1], place - left)

    def sigma(self, t: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        alpha = self.alpha(t)
        return ((1 - alpha) * (1 + alpha)).sqrt()

    def time_at(self, log_snr: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """Return the time at which ln(alpha^2 / sigma^2) is `log_snr`; beyond the noise end, t = 0."""
        alpha = torch.sigmoid(log_snr.double()).sqrt()
        if self.continuous:
            return self._limit_time(self._straight(alpha)).clamp(0, 1)
        table = _alpha_table(self).to(alpha.device)
        right = torch.searchsorted(table, alpha.contiguous()).clamp(1, self.num_steps)
        low, high = table[right - 1], table[right]
        return ((right - 1 + (alpha - low) / (high - low)) / self.num_steps).clamp(0, 1)

    def step_of(self, t: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """Return the published step at t, from num_steps - 1 at t = 0 to -1 at t = 1; between two steps, a fraction."""
        return (1 - t.double()) * self.num_steps - 1

    def t_of(self, step: Tensor) -> Tensor:
        """Return the time of a published step, whole or not: 0 for num_steps - 1, 1 for -1 (the data)."""
        return 1 - (step.double() + 1) / self.num_steps

    @property
    def alphas_cumprod(self) -> Float[Tensor, " steps"]:
        """abar in published order, from step 0 (nearly data) to the last (noise)."""
        return self.alpha(self.t_of(torch.arange(self.num_steps))).square()

    @property
    def _betas(self) -> tuple[float, float]:
        return self.betas or BETAS[self.schedule]

    def _bent(self, alpha: Tensor) -> Tensor:
        """Shift the SNR, then stretch alpha to 0 at the noise end."""
        alpha = alpha / (self.snr_shift + (1 - self.snr_shift) * alpha.square()).sqrt()
        if self.zero_terminal_snr:
            last = self._last_alpha()
            alpha = (alpha - last) / (1 - last)
        return alpha

    def _straight(self, alpha: Tensor) -> Tensor:
        """Undo `_bent`."""
        if self.zero_terminal_snr:
            last = self._last_alpha()
            alpha = alpha * (1 - last) + last
        return alpha * (self.snr_shift / (1 - (1 - self.snr_shift) * alpha.square())).sqrt()

    def _last_alpha(self) -> Tensor:
        alpha = self._limit(torch.zeros((), dtype=torch.float64))
        return alpha / (self.snr_shift + (1 - self.snr_shift) * alpha.square()).sqrt()

    def _limit(self, t: Tensor) -> Tensor:
        """Return alpha = exp(-integral of beta / 2), beta being num_steps times that of the table."""
        if self.schedule == "cosine":
            angle = math.pi / 2 / (1 + COSINE_OFFSET)
            return (t * angle).sin() / math.sin(angle)
        first, last = self._betas
        u = 1 - t
        if self.schedule == "linear":
            integral = first * u + (last - first) * u.square() / 2
        else:
            low, rise = first**0.5, last**0.5 - first**0.5
            integral = ((low + rise * u) ** 3 - low**3) / (3 * rise)
        return (-0.5 * self.num_steps * integral).exp()

    def _limit_time(self, alpha: Tensor) -> Tensor:
        """Undo `_limit`."""
        if self.schedule == "cosine":
            angle = math.pi / 2 / (1 + COSINE_OFFSET)
            return (alpha * math.sin(angle)).asin() / angle
        first, last = self._betas
        integral = -2 * alpha.log() / self.num_steps
        if self.schedule == "linear":
            return 1 - ((first**2 + 2 * (last - first) * integral).sqrt() - first) / (last - first)
        low, rise = first**0.5, last**0.5 - first**0.5
        return 1 - ((3 * rise * integral + low**3) ** (1 / 3) - low) / rise


@configuration
class VarianceExploding:
    """x_t = data + sigma noise, sigma = sigma_max (1 - t)^rho (Karras et al. 2022, eq. 5 with sigma_min = 0).

    Sampling starts from sigma_max times standard noise; a network wants `preconditioning`.

    Raises:
        ConfigError: `sigma_max` or `rho` is not positive.
    """

    kind: Literal["variance_exploding"] = "variance_exploding"
    sigma_max: float = 80.0
    rho: float = 7.0

    def __post_init__(self) -> None:
        if not (0 < self.sigma_max < math.inf and 0 < self.rho < math.inf):
            raise ConfigError(
                f"sigma_max and rho must be positive, got {self.sigma_max} and {self.rho}; published: 80 and 7"
            )

    def alpha(self, t: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        return torch.ones_like(t, dtype=torch.float64)

    def sigma(self, t: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        return self.sigma_max * (1 - t.double()) ** self.rho

    def time_at(self, log_snr: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """Return the time at which -2 ln sigma is `log_snr`; beyond sigma_max, t = 0."""
        return (1 - ((-log_snr.double() / 2).exp() / self.sigma_max) ** (1 / self.rho)).clamp(0, 1)


Process = RectifiedFlow | VariancePreserving | VarianceExploding


class Levels(NamedTuple):
    """How much data and how much noise, in float64, shaped to multiply latents."""

    alpha: Levelled
    sigma: Levelled

    @property
    def total(self) -> Levelled:
        return self.alpha + self.sigma

    @property
    def tau(self) -> Levelled:
        """The time at which rectified flow mixes in the same proportion."""
        return self.alpha / self.total

    @property
    def half_log_snr(self) -> Levelled:
        return self.alpha.log() - self.sigma.log()


def levels(process: Process, t: Time) -> Levels:
    """Return alpha and sigma for a time per clip or per latent frame."""
    return Levels(along_frames(process.alpha(t)), along_frames(process.sigma(t)))


def log_snr(process: Process, t: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Return ln(alpha^2 / sigma^2), rising in t, infinite where data or noise is absent."""
    return 2 * (process.alpha(t).log() - process.sigma(t).log())


Prediction = Literal["velocity", "v", "noise", "data"]
"""What a network answers:

velocity    data - noise: dx/dt of rectified flow, dz/dtau of any process
v           (alpha noise - sigma data) / sqrt(alpha^2 + sigma^2) (Salimans & Ho 2022, app. D, where the root is 1)
noise
data
"""


class Estimate(NamedTuple):
    """The data and the noise that a network sees in x, with alpha data + sigma noise = x."""

    data: Latents
    noise: Latents


@configuration
class Parameterization:
    """What the output of a network means.

    Any prediction turns into any other at every t, with two exceptions. Where alpha = 0, x says nothing of the data,
    and neither does a noise prediction: refused. Where sigma = 0, x says nothing of the noise, and neither does a data
    prediction: the noise is taken at its mean, 0.

    With `learned_variance` the output has twice the channels; the second half places the variance of a reverse step
    between its bounds (see `log_variance`).
    """

    process: Process = RectifiedFlow()
    prediction: Prediction = "velocity"
    learned_variance: bool = False

    def mix(self, data: Latents, noise: Latents, t: Time) -> Latents:
        """Return x_t; exactly `data` where sigma = 0, exactly sigma `noise` where alpha = 0."""
        alpha, sigma = levels(self.process, t)
        return combine((alpha, data), (sigma, noise))

    def target(self, data: Latents, noise: Latents, t: Time) -> Latents:
        """Return what the network should answer."""
        match self.prediction:
            case "velocity":
                return data - noise
            case "v":
                alpha, sigma = levels(self.process, t)
                size = torch.hypot(alpha, sigma)
                return combine((alpha / size, noise), (-sigma / size, data))
            case "noise":
                return noise
            case "data":
                return data

    def estimate(self, x: Latents, output: Float[Tensor, "B C_out T H W"], t: Time) -> Estimate:
        """Return the data and the noise that an answer implies.

        Raises:
            ConfigError: a noise prediction where alpha = 0, or channels that do not fit `learned_variance`.
        """
        answer, _ = self.split(x, output)
        alpha, sigma = levels(self.process, t)
        match self.prediction:
            case "velocity":
                total = alpha + sigma
                return Estimate(
                    combine((1 / total, x), (sigma / total, answer)), combine((1 / total, x), (-alpha / total, answer))
                )
            case "v":
                square, size = alpha**2 + sigma**2, torch.hypot(alpha, sigma)
                return Estimate(
                    combine((alpha / square, x), (-sigma / size, answer)),
                    combine((sigma / square, x), (alpha / size, answer)),
                )
            case "noise":
                if bool((alpha == 0).any()):
                    raise ConfigError(
                        "a noise prediction says nothing of the data at t = 0, where alpha = 0; start at t > 0 "
                        "(nearest: 1e-3), or predict velocity, v or data"
                    )
                return Estimate(combine((1 / alpha, x), (-sigma / alpha, answer)), answer)
            case "data":
                inverse = torch.where(sigma > 0, 1 / sigma.where(sigma > 0, 1), 0)
                return Estimate(answer, combine((inverse, x), (-alpha * inverse, answer)))

    def output_of(self, x: Latents, estimate: Estimate, t: Time) -> Latents:
        """Return the answer that implies `estimate` at x; of a learned variance, the first half of the channels."""
        return self.target(estimate.data, estimate.noise, t).to(x.dtype)

    def split(
        self, x: Latents, output: Float[Tensor, "B C_out T H W"]
    ) -> tuple[Latents, Float[Tensor, "B C T H W"] | None]:
        """Cut an output into the prediction and the raw variance, None unless it is learned.

        Raises:
            ConfigError: the output has not the channels of x, or twice as many when the variance is learned.
        """
        expected = x.shape[1] * (2 if self.learned_variance else 1)
        if output.shape[1] != expected:
            raise ConfigError(
                f"with learned_variance={self.learned_variance} and {x.shape[1]} latent channels the network must "
                f"answer {expected} channels, got {output.shape[1]}"
            )
        if not self.learned_variance:
            return output, None
        answer, raw = output.chunk(2, dim=1)
        return answer, raw

    def log_variance(self, raw: Latents, here: Levels, there: Levels) -> Latents:
        """Return the log-variance of the step from `here` to `there` (nearer the data) that the raw half stands for.

        It is linear between the logarithms of `reverse_variances`: the smaller at raw = -1, the larger at raw = 1
        (Nichol & Dhariwal 2021, eq. 15). The smaller is 0 when `there` is the data itself, and counts as 1e-20.
        """
        small, large = reverse_variances(here, there)
        low, high = small.clamp(min=1e-20).log(), large.log()
        return combine(((low + high) / 2, torch.ones_like(raw)), ((high - low) / 2, raw))


def reverse_variances(here: Levels, there: Levels) -> tuple[Levelled, Levelled]:
    """Return the variance of x there given x here, when the data is known, and when it is standard normal.

    In DDPM they are beta-tilde and beta (Ho et al. 2020, sec. 3.2); latents of unit variance lie between.
    """
    forgotten = 1 - (here.alpha * there.sigma / (there.alpha * here.sigma)) ** 2  # 1 - SNR here / SNR there
    small = there.sigma**2 * forgotten
    spread_here, spread_there = here.alpha**2 + here.sigma**2, there.alpha**2 + there.sigma**2
    return small, here.sigma**2 * forgotten * spread_there / spread_here


class Preconditioning(NamedTuple):
    """data = c_skip x + c_out network(c_in x)."""

    c_skip: Levelled
    c_out: Levelled
    c_in: Levelled


def preconditioning(process: Process, t: Time, *, data_std: float = 1.0) -> Preconditioning:
    """Return the scales that give a network input and target of unit variance (Karras et al. 2022, table 1).

    With data_std = 1 the network's target is minus "v".

    Raises:
        ConfigError: `data_std` is not positive.
    """
    if not data_std > 0:
        raise ConfigError(f"data_std must be positive, got {data_std}; latents have 1")
    alpha, sigma = levels(process, t)
    size = torch.hypot(alpha * data_std, sigma)
    return Preconditioning(alpha * data_std**2 / size**2, sigma * data_std / size, 1 / size)


def as_read(process: Process, x: Latents, t: Time) -> Latents:
    """Return x as a network reads it: of about unit variance, which only an exploding process does not give."""
    return combine((preconditioning(process, t).c_in, x)) if isinstance(process, VarianceExploding) else x


def along_frames(t: Time) -> Float[Tensor, "B 1 T_or_1 1 1"]:
    """Shape a time per clip or per latent frame so that it multiplies latents."""
    return t.view(t.shape[0], 1, -1, 1, 1)


def combine(*terms: tuple[Tensor, Latents]) -> Latents:
    """Return the sum of level * latents in the latents' dtype; levels round once, to float32 or finer."""
    dtype = reduce(torch.promote_types, (latents.dtype for _, latents in terms))
    finer = torch.promote_types(dtype, torch.float32)
    total = terms[0][0].to(finer) * terms[0][1]
    for level, latents in terms[1:]:
        total = total + level.to(finer) * latents
    return total.to(dtype)


def mix(data: Latents, noise: Latents, t: Time) -> Latents:
    """Return x_t of rectified flow; exactly `data` where t = 1 and exactly `noise` where t = 0."""
    return torch.lerp(noise, data, along_frames(t).to(data.dtype))


@lru_cache(maxsize=64)
def _alpha_table(process: VariancePreserving) -> Float[Tensor, " entries"]:
    """Return alpha at t = 0, 1/N, .., 1: the published table turned round, with the data itself at its end."""
    steps = torch.arange(process.num_steps + 1, dtype=torch.float64) / process.num_steps
    if process.schedule == "cosine":
        height = ((steps + COSINE_OFFSET) / (1 + COSINE_OFFSET) * math.pi / 2).cos().square()
        betas = (1 - height[1:] / height[:-1]).clamp(max=0.999)
    elif process.schedule == "linear":
        betas = torch.linspace(*process._betas, process.num_steps, dtype=torch.float64)
    else:
        first, last = process._betas
        betas = torch.linspace(first**0.5, last**0.5, process.num_steps, dtype=torch.float64).square()
    abar = (1 - betas).cumprod(0)
    alpha = (abar / (process.snr_shift + (1 - process.snr_shift) * abar)).sqrt()
    if process.zero_terminal_snr:
        alpha = (alpha - alpha[-1]) * (alpha[0] / (alpha[0] - alpha[-1]))
    return torch.cat([torch.ones(1, dtype=torch.float64), alpha]).flip(0)
