import math
from itertools import pairwise

import pytest
import torch

from reelflow.diffusion.process import along_frames
from reelflow.diffusion.rollout import rollout_given
from reelflow.diffusion.samplers import euler, heun
from reelflow.diffusion.timesteps import inference_times
from reelflow.errors import ConfigError

SAMPLERS = [euler, heun]
MEAN, STD = 1.5, 0.4


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


X = normal(2, 3, 4, 2, 2)


def gaussian_velocity(x, t):
    """E[data - noise | x_t = x] for data of N(MEAN, STD^2): the best any network could answer."""
    t = along_frames(t)
    variance = (t * STD) ** 2 + (1 - t) ** 2
    return MEAN + (t * STD**2 - (1 - t)) / variance * (x - t * MEAN)


def wavy_velocity(x, t):
    """A field without meaning, different for each frame and each time."""
    return torch.sin(3 * x) + along_frames(t) * x.mean(dim=(1, 2, 3, 4), keepdim=True)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_one_step_recovers_the_data_under_the_true_velocity_of_one_point(sampler):
    data, noise = normal(*X.shape, seed=1), X
    one = torch.tensor([0.0, 1.0], dtype=torch.float64)
    for times in (one, rollout_given(one, 4)):
        assert (sampler(lambda x, t: data - noise, noise, times) - data).abs().max() < 1e-15


def test_euler_recovers_the_data_from_the_velocity_at_each_place():
    """(data - x) / (1 - t) points at the data from wherever x has got to, in any number of steps."""
    data = normal(*X.shape, seed=1)
    for num_steps in (1, 2, 9):
        found = euler(lambda x, t: (data - x) / (1 - along_frames(t)), X, inference_times(num_steps, shift=3.0))
        torch.testing.assert_close(found, data, rtol=0, atol=1e-13)


@pytest.mark.parametrize(("sampler", "order"), [(euler, 1), (heun, 2)])
def test_samplers_converge_at_their_order(sampler, order):
    """Under the optimal velocity of N(m, s^2), noise x arrives at m + s x exactly."""
    steps = [32, 64, 128, 256]
    errors = [(sampler(gaussian_velocity, X, inference_times(n)) - (MEAN + STD * X)).abs().max().item() for n in steps]
    slopes = [math.log2(coarse / fine) for coarse, fine in pairwise(errors)]
    assert slopes == pytest.approx(3 * [order], abs=0.15)


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_frame_at_time_one_never_changes(sampler, dtype):
    x = X.to(dtype)
    times = rollout_given(inference_times(5, shift=2.0), 4, num_given=2)
    y = sampler(wavy_velocity, x, times)
    assert torch.equal(y[:, :, :2], x[:, :, :2])
    assert (y[:, :, 2:] != x[:, :, 2:]).any(1).all()
    assert y.dtype == dtype


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_matrix_of_equal_columns_is_a_vector(sampler):
    times = inference_times(4)
    assert torch.equal(sampler(wavy_velocity, X, times), sampler(wavy_velocity, X, rollout_given(times, 4)))


@pytest.mark.parametrize(("sampler", "evaluations"), [(euler, 1), (heun, 2)])
def test_the_velocity_is_asked_once_or_twice_a_step_at_the_times_given(sampler, evaluations):
    seen = []

    def velocity(x, t):
        assert t.shape == (2,)
        seen.append(t[0].item())
        return x

    times = inference_times(3)
    sampler(velocity, X, times)
    expected = times[:-1, None] if evaluations == 1 else torch.stack([times[:-1], times[1:]], dim=1)
    assert seen == expected.flatten().tolist()


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_previews_are_estimates_of_the_data(sampler):
    previews = []
    y = sampler(gaussian_velocity, X, inference_times(200), on_step=lambda i, x: previews.append((i, x)))
    assert [i for i, _ in previews] == list(range(200))
    torch.testing.assert_close(previews[0][1], torch.full_like(X, MEAN))  # from pure noise, the mean is all one knows
    torch.testing.assert_close(previews[-1][1], y, rtol=0, atol=1e-13 if sampler is euler else 1e-2)


def test_previews_of_a_known_point_show_it_from_the_first_step():
    data, shown = normal(*X.shape, seed=1), []
    times = rollout_given(inference_times(3), 4, num_given=1)
    noise = torch.cat([data[:, :, :1], X[:, :, 1:]], dim=2)
    euler(lambda x, t: data - noise, noise, times, on_step=lambda i, x: shown.append(x))
    for preview in shown:
        torch.testing.assert_close(preview, data, rtol=0, atol=1e-14)


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("times", [[0.5], [0.0, 0.6, 0.5, 1.0], [-0.1, 1.0], [0.0, 1.1], [0.0, math.nan, 1.0]])
def test_times_that_fall_or_leave_the_interval_are_refused(sampler, times):
    with pytest.raises(ConfigError, match="rise within"):
        sampler(wavy_velocity, X, torch.tensor(times))


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_matrix_needs_one_column_per_frame(sampler):
    with pytest.raises(ConfigError, match="3 columns but x has 4 latent frames"):
        sampler(wavy_velocity, X, rollout_given(inference_times(2), 3))
