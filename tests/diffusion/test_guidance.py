import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from reelflow.diffusion.guidance import (
    AdaptiveProjection,
    away_from,
    away_from_fitted,
    away_from_perturbed,
    composed,
    guided,
    nested,
    over_frames,
    rescale,
    steered,
    stepwise,
    within,
    zero_start,
)
from reelflow.diffusion.process import Parameterization, VariancePreserving, along_frames
from reelflow.diffusion.samplers import euler, heun
from reelflow.diffusion.timesteps import inference_times
from reelflow.errors import ConfigError

SHAPE = (2, 3, 4, 2, 2)
FLOW = Parameterization()


def normal(seed: int) -> torch.Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Network:
    """A velocity that depends on x and t, and how often it was asked."""

    def __init__(self, seed: int) -> None:
        self.value, self.calls = normal(seed), 0

    def at(self, x, t):
        return self.value.to(x.dtype) * (1 + along_frames(t)) + x

    def __call__(self, x, t):
        self.calls += 1
        return self.at(x, t)


def gaussian(mean, std: float = 1.0):
    """Return the velocity of rectified flow to data from N(mean, std^2)."""

    def velocity(x, t):
        t = along_frames(t)
        data = mean + t * std**2 / (t**2 * std**2 + (1 - t) ** 2) * (x - t * mean)
        return (data - x) / (1 - t)

    return velocity


def of_frames(mask):
    return mask.view(2, 1, 4, 1, 1).expand(SHAPE)


def close(actual, expected, atol: float = 1e-12):
    torch.testing.assert_close(actual, expected, rtol=0, atol=atol)


X = normal(9)
T = torch.tensor([0.3, 0.6], dtype=torch.float64)
ROWS = torch.tensor([[0.1, 0.3, 0.3, 0.8], [0.5, 0.2, 0.9, 0.2]], dtype=torch.float64)


@pytest.fixture
def networks():
    return [Network(seed) for seed in range(3)]


# Scales and evaluations


@pytest.mark.parametrize(
    ("scale", "calls"), [(-1.0, (1, 1)), (0.0, (0, 1)), (0.4, (1, 1)), (1.0, (1, 0)), (12.5, (1, 1))]
)
def test_guidance_walks_from_unconditional_through_conditional(networks, scale, calls):
    cond, uncond, _ = networks
    velocity = guided(cond, uncond, scale=scale)(X, T)
    assert (cond.calls, uncond.calls) == calls
    close(velocity, uncond.at(X, T) + scale * (cond.at(X, T) - uncond.at(X, T)))


@pytest.mark.parametrize("end", [0.0, 1.0])
def test_at_scale_0_and_1_the_branch_comes_back_to_the_bit(networks, end):
    uncond, cond, _ = networks
    assert torch.equal(guided(cond, uncond, scale=end)(X, T), (uncond, cond)[int(end)].at(X, T))


def test_the_scale_may_differ_per_frame_per_clip_and_in_time(networks):
    cond, uncond, _ = networks
    c, u = cond.at(X, ROWS), uncond.at(X, ROWS)
    frames = torch.tensor([1.0, 2.0, 3.0, 5.0])
    clips = torch.tensor([[2.0], [4.0]])
    for scale, levels_ in [
        (frames, frames.view(1, 1, 4, 1, 1)),
        (clips, clips.view(2, 1, 1, 1, 1)),
        (frames * clips, (frames * clips).view(2, 1, 4, 1, 1)),
        (lambda t: 1 + t, 1 + along_frames(ROWS)),
        (lambda t: 3.0, 3.0),
    ]:
        close(guided(cond, uncond, scale=scale)(X, ROWS), u + levels_ * (c - u))


@pytest.mark.parametrize("scale", [torch.ones(4), torch.ones(2, 1), lambda t: 1.0, lambda t: torch.ones_like(t)])
def test_a_scale_of_one_in_every_frame_costs_one_evaluation(networks, scale):
    cond, uncond, _ = networks
    assert torch.equal(guided(cond, uncond, scale=scale)(X, T), cond.at(X, T))
    assert (cond.calls, uncond.calls) == (1, 0)


def test_the_scale_rises_linearly_over_frames():
    scale = over_frames(1.0, 3.0, 5)
    assert scale.tolist() == [1.0, 1.5, 2.0, 2.5, 3.0]
    assert over_frames(1.0, 3.0, 1).tolist() == [1.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_list_of_scales_is_read_step_by_step_whatever_the_precision(dtype):
    times = torch.tensor([0.0, 0.1, 0.3, 0.5, 0.7, 0.9, 0.95, 1.0], dtype=torch.float64)  # float32 rounds 0.7 down
    scale = stepwise(times[:-1], [1.0, 1.0, 6.0, 8.0, 6.0, 2.0, 4.0])
    seen = []

    def look(x, t):
        seen.append(scale(t[:, None])[0, 0].item())
        return x

    euler(look, X.to(dtype), times)
    assert seen == [1.0, 1.0, 6.0, 8.0, 6.0, 2.0, 4.0]
    halfway = (times[2] + times[3]) / 2
    assert scale(halfway.view(1, 1)).item() == 6.0


# Gaussians, where everything is known


def test_guidance_follows_the_score_of_the_density_to_the_power_of_the_scale():
    mean, scale, t = 0.7, 2.5, along_frames(T)
    velocity = guided(gaussian(mean, std=0.5), gaussian(-0.2, std=1.3), scale=scale)(X, T)
    score = (t * velocity - X) / (1 - t)  # = -noise / (1 - t)
    x = X.clone().requires_grad_()
    (cond, uncond) = (
        torch.distributions.Normal(t * m, (t**2 * s**2 + (1 - t) ** 2).sqrt()).log_prob(x).sum()
        for m, s in ((mean, 0.5), (-0.2, 1.3))
    )
    (expected,) = torch.autograd.grad(scale * cond + (1 - scale) * uncond, x)
    close(score, expected)


def test_between_gaussians_of_one_width_the_scale_multiplies_the_mean_frame_by_frame():
    mean, scale = 0.3, over_frames(1.0, 3.0, 4)
    means = mean * scale.view(1, 1, 4, 1, 1)
    close(guided(gaussian(mean), gaussian(0.0), scale=scale)(X, T), gaussian(means)(X, T))


def test_conditions_on_different_axes_compose_to_the_mean_with_both():
    up, right = (torch.tensor(m, dtype=torch.float64).view(1, 3, 1, 1, 1) for m in ([1.0, 0, 0], [0, -2.0, 0]))
    predict = composed(gaussian(0.0), [gaussian(up), gaussian(right)], scales=[1.5, 0.5])
    close(predict(X, T), gaussian(1.5 * up + 0.5 * right)(X, T))


# Intervals


def test_outside_the_interval_the_unconditional_is_not_asked(networks):
    cond, uncond, _ = networks
    predict = steered(cond, within(away_from(uncond, scale=4.0), 0.25, 0.75))
    times = inference_times(8)
    euler(predict, X, times)
    assert (cond.calls, uncond.calls) == (8, 4)  # 0.25, 0.375, 0.5, 0.625: low is in, high is out


@settings(max_examples=30, deadline=None)
@given(
    ends=st.tuples(st.integers(0, 9), st.integers(1, 10)).filter(lambda e: e[0] < e[1]),
    rows=st.lists(st.integers(0, 10), min_size=8, max_size=8),
    scale=st.floats(-2, 9),
)
def test_each_frame_is_conditional_outside_the_interval_and_guided_inside(ends, rows, scale):
    cond, uncond = Network(0), Network(1)
    low, high = ends[0] / 10, ends[1] / 10
    t = torch.tensor(rows, dtype=torch.float64).view(2, 4) / 10
    velocity = steered(cond, within(away_from(uncond, scale=scale), low, high))(X, t)
    inside = of_frames((t >= low) & (t < high))
    assert torch.equal(velocity[~inside], cond.at(X, t)[~inside])
    close(velocity[inside], guided(cond, uncond, scale=scale)(X, t)[inside])


def test_intervals_intersect_and_hold_for_any_rule(networks):
    cond, uncond, _ = networks
    rule = within(within(away_from(uncond, scale=4.0), 0.0, 0.7), 0.3, 1.0)
    velocity = steered(cond, rule, within(rescale(phi=1.0), 0.0, 0.25))(X, ROWS)
    both = of_frames((ROWS >= 0.3) & (ROWS < 0.7))
    close(velocity[both], guided(cond, uncond, scale=4.0)(X, ROWS)[both])
    assert torch.equal(velocity[~both], cond.at(X, ROWS)[~both])


def test_a_zero_start_evaluates_nothing_and_moves_nothing_before_its_end(networks):
    network, times = networks[0], inference_times(8)
    x, seen = X, []
    for step in range(8):
        x_next = euler(zero_start(network, until=0.25), x, times[step : step + 2])
        seen.append(torch.equal(x_next, x))
        x = x_next
    assert seen == [True, True] + 6 * [False]
    assert network.calls == 6
    velocity = zero_start(network, until=0.25)(X, ROWS)
    still = of_frames(ROWS < 0.25)
    assert not velocity[still].any()
    assert torch.equal(velocity[~still], network.at(X, ROWS)[~still])


# CFG-zero*


def test_the_fitted_unconditional_leaves_a_change_orthogonal_to_it_in_every_clip(networks):
    cond, uncond, _ = networks
    change = steered(cond, away_from_fitted(uncond, scale=2.0))(X, T) - cond.at(X, T)
    u = uncond.at(X, T)
    close((change * u).sum((1, 2, 3, 4)), torch.zeros_like(T))
    close((cond.at(X, T) - change) / u, ((cond.at(X, T) - change) / u)[:, :1, :1, :1, :1].expand(SHAPE), atol=1e-9)


def test_a_fit_of_one_is_plain_guidance(networks):
    uncond = networks[0]

    def cond(x, t):
        u, other = uncond.at(x, t), networks[1].at(x, t)
        share = (u * other).sum((1, 2, 3, 4), keepdim=True) / u.square().sum((1, 2, 3, 4), keepdim=True)
        return u + other - share * u

    close(steered(cond, away_from_fitted(uncond, scale=5.0))(X, T), guided(cond, uncond, scale=5.0)(X, T))


# Adaptive projection

SPACES = [
    FLOW,
    Parameterization(VariancePreserving(), "v"),
    Parameterization(VariancePreserving(), "noise"),
    Parameterization(VariancePreserving(), "data"),
]


@pytest.mark.parametrize("t", [T, ROWS], ids=["per clip", "per frame"])
@pytest.mark.parametrize("space", SPACES, ids=lambda s: s.prediction)
def test_projection_that_keeps_everything_is_plain_guidance(networks, space, t):
    cond, uncond, _ = networks
    rule = AdaptiveProjection(uncond, scale=4.0, eta=1.0, parameterization=space)
    close(steered(cond, rule)(X, t), guided(cond, uncond, scale=4.0)(X, t), atol=1e-11)


def change_of_data(space, rule, cond, x, t):
    before, after = (space.estimate(x, f(x, t), t).data for f in (cond, steered(cond, rule)))
    return before, after - before


@pytest.mark.parametrize("space", SPACES, ids=lambda s: s.prediction)
def test_without_its_parallel_part_the_change_is_orthogonal_to_the_conditional_data(networks, space):
    cond, uncond, _ = networks
    rule = AdaptiveProjection(uncond, scale=3.0, parameterization=space)
    data, change = change_of_data(space, rule, cond, X, T)
    close((data * change).sum((1, 2, 3, 4)), torch.zeros_like(T), atol=1e-10)
    full = change_of_data(space, away_from(uncond, scale=3.0), cond, X, T)[1]
    cosine = (full * data).sum((1, 2, 3, 4), keepdim=True) / data.square().sum((1, 2, 3, 4), keepdim=True)
    close(change, full - cosine * data, atol=1e-10)


def test_a_threshold_bounds_the_norm_of_the_change_and_keeps_its_direction(networks):
    cond, uncond, _ = networks
    full = change_of_data(FLOW, away_from(uncond, scale=2.0), cond, X, T)[1]
    norms = full.square().sum((1, 2, 3, 4), keepdim=True).sqrt()
    threshold = norms.mean().item()  # one clip is above, the other below
    cut = change_of_data(FLOW, AdaptiveProjection(uncond, scale=2.0, eta=1.0, threshold=threshold), cond, X, T)[1]
    close(cut, full * (threshold / norms).clamp(max=1))
    assert norms.min() < threshold < norms.max()


@pytest.mark.parametrize("sampler", [euler, heun])
def test_momentum_adds_what_the_change_was_at_earlier_times(networks, sampler):
    cond, uncond, _ = networks
    rule = AdaptiveProjection(uncond, scale=3.0, eta=1.0, momentum=-0.5)
    times, asked = inference_times(4), []
    predict = steered(cond, rule)

    def watched(x, t):
        asked.append((t[0].item(), x, predict(x, t)))
        return asked[-1][2]

    sampler(watched, X, times)
    average, latest_time, before = 0.0, -1.0, 0.0
    for time, x, output in asked:
        t = torch.full((2,), time, dtype=torch.float64)
        before = average if time > latest_time else before  # a second look at one time replaces the first
        average = (1 - time) * (cond.at(x, t) - uncond.at(x, t)) - 0.5 * before
        latest_time = time
        close(output, cond.at(x, t) + 2.0 * average / (1 - time))
    assert len(asked) == (4 if sampler is euler else 7)


def test_a_new_run_begins_without_the_momentum_of_the_last(networks):
    cond, uncond, _ = networks
    predict = steered(cond, AdaptiveProjection(uncond, scale=3.0, momentum=-0.5))
    first, second = (euler(predict, X, inference_times(4)) for _ in range(2))
    assert torch.equal(first, second)


def test_a_frame_gathers_momentum_only_while_it_moves(networks):
    cond, uncond, _ = networks
    times = torch.tensor([[0.0, 0.5], [0.2, 0.5], [0.4, 0.5], [0.6, 0.7]], dtype=torch.float64)[:, [0, 0, 1, 1]]

    def run(rows):
        predict = steered(cond, AdaptiveProjection(uncond, scale=3.0, eta=1.0, momentum=-0.5))
        return [predict(X, row.expand(2, -1)) for row in rows]

    waited, at_once = run(times)[-1], run(times[2:])[-1]
    assert torch.equal(waited[:, :, 2:], at_once[:, :, 2:])
    assert not torch.allclose(waited[:, :, :2], at_once[:, :, :2])


def test_an_interval_forgets_the_momentum_of_frames_outside_it(networks):
    cond, uncond, _ = networks

    def run(rows, low):
        predict = steered(cond, within(AdaptiveProjection(uncond, scale=3.0, eta=1.0, momentum=-0.5), low, 1.0))
        return [predict(X, torch.tensor(row, dtype=torch.float64)[[0, 0, 1, 1]].expand(2, -1)) for row in rows][-1]

    late = run([(0.2, 0.4), (0.4, 0.6)], 0.3)  # the first two frames enter only now, beside others that are in
    assert torch.equal(late[:, :, :2], run([(0.4, 0.6)], 0.3)[:, :, :2])
    assert not torch.allclose(late[:, :, 2:], run([(0.4, 0.6)], 0.3)[:, :, 2:])
    assert torch.equal(run([(0.4, 0.4), (0.2, 0.2), (0.5, 0.5)], 0.3), run([(0.5, 0.5)], 0.3))


# Perturbed and weaker networks


def test_a_perturbed_network_is_asked_only_where_its_scale_is_not_zero(networks):
    cond, uncond, perturbed = networks
    rules = away_from(uncond, scale=4.0), within(away_from_perturbed(perturbed, scale=1.5), 0.0, 0.2)
    euler(steered(cond, *rules), X, inference_times(10))
    assert (cond.calls, uncond.calls, perturbed.calls) == (10, 10, 2)
    steered(cond, away_from_perturbed(perturbed, scale=0.0))(X, T)
    assert perturbed.calls == 2


def test_rules_that_lead_away_add_up_in_any_order(networks):
    cond, uncond, perturbed = networks
    c, u, p = (network.at(X, T) for network in networks)
    rules = [away_from(uncond, scale=4.0), away_from_perturbed(perturbed, scale=1.5)]
    for order in (rules, rules[::-1]):
        close(steered(cond, *order)(X, T), u + 4.0 * (c - u) + 1.5 * (c - p))
    assert cond.calls == 2  # once in each order


def test_autoguidance_leads_from_the_weak_network_through_the_good_one(networks):
    good, weak, _ = networks
    assert torch.equal(guided(good, weak, scale=1.0)(X, T), good.at(X, T))
    assert (good.calls, weak.calls) == (1, 0)
    close(guided(good, weak, scale=2.0)(X, T), 2 * good.at(X, T) - weak.at(X, T))


# Several conditions


def test_composed_conditions_each_have_their_scale_and_reference(networks):
    uncond, first, second = networks
    u, a, b = (network.at(X, T) for network in networks)
    negative = Network(7)
    predict = composed(uncond, [first, second], scales=[2.0, over_frames(0.0, 3.0, 4)], references=[uncond, negative])
    frames = torch.arange(4.0, dtype=torch.float64).view(1, 1, 4, 1, 1)
    close(predict(X, T), u + 2.0 * (a - u) + frames * (b - negative.at(X, T)))
    assert [n.calls for n in (uncond, first, second, negative)] == [1, 1, 1, 1]
    composed(uncond, [first, second], scales=[2.0, 0.0])(X, T)
    assert [n.calls for n in networks] == [2, 2, 1]


@pytest.mark.parametrize(
    ("scales", "calls"), [((1.0, 1.0), [0, 0, 1]), ((1.0, 7.5), [0, 1, 1]), ((1.5, 7.5), [1, 1, 1])]
)
def test_nested_conditions_step_from_none_to_all(networks, scales, calls):
    nothing, image, both = (network.at(X, T) for network in networks)
    velocity = nested(networks, scales=scales)(X, T)
    assert [network.calls for network in networks] == calls
    close(velocity, nothing + scales[0] * (image - nothing) + scales[1] * (both - image))


def test_one_condition_composed_nested_or_guided_is_the_same(networks):
    cond, uncond, _ = networks
    expected = guided(cond, uncond, scale=3.0)(X, T)
    close(composed(uncond, [cond], scales=[3.0])(X, T), expected)
    close(nested([uncond, cond], scales=[3.0])(X, T), expected)


# Rescale and threshold


def std(values):
    return values.std(dim=(1, 2, 3, 4))


def test_rescale_brings_back_the_conditional_spread(networks):
    cond, uncond, _ = networks
    plain, c = guided(cond, uncond, scale=7.5)(X, T), cond.at(X, T)
    full, none, part = (steered(cond, away_from(uncond, scale=7.5), rescale(phi=p))(X, T) for p in (1.0, 0.0, 0.7))
    close(std(full), std(c))
    assert torch.equal(none, plain)
    close(part, 0.7 * full + 0.3 * plain)
    assert bool((std(plain) > 1.5 * std(c)).all())
    assert cond.calls == 4  # one for each prediction


@pytest.mark.parametrize("space", SPACES, ids=lambda s: s.prediction)
def test_rescale_in_data_space_brings_back_the_spread_of_the_data(networks, space):
    cond, uncond, _ = networks
    rules = away_from(uncond, scale=7.5), rescale(phi=1.0, parameterization=space)
    data, wanted = (space.estimate(X, f(X, T), T).data for f in (steered(cond, *rules), cond))
    close(std(data), std(wanted), atol=1e-9)


def test_rules_apply_in_the_order_given(networks):
    cond, uncond, perturbed = networks
    lead, push, back = away_from(uncond, scale=7.5), away_from_perturbed(perturbed, scale=2.0), rescale(phi=1.0)
    last, middle = (steered(cond, *rules)(X, T) for rules in ((lead, push, back), (lead, back, push)))
    close(std(last), std(cond.at(X, T)))
    rescaled = steered(cond, lead, back)(X, T)
    close(middle, rescaled + 2.0 * (cond.at(X, T) - perturbed.at(X, T)))


# What holds for every rule

RULES = {
    "away_from": lambda other: [away_from(other, scale=4.0)],
    "away_from_fitted": lambda other: [away_from_fitted(other, scale=4.0)],
    "away_from_perturbed": lambda other: [away_from_perturbed(other, scale=4.0)],
    "projection": lambda other: [AdaptiveProjection(other, scale=4.0, threshold=2.0, momentum=-0.5)],
    "rescale": lambda other: [away_from(other, scale=4.0), rescale(phi=0.7)],
    "rescale_data": lambda other: [away_from(other, scale=4.0), rescale(phi=0.7, parameterization=FLOW)],
}


@pytest.fixture(params=RULES)
def rules(request):
    return RULES[request.param]


def test_a_row_of_equal_times_is_one_time(networks, rules):
    cond, other, _ = networks
    expected = steered(cond, *rules(other))(X, T)
    assert torch.equal(steered(cond, *rules(other))(X, T[:, None].expand(2, 4)), expected)


def test_clips_and_frames_of_other_times_do_not_disturb_each_other(networks, rules):
    cond, other, _ = networks
    t = torch.tensor([[1.0, 0.3, 0.3, 0.7]] * 2, dtype=torch.float64)
    loud = X.clone()
    loud[:, :, 0] *= 100  # a given frame
    loud[1] += 5
    quiet, disturbed = (steered(cond, *rules(other))(x, t) for x in (X, loud))
    assert torch.equal(quiet[0, :, 1:], disturbed[0, :, 1:])


def test_low_precision_is_kept_outside_and_avoided_inside(networks, rules):
    cond, other, _ = networks
    x, t = X.float(), T.float()
    expected = steered(cond, *rules(other))(x, t)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(steered(cond, *rules(other))(x, t), expected)
    halves, wholes = (
        [lambda x, t, n=n, d=d: n.at(x, t).bfloat16().to(d) for n in (cond, other)]
        for d in (torch.bfloat16, torch.float32)
    )
    low, high = (steered(c, *rules(o))(x, t) for c, o in (halves, wholes))
    assert torch.equal(low, high.bfloat16())


def test_the_learned_variance_is_that_of_the_conditional(networks):
    cond, uncond, _ = networks
    both = [lambda x, t, n=n: torch.cat([n.at(x, t), -n.value], dim=1) for n in (cond, uncond)]
    space = Parameterization(learned_variance=True)
    rules = [
        AdaptiveProjection(both[1], scale=4.0, parameterization=space),
        rescale(phi=0.7, parameterization=space),
    ]
    output = steered(both[0], *rules)(X, T)
    expected = steered(cond, AdaptiveProjection(uncond, scale=4.0), rescale(phi=0.7, parameterization=FLOW))
    close(output[:, :3], expected(X, T))
    assert torch.equal(output[:, 3:], -cond.value)


def test_outside_its_interval_a_rule_changes_no_bit(networks, rules):
    cond, other, _ = networks
    limited = [within(rule, 0.3, 0.5) for rule in rules(other)]
    changed = steered(cond, *limited)(X, ROWS) != cond.at(X, ROWS)
    assert not changed[~of_frames((ROWS >= 0.3) & (ROWS < 0.5))].any()
    assert changed.any()


def test_guidance_is_differentiable(networks, rules):
    cond, other, _ = networks
    x = X.clone().requires_grad_()
    steered(cond, *rules(other))(x, ROWS).sum().backward()
    assert x.grad.isfinite().all()
    assert x.grad.abs().sum() > 0


# What is refused


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda n: guided(n, n, scale=math.nan), "finite, got nan"),
        (lambda n: guided(n, n, scale=torch.tensor([1.0, math.inf])), "finite, got inf"),
        (lambda n: guided(n, n, scale=lambda t: math.inf)(X, T), "finite, got inf"),
        (lambda n: guided(n, n, scale=torch.ones(3) * 2)(X, T), r"\[2, 4\].*got \[3\]; nearest: one number, or 4"),
        (lambda n: guided(n, None, scale=6.0), "6.0 needs a second branch, got None; nearest: scale 1"),
        (lambda n: away_from_fitted(None, scale=6.0), "needs a second branch"),
        (lambda n: AdaptiveProjection(None, scale=6.0), "needs a second branch"),
        (lambda n: away_from_perturbed(None, scale=1.0), "nearest: scale 0"),
        (lambda n: away_from_perturbed(n, scale=-1.0), "at least 0, got -1; nearest: 0"),
        (lambda n: within(away_from(n, scale=2.0), 0.8, 0.2), "got 0.8 to 0.2; nearest: 0.2 to 0.8"),
        (lambda n: within(away_from(n, scale=2.0), 0.1, 1.2), "nearest: 0.1 to 1.0"),
        (lambda n: within(away_from(n, scale=2.0), 0.5, 0.5), "nearest: 0.0 to 1.0"),
        (lambda n: rescale(phi=1.3), "at least 0 and at most 1, got 1.3; nearest: 1"),
        (lambda n: rescale(phi=-0.1), "nearest: 0"),
        (lambda n: AdaptiveProjection(n, scale=2.0, eta=1.5), "eta .* nearest: 1.0"),
        (lambda n: AdaptiveProjection(n, scale=2.0, threshold=0.0), "threshold must be positive"),
        (lambda n: AdaptiveProjection(n, scale=2.0, momentum=-1.0), "momentum"),
        (lambda n: AdaptiveProjection(n, scale=math.inf), "finite"),
        (lambda n: zero_start(n, until=1.0), "until"),
        (lambda n: zero_start(n, until=-0.1), "until"),
        (lambda n: composed(n, [n, n], scales=[1.0]), "2 conditions need as many scales"),
        (lambda n: nested([n], scales=[]), "at least 2; got 1"),
        (lambda n: nested([n, n], scales=[1.0, 2.0]), "3 branches"),
        (lambda n: over_frames(1.0, math.nan, 4), "finite"),
        (lambda n: over_frames(1.0, 2.0, 0), "num_frames"),
        (lambda n: stepwise(torch.tensor([0.0, 0.5]), [1.0]), "got 1 for 2 times"),
        (lambda n: stepwise(torch.tensor([0.5, 0.5]), [1.0, 2.0]), "times must rise"),
        (lambda n: stepwise(torch.tensor([0.0, 0.5]), [1.0, math.nan]), "finite"),
    ],
)
def test_what_cannot_guide_is_refused(make, message):
    with pytest.raises(ConfigError, match=message):
        make(Network(0))


def test_a_model_without_an_unconditional_branch_runs_at_scale_one(networks):
    assert torch.equal(guided(networks[0], None, scale=1.0)(X, T), networks[0].at(X, T))
