"""Samplers walk a network's estimates from noise (t = 0) to data (t = 1).

`times` is a vector of S + 1 rising times, or a matrix with one column per latent frame (see `rollout.py`). A frame
whose time does not change in a step keeps its bits, so a column of ones is a given frame. x starts as sigma(times[0])
noise.

    method                   evaluations a step    order                        in
    euler, ddim              1                     1                            tau
    heun, midpoint           2 (heun's last: 1)    2                            tau
    adams_bashforth          1                     2 or 3, as asked             tau
    dpm2s                    2                     2                            log-SNR
    dpm2m                    1                     2                            log-SNR
    unipc                    1                     one above that asked, to 3   log-SNR
    ancestral, ddim, euler_maruyama, dpm2m_sde, consistency, restart      draw noise on the way

tau = alpha / (alpha + sigma) is the time of the rectified flow that a process is a scaled copy of (see `process.py`);
methods in tau are regular at both ends. Log-SNR is infinite where data or noise is absent: multistep methods in it are
of first order in a step into t = 1, and do not look back at a step out of t = 0 if no data is left there.
"""

import math
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from reelflow.diffusion.process import (
    Estimate,
    Levels,
    Parameterization,
    Predict,
    combine,
    levels,
    reverse_variances,
)
from reelflow.errors import ConfigError

__all__ = [
    "Draws",
    "Generators",
    "Noise",
    "OnStep",
    "Restart",
    "Sampler",
    "Times",
    "adams_bashforth",
    "ancestral",
    "consistency",
    "ddim",
    "dpm2m",
    "dpm2m_sde",
    "dpm2s",
    "draw",
    "euler",
    "euler_maruyama",
    "heun",
    "midpoint",
    "restart",
    "unipc",
]

Latents = Float[Tensor, "B C T H W"]
Times = Float[Tensor, " steps"] | Float[Tensor, "steps columns"]
Landings = Float[Tensor, " landings"] | Float[Tensor, "landings columns"]
Generators = torch.Generator | Sequence[torch.Generator]
"""One for the batch, or one per clip, so that a clip does not depend on its neighbours."""
Noise = Callable[[Latents], Latents]
"""Returns standard normal noise of the shape of what it is given: called once a step by a sampler that draws."""
Draws = Generators | Noise
OnStep = Callable[[int, Latents], None]
"""Called at each step with its number from 0 and the data that x implies so far: a preview."""
FLOW = Parameterization()


@runtime_checkable
class Sampler(Protocol):
    """What all deterministic samplers can be called with."""

    def __call__(
        self,
        predict: Predict,
        x: Latents,
        times: Times,
        *,
        parameterization: Parameterization = ...,
        on_step: OnStep | None = ...,
    ) -> Latents: ...


# First order


def euler(
    predict: Predict,
    x: Latents,
    times: Times,
    *,
    clip: float = math.inf,
    landings: Landings | None = None,
    parameterization: Parameterization = FLOW,
    on_step: OnStep | None = None,
) -> Latents:
    """Mix the estimated data and noise anew at the next time; one evaluation a step.

    For rectified flow this is Euler's step x + (t' - t) velocity, for a variance-preserving process DDIM with eta = 0
    (Song et al. 2021, eq. 12). Data is cut to [-clip, clip], and the noise left as it was. `landings` are the times
    that steps go to, where they are not those that the next ones are thought to start from, as some published
    schedules have it.

    Raises:
        ConfigError: times decrease, leave [0, 1], or do not fit the frames of x.
    """

    def advance(step: _Step, x: Latents, seen: Estimate, _: Tensor) -> Latents:
        return step.recompose(Estimate(seen.data.clamp(-clip, clip), seen.noise))

    return _walk(predict, x, times, parameterization, on_step, advance, landings)


def ddim(
    predict: Predict,
    x: Latents,
    times: Times,
    *,
    generator: Draws,
    eta: float = 1.0,
    parameterization: Parameterization = FLOW,
    on_step: OnStep | None = None,
) -> Latents:
    """Trade a share of the estimated noise for fresh noise, keeping its level (Song et al. 2021, eq. 12 and 16).

    eta = 0 is `euler`; eta = 1 is `ancestral` with the small variance, also known as Euler ancestral.

    Raises:
        ConfigError: as for `euler`, or `eta` is outside [0, 1].
    """
    _check_share("eta", eta)

    def advance(step: _Step, x: Latents, seen: Estimate, _: Tensor) -> Latents:
        fresh = eta**2 * reverse_variances(step.here, step.there)[0]
        kept = (step.there.sigma**2 - fresh).clamp(min=0).sqrt()
        return combine((step.there.alpha, seen.data), (kept, seen.noise), (fresh.sqrt(), draw(x, generator)))

    return _walk(predict, x, times, parameterization, on_step, advance)


def ancestral(
    predict: Predict,
    x: Latents,
    times: Times,
    *,
    generator: Draws,
    variance: Literal["small", "large"] = "small",
    parameterization: Parameterization = FLOW,
    on_step: OnStep | None = None,
) -> Latents:
    """Draw each next x from the Gaussian that the network describes (DDPM: Ho et al. 2020, alg. 2).

    A learned variance is used where the network gives one; else `variance` says which of `reverse_variances`. Nothing
    is drawn in a step into t = 1.

    Raises:
        ConfigError: as for `euler`.
    """

    def advance(step: _Step, x: Latents, seen: Estimate, output: Tensor) -> Latents:
        small, large = reverse_variances(step.here, step.there)
        raw = parameterization.split(x, output)[1]
        std = (small if variance == "small" else large).sqrt()
        if raw is not None:
            std = (0.5 * parameterization.log_variance(raw, step.here, step.there)).exp()
        std = torch.where(step.there.sigma > 0, std, 0)
        return combine(
            (step.there.alpha, seen.data), (step.there.sigma * step.decay, seen.noise), (std, draw(x, generator))
        )

    return _walk(predict, x, times, parameterization, on_step, advance)


def consistency(
    predict: Predict,
    x: Latents,
    times: Times,
    *,
    generator: Draws,
    parameterization: Parameterization = FLOW,
    on_step: OnStep | None = None,
) -> Latents:
    """Mix the estimated data with nothing but fresh noise at the next time (Song et al. 2023, alg. 1).

    Made for networks that were distilled to see the data at once.

    Raises:
        ConfigError: as for `euler`.
    """

    def advance(step: _Step, x: Latents, seen: Estimate, _: Tensor) -> Latents:
        return step.recompose(Estimate(seen.data, draw(x, generator)))

    return _walk(predict, x, times, parameterization, on_step, advance)


def euler_maruyama(
    predict: Predict,
    x: Latents,
    times: Times,
    *,
    generator: Draws,
    level: float = 1.0,
    parameterization: Parameterization = FLOW,
    on_step: OnStep | None = None,
) -> Latents:
    """Integrate dz = (velocity - level noise) dtau + sqrt(2 level (1 - tau)) dW, whose marginals are those of the flow.

    This is the stochastic sampler of Ma et al. 2024 (SiT, eq. 6) with diffusion 2 level (1 - tau), which is regular at
    both ends; level = 0 is `euler`. Nothing is drawn in a step into t = 1.

    Raises:
        ConfigError: as for `euler`, or `level` is negative.
    """
    if not level >= 0:
        raise ConfigError(f"level must be at least 0, got {level}; 0 draws no noise")

    def advance(step: _Step, x: Latents, seen: Estimate, _: Tensor) -> Latents:
        dtau = step.there.tau - step.here.tau
        std = (2 * level * (1 - step.here.tau) * dtau).sqrt() * step.there.total
        drift = combine((step.there.total * dtau * level, seen.noise))
        noisy = step.recompose(seen) - drift + combine((std, draw(x, generator)))
        return torch.where(step.there.sigma > 0, noisy, step.recompose(seen))

    return _walk(predict, x, times, parameterization, on_step, advance)


# Second order, two evaluations


def heun(
    predict: Predict,
    x: Latents,
    times: Times,
    *,
    parameterization: Parameterization = FLOW,
    on_step: OnStep | None = None,
) -> Latents:
    """Follow the mean slope of both ends of a step; two evaluations (Karras et al. 2022, alg. 1).

    A step into t = 1 is Euler's, with one evaluation, as there: at t = 1 no network knows the noise.

    Raises:
        ConfigError: as for `euler`.
    """

    def advance(step: _Step, x: Latents, seen: Estimate, _: Tensor) -> Latents:
        ahead = step.recompose(seen)
        inside = step.moves & (step.there.sigma > 0)
        if not bool(inside.any()):
            return ahead
        there, _ = _ask(predict, torch.where(step.moves, ahead, x), step.t_next, parameterization)
        slope = (seen.data - seen.noise + there.data - there.noise) / 2
        return torch.where(inside, step.along(x, slope), ahead)

    return _walk(predict, x, times, parameterization, on_step, advance)


def midpoint(
    predict: Predict,
    x: Latents,
    times: Times,
    *,
    parameterization: Parameterization = FLOW,
    on_step: OnStep | None = None,
) -> Latents:
    """Follow the slope found in the middle of a step; two evaluations.

    Raises:
        ConfigError: as for `euler`.
    """

    def advance(step: _Step, x: Latents, seen: Estimate, _: Tensor) -> Latents:
        middle = ((step.here.tau + step.there.tau) / 2).logit()
        inside = _look_inside(step, x, seen, middle, predict, parameterization)
        return step.along(x, inside.data - inside.noise)

    return _walk(predict, x, times, parameterization, on_step, advance)


def dpm2s(
    predict: Predict,
    x: Latents,
    times: Times,
    *,
    parameterization: Parameterization = FLOW,
    on_step: OnStep | None = None,
) -> Latents:
    """Hold the data found in the middle of a step in log-SNR; two evaluations a step.

    This is DPM-Solver++ 2S (Lu et al. 2022, alg. 1, r = 1/2). Where log-SNR is infinite at an end, the middle is that
    of tau.

    Raises:
        ConfigError: as for `euler`.
    """

    def advance(step: _Step, x: Latents, seen: Estimate, _: Tensor) -> Latents:
        middle = (step.here.half_log_snr + step.there.half_log_snr) / 2
        middle = torch.where(middle.isfinite(), middle, ((step.here.tau + step.there.tau) / 2).logit())
        inside = _look_inside(step, x, seen, middle, predict, parameterization)
        return combine((step.there.sigma / step.here.sigma, x), (step.there.alpha * (1 - step.decay), inside.data))

    return _walk(predict, x, times, parameterization, on_step, advance)


# Multistep: one evaluation, and the memory of past ones


def dpm2m(
    predict: Predict,
    x: Latents,
    times: Times,
    *,
    parameterization: Parameterization = FLOW,
    on_step: OnStep | None = None,
) -> Latents:
    """Let the data go on as in the last two steps, in log-SNR (DPM-Solver++ 2M, Lu et al. 2022, alg. 2).

    Raises:
        ConfigError: as for `euler`.
    """
    method = _Multistep(_exponential, order=2)
    return _walk(predict, x, times, parameterization, on_step, method)


def dpm2m_sde(
    predict: Predict,
    x: Latents,
    times: Times,
    *,
    generator: Draws,
    eta: float = 1.0,
    landings: Landings | None = None,
    parameterization: Parameterization = FLOW,
    on_step: OnStep | None = None,
) -> Latents:
    """Solve the reverse stochastic equation as `dpm2m` does the flow (SDE-DPM-Solver++ 2M, Lu et al. 2022, eq. 19).

    eta = 0 is `dpm2m`. No noise is added in a step into t = 1. `landings` are those of `euler`.

    Raises:
        ConfigError: as for `euler`, or `eta` is outside [0, 1].
    """
    _check_share("eta", eta)
    method = _Multistep(lambda step: _exponential(step, eta=eta), order=2)

    def advance(step: _Step, x: Latents, seen: Estimate, output: Tensor) -> Latents:
        std = step.there.sigma * (1 - step.decay ** (2 * eta)).sqrt()
        return method(step, x, seen, output) + combine((std, draw(x, generator)))

    return _walk(predict, x, times, parameterization, on_step, advance, landings)


def unipc(
    predict: Predict,
    x: Latents,
    times: Times,
    *,
    order: Literal[1, 2, 3] = 2,
    scale: Literal["bh1", "bh2"] = "bh2",
    lower_final: bool = False,
    uncorrected: Sequence[int] = (),
    parameterization: Parameterization = FLOW,
    on_step: OnStep | None = None,
) -> Latents:
    """Predict from `order` evaluations, and correct once the next is there, at no cost (UniPC: Zhao et al. 2023).

    The corrector adds one to the order; the start limits it to 3. `scale` is B(h) = h or 1 - exp(-h), where it
    matters: in a predictor from two evaluations and a corrector from one, as published. bh1 has no limit at infinite
    log-SNR, and is bh2 there. With `lower_final` no step is of a higher order than there are steps left; steps in
    `uncorrected`, counted from 0, are not corrected.

    Raises:
        ConfigError: as for `euler`.
    """
    method = _Multistep(
        lambda step: _exponential(step, scale=scale),
        order=order,
        correct="always",
        uncorrected=uncorrected,
        num_steps=len(times) - 1 if lower_final else None,
    )
    return _walk(predict, x, times, parameterization, on_step, method)


def adams_bashforth(
    predict: Predict,
    x: Latents,
    times: Times,
    *,
    order: Literal[2, 3] = 2,
    parameterization: Parameterization = FLOW,
    on_step: OnStep | None = None,
) -> Latents:
    """Follow the polynomial through the last `order` slopes, over uneven steps.

    For order 3 the first step is corrected by the second slope once that is there, since Euler's step alone would leave
    an error of second order.

    Raises:
        ConfigError: as for `euler`.
    """
    method = _Multistep(_polynomial, order=order, correct="first" if order == 3 else "never")
    return _walk(predict, x, times, parameterization, on_step, method)


# Restart


class Restart(NamedTuple):
    """On reaching row `high` of the times, fall back to row `low`, `repeats` times."""

    low: int
    high: int
    repeats: int = 1


def restart(
    predict: Predict,
    x: Latents,
    times: Times,
    *,
    generator: Draws,
    restarts: Sequence[Restart],
    sampler: Sampler = heun,
    parameterization: Parameterization = FLOW,
    on_step: OnStep | None = None,
) -> Latents:
    """Walk with `sampler`, but add noise and walk again over some intervals, which contracts errors (Xu et al. 2023).

    `on_step` counts all steps walked.

    Raises:
        ConfigError: as for `euler`, or an interval is not one of rising rows, in order of `high`.
    """
    _check_times(x, times)
    times, last, done = times.to(x.device, torch.float64), times.shape[0] - 1, 0
    for (low, high, repeats), before in zip(restarts, [0, *(r.high for r in restarts)], strict=False):
        if not (0 <= low < high <= last and before <= high and repeats >= 0):
            raise ConfigError(
                f"a restart falls back from a row high to a row low before it, within rows 0 to {last}, in rising "
                f"order of high, 0 or more times; got {[tuple(r) for r in restarts]}"
            )

    def walk(x: Latents, start: int, stop: int) -> Latents:
        nonlocal done
        if start == stop:
            return x
        offset, done = done, done + stop - start
        tell = None if on_step is None else lambda index, data: on_step(offset + index, data)
        return sampler(predict, x, times[start : stop + 1], parameterization=parameterization, on_step=tell)

    row = 0
    for low, high, repeats in restarts:
        x, row = walk(x, row, high), high
        for _ in range(repeats):
            step = _step(times[low], times[high], parameterization)
            std = step.here.sigma * (1 - step.decay**2).sqrt()
            noisier = combine((step.here.alpha / step.there.alpha, x), (std, draw(x, generator)))
            x = walk(torch.where(step.moves, noisier, x), low, high)
    return walk(x, row, last)


# What they share


class _Step(NamedTuple):
    """One step: times as a row of the matrix, and levels for latents (harmless ones for frames that do not move)."""

    t: Float[Tensor, "*T"]
    t_next: Float[Tensor, "*T"]
    moves: Tensor  # 1 1 T_or_1 1 1
    here: Levels
    there: Levels

    @property
    def decay(self) -> Tensor:
        """exp(-h), where h is the step in ln(alpha / sigma)."""
        return self.here.alpha * self.there.sigma / (self.there.alpha * self.here.sigma)

    def recompose(self, seen: Estimate) -> Latents:
        """Mix the data and the noise anew at the next time."""
        return combine((self.there.alpha, seen.data), (self.there.sigma, seen.noise))

    def along(self, x: Latents, slope: Latents) -> Latents:
        """Follow a slope dz/dtau."""
        total = self.there.total
        return combine((total / self.here.total, x), (total * (self.there.tau - self.here.tau), slope))


Advance = Callable[[_Step, Latents, Estimate, Tensor], Latents]
"""x at the next time from a step, x, what the network sees in it, and its bare output; frames at rest are ignored."""


def _walk(
    predict: Predict,
    x: Latents,
    times: Times,
    parameterization: Parameterization,
    on_step: OnStep | None,
    advance: Advance,
    landings: Landings | None = None,
) -> Latents:
    _check_times(x, times)
    times = times.to(x.device, torch.float64)
    ends = times[1:] if landings is None else landings.to(times)
    if ends.shape != times[1:].shape or not bool(((ends >= times[:-1]) & (ends <= 1)).all()):
        raise ConfigError(
            f"landings must be one for each of {len(times) - 1} steps, from its time to 1; got {landings}"
        )
    for index, (t, t_next) in enumerate(zip(times[:-1], ends, strict=True)):
        seen, output = _ask(predict, x, t, parameterization)
        if on_step is not None:
            on_step(index, seen.data)
        step = _step(t, t_next, parameterization)
        x = torch.where(step.moves, advance(step, x, seen, output), x)
    return x


def _ask(
    predict: Predict, x: Latents, t: Float[Tensor, "*T"], parameterization: Parameterization
) -> tuple[Estimate, Tensor]:
    t = t.expand(x.shape[0], *t.shape)
    output = predict(x, t.to(torch.promote_types(x.dtype, torch.float32)))
    return parameterization.estimate(x, output, t), output


def _step(t: Float[Tensor, "*T"], t_next: Float[Tensor, "*T"], parameterization: Parameterization) -> _Step:
    moves = t_next > t
    here, there = (
        levels(parameterization.process, row.reshape(1, -1))
        for row in (torch.where(moves, t, 0.25), torch.where(moves, t_next, 0.75))
    )
    return _Step(t, t_next, moves.reshape(1, 1, -1, 1, 1), here, there)


def _look_inside(
    step: _Step, x: Latents, seen: Estimate, half_log_snr: Tensor, predict: Predict, parameterization: Parameterization
) -> Estimate:
    """Go to a place inside the step by a first-order one, and ask there."""
    t = parameterization.process.time_at(2 * half_log_snr).reshape(step.t.shape)
    t = torch.where(step.t_next > step.t, t, step.t)
    part = _step(step.t, t, parameterization)
    inside, _ = _ask(predict, torch.where(step.moves, part.recompose(seen), x), t, parameterization)
    return inside


class _Rule(NamedTuple):
    """x' = keep x + gain (area m + sum_i w_i (m_i - m)): m found at `node`, m_i elsewhere, weights from `moments`.

    moments: of s, s^2, .. over the step, where s runs from 0 at node to 1 at its end; half: the first, as published
    """

    value: Callable[[Estimate], Latents]
    node: Tensor
    width: Tensor
    keep: Tensor
    gain: Tensor
    area: Tensor
    moments: list[Tensor]
    half: Tensor

    def carry(self, x: Latents, found: Latents, others: list[tuple[Tensor, Latents]], count: Tensor) -> Latents:
        """Go to the end of the step with the first `count` of `others`, pairs of place s and value."""
        weights = _weights([place for place, _ in others], self.moments, count, self.half)
        used = [(self.gain * w, value) for w, (_, value) in zip(weights, others, strict=True)]
        return combine((self.keep, x), (self.gain * (self.area - sum(weights)), found), *used)


def _exponential(step: _Step, *, scale: Literal["bh1", "bh2"] = "bh2", eta: float = 0.0) -> _Rule:
    """The data varies as a polynomial in ln(alpha / sigma), and the linear part is solved exactly."""
    h = step.there.half_log_snr - step.here.half_log_snr
    area = -torch.expm1(-(1 + eta) * h)
    moments = [1 - area / h]
    for power in (2, 3):
        moments.append(1 - power / h * moments[-1])
    return _Rule(
        value=lambda seen: seen.data,
        node=step.here.half_log_snr,
        width=h,
        keep=step.there.sigma / step.here.sigma * step.decay**eta,
        gain=step.there.alpha,
        area=area,
        moments=moments,
        half=torch.where(h.isfinite(), h, area) / 2 if scale == "bh1" else area / 2,
    )


def _polynomial(step: _Step) -> _Rule:
    """The slope dz/dtau varies as a polynomial in tau."""
    width = step.there.tau - step.here.tau
    one = torch.ones_like(width)
    return _Rule(
        value=lambda seen: seen.data - seen.noise,
        node=step.here.tau,
        width=width,
        keep=step.there.total / step.here.total,
        gain=step.there.total * width,
        area=one,
        moments=[one / 2, one / 3, one / 4],
        half=one / 2,
    )


class _Taken(NamedTuple):
    """A step as it was taken, to take it again when the value at its end is there."""

    rule: _Rule
    x: Latents
    found: Latents
    others: list[tuple[Tensor, Latents]]
    usable: Tensor
    moves: Tensor

    def again(self, ahead: Latents) -> Latents:
        end = torch.ones_like(self.rule.area)
        return self.rule.carry(self.x, self.found, [(end, ahead), *self.others], self.usable + 1)


class _Multistep:
    """An `Advance` that remembers: a frame begins at first order, and begins again after a rest."""

    def __init__(
        self,
        rule: Callable[[_Step], _Rule],
        *,
        order: int,
        correct: Literal["never", "first", "always"] = "never",
        uncorrected: Sequence[int] = (),
        num_steps: int | None = None,  # the order falls with the steps that are left; None: it does not
    ) -> None:
        self.rule, self.order, self.correct = rule, order, correct
        self.uncorrected, self.num_steps, self.index = uncorrected, num_steps, 0
        self.past: list[tuple[Tensor, Latents]] = []  # nodes and values, the newest first
        self.count = torch.zeros(1, dtype=torch.long)  # how many of them a frame may use
        self.last: _Taken | None = None

    def __call__(self, step: _Step, x: Latents, seen: Estimate, _: Tensor) -> Latents:
        rule = self.rule(step)
        found = rule.value(seen)
        if self.last is not None and self.correct != "never" and self.index - 1 not in self.uncorrected:
            chosen = self.last.moves if self.correct == "always" else self.last.moves & (self.last.usable == 0)
            x = torch.where(chosen, self.last.again(found), x)
        others = [((node - rule.node) / rule.width, value) for node, value in self.past]
        self.count = self.count.to(x.device)
        count = torch.where(step.moves & rule.width.isfinite(), self.count, 0)
        if self.num_steps is not None:
            count = count.clamp(max=self.num_steps - self.index - 1)
        self.index += 1
        self.last = _Taken(rule, x, found, others, count, step.moves)
        self.past = [(rule.node, found), *self.past][: self.order - 1]
        self.count = torch.where(step.moves & rule.node.isfinite(), (self.count + 1).clamp(max=self.order - 1), 0)
        return rule.carry(x, found, others, count)


def _weights(nodes: list[Tensor], moments: list[Tensor], count: Tensor, half: Tensor) -> list[Tensor]:
    """Return w with sum_i w_i nodes_i^j = moments_j for j = 1 .. count, and 0 for nodes beyond `count`.

    A single node takes w = half / node.
    """
    num = len(nodes)
    if not num:
        return []
    places = torch.stack(torch.broadcast_tensors(*nodes), dim=-1)
    used = torch.arange(num, device=places.device) < count[..., None]
    powers = torch.stack([places ** (power + 1) for power in range(num)], dim=-2)
    identity = torch.eye(num, dtype=places.dtype, device=places.device)
    powers = torch.where(used[..., None, :] & used[..., :, None], powers, identity)
    wanted = torch.where(used, torch.stack(torch.broadcast_tensors(*moments[:num]), dim=-1), 0)
    first, *rest = torch.linalg.solve(powers, wanted[..., None])[..., 0].unbind(-1)
    return [torch.where(count == 1, half / nodes[0], first), *rest]


def draw(x: Latents, generator: Draws) -> Latents:
    """Return standard normal noise like x.

    Raises:
        ConfigError: there are several generators, but not one for each clip.
    """
    if callable(generator):
        return generator(x)
    if isinstance(generator, torch.Generator):
        return torch.randn(x.shape, generator=generator, device=generator.device, dtype=x.dtype).to(x.device)
    if len(generator) != x.shape[0]:
        raise ConfigError(f"give one generator, or one for each of {x.shape[0]} clips; got {len(generator)}")
    return torch.cat([draw(clip[None], g) for clip, g in zip(x, generator, strict=True)])


def _check_times(x: Latents, times: Times) -> None:
    rising = bool((times.diff(dim=0) >= 0).all()) and bool(((times >= 0) & (times <= 1)).all())  # false for NaN
    if times.shape[0] < 2 or not rising:
        raise ConfigError("times must be at least two and rise within [0, 1]; make them with inference_times")
    if times.ndim == 2 and times.shape[1] != x.shape[2]:
        raise ConfigError(
            f"times has {times.shape[1]} columns but x has {x.shape[2]} latent frames; give one per frame"
        )


def _check_share(name: str, value: float) -> None:
    if not 0 <= value <= 1:
        raise ConfigError(f"{name} must be between 0 and 1, got {value}; nearest: {min(max(value, 0.0), 1.0)}")
