"""An autoencoder whose cells of pixels are projected on their principal components, alone or beside a network.

    latents = P (cell - mean) + encoder(clip)        clip = P+ latents + mean + decoder(latents)

The projection is fitted in closed form: of all linear maps of a cell to so many numbers and back it leaves the least
squared error (Eckart & Young 1936). A network beside it adds nothing at first and learns what the cells do not say.
"""

from collections.abc import Iterable

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from reelflow.errors import ConfigError
from reelflow.models.coder import Conv, Fold, Part, Skip, SkipBlock, Unfold
from reelflow.models.vae import CausalVAE, VAEConfig
from reelflow.nn.conv import START, CausalConv3d, CausalSequence

__all__ = ["fit_linear", "is_linear", "linear"]

LOG_VARIANCE = -8.0  # of the posterior where a network stands beside the projection
SMALLEST = 1e-4  # deviation of a component, as a share of the largest


def linear(
    latent_channels: int,
    *,
    patch: int,
    space: int,
    time: int,
    encoder: tuple[Part | Skip, ...] = (),
    decoder: tuple[Part | Skip, ...] = (),
) -> VAEConfig:
    """Return an autoencoder that projects cells of `time` frames and (patch x space)^2 pixels.

    With an encoder and a decoder the projection is the shortcut around them: the first ends in twice the latent channels,
    the second in 3 patch^2. Frame 0 fills a cell with copies of itself.

    Raises:
        ConfigError: their widths or factors do not fit.
    """
    pixels = 3 * patch**2
    moments = 2 * latent_channels if encoder else latent_channels
    down: tuple[Part, ...] = (Fold(space, time), Conv(moments, (1, 1)))
    up: tuple[Part, ...] = (Conv(pixels * space**2 * time, (1, 1)), Unfold(space, time))
    if not encoder and not decoder:
        return VAEConfig(latent_channels, down, up, patch=patch, posterior="point")
    return VAEConfig(latent_channels, (Skip(encoder, down),), (Skip(decoder, up),), patch=patch)


def is_linear(config: VAEConfig) -> bool:
    """Say whether an autoencoder has a projection that `fit_linear` can fit."""
    for layers, kinds in ((config.encoder, (Fold, Conv)), (config.decoder, (Conv, Unfold))):
        path = layers[0].shortcut if len(layers) == 1 and isinstance(layers[0], Skip) else layers
        if len(path) != 2 or not all(isinstance(layer, kind) for layer, kind in zip(path, kinds, strict=True)):
            return False
        if any(isinstance(layer, Conv) and layer.kernel != (1, 1) for layer in path):
            return False
    return True


@torch.no_grad()
def fit_linear(vae: CausalVAE, clips: Iterable[Float[Tensor, "_ 3 _ _ _"]]) -> None:
    """Fit the projection to clips, so that latents have unit variance, and fix it; what stands beside it begins at zero.

    A component that hardly varies is scaled by no more than 1e4 times as much as the first.

    Raises:
        ConfigError: the autoencoder has no projection, or there are no clips.
    """
    if not is_linear(vae.config):
        raise ConfigError("this autoencoder has no projection to fit; build it by reelflow.models.linear.linear")
    (fold, down), (up, _) = (_path(coder) for coder in (vae.encoder, vae.decoder))
    assert isinstance(down, CausalConv3d)
    assert isinstance(up, CausalConv3d)
    mean, values, vectors = _components(clips, fold, vae.config.patch)
    C = vae.config.latent_channels
    std = values.flip(0)[:C].clamp_min(0).sqrt()
    std = std.clamp_min(SMALLEST * std[0].clamp_min(SMALLEST))
    basis = vectors.flip(1)[:, :C]
    for coder in (vae.encoder, vae.decoder):
        if isinstance(coder[0], SkipBlock):
            head = coder[0].layers[-1]
            assert isinstance(head, CausalConv3d)
            for weight in head.parameters():
                weight.zero_()
    assert down.conv.bias is not None
    assert up.conv.bias is not None
    down.conv.weight.zero_()
    down.conv.weight[:C, :, 0, 0, 0] = (basis / std).T.to(down.conv.weight)
    down.conv.bias.fill_(LOG_VARIANCE)
    down.conv.bias[:C] = (-(mean @ basis) / std).to(down.conv.bias)
    up.conv.weight[:, :, 0, 0, 0] = (basis * std).to(up.conv.weight)
    up.conv.bias.copy_(mean)
    for part in (down, up):
        part.requires_grad_(False)


def _path(coder: CausalSequence) -> list[nn.Module]:
    return list(coder[0].shortcut) if isinstance(coder[0], SkipBlock) else list(coder)


def _components(clips: Iterable[Tensor], fold: nn.Module, patch: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the mean of cells, and the eigenvalues, rising, and eigenvectors of their covariance, in float64."""
    count, total, scatter = 0, None, None
    for clip in clips:
        pixels = rearrange(clip, "B C T (H h) (W w) -> B (C h w) T H W", h=patch, w=patch)
        cells = fold(pixels, START)[0].movedim(1, -1).flatten(0, -2).double()
        total = cells.sum(0) if total is None else total + cells.sum(0)
        scatter = cells.T @ cells if scatter is None else scatter + cells.T @ cells
        count += len(cells)
    if total is None or scatter is None:
        raise ConfigError("there are no clips to fit a projection to")
    mean = total / count
    return mean, *torch.linalg.eigh(scatter / count - torch.outer(mean, mean))
