"""Attention in one call: queries, keys and values in, one tensor out.

Heads are normalised and rotated before they meet (`HeadNorm`, `rope`); which token may see which is a boolean mask.
"""

import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor, nn

__all__ = ["HeadNorm", "attend", "merge_heads", "split_heads"]


def attend(
    q: Float[Tensor, "B heads N d"],
    k: Float[Tensor, "B heads M d"],
    v: Float[Tensor, "B heads M d"],
    *,
    mask: Bool[Tensor, "B #heads #N M"] | None = None,
) -> Float[Tensor, "B N heads*d"]:
    """Return softmax(q k / sqrt(d)) v with the heads side by side; `mask` is True where a key may be seen."""
    return merge_heads(F.scaled_dot_product_attention(q, k, v, attn_mask=mask))


def split_heads(x: Float[Tensor, "B N heads*d"], num_heads: int) -> Float[Tensor, "B heads N d"]:
    """Cut the channels into `num_heads` heads."""
    return rearrange(x, "B N (heads d) -> B heads N d", heads=num_heads)


def merge_heads(x: Float[Tensor, "B heads N d"]) -> Float[Tensor, "B N heads*d"]:
    """Undo `split_heads`."""
    return rearrange(x, "B heads N d -> B N (heads d)")


class HeadNorm(nn.Module):
    """RMS norm of queries or keys over the channels of each head (qk-norm; Dehghani et al. 2023, sec. 2)."""

    def __init__(self, head_dim: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(head_dim, eps=eps)

    def forward(self, x: Float[Tensor, "B heads N d"]) -> Float[Tensor, "B heads N d"]:
        return self.norm(x)
