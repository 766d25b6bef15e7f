"""Norms over channels, of tokens and of videos."""

from typing import Literal

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from reelflow.config import configuration
from reelflow.errors import ConfigError

__all__ = ["ChannelRMSNorm", "Norm", "RMSNorm", "build_norm"]


@configuration
class Norm:
    """A norm over the channels of each token; `affine` gives it a weight, and a layer norm a bias too.

    Raises:
        ConfigError: `eps` is negative.
    """

    kind: Literal["layer", "rms"] = "layer"
    eps: float = 1e-6
    affine: bool = False

    def __post_init__(self) -> None:
        if not self.eps >= 0:
            raise ConfigError(f"eps must not be negative, got {self.eps}; 1e-6 is usual")


class RMSNorm(nn.RMSNorm):
    """RMS norm over the last dimension whose weight follows the type of its input (Zhang & Sennrich 2019)."""

    def forward(self, x: Float[Tensor, "*shape D"]) -> Float[Tensor, "*shape D"]:
        weight = None if self.weight is None else self.weight.to(x.dtype)
        return F.rms_norm(x, self.normalized_shape, weight, self.eps)


def build_norm(norm: Norm | None, dim: int) -> RMSNorm | nn.LayerNorm | nn.Identity:
    """Return the module of a norm over `dim` channels; of none, the identity."""
    if norm is None:
        return nn.Identity()
    kind = RMSNorm if norm.kind == "rms" else nn.LayerNorm
    return kind(dim, eps=norm.eps, elementwise_affine=norm.affine)


class ChannelRMSNorm(nn.RMSNorm):
    """RMS norm over the channels of each position of a video, so that no frame sees another's statistics.

    Views the input with channels last: free in `torch.channels_last_3d`, one copy otherwise.
    """

    def forward(self, x: Float[Tensor, "B C T H W"]) -> Float[Tensor, "B C T H W"]:
        rows = x.permute(0, 2, 3, 4, 1)
        weight = None if self.weight is None else self.weight.to(x.dtype)
        return F.rms_norm(rows, self.normalized_shape, weight, self.eps).permute(0, 4, 1, 2, 3)
