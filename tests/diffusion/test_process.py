import pytest
import torch

from reelflow.diffusion.process import along_frames, data_from_velocity, mix, noise_from_velocity, velocity_of


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


DATA, NOISE = normal(3, 2, 4, 2, 2), normal(3, 2, 4, 2, 2, seed=1)


def times(*shape: int) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_time_one_is_the_data_and_time_zero_the_noise_to_the_bit(dtype):
    data, noise = DATA.to(dtype), NOISE.to(dtype)
    assert torch.equal(mix(data, noise, torch.ones(3)), data)
    assert torch.equal(mix(data, noise, torch.zeros(3)), noise)


@pytest.mark.parametrize("shape", [(3,), (3, 4)])
def test_the_mixture_and_its_velocity_give_back_both_ends(shape):
    t = times(*shape)
    x, velocity = mix(DATA, NOISE, t), velocity_of(DATA, NOISE)
    torch.testing.assert_close(x, along_frames(t) * DATA + (1 - along_frames(t)) * NOISE, rtol=0, atol=1e-14)
    torch.testing.assert_close(data_from_velocity(x, velocity, t), DATA, rtol=0, atol=1e-13)
    torch.testing.assert_close(noise_from_velocity(x, velocity, t), NOISE, rtol=0, atol=1e-13)


def test_velocity_is_the_derivative_of_the_mixture():
    t, h = times(3), 1e-6
    slope = (mix(DATA, NOISE, t + h) - mix(DATA, NOISE, t - h)) / (2 * h)
    torch.testing.assert_close(slope, velocity_of(DATA, NOISE), rtol=0, atol=1e-9)


def test_each_frame_may_have_its_own_time():
    t = torch.tensor([[1.0, 0.0, 0.5, 1.0]]).expand(3, -1)
    x = mix(DATA, NOISE, t)
    assert torch.equal(x[:, :, [0, 3]], DATA[:, :, [0, 3]])
    assert torch.equal(x[:, :, 1], NOISE[:, :, 1])
    torch.testing.assert_close(x[:, :, 2], (DATA[:, :, 2] + NOISE[:, :, 2]) / 2)
