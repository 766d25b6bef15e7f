"""Rotary positions over one to three axes.

Head channels are split between the axes (T, H, W); within an axis, channel pairs (2i, 2i + 1) turn by
position * theta^(-2i / channels of the axis) (Su et al. 2021, eq. 34, per axis). Tokens scan T, then H, then W.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from reelflow.errors import ConfigError

__all__ = ["Rope", "apply_rope", "check_axes", "grid_positions", "rope_table"]

Rope = Float[Tensor, "N d/2 2"]


def check_axes(axes: Sequence[int], head_dim: int) -> None:
    """Refuse a split that does not fill the head with even parts.

    Raises:
        ConfigError: the parts are odd, negative, or do not sum to `head_dim`.
    """
    if any(part < 0 or part % 2 for part in axes) or sum(axes) != head_dim:
        fits = head_dim + head_dim % 2
        part = fits // len(axes) // 2 * 2
        split = (fits - (len(axes) - 1) * part, *(len(axes) - 1) * (part,))
        raise ConfigError(
            f"rope parts must be even and sum to the head dim {head_dim}, got {tuple(axes)} (sum {sum(axes)}); "
            f"for example {split}{'' if fits == head_dim else f' with a head dim of {fits}'}"
        )


def grid_positions(
    num_frames: int, height: int, width: int, *, device: torch.device | None = None
) -> Float[Tensor, "N 3"]:
    """Return the integer (t, h, w) of every token of a grid, in scan order."""
    axes = [torch.arange(n, dtype=torch.float64, device=device) for n in (num_frames, height, width)]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).flatten(0, 2)


def rope_table(
    positions: Float[Tensor, "N axes"], axes: Sequence[int], *, theta: float = 10_000.0
) -> Float[Tensor, "N half 2"]:
    """Return (cos, sin) for each token and channel pair, `axes` channels for each axis.

    Angles are computed in float64, so that a long clip does not blur its last positions.
    """
    angles = []
    for axis, channels in enumerate(axes):
        exponent = torch.arange(0, channels, 2, dtype=torch.float64, device=positions.device) / max(channels, 1)
        angles.append(positions[:, axis, None].double() * theta**-exponent)
    angle = torch.cat(angles, dim=-1)
    return torch.stack([angle.cos(), angle.sin()], dim=-1)


def apply_rope(x: Float[Tensor, "B heads N d"], rope: Float[Tensor, "N half 2"]) -> Float[Tensor, "B heads N d"]:
    """Turn each channel pair (2i, 2i + 1) of each token by its angle, in float32 at least.

    A pair is a complex number and its turn one product, which on a CPU is five times as fast as four half-products.
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    turned = torch.view_as_complex(wide.unflatten(-1, (-1, 2)).contiguous()) * torch.view_as_complex(
        rope.to(wide.dtype)
    )
    return torch.view_as_real(turned).flatten(-2).to(x.dtype)
