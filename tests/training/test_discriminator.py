from dataclasses import replace

import pytest
import torch

from reelflow.errors import ConfigError
from reelflow.training.discriminator import Adversarial, PatchDiscriminator, adaptive_weight, hinge

SMALL = Adversarial(start=0, channels=8, layers=2)


def test_the_hinge_is_one_in_silence_and_zero_when_right_by_a_margin():
    zero, one = torch.zeros(3), torch.ones(3)
    assert hinge(zero, zero) == 1
    assert hinge(one, -one) == hinge(2 * one, -5 * one) == 0
    assert hinge(-one, one) == 2


def test_the_adaptive_weight_makes_both_gradients_one_length():
    last = torch.tensor([1.0, 2.0], requires_grad=True)
    distance, adversarial = (3 * last[0] + 4 * last[1]), 0.5 * last[0]
    weight = adaptive_weight(distance, adversarial, last)
    assert weight.item() == pytest.approx(5 / (0.5 + 1e-4))
    assert not weight.requires_grad
    assert adaptive_weight(1e9 * distance, adversarial, last) == 1e4  # the ceiling
    assert adaptive_weight(distance, 0 * adversarial, last) == 1e4


@pytest.mark.parametrize("frames", [1, 4])
def test_a_patch_is_judged_by_what_is_near_it(frames):
    torch.manual_seed(0)
    judge = PatchDiscriminator(replace(SMALL, layers=1))
    clip = torch.zeros(1, 3, frames, 16, 16)
    other = clip.clone()
    other[..., 0, 0] = 1
    one, two = judge(clip), judge(other)
    assert one.shape == (1, 1, frames, 8, 8)
    changed = (one != two).any(dim=2)[0, 0]
    assert changed[0, 0]
    assert not changed[3:].any()
    assert not changed[:, 3:].any()


@pytest.mark.parametrize("changes", [{"start": -1}, {"weight": 0.0}, {"channels": 12}, {"layers": 0}])
def test_an_impossible_adversary_is_refused(changes):
    with pytest.raises(ConfigError):
        replace(SMALL, **changes)
