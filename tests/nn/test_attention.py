import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from reelflow.nn import attention
from reelflow.nn.attention import attend, merge_heads, split_heads
from reelflow.nn.norm import RMSNorm


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def random_mask(*shape: int, seed: int = 3) -> torch.Tensor:
    """True at random, and always at key 0, so that every query sees something."""
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < 0.6
    mask[..., 0] = True
    return mask


def fused(q, k, v, mask):
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


PATHS = [attention._attend_short, fused]


def attended(path, q, k, v, mask):
    """The output, and the gradients of a random weighting of it."""
    q, k, v = (x.clone().requires_grad_() for x in (q, k, v))
    y = path(q, k, v, mask)
    return y, *torch.autograd.grad((y * normal(*y.shape, seed=9)).sum(), (q, k, v))


@settings(max_examples=20, deadline=None)
@given(
    batch=st.integers(1, 3),
    heads=st.integers(1, 3),
    n=st.integers(1, 9),
    m=st.integers(1, 9),
    mask_shape=st.sampled_from(["none", "keys", "queries", "heads"]),
)
def test_short_attention_is_scaled_dot_product_attention(batch, heads, n, m, mask_shape):
    q, k, v = normal(batch, heads, n, 8), normal(batch, heads, m, 8, seed=1), normal(batch, heads, m, 8, seed=2)
    shapes = {"keys": (batch, 1, 1, m), "queries": (batch, 1, n, m), "heads": (batch, heads, n, m)}
    mask = None if mask_shape == "none" else random_mask(*shapes[mask_shape])
    for ours, theirs in zip(*(attended(path, q, k, v, mask) for path in PATHS), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
    assert torch.equal(attend(q, k, v, mask=mask), merge_heads(fused(q, k, v, mask)))


@pytest.mark.parametrize(
    ("dtype", "limit", "is_short"), [(torch.bfloat16, 4, True), (torch.bfloat16, 3, False), (torch.float32, 4, False)]
)
def test_the_score_matrix_is_formed_for_short_bfloat16_only(dtype, limit, is_short, monkeypatch):
    monkeypatch.setattr(attention, "SHORT", limit)
    monkeypatch.setattr(attention, "_attend_short", lambda q, k, v, mask: torch.full_like(q, 7))
    q = normal(1, 1, 2, 4).to(dtype)
    kv = normal(1, 1, 8, 4).to(dtype)  # 2 x 8 scores are as many as 4 x 4
    assert bool((attend(q, kv, kv) == 7).all()) == is_short


def test_attention_is_a_weighted_mean_of_values_by_its_definition():
    q, k, v = normal(1, 1, 2, 4), normal(1, 1, 3, 4, seed=1), normal(1, 1, 3, 4, seed=2)
    expected = [((q[0, 0, i] @ k[0, 0].T) / 2).softmax(0) @ v[0, 0] for i in range(2)]
    torch.testing.assert_close(attend(q, k, v)[0], torch.stack(expected), rtol=0, atol=1e-13)


@pytest.mark.parametrize("path", PATHS)
def test_a_masked_key_has_no_influence_and_gets_no_gradient(path):
    q, k, v = normal(2, 2, 5, 4), normal(2, 2, 6, 4, seed=1), normal(2, 2, 6, 4, seed=2)
    mask = torch.ones(2, 1, 1, 6, dtype=torch.bool)
    mask[..., 4] = False
    y, _, k_grad, v_grad = attended(path, q, k, v, mask)
    assert not k_grad[:, :, 4].any()
    assert not v_grad[:, :, 4].any()
    assert k_grad[:, :, 3].all()
    k[:, :, 4], v[:, :, 4] = 1e3, -1e3
    assert torch.equal(path(q, k, v, mask), y)
    assert not torch.equal(path(q, k, v, None), y)


@pytest.mark.parametrize("path", PATHS)
def test_a_query_that_sees_no_key_gets_zero_and_gives_no_gradient(path):
    q, k, v = normal(2, 2, 3, 4), normal(2, 2, 4, 4, seed=1), normal(2, 2, 4, 4, seed=2)
    mask = torch.ones(2, 1, 3, 4, dtype=torch.bool)
    mask[0, :, 1] = False
    y, *gradients = attended(path, q, k, v, mask)
    assert not y[0, :, 1].any()
    assert y[1].all()
    assert not gradients[0][0, :, 1].any()
    assert all(gradient.isfinite().all() for gradient in gradients)


def test_heads_split_and_merge_without_a_trace():
    x = normal(2, 3, 12)
    heads = split_heads(x, 4)
    assert heads.shape == (2, 4, 3, 3)
    assert torch.equal(heads[:, 1], x[..., 3:6])
    assert torch.equal(merge_heads(heads), x)


def test_head_norm_divides_each_head_by_its_root_mean_square():
    norm, x = RMSNorm(8, eps=0.0).double(), normal(2, 3, 4, 8)
    torch.testing.assert_close(norm(x), x / x.square().mean(-1, keepdim=True).sqrt())
    norm.weight.data[:] = 2
    torch.testing.assert_close(norm(x).square().mean(-1), torch.full((2, 3, 4), 4.0, dtype=torch.float64))


def test_head_norm_keeps_the_precision_of_its_input():
    assert RMSNorm(8)(torch.ones(1, 1, 2, 8, dtype=torch.bfloat16)).dtype == torch.bfloat16


@pytest.mark.parametrize("path", PATHS)
def test_a_key_with_the_log_of_a_number_counts_as_so_many_keys(path):
    q, k, v = normal(2, 2, 5, 4), normal(2, 2, 3, 4, seed=1), normal(2, 2, 3, 4, seed=2)
    counts = torch.tensor([1, 4, 2])
    many = (x.repeat_interleave(counts, dim=2) for x in (k, v))
    few = path(q, k, v, counts.double().log().view(1, 1, 1, 3))
    torch.testing.assert_close(few, path(q, *many, None), rtol=0, atol=1e-12)
