"""The optimal answer for Gaussian data, and for a mixture of Gaussians, is known at every t and for every process;
so is where the flow carries each point, because in one dimension it keeps quantiles."""

import math
from functools import partial
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from reelflow.diffusion.process import (
    Parameterization,
    RectifiedFlow,
    VarianceExploding,
    VariancePreserving,
    along_frames,
    levels,
    reverse_variances,
)
from reelflow.diffusion.rollout import rollout_delayed, rollout_given, rollout_plain, with_given
from reelflow.diffusion.samplers import (
    Restart,
    adams_bashforth,
    ancestral,
    consistency,
    ddim,
    dpm2m,
    dpm2m_sde,
    dpm2s,
    draw,
    euler,
    euler_maruyama,
    heun,
    midpoint,
    restart,
    unipc,
)
from reelflow.diffusion.timesteps import inference_times
from reelflow.errors import ConfigError

DETERMINISTIC = {
    "euler": euler,
    "heun": heun,
    "midpoint": midpoint,
    "dpm2s": dpm2s,
    "dpm2m": dpm2m,
    "unipc": unipc,
    "unipc3": partial(unipc, order=3, scale="bh1"),
    "adams2": adams_bashforth,
    "adams3": partial(adams_bashforth, order=3),
}
STOCHASTIC = {
    "ddim": partial(ddim, eta=0.7),
    "ancestral": ancestral,
    "large": partial(ancestral, variance="large"),
    "maruyama": euler_maruyama,
    "dpm2m_sde": dpm2m_sde,
    "consistency": consistency,
    "restart": partial(restart, restarts=[Restart(1, 3, 2), Restart(0, 4)]),
}
FLOW, EVEN, EXPLODING = RectifiedFlow(), VariancePreserving(schedule="cosine", continuous=True), VarianceExploding()
TABLE = VariancePreserving(schedule="scaled_linear", zero_terminal_snr=True)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def everyone():
    """All samplers with one signature; the stochastic ones with a fresh generator at each call."""
    fixed = {
        name: lambda *args, _s=sampler, **options: _s(*args, generator=seeded(), **options)
        for name, sampler in STOCHASTIC.items()
    }
    return DETERMINISTIC | fixed


EVERYONE = everyone()
of_all = pytest.mark.parametrize("sampler", EVERYONE.values(), ids=EVERYONE)
of_deterministic = pytest.mark.parametrize("sampler", DETERMINISTIC.values(), ids=DETERMINISTIC)
of_processes = pytest.mark.parametrize("process", [FLOW, EVEN, TABLE, EXPLODING], ids=["flow", "vp", "table", "ve"])


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=seeded(seed), dtype=torch.float64)


def close(a, b, atol):
    torch.testing.assert_close(a, b, rtol=0, atol=atol)


X = normal(2, 3, 4, 2, 2)


# Truths


WEIGHTS, MEANS, STDS = (
    torch.tensor(v, dtype=torch.float64) for v in ([0.3, 0.5, 0.2], [-1.2, 0.4, 1.5], [0.5, 0.3, 0.6])
)


def _components(process, x, t):
    alpha, sigma = (level[..., None] for level in levels(process, t))
    return alpha, sigma, (alpha * STDS) ** 2 + sigma**2, x[..., None] - alpha * MEANS


def optimal(p):
    """E[answer | x_t = x] for the mixture."""

    def predict(x, t):
        alpha, sigma, variance, away = _components(p.process, x, t.double())
        share = (WEIGHTS.log() - variance.log() / 2 - away**2 / variance / 2).softmax(-1)
        data = (share * (MEANS + alpha * STDS**2 / variance * away)).sum(-1)
        return data if p.prediction == "data" else p.target(data, (share * sigma / variance * away).sum(-1), t)

    return predict


def quantile(process, x, t):
    _, _, variance, away = _components(process, x, t)
    return (WEIGHTS * torch.special.ndtr(away / variance.sqrt())).sum(-1)


def start(process, t, num: int = 41):
    """Points over the bulk of the mixture at t."""
    alpha, sigma = levels(process, t)
    return torch.linspace(-2, 2, num, dtype=torch.float64).view(1, 1, 1, 1, num) * torch.hypot(alpha, sigma)


def errors(sampler, process, low, high, steps):
    """The largest error in quantile at `high`, of points that start at `low`, for each number of steps."""
    p, found = Parameterization(process, "data"), []
    ends = torch.tensor([low, high], dtype=torch.float64)
    x = start(process, ends[:1])
    for num in steps:
        y = sampler(optimal(p), x, low + (high - low) * inference_times(num), parameterization=p)
        found.append((quantile(process, y, ends[1:]) - quantile(process, x, ends[:1])).abs().max().item())
    return found


def order_of(sampler, process, low, high, steps):
    """How fast the error falls as steps double."""
    coarse, fine = errors(sampler, process, low, high, (steps, 2 * steps))
    return math.log2(coarse / fine)


def wavy(x, t):
    """An answer without meaning, different for each frame and each time."""
    return torch.sin(3 * x) + along_frames(t) * x.mean(dim=(1, 2, 3, 4), keepdim=True)


# Orders


@pytest.mark.parametrize(
    ("sampler", "order"),
    [
        (euler, 1),
        (heun, 2),
        (midpoint, 2),
        (dpm2s, 2),
        (dpm2m, 2),
        (partial(unipc, order=1), 2),
        (unipc, 3),
        (partial(unipc, scale="bh1"), 3),
        (adams_bashforth, 2),
        (partial(adams_bashforth, order=3), 3),
    ],
)
def test_samplers_converge_at_their_order(sampler, order):
    """Away from the ends, where log-SNR is finite."""
    assert order_of(sampler, FLOW, 0.1, 0.9, 32) == pytest.approx(order, abs=0.3)


@pytest.mark.parametrize(("sampler", "order"), [(midpoint, 2), (dpm2m, 2), (unipc, 3)])
def test_they_do_so_for_a_process_that_bends(sampler, order):
    assert order_of(sampler, EVEN, 0.1, 0.9, 32) == pytest.approx(order, abs=0.3)


def test_unipc_of_order_three_is_at_least_that():
    assert order_of(partial(unipc, order=3), FLOW, 0.1, 0.9, 24) > 2.9


@pytest.mark.parametrize(("sampler", "order"), [(heun, 2), (midpoint, 2), (partial(adams_bashforth, order=3), 3)])
def test_samplers_in_tau_keep_their_order_from_pure_noise_to_data(sampler, order):
    assert order_of(sampler, FLOW, 0, 1, 32) == pytest.approx(order, abs=0.3)


def test_samplers_in_log_snr_go_from_pure_noise_to_data_far_better_than_euler():
    (plain,) = errors(euler, FLOW, 0, 1, [40])
    for sampler in (dpm2m, dpm2s, unipc, partial(unipc, scale="bh1", order=3)):
        (error,) = errors(sampler, FLOW, 0, 1, [40])
        assert error < plain / 5


# What each method is


def test_the_first_order_step_is_euler_for_rectified_flow_and_ddim_for_ddpm():
    times = inference_times(4, shift=2.0)
    x = X
    for t, t_next in pairwise(times):
        x = x + (t_next - t) * wavy(x, t.expand(2))
    close(euler(wavy, X, times), x, 1e-14)

    process = VariancePreserving()
    steps = process.step_of(times).round().long()
    abar = torch.cat([process.alphas_cumprod, torch.ones(1, dtype=torch.float64)])  # the last is step -1, the data
    x = X
    for n, n_next in pairwise(steps):
        noise = wavy(x, process.t_of(n).expand(2))
        data = (x - (1 - abar[n]).sqrt() * noise) / abar[n].sqrt()
        x = abar[n_next].sqrt() * data + (1 - abar[n_next]).sqrt() * noise
    p = Parameterization(process, "noise")
    close(euler(wavy, X, process.t_of(steps), parameterization=p), x, 1e-11)
    close(ddim(wavy, X, process.t_of(steps), eta=0.0, generator=seeded(), parameterization=p), x, 1e-11)


def test_ancestral_steps_are_those_of_ddpm():
    """x' = (x - beta / sqrt(1 - abar) noise) / sqrt(1 - beta) + std z (Ho et al. 2020, alg. 2), from step 999 down."""
    process = VariancePreserving()
    p, abar, times = (
        Parameterization(process, "noise"),
        process.alphas_cumprod,
        process.t_of(torch.arange(999, 995, -1)),
    )
    for variance in ("small", "large"):
        x, generator = X, seeded()
        for n in (999, 998, 997):
            noise, beta = wavy(x, process.t_of(torch.tensor(n)).expand(2)), 1 - abar[n] / abar[n - 1]
            std = (beta * (1 - abar[n - 1]) / (1 - abar[n]) if variance == "small" else beta).sqrt()
            z = torch.randn(X.shape, generator=generator, dtype=X.dtype)
            x = (x - beta / (1 - abar[n]).sqrt() * noise) / (1 - beta).sqrt() + std * z
        y = ancestral(wavy, X, times, generator=seeded(), variance=variance, parameterization=p)
        close(y, x, 1e-11)


def test_ddim_with_eta_one_is_ancestral_and_is_euler_ancestral():
    """The last, in x / alpha: sigma_up^2 = s'^2 (s^2 - s'^2) / s^2, then Euler down to sqrt(s'^2 - sigma_up^2)."""
    times, generator = torch.linspace(0.1, 0.8, 5, dtype=torch.float64), seeded()
    for process in (FLOW, TABLE, EXPLODING):
        p = Parameterization(process, "v")
        options = {"generator": seeded(), "parameterization": p}
        expected = ancestral(wavy, X, times, **options)
        options["generator"] = seeded()
        close(ddim(wavy, X, times, eta=1.0, **options), expected, 1e-12)
        x = X / process.alpha(times[0])
        generator.manual_seed(0)
        for t, t_next in pairwise(times):
            s, s_next = (process.sigma(u) / process.alpha(u) for u in (t, t_next))
            data = p.estimate(x * process.alpha(t), wavy(x * process.alpha(t), t.expand(2)), t.expand(2)).data
            up = (s_next**2 * (s**2 - s_next**2) / s**2).sqrt()
            down = (s_next**2 - up**2).sqrt()
            x = x + (x - data) / s * (down - s) + up * torch.randn(X.shape, generator=generator, dtype=X.dtype)
        close(expected, x * process.alpha(times[-1]), 1e-10)


@pytest.mark.parametrize(
    ("stochastic", "without"),
    [
        (partial(ddim, eta=0.0), euler),
        (partial(euler_maruyama, level=0.0), euler),
        (partial(dpm2m_sde, eta=0.0), dpm2m),
        (partial(restart, restarts=[]), heun),
        (partial(restart, restarts=[Restart(1, 2, 0)], sampler=euler), euler),
    ],
)
def test_without_noise_stochastic_samplers_are_their_deterministic_ones(stochastic, without):
    times = inference_times(6, shift=2.0)
    close(stochastic(wavy, X, times, generator=seeded()), without(wavy, X, times), 1e-13)


def _data_and_lambda(p, x, t):
    data = p.estimate(x, wavy(x, t.expand(2)), t.expand(2)).data
    return data, (p.process.alpha(t) / p.process.sigma(t)).log()


def test_dpm2m_is_the_published_recurrence():
    p, times = Parameterization(EVEN, "v"), inference_times(5, shift=0.7)[1:-1]
    x, past = X, None
    for t, t_next in pairwise(times):
        data, now = _data_and_lambda(p, x, t)
        h = (EVEN.alpha(t_next) / EVEN.sigma(t_next)).log() - now
        mixed = data
        if past is not None:
            r = (now - past[1]) / h
            mixed = (1 + 1 / (2 * r)) * data - past[0] / (2 * r)
        x = EVEN.sigma(t_next) / EVEN.sigma(t) * x - EVEN.alpha(t_next) * torch.expm1(-h) * mixed
        past = data, now
    close(dpm2m(wavy, X, times, parameterization=p), x, 1e-12)


@pytest.mark.parametrize("scale", ["bh1", "bh2"])
@pytest.mark.parametrize("order", [1, 2, 3])
def test_unipc_is_the_published_recurrence(order, scale):
    """Zhao et al. 2023, alg. 7 and 8 with data prediction; one half in place of the solution of one equation."""
    p, times = Parameterization(EVEN, "v"), inference_times(8, shift=0.7)[1:-1]

    def step(x, t, t_next, m, past, ahead):
        h = (EVEN.alpha(t_next) / EVEN.sigma(t_next)).log() - m[1]
        big = -h if scale == "bh1" else torch.expm1(-h)
        ratios = [(lam - m[1]) / h for _, lam in past] + ([] if ahead is None else [torch.ones_like(h)])
        slopes = [(data - m[0]) / r for (data, _), r in zip(past, ratios, strict=False)]
        slopes += [] if ahead is None else [ahead - m[0]]
        phi, factorial, right = torch.expm1(-h) / -h - 1, 1, []
        for k in range(1, len(ratios) + 1):
            right.append(phi * factorial / big)
            factorial *= k + 1
            phi = phi / -h - 1 / factorial
        rho = [0.5]
        if len(ratios) > 1:
            left = torch.stack([torch.stack([r**k for r in ratios]) for k in range(len(ratios))])
            rho = torch.linalg.solve(left, torch.stack(right))
        total = sum(w * s for w, s in zip(rho, slopes, strict=False))
        alpha = EVEN.alpha(t_next)
        return EVEN.sigma(t_next) / EVEN.sigma(t) * x - alpha * torch.expm1(-h) * m[0] - alpha * big * total

    x, past, last = X, [], None
    for t, t_next in pairwise(times):
        m = _data_and_lambda(p, x, t)
        if last is not None:
            x = step(*last, m[0])
        last = (x, t, t_next, m, past)
        x, past = step(*last, None), [m, *past][: order - 1]
    close(unipc(wavy, X, times, order=order, scale=scale, parameterization=p), x, 1e-10)


def test_unipc_without_corrector_is_the_predictor_alone():
    times = torch.tensor([0.2, 0.5, 0.7, 0.9], dtype=torch.float64)
    close(unipc(wavy, X, times, order=1, uncorrected=(0, 1)), euler(wavy, X, times), 1e-14)
    corrected = unipc(wavy, X, times, order=1)
    assert (unipc(wavy, X, times, order=1, uncorrected=(0,)) - corrected).abs().max() > 1e-3
    close(unipc(wavy, X, times, order=1, uncorrected=(2,)), corrected, 0)  # the last step never is


def test_unipc_may_lower_its_order_towards_the_end():
    times = torch.tensor([0.2, 0.4, 0.5, 0.7, 0.9], dtype=torch.float64)
    third, lowered = (unipc(wavy, X, times, order=3, lower_final=lower) for lower in (False, True))
    assert (third - lowered).abs().max() > 1e-4
    two = times[:3]
    close(unipc(wavy, X, two, order=3, lower_final=True), unipc(wavy, X, two, order=1), 1e-14)


def test_consistency_keeps_nothing_of_the_noise_that_is_seen():
    p, times = Parameterization(EVEN, "v"), torch.tensor([0.1, 0.4, 0.8], dtype=torch.float64)
    x, generator = X, seeded()
    for t, t_next in pairwise(times):
        data, _ = _data_and_lambda(p, x, t)
        z = torch.randn(X.shape, generator=generator, dtype=X.dtype)
        x = EVEN.alpha(t_next) * data + EVEN.sigma(t_next) * z
    close(consistency(wavy, X, times, generator=seeded(), parameterization=p), x, 1e-13)


def test_euler_may_clip_the_data_and_leaves_the_noise():
    p, t, t_next = Parameterization(EVEN, "v"), *torch.tensor([0.3, 0.6], dtype=torch.float64)
    seen = p.estimate(X, wavy(X, t.expand(2)), t.expand(2))
    assert seen.data.abs().max() > 0.5
    expected = EVEN.alpha(t_next) * seen.data.clamp(-0.5, 0.5) + EVEN.sigma(t_next) * seen.noise
    close(euler(wavy, X, torch.stack([t, t_next]), clip=0.5, parameterization=p), expected, 1e-13)


def test_steps_may_land_elsewhere_than_the_next_begins():
    p, times = Parameterization(EVEN, "v"), torch.tensor([0.1, 0.4, 0.8, 1.0], dtype=torch.float64)
    landings = torch.tensor([0.5, 0.7, 0.9], dtype=torch.float64)
    x = X
    for t, landing in zip(times[:-1], landings, strict=True):
        x = euler(wavy, x, torch.stack([t, landing]), parameterization=p)
    assert torch.equal(euler(wavy, X, times, landings=landings, parameterization=p), x)
    for sampler in (euler, partial(dpm2m_sde, generator=seeded())):
        for wrong in (landings[:2], landings - 0.45, landings + 0.2):
            with pytest.raises(ConfigError, match="landings must be one for each of 3 steps"):
                sampler(wavy, X, times, landings=wrong, parameterization=p)


def test_adams_bashforth_over_even_steps_has_the_textbook_coefficients():
    times, h = inference_times(5), 0.2
    slopes, x = [], X
    for t in times[:-1]:
        slopes.insert(0, wavy(x, t.expand(2)))
        weights = [1.0] if len(slopes) == 1 else [1.5, -0.5]
        x = x + h * sum(w * s for w, s in zip(weights, slopes, strict=False))
    close(adams_bashforth(wavy, X, times), x, 1e-13)

    slopes, x, before = [], X, X
    for t in times[:-1]:
        slopes.insert(0, wavy(x, t.expand(2)))
        if len(slopes) == 2:
            x = before + h * (slopes[0] + slopes[1]) / 2  # the first step, corrected
        weights = {1: [1.0], 2: [1.5, -0.5]}.get(len(slopes), [23 / 12, -16 / 12, 5 / 12])
        x = x + h * sum(w * s for w, s in zip(weights, slopes, strict=False))
    close(adams_bashforth(wavy, X, times, order=3), x, 1e-13)


@of_processes
@of_all
def test_a_known_point_is_reached_in_any_number_of_steps(sampler, process):
    """If the network knows the data, every step stays on its line, and the last draws nothing."""
    data, p = normal(*X.shape, seed=1), Parameterization(process, "data")
    for num_steps in (4, 6):
        found = sampler(lambda x, t: data, X, inference_times(num_steps, shift=3.0), parameterization=p)
        close(found, data, 1e-12)


@of_deterministic
def test_one_step_follows_the_true_velocity_to_the_data(sampler):
    data, times = normal(*X.shape, seed=1), torch.tensor([0.0, 1.0], dtype=torch.float64)
    for one in (times, rollout_given(times, 4)):
        assert (sampler(lambda x, t: data - X, X, one) - data).abs().max() < 1e-15


@of_deterministic
def test_all_predictions_give_the_same_trajectory(sampler):
    for process in (FLOW, EVEN, EXPLODING):
        times = 0.05 + 0.95 * inference_times(4)  # a noise prediction cannot start where alpha = 0
        x = start(process, times[:1], 5)
        velocity, *others = (
            sampler(optimal(p), x, times, parameterization=p)
            for p in (Parameterization(process, q) for q in ("velocity", "v", "noise", "data"))
        )
        for other in others:
            close(other, velocity, 1e-10)


# Frames


@settings(max_examples=6, deadline=None)
@given(
    delays=st.lists(st.integers(0, 4), min_size=3, max_size=3),
    held=st.sets(st.integers(0, 2), max_size=2),
    shift=st.sampled_from([0.3, 1.0, 5.0]),
    process=st.sampled_from([FLOW, TABLE, EXPLODING]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_a_frame_at_time_one_never_changes(delays, held, shift, process, dtype):
    """Whenever the network is told that a frame is data, that frame has the bits of the result."""
    matrix = with_given(rollout_delayed(inference_times(4, shift=shift), delays), held)
    x, given = X[:, :, :3].to(dtype), (matrix == 1).all(0)
    for name, sampler in EVERYONE.items():
        seen = []

        def predict(x, t, seen=seen):
            seen.append((x, t[0] == 1))
            return wavy(x, t)

        y = sampler(predict, x, matrix, parameterization=Parameterization(process, "v"))
        assert y.isfinite().all()
        assert y.dtype == dtype
        assert torch.equal(y[:, :, given], x[:, :, given])
        for at, done in seen:
            kept = given if name == "restart" else done  # a restart takes finished frames back
            assert torch.equal(at[:, :, kept], y[:, :, kept]), name


@of_deterministic
def test_a_frame_that_waits_walks_as_it_would_alone(sampler):
    """For a network that looks at one frame at a time, a pyramid and a plain rollout give the same frames."""
    for process in (FLOW, EVEN):
        p, times = Parameterization(process, "v"), inference_times(5, shift=1.5)
        x = start(process, times[:1], 4).permute(0, 1, 4, 2, 3)
        together = sampler(optimal(p), x, times, parameterization=p)
        delayed = sampler(optimal(p), x, rollout_delayed(times, [0, 2, 5, 1]), parameterization=p)
        close(delayed, together, 1e-12)


@of_all
def test_a_matrix_of_equal_columns_is_a_vector(sampler):
    times = inference_times(4)
    assert torch.equal(sampler(wavy, X, times), sampler(wavy, X, rollout_plain(times, 4)))


def test_a_frame_at_rest_between_moves_keeps_its_bits_and_begins_again():
    matrix = torch.tensor([[0.0, 0.0], [0.3, 0.2], [0.3, 0.4], [0.3, 0.6], [0.6, 0.8], [1.0, 1.0]], dtype=torch.float64)
    for name, sampler in DETERMINISTIC.items():
        seen = []

        def predict(x, t, seen=seen):
            if t[0, 0] in matrix[:, 0] and t[0, 1] in matrix[:, 1]:
                seen.append(x[:, :, 0])
            return wavy(x, t)

        assert sampler(predict, X[:, :, :2], matrix).isfinite().all()
        rows = seen if len(seen) == 5 else [s for i, s in enumerate(seen) if i in (0, 2, 4, 6, 8)]
        assert torch.equal(rows[1], rows[2]), name
        assert torch.equal(rows[2], rows[3]), name


# What the caller sees


@pytest.mark.parametrize(
    ("sampler", "asked"),
    [
        (euler, [0, 0.25, 0.5, 0.75]),
        (heun, [0, 0.25, 0.25, 0.5, 0.5, 0.75, 0.75]),
        (midpoint, [0, 0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875]),
        (dpm2m, [0, 0.25, 0.5, 0.75]),
        (unipc, [0, 0.25, 0.5, 0.75]),
        (partial(adams_bashforth, order=3), [0, 0.25, 0.5, 0.75]),
    ],
)
def test_the_network_is_asked_no_more_than_needed_and_never_at_the_data(sampler, asked):
    seen = []

    def predict(x, t):
        assert t.shape == (2,)
        seen.append(t[0].item())
        return wavy(x, t)

    sampler(predict, X, inference_times(4))
    assert seen == pytest.approx(asked, abs=1e-15)


@of_all
def test_previews_are_estimates_of_the_data(sampler):
    p, previews = Parameterization(EVEN, "v"), []
    x = start(EVEN, torch.zeros(1), 5)
    y = sampler(optimal(p), x, inference_times(40), parameterization=p, on_step=lambda i, x: previews.append((i, x)))
    assert [i for i, _ in previews] == list(range(len(previews)))
    assert len(previews) == (40 + 2 * 2 + 4 if sampler is EVERYONE["restart"] else 40)
    close(previews[0][1], torch.full_like(x, (WEIGHTS * MEANS).sum()), 1e-12)  # from noise, the mean is all one knows
    close(previews[-1][1], y, 0.05)


def test_previews_of_a_known_point_show_it_from_the_first_step():
    data, shown = normal(*X.shape, seed=1), []
    times = rollout_given(inference_times(3), 4, num_given=1)
    noise = torch.cat([data[:, :, :1], X[:, :, 1:]], dim=2)
    euler(lambda x, t: data - noise, noise, times, on_step=lambda i, x: shown.append(x))
    for preview in shown:
        close(preview, data, 1e-14)


# Noise


MEAN = torch.tensor([0.5, -1.0], dtype=torch.float64)
COVARIANCE = torch.tensor([[0.8, 0.3], [0.3, 0.25]], dtype=torch.float64)
COUNT = 10_000


def normal_law(p, mean=MEAN, covariance=COVARIANCE):
    """E[answer | x] for normal data, one vector of channels at each place, at one time for all."""

    def predict(x, t):
        alpha, sigma = p.process.alpha(t[0]), p.process.sigma(t[0])
        spread = alpha**2 * covariance + sigma**2 * torch.eye(len(mean), dtype=torch.float64)
        white = torch.linalg.solve(spread, x.flatten(2)[0] - alpha * mean[:, None])
        data = mean[:, None] + alpha * covariance @ white
        return p.target(data.view_as(x), (sigma * white).view_as(x), t)

    return predict


def marginal(process, t, generator):
    """COUNT draws of x_t."""
    data, noise = torch.randn(2, 2, COUNT, generator=generator, dtype=torch.float64)
    data = MEAN[:, None] + torch.linalg.cholesky(COVARIANCE) @ data
    return (process.alpha(t) * data + process.sigma(t) * noise).view(1, 2, 1, 1, COUNT)


def deviations(y):
    """How many standard errors the sample mean and covariance are from the truth."""
    y, variances = y.flatten(2)[0], COVARIANCE.diagonal()
    mean = (y.mean(1) - MEAN) / (variances / COUNT).sqrt()
    covariance = (y.cov() - COVARIANCE) / ((variances[:, None] * variances + COVARIANCE**2) / COUNT).sqrt()
    return mean.abs().max().item(), covariance.abs().max().item()


@pytest.mark.parametrize(
    ("sampler", "process", "num_steps"),
    [
        (ddim, FLOW, 200),
        (partial(ancestral, variance="large"), EVEN, 100),
        (euler_maruyama, EVEN, 100),
        (dpm2m_sde, FLOW, 50),
        (partial(restart, restarts=[Restart(4, 8, 2), Restart(8, 14)]), EVEN, 20),
    ],
    ids=["ddim", "ancestral", "maruyama", "dpm2m_sde", "restart"],
)
def test_stochastic_samplers_reach_the_mean_and_covariance_of_the_data(sampler, process, num_steps):
    """Within four standard errors, steps being many enough for what they miss to drown in them."""
    p, generator = Parameterization(process, "v"), seeded(1)
    x = marginal(process, torch.zeros(()), generator)
    y = sampler(normal_law(p), x, inference_times(num_steps), generator=generator, parameterization=p)
    assert max(deviations(y)) < 4, deviations(y)


def test_a_learned_variance_reaches_the_variance_of_the_data_in_three_steps():
    """For normal data each reverse step is normal, so the right variance leaves no error; neither bound does that."""
    std, process, times = 0.3, VariancePreserving(continuous=True), torch.tensor([0.0, 0.3, 0.6, 0.9]).double()
    p = Parameterization(process, "noise", learned_variance=True)
    plain = Parameterization(process, "noise")
    answer = normal_law(plain, torch.zeros(1).double(), torch.full((1, 1), std**2).double())

    def spread(t):
        return process.alpha(t) ** 2 * std**2 + process.sigma(t) ** 2

    def predict(x, t):
        t_next = times[(times - t[0]).abs().argmin() + 1][None]
        small, large = reverse_variances(levels(process, t), levels(process, t_next))
        a = process.alpha(t[:1]) / process.alpha(t_next)
        wanted = spread(t_next) - a**2 * spread(t_next) ** 2 / spread(t[:1])
        share = (wanted.log() - small.log()) / (large.log() - small.log())
        return torch.cat([answer(x, t), (2 * share - 1).expand_as(x)], dim=1)

    x = normal(1, 1, 1, 1, COUNT) * spread(times[0]).sqrt()
    error = 4 * (2 / COUNT) ** 0.5
    found = ancestral(predict, x, times, generator=seeded(2), parameterization=p)
    assert (found.var() / spread(times[-1])).item() == pytest.approx(1, abs=error)
    for variance, sign in (("small", -1), ("large", 1)):
        y = ancestral(answer, x, times, generator=seeded(2), variance=variance, parameterization=plain)
        assert sign * (y.var() / spread(times[-1]) - 1) > 2 * error


def test_each_restart_contracts_an_error_as_the_closed_form_says():
    """From one row to another the flow scales a deviation by the ratio of standard deviations, a fall by alpha's."""
    p, times, low, high = Parameterization(EVEN, "v"), torch.linspace(0.1, 0.9, 17, dtype=torch.float64), 6, 12
    predict = normal_law(p, torch.zeros(1).double(), torch.full((1, 1), 0.25).double())
    spread = (0.25 * EVEN.alpha(times) ** 2 + EVEN.sigma(times) ** 2).sqrt()
    x = normal(1, 1, 1, 1, 8)
    for repeats in (0, 2):
        options = {
            "restarts": [Restart(low, high, repeats)],
            "parameterization": p,
            "sampler": partial(adams_bashforth, order=3),
        }
        a, b = (restart(predict, start, times, generator=seeded(), **options) for start in (x, x + 1))
        once = EVEN.alpha(times[low]) / EVEN.alpha(times[high]) * spread[high] / spread[low]
        assert once < 0.9
        close(b - a, (once**repeats * spread[-1] / spread[0]).expand_as(x), 1e-3)


def test_a_clip_with_its_own_generator_does_not_depend_on_its_neighbours():
    def alone(x, t):
        return x.sin()

    times = inference_times(3)
    for sampler in (
        ddim,
        ancestral,
        euler_maruyama,
        dpm2m_sde,
        consistency,
        partial(restart, restarts=[Restart(0, 2)]),
    ):
        both = sampler(alone, X, times, generator=[seeded(3), seeded(4)])
        assert torch.equal(both[1:], sampler(alone, X[1:], times, generator=seeded(4)))
        assert not torch.equal(both[1:], sampler(alone, X[1:], times, generator=seeded(5)))


def test_noise_may_come_from_a_function():
    times, generator = inference_times(3), seeded(3)
    for sampler in (ddim, ancestral, euler_maruyama, dpm2m_sde, consistency):
        generator.manual_seed(3)
        given_noise = sampler(wavy, X, times, generator=lambda x: draw(x, generator))
        assert torch.equal(given_noise, sampler(wavy, X, times, generator=seeded(3)))


# Mistakes


@of_all
def test_impossible_times_are_refused(sampler):
    for times in ([0.5], [0.0, 0.6, 0.5, 1.0], [-0.1, 1.0], [0.0, 1.1], [0.0, math.nan, 1.0]):
        with pytest.raises(ConfigError, match="rise within"):
            sampler(wavy, X, torch.tensor(times))
    with pytest.raises(ConfigError, match="3 columns but x has 4 latent frames"):
        sampler(wavy, X, rollout_plain(inference_times(2), 3))


@pytest.mark.parametrize(
    ("sampler", "message"),
    [
        (partial(ddim, eta=1.5), "eta must be between 0 and 1, got 1.5; nearest: 1.0"),
        (partial(dpm2m_sde, eta=-1.0), "nearest: 0.0"),
        (partial(euler_maruyama, level=-1.0), "level must be at least 0, got -1.0"),
        (partial(restart, restarts=[Restart(2, 1)]), "got \\[\\(2, 1, 1\\)\\]"),
        (partial(restart, restarts=[Restart(0, 9)]), "within rows 0 to 3"),
        (partial(restart, restarts=[Restart(1, 3), Restart(0, 2)]), "rising order"),
        (partial(restart, restarts=[Restart(0, 1, -1)]), "0 or more times"),
    ],
)
def test_impossible_noise_is_refused(sampler, message):
    with pytest.raises(ConfigError, match=message):
        sampler(wavy, X, inference_times(3), generator=seeded())


def test_other_impossible_options_are_refused():
    times = inference_times(3)
    with pytest.raises(ConfigError, match="one for each of 2 clips; got 3"):
        ddim(wavy, X, times, generator=[seeded(), seeded(), seeded()])
    with pytest.raises(ConfigError, match="nothing of the data at t = 0"):
        euler(wavy, X, times, parameterization=Parameterization(prediction="noise"))
