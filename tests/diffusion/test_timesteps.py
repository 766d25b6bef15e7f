import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from reelflow.diffusion.timesteps import draw_logit_normal, draw_uniform, inference_times, shift_times
from reelflow.errors import ConfigError


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


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


@pytest.mark.parametrize(("mean", "std", "shift"), [(0.0, 1.0, 1.0), (0.7, 0.5, 1.0), (-0.4, 1.5, 3.0)])
def test_logit_normal_times_have_the_mean_and_variance_asked_for(mean, std, shift):
    """The logit is normal, so its sample mean and variance have known errors; four of them are allowed."""
    num = 20_000
    logit = draw_logit_normal(num, seeded(), mean=mean, std=std, shift=shift).double().logit()
    assert logit.mean().item() == pytest.approx(mean - math.log(shift), abs=4 * std / num**0.5)
    assert logit.var().item() == pytest.approx(std**2, abs=4 * std**2 * (2 / num) ** 0.5)
    below = (logit < mean - math.log(shift) - std).double().mean().item()
    assert below == pytest.approx(0.5 * math.erfc(0.5**0.5), abs=4 * 0.37 / num**0.5)


def test_uniform_times_fill_the_interval_evenly_and_shift_towards_noise():
    t = draw_uniform(20_000, seeded())
    assert torch.histc(t, 10, 0, 1).sub(2000).abs().max() < 4 * (2000 * 0.9) ** 0.5
    assert torch.equal(draw_uniform(20_000, seeded(), shift=3.0), shift_times(t, 3.0))
    assert shift_times(t, 3.0).mean() < t.mean() < shift_times(t, 0.3).mean()


def test_a_seed_fixes_every_draw():
    for draw in (draw_uniform, draw_logit_normal):
        assert torch.equal(draw(9, seeded()), draw(9, seeded()))
        assert not torch.equal(draw(9, seeded()), draw(9, seeded(1)))


@pytest.mark.parametrize("shift", [0.2, 1.0, 5.0])
@pytest.mark.parametrize("num_steps", [1, 2, 7, 50])
def test_inference_times_rise_from_exactly_zero_to_exactly_one(num_steps, shift):
    times = inference_times(num_steps, shift=shift)
    assert len(times) == num_steps + 1
    assert (times[0].item(), times[-1].item()) == (0, 1)
    assert (times.diff() > 0).all()
    torch.testing.assert_close(shift_times(times, 1 / shift).diff(), torch.full_like(times[1:], 1 / num_steps))


@pytest.mark.parametrize(
    "draw",
    [
        lambda: inference_times(0),
        lambda: inference_times(4, shift=-1.0),
        lambda: shift_times(torch.zeros(1), 0.0),
        lambda: shift_times(torch.zeros(1), math.nan),
        lambda: draw_logit_normal(1, seeded(), std=0.0),
    ],
)
def test_impossible_numbers_are_refused(draw):
    with pytest.raises(ConfigError, match=r"must be (positive|at least 1), got"):
        draw()
