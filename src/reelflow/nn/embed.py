"""Numbers become vectors: the sinusoid of a time, and the two-layer map that follows it."""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

__all__ = ["TimeEmbedding", "VectorEmbedding", "grid_sinusoid", "sinusoid"]


def sinusoid(x: Float[Tensor, "*shape"], dim: int, *, max_period: float = 10_000.0) -> Float[Tensor, "*shape {dim}"]:
    """Return [cos(x f_k), sin(x f_k)] with f_k = max_period^(-k / (dim / 2)), in float32 at least (Vaswani et al. 2017)."""
    half = dim // 2
    dtype = torch.promote_types(x.dtype, torch.float32)
    frequencies = torch.exp(torch.arange(half, dtype=dtype, device=x.device) * (-math.log(max_period) / half))
    angles = x.to(dtype)[..., None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def grid_sinusoid(
    positions: Float[Tensor, "N axes"], dim: int, *, max_period: float = 10_000.0
) -> Float[Tensor, "N {dim}"]:
    """Return the sinusoids of every axis side by side, an even share of channels each; what is left over is zero."""
    share = dim // positions.shape[1] // 2 * 2
    parts = [sinusoid(axis, share, max_period=max_period) for axis in positions.unbind(-1)]
    return F.pad(torch.cat(parts, dim=-1), (0, dim - share * positions.shape[1]))


class VectorEmbedding(nn.Module):
    """Linear, SiLU, linear: from a feature vector to the width of the modulation vector."""

    def __init__(self, in_dim: int, dim: int) -> None:
        super().__init__()
        self.up = nn.Linear(in_dim, dim)
        self.down = nn.Linear(dim, dim)

    def forward(self, x: Float[Tensor, "*shape I"]) -> Float[Tensor, "*shape D"]:
        return self.down(F.silu(self.up(x)))


class TimeEmbedding(nn.Module):
    """Embed t in [0, 1] by the sinusoid of 1000 t (Peebles & Xie 2023) and a `VectorEmbedding`."""

    def __init__(self, dim: int, frequencies: int = 256) -> None:
        super().__init__()
        self.frequencies = frequencies
        self.mlp = VectorEmbedding(frequencies, dim)

    def forward(self, t: Float[Tensor, "B groups"]) -> Float[Tensor, "B groups D"]:
        return self.mlp(sinusoid(1000 * t, self.frequencies).to(self.mlp.up.weight.dtype))
