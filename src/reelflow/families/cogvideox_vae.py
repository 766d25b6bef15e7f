"""The autoencoder of CogVideoX and CogVideoX 1.5 (Yang et al. 2024, arXiv:2408.06072): norms of pieces, and of latents.

A clip is encoded eight frames at a time and decoded two latents at a time, and what is left over goes first. Convolutions
know the piece before; norms do not, so the pieces are part of the function. The decoder's norms are scaled and shifted by
maps of the latents. Time is halved by means of pairs of frames and doubled by repetition, and frame 0 is apart where a
clip has an odd number of frames: 8 k frames are 2 k latents, 8 k + 1 are 2 k + 1.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from math import log2
from typing import Any

from reelflow.families.coder import FLAT, Coder, CoderSize, Name, coder_rows, levels_of, scale_of
from reelflow.families.family import arguments
from reelflow.interop.mapping import Row, linear, table
from reelflow.models.coder import Act, Conv, Fold, Groups, Layer, Nearest, Padding, Part, Res
from reelflow.models.vae import Pieces, VAEConfig

__all__ = ["COGVIDEOX_VAE", "autoencoder"]


def autoencoder(
    *,
    latent: int = 16,
    widths: Sequence[int] = (128, 256, 256, 512),
    blocks: int = 3,
    groups: int = 32,
    time_levels: int = 2,
    scale: float = 1.15258426,
) -> VAEConfig:
    """Return the autoencoder whose levels but the last halve the sides, and the first `time_levels` of them time."""
    norm = Groups(groups, "piece")
    return VAEConfig(
        latent,
        tuple(layer for layer, _ in _encoder(latent, widths, norm, blocks, time_levels)),
        tuple(layer for layer, _ in _decoder(latent, widths[::-1], replace(norm, given=latent), blocks, time_levels)),
        latent_std=(1 / scale,),
        pieces=Pieces(frames=8, latents=2),
    )


def _encoder(
    latent: int, widths: Sequence[int], norm: Groups, blocks: int, time_levels: int
) -> Iterator[tuple[Layer, Name]]:
    yield Conv(widths[0]), "encoder.conv_in.conv"
    for level, width in enumerate(widths):
        prefix = f"encoder.down_blocks.{level}"
        yield from ((Res(width, norm), f"{prefix}.resnets.{i}") for i in range(blocks))
        if level < len(widths) - 1:
            if level < time_levels:
                yield Fold(1, 2, width, first="odd"), ""
            yield Conv(width, (1, 3), (1, 2), Padding(space="after")), f"{prefix}.downsamplers.0.conv"
    yield from ((Res(widths[-1], norm), f"encoder.mid_block.resnets.{i}") for i in range(2))
    yield Act(norm), "encoder.norm_out"
    yield Conv(2 * latent), "encoder.conv_out.conv"


def _decoder(
    latent: int, widths: Sequence[int], norm: Groups, blocks: int, time_levels: int
) -> Iterator[tuple[Layer, Name]]:
    yield Conv(widths[0]), "decoder.conv_in.conv"
    yield from ((Res(widths[0], norm), f"decoder.mid_block.resnets.{i}") for i in range(2))
    for level, width in enumerate(widths):
        prefix = f"decoder.up_blocks.{level}"
        yield from ((Res(width, norm), f"{prefix}.resnets.{i}") for i in range(blocks + 1))
        if level < len(widths) - 1:
            yield Nearest(2, 2 if level < time_levels else 1, first="odd"), ""
            yield Conv(width, (1, 3)), f"{prefix}.upsamplers.0.conv"
    yield Act(norm), "decoder.norm_out"
    yield Conv(3), "decoder.conv_out.conv"


_BLOCKS = {"down": "CogVideoXDownBlock3D", "up": "CogVideoXUpBlock3D"}
_DEFAULTS: dict[str, Any] = {
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": 4 * [_BLOCKS["down"]],
    "up_block_types": 4 * [_BLOCKS["up"]],
    "block_out_channels": [128, 256, 256, 512],
    "latent_channels": 16,
    "layers_per_block": 3,
    "act_fn": "silu",
    "norm_eps": 1e-6,
    "norm_num_groups": 32,
    "temporal_compression_ratio": 4,
    "sample_height": 480,
    "sample_width": 720,
    "scaling_factor": 1.15258426,
    "shift_factor": None,
    "latents_mean": None,
    "latents_std": None,
    "force_upcast": True,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
    "invert_scale_latents": False,
}
_ANY = ("sample_height", "sample_width", "force_upcast", "invert_scale_latents")  # of pipelines, not of the network


def read(found: dict[str, Any]) -> VAEConfig:
    """Return the autoencoder of a config.json.

    Raises:
        CheckpointError: a value is unknown, or one that the published weights do not have.
    """
    levels = len(found.get("block_out_channels", _DEFAULTS["block_out_channels"]))
    read_here = {
        *("block_out_channels", "latent_channels", "layers_per_block", "norm_num_groups"),
        *("temporal_compression_ratio", "scaling_factor", *_ANY),
    }
    same = {name: value for name, value in _DEFAULTS.items() if name not in read_here}
    kinds = {f"{side}_block_types": levels * [kind] for side, kind in _BLOCKS.items()}
    c = arguments(found, _DEFAULTS, fixed={**same, **kinds})
    return autoencoder(
        latent=c["latent_channels"],
        widths=c["block_out_channels"],
        blocks=c["layers_per_block"],
        groups=c["norm_num_groups"],
        time_levels=int(log2(c["temporal_compression_ratio"])),
        scale=c["scaling_factor"],
    )


def write(config: VAEConfig) -> dict[str, Any]:
    """Return the config.json of an autoencoder."""
    levels, head = levels_of(config.encoder, middle=2), config.encoder[-2]
    assert isinstance(head, Act)
    assert isinstance(head.norm, Groups)
    return _DEFAULTS | {
        "down_block_types": len(levels) * [_BLOCKS["down"]],
        "up_block_types": len(levels) * [_BLOCKS["up"]],
        "block_out_channels": [level.channels for level in levels],
        "latent_channels": config.latent_channels,
        "layers_per_block": levels[0].blocks,
        "norm_num_groups": head.norm.num,
        "temporal_compression_ratio": config.temporal_stride,
        "scaling_factor": scale_of(config),
    }


def weights(config: VAEConfig) -> tuple[Row, ...]:
    """Relate our weights to the published ones."""
    c = write(config)
    norm, time_levels = Groups(c["norm_num_groups"]), int(log2(config.temporal_stride))
    widths, blocks = c["block_out_channels"], c["layers_per_block"]
    encoder = _encoder(config.latent_channels, widths, norm, blocks, time_levels)
    decoder = _decoder(config.latent_channels, widths[::-1], norm, blocks, time_levels)
    return coder_rows(config, (name for _, name in encoder), (name for _, name in decoder), _rows)


def _rows(layer: Part, channels: int, ours: str, theirs: str) -> Iterable[Row]:
    if isinstance(layer, Act):
        return _norm_rows(layer, f"{ours}.norm", theirs)
    if isinstance(layer, Conv):
        return linear(f"{ours}.conv", theirs, weight=FLAT if "samplers" in theirs else None)
    assert isinstance(layer, Res)
    return table(
        _norm_rows(layer, "norm1", "norm1"),
        linear("conv1.conv", "conv1.conv"),
        _norm_rows(layer, "norm2", "norm2"),
        linear("conv2.conv", "conv2.conv"),
        linear("shortcut", "conv_shortcut") if channels != layer.channels else (),
        ours=f"{ours}.",
        theirs=f"{theirs}.",
    )


def _norm_rows(layer: Act | Res, ours: str, theirs: str) -> tuple[Row, ...]:
    assert isinstance(layer.norm, Groups)
    if not layer.norm.given:
        return linear(ours, theirs)
    return table(
        linear(f"{ours}.norm", f"{theirs}.norm_layer"),
        linear(f"{ours}.scale", f"{theirs}.conv_y.conv"),
        linear(f"{ours}.shift", f"{theirs}.conv_b.conv"),
    )


COGVIDEOX_VAE = Coder(
    name="cogvideox_vae",
    class_name="AutoencoderKLCogVideoX",
    sizes={
        "2b": CoderSize(autoencoder(), 215_583_907, "THUDM/CogVideoX-2b", clip=(49, 480, 720)),
        "5b": CoderSize(autoencoder(scale=0.7), 215_583_907, "THUDM/CogVideoX-5b", clip=(49, 480, 720)),
    },
    licence="Apache-2.0 (2b), CogVideoX (5b)",
    read=read,
    write=write,
    weights=weights,
    notes=(
        "diffusers runs 4 k + 1 frames that are not 8 k + 1, and decodes them to another number; ours refuses them.",
        "invert_scale_latents of 1.5, which divides a first frame's latents by the scale where all others are multiplied, "
        "is the pipeline's, and not written.",
    ),
)
