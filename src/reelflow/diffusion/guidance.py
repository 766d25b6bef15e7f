"""Guidance wraps velocity functions and returns a velocity function."""

from collections.abc import Callable

from jaxtyping import Float
from torch import Tensor

__all__ = ["Velocity", "guided"]

Velocity = Callable[[Float[Tensor, "B C T H W"], Tensor], Float[Tensor, "B C T H W"]]


def guided(cond: Velocity, uncond: Velocity, *, scale: float) -> Velocity:
    """Classifier-free guidance: uncond + scale * (cond - uncond) (Ho & Salimans 2022, eq. 6, with scale = 1 + w).

    A scale of 1 costs one evaluation, not two.
    """
    if scale == 1:
        return cond
    return lambda x, t: uncond(x, t).lerp(cond(x, t), scale)
