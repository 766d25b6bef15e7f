import math

import torch

from reelflow.nn.embed import TimeEmbedding, VectorEmbedding, sinusoid


def test_a_sinusoid_is_cosines_then_sines_of_falling_frequencies():
    x = torch.tensor([0.0, 1.0, 250.0], dtype=torch.float64)
    expected = [
        [f(float(v) * 10_000 ** (-k / 3)) for f in (math.cos, math.sin) for k in range(3)]  # dim 6: three frequencies
        for v in x
    ]
    torch.testing.assert_close(sinusoid(x, 6), torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-12)


def test_a_sinusoid_keeps_the_shape_and_is_never_coarser_than_float32():
    assert sinusoid(torch.zeros(2, 3, dtype=torch.bfloat16), 8).dtype == torch.float32
    assert sinusoid(torch.zeros(2, 3, dtype=torch.float64), 8, max_period=100.0).dtype == torch.float64
    assert sinusoid(torch.zeros(2, 3), 8).shape == (2, 3, 8)


def test_the_time_embedding_tells_neighbouring_times_apart():
    torch.manual_seed(0)
    embed = TimeEmbedding(16).double()
    times = torch.linspace(0, 1, 1001, dtype=torch.float64)[:, None]
    rows = embed(times)[:, 0]
    assert (rows.diff(dim=0).norm(dim=-1) > 1e-3).all()
    assert torch.equal(rows[:, None], embed.mlp(sinusoid(1000 * times, 256)))


def test_a_vector_embedding_is_linear_silu_linear():
    torch.manual_seed(0)
    embed, x = VectorEmbedding(3, 5), torch.randn(2, 3)
    up = embed.up(x)
    torch.testing.assert_close(embed(x), embed.down(up * up.sigmoid()))
