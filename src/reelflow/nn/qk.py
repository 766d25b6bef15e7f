"""From one projection to queries and keys, normalised and rotated, and values.

On a CPU this chain of small operations costs as much as the matrix products beside it. There the usual one, RMS norm per
head, is one function with its derivative written out: 2 to 3 times as fast, both ways (`benchmarks/fused.py`).
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from reelflow.nn.attention import normed_heads, split_heads
from reelflow.nn.norm import RMSNorm
from reelflow.nn.rope import apply_rope

__all__ = ["queries_keys_values"]


def queries_keys_values(
    qkv: Float[Tensor, "B N width"],
    norm_q: nn.Module,
    norm_k: nn.Module,
    rope: Float[Tensor, "... M half 2"] | None,
    num_heads: int,
) -> tuple[Float[Tensor, "B heads N d"], Float[Tensor, "B heads N d"], Float[Tensor, "B heads N d"]]:
    """Cut [q, k, v] into heads, normalise q and k, and rotate their last M tokens (those before have no position).

    The norms are those of `build_qk_norm`. Norm and rotation are computed in float32 at least.
    """
    head_dim = qkv.shape[-1] // 3 // num_heads
    per_head = isinstance(norm_q, RMSNorm) and norm_q.normalized_shape == (head_dim,)
    if per_head and qkv.device.type == "cpu" and not (rope is not None and rope.requires_grad):
        return _Fused.apply(qkv, norm_q.weight, norm_k.weight, rope, num_heads, norm_q.eps)
    q, k, v = qkv.chunk(3, dim=-1)
    q, k = (_rotated(normed_heads(x, norm, num_heads), rope) for x, norm in ((q, norm_q), (k, norm_k)))
    return q, k, split_heads(v, num_heads)


def _rotated(x: Float[Tensor, "B heads N d"], rope: Tensor | None) -> Float[Tensor, "B heads N d"]:
    if rope is None:
        return x
    length = x.shape[2] - rope.shape[-3]
    return torch.cat([x[:, :, :length], apply_rope(x[:, :, length:], rope)], dim=2) if length else apply_rope(x, rope)


class _Fused(torch.autograd.Function):
    """With n = x / rms(x), y = turn(w n): dn = w turn^-1(dy), dw = sum turn^-1(dy) n, dx = (dn - n mean(dn n)) / rms(x)."""

    @staticmethod
    def forward(  # type: ignore[no-untyped-def]
        ctx: Any, qkv: Tensor, weight_q: Tensor, weight_k: Tensor, rope: Tensor | None, heads: int, eps: float
    ):
        dtype = torch.promote_types(qkv.dtype, torch.float32)
        parts = qkv.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)  # 3 B heads N d
        weight = torch.stack([weight_q, weight_k]).to(dtype)[:, None, None, None]
        normed = parts[:2].to(dtype, memory_format=torch.contiguous_format, copy=True)
        rrms = (
            torch.linalg.vector_norm(normed, dim=-1, keepdim=True).square_().div_(normed.shape[-1]).add_(eps).rsqrt_()
        )
        y = normed.mul_(rrms) * weight
        turns = None if rope is None else torch.view_as_complex(rope.to(dtype))
        if turns is not None:
            turns = turns[:, None] if turns.ndim == 3 else turns
            _turn(y, turns)
        ctx.save_for_backward(normed, rrms, weight, turns)
        ctx.weight_dtype = weight_q.dtype
        q, k = y.to(qkv.dtype)
        return q, k, parts[2]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dq: Tensor, dk: Tensor, dv: Tensor):  # type: ignore[no-untyped-def]
        normed, rrms, weight, turns = ctx.saved_tensors
        dy = torch.empty_like(normed)
        dy[0], dy[1] = dq, dk
        if turns is not None:
            _turn(dy, turns.conj())
        product = dy * normed
        dw = product.sum((1, 2, 3)).to(ctx.weight_dtype)
        mean = product.mul_(weight).mean(-1, keepdim=True)
        dx = dy.mul_(weight).addcmul_(normed, mean, value=-1).mul_(rrms)
        batch, heads, tokens, width = dv.shape
        out = dv.new_empty(batch, tokens, 3, heads, width)
        out[:, :, :2], out[:, :, 2] = dx.permute(1, 3, 0, 2, 4), dv.transpose(1, 2)
        return out.flatten(2), dw[0], dw[1], None, None, None


def _turn(x: Float[Tensor, "2 B heads N d"], turns: Tensor) -> None:
    """Rotate the last tokens of x, in place."""
    torch.view_as_complex(x[..., x.shape[-2] - turns.shape[-2] :, :].unflatten(-1, (-1, 2))).mul_(turns)
