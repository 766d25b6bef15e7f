"""Guidance leads a prediction away from worse ones.

    guided(cond, uncond, scale=6.0)                        classifier-free guidance; autoguidance with a weaker network
    composed, nested                                       several conditions, each with its own scale
    zero_start(predict, until=0.04)                        stand still at first

A `Rule` changes the prediction; `steered` starts from the conditional one, c, and applies rules in order to g:

    steered(cond, within(away_from(uncond, scale=6.0), 0.2, 0.9), rescale(phi=0.7))

    away_from               g + (scale - 1) (c - u)                        u: another network, or under no condition
    away_from_fitted        g + (scale - 1) (c - s u)                      s: the multiple of u that is nearest to c
    AdaptiveProjection      g + (scale - 1) (orthogonal + eta parallel)    parts of c - u, across and along c's data
    away_from_perturbed     g + scale (c - p)                              p: the network with something left out
    rescale                 g + phi (std(c) / std(g) - 1) g

A `Scale` is a number, a tensor that broadcasts to clips x latent frames (`over_frames`), or a function of such times
(`stepwise`). At a point (x, t) every network is asked at most once, and not at all if no frame needs it. Norms and
spreads are taken over those frames of a clip that share a time: a row of equal times acts as one time, and given frames
do not disturb the others. Predictions may be of any kind; those with channels for a learned variance keep that of c.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from reelflow.diffusion.process import Parameterization, Predict, Time, along_frames
from reelflow.errors import ConfigError

__all__ = [
    "AdaptiveProjection",
    "Point",
    "Rule",
    "Scale",
    "away_from",
    "away_from_fitted",
    "away_from_perturbed",
    "composed",
    "guided",
    "nested",
    "over_frames",
    "rescale",
    "steered",
    "stepwise",
    "within",
    "zero_start",
]

Latents = Float[Tensor, "B C T H W"]
PerFrame = Float[Tensor, "B 1 T 1 1"]
ScaleFunction = Callable[[Float[Tensor, "B T"]], Tensor | float]
Scale = float | Tensor | ScaleFunction
FLOW = Parameterization()
TINY = 1e-30


@dataclass(frozen=True)
class Point:
    """A place (x, t), and what networks answer there."""

    x: Latents
    t: Time
    base: Predict
    active: Bool[Tensor, "B 1 T 1 1"]  # the frames that rules may change
    outputs: dict[int, Tensor] = field(default_factory=dict)

    @property
    def times(self) -> Float[Tensor, "B T"]:
        return self.t.reshape(len(self.x), -1).expand(-1, self.x.shape[2])

    @property
    def cond(self) -> Latents:
        """The prediction that guidance starts from."""
        return self.ask(self.base)

    def output(self, predict: Predict) -> Float[Tensor, "B C_out T H W"]:
        """Return what a network answers here; the first call evaluates it."""
        if id(predict) not in self.outputs:
            self.outputs[id(predict)] = predict(self.x, self.t)
        return self.outputs[id(predict)]

    def ask(self, predict: Predict) -> Latents:
        """Return a prediction without its learned variance, in float32 or finer."""
        answer = self.output(predict)[:, : self.x.shape[1]]
        return answer.to(torch.promote_types(answer.dtype, torch.float32))

    def strength(self, scale: ScaleFunction, *, off: int) -> PerFrame | None:
        """Return scale - off per frame, 0 in inactive ones; None if it is 0 in all.

        Raises:
            ConfigError: the scale does not broadcast to clips x latent frames.
        """
        value = torch.as_tensor(scale(self.times), dtype=self.cond.dtype, device=self.x.device) - off
        try:
            value = value.expand_as(self.times)
        except RuntimeError as error:
            clips, frames = self.times.shape
            raise ConfigError(
                f"a scale must broadcast to {[clips, frames]} (clips x latent frames), got {list(value.shape)}; "
                f"nearest: one number, or {frames} for the frames"
            ) from error
        value = torch.where(self.active, along_frames(value), 0)
        return value if bool(value.any()) else None

    def total(self, values: Latents) -> PerFrame:
        """Sum over the frames of a clip that share a time."""
        sums = values.sum(dim=(1, 3, 4))
        return along_frames((self.sharing * sums[:, None, :]).sum(-1))  # not a matmul, which autocast would round

    @property
    def sharing(self) -> Bool[Tensor, "B T T"]:
        return self.times[:, :, None] == self.times[:, None, :]


Rule = Callable[[Point, Latents], Latents]
"""The next guided prediction, from the one so far."""


def steered(cond: Predict, *rules: Rule) -> Predict:
    """Apply rules, in order, to the conditional prediction."""

    def predict(x: Latents, t: Time) -> Tensor:
        point = Point(x, t, cond, torch.ones(len(x), 1, x.shape[2], 1, 1, dtype=torch.bool, device=x.device))
        prediction = point.cond
        for rule in rules:
            prediction = rule(point, prediction)
        output = point.output(cond)
        return torch.cat([prediction.to(output.dtype), output[:, x.shape[1] :]], dim=1)

    return predict


# Whole guidances


def guided(cond: Predict, uncond: Predict | None, *, scale: Scale) -> Predict:
    """Classifier-free guidance: uncond + scale * (cond - uncond) (Ho & Salimans 2022, eq. 6, with scale = 1 + w).

    With a weaker network in place of `uncond` it is autoguidance (Karras et al. 2024). A scale of 1 or 0 costs one
    evaluation; a negative one leads away from the condition.

    Raises:
        ConfigError: the scale is not finite, or there is nothing to be guided by.
    """
    rule = away_from(uncond, scale=scale)
    if uncond is not None and not isinstance(scale, Tensor) and scale == 0:
        return uncond
    return steered(cond, rule)


def composed(
    uncond: Predict,
    conds: Sequence[Predict],
    *,
    scales: Sequence[Scale],
    references: Sequence[Predict] | None = None,
) -> Predict:
    """Return uncond + sum_i scale_i (cond_i - reference_i) (Liu et al. 2022); all references default to `uncond`.

    Raises:
        ConfigError: a scale is not finite, or their number or that of the references is not that of the conditions.
    """
    references = len(conds) * [uncond] if references is None else references
    if not len(conds) == len(scales) == len(references):
        raise ConfigError(
            f"{len(conds)} conditions need as many scales and references, got {len(scales)} and {len(references)}"
        )
    return steered(
        uncond,
        *(_led(scale, 0, _between(cond, ref)) for cond, ref, scale in zip(conds, references, scales, strict=True)),
    )


def nested(branches: Sequence[Predict], *, scales: Sequence[Scale]) -> Predict:
    """Return b_0 + sum_k scale_k (b_k - b_{k-1}), for branches under no condition, one, two, .. up to all of them.

    With [nothing, image, image and text] it is eq. 3 of Brooks et al. 2023. A branch with a scale of 1 on both
    sides is not evaluated.

    Raises:
        ConfigError: a scale is not finite, or there are not one fewer than branches.
    """
    if not len(branches) == len(scales) + 1 >= 2:
        raise ConfigError(
            f"{len(scales)} scales lead through {len(scales) + 1} branches, at least 2; got {len(branches)}"
        )
    steps = zip(pairwise(branches), scales, strict=True)
    return steered(branches[-1], *(_led(scale, 1, _between(more, less)) for (less, more), scale in steps))


def zero_start(predict: Predict, *, until: float) -> Predict:
    """Answer 0 in frames with t < until, the second half of CFG-zero* (Fan et al. 2025: for the first 4% of steps).

    For velocity predictions, of which 0 means that x stays as it is. Nothing is evaluated while all frames wait.

    Raises:
        ConfigError: `until` is outside [0, 1).
    """
    if not 0 <= until < 1:
        raise ConfigError(f"until must be at least 0 and below 1, got {until}; nearest: {0.0 if until < 0 else 0.04}")

    def wait(x: Latents, t: Time) -> Tensor:
        still = along_frames(t) < until
        if bool(still.all()):
            return torch.zeros_like(x)
        output = predict(x, t)
        return torch.where(still, torch.zeros_like(output), output)

    return wait


# Rules


def within(rule: Rule, low: float, high: float) -> Rule:
    """Apply a rule to the frames with low <= t < high (Kynkaanniemi et al. 2024: sigma_low < sigma <= sigma_high).

    The time of each frame decides for that frame. Intervals inside intervals intersect.

    Raises:
        ConfigError: not 0 <= low < high <= 1.
    """
    if not 0 <= low < high <= 1:
        ends = sorted(min(max(end, 0.0), 1.0) for end in (low, high))
        near = ends if ends[0] < ends[1] else [0.0, 1.0]
        raise ConfigError(
            f"an interval runs from low to a greater high within [0, 1] (0 is noise), got {low} to {high}; "
            f"nearest: {near[0]} to {near[1]}"
        )

    def limited(point: Point, prediction: Latents) -> Latents:
        times = along_frames(point.times)
        return rule(replace(point, active=point.active & (times >= low) & (times < high)), prediction)

    return limited


def away_from(other: Predict | None, *, scale: Scale) -> Rule:
    """Lead away from the unconditional prediction, or from a weaker network's; a scale of 1 is off.

    Raises:
        ConfigError: the scale is not finite, or there is no other although the scale is not 1.
    """
    if other is None and not isinstance(scale, Tensor) and scale == 1:
        return lambda point, prediction: prediction
    other = _present(other, "guidance", scale, off=1)
    return _led(scale, 1, lambda point: point.cond - point.ask(other))


def away_from_fitted(uncond: Predict | None, *, scale: Scale) -> Rule:
    """Lead away from s uncond, s = <cond, uncond> / |uncond|^2: the first half of CFG-zero* (Fan et al. 2025).

    Published for velocities; of another kind of prediction the nearest multiple is another one.

    Raises:
        ConfigError: the scale is not finite, or there is no unconditional branch.
    """
    other = _present(uncond, "guidance", scale, off=1)

    def change(point: Point) -> Latents:
        cond, uncond = point.cond, point.ask(other)
        return cond - _along(point, cond, uncond)

    return _led(scale, 1, change)


def away_from_perturbed(perturbed: Predict | None, *, scale: Scale) -> Rule:
    """Lead away from the same network, under the same condition, with layers skipped or attention cut; 0 is off.

    So skip-layer, spatio-temporal skip (Hyung et al. 2024) and perturbed-attention guidance (Ahn et al. 2024).

    Raises:
        ConfigError: the scale is negative or not finite, or there is no perturbed network.
    """
    other = _present(perturbed, "guidance by perturbation", scale, off=0)
    return _led(scale, 0, lambda point: point.cond - point.ask(other), least=0.0)


class AdaptiveProjection:
    """Adaptive projected guidance: most of what oversaturates is the part along the data (Sadat et al. 2024).

    The change of the data, cond - uncond, first takes on `momentum` times what it was (published: -0.75 or -0.5), is
    then cut to the norm `threshold`, and keeps `eta` of the part parallel to the conditional data. eta = 1 alone is
    `away_from`, but at t = 1, where x is the data: there only predictions of data change.

    This rule has a memory, so make one for each sampling run. It runs over times and not over calls: a second
    evaluation at a frame's latest time replaces the first (Heun), and at an earlier time, or after a scale of 1, the
    frame begins anew.

    Raises:
        ConfigError: the scale is not finite, there is no unconditional branch, eta is outside [0, 1], the threshold is
            not positive, or the momentum is outside (-1, 1).
    """

    def __init__(
        self,
        uncond: Predict | None,
        *,
        scale: Scale,
        eta: float = 0.0,
        threshold: float | None = None,
        momentum: float = 0.0,
        parameterization: Parameterization = FLOW,
    ) -> None:
        if not 0 <= eta <= 1:
            raise ConfigError(f"eta must be between 0 and 1, got {eta}; nearest: {1.0 if eta > 1 else 0.0}")
        if threshold is not None and not 0 < threshold < math.inf:
            raise ConfigError(f"threshold must be positive and finite, got {threshold}; None sets no limit")
        if not -1 < momentum < 1:
            raise ConfigError(f"momentum must lie between -1 and 1, got {momentum}; published: -0.75 or -0.5")
        self._uncond = _present(uncond, "guidance", scale, off=1)
        self._scale = _function("scale", scale)
        self._eta, self._threshold, self._momentum = eta, threshold, momentum
        self._space = replace(parameterization, learned_variance=False)
        self._past: tuple[Tensor, Latents, Latents] | None = None  # times; what was added to, and the sum

    def __call__(self, point: Point, prediction: Latents) -> Latents:
        strength = point.strength(self._scale, off=1)
        if strength is None:
            self._past = None
            return prediction
        change = _data_change(self._space, point.cond - point.ask(self._uncond), point.t)
        if self._momentum:
            change = self._remembering(point, change, strength != 0)
        if self._threshold is not None:
            norm = point.total(change.square()).sqrt()
            change = change * (self._threshold / norm.clamp(min=self._threshold))
        data = self._space.estimate(point.x, point.cond, point.t).data
        change = change - (1 - self._eta) * _along(point, change, data)
        return prediction + strength * _output_change(self._space, change, point.t)

    def _remembering(self, point: Point, change: Latents, on: Tensor) -> Latents:
        now, before = along_frames(point.times), torch.zeros_like(change)
        if self._past is not None and self._past[1].shape == change.shape:
            then, earlier, latest = self._past
            before = torch.where(now > then, latest, torch.where(now == then, earlier, 0))
        change = torch.where(on, change + self._momentum * before, 0)
        self._past = (now, before, change)
        return change


def rescale(*, phi: Scale, parameterization: Parameterization | None = None) -> Rule:
    """Bring the standard deviation back to the conditional one, to the share `phi` (Lin et al. 2024, sec. 3.4).

    As published, of the prediction itself; with a parameterization, of the data that it implies.

    Raises:
        ConfigError: `phi` is outside [0, 1].
    """
    share = _function("phi", phi, least=0.0, most=1.0)
    space = parameterization and replace(parameterization, learned_variance=False)

    def rule(point: Point, prediction: Latents) -> Latents:
        strength = point.strength(share, off=0)
        if strength is None:
            return prediction
        if space is None:
            return prediction + strength * (_gain(point, point.cond, prediction) - 1) * prediction
        cond, data = (space.estimate(point.x, output, point.t).data for output in (point.cond, prediction))
        change = strength * (_gain(point, cond, data) - 1) * data
        return prediction + _output_change(space, change, point.t)

    return rule


# Scales


def over_frames(first: float, last: float, num_frames: int) -> Float[Tensor, " {num_frames}"]:
    """Return a scale that is linear over latent frames: far from a given first frame, more is needed to hold to it.

    Blattmann et al. 2023, sec. 4.3.

    Raises:
        ConfigError: an end is not finite, or there are no frames.
    """
    if num_frames < 1:
        raise ConfigError(f"num_frames must be at least 1, got {num_frames}; nearest: 1")
    if not (math.isfinite(first) and math.isfinite(last)):
        raise ConfigError(f"a scale must be finite, got {first} and {last}; 1 turns guidance off")
    return torch.linspace(first, last, num_frames, dtype=torch.float64)


def stepwise(times: Float[Tensor, " steps"], scales: Sequence[float]) -> ScaleFunction:
    """Return the scale of the latest of `times` that is not after t: a list with one scale for each step.

    Raises:
        ConfigError: the lists are empty or of unequal length, a scale is not finite, or times do not rise.
    """
    if len(times) != len(scales) or not scales:
        raise ConfigError(
            f"stepwise needs one scale for the start of each step, got {len(scales)} for {len(times)} times"
        )
    if not bool((times.diff() > 0).all()):
        raise ConfigError("times must rise; pass inference_times(..)[:-1], the start of each step")
    values = torch.as_tensor(scales, dtype=torch.float64)
    _check_range("scale", values)

    def at(t: Float[Tensor, "B T"]) -> Float[Tensor, "B T"]:
        # Rounded as t is: a sampler in float32 must find its own float64 times.
        place = torch.searchsorted(times.to(t), t.contiguous(), right=True) - 1
        return values.to(t.device)[place.clamp(min=0)]

    return at


# What they share


def _led(scale: Scale, off: int, change: Callable[[Point], Latents], *, least: float = -math.inf) -> Rule:
    function = _function("scale", scale, least=least)

    def rule(point: Point, prediction: Latents) -> Latents:
        strength = point.strength(function, off=off)
        return prediction if strength is None else prediction + strength * change(point)

    return rule


def _between(more: Predict, less: Predict) -> Callable[[Point], Latents]:
    return lambda point: point.ask(more) - point.ask(less)


def _along(point: Point, values: Latents, direction: Latents) -> Latents:
    """Return the part of `values` that is parallel to `direction`."""
    share = point.total(values * direction) / point.total(direction.square()).clamp(min=TINY)
    return share * direction


def _gain(point: Point, wanted: Latents, values: Latents) -> PerFrame:
    """Return std(wanted) / std(values)."""
    count = point.total(torch.ones_like(values))
    spreads = [point.total((v - point.total(v) / count).square()) for v in (wanted, values)]
    return (spreads[0] / spreads[1].clamp(min=TINY)).sqrt()


def _data_change(space: Parameterization, change: Latents, t: Time) -> Latents:
    """Turn a change of the output into that of the data, at a given x: the affine map without its constant."""
    return space.estimate(torch.zeros_like(change), change, t).data


def _output_change(space: Parameterization, change: Latents, t: Time) -> Latents:
    """Undo `_data_change`; where that gives 0 for all changes, at t = 1, return 0."""
    still = torch.zeros_like(change)
    return space.output_of(still, replace(space, prediction="data").estimate(still, change, t), t)


def _present(other: Predict | None, what: str, scale: Scale, *, off: int) -> Predict:
    if other is None:
        raise ConfigError(
            f"{what} with scale {scale} needs a second branch, got None; nearest: scale {off}, which is off"
        )
    return other


def _function(name: str, scale: Scale, *, least: float = -math.inf, most: float = math.inf) -> ScaleFunction:
    """Return the scale as a function of times; constants are checked now, functions when called."""
    if not callable(scale):
        constant = torch.as_tensor(scale, dtype=torch.float64)
        _check_range(name, constant, least, most)
        return lambda times: constant

    def checked(times: Float[Tensor, "B T"]) -> Tensor:
        value = torch.as_tensor(scale(times), dtype=torch.float64)
        _check_range(name, value, least, most)
        return value

    return checked


def _check_range(name: str, value: Tensor, least: float = -math.inf, most: float = math.inf) -> None:
    wrong = value[~(value.isfinite() & (value >= least) & (value <= most))]
    if wrong.numel():
        bad = float(wrong[0])
        near = min(max(bad, least), most)
        way_out = f"nearest: {near:g}" if math.isfinite(near) else "nearest: 1"
        limits = (
            ""
            if least == -math.inf
            else f", at least {least:g}" + (f" and at most {most:g}" if most < math.inf else "")
        )
        raise ConfigError(f"{name} must be finite{limits}, got {bad:g}; {way_out}")
