"""From a projection to heads: queries and keys, normalised and rotated, and values.

On a CPU this chain of small operations costs as much as the matrix products beside it. There those with RMS norms are one
function with its derivative written out: 2 to 3 times as fast, both ways (`benchmarks/fused.py`).
"""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from reelflow.nn.attention import normed_heads, split_heads
from reelflow.nn.norm import RMSNorm
from reelflow.nn.rope import apply_rope

__all__ = ["normed_parts", "queries_keys_values"]


def queries_keys_values(
    qkv: Float[Tensor, "B N width"],
    norm_q: nn.Module,
    norm_k: nn.Module,
    rope: Float[Tensor, "... M half 2"] | None,
    num_heads: int,
) -> tuple[Float[Tensor, "B heads N d"], Float[Tensor, "B heads N d"], Float[Tensor, "B heads N d"]]:
    """Cut [q, k, v] into heads, normalise q and k, and rotate their last M tokens (those before have no position)."""
    q, k, v = normed_parts(qkv, (norm_q, norm_k), num_heads, parts=3, rope=rope)
    return q, k, v


def normed_parts(
    x: Float[Tensor, "B N width"],
    norms: Sequence[nn.Module],
    num_heads: int,
    *,
    parts: int,
    rope: Float[Tensor, "... M half 2"] | None = None,
) -> tuple[Float[Tensor, "B heads N d"], ...]:
    """Cut the channels into `parts`, and each part into heads; normalise the first ones, and rotate their last M tokens.

    There is one of `norms` for each part to be normalised; they are those of `build_qk_norm`, all of one kind. Norm and
    rotation are computed in float32 at least.
    """
    first, count = norms[0], len(norms)
    learned = rope is not None and rope.requires_grad
    if x.device.type == "cpu" and isinstance(first, RMSNorm):
        per_head = first.normalized_shape == (x.shape[-1] // parts // num_heads,)
        groups = num_heads if per_head else 1
        weights = (norm.weight for norm in norms)
        found = _Fused.apply(x, None if learned else rope, parts, num_heads, groups, first.eps, *weights)
        if not learned:
            return found
    else:
        pieces = x.chunk(parts, dim=-1)
        found = tuple(normed_heads(piece, norm, num_heads) for piece, norm in zip(pieces, norms, strict=False))
        found += tuple(split_heads(piece, num_heads) for piece in pieces[count:])
    return tuple(_rotated(part, rope) for part in found[:count]) + found[count:]


def _rotated(x: Float[Tensor, "B heads N d"], rope: Tensor | None) -> Float[Tensor, "B heads N d"]:
    if rope is None:
        return x
    if length := x.shape[2] - rope.shape[-3]:  # turned by nothing, which costs less than to be parted and joined again
        still = torch.arange(1, -1, -1, dtype=rope.dtype, device=rope.device).expand(
            *rope.shape[:-3], length, *rope.shape[-2:]
        )
        rope = torch.cat([still, rope], dim=-3)
    return apply_rope(x, rope)


class _Fused(torch.autograd.Function):
    """With n = x / rms(x), y = turn(w n): dn = w turn^-1(dy), dw = sum turn^-1(dy) n, dx = (dn - n mean(dn n)) / rms(x).

    The mean squares are those of `groups` equal parts of the channels: of every head, or of all together.
    """

    @staticmethod
    def forward(  # type: ignore[no-untyped-def]
        ctx: Any, x: Tensor, rope: Tensor | None, parts: int, heads: int, groups: int, eps: float, *weights: Tensor
    ):
        dtype = torch.promote_types(x.dtype, torch.float32)
        cut = x.unflatten(-1, (parts, heads, -1)).permute(2, 0, 3, 1, 4)  # part B heads N d
        normed = cut[: len(weights)].to(dtype, memory_format=torch.contiguous_format, copy=True)
        weight = torch.stack(weights).to(dtype).view(len(weights), 1, heads // groups, 1, normed.shape[-1])
        squares = torch.linalg.vector_norm(normed, dim=-1, keepdim=True).square_()
        rrms = _group_mean(squares, groups).div_(normed.shape[-1]).add_(eps).rsqrt_()
        y = normed.mul_(rrms) * weight
        turns = None if rope is None else torch.view_as_complex(rope.to(dtype))
        if turns is not None:
            turns = turns[:, None] if turns.ndim == 3 else turns
            _turn(y, turns)
        ctx.save_for_backward(normed, rrms, weight, turns)
        ctx.parts, ctx.groups, ctx.weight_dtype = parts, groups, weights[0].dtype
        return *y.to(x.dtype), *cut[len(weights) :]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor):  # type: ignore[no-untyped-def]
        normed, rrms, weight, turns = ctx.saved_tensors
        count, batch, heads, tokens, width = normed.shape
        parts, groups = ctx.parts, ctx.groups
        dy = torch.empty_like(normed)
        for part, grad in zip(dy, grads, strict=False):
            part.copy_(grad)
        if turns is not None:
            _turn(dy, turns.conj())
        product = dy * normed
        dw = product.sum((1, 3) if groups == 1 else (1, 2, 3)).flatten(1).to(ctx.weight_dtype)
        mean = _group_mean(product.mul_(weight).mean(-1, keepdim=True), groups)
        dx = dy.mul_(weight).addcmul_(normed, mean, value=-1).mul_(rrms)
        out = grads[0].new_empty(batch, tokens, parts, heads, width)
        out[:, :, :count] = dx.permute(1, 3, 0, 2, 4)
        for index in range(count, parts):
            out[:, :, index] = grads[index].transpose(1, 2)
        return out.flatten(2), *(None,) * 5, *dw


def _group_mean(x: Float[Tensor, "part B heads N 1"], groups: int) -> Tensor:
    """Return the mean over the heads of a group: over all of them, or each alone."""
    return x.mean(2, keepdim=True) if groups == 1 else x


def _turn(x: Float[Tensor, "part B heads N d"], turns: Tensor) -> None:
    """Rotate the last tokens of x, in place."""
    torch.view_as_complex(x[..., x.shape[-2] - turns.shape[-2] :, :].unflatten(-1, (-1, 2))).mul_(turns)
