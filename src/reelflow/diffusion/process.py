"""How data and noise are mixed, and what a network that has seen the mixture is asked for.

    x_t = t * data + (1 - t) * noise        t = 0 is noise, t = 1 is data
    velocity = dx/dt = data - noise

(Rectified flow: Liu et al. 2023, eq. 1; Lipman et al. 2023 with sigma_min = 0.) The time may differ per frame: then a
clean first frame, a finished chunk, or a mask is nothing but "t = 1 here".
"""

import torch
from jaxtyping import Float
from torch import Tensor

__all__ = ["along_frames", "data_from_velocity", "mix", "noise_from_velocity", "velocity_of"]

Latents = Float[Tensor, "B C T H W"]
Time = Float[Tensor, " B"] | Float[Tensor, "B T"]


def along_frames(t: Time) -> Float[Tensor, "B 1 T_or_1 1 1"]:
    """Shape a time per clip or per latent frame so that it multiplies latents."""
    return t.view(t.shape[0], 1, -1, 1, 1)


def mix(data: Latents, noise: Latents, t: Time) -> Latents:
    """Return x_t; exactly `data` where t = 1 and exactly `noise` where t = 0."""
    return torch.lerp(noise, data, along_frames(t).to(data.dtype))


def velocity_of(data: Latents, noise: Latents) -> Latents:
    """Return dx/dt, the same at every t."""
    return data - noise


def data_from_velocity(x: Latents, velocity: Latents, t: Time) -> Latents:
    """Return the data that x_t and the velocity imply: x + (1 - t) velocity."""
    return x + (1 - along_frames(t)) * velocity


def noise_from_velocity(x: Latents, velocity: Latents, t: Time) -> Latents:
    """Return the noise that x_t and the velocity imply: x - t velocity."""
    return x - along_frames(t) * velocity
