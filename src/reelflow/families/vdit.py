"""The founding design's own models: five video transformers in four sizes, as data.

    vdit          x <- x + g Space(x), + g Time(x), + g MLP(x)                class added to t    v over 1,000 steps
    vdit-pixels   the same on pixels, in patches that give as many tokens     class added to t    v over 1,000 steps
    vdit-text     x <- x + g Space(x), + g Time(x), + Cross(x, text), + g MLP(x)                  rectified flow
    vdit-gated    x <- x + g (alpha Space(x) + (1 - alpha) Time(x)), + Cross(x, text), + g MLP(x) rectified flow
    vdit-mm       video and half as wide text, own weights, one joint attention                   rectified flow

Every branch reads its input normalised, shifted and scaled by the vector of time and class, and g is that vector's too
(AdaLN-zero: Peebles & Xie 2023); Cross has a plain norm. Queries and keys are normalised, MLPs are GEGLU of four times
the width. What the founding documents leave open is chosen here and marked "our choice".
"""

from collections.abc import Callable
from dataclasses import replace

from reelflow.config import configuration
from reelflow.diffusion.process import Parameterization, VariancePreserving
from reelflow.diffusion.timesteps import LogitNormal, TimeDistribution, Uniform
from reelflow.errors import ConfigError
from reelflow.models.blocks import Attend, Branches, Cross, Dual, FeedForward, Layer
from reelflow.models.context import Layers
from reelflow.models.dit import DiTConfig
from reelflow.models.vae import Stage, VAEConfig, staged
from reelflow.nn.patchify import Patch, token_grid
from reelflow.nn.patterns import Gated, Space, Time

__all__ = [
    "FAMILY",
    "LARGE",
    "MEDIUM",
    "SIZES",
    "SMALL",
    "XL",
    "FoundingModel",
    "Size",
    "asymmetric",
    "autoencoder",
    "class_conditional",
    "founding_models",
    "gated",
    "pixels",
    "spatial_temporal_cross",
]


@configuration
class Size:
    """Width, blocks, and heads, which are 64 wide."""

    dim: int
    depth: int
    num_heads: int


SMALL, MEDIUM, LARGE, XL = Size(512, 8, 8), Size(768, 12, 12), Size(1024, 24, 16), Size(1536, 28, 24)
SIZES = {"small": SMALL, "medium": MEDIUM, "large": LARGE, "xl": XL}


@configuration
class FoundingModel:
    """A transformer, what it works on, what its answer means, and how it is asked."""

    dit: DiTConfig
    vae: VAEConfig | None  # None: pixels
    context_tokens: int  # of a prompt, padded
    parameterization: Parameterization
    time: TimeDistribution  # in training
    shift: float  # of times towards noise, in training and sampling
    num_steps: int  # in sampling
    guidance_scale: float
    clip: tuple[int, int, int] = (17, 256, 256)  # frames, height and width of the founding documents, or the nearest

    def extents(self, num_frames: int, height: int, width: int) -> tuple[int, int, int]:
        """Return (t, h, w) of what the transformer reads of a clip.

        Raises:
            ConfigError: the clip does not fit the autoencoder or the patch; names the nearest that do.
        """
        stride = 1 if self.vae is None else self.vae.spatial_stride
        for name, extent, patch in (("height", height, self.dit.patch.h), ("width", width, self.dit.patch.w)):
            if extent < 1 or extent % (stride * patch):
                below = max(1, extent // (stride * patch)) * stride * patch
                raise ConfigError(
                    f"{name} must be a multiple of {stride * patch} (autoencoder {stride} x patch {patch}), got {extent}; "
                    f"nearest: {below} or {below + stride * patch}"
                )
        shape = (num_frames, height, width)
        extents = shape if self.vae is None else self.vae.latent_shape(*shape)[1:]
        token_grid(extents, self.dit.patch)
        return extents


def class_conditional(size: Size, *, num_classes: int = 101) -> FoundingModel:
    """Factorised attention, a class, v-prediction over 1,000 steps (101 classes, as in UCF-101, are our choice)."""
    block = Branches((Attend(Space()), Attend(Time()), FeedForward()))
    return FoundingModel(
        dit=replace(_dit(size, size.depth * (block,), in_channels=4), num_classes=num_classes),
        vae=autoencoder(latent_channels=4),
        context_tokens=0,
        parameterization=Parameterization(VariancePreserving(num_steps=1000), "v"),
        time=Uniform(),
        shift=1.0,
        num_steps=50,
        guidance_scale=4.0,
    )


def pixels(size: Size, *, num_classes: int = 101) -> FoundingModel:
    """`class_conditional` on pixels: a token is 4 x 16 x 16 of them, as much of the clip as its sibling's."""
    sibling = class_conditional(size, num_classes=num_classes)
    return replace(
        sibling, dit=replace(sibling.dit, in_channels=3, patch=Patch(4, 16, 16)), vae=None, clip=(16, 256, 256)
    )


def spatial_temporal_cross(size: Size) -> FoundingModel:
    """Attention in space, in time, and to the text."""
    return _text(size, size.depth * (Branches((Attend(Space()), Attend(Time()), Cross(), FeedForward())),))


def gated(size: Size) -> FoundingModel:
    """One attention of the same queries, keys and values in space and in time, mixed by a learned alpha per block."""
    return _text(size, size.depth * (Branches((Attend(Gated()), Cross(), FeedForward())),))


def asymmetric(size: Size) -> FoundingModel:
    """Two streams with one attention; the text's is half as wide, and its last block only reads it (our choice)."""
    model = _text(size, (*(size.depth - 1) * (Dual(),), Dual(context_out=False)))
    return replace(model, dit=replace(model.dit, context_width=size.dim // 2))


FAMILY: dict[str, Callable[[Size], FoundingModel]] = {
    "vdit": class_conditional,
    "vdit-pixels": pixels,
    "vdit-text": spatial_temporal_cross,
    "vdit-gated": gated,
    "vdit-mm": asymmetric,
}


def founding_models() -> dict[str, FoundingModel]:
    """Return all of them by name, as in vdit-small or vdit-mm-xl."""
    return {f"{name}-{size}": model(SIZES[size]) for name, model in FAMILY.items() for size in SIZES}


def autoencoder(latent_channels: int) -> VAEConfig:
    """Divide time by 4 (two halvings) and space by 8 (three); the widths are our choice."""
    return staged(
        latent_channels=latent_channels,
        encoder=(
            Stage(128, 2, space=2),
            Stage(256, 2, space=2, time=2),
            Stage(512, 2, space=2, time=2),
            Stage(512, 2),
        ),
        decoder=(
            Stage(512, 2),
            Stage(512, 2, space=2, time=2),
            Stage(256, 2, space=2, time=2),
            Stage(128, 2, space=2),
        ),
    )


def _dit(size: Size, layers: tuple[Layer, ...], *, in_channels: int, context: Layers | None = None) -> DiTConfig:
    return DiTConfig(
        in_channels=in_channels,
        dim=size.dim,
        num_heads=size.num_heads,
        layers=layers,
        patch=Patch(1, 2, 2),
        rope=(16, 24, 24),
        activation="geglu",
        context=context,
    )


def _text(size: Size, layers: tuple[Layer, ...]) -> FoundingModel:
    """T5-XXL's features, 4,096 wide; 256 tokens, latents of 16 channels and the shift are our choice."""
    return FoundingModel(
        dit=_dit(size, layers, in_channels=16, context=Layers(4096)),
        vae=autoencoder(latent_channels=16),
        context_tokens=256,
        parameterization=Parameterization(),
        time=LogitNormal(),
        shift=3.0,
        num_steps=50,
        guidance_scale=7.5,
    )
