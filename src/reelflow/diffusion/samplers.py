"""Samplers walk dx/dt = velocity(x, t) from noise (t = 0) to data (t = 1).

`times` is a vector of S + 1 increasing times, or a matrix with one column per latent frame: a frame whose column is
all ones is given, and never changes (see `rollout.py`).
"""

from collections.abc import Callable, Iterator
from itertools import pairwise

from jaxtyping import Float
from torch import Tensor

from reelflow.diffusion.guidance import Velocity
from reelflow.diffusion.process import along_frames, data_from_velocity
from reelflow.errors import ConfigError

__all__ = ["OnStep", "Times", "euler", "heun"]

Latents = Float[Tensor, "B C T H W"]
Times = Float[Tensor, " steps"] | Float[Tensor, "steps columns"]
OnStep = Callable[[int, Latents], None]
"""Called at each step with its number from 0 and the data that x implies so far: a preview."""


def euler(velocity: Velocity, x: Latents, times: Times, *, on_step: OnStep | None = None) -> Latents:
    """Integrate by first-order steps x <- x + (t' - t) velocity(x, t); one evaluation each.

    Raises:
        ConfigError: times decrease, leave [0, 1], or do not fit the frames of x.
    """
    for index, (t, t_next) in enumerate(_steps(x, times)):
        v = velocity(x, t.to(x.dtype))
        if on_step is not None:
            on_step(index, data_from_velocity(x, v, t.to(x.dtype)))
        x = x + along_frames(t_next - t).to(x.dtype) * v
    return x


def heun(velocity: Velocity, x: Latents, times: Times, *, on_step: OnStep | None = None) -> Latents:
    """Integrate by the mean slope of both ends of a step; two evaluations each (Karras et al. 2022, alg. 1).

    Raises:
        ConfigError: as for `euler`.
    """
    for index, (t, t_next) in enumerate(_steps(x, times)):
        v = velocity(x, t.to(x.dtype))
        if on_step is not None:
            on_step(index, data_from_velocity(x, v, t.to(x.dtype)))
        dt = along_frames(t_next - t).to(x.dtype)
        x = x + dt * 0.5 * (v + velocity(x + dt * v, t_next.to(x.dtype)))
    return x


def _steps(x: Latents, times: Times) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the times of each step and of the next, one row (or a row of frames) per sample."""
    rising = bool((times.diff(dim=0) >= 0).all()) and bool(((times >= 0) & (times <= 1)).all())  # false for NaN
    if times.shape[0] < 2 or not rising:
        raise ConfigError("times must be at least two and rise within [0, 1]; make them with inference_times")
    if times.ndim == 2 and times.shape[1] != x.shape[2]:
        raise ConfigError(
            f"times has {times.shape[1]} columns but x has {x.shape[2]} latent frames; give one per frame"
        )
    for t, t_next in pairwise(times.to(x.device)):
        yield t.expand(x.shape[0], *t.shape), t_next.expand(x.shape[0], *t.shape)
