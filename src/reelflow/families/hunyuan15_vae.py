"""The autoencoder of HunyuanVideo 1.5 (Tencent 2025): norms per position, shuffles with shortcuts, 16 x in space.

Beyond the clip a convolution sees the border, and before it the first frame. A level's last layer folds cells into
channels, beside means of them (Chen et al. 2024, DC-AE, sec. 3.2). Frame 0 is folded in space only: what would be the other
half of its channels is a copy, and its means are of half as many. In the middle each position attends to all frames up to
its own, so a stream is exact with a state that grows by the keys of each latent frame.
"""

from collections.abc import Iterable, Iterator, Sequence
from math import log2
from typing import Any

from reelflow.families.coder import Coder, CoderSize, Name, coder_rows, scale_of
from reelflow.families.family import arguments
from reelflow.interop.mapping import Row, linear, parameter, rearranged, table
from reelflow.models.coder import Act, Attention, Conv, Fold, Layer, Padding, Part, Res, Skip, Unfold
from reelflow.models.vae import VAEConfig
from reelflow.nn.norm import Norm

__all__ = ["HUNYUAN15_VAE", "autoencoder"]

EDGE = Padding("first", "replicate")
NORM = Norm("rms", eps=1e-24, affine=True)  # theirs bounds the length from below, by 1e-12


def autoencoder(
    *,
    latent: int = 32,
    widths: Sequence[int] = (128, 256, 512, 1024, 1024),
    blocks: int = 2,
    space_levels: int = 4,
    time_levels: int = 2,
    scale: float = 1.03682,
) -> VAEConfig:
    """Return the autoencoder whose first `space_levels` levels halve the sides, and the last of these time."""
    shape: dict[str, Any] = {"blocks": blocks, "space_levels": space_levels, "time_levels": time_levels}
    return VAEConfig(
        latent,
        tuple(layer for layer, _ in _encoder(latent, widths, **shape)),
        tuple(layer for layer, _ in _decoder(latent, widths[::-1], **shape)),
        latent_std=(1 / scale,),
    )


def _encoder(
    latent: int, widths: Sequence[int], *, blocks: int, space_levels: int, time_levels: int
) -> Iterator[tuple[Layer, Name]]:
    yield Conv(widths[0], pad=EDGE), "encoder.conv_in.conv"
    for level, width in enumerate(widths):
        prefix = f"encoder.down_blocks.{level}"
        yield from ((_res(width), f"{prefix}.resnets.{i}") for i in range(blocks))
        if level < space_levels:
            time, after = 2 if level >= space_levels - time_levels else 1, widths[level + 1]
            through = (Conv(after // (4 * time), pad=EDGE), Fold(2, time, order="cell"))
            around = Fold(2, time, after, first="alone", order="cell")
            yield Skip(through, (around,)), (f"{prefix}.downsamplers.0.conv.conv", "", "")
    yield from _middle(widths[-1], "encoder")
    head = Skip((Act(NORM), Conv(2 * latent, pad=EDGE)), (Fold(1, 1, 2 * latent),))
    yield head, ("encoder.norm_out", "encoder.conv_out.conv", "")


def _decoder(
    latent: int, widths: Sequence[int], *, blocks: int, space_levels: int, time_levels: int
) -> Iterator[tuple[Layer, Name]]:
    yield Skip((Conv(widths[0], pad=EDGE),), (Unfold(1, 1, widths[0]),)), ("decoder.conv_in.conv", "")
    yield from _middle(widths[0], "decoder")
    for level, width in enumerate(widths):
        prefix = f"decoder.up_blocks.{level}"
        yield from ((_res(width), f"{prefix}.resnets.{i}") for i in range(blocks + 1))
        if level < space_levels:
            time, after = 2 if level < time_levels else 1, widths[level + 1]
            through = (Conv(after * 4 * time, pad=EDGE), Unfold(2, time, first="alone", order="cell"))
            around = Unfold(2, time, after, first="alone", order="cell")
            yield Skip(through, (around,)), (f"{prefix}.upsamplers.0.conv.conv", "", "")
    yield Act(NORM), "decoder.norm_out"
    yield Conv(3, pad=EDGE), "decoder.conv_out.conv"


def _middle(width: int, side: str) -> Iterator[tuple[Layer, Name]]:
    yield _res(width), f"{side}.mid_block.resnets.0"
    yield Attention("past", NORM), f"{side}.mid_block.attentions.0"
    yield _res(width), f"{side}.mid_block.resnets.1"


def _res(width: int) -> Res:
    return Res(width, NORM, pad=EDGE)


_DEFAULTS: dict[str, Any] = {
    "in_channels": 3,
    "out_channels": 3,
    "latent_channels": 32,
    "block_out_channels": [128, 256, 512, 1024, 1024],
    "layers_per_block": 2,
    "spatial_compression_ratio": 16,
    "temporal_compression_ratio": 4,
    "downsample_match_channel": True,
    "upsample_match_channel": True,
    "scaling_factor": 1.03682,
}


def read(found: dict[str, Any]) -> VAEConfig:
    """Return the autoencoder of a config.json.

    Raises:
        CheckpointError: a value is unknown, or one that the published weights do not have.
    """
    same = {"in_channels": 3, "out_channels": 3, "downsample_match_channel": True, "upsample_match_channel": True}
    c = arguments(found, _DEFAULTS, fixed=same)
    return autoencoder(
        latent=c["latent_channels"],
        widths=c["block_out_channels"],
        blocks=c["layers_per_block"],
        space_levels=int(log2(c["spatial_compression_ratio"])),
        time_levels=int(log2(c["temporal_compression_ratio"])),
        scale=c["scaling_factor"],
    )


def write(config: VAEConfig) -> dict[str, Any]:
    """Return the config.json of an autoencoder."""
    shape = _shape(config)
    return _DEFAULTS | {
        "latent_channels": config.latent_channels,
        "block_out_channels": shape["widths"],
        "layers_per_block": shape["blocks"],
        "spatial_compression_ratio": config.spatial_stride,
        "temporal_compression_ratio": config.temporal_stride,
        "scaling_factor": scale_of(config),
    }


def _shape(config: VAEConfig) -> dict[str, Any]:
    """Return what `autoencoder` was told."""
    levels: list[list[int]] = [[]]  # widths of the blocks of each
    for layer in config.encoder:
        if isinstance(layer, Res):
            levels[-1].append(layer.channels)
        elif isinstance(layer, Skip) and layer.space == 2:
            levels.append([])
    return {
        "widths": [widths[0] for widths in levels],
        "blocks": len(levels[0]),
        "space_levels": int(log2(config.spatial_stride)),
        "time_levels": int(log2(config.temporal_stride)),
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
        return (_norm(f"{ours}.norm", theirs),)
    if isinstance(layer, Conv):
        return linear(f"{ours}.conv", theirs)
    inside: tuple[Row | Iterable[Row], ...]
    if isinstance(layer, Attention):
        flat = rearranged("d c 1 1 1 -> d c")
        inside = (
            _norm("norm", "norm"),
            linear("qkv", ["to_q", "to_k", "to_v"], weight=flat),
            linear("out", "proj_out", weight=flat),
        )
    else:
        assert isinstance(layer, Res)
        inside = (
            _norm("norm1", "norm1"),
            linear("conv1.conv", "conv1.conv"),
            _norm("norm2", "norm2"),
            linear("conv2.conv", "conv2.conv"),
            linear("shortcut", "conv_shortcut") if channels != layer.channels else (),
        )
    return table(*inside, ours=f"{ours}.", theirs=f"{theirs}.")


def _norm(ours: str, theirs: str) -> Row:
    return parameter(f"{ours}.weight", f"{theirs}.gamma", rearranged("d 1 1 1 -> d"))


HUNYUAN15_VAE = Coder(
    name="hunyuan15_vae",
    class_name="AutoencoderKLHunyuanVideo15",
    sizes={
        "video": CoderSize(
            autoencoder(),
            1_260_634_115,
            "hunyuanvideo-community/HunyuanVideo-1.5-Diffusers-480p_t2v",
            clip=(121, 480, 832),
        ),
    },
    licence="Tencent Hunyuan Community",
    read=read,
    write=write,
    weights=weights,
    notes=(
        "diffusers fills the attention's mask row by row, and takes one clip at a time; ours attends a frame at a time.",
        "diffusers has no stream of this autoencoder; ours keeps the middle's keys and values, and is exact.",
    ),
)
