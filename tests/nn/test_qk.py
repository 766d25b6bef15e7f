import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from reelflow.nn.attention import normed_heads, split_heads
from reelflow.nn.norm import RMSNorm
from reelflow.nn.qk import normed_parts, queries_keys_values
from reelflow.nn.rope import apply_rope, grid_positions, rope_table


def chain(qkv, norm_q, norm_k, rope, heads):
    """The same in its plain parts."""
    q, k, v = qkv.chunk(3, dim=-1)
    q, k, v = normed_heads(q, norm_q, heads), normed_heads(k, norm_k, heads), split_heads(v, heads)
    if rope is not None:
        length = q.shape[2] - rope.shape[-3]
        q, k = (torch.cat([x[:, :, :length], apply_rope(x[:, :, length:], rope)], dim=2) for x in (q, k))
    return q, k, v


def case(batch, heads, length, width, frames, dtype=torch.float64, over="head"):
    torch.manual_seed(batch + 7 * heads + 31 * length + frames)
    rope = rope_table(grid_positions(frames, 2, 2), (width // 2, 0, width // 2)) if frames else None
    tokens = length + 4 * frames
    qkv = torch.randn(batch, tokens, 3 * heads * width, dtype=dtype, requires_grad=True)
    norms = [RMSNorm(width * (heads if over == "width" else 1), eps=1e-6, dtype=dtype) for _ in range(2)]
    for norm in norms:
        torch.nn.init.normal_(norm.weight, mean=1, std=0.3)
    return qkv, *norms, rope


@settings(max_examples=20, deadline=None)
@given(
    st.integers(1, 3),
    st.integers(1, 3),
    st.integers(0, 3),
    st.sampled_from([4, 8]),
    st.integers(0, 2),
    st.sampled_from(["head", "width"]),
    st.booleans(),
)
def test_the_fused_chain_equals_its_parts_forward_and_backward(batch, heads, length, width, frames, over, learned):
    if length + frames == 0:
        return
    qkv, norm_q, norm_k, rope = case(batch, heads, length, width, frames, over=over)
    inputs = [qkv, norm_q.weight, norm_k.weight]
    if learned and rope is not None:
        inputs.append(rope.requires_grad_())
    results = []
    for function in (queries_keys_values, chain):
        parts = function(qkv, norm_q, norm_k, rope, heads)
        weights = [torch.linspace(-1, 2, part.numel(), dtype=part.dtype).view(part.shape) for part in parts]
        loss = sum((part * weight).sum() for part, weight in zip(parts, weights, strict=True))
        results.append([*parts, *torch.autograd.grad(loss, inputs)])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


def test_each_sample_may_have_its_own_positions():
    qkv, norm_q, norm_k, rope = case(2, 2, 1, 8, 2)
    tables = torch.stack([rope, rope.flip(0)])
    together = queries_keys_values(qkv, norm_q, norm_k, tables, 2)
    for row in range(2):
        alone = queries_keys_values(qkv[row : row + 1], norm_q, norm_k, tables[row], 2)
        for ours, theirs in zip(together, alone, strict=True):
            torch.testing.assert_close(ours[row : row + 1], theirs)


def test_bfloat16_is_rounded_once_at_the_end():
    qkv, norm_q, norm_k, rope = case(1, 2, 1, 8, 2, dtype=torch.float32)
    low = qkv.detach().bfloat16()
    ours = queries_keys_values(low, norm_q, norm_k, rope, 2)
    exact = queries_keys_values(low.float(), norm_q, norm_k, rope, 2)
    for part, wide in zip(ours, exact, strict=True):
        assert torch.equal(part, wide.bfloat16())


def test_a_second_derivative_is_refused_rather_than_wrong():
    qkv, norm_q, norm_k, rope = case(1, 1, 0, 4, 1)
    q, _, _ = queries_keys_values(qkv, norm_q, norm_k, rope, 1)
    (first,) = torch.autograd.grad(q.square().sum(), qkv, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


def test_parts_without_a_norm_are_only_cut():
    qkv, norm_q, norm_k, rope = case(2, 3, 1, 4, 1, over="width")
    q, k, v = queries_keys_values(qkv, norm_q, norm_k, rope, 3)
    (alone,) = normed_parts(qkv[..., :12], (norm_q,), 3, parts=1, rope=rope)
    key, value = normed_parts(qkv[..., 12:], (norm_k,), 3, parts=2, rope=rope)
    for ours, theirs in ((alone, q), (key, k), (value, v)):
        torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(value, split_heads(qkv[..., 24:], 3), rtol=0, atol=0)
