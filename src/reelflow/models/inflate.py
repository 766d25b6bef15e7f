"""An autoencoder of images becomes one of clips: kernels over one frame become causal ones over three.

The image's kernel is the last in time and the others begin at zero, so that at first every frame is treated as an image:
a clip of one frame has the image's latents, and a longer one those of its frames 0, f, 2 f, ... (Carreira & Zisserman 2017,
sec. 2.2, spread the kernel over time instead; the published causal ones place it last: Yu et al. 2023, MAGVIT-v2.)
"""

from collections.abc import Sequence
from dataclasses import replace

import torch

from reelflow.errors import ConfigError
from reelflow.models.coder import Act, Attention, Conv, Layer, Nearest, Res, Skip
from reelflow.models.vae import CausalVAE, VAEConfig

__all__ = ["inflate", "inflated"]

FRAMES = 3  # that a kernel sees


def inflated(config: VAEConfig, *, halvings: int) -> VAEConfig:
    """Return the autoencoder of clips that `inflate` makes of one of images.

    The last `halvings` strided convolutions of the encoder divide time too, and the first doublings of the decoder
    multiply it. Padding in time repeats the first frame.

    Raises:
        ConfigError: the network has kernels over several frames already, or fewer than `halvings` such layers.
    """
    if config.temporal_stride > 1 or config.pieces is not None:
        raise ConfigError(
            f"only an autoencoder of images is inflated; this one divides time by {config.temporal_stride}"
        )
    encoder, decoder = (tuple(_wider(layer) for layer in layers) for layers in (config.encoder, config.decoder))
    down = [i for i, layer in enumerate(encoder) if isinstance(layer, Conv) and layer.space == 2]
    up = [i for i, layer in enumerate(decoder) if isinstance(layer, Nearest) and layer.space == 2]
    if not 0 <= halvings <= min(len(down), len(up)):
        raise ConfigError(
            f"halvings of time go with those of space, of which the encoder has {len(down)} by strided convolutions and the "
            f"decoder {len(up)} by repetition; got {halvings}, nearest: {max(0, min(halvings, len(down), len(up)))}"
        )
    return replace(
        config,
        encoder=_timed(encoder, down[len(down) - halvings :]),
        decoder=_timed(decoder, up[:halvings]),
    )


@torch.no_grad()
def inflate(image: CausalVAE, *, halvings: int) -> CausalVAE:
    """Return an autoencoder of clips that is, at first, the one of images on every frame it sees.

    Raises:
        ConfigError: as `inflated`.
    """
    clip = CausalVAE(inflated(image.config, halvings=halvings)).to(image.latent_std)
    found = image.state_dict()
    for name, value in clip.state_dict().items():
        if value.shape == found[name].shape:
            value.copy_(found[name])
        else:
            value.zero_()
            value[:, :, -1:].copy_(found[name])
    return clip


def _wider(layer: Layer) -> Layer:
    if isinstance(layer, Conv):
        _check(layer, layer.kernel[0])
        return replace(layer, kernel=_causal(layer.kernel), pad=replace(layer.pad, time="first"))
    if isinstance(layer, Res):
        _check(layer, *(kernel[0] for kernel in layer.kernels))
        first, second = layer.kernels
        return replace(layer, kernels=(_causal(first), _causal(second)), pad=replace(layer.pad, time="first"))
    if isinstance(layer, Act | Nearest) or (isinstance(layer, Attention) and layer.sees == "frame"):
        return layer
    if isinstance(layer, Skip):
        raise ConfigError(
            "a shortcut that folds cells is not inflated; its layers see several frames by a Fold in time"
        )
    raise ConfigError(f"a layer of kind {layer.kind!r} is not one of images that inflation knows")


def _causal(kernel: tuple[int, int]) -> tuple[int, int]:
    return (FRAMES if kernel[1] > 1 else 1, kernel[1])  # a map of the channels stays one


def _check(layer: Layer, *frames: int) -> None:
    if max(frames) > 1:
        raise ConfigError(f"a layer of kind {layer.kind!r} already sees {max(frames)} frames; it is no image's")


def _timed(layers: tuple[Layer, ...], indices: Sequence[int]) -> tuple[Layer, ...]:
    def timed(layer: Layer) -> Layer:
        if isinstance(layer, Conv):
            return replace(layer, stride=(2, 2))
        assert isinstance(layer, Nearest)
        return replace(layer, time=2)

    return tuple(timed(layer) if index in indices else layer for index, layer in enumerate(layers))
