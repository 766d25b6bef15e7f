import ast

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from reelflow.errors import ConfigError
from reelflow.nn.rope import apply_rope, check_axes, grid_positions, rope_table

EVEN_SPLITS = st.lists(st.integers(0, 6).map(lambda half: 2 * half), min_size=3, max_size=3).filter(any)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_positions_scan_frames_then_rows_then_columns():
    positions = grid_positions(2, 3, 4)
    assert positions.tolist() == [[t, h, w] for t in range(2) for h in range(3) for w in range(4)]


@settings(max_examples=30, deadline=None)
@given(axes=EVEN_SPLITS)
def test_any_even_split_turns_without_changing_lengths(axes):
    check_axes(axes, sum(axes))
    x = normal(2, 2, 12, sum(axes))
    turned = apply_rope(x, rope_table(grid_positions(2, 3, 2), axes))
    torch.testing.assert_close(turned.norm(dim=-1), x.norm(dim=-1), rtol=1e-13, atol=0)
    pairs = [y.unflatten(-1, (-1, 2)).norm(dim=-1) for y in (turned, x)]
    torch.testing.assert_close(*pairs, rtol=1e-12, atol=1e-15)


@settings(max_examples=30, deadline=None)
@given(axes=EVEN_SPLITS, shift=st.tuples(*3 * [st.integers(-1000, 1000)]))
def test_scores_depend_on_relative_positions_only(axes, shift):
    q, k = normal(1, 1, 8, sum(axes)), normal(1, 1, 8, sum(axes), seed=1)
    here = grid_positions(2, 2, 2)
    there = here + torch.tensor(shift, dtype=torch.float64)
    scores = [apply_rope(q, table) @ apply_rope(k, table).mT for table in (rope_table(p, axes) for p in (here, there))]
    torch.testing.assert_close(*scores, rtol=0, atol=1e-10)


@pytest.mark.parametrize("axis", range(3))
def test_a_move_along_an_axis_turns_that_axis_only(axis):
    axes = (4, 6, 8)
    x, position = normal(1, 1, 1, 18), torch.zeros(1, 3, dtype=torch.float64)
    position[0, axis] = 3
    unturned = torch.isclose(apply_rope(x, rope_table(position, axes)), x)[0, 0, 0].split(axes)
    assert [bool(part.all()) for part in unturned] == [i != axis for i in range(3)]
    assert not unturned[axis].any()


def test_pairs_are_complex_numbers_times_a_phase():
    x, positions = normal(2, 3, 6, 10), grid_positions(1, 2, 3)
    table = rope_table(positions, (2, 4, 4), theta=100.0)
    frequencies = [(0, 1.0), (1, 1.0), (1, 100.0**-0.5), (2, 1.0), (2, 100.0**-0.5)]
    angles = torch.stack([positions[:, axis] * frequency for axis, frequency in frequencies], dim=-1)
    turned = torch.view_as_complex(x.unflatten(-1, (5, 2))) * torch.polar(torch.ones_like(angles), angles)
    torch.testing.assert_close(apply_rope(x, table), torch.view_as_real(turned).flatten(-2), rtol=0, atol=1e-13)


def test_the_half_layout_is_a_permutation_of_channels():
    """All first halves, then all second halves, as some published checkpoints have it."""
    dim, x, table = 8, normal(1, 2, 5, 8), rope_table(grid_positions(5, 1, 1), (8, 0, 0))
    cos, sin = table.unbind(-1)
    first, second = x.chunk(2, dim=-1)
    halves = torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
    to_pairs = torch.arange(dim).view(2, -1).T.flatten()  # 0 4 1 5 2 6 3 7
    torch.testing.assert_close(apply_rope(x[..., to_pairs], table), halves[..., to_pairs], rtol=0, atol=1e-14)


@pytest.mark.parametrize("axes", [(4, 4, 4), (3, 5, 8), (-2, 10, 8), (16, 16, 16), (6, 6), (15,)])
@pytest.mark.parametrize("head_dim", [16, 20, 2, 15])
def test_a_bad_split_is_refused_with_one_that_works(axes, head_dim):
    with pytest.raises(ConfigError, match=f"sum to the head dim {head_dim}, got") as refusal:
        check_axes(axes, head_dim)
    split, _, other_dim = str(refusal.value).partition("for example ")[2].partition(" with a head dim of ")
    check_axes(ast.literal_eval(split), int(other_dim or head_dim))
    assert len(ast.literal_eval(split)) == len(axes)
    assert bool(other_dim) == (head_dim % 2 == 1)


def test_far_positions_stay_exact_in_low_precision():
    far = rope_table(torch.tensor([[100_000.0]]), (4,))
    assert far.dtype == torch.float64
    torch.testing.assert_close(far[0, 0, 0], torch.tensor(100_000.0, dtype=torch.float64).cos(), rtol=0, atol=1e-12)
