"""An adversary for an autoencoder: a discriminator of space-time patches, and how much it has to say.

    discriminator   hinge(D(clip), D(decoded)) = mean(relu(1 - D(clip)) + relu(1 + D(decoded))) / 2
    autoencoder     weight x adaptive x mean(-D(decoded)),   adaptive = |grad distance| / (|grad mean(-D(decoded))| + 1e-4)

with both gradients taken at the decoder's last kernel (Esser et al. 2021, VQGAN, eq. 7). Both sides learn from the same
backward pass: what the autoencoder minimises sees the discriminator's weights as constants, and the reverse.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call

from reelflow.config import configuration
from reelflow.errors import ConfigError

__all__ = ["Adversarial", "PatchDiscriminator", "Verdict", "adaptive_weight", "fool", "hinge", "judge"]

CEILING = 1e4  # of the adaptive weight


@configuration
class Adversarial:
    """When an adversary begins, how much it weighs, and its size.

    Before `start` it is not computed at all. It learns with the optimizer of the run, so at the same rate as the first and
    last layers of the autoencoder, and shares its limit on the norm of the gradient.
    """

    start: int  # batches
    weight: float = 0.05  # of the adaptive weight
    channels: int = 64  # after the first convolution, doubled by each that follows, up to 8 times
    layers: int = 3  # that halve the sides

    def __post_init__(self) -> None:
        if self.start < 0 or not self.weight > 0:
            raise ConfigError(f"an adversary needs start >= 0 and weight > 0, got {self.start} and {self.weight}")
        if self.channels < 8 or self.channels % 8 or self.layers < 1:
            raise ConfigError(
                f"a discriminator needs layers >= 1 and channels a multiple of 8, got {self.layers} and {self.channels}; "
                f"nearest: {max(1, self.layers)} and {max(8, round(self.channels / 8) * 8)}"
            )


class PatchDiscriminator(nn.Module):
    """Say of each space-time patch how real it looks (Isola et al. 2017, sec. 3.2.2, in three dimensions).

    Convolutions over three frames that halve the sides, group norms, leaky ReLU. Any T; an image is a clip of one frame.
    """

    def __init__(self, config: Adversarial) -> None:
        super().__init__()
        width, parts = 3, list[nn.Module]()
        for layer in range(config.layers):
            wider = config.channels * min(2**layer, 8)
            parts += [nn.Conv3d(width, wider, (3, 4, 4), stride=(1, 2, 2), padding=1)]
            parts += [nn.GroupNorm(8, wider)] if layer else []
            parts += [nn.LeakyReLU(0.2)]
            width = wider
        self.layers = nn.Sequential(*parts, nn.Conv3d(width, 1, 3, padding=1))

    def forward(self, clip: Float[Tensor, "B 3 T H W"]) -> Float[Tensor, "B 1 T h w"]:
        return self.layers(clip)


class Verdict(NamedTuple):
    """The discriminator's loss, and the shares of patches that it takes for what they are."""

    loss: Float[Tensor, ""]
    real: Float[Tensor, ""]
    fake: Float[Tensor, ""]


def hinge(real: Float[Tensor, "..."], fake: Float[Tensor, "..."]) -> Float[Tensor, ""]:
    """Return the discriminator's loss: 1 if it says nothing, 0 if it is right by a margin of 1 everywhere."""
    return (F.relu(1 - real).mean() + F.relu(1 + fake).mean()) / 2


def judge(discriminator: nn.Module, clip: Float[Tensor, "B 3 T H W"], decoded: Float[Tensor, "B 3 T H W"]) -> Verdict:
    """Return what the discriminator learns from; no gradient reaches `decoded`."""
    real, fake = discriminator(clip).float(), discriminator(decoded.detach()).float()
    return Verdict(hinge(real, fake), (real > 0).float().mean(), (fake < 0).float().mean())


def fool(discriminator: nn.Module, decoded: Float[Tensor, "B 3 T H W"]) -> Float[Tensor, ""]:
    """Return mean(-D(decoded)), which the autoencoder minimises; no gradient reaches the discriminator."""
    fixed = {name: weight.detach() for name, weight in discriminator.named_parameters()}
    return -functional_call(discriminator, fixed, (decoded,)).float().mean()


def adaptive_weight(
    distance: Float[Tensor, ""], adversarial: Float[Tensor, ""], last: Float[Tensor, "..."]
) -> Float[Tensor, ""]:
    """Return |grad distance| / (|grad adversarial| + 1e-4) at the weight `last`, at most 1e4, without gradients."""
    norms = [torch.autograd.grad(value, last, retain_graph=True)[0].norm() for value in (distance, adversarial)]
    return (norms[0] / (norms[1] + 1e-4)).clamp(max=CEILING).detach()
