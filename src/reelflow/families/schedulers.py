"""How published pipelines go from noise to data: a scheduler_config.json as a walk over our samplers.

What diffusers does with it is reproduced, oddities too: a shift that is applied twice, timesteps that are cut to
integers, steps that end elsewhere than the next is thought to begin, noise that is drawn and thrown away.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import partial
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from reelflow.config import configuration, from_dict
from reelflow.diffusion.process import Parameterization, Predict, Prediction, VariancePreserving
from reelflow.diffusion.samplers import (
    Draws,
    OnStep,
    Sampler,
    consistency,
    ddim,
    dpm2m,
    dpm2m_sde,
    draw,
    euler,
    unipc,
)
from reelflow.diffusion.timesteps import LinearSchedule, Schedule, inference_times
from reelflow.errors import CheckpointError, ConfigError, nearest

__all__ = ["Walk", "dynamic_guidance", "mu_of", "read_scheduler", "sigmas_of"]

STEPS = 1000  # in training: a timestep is 1000 sigma, or a whole number from 0 (nearly data) to 999 (noise)
FLOW = Parameterization()
TRACE = 2.0**24  # 1 / alpha^2 where Euler ancestral begins, though the SNR is zero
NEARLY_ONE = 1e-6  # UniPC begins so far from sigma = 1, where log-SNR is infinite

Latents = Float[Tensor, "B C T H W"]
Sigmas = Float[np.ndarray, " steps"]


@runtime_checkable
class Times(Protocol):
    """What gives the times of a walk: our t, rising; x is pure noise at the first, though that may lie above 0.

    mu is the shift where it depends on the size of the clip (see `mu_of`), and nothing elsewhere; `sigmas` replace the
    schedule's own before they are shifted.

    Raises:
        ConfigError: mu is missing, or sigmas are not for so many steps, or the schedule takes none or not so many.
    """

    def __call__(
        self, num_steps: int, *, mu: float | None = None, sigmas: Float[Tensor, " steps"] | None = None
    ) -> Float[Tensor, " times"]: ...


@dataclass(frozen=True)
class Walk:
    """How a published pipeline goes from noise to data."""

    parameterization: Parameterization
    times: Times
    sampler: Callable[[Draws], Sampler]  # for one run; wants the times as they are, in float64
    fed: Callable[[Tensor], Tensor]  # the t that the sampler asks at -> the t that makes 1000 (1 - t) their timestep
    inverted: bool = False  # networks are told 1000 t, and answer with what leads to data


def read_scheduler(config: dict[str, Any]) -> Walk:
    """Return the walk that a scheduler_config.json stands for.

    Raises:
        CheckpointError: the class is not known here, or a value is one that it has not or that we do not reproduce.
    """
    values = {name: value for name, value in config.items() if not name.startswith("_")}
    name = str(config.get("_class_name"))
    if name not in KINDS:
        raise CheckpointError(f"scheduler_config.json is of {name!r}; {nearest(name, KINDS)}")
    known = [field.name for field in fields(KINDS[name])]
    for value in values:
        if value not in known:
            raise CheckpointError(f"scheduler_config.json: {name} has no value {value!r}; {nearest(value, known)}")
    try:
        return from_dict(KINDS[name], values).walk()
    except ConfigError as error:
        raise CheckpointError(f"scheduler_config.json: {error}") from error


def mu_of(config: dict[str, Any], num_tokens: int) -> float:
    """Return mu for a clip of `num_tokens` tokens, on the line that a scheduler_config.json gives at two counts.

    Raises:
        CheckpointError: it gives none.
    """
    low, high, start, end = (
        config.get(name, default)
        for name, default in (
            ("base_image_seq_len", 256),
            ("max_image_seq_len", 4096),
            ("base_shift", 0.5),
            ("max_shift", 1.15),
        )
    )
    if start is None or end is None or low == high:
        raise CheckpointError(
            f"scheduler_config.json gives no line for mu: {start} at {low} tokens, {end} at {high}; usual: 0.5 at 256, 1.15 "
            f"at 4096"
        )
    return start + (end - start) / (high - low) * (num_tokens - low)


def sigmas_of(num_steps: int, schedule: Schedule = LinearSchedule()) -> Float[Tensor, " steps"]:
    """Return the sigmas of a schedule without the last, 0, to give to `times`.

    Most pipelines pass the even ones, 1 - k / num_steps, and one passes those of `LinearQuadraticSchedule()`.
    """
    return 1 - inference_times(num_steps, schedule=schedule)[:-1]


def dynamic_guidance(scale: float, num_steps: int) -> Callable[[Tensor], Tensor]:
    """Return the guidance scale as a function of the t that is fed: from 1 to 1 + scale and, as published, not monotone.

    Its phase is ((num_steps - timestep) / num_steps)^5, with steps of sampling and timesteps of training.
    """

    def at(t: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        timestep = (STEPS * (1 - t.double())).round()
        return 1 + scale * (1 - (math.pi * ((num_steps - timestep) / num_steps) ** 5).cos()) / 2

    return at


# Schedulers: the fields are those of the classes of diffusers. Of one allowed value are those that we do not reproduce.


@configuration
class FlowMatchEuler:
    """Euler's steps, or `consistency` if `stochastic_sampling`; timesteps are 1000 sigma, or if inverted 1000 t."""

    num_train_timesteps: Literal[1000] = 1000
    shift: float = 1.0
    use_dynamic_shifting: bool = False
    base_shift: float | None = 0.5
    max_shift: float | None = 1.15
    base_image_seq_len: int = 256
    max_image_seq_len: int = 4096
    invert_sigmas: bool = False
    shift_terminal: float | None = None
    use_karras_sigmas: Literal[False] | None = False
    use_exponential_sigmas: Literal[False] | None = False
    use_beta_sigmas: Literal[False] | None = False
    time_shift_type: Literal["exponential", "linear"] = "exponential"
    stochastic_sampling: bool = False

    def walk(self) -> Walk:
        def sampler(draws: Draws) -> Sampler:
            return partial(consistency, generator=draws) if self.stochastic_sampling else euler

        return Walk(FLOW, self.times, sampler, _as_it_is, inverted=self.invert_sigmas)

    def times(
        self, num_steps: int, *, mu: float | None = None, sigmas: Float[Tensor, " steps"] | None = None
    ) -> Float[Tensor, " times"]:
        # the smallest sigma of training is already shifted, and is shifted again
        smallest = _shifted(np.array([1 / STEPS]), 1.0 if self.use_dynamic_shifting else self.shift)[0]
        grid = _given(num_steps, sigmas, np.linspace(1, smallest, max(num_steps, 0)))
        dynamic = self.time_shift_type if self.use_dynamic_shifting else None
        grid = _stretched(_moved(grid, dynamic, mu, self.shift), self.shift_terminal)
        return _ending(1 - torch.from_numpy(grid).clamp(max=1))


@configuration
class UniPC:
    """UniPC over the sigmas of a flow, cut to begin just below 1."""

    prediction_type: Literal["flow_prediction"]
    use_flow_sigmas: Literal[True]
    num_train_timesteps: Literal[1000] = 1000
    flow_shift: float = 1.0
    use_dynamic_shifting: bool = False
    time_shift_type: Literal["exponential", "linear"] = "exponential"
    shift_terminal: float | None = None
    solver_order: Literal[1, 2, 3] = 2
    solver_type: Literal["bh1", "bh2"] = "bh2"
    lower_order_final: Literal[True] = True  # without, the last step of theirs is not finite
    disable_corrector: tuple[int, ...] = ()
    final_sigmas_type: Literal["zero"] = "zero"
    predict_x0: Literal[True] = True
    thresholding: Literal[False] = False
    solver_p: None = None
    use_karras_sigmas: Literal[False] | None = False
    use_exponential_sigmas: Literal[False] | None = False
    use_beta_sigmas: Literal[False] | None = False
    # what follows says nothing where sigmas are a flow's
    beta_start: float = 0.0001
    beta_end: float = 0.02
    beta_schedule: str = "linear"
    trained_betas: None = None
    dynamic_thresholding_ratio: float = 0.995
    sample_max_value: float = 1.0
    timestep_spacing: str = "linspace"
    steps_offset: int = 0
    rescale_betas_zero_snr: bool = False
    sigma_min: None = None
    sigma_max: None = None

    def walk(self) -> Walk:
        solver = partial(
            unipc,
            order=self.solver_order,
            scale=self.solver_type,
            lower_final=True,
            uncorrected=self.disable_corrector,
        )
        return Walk(FLOW, self.times, lambda draws: _in_integers(solver), _cut)

    def times(
        self, num_steps: int, *, mu: float | None = None, sigmas: Float[Tensor, " steps"] | None = None
    ) -> Float[Tensor, " times"]:
        grid = _given(num_steps, sigmas, np.linspace(1, 1 / STEPS, max(num_steps, 0) + 1)[:-1])
        dynamic = self.time_shift_type if self.use_dynamic_shifting else None
        grid = _stretched(_moved(grid, dynamic, mu, self.flow_shift), self.shift_terminal)
        if abs(grid[0] - 1) < NEARLY_ONE:
            grid[0] -= NEARLY_ONE
        return _ending(_faithful(grid))


@configuration
class DPMSolver:
    """DPM-Solver++ of the first or second order over the sigmas of a flow, stochastic or not."""

    prediction_type: Literal["flow_prediction"]
    use_flow_sigmas: Literal[True]
    num_train_timesteps: Literal[1000] = 1000
    flow_shift: float = 1.0
    use_dynamic_shifting: bool = False
    time_shift_type: Literal["exponential"] = "exponential"
    algorithm_type: Literal["dpmsolver++", "sde-dpmsolver++"] = "dpmsolver++"
    solver_order: Literal[1, 2] = 2
    solver_type: Literal["midpoint"] = "midpoint"
    final_sigmas_type: Literal["zero"] = "zero"
    thresholding: Literal[False] = False
    use_karras_sigmas: Literal[False] | None = False
    use_exponential_sigmas: Literal[False] | None = False
    use_beta_sigmas: Literal[False] | None = False
    use_lu_lambdas: Literal[False] | None = False
    variance_type: None = None
    # what follows says nothing where sigmas are a flow's and end at zero
    beta_start: float = 0.0001
    beta_end: float = 0.02
    beta_schedule: str = "linear"
    trained_betas: None = None
    dynamic_thresholding_ratio: float = 0.995
    sample_max_value: float = 1.0
    lower_order_final: bool = True
    euler_at_final: bool = False
    lambda_min_clipped: float = -math.inf
    timestep_spacing: str = "linspace"
    steps_offset: int = 0
    rescale_betas_zero_snr: bool = False

    def walk(self) -> Walk:
        def sampler(draws: Draws) -> Sampler:
            first = self.solver_order == 1
            if self.algorithm_type == "dpmsolver++":
                return _in_integers(euler if first else dpm2m)
            return _in_integers(partial(ddim if first else dpm2m_sde, generator=draws))

        return Walk(FLOW, self.times, sampler, _cut)

    def times(
        self, num_steps: int, *, mu: float | None = None, sigmas: Float[Tensor, " steps"] | None = None
    ) -> Float[Tensor, " times"]:
        _refuse_sigmas(sigmas)
        _check_steps(num_steps)
        shift = float(np.exp(mu)) if self.use_dynamic_shifting and mu is not None else self.flow_shift
        grid = _shifted(1 - np.linspace(1, 1 / STEPS, num_steps + 1), shift)[:0:-1].copy()
        return _ending(_faithful(grid))


@configuration
class Betas:
    """What schedulers with a table of betas share."""

    num_train_timesteps: Literal[1000] = 1000
    beta_start: float = 0.0001
    beta_end: float = 0.02
    beta_schedule: Literal["linear", "scaled_linear", "squaredcos_cap_v2"] = "linear"
    trained_betas: None = None
    prediction_type: Literal["epsilon", "sample", "v_prediction"] = "epsilon"
    timestep_spacing: Literal["leading", "trailing", "linspace"] = "leading"
    steps_offset: int = 0
    rescale_betas_zero_snr: bool = False
    clip_sample_range: float = 1.0
    sample_max_value: float = 1.0

    def parameterization(self, snr_shift: float = 1.0) -> Parameterization:
        schedules: dict[str, Literal["linear", "scaled_linear", "cosine"]] = {
            "linear": "linear",
            "scaled_linear": "scaled_linear",
            "squaredcos_cap_v2": "cosine",
        }
        schedule = schedules[self.beta_schedule]
        process = VariancePreserving(
            schedule=schedule,
            betas=None if schedule == "cosine" else (self.beta_start, self.beta_end),
            snr_shift=snr_shift,
            zero_terminal_snr=self.rescale_betas_zero_snr,
        )
        predictions: dict[str, Prediction] = {"epsilon": "noise", "sample": "data", "v_prediction": "v"}
        return Parameterization(process, predictions[self.prediction_type])

    def times(
        self, num_steps: int, *, mu: float | None = None, sigmas: Float[Tensor, " steps"] | None = None
    ) -> Float[Tensor, " times"]:
        _refuse_sigmas(sigmas)
        _check_steps(num_steps)
        if num_steps > STEPS:
            raise ConfigError(f"num_steps must be at most {STEPS}, got {num_steps}; nearest: {STEPS}")
        steps: np.ndarray
        match self.timestep_spacing:
            case "linspace":
                steps = np.linspace(0, STEPS - 1, num_steps).round()[::-1]
            case "leading":
                steps = (np.arange(num_steps) * (STEPS // num_steps))[::-1] + self.steps_offset
            case "trailing":
                steps = np.round(np.arange(STEPS, 0, -STEPS / num_steps)) - 1
        if len(steps) != num_steps or steps[0] >= STEPS:
            raise ConfigError(
                f"{self.timestep_spacing} timesteps with offset {self.steps_offset} make no {num_steps} steps, but "
                f"{steps[0]:g} .. {steps[-1]:g}; nearest: {num_steps - 1}"
            )
        starts = 1 - (torch.from_numpy(steps.copy()).double() + 1) / STEPS
        return torch.cat([starts, _landings(starts, num_steps, self.end)[-1:]])

    @property
    def end(self) -> float:
        """The time at which no step of training is left."""
        return 1.0


@configuration
class DDIM(Betas):
    """DDIM with eta = 0."""

    clip_sample: bool = True
    set_alpha_to_one: bool = True
    thresholding: Literal[False] = False
    dynamic_thresholding_ratio: float = 0.995  # says nothing without thresholding

    def __post_init__(self) -> None:
        if self.clip_sample and not self.set_alpha_to_one:
            raise ConfigError(
                "clip_sample is not reproduced where set_alpha_to_one is false, since a step that goes nowhere would still "
                "clip; nearest: set_alpha_to_one true"
            )

    def walk(self) -> Walk:
        clip = self.clip_sample_range if self.clip_sample else math.inf
        sampler = _by_stride(partial(euler, clip=clip), self.end)
        return Walk(self.parameterization(), self.times, lambda draws: sampler, _step_before)

    @property
    def end(self) -> float:
        return 1.0 if self.set_alpha_to_one else 1 - 1 / STEPS


@configuration
class CogVideoXDDIM(Betas):
    """DDIM with eta = 0 over shifted betas."""

    beta_start: float = 0.00085
    beta_end: float = 0.012
    beta_schedule: Literal["linear", "scaled_linear", "squaredcos_cap_v2"] = "scaled_linear"
    snr_shift_scale: float = 3.0
    set_alpha_to_one: Literal[True] = True
    clip_sample: bool = True  # never read

    def walk(self) -> Walk:
        sampler = _by_stride(euler, self.end)
        return Walk(self.parameterization(self.snr_shift_scale), self.times, lambda draws: sampler, _step_before)


@configuration
class CogVideoXDPM(CogVideoXDDIM):
    """SDE-DPM-Solver++ 2M over the same; given generators, it draws in the layout B T C H W."""

    def walk(self) -> Walk:
        def sampler(draws: Draws) -> Sampler:
            noise = draws if callable(draws) else _wasteful(draws)
            return _by_stride(partial(dpm2m_sde, generator=noise), self.end)

        return Walk(self.parameterization(self.snr_shift_scale), self.times, sampler, _step_before)


@configuration
class EulerAncestral(Betas):
    """DDIM with eta = 1 over trailing steps; the first keeps a trace of the data, as if it stood at alpha = 1 / 4096."""

    timestep_spacing: Literal["leading", "trailing", "linspace"] = "linspace"

    def __post_init__(self) -> None:
        if not self.rescale_betas_zero_snr or self.timestep_spacing != "trailing":
            raise ConfigError("it is reproduced with rescale_betas_zero_snr and timestep_spacing='trailing' only")

    def walk(self) -> Walk:
        def fed(t: Tensor) -> Tensor:
            return torch.where(t.double() < first + NEARLY_ONE, 1 / STEPS, _step_before(t))

        first = self.first.item()
        return Walk(self.parameterization(), self.times, lambda draws: partial(ddim, generator=draws), fed)

    def times(
        self, num_steps: int, *, mu: float | None = None, sigmas: Float[Tensor, " steps"] | None = None
    ) -> Float[Tensor, " times"]:
        times = torch.cat([self.first[None], Betas.times(self, num_steps, mu=mu, sigmas=sigmas)[1:-1], torch.ones(1)])
        if not bool((times.diff() > 0).all()):
            raise ConfigError(f"the second of {num_steps} steps begins before the first; nearest: {int(1 / times[0])}")
        return times

    @property
    def first(self) -> Float[Tensor, ""]:
        process = self.parameterization().process
        assert isinstance(process, VariancePreserving)
        return process.time_at(torch.tensor(-math.log(TRACE - 1), dtype=torch.float64))


KINDS: dict[str, type[FlowMatchEuler | UniPC | DPMSolver | DDIM | CogVideoXDDIM | CogVideoXDPM | EulerAncestral]] = {
    "FlowMatchEulerDiscreteScheduler": FlowMatchEuler,
    "UniPCMultistepScheduler": UniPC,
    "DPMSolverMultistepScheduler": DPMSolver,
    "DDIMScheduler": DDIM,
    "CogVideoXDDIMScheduler": CogVideoXDDIM,
    "CogVideoXDPMScheduler": CogVideoXDPM,
    "EulerAncestralDiscreteScheduler": EulerAncestral,
}


# Grids of sigmas


def _given(num_steps: int, sigmas: Tensor | None, default: Sigmas) -> Sigmas:
    _check_steps(num_steps)
    if sigmas is None:
        return default
    if len(sigmas) != num_steps:
        raise ConfigError(f"sigmas must be one for each of {num_steps} steps, got {len(sigmas)}; nearest: None")
    return sigmas.double().cpu().numpy().copy()


def _moved(sigmas: Sigmas, dynamic: Literal["exponential", "linear"] | None, mu: float | None, shift: float) -> Sigmas:
    """Shift by what mu says if that is the size's to say, rounding as diffusers does."""
    if dynamic is None:
        return _shifted(sigmas, shift)
    if mu is None:
        raise ConfigError("the shift depends on the size of the clip: give mu; nearest: mu_of(config, num_tokens)")
    shift = math.exp(mu) if dynamic == "exponential" else mu
    return shift / (shift + (1 / sigmas - 1))


def _shifted(sigmas: np.ndarray, shift: float) -> np.ndarray:
    return shift * sigmas / (1 + (shift - 1) * sigmas)


def _stretched(sigmas: Sigmas, last: float | None) -> Sigmas:
    """Stretch t = 1 - sigma so that the last sigma is `last`."""
    if not last:
        return sigmas
    t = 1 - sigmas
    if t[-1] == 0:
        raise ConfigError(f"one step from sigma 1 cannot begin at shift_terminal {last}; nearest: 2 steps")
    return 1 - t / (t[-1] / (1 - last))


def _ending(starts: Float[Tensor, " steps"]) -> Float[Tensor, " times"]:
    return torch.cat([starts, starts.new_ones(1)])


def _check_steps(num_steps: int) -> None:
    if num_steps < 1:
        raise ConfigError(f"num_steps must be at least 1, got {num_steps}; nearest: 1")


def _refuse_sigmas(sigmas: Tensor | None) -> None:
    if sigmas is not None:
        raise ConfigError("this scheduler takes no sigmas; nearest: None")


# Timesteps


def _as_it_is(t: Tensor) -> Tensor:
    return t


def _cut(t: Tensor) -> Tensor:
    """Return t where 1000 (1 - t) is cut to an integer; what float32 may have made of an integer stays that."""
    return 1 - (STEPS * (1 - t.double()) + 5e-4).floor() / STEPS


def _step_before(t: Tensor) -> Tensor:
    """Return t for step n, which stands at 1 - (n + 1) / 1000, as if it stood at 1 - n / 1000; 1 for 1."""
    return (1 + (t.double() * STEPS).round()).clamp(max=STEPS) / STEPS


def _faithful(sigmas: Sigmas) -> Float[Tensor, " steps"]:
    """Return 1 - sigmas, or a neighbour in float64 from which 1000 sigma is cut to the same integers."""
    wanted = torch.from_numpy(np.floor(sigmas * STEPS))
    t = 1 - torch.from_numpy(sigmas)
    for _ in range(8):
        off = wanted - (STEPS * (1 - t)).floor()
        t = torch.where(off == 0, t, torch.nextafter(t, t - off))
    return t


def _in_integers(sampler: Sampler) -> Sampler:
    """Round sigmas to float32, and ask the network at timesteps cut to integers before that."""

    def walk(
        predict: Predict,
        x: Latents,
        times: Float[Tensor, " times"] | Float[Tensor, "times columns"],
        *,
        parameterization: Parameterization = FLOW,
        on_step: OnStep | None = None,
    ) -> Latents:
        sigmas = 1 - times.to(x.device, torch.float64)
        rounded, cut = 1 - sigmas.float().double(), 1 - (STEPS * sigmas).floor() / STEPS

        def ask(x: Tensor, t: Tensor) -> Tensor:
            place = (t.double()[..., None] - rounded.flatten()).abs().argmin(-1)
            return predict(x, cut.flatten()[place].to(t.dtype))

        return sampler(ask, x, rounded, parameterization=parameterization, on_step=on_step)

    return walk


# Steps of a fixed stride


def _landings(starts: Tensor, num_steps: int, end: float) -> Tensor:
    """Return where steps go to, 1000 // num_steps steps of training from where they start; to `end` if none are left."""
    there = starts + (STEPS // num_steps) / STEPS
    return torch.where(there > 1 - 0.5 / STEPS, end, there).maximum(starts)


@runtime_checkable
class _Landing(Protocol):
    def __call__(
        self,
        predict: Predict,
        x: Latents,
        times: Tensor,
        *,
        landings: Tensor | None = ...,
        parameterization: Parameterization = ...,
        on_step: OnStep | None = ...,
    ) -> Latents: ...


def _by_stride(sampler: _Landing, end: float) -> Sampler:
    """Step by a fixed number of steps of training, though the next step is asked as if it began at the next time."""

    def walk(
        predict: Predict,
        x: Latents,
        times: Float[Tensor, " times"] | Float[Tensor, "times columns"],
        *,
        parameterization: Parameterization = FLOW,
        on_step: OnStep | None = None,
    ) -> Latents:
        landings = _landings(times[:-1], len(times) - 1, end)
        return sampler(predict, x, times, landings=landings, parameterization=parameterization, on_step=on_step)

    return walk


def _wasteful(draws: Draws) -> Callable[[Latents], Latents]:
    """Draw in the layout B T C H W, and from the second time on draw twice and throw the first away."""
    began = False

    def noise(x: Latents) -> Latents:
        nonlocal began
        if began:
            draw(x.transpose(1, 2), draws)
        began = True
        return draw(x.transpose(1, 2), draws).transpose(1, 2)

    return noise
