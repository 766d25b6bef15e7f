"""Attention in one call: queries, keys and values in, one tensor out.

Heads are normalised and rotated before they meet (`QKNorm`, `rope`); which token may see which is a boolean mask.
"""

from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate
from typing import Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn

from reelflow.config import configuration
from reelflow.nn.norm import Norm, RMSNorm, build_norm

__all__ = ["QKNorm", "attend", "attend_segments", "build_qk_norm", "merge_heads", "normed_heads", "split_heads"]

SHORT = 1024  # tokens, the side of the largest score matrix that `_attend_short` takes


def attend(
    q: Float[Tensor, "B heads N d"],
    k: Float[Tensor, "B heads M d"],
    v: Float[Tensor, "B heads M d"],
    *,
    mask: Bool[Tensor, "#B #heads #N M"] | Float[Tensor, "#B #heads #N M"] | None = None,
) -> Float[Tensor, "B N heads*d"]:
    """Return softmax(q k / sqrt(d)) v with the heads side by side.

    `mask` is True where a key may be seen; a query that may see none gets zero. One of numbers, in the type of q, is added to
    the scores: a key with ln n counts as n keys.
    """
    if q.device.type == "cpu" and q.dtype == torch.bfloat16 and q.shape[2] * k.shape[2] <= SHORT**2:
        return merge_heads(_attend_short(q, k, v, mask))
    return merge_heads(F.scaled_dot_product_attention(q, k, v, attn_mask=mask))


def attend_segments(
    q: Sequence[Float[Tensor, "1 heads _ d"]],
    k: Sequence[Float[Tensor, "1 heads _ d"]],
    v: Sequence[Float[Tensor, "1 heads _ d"]],
) -> list[Float[Tensor, "1 _ heads*d"]]:
    """Attend within each segment, from its queries to its keys alone; where a segment has no keys, its queries get zero.

    On a GPU in half precision this is one kernel for all segments. Elsewhere it is one call for each, which computes the
    same pairs: no segment is padded, whatever the lengths.
    """
    if q[0].is_cuda:  # under autocast rotated queries and keys are float32, which attention would narrow too
        dtype = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else q[0].dtype
        if dtype in (torch.bfloat16, torch.float16):
            return _attend_varlen(*([part.to(dtype) for part in parts] for parts in (q, k, v)))
    return [
        attend(*each) if each[1].shape[2] else merge_heads(each[0] @ each[1].mT @ each[2])  # zero, with zero gradients
        for each in zip(q, k, v, strict=True)
    ]


def _attend_varlen(q: Sequence[Tensor], k: Sequence[Tensor], v: Sequence[Tensor]) -> list[Tensor]:
    """Attend through torch's kernel for sequences of different lengths, laid end to end."""
    lengths, key_lengths = (tuple(part.shape[2] for part in parts) for parts in (q, k))
    queries, keys, values = (torch.cat([part[0].transpose(0, 1) for part in parts]) for parts in (q, k, v))
    bounds, key_bounds = (_bounds(each, queries.device) for each in (lengths, key_lengths))
    out = varlen_attn(queries, keys, values, bounds, key_bounds, max(lengths), max(key_lengths))
    assert isinstance(out, Tensor)
    return list(out.flatten(1)[None].split(lengths, dim=1))


@lru_cache(maxsize=8)  # each of a step's attentions asks for the same few
def _bounds(lengths: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device)


def _attend_short(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Attend through the whole score matrix.

    On a CPU in bfloat16 the backward of the fused kernel is slow: forward and backward this is 2.7 to 4 times as fast
    at 90 tokens, 1.5 to 1.8 times at 330, and they meet near 1,300. In float32 it never wins (`benchmarks/attention.py`).
    """
    heads, scale = q.shape[:2], q.shape[-1] ** -0.5
    q, k, v = q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1)
    if mask is None:
        return torch.bmm(torch.bmm(q * scale, k.mT).softmax(-1), v).unflatten(0, heads)
    if mask.is_floating_point():
        scores = torch.baddbmm(mask.expand(*heads, q.shape[1], -1).flatten(0, 1), q, k.mT, alpha=scale)
        return torch.bmm(scores.softmax(-1), v).unflatten(0, heads)
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


@configuration
class QKNorm:
    """Norm of queries and of keys, with weights, over each head or over all of them (Dehghani et al. 2023, sec. 2)."""

    kind: Literal["layer", "rms"] = "rms"
    over: Literal["head", "width"] = "head"
    eps: float = 1e-6


def build_qk_norm(norm: QKNorm | None, dim: int, num_heads: int) -> RMSNorm | nn.LayerNorm | nn.Identity:
    """Return the norm of queries (or keys) of `num_heads` heads, `dim` channels wide together."""
    if norm is None:
        return nn.Identity()
    return build_norm(Norm(norm.kind, norm.eps, affine=True), dim if norm.over == "width" else dim // num_heads)


def normed_heads(x: Float[Tensor, "B N D"], norm: nn.Module, num_heads: int) -> Float[Tensor, "B heads N d"]:
    """Cut the channels into heads, normalised before or after by the extent of `norm` (see `build_qk_norm`)."""
    if getattr(norm, "normalized_shape", None) == (x.shape[-1],):
        return split_heads(norm(x), num_heads)
    return norm(split_heads(x, num_heads))
