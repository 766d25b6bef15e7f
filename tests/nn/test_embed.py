import math

import pytest
import torch

from reelflow.errors import ConfigError
from reelflow.nn.embed import (
    Apart,
    Learned,
    LearnedPositions,
    Number,
    NumberEmbedding,
    SinCos,
    VectorEmbedding,
    grid_sinusoid,
    sinusoid,
)
from reelflow.nn.rope import grid_positions

F64 = torch.float64


def test_a_sinusoid_is_cosines_then_sines_of_falling_frequencies():
    x = torch.tensor([0.0, 1.0, 250.0], dtype=F64)
    for first, waves in (("cos", (math.cos, math.sin)), ("sin", (math.sin, math.cos))):
        expected = [[f(float(v) * 10_000 ** (-k / 3)) for f in waves for k in range(3)] for v in x]  # dim 6
        found = sinusoid(x, 6, first=first)
        torch.testing.assert_close(found, torch.tensor(expected, dtype=F64), rtol=0, atol=1e-12)


def test_a_sinusoid_keeps_the_shape_and_is_never_coarser_than_float32():
    assert sinusoid(torch.zeros(2, 3, dtype=torch.bfloat16), 8).dtype == torch.float32
    assert sinusoid(torch.zeros(2, 3, dtype=F64), 8, max_period=100.0).dtype == F64
    assert sinusoid(torch.zeros(2, 3), 8).shape == (2, 3, 8)


@pytest.mark.parametrize("split", [(4, 6, 6), (8, 0, 8), None])
def test_a_sincos_table_is_one_sinusoid_per_axis_side_by_side(split):
    positions, dim = grid_positions(2, 3, 2) * 1.5, 16 if split else 20  # an even share of 20 leaves 2 over
    expected = torch.zeros(12, dim, dtype=F64)
    for n, position in enumerate(positions.tolist()):
        channel = 0
        for p, share in zip(position, split or (6, 6, 6), strict=True):
            for wave in (math.sin, math.cos):
                for k in range(share // 2):
                    expected[n, channel] = wave(p * 100.0 ** (-k / (share // 2)))
                    channel += 1
    found = grid_sinusoid(positions, dim, max_period=100.0, split=split, first="sin")
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_the_table_of_image_transformers_is_columns_before_rows_sines_first():
    """Channels in quarters: sin and cos of the column, sin and cos of the row; and per sample as alone."""
    positions = grid_positions(1, 3, 4)
    table = grid_sinusoid(positions[:, [2, 1]], 8, first="sin")
    frequencies = torch.tensor([1.0, 10_000**-0.5], dtype=F64)
    columns, rows = positions[:, 2, None] * frequencies, positions[:, 1, None] * frequencies
    expected = torch.cat([columns.sin(), columns.cos(), rows.sin(), rows.cos()], dim=-1)
    torch.testing.assert_close(table, expected, rtol=0, atol=1e-12)
    both = torch.stack([positions, 2 * positions])
    assert torch.equal(grid_sinusoid(both, 12), torch.stack([grid_sinusoid(p, 12) for p in both]))


def learned(form: str, beyond: str, dim: int = 6) -> LearnedPositions:
    torch.manual_seed(0)
    return LearnedPositions(Learned((3, 4, 5), form=form, beyond=beyond), dim).double()


@pytest.mark.parametrize("beyond", ["refuse", "interpolate"])
def test_learned_tables_add_one_row_per_axis_or_give_one_per_place(beyond):
    axes, grid = learned("axes", beyond), learned("grid", beyond)
    t, h, w = (table.flatten(0, 2) for table in axes.tables)
    rows = [t[i] + h[j] + w[k] for i in range(2) for j in range(4) for k in range(3)]
    torch.testing.assert_close(axes((2, 4, 3)), torch.stack(rows), rtol=0, atol=1e-15)
    rows = [grid.tables[0].view(3, 4, 5, -1)[i, j, k] for i in range(2) for j in range(4) for k in range(3)]
    assert torch.equal(grid((2, 4, 3)), torch.stack(rows))
    sizes = [sum(p.numel() for p in model.parameters()) for model in (axes, grid)]
    assert sizes == [(3 + 4 + 5) * 6, 3 * 4 * 5 * 6]


@pytest.mark.parametrize("form", ["axes", "grid"])
def test_a_learned_table_refuses_a_larger_grid(form):
    with pytest.raises(ConfigError, match='holds 4 tokens along h, got 5; nearest: 4, or beyond="interpolate"'):
        learned(form, "refuse")((3, 5, 5))


@pytest.mark.parametrize("form", ["axes", "grid"])
def test_a_longer_axis_stretches_its_table_from_end_to_end(form):
    """A table linear in position stays so; at twice the intervals every other row is an old one."""
    model = learned(form, "interpolate")
    whole, long = model((3, 4, 5)).view(3, 4, 5, -1), model((3, 7, 5)).view(3, 7, 5, -1)
    torch.testing.assert_close(long[:, ::2], whole, rtol=0, atol=1e-14)
    torch.testing.assert_close(long[:, 1::2], (whole[:, 1:] + whole[:, :-1]) / 2, rtol=0, atol=1e-14)
    uneven = model((5, 4, 6)).view(5, 4, 6, -1)
    torch.testing.assert_close(uneven[::4, :, ::5], whole[::2, :, ::4], rtol=0, atol=1e-14)
    one_row = LearnedPositions(Learned((1, 1, 1), form=form, beyond="interpolate"), 4)
    assert torch.equal(one_row((2, 1, 1))[0], one_row((2, 1, 1))[1])


def test_a_smaller_grid_lies_in_the_corner_or_the_centre_of_the_table():
    corner, centre = (LearnedPositions(Learned((1, 6, 5), form="grid", at=at), 2) for at in ("corner", "centre"))
    centre.load_state_dict(corner.state_dict())
    whole = corner((1, 6, 5)).view(6, 5, 2)
    assert torch.equal(corner((1, 3, 3)), whole[:3, :3].flatten(0, 1))
    assert torch.equal(centre((1, 3, 3)), whole[1:4, 1:4].flatten(0, 1)), "of an odd rest, more lies behind"


def test_a_table_may_begin_with_the_contexts_tokens():
    model = LearnedPositions(Learned((2, 1, 3), form="grid", context=4), 6)
    (table,) = model.tables
    assert torch.equal(model.of_context(4), table[:4])
    assert torch.equal(model((2, 1, 3)), table[4:])
    with pytest.raises(ConfigError, match="for 4 context tokens, got 3"):
        model.of_context(3)


def test_a_frozen_table_does_not_learn_and_begins_as_sinusoids():
    model = LearnedPositions(Learned((2, 1, 3), form="grid", context=1, frozen=True), 12)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    torch.testing.assert_close(model((2, 1, 3)), grid_sinusoid(grid_positions(2, 1, 3), 12).float(), rtol=0, atol=0)
    assert not model.of_context(1).any()


def test_every_row_that_a_grid_reads_learns_and_no_other():
    model = learned("axes", "refuse")
    model((2, 4, 3)).square().sum().backward()
    read = [(table.grad.flatten(0, 2) != 0).any(-1).tolist() for table in model.tables]
    assert read == [[True] * 2 + [False], [True] * 4, [True] * 3 + [False] * 2]


REFUSALS = {
    "odd width": (lambda: sinusoid(torch.zeros(2), 5), "even number of channels, got 5; nearest: 4 or 6"),
    "too narrow a split": (
        lambda: grid_sinusoid(grid_positions(1, 2, 2), 16, split=(4, 4, 4)),
        r"sum to the width 16, got \(4, 4, 4\) \(sum 12\); for example \(8, 4, 4\)",
    ),
    "two parts": (lambda: grid_sinusoid(grid_positions(1, 2, 2), 16, split=(8, 8)), r"per axis \(3\), got \(8, 8\)"),
    "odd parts": (lambda: SinCos(split=(3, 5, 8)), r"must be even and sum to the width 16, got \(3, 5, 8\)"),
    "period": (lambda: SinCos(max_period=0.0), "max_period must be positive, got 0.0"),
    "no parts": (lambda: Apart(()), r"there is at least 1 part; got \(\)"),
    "no rows": (lambda: Learned((4, 0, 4)), r"at least 1 token along each axis, got \(4, 0, 4\)"),
    "frozen axes": (
        lambda: Learned((4, 4, 4), frozen=True),
        "form='axes', context=0, frozen=True; nearest: form=\"grid\"",
    ),
    "context of axes": (lambda: Learned((4, 4, 4), context=2), "form='axes', context=2"),
}


@pytest.mark.parametrize("mistake", REFUSALS)
def test_a_mistake_is_refused_with_the_way_out(mistake):
    make, message = REFUSALS[mistake]
    with pytest.raises(ConfigError, match=message):
        make()


def test_the_time_embedding_tells_neighbouring_times_apart():
    torch.manual_seed(0)
    embed = NumberEmbedding(Number(), 16).double()
    times = torch.linspace(0, 1, 1001, dtype=F64)[:, None]
    rows = embed(times)[:, 0]
    assert (rows.diff(dim=0).norm(dim=-1) > 1e-3).all()
    assert torch.equal(rows[:, None], embed.mlp(sinusoid(1000 * times, 256)))


def test_a_vector_embedding_is_linear_silu_linear():
    torch.manual_seed(0)
    embed, x = VectorEmbedding(3, 5), torch.randn(2, 3)
    up = embed.up(x)
    torch.testing.assert_close(embed(x), embed.down(up * up.sigmoid()))
