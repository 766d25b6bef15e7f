import pytest
import torch

from reelflow.diffusion.guidance import guided


class Counted:
    """A velocity function that counts its calls and remembers its last arguments."""

    def __init__(self, seed: int) -> None:
        self.value = torch.randn(2, 3, 1, 2, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        self.calls, self.seen = 0, None

    def __call__(self, x, t):
        self.calls, self.seen = self.calls + 1, (x, t)
        return self.value


X, T = torch.zeros(2, 3, 1, 2, 2, dtype=torch.float64), torch.full((2,), 0.3)


@pytest.mark.parametrize("scale", [-1.0, 0.0, 0.4, 3.0, 12.5])
def test_guidance_walks_from_unconditional_through_conditional(scale):
    cond, uncond = Counted(0), Counted(1)
    velocity = guided(cond, uncond, scale=scale)(X, T)
    torch.testing.assert_close(velocity, uncond.value + scale * (cond.value - uncond.value), rtol=0, atol=1e-13)
    assert (cond.calls, uncond.calls) == (1, 1)
    assert cond.seen == uncond.seen == (X, T)


def test_a_scale_of_one_asks_the_conditional_only_and_once():
    cond, uncond = Counted(0), Counted(1)
    assert torch.equal(guided(cond, uncond, scale=1.0)(X, T), cond.value)
    assert (cond.calls, uncond.calls) == (1, 0)


def test_a_scale_of_zero_is_the_unconditional_velocity():
    cond, uncond = Counted(0), Counted(1)
    assert torch.equal(guided(cond, uncond, scale=0.0)(X, T), uncond.value)
