"""Attention in one call: queries, keys and values in, one tensor out.

Heads are normalised and rotated before they meet (`HeadNorm`, `rope`); which token may see which is a boolean mask.
"""

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor, nn

__all__ = ["HeadNorm", "attend", "merge_heads", "split_heads"]

SHORT = 1024  # tokens, the side of the largest score matrix that `_attend_short` takes


def attend(
    q: Float[Tensor, "B heads N d"],
    k: Float[Tensor, "B heads M d"],
    v: Float[Tensor, "B heads M d"],
    *,
    mask: Bool[Tensor, "#B #heads #N M"] | None = None,
) -> Float[Tensor, "B N heads*d"]:
    """Return softmax(q k / sqrt(d)) v with the heads side by side.

    `mask` is True where a key may be seen; a query that may see none gets zero.
    """
    if q.device.type == "cpu" and q.dtype == torch.bfloat16 and q.shape[2] * k.shape[2] <= SHORT**2:
        return merge_heads(_attend_short(q, k, v, mask))
    return merge_heads(F.scaled_dot_product_attention(q, k, v, attn_mask=mask))


def _attend_short(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Attend through the whole score matrix.

    On a CPU in bfloat16 the backward of the fused kernel is slow: forward and backward this is 2.7 to 4 times as fast
    at 90 tokens, 1.5 to 1.8 times at 330, and they meet near 1,300. In float32 it never wins (`benchmarks/attention.py`).
    """
    heads, scale = q.shape[:2], q.shape[-1] ** -0.5
    q, k, v = q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1)
    if mask is None:
        return torch.bmm(torch.bmm(q * scale, k.mT).softmax(-1), v).unflatten(0, heads)
    sighted = mask.any(-1, keepdim=True)  # a row of -inf alone would make NaN, here and in the gradient
    hidden = torch.zeros(mask.shape, dtype=q.dtype).masked_fill_(~mask & sighted, float("-inf"))
    scores = torch.baddbmm(hidden.expand(*heads, -1, -1).flatten(0, 1), q, k.mT, alpha=scale)
    out = torch.bmm(scores.softmax(-1), v).unflatten(0, heads)
    return out if sighted.all() else out * sighted


def split_heads(x: Float[Tensor, "B N D"], num_heads: int) -> Float[Tensor, "B heads N d"]:
    """Cut the channels into `num_heads` heads."""
    return rearrange(x, "B N (heads d) -> B heads N d", heads=num_heads)


def merge_heads(x: Float[Tensor, "B heads N d"]) -> Float[Tensor, "B N heads*d"]:
    """Undo `split_heads`."""
    return rearrange(x, "B heads N d -> B N (heads d)")


class HeadNorm(nn.RMSNorm):
    """RMS norm of queries or keys over the channels of each head (qk-norm; Dehghani et al. 2023, sec. 2)."""

    def forward(self, x: Float[Tensor, "B heads N d"]) -> Float[Tensor, "B heads N d"]:
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)
