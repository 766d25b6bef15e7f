"""Stable Diffusion's autoencoder of pictures (Rombach et al. 2022, arXiv:2112.10752): each frame by itself.

Convolutions and norms see one frame, so a clip is its pictures, as in Latte, and any chunks give the same. The 16
channels of Stable Diffusion 3 have a mean that is not zero, and no maps before and after the latents.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from reelflow.families.coder import FLAT, Coder, CoderSize, Name, coder_rows
from reelflow.families.family import arguments
from reelflow.interop.mapping import Row, linear, table
from reelflow.models.coder import Act, Attention, Conv, Groups, Layer, Nearest, Padding, Part, Res, Timed
from reelflow.models.vae import VAEConfig

__all__ = ["KL_VAE", "autoencoder"]

ZEROS = Padding("zeros", "zeros")
AFTER = Padding("zeros", "after")
FRAME = (1, 3)  # a kernel that sees one frame

Named = tuple[Layer, Name]


def autoencoder(
    *,
    latent: int,
    scale: float,
    shift: float = 0.0,
    widths: Sequence[int] = (128, 256, 512, 512),
    blocks: int = 2,
    groups: int = 32,
    attention: bool = True,
    mapped: tuple[bool, bool] = (True, True),
) -> VAEConfig:
    """Return the autoencoder of levels so wide, whose latents are scale (z - shift).

    `mapped` says whether a map of the channels follows the encoder, and whether one precedes the decoder.
    """
    shape: dict[str, Any] = {"widths": widths, "blocks": blocks, "groups": groups, "attention": attention}
    return VAEConfig(
        latent,
        tuple(layer for layer, _ in _encoder(latent=latent, mapped=mapped[0], **shape)),
        tuple(layer for layer, _ in _decoder(latent=latent, mapped=mapped[1], **shape)),
        latent_mean=(shift,),
        latent_std=(1 / scale,),
    )


def _encoder(
    *, latent: int, widths: Sequence[int], blocks: int, groups: int, attention: bool, mapped: bool
) -> Iterator[Named]:
    yield _conv(widths[0]), "encoder.conv_in"
    for level, width in enumerate(widths):
        for block in range(blocks):
            yield _res(width, groups), f"encoder.down_blocks.{level}.resnets.{block}"
        if level < len(widths) - 1:
            yield Conv(width, FRAME, (1, 2), AFTER), f"encoder.down_blocks.{level}.downsamplers.0.conv"
    yield from _middle(widths[-1], groups, "encoder", attention=attention)
    yield Act(Groups(groups)), "encoder.conv_norm_out"
    yield _conv(2 * latent), "encoder.conv_out"
    if mapped:
        yield Conv(2 * latent, (1, 1), pad=ZEROS), "quant_conv"


def _decoder(
    *, latent: int, widths: Sequence[int], blocks: int, groups: int, attention: bool, mapped: bool
) -> Iterator[Named]:
    if mapped:
        yield Conv(latent, (1, 1), pad=ZEROS), "post_quant_conv"
    yield _conv(widths[-1]), "decoder.conv_in"
    yield from _middle(widths[-1], groups, "decoder", attention=attention)
    for level, width in enumerate(reversed(widths)):
        for block in range(blocks + 1):
            yield _res(width, groups), f"decoder.up_blocks.{level}.resnets.{block}"
        if level < len(widths) - 1:
            yield Nearest(), ""
            yield _conv(width), f"decoder.up_blocks.{level}.upsamplers.0.conv"
    yield Act(Groups(groups)), "decoder.conv_norm_out"
    yield _conv(3), "decoder.conv_out"


def _conv(channels: int) -> Conv:
    return Conv(channels, FRAME, pad=ZEROS)


def _res(channels: int, groups: int) -> Res:
    return Res(channels, Groups(groups), (FRAME, FRAME), ZEROS)


def _middle(channels: int, groups: int, side: str, *, attention: bool) -> Iterator[Named]:
    yield _res(channels, groups), f"{side}.mid_block.resnets.0"
    if attention:
        yield Attention("frame", Groups(groups)), f"{side}.mid_block.attentions.0"
    yield _res(channels, groups), f"{side}.mid_block.resnets.1"


_DOWN, _UP = "DownEncoderBlock2D", "UpDecoderBlock2D"
_DEFAULTS: dict[str, Any] = {
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": [_DOWN],
    "up_block_types": [_UP],
    "block_out_channels": [64],
    "layers_per_block": 1,
    "act_fn": "silu",
    "latent_channels": 4,
    "norm_num_groups": 32,
    "sample_size": 32,  # of a tile, where one tiles
    "scaling_factor": 0.18215,
    "shift_factor": None,
    "latents_mean": None,
    "latents_std": None,
    "force_upcast": True,  # of pipelines in float16
    "use_quant_conv": True,
    "use_post_quant_conv": True,
    "mid_block_add_attention": True,
}


def read(found: dict[str, Any]) -> VAEConfig:
    """Return the autoencoder of a config.json.

    Raises:
        CheckpointError: a value is unknown, or not that of this autoencoder.
    """
    levels = len(found.get("block_out_channels", _DEFAULTS["block_out_channels"]))
    fixed = {name: _DEFAULTS[name] for name in ("in_channels", "out_channels", "act_fn", "latents_mean", "latents_std")}
    c = arguments(
        {name: list(value) if isinstance(value, tuple) else value for name, value in found.items()},
        _DEFAULTS,
        fixed=fixed | {"down_block_types": levels * [_DOWN], "up_block_types": levels * [_UP]},
    )
    return autoencoder(
        latent=c["latent_channels"],
        scale=c["scaling_factor"],
        shift=c["shift_factor"] or 0.0,
        widths=c["block_out_channels"],
        blocks=c["layers_per_block"],
        groups=c["norm_num_groups"],
        attention=c["mid_block_add_attention"],
        mapped=(c["use_quant_conv"], c["use_post_quant_conv"]),
    )


def write(config: VAEConfig) -> dict[str, Any]:
    """Return the config.json of an autoencoder; tiles are of 512 pixels."""
    res = [layer for layer in config.encoder if isinstance(layer, Res)]
    norm, head, first = res[0].norm, config.encoder[-1], config.decoder[0]
    assert isinstance(norm, Groups)
    assert isinstance(head, Conv)
    assert isinstance(first, Conv)
    strided = [layer.channels for layer in config.encoder if isinstance(layer, Conv) and layer.space == 2]
    widths = [*strided, res[-1].channels]
    ((mean,), (std,)) = config.latent_mean, config.latent_std
    return _DEFAULTS | {
        "down_block_types": len(widths) * [_DOWN],
        "up_block_types": len(widths) * [_UP],
        "block_out_channels": widths,
        "layers_per_block": (len(res) - 2) // len(widths),
        "latent_channels": config.latent_channels,
        "norm_num_groups": norm.num,
        "sample_size": 512,
        "scaling_factor": float(f"{1 / std:.12g}"),  # which undoes the rounding of 1 / scale
        "shift_factor": mean or None,
        "use_quant_conv": head.kernel == (1, 1),
        "use_post_quant_conv": first.kernel == (1, 1),
        "mid_block_add_attention": any(isinstance(layer, Attention) for layer in config.encoder),
    }


def weights(config: VAEConfig) -> tuple[Row, ...]:
    """Relate our weights to the published ones."""
    return _rows(config, ["to_q", "to_k", "to_v"], "to_out.0")


def older_weights(config: VAEConfig) -> tuple[Row, ...]:
    """Relate our weights to those in files from before 2023, whose attention has other names."""
    return _rows(config, ["query", "key", "value"], "proj_attn")


def _rows(config: VAEConfig, qkv: Sequence[str], out: str) -> tuple[Row, ...]:
    c = write(config)
    shape: dict[str, Any] = {
        "latent": c["latent_channels"],
        "widths": c["block_out_channels"],
        "blocks": c["layers_per_block"],
        "groups": c["norm_num_groups"],
        "attention": c["mid_block_add_attention"],
    }

    def rows(layer: Part | Timed, channels: int, ours: str, theirs: str) -> Iterable[Row]:
        if isinstance(layer, Res):
            return _res_rows(ours, theirs, projected=channels != layer.channels)
        if isinstance(layer, Attention):
            return table(
                linear("norm", "group_norm"),
                linear("qkv", qkv),
                linear("out", out),
                ours=f"{ours}.",
                theirs=f"{theirs}.",
            )
        if isinstance(layer, Act):
            return linear(f"{ours}.norm", theirs)
        return linear(f"{ours}.conv", theirs, weight=FLAT)

    return coder_rows(
        config,
        (name for _, name in _encoder(mapped=c["use_quant_conv"], **shape)),
        (name for _, name in _decoder(mapped=c["use_post_quant_conv"], **shape)),
        rows,
    )


def _res_rows(ours: str, theirs: str, *, projected: bool) -> tuple[Row, ...]:
    return table(
        linear("norm1", "norm1"),
        linear("conv1.conv", "conv1", weight=FLAT),
        linear("norm2", "norm2"),
        linear("conv2.conv", "conv2", weight=FLAT),
        linear("shortcut", "conv_shortcut", weight=FLAT) if projected else (),
        ours=f"{ours}.",
        theirs=f"{theirs}.",
    )


KL_VAE = Coder(
    name="kl_vae",
    class_name="AutoencoderKL",
    sizes={
        "1": CoderSize(
            autoencoder(latent=4, scale=0.18215), 83_653_863, "stabilityai/sd-vae-ft-ema", clip=(1, 512, 512)
        ),
        "3": CoderSize(
            autoencoder(latent=16, scale=1.5305, shift=0.0609, mapped=(False, False)),
            83_819_683,
            "stabilityai/stable-diffusion-3-medium-diffusers",
            clip=(1, 1024, 1024),
        ),
    },
    licence="MIT (1), Stability AI Community License (3)",
    read=read,
    write=write,
    weights=weights,
    older_weights=older_weights,
    notes=(
        "diffusers cuts the sides of a picture to what its strides leave; ours refuses a side that is no multiple of 8.",
        "config.json's sample_size (the tiles of diffusers) and force_upcast are read by nothing here, and written as 512 "
        "and true.",
    ),
)
