"""The autoencoder of HunyuanVideo (Kong et al. 2024, arXiv:2412.03603): causal convolutions, norms that see the clip.

Beyond the clip a convolution sees the border, and before it the first frame. Sides and time are halved by strided
convolutions, and doubled by repetition and a convolution; frame 0 is repeated in space only. In the middle each position
attends to all frames up to its own. Every group norm sees the whole clip, so the first latent depends on the last frame.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from math import gcd, log2
from typing import Any

from reelflow.families.coder import Coder, CoderSize, Name, coder_rows, levels_of, scale_of
from reelflow.families.family import arguments
from reelflow.interop.mapping import Row, linear, table
from reelflow.models.coder import Act, Attention, Conv, Groups, Layer, Nearest, Padding, Part, Res
from reelflow.models.vae import VAEConfig

__all__ = ["HUNYUAN_VAE", "autoencoder"]

EDGE = Padding("first", "replicate")


def autoencoder(
    *,
    latent: int = 16,
    widths: Sequence[int] = (128, 256, 512, 512),
    blocks: int = 2,
    groups: int = 32,
    space_levels: int = 3,
    attention: bool = True,
    scale: float = 0.476986,
) -> VAEConfig:
    """Return the autoencoder whose first `space_levels` levels halve the sides, and the two before the last one time."""
    norm = Groups(groups, "clip")
    shape: dict[str, Any] = {"norm": norm, "blocks": blocks, "space_levels": space_levels, "attention": attention}
    return VAEConfig(
        latent,
        tuple(layer for layer, _ in _encoder(latent, widths, **shape)),
        tuple(layer for layer, _ in _decoder(latent, widths[::-1], **shape)),
        latent_std=(1 / scale,),
    )


def _encoder(
    latent: int, widths: Sequence[int], *, norm: Groups, blocks: int, space_levels: int, attention: bool
) -> Iterator[tuple[Layer, Name]]:
    yield Conv(widths[0], pad=EDGE), "encoder.conv_in.conv"
    for level, width in enumerate(widths):
        prefix = f"encoder.down_blocks.{level}"
        yield from ((_res(width, norm), f"{prefix}.resnets.{i}") for i in range(blocks))
        time, space = _factors(level, len(widths), space_levels)
        if time * space > 1:
            yield Conv(width, stride=(time, space), pad=EDGE), f"{prefix}.downsamplers.0.conv.conv"
    yield from _middle(widths[-1], norm, "encoder", attention=attention)
    yield Act(norm), "encoder.conv_norm_out"
    yield Conv(2 * latent, pad=EDGE), "encoder.conv_out.conv"
    yield Conv(2 * latent, (1, 1)), "quant_conv"


def _decoder(
    latent: int, widths: Sequence[int], *, norm: Groups, blocks: int, space_levels: int, attention: bool
) -> Iterator[tuple[Layer, Name]]:
    yield Conv(latent, (1, 1)), "post_quant_conv"
    yield Conv(widths[0], pad=EDGE), "decoder.conv_in.conv"
    yield from _middle(widths[0], norm, "decoder", attention=attention)
    for level, width in enumerate(widths):
        prefix = f"decoder.up_blocks.{level}"
        yield from ((_res(width, norm), f"{prefix}.resnets.{i}") for i in range(blocks + 1))
        time, space = _factors(level, len(widths), space_levels)
        if time * space > 1:
            yield Nearest(space, time), ""
            yield Conv(width, pad=EDGE), f"{prefix}.upsamplers.0.conv.conv"
    yield Act(norm), "decoder.conv_norm_out"
    yield Conv(3, pad=EDGE), "decoder.conv_out.conv"


def _factors(level: int, levels: int, space_levels: int) -> tuple[int, int]:
    """Return by how much a level, of the encoder or of the decoder, changes time and sides."""
    return (2 if levels - 3 <= level < levels - 1 else 1), (2 if level < space_levels else 1)


def _middle(width: int, norm: Groups, side: str, *, attention: bool) -> Iterator[tuple[Layer, Name]]:
    yield _res(width, norm), f"{side}.mid_block.resnets.0"
    if attention:
        yield Attention("past", norm), f"{side}.mid_block.attentions.0"
    yield _res(width, norm), f"{side}.mid_block.resnets.1"


def _res(width: int, norm: Groups) -> Res:
    return Res(width, norm, pad=EDGE)


_BLOCKS = {"down": "HunyuanVideoDownBlock3D", "up": "HunyuanVideoUpBlock3D"}
_DEFAULTS: dict[str, Any] = {
    "in_channels": 3,
    "out_channels": 3,
    "latent_channels": 16,
    "down_block_types": 4 * [_BLOCKS["down"]],
    "up_block_types": 4 * [_BLOCKS["up"]],
    "block_out_channels": [128, 256, 512, 512],
    "layers_per_block": 2,
    "act_fn": "silu",
    "norm_num_groups": 32,
    "scaling_factor": 0.476986,
    "spatial_compression_ratio": 8,
    "temporal_compression_ratio": 4,
    "mid_block_add_attention": True,
}


def read(found: dict[str, Any]) -> VAEConfig:
    """Return the autoencoder of a config.json.

    Raises:
        CheckpointError: a value is unknown, or one that the published weights do not have.
    """
    levels = len(found.get("block_out_channels", _DEFAULTS["block_out_channels"]))
    kinds = {f"{side}_block_types": levels * [kind] for side, kind in _BLOCKS.items()}
    same = {"in_channels": 3, "out_channels": 3, "act_fn": "silu", "temporal_compression_ratio": 4}
    c = arguments(found, _DEFAULTS, fixed={**same, **kinds})
    return autoencoder(
        latent=c["latent_channels"],
        widths=c["block_out_channels"],
        blocks=c["layers_per_block"],
        groups=c["norm_num_groups"],
        space_levels=int(log2(c["spatial_compression_ratio"])),
        attention=c["mid_block_add_attention"],
        scale=c["scaling_factor"],
    )


def write(config: VAEConfig) -> dict[str, Any]:
    """Return the config.json of an autoencoder."""
    shape = _shape(config)
    levels = len(shape["widths"])
    return _DEFAULTS | {
        "latent_channels": config.latent_channels,
        "down_block_types": levels * [_BLOCKS["down"]],
        "up_block_types": levels * [_BLOCKS["up"]],
        "block_out_channels": shape["widths"],
        "layers_per_block": shape["blocks"],
        "norm_num_groups": shape["norm"].num,
        "scaling_factor": scale_of(config),
        "spatial_compression_ratio": config.spatial_stride,
        "mid_block_add_attention": shape["attention"],
    }


def read_bare(shapes: Mapping[str, Sequence[int]]) -> dict[str, Any]:
    """Return what config.json would say of the file that Open-Sora 2.0 comes with, or others like it.

    Of groups there are 32, which shapes do not tell, or as many as narrower networks allow.
    """
    blocks = [f"encoder.down_blocks.{level}.resnets." for level in range(len(_DEFAULTS["block_out_channels"]))]
    widths = [shapes[f"{name}0.conv1.conv.weight"][0] for name in blocks]
    return {
        "latent_channels": shapes["post_quant_conv.weight"][0],
        "block_out_channels": widths,
        "layers_per_block": sum(name.startswith(blocks[0]) and name.endswith("conv1.conv.weight") for name in shapes),
        "norm_num_groups": gcd(_DEFAULTS["norm_num_groups"], *widths),
        "mid_block_add_attention": "encoder.mid_block.attentions.0.to_q.weight" in shapes,
    }


def _shape(config: VAEConfig) -> dict[str, Any]:
    """Return what `autoencoder` was told."""
    levels, head = levels_of(config.encoder, middle=2), config.encoder[-3]
    assert isinstance(head, Act)
    assert isinstance(head.norm, Groups)
    return {
        "widths": [level.channels for level in levels],
        "blocks": levels[0].blocks,
        "norm": head.norm,
        "space_levels": int(log2(config.spatial_stride)),
        "attention": any(isinstance(layer, Attention) for layer in config.encoder),
    }


def weights(config: VAEConfig) -> tuple[Row, ...]:
    """Relate our weights to the published ones."""
    shape, latent = _shape(config), config.latent_channels
    widths = shape.pop("widths")
    encoder = (name for _, name in _encoder(latent, widths, **shape))
    decoder = (name for _, name in _decoder(latent, widths[::-1], **shape))
    return coder_rows(config, encoder, decoder, _rows)


def _rows(layer: Part, channels: int, ours: str, theirs: str) -> Iterable[Row]:
    if isinstance(layer, Act):
        return linear(f"{ours}.norm", theirs)
    if isinstance(layer, Conv):
        return linear(f"{ours}.conv", theirs)
    inside: tuple[Iterable[Row], ...]
    if isinstance(layer, Attention):
        inside = (
            linear("norm", "group_norm"),
            linear("qkv", ["to_q", "to_k", "to_v"]),
            linear("out", "to_out.0"),
        )
    else:
        assert isinstance(layer, Res)
        inside = (
            linear("norm1", "norm1"),
            linear("conv1.conv", "conv1.conv"),
            linear("norm2", "norm2"),
            linear("conv2.conv", "conv2.conv"),
            linear("shortcut", "conv_shortcut.conv") if channels != layer.channels else (),
        )
    return table(*inside, ours=f"{ours}.", theirs=f"{theirs}.")


HUNYUAN_VAE = Coder(
    name="hunyuan_vae",
    class_name="AutoencoderKLHunyuanVideo",
    sizes={
        "video": CoderSize(autoencoder(), 246_478_803, "hunyuanvideo-community/HunyuanVideo", clip=(129, 720, 1280)),
    },
    licence="Tencent Hunyuan Community",
    read=read,
    write=write,
    weights=weights,
    bare=read_bare,
    notes=(
        "diffusers cuts clips of more than 16 frames into windows and fades between them unless told not to; ours takes "
        "the whole clip, as its norms do.",
        "diffusers makes a mask of all tokens by all tokens for the attention; ours attends a frame at a time.",
        "in float32 one of 23 random networks had gradients 5.5e-5 off, at a floor of 5e-6: a group of almost no variance.",
    ),
)
