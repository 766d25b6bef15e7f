import json
import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from reelflow.config import from_dict, to_dict
from reelflow.diffusion.timesteps import (
    BetaSchedule,
    CosMap,
    ExponentialShift,
    KarrasSchedule,
    LinearQuadraticSchedule,
    LinearSchedule,
    LogitNormal,
    Mode,
    SquareRootShift,
    TableSchedule,
    TableShift,
    Uniform,
    draw_times,
    inference_times,
    shift_for,
    shift_times,
    shifted_density,
)
from reelflow.errors import ConfigError

CRITICAL = math.sqrt(math.log(2 / 0.01) / 2)  # of Kolmogorov-Smirnov distance x sqrt(samples), at 1 %

DISTRIBUTIONS = st.one_of(
    st.just(Uniform()),
    st.builds(LogitNormal, st.floats(-2, 2), st.floats(0.2, 3)),
    st.builds(Mode, st.floats(-0.99, 1.74)),
    st.just(CosMap()),
)
SCHEDULES = st.one_of(
    st.just(LinearSchedule()),
    st.builds(LinearQuadraticSchedule, st.floats(0.001, 0.5)),
    st.builds(KarrasSchedule, st.floats(1, 10), st.floats(5, 200), st.floats(1e-3, 0.1)),
    st.builds(BetaSchedule, st.floats(0.3, 5), st.floats(0.3, 5)),
)
TABLES = st.lists(st.floats(1e-3, 1e3), min_size=2, max_size=12, unique_by=lambda ratio: round(math.log(ratio), 3))
RATIOS = (80.0, 14.6, 6.3, 2.7, 1.1, 0.4, 0.002)  # of some table
EVERY_KIND = (
    *(Uniform(), LogitNormal(0.3, 0.8), Mode(1.29), CosMap()),
    *(SquareRootShift(1024, 1.5), ExponentialShift((256, 4096), (0.5, 1.15)), TableShift(((1560, 5.0), (3600, 9.0)))),
    *(LinearSchedule(), LinearQuadraticSchedule(), KarrasSchedule(), BetaSchedule(), TableSchedule(RATIOS)),
)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def inner(num: int) -> torch.Tensor:
    return torch.linspace(0, 1, num + 1, dtype=torch.float64)[1:-1]


def distance(u: torch.Tensor) -> float:
    """The largest gap between the empirical distribution of u and the uniform one."""
    u = u.double().sort().values
    rank = torch.arange(len(u)) / len(u)
    return torch.maximum(u - rank, rank + 1 / len(u) - u).max().item()


@settings(max_examples=30, deadline=None)
@given(shift=st.floats(0.05, 20))
def test_a_shift_translates_the_logit_and_its_inverse_undoes_it(shift):
    t = torch.linspace(0.01, 0.99, 50, dtype=torch.float64)
    shifted = shift_times(t, shift)
    torch.testing.assert_close(shifted.logit(), t.logit() - math.log(shift), rtol=0, atol=1e-12)
    torch.testing.assert_close(shift_times(shifted, 1 / shift), t, rtol=0, atol=1e-12)
    sigma = 1 - t
    torch.testing.assert_close(1 - shifted, shift * sigma / (1 + (shift - 1) * sigma), rtol=0, atol=1e-12)


@pytest.mark.parametrize("shift", [0.1, 1.0, 3.0, 17.0])
def test_the_ends_stay_where_they_are(shift):
    assert shift_times(torch.tensor([0.0, 1.0]), shift).tolist() == [0, 1]


@settings(max_examples=60, deadline=None)
@given(distribution=DISTRIBUTIONS)
def test_quantile_and_cdf_undo_each_other_and_keep_the_ends(distribution):
    u = inner(100)
    torch.testing.assert_close(distribution.cdf(distribution.quantile(u)), u, rtol=0, atol=1e-10)
    t = distribution.quantile(u)
    torch.testing.assert_close(distribution.quantile(distribution.cdf(t)), t, rtol=0, atol=1e-12)
    ends = torch.tensor([0.0, 1.0], dtype=torch.float64)
    torch.testing.assert_close(distribution.quantile(ends), ends, rtol=0, atol=1e-15)
    torch.testing.assert_close(distribution.cdf(ends), ends, rtol=0, atol=1e-15)


@settings(max_examples=60, deadline=None)
@given(distribution=DISTRIBUTIONS, shift=st.floats(0.1, 15))
def test_the_density_is_the_derivative_of_the_inverse_of_the_quantile(distribution, shift):
    u = inner(100).requires_grad_()
    t = shift_times(distribution.quantile(u), shift)
    (slope,) = torch.autograd.grad(t.sum(), u)
    torch.testing.assert_close(shifted_density(distribution, t.detach(), shift=shift) * slope, torch.ones(99).double())


@settings(max_examples=25, deadline=None)
@given(distribution=DISTRIBUTIONS, shift=st.floats(0.2, 8))
def test_the_density_integrates_to_one(distribution, shift):
    """By Simpson's rule over s with t = 3 s^2 - 2 s^3, which is dense where a density may be steep: at the ends."""
    num = 20_000
    s = torch.linspace(0, 1, num + 1, dtype=torch.float64)
    weight = torch.tensor([2.0, 4.0], dtype=torch.float64).repeat(num // 2 + 1)[: num + 1].clone()
    weight[0] = weight[-1] = 1
    t = s.square() * (3 - 2 * s)
    mass = (weight * shifted_density(distribution, t, shift=shift) * 6 * s * (1 - s)).sum() / (3 * num)
    assert mass.item() == pytest.approx(1, abs=1e-4)


@settings(max_examples=30, deadline=None)
@given(mean=st.floats(-3, 3), std=st.floats(0.1, 3), shift=st.floats(0.05, 20))
def test_a_shifted_logit_normal_is_one_whose_mean_is_less_by_the_log_of_the_shift(mean, std, shift):
    t, moved = inner(200), LogitNormal(mean - math.log(shift), std)
    torch.testing.assert_close(shifted_density(LogitNormal(mean, std), t, shift=shift), moved.density(t))
    torch.testing.assert_close(shift_times(LogitNormal(mean, std).quantile(t), shift), moved.quantile(t))


def test_the_logistic_of_a_normal_draw_less_the_log_of_the_shift_follows_the_shifted_distribution():
    t = torch.sigmoid(torch.randn(20_000, generator=seeded()).double() * 0.8 + 0.3 - math.log(3))
    u = LogitNormal(0.3, 0.8).cdf(shift_times(t, 1 / 3))
    assert distance(u) < CRITICAL / 20_000**0.5
    assert distance(LogitNormal(0.3, 0.8).cdf(shift_times(t, 1 / 2.8))) > CRITICAL / 20_000**0.5


@settings(max_examples=20, deadline=None)
@given(scale=st.floats(-1, 1.7519))
def test_mode_and_cosmap_are_the_published_maps_in_a_time_that_runs_the_other_way(scale):
    u = inner(64)
    theirs = 1 - u - scale * (torch.cos(math.pi / 2 * u).square() - 1 + u)
    torch.testing.assert_close(Mode(scale).quantile(u), 1 - theirs, rtol=0, atol=1e-14)
    theirs = 1 - 1 / (torch.tan(math.pi / 2 * u) + 1)
    torch.testing.assert_close(CosMap().quantile(1 - u), 1 - theirs, rtol=0, atol=1e-14)


@settings(max_examples=30, deadline=None)
@given(distribution=DISTRIBUTIONS, num=st.integers(1, 200), seed=st.integers(0, 99))
def test_one_time_is_drawn_from_each_equal_part_in_rising_order(distribution, num, seed):
    parts = distribution.cdf(draw_times(distribution, num, seeded(seed)).double()) * num
    low = torch.arange(num).double()
    assert (parts > low - 2e-3).all()
    assert (parts < low + 1 + 2e-3).all()


@pytest.mark.parametrize(
    "distribution", [Uniform(), LogitNormal(0.7, 0.5), Mode(1.29), CosMap()], ids=lambda distribution: distribution.kind
)
@pytest.mark.parametrize("shift", [1.0, 7.0])
def test_independent_draws_pass_the_kolmogorov_smirnov_test_and_fail_it_for_a_neighbour(distribution, shift):
    num = 20_000
    t = draw_times(distribution, num, seeded(), shift=shift, stratified=False).double()
    assert distance(distribution.cdf(shift_times(t, 1 / shift))) < CRITICAL / num**0.5
    assert distance(distribution.cdf(shift_times(t, 1 / (1.1 * shift)))) > CRITICAL / num**0.5


@pytest.mark.parametrize("stratified", [True, False])
def test_a_seed_fixes_every_draw(stratified):
    first, again, other = (draw_times(CosMap(), 9, seeded(seed), stratified=stratified) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_a_shift_may_be_a_number_a_square_root_an_exponential_or_a_table():
    assert shift_for(3.0, 1) == shift_for(3.0, 10**6) == 3
    assert shift_for(SquareRootShift(1024, 1.5), 4 * 1024) == pytest.approx(3)
    images = ExponentialShift((256, 4096), (0.5, 1.15))
    assert [shift_for(images, n) for n in (256, 4096)] == pytest.approx([math.exp(0.5), math.exp(1.15)])
    assert shift_for(images, 256 + 2 * 3840) == pytest.approx(math.exp(0.5 + 2 * 0.65))  # the line goes on
    table = TableShift(((1560, 5.0), (3600, 9.0)))
    assert [shift_for(table, n) for n in (1560, 3600)] == [5, 9]
    assert shift_for(TableShift(((100, 2.0),)), 100) == 2


def test_the_exponential_of_mu_is_the_shift_of_the_published_formula():
    """Written as e^mu / (e^mu + (1 / sigma - 1)), with mu 0.95 at 1,024 and 2.05 at 4,096 tokens."""
    sigma, mu = inner(20), 0.95 + (2.05 - 0.95) * (2000 - 1024) / (4096 - 1024)
    shifted = shift_times(1 - sigma, shift_for(ExponentialShift((1024, 4096), (0.95, 2.05)), 2000))
    torch.testing.assert_close(1 - shifted, math.exp(mu) / (math.exp(mu) + (1 / sigma - 1)))


@settings(max_examples=30, deadline=None)
@given(num_tokens=st.integers(100, 10_000))
def test_a_table_of_a_power_law_is_that_power_law_in_between(num_tokens):
    law = SquareRootShift(400, 2.0)
    table = TableShift(tuple((n, law.at(n)) for n in (100, 700, 3000, 10_000)))
    assert shift_for(table, num_tokens) == pytest.approx(shift_for(law, num_tokens))


@settings(max_examples=100, deadline=None)
@given(schedule=SCHEDULES | TABLES, num_steps=st.integers(1, 60), shift=st.floats(0.1, 20))
def test_every_schedule_rises_strictly_from_exactly_zero_to_exactly_one(schedule, num_steps, shift):
    if isinstance(schedule, list):
        schedule = TableSchedule(tuple(sorted(schedule, reverse=True)))
    times = inference_times(num_steps, shift=shift, schedule=schedule)
    assert times.dtype == torch.float64
    assert len(times) == num_steps + 1
    assert (times[0].item(), times[-1].item()) == (0, 1)
    assert (times.diff() > 0).all()
    base = inference_times(num_steps, schedule=schedule)
    torch.testing.assert_close(times, shift_times(base, shift), rtol=0, atol=1e-15)


def test_linear_times_are_evenly_spaced_and_are_the_default():
    assert torch.equal(inference_times(7), torch.linspace(0, 1, 8, dtype=torch.float64))


@pytest.mark.parametrize("num_steps", [2, 7, 50, 64])
def test_linear_quadratic_times_are_linear_then_quadratic_without_a_kink(num_steps):
    steps = inference_times(num_steps, schedule=LinearQuadraticSchedule()).diff()
    half = num_steps // 2
    torch.testing.assert_close(steps[:half], torch.full((half,), 0.025 / half).double())
    bend = steps[half - 1 :].diff()  # of a parabola that leaves the line at its own slope: a, then 2a, 2a, ...
    torch.testing.assert_close(bend[1:], 2 * bend[0].expand(num_steps - half - 1))


@settings(max_examples=30, deadline=None)
@given(rho=st.floats(1, 12), num_steps=st.integers(2, 100))
def test_karras_times_are_even_in_a_root_of_the_noise_ratio_and_end_where_asked(rho, num_steps):
    times = inference_times(num_steps, schedule=KarrasSchedule(rho, 80.0, 0.002))
    ratios = (1 / times - 1)[1:-1]
    assert ratios[-1].item() == pytest.approx(0.002)
    step = (80 ** (1 / rho) - 0.002 ** (1 / rho)) / (num_steps - 1)
    roots = torch.cat([torch.tensor([80.0]).double(), ratios]) ** (1 / rho)
    torch.testing.assert_close(roots.diff(), torch.full((num_steps - 1,), -step).double())


@pytest.mark.parametrize(
    ("alpha", "beta", "quantile"),
    [
        (1.0, 1.0, lambda u: u),
        (0.5, 0.5, lambda u: torch.sin(math.pi / 2 * u).square()),
        (3.0, 1.0, lambda u: u ** (1 / 3)),
        (0.3, 1.0, lambda u: u ** (1 / 0.3)),
        (1.0, 20.0, lambda u: 1 - (1 - u) ** (1 / 20)),
    ],
)
def test_beta_times_are_the_quantiles_known_in_closed_form(alpha, beta, quantile):
    times = inference_times(40, schedule=BetaSchedule(alpha, beta))
    torch.testing.assert_close(times, quantile(inference_times(40)), rtol=0, atol=1e-13)


def test_beta_times_are_denser_at_both_ends_and_hold_equal_shares():
    times = inference_times(10, schedule=BetaSchedule())
    torch.testing.assert_close(times, 1 - times.flip(0), rtol=0, atol=1e-13)
    assert (times.diff().diff()[:4] > 0).all()
    s = (torch.arange(400_000).double() + 0.5) / 400_000  # midpoints in s with t = sin^2(pi s / 2), as Beta(0.5, 0.5)
    mass = (s * math.pi / 2).sin().pow(0.2) * (s * math.pi / 2).cos().pow(0.2)
    shares = torch.histogram((s * math.pi / 2).sin().square(), times, weight=mass / mass.sum()).hist
    torch.testing.assert_close(shares, torch.full((10,), 0.1).double(), rtol=0, atol=1e-5)


def test_a_table_is_itself_at_its_own_number_of_steps_and_loglinear_between():
    own = inference_times(len(RATIOS) - 1, schedule=TableSchedule(RATIOS))
    torch.testing.assert_close((1 / own - 1)[1:-1], torch.tensor(RATIOS[1:-1]).double())
    doubled = inference_times(2 * (len(RATIOS) - 1), schedule=TableSchedule(RATIOS))
    torch.testing.assert_close(doubled[::2], own)
    means = [math.sqrt(a * b) for a, b in pairwise(RATIOS)]
    torch.testing.assert_close((1 / doubled - 1)[1::2], torch.tensor(means).double())


@pytest.mark.parametrize("num_steps", [2, 9, 40])
def test_times_may_be_stretched_so_that_the_last_step_starts_at_a_given_sigma(num_steps):
    plain, times = inference_times(num_steps, shift=3.0), inference_times(num_steps, shift=3.0, last_sigma=0.1)
    assert 1 - times[-2].item() == pytest.approx(0.1)
    assert times[-1] == 1
    if num_steps > 2:
        torch.testing.assert_close(times[1:-1] / plain[1:-1], (times[1] / plain[1]).expand(num_steps - 1))


@pytest.mark.parametrize("value", EVERY_KIND, ids=lambda value: type(value).__name__)
def test_every_value_survives_json(value):
    assert from_dict(type(value), json.loads(json.dumps(to_dict(value)))) == value


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (lambda: inference_times(0), "num_steps must be at least 1, got 0; nearest: 1"),
        (lambda: inference_times(4, shift=-1.0), "shift must be positive, got -1.0; nearest: 1"),
        (lambda: shift_times(torch.zeros(1), math.nan), "shift must be positive, got nan"),
        (lambda: shift_times(torch.zeros(1), math.inf), "shift must be positive and finite, got inf"),
        (lambda: LogitNormal(std=0.0), "std must be positive, got 0.0; nearest: 1"),
        (lambda: draw_times(Uniform(), 0, seeded()), "at least 1, got 0; nearest: 1"),
        (lambda: LogitNormal(math.inf), "mean must be finite, got inf; nearest: 0"),
        (lambda: Mode(2.0), "got 2.0; nearest: 1.7519"),
        (lambda: Mode(-1.5), "got -1.5; nearest: -1"),
        (lambda: SquareRootShift(0), "tokens must be at least 1, got 0; nearest: 1"),
        (lambda: ExponentialShift((9, 9), (0.0, 1.0)), r"nearest: \(9, 10\)"),
        (lambda: ExponentialShift((1, 9), (0.0, math.nan)), "mu must be finite"),
        (lambda: shift_for(ExponentialShift((1, 2), (0.0, 9.0)), 1000), "positive and finite, got inf"),
        (lambda: TableShift(()), "at least one row"),
        (lambda: TableShift(((9, 1.0), (9, 2.0))), "must rise, got 9 before 9; nearest: 10"),
        (lambda: shift_for(TableShift(((9, 1.0), (20, 2.0))), 21), "from 9 to 20 tokens, got 21; nearest: 20"),
        (lambda: shift_for(TableShift(((9, 1.0), (20, 2.0))), 8), "nearest: 9"),
        (lambda: shift_for(-2.0, 8), "shift must be positive, got -2.0"),
        (lambda: shift_for(1.0, 0), "tokens must be at least 1, got 0"),
        (lambda: LinearQuadraticSchedule(0.6), "at most 0.5, got 0.6; nearest: 0.5"),
        (lambda: KarrasSchedule(rho=0.0), "rho must be positive, got 0.0; nearest: 7"),
        (lambda: KarrasSchedule(ratio_max=0.001), "nearest: 0.002 and 0.001"),
        (lambda: BetaSchedule(beta=21.0), "beta must be above 0 and at most 20, got 21.0; nearest: 20"),
        (lambda: TableSchedule((3.0,)), "at least two ratios"),
        (lambda: TableSchedule((3.0, 0.0)), "every ratio must be positive, got 0.0"),
        (lambda: TableSchedule((3.0, 4.0, 1.0)), r"got 3.0 before 4.0; nearest: \(4.0, 3.0, 1.0\)"),
        (lambda: inference_times(1, last_sigma=0.1), "at least 2, got 1"),
        (lambda: inference_times(4, last_sigma=1.0), "last_sigma must lie between 0 and 1, got 1.0"),
        (lambda: inference_times(50, schedule=BetaSchedule(0.6, 0.02)), "two of 51 times in one place"),
    ],
)
def test_impossible_numbers_are_refused_with_a_way_out(asked, message):
    with pytest.raises(ConfigError, match=message):
        asked()
