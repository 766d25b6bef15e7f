import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from reelflow.config import configuration, from_dict, to_dict
from reelflow.diffusion.process import (
    Parameterization,
    Process,
    RectifiedFlow,
    VarianceExploding,
    VariancePreserving,
    along_frames,
    as_read,
    combine,
    levels,
    log_snr,
    mix,
    preconditioning,
    reverse_variances,
)
from reelflow.errors import ConfigError

PROCESSES = [
    RectifiedFlow(),
    VariancePreserving(),
    VariancePreserving(schedule="scaled_linear", snr_shift=3.0, zero_terminal_snr=True),
    VariancePreserving(schedule="cosine"),
    VariancePreserving(continuous=True),
    VariancePreserving(schedule="scaled_linear", snr_shift=3.0, zero_terminal_snr=True, continuous=True),
    VariancePreserving(schedule="cosine", continuous=True),
    VarianceExploding(),
]
NAMES = ["flow", "linear", "zero", "cosine", "linear_limit", "zero_limit", "cosine_limit", "exploding"]
PREDICTIONS = ["velocity", "v", "noise", "data"]


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


DATA, NOISE = normal(3, 2, 4, 2, 2), normal(3, 2, 4, 2, 2, seed=1)


def times(*shape: int) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def close(a, b, atol):
    torch.testing.assert_close(a, b, rtol=0, atol=atol)


# Rectified flow alone


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_time_one_is_the_data_and_time_zero_the_noise_to_the_bit(dtype):
    data, noise = DATA.to(dtype), NOISE.to(dtype)
    for mixed in (mix, Parameterization().mix):
        assert torch.equal(mixed(data, noise, torch.ones(3)), data)
        assert torch.equal(mixed(data, noise, torch.zeros(3)), noise)


@pytest.mark.parametrize("shape", [(3,), (3, 4)])
def test_the_mixture_and_its_velocity_give_back_both_ends(shape):
    t = times(*shape)
    x = mix(DATA, NOISE, t)
    close(x, along_frames(t) * DATA + (1 - along_frames(t)) * NOISE, 1e-14)
    seen = Parameterization().estimate(x, DATA - NOISE, t)
    close(seen.data, DATA, 1e-13)
    close(seen.noise, NOISE, 1e-13)


def test_velocity_is_the_derivative_of_the_mixture():
    t, h = times(3), 1e-6
    slope = (mix(DATA, NOISE, t + h) - mix(DATA, NOISE, t - h)) / (2 * h)
    close(slope, Parameterization().target(DATA, NOISE, t), 1e-9)


def test_each_frame_may_have_its_own_time():
    t = torch.tensor([[1.0, 0.0, 0.5, 1.0]]).expand(3, -1)
    x = mix(DATA, NOISE, t)
    assert torch.equal(x[:, :, [0, 3]], DATA[:, :, [0, 3]])
    assert torch.equal(x[:, :, 1], NOISE[:, :, 1])
    close(x[:, :, 2], (DATA[:, :, 2] + NOISE[:, :, 2]) / 2, 1e-14)


# Schedules


def abar_by_hand(schedule: str) -> list[float]:
    """The published recurrences, one step after another."""
    product, result = 1.0, []
    for n in range(1000):
        if schedule == "linear":
            beta = 1e-4 + (0.02 - 1e-4) * n / 999
        elif schedule == "scaled_linear":
            beta = (0.00085**0.5 + (0.012**0.5 - 0.00085**0.5) * n / 999) ** 2
        else:
            f = [math.cos((m / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2 for m in (n, n + 1)]
            beta = min(0.999, 1 - f[1] / f[0])
        product *= 1 - beta
        result.append(product)
    return result


@pytest.mark.parametrize(
    ("schedule", "terminal"), [("linear", 0.006353), ("scaled_linear", 0.068265), ("cosine", 4.928e-05)]
)
def test_schedules_are_the_published_ones(schedule, terminal):
    """The terminal sqrt(abar) is that of Lin et al. 2024, table 1."""
    process = VariancePreserving(schedule=schedule)
    expected = torch.tensor(abar_by_hand(schedule), dtype=torch.float64)
    torch.testing.assert_close(process.alphas_cumprod, expected, rtol=1e-10, atol=0)
    assert process.alpha(torch.zeros(())).item() == pytest.approx(terminal, rel=1e-4)


def test_zero_terminal_snr_keeps_the_first_step_and_empties_the_last():
    plain = VariancePreserving(schedule="scaled_linear").alphas_cumprod.sqrt()
    process = VariancePreserving(schedule="scaled_linear", zero_terminal_snr=True)
    moved = process.alphas_cumprod.sqrt()
    assert moved[0].item() == pytest.approx(plain[0].item(), rel=1e-12)
    assert moved[-1] == 0
    close(moved, (plain - plain[-1]) * plain[0] / (plain[0] - plain[-1]), 1e-12)
    assert torch.equal(Parameterization(process).mix(DATA, NOISE, torch.zeros(3)), NOISE)


@pytest.mark.parametrize("continuous", [False, True])
def test_an_snr_shift_divides_the_snr(continuous):
    t = torch.arange(1000, dtype=torch.float64) / 1000  # the steps: between them, a table's alpha is a line
    plain, shifted = (log_snr(VariancePreserving(snr_shift=s, continuous=continuous), t) for s in (1.0, 3.0))
    close(plain - shifted, torch.full_like(t, math.log(3)), 1e-9)


@pytest.mark.parametrize("schedule", ["linear", "scaled_linear", "cosine"])
def test_the_continuous_schedule_is_the_limit_of_ever_finer_tables(schedule):
    """With N times as many steps and betas N times smaller, the distance falls N times."""
    t = torch.linspace(0, 1, 41, dtype=torch.float64)
    limit = VariancePreserving(schedule=schedule, continuous=True).alpha(t)
    betas = {"linear": (1e-4, 0.02), "scaled_linear": (0.00085, 0.012), "cosine": None}[schedule]
    gaps = []
    for finer in (1, 8):
        scaled = betas and (betas[0] / finer, betas[1] / finer)
        table = VariancePreserving(schedule=schedule, num_steps=1000 * finer, betas=scaled)
        gaps.append((table.alpha(t) - limit).abs().max().item())
    assert gaps[0] < 3e-3
    assert gaps[1] < gaps[0] / 7


def test_published_steps_and_times_are_two_names_of_one_place():
    process, steps = VariancePreserving(), torch.arange(1000)
    close(process.step_of(process.t_of(steps)), steps.double(), 1e-9)
    assert process.step_of(torch.tensor([0.0, 1.0])).tolist() == [999, -1]
    assert process.t_of(torch.tensor([999, -1])).tolist() == [0, 1]
    trailing = process.step_of(torch.linspace(0, 1, 51, dtype=torch.float64))[:-1]
    close(trailing, torch.arange(999, 0, -20).double(), 1e-9)  # 999, 979, .. 19: even times


@pytest.mark.parametrize("process", PROCESSES, ids=NAMES)
def test_levels_rise_to_the_data(process):
    t = torch.linspace(0, 1, 301, dtype=torch.float64)
    assert (process.alpha(t[-1]).item(), process.sigma(t[-1]).item()) == (1, 0)
    assert (log_snr(process, t).diff() > 0).all()
    if isinstance(process, VariancePreserving):
        close(process.alpha(t) ** 2 + process.sigma(t) ** 2, torch.ones_like(t), 1e-14)
    grid = t.float().view(7, 43)
    assert process.sigma(grid).dtype == torch.float64
    assert torch.equal(process.sigma(grid).flatten(), process.sigma(t.float()))


@pytest.mark.parametrize("process", PROCESSES, ids=NAMES)
@settings(max_examples=25, deadline=None)
@given(t=st.floats(1e-3, 1 - 1e-3))
def test_the_time_of_an_snr_is_found_again(process, t):
    t = torch.tensor([t], dtype=torch.float64)
    close(process.time_at(log_snr(process, t)), t, 1e-8)


def test_the_ends_are_found_again():
    infinity = torch.tensor([-math.inf, math.inf])
    for process in PROCESSES:
        assert process.time_at(infinity).tolist() == pytest.approx([0, 1], abs=1e-15)


# Predictions


@pytest.mark.parametrize("process", PROCESSES, ids=NAMES)
@pytest.mark.parametrize("shape", [(3,), (3, 4)])
def test_an_answer_gives_back_data_and_noise_and_they_the_answer(process, shape):
    t = 0.02 + 0.96 * times(*shape)
    for prediction in PREDICTIONS:
        p = Parameterization(process, prediction)
        x, answer = p.mix(DATA, NOISE, t), p.target(DATA, NOISE, t)
        estimate = p.estimate(x, answer, t)
        close(estimate.data, DATA, 1e-9)
        close(estimate.noise, NOISE, 1e-9)
        close(p.output_of(x, estimate, t), answer, 1e-9)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("process", PROCESSES, ids=NAMES)
def test_it_does_so_at_the_ends_but_where_nothing_is_known(process, prediction):
    p, ones, zeros = Parameterization(process, prediction), torch.ones(3), torch.zeros(3)
    x, answer = p.mix(DATA, NOISE, ones), p.target(DATA, NOISE, ones)
    assert torch.equal(x, DATA)
    close(p.estimate(x, answer, ones).data, DATA, 1e-15)
    known = torch.zeros_like(NOISE) if prediction == "data" else NOISE
    close(p.estimate(x, answer, ones).noise, known, 1e-14)
    close(p.output_of(x, p.estimate(x, answer, ones), ones), answer, 1e-14)

    x, answer = p.mix(DATA, NOISE, zeros), p.target(DATA, NOISE, zeros)
    if prediction == "noise" and process.alpha(zeros)[0] == 0:
        with pytest.raises(ConfigError, match="nothing of the data at t = 0"):
            p.estimate(x, answer, zeros)
        return
    close(p.estimate(x, answer, zeros).data, DATA, 1e-9)
    close(p.estimate(x, answer, zeros).noise, NOISE, 1e-9)


@pytest.mark.parametrize("process", PROCESSES, ids=NAMES)
def test_any_two_numbers_are_an_answer_and_come_back(process):
    """Conversion does not lean on the answer being right."""
    x, answer, t = DATA, normal(*DATA.shape, seed=5), torch.tensor([0.1, 0.5, 1.0])
    for prediction in PREDICTIONS:
        p = Parameterization(process, prediction)
        estimate = p.estimate(x, answer, t)
        close(p.output_of(x, estimate, t), answer, 1e-8)
        if prediction != "data":
            close(p.mix(*estimate, t), x, 1e-8)


def test_velocity_is_the_slope_of_the_scaled_process_in_tau():
    p, h, t = Parameterization(VarianceExploding(sigma_max=3.0)), 1e-6, torch.tensor([0.1, 0.4, 0.7]).double()
    lower, upper = (levels(p.process, t + s) for s in (-h, h))
    z = [p.mix(DATA, NOISE, t + s) / at.total for s, at in ((-h, lower), (h, upper))]
    close((z[1] - z[0]) / (upper.tau - lower.tau), p.target(DATA, NOISE, t), 1e-7)


def test_v_is_the_slope_in_the_angle_of_the_circle():
    """x = cos(phi) data + sin(phi) noise, v = dx/dphi."""
    p, t, h = Parameterization(VariancePreserving(), "v"), times(3), 1e-6
    alpha, sigma = levels(p.process, t)
    phi = torch.atan2(sigma, alpha)
    slope = [(phi + s).cos() * DATA + (phi + s).sin() * NOISE for s in (-h, h)]
    close((slope[1] - slope[0]) / (2 * h), p.target(DATA, NOISE, t), 1e-8)


def test_levels_are_finer_than_the_latents_and_the_latents_keep_their_type():
    """At t = 0.999 a level in bfloat16 would be 1; so the mixture is rounded once, at its end."""
    data, noise = DATA.bfloat16(), NOISE.bfloat16()
    x = Parameterization().mix(data, noise, torch.full((3,), 0.999, dtype=torch.float64))
    assert x.dtype == torch.bfloat16
    expected = (0.999 * data.double() + 0.001 * noise.double()).bfloat16()
    assert (x != expected).float().mean() < 0.02  # float32 may round to the other side now and then
    assert combine((torch.ones(1, 1, 1, 1, 1).double(), x)).dtype == torch.bfloat16


# Variance


def test_reverse_variances_are_those_of_ddpm():
    process = VariancePreserving()
    abar = process.alphas_cumprod
    for n in (1, 10, 500, 999):
        t, t_next = (process.t_of(torch.tensor([m])) for m in (n, n - 1))
        small, large = reverse_variances(levels(process, t), levels(process, t_next))
        beta = 1 - abar[n] / abar[n - 1]
        torch.testing.assert_close(large.squeeze(), beta, rtol=1e-9, atol=0)
        torch.testing.assert_close(small.squeeze(), beta * (1 - abar[n - 1]) / (1 - abar[n]), rtol=1e-9, atol=0)


@pytest.mark.parametrize("process", PROCESSES, ids=NAMES)
@pytest.mark.parametrize("spread", [0.0, 1.0])
def test_reverse_variances_are_exact_for_known_and_for_standard_normal_data(process, spread):
    here, there = levels(process, torch.tensor([0.3])), levels(process, torch.tensor([0.6]))
    var_here, var_there = (at.alpha**2 * spread + at.sigma**2 for at in (here, there))
    covariance = here.alpha * there.alpha * spread + here.alpha / there.alpha * there.sigma**2
    torch.testing.assert_close(
        reverse_variances(here, there)[int(spread)], var_there - covariance**2 / var_here, rtol=1e-9, atol=0
    )


def test_a_learned_variance_lies_between_its_bounds_in_the_logarithm():
    p = Parameterization(VariancePreserving(), "noise", learned_variance=True)
    here, there = levels(p.process, torch.full((3,), 0.5)), levels(p.process, torch.full((3,), 0.52))
    small, large = (v.log().expand_as(DATA) for v in reverse_variances(here, there))
    for raw, expected in ((-1.0, small), (1.0, large), (0.0, (small + large) / 2)):
        close(p.log_variance(torch.full_like(DATA, raw), here, there), expected, 1e-12)
    end = levels(p.process, torch.ones(3))
    assert p.log_variance(DATA, here, end).isfinite().all()


def test_a_learned_variance_is_the_second_half_of_the_channels():
    p, t = Parameterization(VariancePreserving(), "noise", learned_variance=True), torch.full((3,), 0.5)
    answer, raw = p.split(DATA, torch.cat([NOISE, DATA], dim=1))
    assert torch.equal(answer, NOISE)
    assert torch.equal(raw, DATA)
    assert torch.equal(p.estimate(DATA, torch.cat([NOISE, DATA], dim=1), t).noise, NOISE)
    assert Parameterization().split(DATA, NOISE)[1] is None
    with pytest.raises(ConfigError, match="answer 4 channels, got 2"):
        p.estimate(DATA, NOISE, t)
    with pytest.raises(ConfigError, match="answer 2 channels, got 4"):
        Parameterization().estimate(DATA, torch.cat([NOISE, DATA], dim=1), t)


# Preconditioning


def test_preconditioning_is_that_of_the_paper():
    process, s = VarianceExploding(), 0.5
    t = times(3)
    sigma = along_frames(process.sigma(t))
    c_skip, c_out, c_in = preconditioning(process, t, data_std=s)
    torch.testing.assert_close(c_skip, s**2 / (sigma**2 + s**2), rtol=1e-12, atol=0)
    torch.testing.assert_close(c_out, sigma * s / (sigma**2 + s**2).sqrt(), rtol=1e-12, atol=0)
    torch.testing.assert_close(c_in, 1 / (sigma**2 + s**2).sqrt(), rtol=1e-12, atol=0)


@pytest.mark.parametrize("process", PROCESSES, ids=NAMES)
def test_a_preconditioned_network_reads_and_answers_unit_variance(process):
    """Under N(0, s^2) data, c_in x and (data - c_skip x) / c_out have variance 1, and s = 1 asks for -v of c_in x."""
    t = torch.tensor([0.2, 0.5, 0.9])
    alpha, sigma = levels(process, t)
    for s in (0.5, 1.0):
        c_skip, c_out, c_in = preconditioning(process, t, data_std=s)
        one = torch.ones_like(alpha)
        torch.testing.assert_close(c_in**2 * (alpha**2 * s**2 + sigma**2), one)
        torch.testing.assert_close(((1 - c_skip * alpha) ** 2 * s**2 + (c_skip * sigma) ** 2) / c_out**2, one)
    v = Parameterization(process, "v")
    x = v.mix(DATA, NOISE, t)
    close(c_skip * x - c_out * v.target(DATA, NOISE, t), DATA, 1e-9)
    close(as_read(process, x, t), c_in * x if isinstance(process, VarianceExploding) else x, 1e-12)


# Values


@configuration
class Card:
    """A value with a process in it, as recipes have."""

    process: Process = RectifiedFlow()
    asks: Parameterization = Parameterization()


@pytest.mark.parametrize("process", PROCESSES, ids=NAMES)
def test_a_process_survives_json(process):
    card = Card(process, Parameterization(process, "v", learned_variance=True))
    assert from_dict(Card, to_dict(card)) == card


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: VariancePreserving(num_steps=1), "at least 2, got 1"),
        (lambda: VariancePreserving(snr_shift=-1.0), "must be positive, got -1.0; 1 means no shift"),
        (lambda: VariancePreserving(betas=(0.02, 1e-4)), "rise within"),
        (lambda: VariancePreserving(betas=(1e-4, 1.0)), "published: \\(0.0001, 0.02\\)"),
        (lambda: VariancePreserving(schedule="cosine", betas=(1e-4, 0.02)), "no betas"),
        (lambda: VarianceExploding(sigma_max=0.0), "must be positive, got 0.0"),
        (lambda: VarianceExploding(rho=math.nan), "must be positive"),
        (lambda: preconditioning(RectifiedFlow(), torch.ones(1), data_std=0.0), "data_std must be positive"),
        (lambda: from_dict(Card, {"process": {"kind": "cosine"}}), "process"),
    ],
)
def test_impossible_processes_are_refused(make, message):
    with pytest.raises(ConfigError, match=message):
        make()
