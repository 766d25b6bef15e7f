import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from reelflow.errors import ConfigError
from reelflow.nn import patterns
from reelflow.nn.attention import attend
from reelflow.nn.patchify import Grid
from reelflow.nn.patterns import (
    Causal,
    Full,
    Gated,
    Pattern,
    Skip,
    Space,
    Time,
    Window,
    attend_causal,
    attend_pattern,
    attended_pairs,
    dense_mask,
)
from reelflow.nn.rope import apply_rope, grid_positions, rope_table


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def close(a: torch.Tensor, b: torch.Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


GRIDS = st.builds(Grid, st.integers(1, 5), st.integers(1, 4), st.integers(1, 4))


@st.composite
def windows(draw, grid: Grid) -> Window:
    extents = [draw(st.integers(1, n)) for n in grid]
    return Window(*extents, shift=tuple(draw(st.integers(0, extent - 1)) for extent in extents))


@st.composite
def skips(draw, grid: Grid) -> Skip:
    run = draw(st.integers(1, 4))
    return Skip(draw(st.integers(1, (grid.num_tokens - 1) // run + 1)), run)


def masks_on(grid: Grid) -> st.SearchStrategy[Pattern]:
    """Every pattern that is one mask, fit for the grid."""
    causal = st.builds(Causal, st.none() | st.integers(0, 4))
    return st.sampled_from([Full(), Space(), Time()]) | windows(grid) | skips(grid) | causal


@st.composite
def settings_of(draw, patterns_on=masks_on):
    grid = draw(GRIDS)
    return draw(patterns_on(grid)), grid, draw(st.integers(0, 3)), draw(st.booleans()), draw(st.integers(0, 99))


def inputs(grid: Grid, length: int, masked: bool, seed: int, *, batch: int = 2, heads: int = 2):
    """Queries, keys, values, and a mask that hides keys at random: a query may be left with none."""
    q, k, v = (normal(batch, heads, length + grid.num_tokens, 4, seed=3 * seed + i).requires_grad_() for i in range(3))
    mask = (normal(batch, 1, 1, length + grid.num_tokens, seed=seed) < 0.7) if masked else None
    return (q, k, v), mask


def gradients(y: torch.Tensor, *of: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return torch.autograd.grad((y * normal(*y.shape, seed=77)).sum(), of)


def masked_dense(pattern, q, k, v, grid, mask):
    length = k.shape[2] - grid.num_tokens
    seen = dense_mask(pattern, grid, length)[None, None, k.shape[2] - q.shape[2] :]
    return attend(q, k, v, mask=seen if mask is None else seen & mask)


@settings(max_examples=80, deadline=None)
@given(settings_of())
def test_a_pattern_is_dense_attention_under_its_mask(case):
    """Forward and gradients, over all grids, patterns, contexts and hidden keys."""
    pattern, grid, length, masked, seed = case
    qkv, mask = inputs(grid, length, masked, seed)
    ours, dense = attend_pattern(pattern, *qkv, grid, mask=mask), masked_dense(pattern, *qkv, grid, mask)
    close(ours, dense)
    for mine, theirs in zip(gradients(ours, *qkv), gradients(dense, *qkv), strict=True):
        close(mine, theirs)


@settings(max_examples=20, deadline=None)
@given(settings_of(lambda grid: st.builds(Gated, st.sampled_from(["scalar", "head", "token"]))))
def test_a_gated_mix_is_alpha_of_space_and_the_rest_of_time(case):
    """Forward and gradients, the gradient of alpha among them."""
    pattern, grid, length, masked, seed = case
    qkv, mask = inputs(grid, length, masked, seed)
    shape = {"scalar": (1, 1, 1), "head": (1, 1, 2), "token": (2, grid.num_tokens, 1)}[pattern.granularity]
    alpha = normal(*shape, seed=seed).sigmoid().requires_grad_()
    ours = attend_pattern(pattern, *qkv, grid, mask=mask, alpha=alpha)
    space, time = (masked_dense(part, *qkv, grid, mask).unflatten(-1, (2, 4)) for part in (Space(), Time()))
    weight = torch.cat([torch.ones(2, length, 2), alpha.expand(2, grid.num_tokens, 2)], dim=1)[..., None]
    dense = (weight * space + (1 - weight) * time).flatten(-2)
    close(ours, dense)
    for mine, theirs in zip(gradients(ours, *qkv, alpha), gradients(dense, *qkv, alpha), strict=True):
        close(mine, theirs)


@settings(max_examples=20, deadline=None)
@given(settings_of(lambda grid: masks_on(grid) | st.just(Gated())))
def test_without_context_queries_only_the_videos_rows_come_back(case):
    pattern, grid, length, masked, seed = case
    (q, k, v), mask = inputs(grid, length, masked, seed)
    alpha = torch.full((1, 1, 1), 0.3, dtype=torch.float64)
    whole = attend_pattern(pattern, q, k, v, grid, mask=mask, alpha=alpha)
    close(attend_pattern(pattern, q[:, :, length:], k, v, grid, mask=mask, alpha=alpha), whole[:, length:])


@settings(max_examples=25, deadline=None)
@given(settings_of(lambda grid: masks_on(grid) | st.just(Gated())), st.booleans())
def test_pairs_are_counted_as_the_mask_has_them_and_as_they_are_computed(case, context_queries):
    pattern, grid, length, masked, seed = case
    pairs = attended_pairs(pattern, grid, length, context_queries=context_queries)
    rows = slice(0 if context_queries else length, None)
    if isinstance(pattern, Gated):
        once = dense_mask(Full(), grid, length)[:length].sum() * context_queries
        assert pairs == once + sum(dense_mask(part, grid, length)[length:].sum() for part in (Space(), Time()))
    else:
        assert pairs == dense_mask(pattern, grid, length)[rows].sum()

    computed = []

    def counting(q, k, v, *, mask):
        computed.append(q.shape[0] * q.shape[2] * k.shape[2])
        return attend(q, k, v, mask=mask)

    (q, k, v), mask = inputs(grid, length, masked, seed, batch=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(patterns, "attend", counting)
        attend_pattern(pattern, q[:, :, rows], k, v, grid, mask=mask, alpha=torch.full((1, 1, 1), 0.5).double())
    assert pairs == sum(computed)


@settings(max_examples=25, deadline=None)
@given(
    settings_of(lambda grid: st.builds(Causal, st.none() | st.integers(0, 4))),
    st.lists(st.integers(1, 3), min_size=5, max_size=5),
)
def test_causal_attention_chunk_by_chunk_equals_the_whole(case, chunks):
    """Also its gradients, which reach back through the cache."""
    pattern, grid, length, masked, seed = case
    qkv, mask = inputs(grid, length, masked, seed)
    whole, cache = attend_pattern(pattern, *qkv, grid, mask=mask), None
    parts, frame, start = [], grid.h * grid.w, 0
    while start < grid.t:
        chunk = grid._replace(t=min(chunks[len(parts)], grid.t - start))
        first, last = length + start * frame, length + (start + chunk.t) * frame
        rows = slice(first if start else 0, last)
        hidden = None if mask is None else mask[..., rows]
        part, cache = attend_causal(pattern, *(x[:, :, rows] for x in qkv), chunk, mask=hidden, cache=cache)
        parts.append(part)
        start += chunk.t
    kept = grid.t if pattern.back is None else min(grid.t, pattern.back)
    assert cache.k.shape[2] == length + kept * frame
    close(torch.cat(parts, dim=1), whole)
    for mine, theirs in zip(gradients(torch.cat(parts, dim=1), *qkv), gradients(whole, *qkv), strict=True):
        close(mine, theirs)


def test_a_cache_is_a_value_and_a_chunk_may_be_tried_twice_from_it():
    grid, (q, k, v) = Grid(1, 2, 2), [normal(1, 1, 4, 4, seed=i) for i in range(3)]
    _, cache = attend_causal(Causal(), q, k, v, grid)
    before = cache.k.clone()
    attend_causal(Causal(), q, 9 * k, v, grid, cache=cache)
    first, _ = attend_causal(Causal(), q, k, v, grid, cache=cache)
    second, _ = attend_causal(Causal(), q, k, v, grid, cache=cache)
    assert torch.equal(first, second)
    assert torch.equal(cache.k, before)


def test_a_chunk_may_be_masked_where_what_came_before_was_not():
    pattern, grid = Causal(), Grid(2, 1, 3)
    (q, k, v), mask = inputs(grid, 0, True, 4)
    mask[..., :3] = True
    _, cache = attend_causal(pattern, q[:, :, :3], k[:, :, :3], v[:, :, :3], Grid(1, 1, 3))
    part, _ = attend_causal(pattern, *(x[:, :, 3:] for x in (q, k, v)), Grid(1, 1, 3), mask=mask[..., 3:], cache=cache)
    close(part, attend_pattern(pattern, q, k, v, grid, mask=mask)[:, 3:])


def drawn(mask: torch.Tensor) -> str:
    return "\n".join("".join("#" if seen else "." for seen in row) for row in mask.tolist())


@pytest.mark.parametrize(
    ("pattern", "grid", "length", "picture"),
    [
        (Space(), Grid(2, 1, 2), 1, "#####\n###..\n###..\n#..##\n#..##"),
        (Time(), Grid(2, 1, 2), 1, "#####\n##.#.\n#.#.#\n##.#.\n#.#.#"),
        (Causal(), Grid(3, 1, 1), 1, "#...\n##..\n###.\n####"),
        (Causal(back=1), Grid(3, 1, 1), 0, "#..\n##.\n.##"),
        (Window(1, 1, 2), Grid(1, 1, 5), 0, "##...\n##...\n..##.\n..##.\n....#"),
        (Window(1, 1, 2, shift=(0, 0, 1)), Grid(1, 1, 4), 0, "#...\n.##.\n.##.\n...#"),
        (Skip(2), Grid(1, 1, 4), 0, "#.#.\n.#.#\n#.#.\n.#.#"),
        (Skip(2, run=2), Grid(1, 1, 5), 0, "##..#\n##..#\n..##.\n..##.\n##..#"),
    ],
    ids=lambda value: repr(value) if not isinstance(value, str) else "",
)
def test_masks_look_as_drawn(pattern, grid, length, picture):
    assert drawn(dense_mask(pattern, grid, length)) == picture


def test_a_shifted_window_never_joins_opposite_borders():
    mask = dense_mask(Window(2, 2, 2, shift=(1, 1, 1)), Grid(4, 4, 4))
    distance = (grid_positions(4, 4, 4)[:, None] - grid_positions(4, 4, 4)).abs().amax(-1)
    assert distance[mask].max() == 1


def test_window_and_shifted_window_in_turn_reach_where_one_alone_does_not():
    grid, plain = Grid(1, 1, 8), Window(1, 1, 4)
    shifted = Window(1, 1, 4, shift=(0, 0, 2))
    one, other = dense_mask(plain, grid).double(), dense_mask(shifted, grid).double()
    assert not (one @ one)[0, 4:].any()
    assert (one @ other @ one)[0].all()


def test_space_and_time_in_turn_reach_every_token_and_so_do_the_two_skips():
    grid = Grid(3, 4, 3)
    for a, b in ((Space(), Time()), (Skip(3), Skip(3, run=3))):
        first, second = (dense_mask(pattern, grid).double() for pattern in (a, b))
        assert (first @ second).all()
        assert not (first @ first).all()


def test_a_window_of_the_whole_grid_is_full_of_one_frame_space_and_of_one_place_time():
    grid = Grid(3, 2, 4)
    for window, same in ((Window(3, 2, 4), Full()), (Window(1, 2, 4), Space()), (Window(3, 1, 1), Time())):
        assert torch.equal(dense_mask(window, grid), dense_mask(same, grid))


def test_full_attention_costs_st_over_s_plus_t_times_as_much_as_space_and_time():
    s, t = 12, 5
    grid = Grid(t, 3, 4)
    factorised = attended_pairs(Space(), grid) + attended_pairs(Time(), grid)
    assert factorised == t * s**2 + s * t**2
    assert attended_pairs(Full(), grid) / factorised == s * t / (s + t)
    assert attended_pairs(Gated(), grid) == factorised


@pytest.mark.parametrize("pattern", [Full(), Space(), Time(), Window(2, 1, 2, shift=(1, 0, 1)), Causal(back=2)])
def test_one_table_of_rotations_serves_every_pattern(pattern):
    """Moving the whole grid changes nothing in any of its groups."""
    grid = Grid(3, 2, 3)
    q, k, v = (normal(1, 2, grid.num_tokens, 12, seed=i) for i in range(3))
    here, there = (
        rope_table(grid_positions(*grid) + torch.tensor(offset), (4, 4, 4)) for offset in ([0.0] * 3, [7.0, -3.0, 2.0])
    )
    before, after = (attend_pattern(pattern, apply_rope(q, r), apply_rope(k, r), v, grid) for r in (here, there))
    close(before, after)


def test_bfloat16_stays_near_float64_in_every_pattern():
    grid = Grid(4, 3, 2)
    (q, k, v), mask = inputs(grid, 2, True, 5)
    mask[..., :1] = True
    alpha = torch.full((1, 1, 2), 0.25)
    for pattern in (Full(), Space(), Time(), Window(3, 2, 2, shift=(1, 1, 0)), Skip(5, run=2), Causal(back=1), Gated()):
        exact = attend_pattern(pattern, q, k, v, grid, mask=mask, alpha=alpha)
        rough = attend_pattern(pattern, *(x.bfloat16() for x in (q, k, v)), grid, mask=mask, alpha=alpha)
        assert rough.dtype == torch.bfloat16
        assert (rough - exact).norm() < 0.02 * exact.norm()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Window(0, 2, 2), "a window is at least 1 token long, got t=0; nearest: 1"),
        (lambda: Window(1, 2, 2, shift=(0, -1, 0)), "h=2 is shifted by 0 to 1 tokens, got -1; nearest: 0"),
        (lambda: Window(1, 2, 2, shift=(0, 0, 2)), "w=2 is shifted by 0 to 1 tokens, got 2; nearest: 1"),
        (lambda: Skip(0), "must be at least 1, got 0 and 1; nearest: 1 and 1"),
        (lambda: Skip(2, run=-1), "got 2 and -1; nearest: 2 and 1"),
        (lambda: Causal(back=-1), "back counts frames, got -1; nearest: 0"),
    ],
)
def test_an_impossible_pattern_is_refused(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        (Window(1, 4, 2), r"a window of h=4 tokens is larger than the grid of \(2, 3, 3\) tokens; nearest: 3"),
        (Skip(7, run=3), r"7 groups of runs of 3 tokens need more than 18 tokens, got 18; nearest: stride=6"),
    ],
)
def test_a_pattern_that_does_not_fit_the_grid_is_refused_wherever_they_meet(pattern, message):
    grid, x = Grid(2, 3, 3), torch.zeros(1, 1, 18, 4)
    for meet in (
        lambda: attend_pattern(pattern, x, x, x, grid),
        lambda: dense_mask(pattern, grid),
        lambda: attended_pairs(pattern, grid),
    ):
        with pytest.raises(ConfigError, match=message):
            meet()


def test_a_gated_mix_without_alpha_or_asked_for_one_mask_is_refused():
    grid, x = Grid(2, 1, 1), torch.zeros(1, 1, 2, 4)
    with pytest.raises(ConfigError, match="gated attention needs alpha"):
        attend_pattern(Gated(), x, x, x, grid)
    with pytest.raises(ConfigError, match=r"has two masks; ask for those of Space\(\) and Time\(\)"):
        dense_mask(Gated(), grid)


@settings(max_examples=30, deadline=None)
@given(settings_of())
def test_a_key_outside_the_pattern_gets_no_gradient(case):
    pattern, grid, length, _, seed = case
    (q, k, v), _ = inputs(grid, length, False, seed)
    seen = dense_mask(pattern, grid, length)
    assume(not seen.all())
    row = int((~seen).any(1).nonzero()[0])
    (gradient,) = torch.autograd.grad(attend_pattern(pattern, q, k, v, grid)[:, row].sum(), v)
    assert torch.equal(gradient.any(-1).any(0).any(0), seen[row])
