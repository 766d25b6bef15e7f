import math

import pytest
import torch

from reelflow.config import configuration, from_dict, to_dict
from reelflow.diffusion.process import (
    Parameterization,
    RectifiedFlow,
    VarianceExploding,
    VariancePreserving,
    along_frames,
    levels,
    log_snr,
    preconditioning,
    reverse_variances,
)
from reelflow.diffusion.weighting import (
    SNR,
    MinSNR,
    Sigmoid,
    Uniform,
    Weighting,
    log_snr_rate,
    loss_weight,
    variational_bound,
)
from reelflow.errors import ConfigError

T = torch.linspace(0.02, 0.98, 25, dtype=torch.float64)
FLOW, DDPM, LIMIT = RectifiedFlow(), VariancePreserving(), VariancePreserving(schedule="cosine", continuous=True)
PROCESSES = [FLOW, DDPM, LIMIT, VarianceExploding()]
WEIGHTINGS = [Uniform(), Uniform(of="v"), SNR(), MinSNR(), Sigmoid(bias=-1.0)]
PREDICTIONS = ["velocity", "v", "noise", "data"]
ENDS = torch.tensor([0.0, 1.0])


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-9, atol=0)


@pytest.mark.parametrize("process", PROCESSES, ids=["flow", "ddpm", "limit", "exploding"])
@pytest.mark.parametrize("weighting", [w for w in WEIGHTINGS if w != Uniform()], ids=str)
def test_a_weighted_loss_does_not_depend_on_the_prediction(weighting, process):
    """Two answers of the same network, as different predictions, have the same weighted squared error at each t."""
    x, right, wrong = (normal(25, 1, 1, 2, 2, seed=seed) for seed in range(3))
    losses = []
    for prediction in PREDICTIONS:
        p = Parameterization(process, prediction)
        alpha, sigma = levels(process, T)
        answers = [p.target(data, (x - alpha * data) / sigma, T) for data in (right, wrong)]
        error = (answers[0] - answers[1]).square().mean(dim=(1, 2, 3, 4))
        losses.append(loss_weight(weighting, process, prediction, T) * error)
    for loss in losses[1:]:
        torch.testing.assert_close(loss, losses[0], rtol=1e-6, atol=0)


def test_weights_on_the_prediction_they_are_stated_for():
    for process in PROCESSES:
        snr = log_snr(process, T).exp()
        for prediction in PREDICTIONS:
            assert (loss_weight(Uniform(), process, prediction, T) == 1).all()
            close(loss_weight(Uniform(of=prediction), process, prediction, T), torch.ones_like(T))
        close(loss_weight(SNR(), process, "data", T), snr)
        close(loss_weight(SNR(), process, "noise", T), torch.ones_like(T))
        close(loss_weight(MinSNR(gamma=2.0), process, "data", T), snr.clamp(max=2.0))
        close(loss_weight(Sigmoid(bias=0.5), process, "noise", T), 1 / (1 + snr / math.exp(0.5)))


def test_weights_in_the_forms_that_papers_print():
    snr = log_snr(DDPM, T).exp()
    close(loss_weight(MinSNR(), DDPM, "noise", T), (5 / snr).clamp(max=1))  # Hang et al. 2023
    close(loss_weight(MinSNR(), DDPM, "v", T), snr.clamp(max=5) / (snr + 1))
    close(loss_weight(SNR(), DDPM, "v", T), snr / (snr + 1))
    close(loss_weight(Uniform(of="velocity"), FLOW, "noise", T), 1 / T**2)
    close(loss_weight(Uniform(of="velocity"), FLOW, "data", T), 1 / (1 - T) ** 2)
    exploding = VarianceExploding()
    c_out = preconditioning(exploding, T).c_out.flatten()
    close(loss_weight(Uniform(of="v"), exploding, "data", T), 1 / c_out**2)  # Karras et al. 2022, table 1


def test_weights_take_their_limits_at_the_ends():
    process = VariancePreserving(zero_terminal_snr=True)
    inf = math.inf
    for weighting, prediction, limits in (
        (SNR(), "data", [0, inf]),
        (SNR(), "noise", [1, 1]),
        (MinSNR(gamma=3.0), "data", [0, 3]),
        (MinSNR(gamma=3.0), "noise", [1, 0]),
        (Sigmoid(bias=1.0), "data", [0, math.e]),
        (Sigmoid(bias=1.0), "noise", [1, 0]),
        (Uniform(of="noise"), "v", [0, 1]),
        (Uniform(of="v"), "noise", [inf, 1]),
    ):
        assert loss_weight(weighting, process, prediction, ENDS).tolist() == pytest.approx(limits, abs=1e-12)


def test_the_rate_of_log_snr_is_its_derivative():
    close(log_snr_rate(FLOW, T), 2 / (T * (1 - T)))
    angle = math.pi / 2 / 1.008  # alpha = sin(angle t) / sin(angle)
    s, c, top = (angle * T).sin(), (angle * T).cos(), math.sin(angle)
    close(log_snr_rate(LIMIT, T), 2 * angle * c / s * (1 + (s / top) ** 2 / (1 - (s / top) ** 2)))
    assert log_snr_rate(FLOW, ENDS).tolist() == [math.inf, math.inf]
    with torch.no_grad():
        assert log_snr_rate(DDPM, T.float()).isfinite().all()


def test_even_draws_of_log_snr_and_draws_of_t_with_its_rate_give_the_same_loss():
    """The integral of w over log SNR is the mean over t of w times the rate."""
    t = (torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000
    weight = loss_weight(Sigmoid(bias=1.0), FLOW, "noise", t) * t**2  # t^2 so that the integral is finite
    over_t = (weight * log_snr_rate(FLOW, t)).mean()
    lam = torch.linspace(-40, 40, 20_001, dtype=torch.float64)
    over_lam = torch.trapezoid(torch.sigmoid(1 - lam) * torch.sigmoid(lam / 2) ** 2, lam)
    torch.testing.assert_close(over_t, over_lam, rtol=1e-3, atol=0)


# Variance


P = Parameterization(DDPM, "noise", learned_variance=True)


def bound_of(raw, t, t_next, seed=1):
    data, noise = normal(2, 1, 1, 2, 2), normal(2, 1, 1, 2, 2, seed=seed)
    x = P.mix(data, noise, t)
    output = torch.cat([noise + 0.1 * normal(2, 1, 1, 2, 2, seed=9), raw], dim=1)
    return data, x, output, variational_bound(P, data, x, output, t, t_next)


def test_the_bound_is_the_divergence_of_two_normals():
    t, t_next = torch.full((2,), 0.4).double(), torch.full((2,), 0.41).double()
    raw = normal(2, 1, 1, 2, 2, seed=4)
    data, x, output, bound = bound_of(raw, t, t_next)
    here, there = levels(DDPM, t), levels(DDPM, t_next)
    small, _ = reverse_variances(here, there)
    a = here.alpha / there.alpha

    def mean(data):  # of x' given x and the data: Ho et al. 2020, eq. 7, over any step
        return (a * there.sigma**2 * x + there.alpha * (here.sigma**2 - a**2 * there.sigma**2) * data) / here.sigma**2

    truth = torch.distributions.Normal(mean(data), small.sqrt().expand_as(x))
    guess = torch.distributions.Normal(
        mean(P.estimate(x, output, t).data), (0.5 * P.log_variance(raw, here, there)).exp()
    )
    torch.testing.assert_close(bound, torch.distributions.kl_divergence(truth, guess), rtol=1e-8, atol=1e-12)


def test_the_bound_moves_the_variance_and_not_the_mean():
    t, t_next = torch.full((2,), 0.4).double(), torch.full((2,), 0.41).double()
    output = torch.cat([normal(2, 1, 1, 2, 2), normal(2, 1, 1, 2, 2)], dim=1).requires_grad_()
    variational_bound(P, normal(2, 1, 1, 2, 2), normal(2, 1, 1, 2, 2, seed=3), output, t, t_next).sum().backward()
    assert (output.grad[:, 0] == 0).all()
    assert (output.grad[:, 1] != 0).all()


def test_a_step_into_the_data_costs_nothing():
    t, t_next = torch.tensor([0.4, 0.999]).double(), torch.tensor([0.5, 1.0]).double()
    *_, bound = bound_of(normal(2, 1, 1, 2, 2, seed=4).requires_grad_(), t, t_next)
    assert (bound[0] > 0).all()
    assert (bound[1] == 0).all()
    bound.sum().backward()


def test_a_step_into_the_data_has_no_gradient_and_no_given_frame_has_one_that_is_not_finite():
    """There the variance is 0, and a raw variance far outside its bounds would make the gradient 0 x infinity."""
    t, t_next = torch.tensor([[0.5, 1 - 1e-3, 1.0]]).double(), torch.tensor([[0.6, 1.0, 1.0]]).double()
    data, x = (normal(1, 1, 3, 2, 2, seed=seed).float() for seed in (0, 1))
    raw = torch.full_like(x, -4.0).requires_grad_()
    bound = variational_bound(P, data, x, torch.cat([x, raw], dim=1), t, t_next)
    bound.sum().backward()
    assert (bound[:, :, 1:] == 0).all()
    assert (raw.grad[:, :, 1:] == 0).all()
    assert raw.grad[:, :, 0].isfinite().all()
    assert raw.grad[:, :, 0].all()


def test_frames_have_their_own_steps():
    t = torch.tensor([[0.2, 0.6]]).double()
    data, x, raw = (normal(1, 1, 2, 2, 2, seed=seed) for seed in range(3))
    both = variational_bound(P, data, x, torch.cat([x, raw], dim=1), t, t + 0.1)
    for f in range(2):
        cut = slice(f, f + 1)
        alone = variational_bound(
            P, data[:, :, cut], x[:, :, cut], torch.cat([x, raw], dim=1)[:, :, cut], t[:, f], t[:, f] + 0.1
        )
        close(both[:, :, cut], alone)
    assert along_frames(t).shape == (1, 1, 2, 1, 1)


# Values


@configuration
class Card:
    """A value with a weighting in it."""

    weighting: Weighting = Uniform()


@pytest.mark.parametrize("weighting", WEIGHTINGS, ids=str)
def test_a_weighting_survives_json(weighting):
    assert from_dict(Card, to_dict(Card(weighting))) == Card(weighting)


def test_impossible_weightings_are_refused():
    with pytest.raises(ConfigError, match="gamma must be positive, got 0"):
        MinSNR(gamma=0.0)
    x, t = normal(1, 1, 1, 1, 1), torch.ones(1) / 2
    with pytest.raises(ConfigError, match="set learned_variance=True"):
        variational_bound(Parameterization(DDPM, "noise"), x, x, x, t, t + 0.1)
