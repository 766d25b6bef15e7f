"""Which times to train on, and which times to stop at when sampling.

A shift s moves mass to the noise end: sigma' = s sigma / (1 + (s - 1) sigma) with sigma = 1 - t, that is
logit t' = logit t - ln s (Esser et al. 2024, sec. 5.3.2).
"""

import torch
from jaxtyping import Float
from torch import Tensor

from reelflow.errors import ConfigError

__all__ = ["draw_logit_normal", "draw_uniform", "inference_times", "shift_times"]


def shift_times(t: Float[Tensor, "*shape"], shift: float) -> Float[Tensor, "*shape"]:
    """Move times towards noise (shift > 1) or data (shift < 1); 0 and 1 stay.

    Raises:
        ConfigError: `shift` is not positive.
    """
    if not shift > 0:
        raise ConfigError(f"shift must be positive, got {shift}; 1 means no shift")
    return t / (t + shift * (1 - t))


def draw_uniform(num: int, generator: torch.Generator, *, shift: float = 1.0) -> Float[Tensor, " {num}"]:
    """Draw times uniform in [0, 1), then shifted; one from each of `num` equal parts, in rising order.

    Each part of the distribution gets its share of every batch, which takes noise out of the loss and its gradient
    (as for variational diffusion: Kingma et al. 2021, app. I.1).
    """
    strata = torch.arange(num, device=generator.device)
    return shift_times((strata + torch.rand(num, generator=generator, device=generator.device)) / num, shift)


def draw_logit_normal(
    num: int, generator: torch.Generator, *, mean: float = 0.0, std: float = 1.0, shift: float = 1.0
) -> Float[Tensor, " {num}"]:
    """Draw times whose logit is normal, then shifted (Esser et al. 2024, eq. 19); in equal parts as `draw_uniform`.

    Raises:
        ConfigError: `std` is not positive.
    """
    if not std > 0:
        raise ConfigError(f"std must be positive, got {std}")
    quantiles = draw_uniform(num, generator).double().clamp(1e-9, 1 - 1e-9)
    return shift_times(torch.sigmoid(mean + std * torch.special.ndtri(quantiles)).float(), shift)


def inference_times(
    num_steps: int, *, shift: float = 1.0, device: torch.device | str = "cpu"
) -> Float[Tensor, " {num_steps}+1"]:
    """Return num_steps + 1 times from 0 (noise) to 1 (data), evenly spaced and then shifted.

    Raises:
        ConfigError: fewer than one step.
    """
    if num_steps < 1:
        raise ConfigError(f"num_steps must be at least 1, got {num_steps}")
    return shift_times(torch.linspace(0, 1, num_steps + 1, dtype=torch.float64, device=device), shift)
