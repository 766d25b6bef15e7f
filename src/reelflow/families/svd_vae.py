"""The autoencoder of Stable Video Diffusion (Blattmann et al. 2023, arXiv:2311.15127): pictures in, a video out.

The encoder is Stable Diffusion's, and sees one frame. The decoder is too, but a learned share of a block in time follows
each of its blocks, whose norm sees all frames, and a convolution in time is the last: it takes a whole clip. Its pipelines
do not scale the latents of the picture that a video begins with.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from reelflow.families import kl_vae
from reelflow.families.coder import FLAT, Coder, CoderSize, Name, coder_rows
from reelflow.families.family import arguments
from reelflow.interop.mapping import Row, linear, parameter, table
from reelflow.models.coder import Act, Attention, Conv, Groups, Layer, Nearest, Padding, Part, Res
from reelflow.models.vae import VAEConfig

__all__ = ["SVD_VAE", "autoencoder"]

ZEROS, AROUND = Padding("zeros", "zeros"), Padding("zeros_around", "zeros")
SPACE, TIME = (1, 3), (3, 1)  # kernels

Named = tuple[Layer, Name]


def autoencoder(*, latent: int = 4, scale: float = 0.18215, widths: Sequence[int] = (128, 256, 512, 512)) -> VAEConfig:
    """Return the autoencoder of levels so wide, whose latents are scale * z."""
    pictures = _pictures(latent, scale, widths)
    decoder = tuple(layer for layer, _ in _decoder(latent, widths))
    return VAEConfig(latent, pictures.encoder, decoder, latent_std=pictures.latent_std)


def _pictures(latent: int, scale: float, widths: Sequence[int]) -> VAEConfig:
    return kl_vae.autoencoder(latent=latent, scale=scale, widths=widths, mapped=(True, False))


def _decoder(latent: int, widths: Sequence[int]) -> Iterator[Named]:
    yield Conv(widths[-1], SPACE, pad=ZEROS), "decoder.conv_in"
    yield from _blocks(widths[-1], 1, "decoder.mid_block")
    yield Attention("frame", Groups(32)), "decoder.mid_block.attentions.0"
    yield from _blocks(widths[-1], 1, "decoder.mid_block", first=1)
    for level, width in enumerate(reversed(widths)):
        yield from _blocks(width, 3, f"decoder.up_blocks.{level}")
        if level < len(widths) - 1:
            yield Nearest(), ""
            yield Conv(width, SPACE, pad=ZEROS), f"decoder.up_blocks.{level}.upsamplers.0.conv"
    yield Act(Groups(32)), "decoder.conv_norm_out"
    yield Conv(3, SPACE, pad=ZEROS), "decoder.conv_out"
    yield Conv(3, TIME, pad=AROUND), "decoder.time_conv_out"


def _blocks(width: int, count: int, prefix: str, first: int = 0) -> Iterator[Named]:
    for index in range(first, first + count):
        name = f"{prefix}.resnets.{index}"
        yield Res(width, Groups(32), (SPACE, SPACE), ZEROS), f"{name}.spatial_res_block"
        yield Res(width, Groups(32, over="clip", eps=1e-5), (TIME, TIME), AROUND, added="share"), name


_DOWN = "DownEncoderBlock2D"
_DEFAULTS: dict[str, Any] = {
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": [_DOWN],
    "block_out_channels": [64],
    "layers_per_block": 1,
    "latent_channels": 4,
    "sample_size": 32,  # of nothing
    "scaling_factor": 0.18215,
    "force_upcast": True,  # of pipelines in float16
}


def read(found: dict[str, Any]) -> VAEConfig:
    """Return the autoencoder of a config.json.

    Raises:
        CheckpointError: a value is unknown, or one that the published weights do not have: with other than two blocks in a
            level, the reference leaves some of its own out.
    """
    given = {name: list(value) if isinstance(value, tuple) else value for name, value in found.items()}
    levels = len(given.get("block_out_channels", _DEFAULTS["block_out_channels"]))
    fixed = {"in_channels": 3, "out_channels": 3, "down_block_types": levels * [_DOWN], "layers_per_block": 2}
    c = arguments(given, _DEFAULTS, fixed=fixed)
    return autoencoder(latent=c["latent_channels"], scale=c["scaling_factor"], widths=c["block_out_channels"])


def write(config: VAEConfig) -> dict[str, Any]:
    """Return the config.json of an autoencoder."""
    c = kl_vae.KL_VAE.write(config)  # which looks at the encoder
    names = ("down_block_types", "block_out_channels", "layers_per_block", "latent_channels", "scaling_factor")
    return _DEFAULTS | {name: c[name] for name in names} | {"sample_size": 768}


def weights(config: VAEConfig) -> tuple[Row, ...]:
    """Relate our weights to the published ones."""
    c = write(config)
    latent, widths = c["latent_channels"], c["block_out_channels"]
    pictures = kl_vae.KL_VAE.weights(_pictures(latent, c["scaling_factor"], widths))
    return table(
        (row for row in pictures if all(name.startswith("encoder.") for name in row.ours)),
        coder_rows(config, len(config.encoder) * [""], (name for _, name in _decoder(latent, widths)), _rows),
    )


def _rows(layer: Part, channels: int, ours: str, theirs: str) -> Iterable[Row]:
    if isinstance(layer, Act):
        return linear(f"{ours}.norm", theirs)
    if isinstance(layer, Conv):
        return linear(f"{ours}.conv", theirs, weight=FLAT if layer.kernel == SPACE else None)
    if isinstance(layer, Attention):
        rows = (
            linear("norm", "group_norm"),
            linear("qkv", ["to_q", "to_k", "to_v"]),
            linear("out", "to_out.0"),
        )
        return table(rows, ours=f"{ours}.", theirs=f"{theirs}.")
    assert isinstance(layer, Res)
    if layer.added == "share":
        return table(
            _res_rows("temporal_res_block.", flat=False, projected=False),
            parameter("share", "time_mixer.mix_factor"),
            ours=f"{ours}.",
            theirs=f"{theirs}.",
        )
    return table(_res_rows("", flat=True, projected=channels != layer.channels), ours=f"{ours}.", theirs=f"{theirs}.")


def _res_rows(prefix: str, *, flat: bool, projected: bool) -> tuple[Row, ...]:
    weight = FLAT if flat else None
    return table(
        linear("norm1", "norm1"),
        linear("conv1.conv", "conv1", weight=weight),
        linear("norm2", "norm2"),
        linear("conv2.conv", "conv2", weight=weight),
        linear("shortcut", "conv_shortcut", weight=weight) if projected else (),
        theirs=prefix,
    )


SVD_VAE = Coder(
    name="svd_vae",
    class_name="AutoencoderKLTemporalDecoder",
    sizes={
        "video": CoderSize(
            autoencoder(), 97_742_847, "stabilityai/stable-video-diffusion-img2vid", clip=(14, 576, 1024)
        ),
    },
    licence="Stable Video Diffusion Community License",
    read=read,
    write=write,
    weights=weights,
    notes=(
        "The pipelines of diffusers decode a few frames at a time, so that there are seams; ours takes the whole clip.",
        "config.json's sample_size and force_upcast are read by nothing here, and written as 768 and true.",
    ),
)
