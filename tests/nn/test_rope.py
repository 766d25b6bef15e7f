import ast
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from reelflow.config import configuration, from_dict, to_dict
from reelflow.errors import ConfigError
from reelflow.nn.rope import (
    Centred,
    Coordinates,
    Extension,
    Inscribed,
    Interpolate,
    Ntk,
    Riflex,
    Spans,
    Squared,
    Steps,
    Stretch,
    Yarn,
    apply_rope,
    axial_frequencies,
    check_axes,
    full_width_frequencies,
    grid_positions,
    half_from_interleaved,
    interleaved_from_half,
    mixed_rope_table,
    permute_channels,
    rope_frequencies,
    rope_table,
    token_positions,
)

EVEN_SPLITS = st.lists(st.integers(0, 6).map(lambda half: 2 * half), min_size=3, max_size=3).filter(any)
GRIDS = st.tuples(*3 * [st.integers(1, 4)])
F64 = torch.float64


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


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
@given(
    axes=EVEN_SPLITS,
    grid=GRIDS,
    shift=st.tuples(*3 * [st.floats(-1000, 1000)]),
    theta=st.tuples(*3 * [st.floats(2, 1e5)]),
)
def test_scores_depend_on_relative_positions_only(axes, grid, shift, theta):
    here = grid_positions(*grid)
    there = here + torch.tensor(shift, dtype=F64)
    q, k = normal(1, 1, len(here), sum(axes)), normal(1, 1, len(here), sum(axes), seed=1)
    tables = [rope_table(positions, axes, theta=theta) for positions in (here, there)]
    scores = [apply_rope(q, table) @ apply_rope(k, table).mT for table in tables]
    torch.testing.assert_close(*scores, rtol=0, atol=1e-10)


@settings(max_examples=30, deadline=None)
@given(heads=st.integers(1, 3), half=st.integers(1, 4), grid=GRIDS, shift=st.tuples(*3 * [st.floats(-50, 50)]))
def test_scores_under_mixed_frequencies_depend_on_relative_positions_only(heads, half, grid, shift):
    frequencies, here = normal(3, heads, half, seed=2), grid_positions(*grid)
    q, k = (normal(2, heads, len(here), 2 * half, seed=seed) for seed in (0, 1))
    tables = [mixed_rope_table(p, frequencies) for p in (here, here + torch.tensor(shift, dtype=F64))]
    scores = [apply_rope(q, table) @ apply_rope(k, table).mT for table in tables]
    torch.testing.assert_close(*scores, rtol=0, atol=1e-10)


@pytest.mark.parametrize("axis", range(3))
def test_a_move_along_an_axis_turns_that_axis_only(axis):
    axes = (4, 6, 8)
    x, position = normal(1, 1, 1, 18), torch.zeros(1, 3, dtype=F64)
    position[0, axis] = 3
    unturned = torch.isclose(apply_rope(x, rope_table(position, axes)), x)[0, 0, 0].split(axes)
    assert [bool(part.all()) for part in unturned] == [i != axis for i in range(3)]
    assert not unturned[axis].any()


def test_pairs_are_complex_numbers_times_a_phase():
    x, positions = normal(2, 3, 6, 10), grid_positions(1, 2, 3)
    table = rope_table(positions, (2, 4, 4), theta=(5.0, 100.0, 7.0))
    frequencies = [(0, 1.0), (1, 1.0), (1, 100.0**-0.5), (2, 1.0), (2, 7.0**-0.5)]
    angles = torch.stack([positions[:, axis] * frequency for axis, frequency in frequencies], dim=-1)
    turned = torch.view_as_complex(x.unflatten(-1, (5, 2))) * torch.polar(torch.ones_like(angles), angles)
    torch.testing.assert_close(apply_rope(x, table), torch.view_as_real(turned).flatten(-2), rtol=0, atol=1e-13)


def test_far_positions_stay_exact():
    far = 100_000 + 1 / 3
    table = rope_table(torch.tensor([[far]], dtype=F64), (4,), theta=7.0)
    angles = torch.tensor([far, far / math.sqrt(7)], dtype=F64)
    torch.testing.assert_close(table[0], torch.stack([angles.cos(), angles.sin()], -1), rtol=0, atol=1e-10)


# Layouts


def turn_halves(x: torch.Tensor, table: torch.Tensor, blocks: tuple[int, ...]) -> torch.Tensor:
    """The half layout as checkpoints have it: within a block, channel i turns with channel i + m / 2."""
    halves = []
    for part, pairs in zip(x.split(blocks, -1), table.split([m // 2 for m in blocks], -2), strict=True):
        (first, second), (cos, sin) = part.chunk(2, dim=-1), pairs.unbind(-1)
        halves += [first * cos - second * sin, second * cos + first * sin]
    return torch.cat(halves, dim=-1)


@settings(max_examples=30, deadline=None)
@given(axes=EVEN_SPLITS, per_axis=st.booleans(), heads=st.integers(1, 3), grid=GRIDS)
def test_the_half_layout_is_the_same_rotation_of_permuted_channels(axes, per_axis, heads, grid):
    blocks = tuple(axes) if per_axis else (sum(axes),)
    table = rope_table(grid_positions(*grid), axes)
    x, order = normal(2, heads, len(table), sum(axes)), interleaved_from_half(blocks)
    halves = turn_halves(x, table, blocks)
    torch.testing.assert_close(apply_rope(x[..., order], table), halves[..., order], rtol=0, atol=1e-13)
    back = half_from_interleaved(blocks)
    torch.testing.assert_close(apply_rope(x[..., order], table)[..., back], halves, rtol=0, atol=1e-13)


@pytest.mark.parametrize("blocks", [(12,), (4, 2, 6)])
def test_permuted_projections_of_a_half_layout_checkpoint_give_its_attention_scores(blocks):
    heads, table = 2, rope_table(grid_positions(2, 2, 3), (4, 2, 6))
    x, norm = normal(12, 5), normal(12, seed=4)
    q, k = ((normal(24, 5, seed=s), normal(24, seed=s + 9)) for s in (1, 2))

    def scores(turn, order=None):
        def fit(w):
            return w if order is None else permute_channels(w, order)

        turned = [
            turn(((x @ fit(w).T + fit(b)).unflatten(-1, (heads, 12)).transpose(0, 1) * fit(norm))[None])
            for w, b in (q, k)
        ]
        return turned[0] @ turned[1].mT

    theirs = scores(lambda y: turn_halves(y, table, blocks))
    ours = scores(lambda y: apply_rope(y, table), interleaved_from_half(blocks))
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    assert not torch.allclose(scores(lambda y: apply_rope(y, table)), theirs)


# Tables per sample and per head


def test_a_table_per_sample_turns_each_sample_as_if_it_were_alone():
    positions = torch.stack([grid_positions(2, 3, 2), grid_positions(3, 2, 2) * 0.5 - 1])
    x, table = normal(2, 3, 12, 12), rope_table(positions, (4, 2, 6))
    alone = [apply_rope(x[i : i + 1], rope_table(positions[i], (4, 2, 6))) for i in range(2)]
    assert torch.equal(apply_rope(x, table), torch.cat(alone))
    frequencies = normal(3, 3, 6, seed=3)
    alone = [apply_rope(x[i : i + 1], mixed_rope_table(positions[i], frequencies)) for i in range(2)]
    torch.testing.assert_close(
        apply_rope(x, mixed_rope_table(positions, frequencies)), torch.cat(alone), rtol=0, atol=1e-13
    )


def test_axial_frequencies_for_every_head_mix_into_the_axial_table():
    positions, axes = grid_positions(2, 3, 2), (4, 0, 6)
    frequencies = axial_frequencies(axes, theta=50.0)
    assert (frequencies != 0).sum(0).tolist() == [1] * 5, "each pair belongs to one axis"
    mixed = mixed_rope_table(positions, frequencies[:, None].expand(-1, 2, -1))
    torch.testing.assert_close(
        mixed, rope_table(positions, axes, theta=50.0).expand(1, 2, -1, -1, -1), rtol=0, atol=1e-15
    )


def test_learned_frequencies_receive_the_gradient_of_what_they_turn():
    frequencies, x = normal(3, 2, 2).requires_grad_(), normal(1, 2, 4, 4)
    positions = grid_positions(2, 2, 1)
    assert torch.autograd.gradcheck(lambda f: apply_rope(x, mixed_rope_table(positions, f)), frequencies)


def test_full_width_frequencies_turn_the_axes_in_turn_and_leave_the_first_channels_alone():
    dim, heads = 20, 2  # three frequencies for three axes, two channels left over
    positions = token_positions(Spans(t=(-1.0, 1.0), h=(-1.0, 1.0), w=(-1.0, 1.0)), (2, 2, 3))
    x = normal(1, heads, 12, dim // heads)
    wide = x.transpose(1, 2).flatten(2).clone()  # B N D, before heads
    for n, position in enumerate(positions.tolist()):
        for j in range(3):
            for axis in range(3):
                pair = 1 + 3 * j + axis
                angle = 100.0 ** (j / 2) * math.pi / 2 * position[axis]
                a, b = wide[0, n, 2 * pair].item(), wide[0, n, 2 * pair + 1].item()
                wide[0, n, 2 * pair] = a * math.cos(angle) - b * math.sin(angle)
                wide[0, n, 2 * pair + 1] = b * math.cos(angle) + a * math.sin(angle)
    turned = apply_rope(x, mixed_rope_table(positions, full_width_frequencies(dim, heads, theta=100.0)))
    torch.testing.assert_close(turned.transpose(1, 2).flatten(2), wide, rtol=0, atol=1e-12)


# Positions


def test_plain_steps_are_the_integer_grid():
    assert torch.equal(token_positions(Steps(), (2, 3, 4)), grid_positions(2, 3, 4))


def test_steps_may_be_fractions_of_seconds_and_of_pixels():
    """p in [-1, 1] of 20 seconds and 2048 pixels; 8 frames a token, the first of 1 frame; tokens of 32 pixels."""
    step, size = (2 / 20, 2 * 32 / 2048, 2 * 32 / 2048), (3, 2, 2)
    for at in ("edge", "centre"):
        fractions = Steps(step=step, start=(-1.0, -1.0, -1.0), time="seconds", first=1 / 8, at=at)
        half = 0.5 * (at == "centre")
        rows = []
        for t in range(3):
            frames = (max(8 * t - 7, 0), 8 * (t + 1) - 7)
            seconds = (frames[0] + half * (frames[1] - frames[0])) / 24
            pixels = [[32 * (i + half) for i in place] for place in ((0, 0), (0, 1), (1, 0), (1, 1))]
            rows += [[2 * seconds / 20 - 1, 2 * h / 2048 - 1, 2 * w / 2048 - 1] for h, w in pixels]
        found = token_positions(fractions, size, token_rate=24 / 8)
        torch.testing.assert_close(found, torch.tensor(rows, dtype=F64), rtol=0, atol=1e-14)


def test_positions_in_seconds_are_each_samples_own():
    clock, rates = Steps(step=(6.0, 1.0, 1.0), time="seconds"), torch.tensor([6.0, 3.0, 12.0])
    together = token_positions(clock, (3, 2, 1), token_rate=rates)
    assert together.shape == (3, 6, 3)
    assert torch.equal(together, torch.stack([token_positions(clock, (3, 2, 1), token_rate=r.item()) for r in rates]))
    assert torch.equal(together[0], grid_positions(3, 2, 1)), "at the trained rate a step is a token"
    assert torch.equal(together[1, :, 0], 2 * together[0, :, 0]), "at half of it, two"


@settings(max_examples=20, deadline=None)
@given(grid=GRIDS, factor=st.integers(2, 4))
def test_spans_show_every_grid_the_same_box(grid, factor):
    """Cells of a finer grid fill those of a coarse one, so the mean of their centres is the coarse centre."""
    spans = Spans(t=None, h=(-1.0, 1.0), w=(0.0, 5.0))
    t, h, w = grid
    fine = token_positions(spans, (t, factor * h, factor * w)).view(t, h, factor, w, factor, 3).mean((2, 4))
    torch.testing.assert_close(fine.reshape(-1, 3), token_positions(spans, grid), rtol=0, atol=1e-12)
    edges = token_positions(Spans(t=None, h=(0.0, float(h)), w=(0.0, float(w)), at="edge"), grid)
    torch.testing.assert_close(edges, grid_positions(*grid), rtol=0, atol=1e-12)


@settings(max_examples=20, deadline=None)
@given(grid=GRIDS, area=st.none() | st.floats(1, 1e5))
def test_centred_grids_have_their_middle_at_zero_and_square_cells_of_equal_area(grid, area):
    positions = token_positions(Centred(area=area), grid).view(*grid, 3)
    assert torch.equal(positions[..., 0], grid_positions(*grid).view(*grid, 3)[..., 0])
    torch.testing.assert_close(positions, (positions.flip(1, 2) * torch.tensor([1, -1, -1])), rtol=0, atol=1e-12)
    side = 1.0 if area is None else math.sqrt(area / (grid[1] * grid[2]))
    for axis in (1, 2):
        steps = positions.diff(dim=axis)[..., axis]
        torch.testing.assert_close(steps, torch.full_like(steps, side), rtol=1e-10, atol=0)


@settings(max_examples=20, deadline=None)
@given(grid=GRIDS, factor=st.integers(1, 4))
def test_an_inscribed_grid_of_the_same_proportions_has_its_cells_edges(grid, factor):
    t, h, w = grid
    positions = token_positions(Inscribed(h, w), (t, factor * h, factor * w)).view(t, factor * h, factor * w, 3)
    torch.testing.assert_close(
        positions[:, ::factor, ::factor].reshape(-1, 3), grid_positions(*grid), rtol=0, atol=1e-12
    )


def test_an_inscribed_grid_of_other_proportions_lies_in_the_middle():
    narrow = token_positions(Inscribed(6, 9), (1, 3, 2))  # as a box of 6 x 4, two columns from the left
    columns = narrow.view(3, 2, 3)
    torch.testing.assert_close(columns[:, 0, 1], torch.tensor([0.0, 2.0, 4.0], dtype=torch.float64))
    torch.testing.assert_close(columns[0, :, 2], torch.tensor([2.0, 6.0 / 2], dtype=torch.float64))


def test_a_squared_grid_has_equal_sides_that_change_with_the_rounded_root_of_its_area():
    square = token_positions(Squared(5.0), (2, 5, 5))
    torch.testing.assert_close(square, grid_positions(2, 5, 5), rtol=0, atol=1e-12)
    wide = token_positions(Squared(5.0), (1, 2, 6)).view(2, 6, 3)  # 12 tokens, as 3 x 3
    side = 5.0 * 3 / math.sqrt(12)
    torch.testing.assert_close(wide[:, 0, 1], torch.tensor([0, side / 2], dtype=torch.float64))
    torch.testing.assert_close(wide[0, :, 2], torch.arange(6, dtype=torch.float64) * side / 6)


# Extensions


def stretched(by: Extension, channels: int, theta: float, trained: float, length: float) -> torch.Tensor:
    return rope_frequencies(channels, theta, stretch=Stretch(by, trained, length))


SHAPES = {
    "channels": st.integers(2, 32).map(lambda half: 2 * half),
    "theta": st.floats(2, 1e6),
    "trained": st.floats(1, 500),
    "ratio": st.floats(1.01, 16),
}


@settings(max_examples=40, deadline=None)
@given(**SHAPES)
def test_interpolated_frequencies_are_plain_ones_at_squeezed_positions(channels, theta, trained, ratio):
    slow, plain = stretched(Interpolate(), channels, theta, trained, ratio * trained), rope_frequencies(channels, theta)
    torch.testing.assert_close(slow * ratio, plain, rtol=1e-12, atol=0)


@settings(max_examples=40, deadline=None)
@given(**SHAPES)
def test_ntk_keeps_the_fastest_pair_and_interpolates_the_slowest_by_a_larger_theta(channels, theta, trained, ratio):
    found, plain = stretched(Ntk(), channels, theta, trained, ratio * trained), rope_frequencies(channels, theta)
    assert found[0] == plain[0] == 1
    torch.testing.assert_close(found[-1], plain[-1] / ratio, rtol=1e-12, atol=0)
    larger = rope_frequencies(channels, theta * ratio ** (channels / (channels - 2)))
    torch.testing.assert_close(found, larger, rtol=1e-11, atol=0)


@settings(max_examples=40, deadline=None)
@given(**SHAPES)
def test_yarn_keeps_pairs_of_many_turns_and_interpolates_pairs_of_few(channels, theta, trained, ratio):
    found, plain = stretched(Yarn(), channels, theta, trained, ratio * trained), rope_frequencies(channels, theta)
    for frequency, before in zip(found.tolist(), plain.tolist(), strict=True):
        wavelength = 2 * math.pi / before
        if trained / wavelength >= 32:
            expected = before
        elif trained / wavelength <= 1:
            expected = before / ratio
        else:
            kept = (trained / wavelength - 1) / 31
            expected = kept * before + (1 - kept) * before / ratio
        assert frequency == pytest.approx(expected, rel=1e-12)


def test_the_yarn_ramp_meets_its_boundaries():
    trained = 64 * math.pi  # frequencies 1, 1/4, 1/16 and 1/64 make 32, 8, 2 and 1/2 turns
    ratios = stretched(Yarn(slow=2.0, fast=8.0), 8, 256.0, trained, 4 * trained) / rope_frequencies(8, 256.0)
    assert ratios.tolist() == pytest.approx([1, 1, 0.25, 0.25], rel=1e-12)


def test_the_yarn_temperature_multiplies_scores_of_the_whole_head():
    q, k, positions, axes = normal(1, 1, 8, 12), normal(1, 1, 8, 12, seed=1), grid_positions(2, 2, 2), (4, 4, 4)
    plain, warm = (
        rope_table(positions, axes, stretch=(Stretch(Yarn(temperature=c), 2.0, 6.0), None, None)) for c in (0.0, 0.1)
    )
    scores = [apply_rope(q, table) @ apply_rope(k, table).mT for table in (plain, warm)]
    torch.testing.assert_close(scores[1], scores[0] * (1 + 0.1 * math.log(3)) ** 2, rtol=1e-12, atol=1e-12)


@settings(max_examples=60, deadline=None)
@given(**SHAPES, repeats_after=st.floats(1, 500))
def test_riflex_slows_the_pair_that_repeats_beyond_the_new_length_and_no_other(
    channels, theta, trained, ratio, repeats_after
):
    length = ratio * trained
    found, plain = stretched(Riflex(repeats_after), channels, theta, trained, length), rope_frequencies(channels, theta)
    periods = [2 * math.pi / frequency for frequency in plain.tolist()]
    intrinsic = min(range(len(periods)), key=lambda i: abs(periods[i] - repeats_after))
    assert 2 * math.pi / found[intrinsic] > length
    assert 2 * math.pi / found[intrinsic] == pytest.approx(max(periods[intrinsic], length / 0.9), rel=1e-12)
    others = torch.arange(len(plain)) != intrinsic
    assert torch.equal(found[others], plain[others])


def test_riflex_finds_the_published_intrinsic_pair():
    """Theta 256 on 16 channels, repetition seen at 48 latent frames: the fourth pair, of period 50 (Zhao et al. 2025)."""
    changed = stretched(Riflex(48.0), 16, 256.0, 33.0, 66.0) != rope_frequencies(16, 256.0)
    assert changed.nonzero().flatten().tolist() == [3]
    assert round(2 * math.pi / rope_frequencies(16, 256.0)[3].item()) == 50


@pytest.mark.parametrize("by", [Interpolate(), Ntk(), Yarn(temperature=0.1), Riflex(20.0)], ids=lambda by: by.kind)
def test_an_extension_slows_its_own_axis_only_and_none_to_the_trained_length(by):
    axes, positions = (8, 4, 4), grid_positions(3, 2, 2)
    plain = axial_frequencies(axes)
    found = axial_frequencies(axes, stretch=(Stretch(by, 13.0, 26.0), None, None))
    assert torch.equal(found[1:], plain[1:])
    assert (found[0] <= plain[0]).all()
    assert not torch.equal(found[0], plain[0])
    assert torch.equal(
        rope_table(positions, axes, stretch=(Stretch(by, 13.0, 13.0), None, None)), rope_table(positions, axes)
    )


# Refusals


@pytest.mark.parametrize("axes", [(4, 4, 4), (3, 5, 8), (-2, 10, 8), (16, 16, 16), (6, 6), (15,)])
@pytest.mark.parametrize("head_dim", [16, 20, 2, 15])
def test_a_bad_split_is_refused_with_one_that_works(axes, head_dim):
    with pytest.raises(ConfigError, match=f"sum to the head dim {head_dim}, got") as refusal:
        check_axes(axes, head_dim)
    split, _, other_dim = str(refusal.value).partition("for example ")[2].partition(" with a head dim of ")
    check_axes(ast.literal_eval(split), int(other_dim or head_dim))
    assert len(ast.literal_eval(split)) == len(axes)
    assert bool(other_dim) == (head_dim % 2 == 1)


GRID = grid_positions(1, 2, 2)
REFUSALS = {
    "odd channels": (lambda: rope_frequencies(7), "even number of channels, got 7; nearest: 8"),
    "theta": (lambda: rope_table(GRID, (2, 2, 2), theta=-3.0), "theta must be positive, got -3.0; 10000"),
    "two thetas": (lambda: rope_table(GRID, (2, 2, 2), theta=(9.0, 9.0)), r"one per axis \(3\), got 2"),
    "one stretch": (lambda: rope_table(GRID, (2, 2, 2), stretch=(None,)), r"one per axis \(3\), got 1"),
    "shorter": (lambda: Stretch(Ntk(), 33.0, 20.0), "beyond the trained length 33.0, got 20.0; nearest: 33.0"),
    "untrained": (lambda: Stretch(Ntk(), 0.0, 20.0), "trained length must be positive, got 0.0"),
    "ntk of a pair": (lambda: stretched(Ntk(), 2, 9.0, 2.0, 4.0), "two pairs, got an axis of 2 channels; nearest: 4"),
    "turns": (lambda: Yarn(slow=8.0, fast=8.0), "0 < slow < fast, got 8.0 and 8.0"),
    "temperature": (lambda: Yarn(temperature=-0.1), "not be negative, got -0.1; nearest: 0"),
    "repetition": (lambda: Riflex(0.0), "repeats_after must be positive, got 0.0"),
    "margin": (lambda: Riflex(20.0, margin=1.0), r"in \(0, 1\), got 1.0; nearest published: 0.9"),
    "step": (lambda: Steps(step=(1.0, 0.0, 1.0)), r"steps must be positive, got \(1.0, 0.0, 1.0\)"),
    "first": (lambda: Steps(first=1.5), r"in \(0, 1\], got 1.5"),
    "span": (lambda: Spans(t=None, h=(1.0, -1.0), w=(0.0, 1.0)), r"got h=\(1.0, -1.0\); nearest: \(-1.0, 1.0\)"),
    "area": (lambda: Centred(area=-4.0), "area must be positive, got -4.0"),
    "box": (lambda: Inscribed(0, 4), "at least 1 token, got 0 x 4"),
    "side": (lambda: Squared(0.0), "side must be positive, got 0.0"),
    "clock": (lambda: token_positions(Steps(time="seconds"), (1, 2, 2)), "need a positive token_rate, got None"),
    "blocks": (lambda: interleaved_from_half((4, 3)), r"must be even to have halves, got \(4, 3\); nearest: 4"),
    "rows": (lambda: permute_channels(normal(6, 2), interleaved_from_half((4,))), "6 rows are not a whole number"),
    "heads": (lambda: full_width_frequencies(20, 4), "does not cut into 4 heads of even size; nearest: 16"),
    "narrow": (lambda: full_width_frequencies(4, 1), "3 axes need a width of at least 6, got 4"),
}


@pytest.mark.parametrize("mistake", REFUSALS)
def test_a_mistake_is_refused_with_the_way_out(mistake):
    make, message = REFUSALS[mistake]
    with pytest.raises(ConfigError, match=message):
        make()


@configuration
class Holder:
    coordinates: Coordinates
    by: Extension


COORDINATES = [Steps(first=0.25), Spans(None, (0.0, 1.0), (-1.0, 1.0)), Centred(192.0), Inscribed(6, 9), Squared(32.0)]


@pytest.mark.parametrize("coordinates", COORDINATES)
@pytest.mark.parametrize("by", [Interpolate(), Ntk(), Yarn(temperature=0.1), Riflex(20.0)])
def test_coordinates_and_extensions_survive_json(coordinates, by):
    holder = Holder(coordinates, by)
    assert from_dict(Holder, to_dict(holder)) == holder
