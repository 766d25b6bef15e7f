"""The autoencoders of Wan 2.1 and 2.2 (Wan Team 2025, arXiv:2503.20314): zeros before the clip, norms per position.

Time is resampled by convolutions that pass frame 0, so a whole clip goes through in one pass, and any chunks give the
same. The decoder of 2.1 halves its channels whenever it doubles the sides. 2.2 folds pixels by two first, and each of its
levels has a shortcut of means, or copies, of cells.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from reelflow.families.coder import FLAT, Coder, CoderSize, Name, coder_rows, levels_of
from reelflow.families.family import arguments
from reelflow.interop.mapping import Row, linear, parameter, rearranged, table
from reelflow.models.coder import (
    Act,
    Attention,
    Conv,
    Fold,
    Layer,
    Nearest,
    Padding,
    Part,
    Res,
    Skip,
    TimeDown,
    TimeUp,
    Unfold,
)
from reelflow.models.vae import VAEConfig
from reelflow.nn.norm import Norm

__all__ = ["WAN_VAE", "autoencoder"]

ZEROS = Padding("zeros", "zeros")
AFTER = Padding("zeros", "after")
NORM = Norm("rms", eps=1e-24, affine=True)  # theirs bounds the length from below, by 1e-12

Named = tuple[Layer, Name]


def autoencoder(
    *,
    base: int,
    decoder_base: int,
    latent: int,
    multiples: Sequence[int] = (1, 2, 4, 4),
    blocks: int = 2,
    halvings: Sequence[bool] = (False, True, True),
    residual: bool = False,
    patch: int = 1,
    mean: Sequence[float] = (0.0,),
    std: Sequence[float] = (1.0,),
) -> VAEConfig:
    """Return the autoencoder of levels `multiples` times `base`, or `decoder_base`, channels wide.

    `halvings` says after which levels time is halved too.
    """
    shape: dict[str, Any] = {"multiples": multiples, "blocks": blocks, "halvings": halvings, "residual": residual}
    return VAEConfig(
        latent,
        tuple(layer for layer, _ in _encoder(base=base, latent=latent, **shape)),
        tuple(layer for layer, _ in _decoder(base=decoder_base, latent=latent, pixels=3 * patch**2, **shape)),
        patch=patch,
        latent_mean=tuple(mean),
        latent_std=tuple(std),
    )


def _encoder(
    *, base: int, latent: int, multiples: Sequence[int], blocks: int, halvings: Sequence[bool], residual: bool
) -> Iterator[Named]:
    yield _conv(base), "encoder.conv_in"
    widths, count = [base * m for m in multiples], 0
    for level, (before, width) in enumerate(zip([base, *widths], widths, strict=False)):
        last = level == len(widths) - 1
        halve = not last and halvings[level]
        layers: list[tuple[Part, str]] = [(_res(width), f"resnets.{i}") for i in range(blocks)]
        if not last:
            layers.append((Conv(width, (1, 3), (1, 2), AFTER), "downsampler.resample.1"))
        if halve:
            layers.append((TimeDown(), "downsampler.time_conv"))
        if residual:
            means = Fold(1 if last else 2, 2 if halve else 1, width, first="zeros")
            yield _skip(layers, () if last and before == width else (means,), f"encoder.down_blocks.{level}")
            continue
        for layer, name in layers:  # one list of all levels; a resampler is one of its entries
            theirs = name.replace("downsampler", str(count)) if "downsampler" in name else str(count)
            yield layer, f"encoder.down_blocks.{theirs}"
            count += 0 if isinstance(layer, Conv) and halve else 1
    yield from _middle(widths[-1], "encoder")
    yield Act(NORM), "encoder.norm_out"
    yield _conv(2 * latent), "encoder.conv_out"
    yield Conv(2 * latent, (1, 1), pad=ZEROS), "quant_conv"


def _decoder(
    *,
    base: int,
    latent: int,
    pixels: int,
    multiples: Sequence[int],
    blocks: int,
    halvings: Sequence[bool],
    residual: bool,
) -> Iterator[Named]:
    yield Conv(latent, (1, 1), pad=ZEROS), "post_quant_conv"
    widths = [base * m for m in reversed(multiples)]
    yield _conv(widths[0]), "decoder.conv_in"
    yield from _middle(widths[0], "decoder")
    for level, width in enumerate(widths):
        last = level == len(widths) - 1
        double = not last and halvings[-1 - level]
        layers: list[tuple[Part, str]] = [(_res(width), f"resnets.{i}") for i in range(blocks + 1)]
        up = "upsampler" if residual else "upsamplers.0"
        if double:
            layers.append((TimeUp(), f"{up}.time_conv"))
        if not last:
            layers.append((Nearest(), ""))
            layers.append((Conv(width if residual else width // 2, (1, 3), pad=ZEROS), f"{up}.resample.1"))
        prefix = f"decoder.up_blocks.{level}"
        if residual and not last:
            yield _skip(layers, (Unfold(2, 2 if double else 1, width),), prefix)
        else:
            yield from ((layer, f"{prefix}.{name}" if name else "") for layer, name in layers)
    yield Act(NORM), "decoder.norm_out"
    yield _conv(pixels), "decoder.conv_out"


def _conv(channels: int) -> Conv:
    return Conv(channels, pad=ZEROS)


def _res(channels: int) -> Res:
    return Res(channels, NORM, pad=ZEROS)


def _skip(layers: list[tuple[Part, str]], shortcut: tuple[Part, ...], prefix: str) -> Named:
    names = (f"{prefix}.{name}" if name else "" for _, name in layers)
    return Skip(tuple(layer for layer, _ in layers), shortcut), (*names, *("" for _ in shortcut))


def _middle(channels: int, side: str) -> Iterator[Named]:
    yield _res(channels), f"{side}.mid_block.resnets.0"
    yield Attention("frame", NORM), f"{side}.mid_block.attentions.0"
    yield _res(channels), f"{side}.mid_block.resnets.1"


_DEFAULTS: dict[str, Any] = {
    "base_dim": 96,
    "decoder_base_dim": None,
    "z_dim": 16,
    "dim_mult": [1, 2, 4, 4],
    "num_res_blocks": 2,
    "attn_scales": [],
    "temperal_downsample": [False, True, True],
    "dropout": 0.0,
    "latents_mean": [
        *(-0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508),
        *(0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921),
    ],
    "latents_std": [
        *(2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743),
        *(3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160),
    ],
    "is_residual": False,
    "in_channels": 3,
    "out_channels": 3,
    "patch_size": None,
    "scale_factor_temporal": 4,
    "scale_factor_spatial": 8,
}


def read(found: dict[str, Any]) -> VAEConfig:
    """Return the autoencoder of a config.json.

    Raises:
        CheckpointError: a value is unknown.
    """
    c = arguments(found, _DEFAULTS, fixed={"attn_scales": [], "dropout": 0.0})
    return autoencoder(
        base=c["base_dim"],
        decoder_base=c["decoder_base_dim"] or c["base_dim"],
        latent=c["z_dim"],
        multiples=c["dim_mult"],
        blocks=c["num_res_blocks"],
        halvings=c["temperal_downsample"],
        residual=c["is_residual"],
        patch=c["patch_size"] or 1,
        mean=c["latents_mean"],
        std=c["latents_std"],
    )


def write(config: VAEConfig) -> dict[str, Any]:
    """Return the config.json of an autoencoder."""
    first, levels = config.encoder[0], levels_of(config.encoder, middle=2)
    wide = config.decoder[1]
    assert isinstance(first, Conv)
    assert isinstance(wide, Conv)
    base, multiples = first.channels, [level.channels // first.channels for level in levels]
    decoder_base = wide.channels // multiples[-1]
    return _DEFAULTS | {
        "base_dim": base,
        "decoder_base_dim": None if decoder_base == base else decoder_base,
        "z_dim": config.latent_channels,
        "dim_mult": multiples,
        "num_res_blocks": levels[0].blocks,
        "temperal_downsample": [level.time == 2 for level in levels[:-1]],
        "latents_mean": list(config.latent_mean),
        "latents_std": list(config.latent_std),
        "is_residual": isinstance(config.encoder[1], Skip),
        "in_channels": 3 * config.patch**2,
        "out_channels": 3 * config.patch**2,
        "patch_size": None if config.patch == 1 else config.patch,
        "scale_factor_temporal": config.temporal_stride,
        "scale_factor_spatial": config.spatial_stride,
    }


def weights(config: VAEConfig) -> tuple[Row, ...]:
    """Relate our weights to the published ones."""
    c, p = write(config), config.patch
    shape: dict[str, Any] = {
        "multiples": c["dim_mult"],
        "blocks": c["num_res_blocks"],
        "halvings": c["temperal_downsample"],
        "residual": c["is_residual"],
        "latent": c["z_dim"],
    }
    encoder = (name for _, name in _encoder(base=c["base_dim"], **shape))
    decoder = (name for _, name in _decoder(base=c["decoder_base_dim"] or c["base_dim"], pixels=3 * p**2, **shape))
    pixels = {  # theirs fold columns before rows
        "encoder.conv_in": rearranged("d (c w h) t y x -> d (c h w) t y x", h=p, w=p),
        "decoder.conv_out": rearranged("(c w h) ... -> (c h w) ...", h=p, w=p),
    }

    def rows(layer: Part, channels: int, ours: str, theirs: str) -> Iterable[Row]:
        if isinstance(layer, Res):
            return _res_rows(ours, theirs, projected=channels != layer.channels)
        if isinstance(layer, Attention):
            return _attention_rows(ours, theirs)
        if isinstance(layer, Act):
            return (parameter(f"{ours}.norm.weight", f"{theirs}.gamma", rearranged("d 1 1 1 -> d")),)
        changes = (pixels[theirs],) if theirs == "decoder.conv_out" else ()
        weight = pixels[theirs] if theirs == "encoder.conv_in" else FLAT if "resample" in theirs else None
        return linear(f"{ours}.conv", theirs, *changes, weight=weight)

    return coder_rows(config, encoder, decoder, rows)


def _res_rows(ours: str, theirs: str, *, projected: bool) -> tuple[Row, ...]:
    return table(
        parameter("norm1.weight", "norm1.gamma", rearranged("d 1 1 1 -> d")),
        linear("conv1.conv", "conv1"),
        parameter("norm2.weight", "norm2.gamma", rearranged("d 1 1 1 -> d")),
        linear("conv2.conv", "conv2"),
        linear("shortcut", "conv_shortcut") if projected else (),
        ours=f"{ours}.",
        theirs=f"{theirs}.",
    )


def _attention_rows(ours: str, theirs: str) -> tuple[Row, ...]:
    flat = rearranged("d c 1 1 -> d c")
    return table(
        parameter("norm.weight", "norm.gamma", rearranged("d 1 1 -> d")),
        linear("qkv", "to_qkv", weight=flat),
        linear("out", "proj", weight=flat),
        ours=f"{ours}.",
        theirs=f"{theirs}.",
    )


_MEAN_22 = (
    *(-0.2289, -0.0052, -0.1323, -0.2339, -0.2799, 0.0174, 0.1838, 0.1557, -0.1382, 0.0542, 0.2813, 0.0891),
    *(0.1570, -0.0098, 0.0375, -0.1825, -0.2246, -0.1207, -0.0698, 0.5109, 0.2665, -0.2108, -0.2158, 0.2502),
    *(-0.2055, -0.0322, 0.1109, 0.1567, -0.0729, 0.0899, -0.2799, -0.1230, -0.0313, -0.1649, 0.0117, 0.0723),
    *(-0.2839, -0.2083, -0.0520, 0.3748, 0.0152, 0.1957, 0.1433, -0.2944, 0.3573, -0.0548, -0.1681, -0.0667),
)
_STD_22 = (
    *(0.4765, 1.0364, 0.4514, 1.1677, 0.5313, 0.4990, 0.4818, 0.5013, 0.8158, 1.0344, 0.5894, 1.0901),
    *(0.6885, 0.6165, 0.8454, 0.4978, 0.5759, 0.3523, 0.7135, 0.6804, 0.5833, 1.4146, 0.8986, 0.5659),
    *(0.7069, 0.5338, 0.4889, 0.4917, 0.4069, 0.4999, 0.6866, 0.4093, 0.5709, 0.6065, 0.6415, 0.4944),
    *(0.5726, 1.2042, 0.5458, 1.6887, 0.3971, 1.0600, 0.3943, 0.5537, 0.5444, 0.4089, 0.7468, 0.7744),
)

WAN_VAE = Coder(
    name="wan_vae",
    class_name="AutoencoderKLWan",
    sizes={
        "2_1": CoderSize(read({}), 126_892_531, "Wan-AI/Wan2.1-T2V-14B-Diffusers", clip=(81, 480, 832)),
        "2_2": CoderSize(
            autoencoder(base=160, decoder_base=256, latent=48, residual=True, patch=2, mean=_MEAN_22, std=_STD_22),
            704_688_668,
            "Wan-AI/Wan2.2-TI2V-5B-Diffusers",
            clip=(121, 704, 1280),
        ),
    },
    licence="Apache-2.0",
    read=read,
    write=write,
    weights=weights,
    notes=(
        "diffusers clamps what it decodes to [-1, 1], inside `decode`; ours does not, so that gradients pass.",
        "diffusers drops frames after the last 1 + 4 k; ours refuses such a clip.",
    ),
)
