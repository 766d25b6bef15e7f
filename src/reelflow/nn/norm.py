"""Norms over channels."""

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

__all__ = ["ChannelRMSNorm"]


class ChannelRMSNorm(nn.RMSNorm):
    """RMS norm over the channels of each position of a video, so that no frame sees another's statistics.

    Views the input with channels last: free in `torch.channels_last_3d`, one copy otherwise.
    """

    def forward(self, x: Float[Tensor, "B C T H W"]) -> Float[Tensor, "B C T H W"]:
        rows = x.permute(0, 2, 3, 4, 1)
        weight = None if self.weight is None else self.weight.to(x.dtype)
        return F.rms_norm(rows, self.normalized_shape, weight, self.eps).permute(0, 4, 1, 2, 3)
