"""The autoencoders of LTX-Video (HaCohen et al. 2024, arXiv:2501.00103): 8 x 32 x 32 pixels become one latent.

Pixels are folded by four first. The encoder is causal and streams; the decoder pads in time with the first and the last
frame and does not. One variance is shared by a latent's channels, and the latents' mean and standard deviation lie among
the weights. From 0.9.1 on the decoder has shortcuts of copies and is told how noisy latents are, 0.05 as published, which
is t = 0.95 here; that of 0.9.1 adds noise of its own. From 0.9.5 on the encoder folds, with shortcuts of means.
"""

from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from typing import Any

from reelflow.errors import CheckpointError
from reelflow.families.coder import Coder, CoderSize, Name, coder_rows
from reelflow.families.family import arguments, vector_rows
from reelflow.interop.mapping import Row, linear, parameter, rearranged, table
from reelflow.models.coder import Act, Conv, Fold, Layer, Padding, Part, Res, Shifted, Skip, Tile, Timed, Unfold
from reelflow.models.vae import VAEConfig
from reelflow.nn.norm import Norm

__all__ = ["LTX_VAE", "autoencoder"]

PAST, AROUND = Padding("first"), Padding("ends")
NORM = Norm("rms", eps=1e-8)

FOLDS = {"spatial": (2, 1), "temporal": (1, 2), "spatiotemporal": (2, 2)}  # of space and of time, by their names

Named = tuple[Layer, Name]


def autoencoder(
    *,
    latent: int = 128,
    widths: Sequence[int] = (128, 256, 512, 512),
    blocks: Sequence[int] = (4, 3, 3, 3, 4),
    folds: Sequence[str] = (),
    decoder_widths: Sequence[int] = (128, 256, 512, 512),
    decoder_blocks: Sequence[int] = (4, 3, 3, 3, 4),
    halving: bool = False,
    timed: bool = False,
    noise: Sequence[bool] = (),
    patch: int = 4,
    eps: float = 1e-6,
    causal: bool = False,
) -> VAEConfig:
    """Return the autoencoder of levels so wide and of so many blocks, those of the middle last.

    Without `folds` the encoder has strided convolutions, and its last level keeps the size; else the width of the middle is
    the last one. A decoder that is `halving` has shortcuts, and half of the width of what comes into each level; `noise` says
    which of its levels, and whether the middle, add noise.
    """
    return VAEConfig(
        latent,
        tuple(layer for layer, _ in _encoder(latent, widths, blocks, folds, eps)),
        tuple(
            layer
            for layer, _ in _decoder(
                3 * patch**2,
                decoder_widths,
                decoder_blocks,
                halving=halving,
                timed=timed,
                noise=noise or len(decoder_blocks) * [False],
                pad=PAST if causal else AROUND,
                eps=eps,
            )
        ),
        patch=patch,
        posterior="shared",
    )


def _encoder(
    latent: int, widths: Sequence[int], blocks: Sequence[int], folds: Sequence[str], eps: float
) -> Iterator[Named]:
    yield Conv(widths[0], pad=PAST), "encoder.conv_in.conv"
    for level, (width, after) in enumerate(pairwise(widths if folds else [*widths, widths[-1]])):
        prefix = f"encoder.down_blocks.{level}"
        yield from _blocks(Res(width, NORM, pad=PAST), blocks[level], prefix)
        if folds:
            space, time = FOLDS[folds[level]]
            conv = Conv(after // (space**2 * time), pad=PAST)
            layers, means = (conv, Fold(space, time)), Fold(space, time, after)
            yield Skip(layers, (means,)), (f"{prefix}.downsamplers.0.conv.conv", "", "")
        elif level < len(widths) - 1:
            yield Conv(width, stride=(2, 2), pad=PAST), f"{prefix}.downsamplers.0.conv"
            if after != width:
                yield Res(after, NORM, pad=PAST, projected=_projected(eps)), f"{prefix}.conv_out"
    yield from _blocks(Res(widths[-1], NORM, pad=PAST), blocks[-1], "encoder.mid_block")
    yield Act(NORM), ""
    yield Conv(latent + 1, pad=PAST), "encoder.conv_out.conv"


def _decoder(
    pixels: int,
    widths: Sequence[int],
    blocks: Sequence[int],
    *,
    halving: bool,
    timed: bool,
    noise: Sequence[bool],
    pad: Padding,
    eps: float,
) -> Iterator[Named]:
    def group(width: int, count: int, prefix: str, *, noisy: bool) -> Iterator[Named]:
        res = Res(width, Shifted(NORM) if timed else NORM, pad=pad, noise=noisy)
        named = list(_blocks(res, count, prefix))
        if timed:
            yield Timed(tuple(res for _ in named)), (f"{prefix}.time_embedder", *(str(name) for _, name in named))
        else:
            yield from named

    before = widths[-1]
    yield Conv(before, pad=pad), "decoder.conv_in.conv"
    yield from group(before, blocks[-1], "decoder.mid_block", noisy=noise[-1])
    for level, wide in enumerate(reversed(widths)):
        prefix, width, same = f"decoder.up_blocks.{level}", wide // 2 if halving else wide, not (halving or level)
        if width != before and not halving:
            yield Res(width, NORM, pad=pad, projected=_projected(eps)), f"{prefix}.conv_in"
        if not same:
            conv, unfold = Conv(8 * width, pad=pad), Unfold(2, 2)
            name = f"{prefix}.upsamplers.0.conv.conv"
            if halving:
                yield Skip((conv, unfold), (unfold, Tile(width))), (name, "", "", "")
            else:
                yield from ((conv, name), (unfold, ""))
        yield from group(width, blocks[-2 - level], prefix, noisy=noise[-2 - level])
        before = width
    if timed:
        yield Timed((Act(Shifted(NORM)),)), ("decoder.time_embedder", "decoder")
    else:
        yield Act(NORM), ""
    yield Conv(pixels, pad=pad), "decoder.conv_out.conv"


def _projected(eps: float) -> Norm:
    return Norm("layer", eps, affine=True)


def _blocks(res: Res, count: int, prefix: str) -> Iterator[Named]:
    return ((res, f"{prefix}.resnets.{index}") for index in range(count))


_DOWN, _FOLDING_DOWN = "LTXVideoDownBlock3D", "LTXVideo095DownBlock3D"
_DEFAULTS: dict[str, Any] = {
    "in_channels": 3,
    "out_channels": 3,
    "latent_channels": 128,
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": 4 * [_DOWN],
    "decoder_block_out_channels": [128, 256, 512, 512],
    "layers_per_block": [4, 3, 3, 3, 4],
    "decoder_layers_per_block": [4, 3, 3, 3, 4],
    "spatio_temporal_scaling": [True, True, True, False],
    "decoder_spatio_temporal_scaling": [True, True, True, False],
    "decoder_inject_noise": 5 * [False],
    "downsample_type": 4 * ["conv"],
    "upsample_residual": 4 * [False],
    "upsample_factor": 4 * [1],
    "timestep_conditioning": False,
    "patch_size": 4,
    "patch_size_t": 1,
    "resnet_norm_eps": 1e-6,
    "scaling_factor": 1.0,
    "encoder_causal": True,
    "decoder_causal": False,
    "spatial_compression_ratio": None,
    "temporal_compression_ratio": None,
}


def read(found: dict[str, Any]) -> VAEConfig:
    """Return the autoencoder of a config.json.

    Raises:
        CheckpointError: a value is unknown, or of none of the published designs: the encoder has strides and a last level
            that keeps the size, or folds at all; the decoder the former, and nothing else, or shortcuts at all; and where
            a last level keeps the size, the middle has as many blocks as the first.
    """
    given = {name: list(value) if isinstance(value, tuple) else value for name, value in found.items()}
    c = {**_DEFAULTS, **given}
    folding, halving = _FOLDING_DOWN in c["down_block_types"], any(c["upsample_residual"])
    levels, decoder_levels = len(c["spatio_temporal_scaling"]), len(c["decoder_spatio_temporal_scaling"])
    top = c["decoder_block_out_channels"][-1]
    fixed = {
        "down_block_types": levels * [_FOLDING_DOWN if folding else _DOWN],
        "spatio_temporal_scaling": [*(levels - 1) * [True], folding],
        "decoder_spatio_temporal_scaling": [*(decoder_levels - 1) * [True], halving],
        "upsample_residual": decoder_levels * [halving],
        "upsample_factor": decoder_levels * [1 + halving],
    }
    if not folding:
        fixed |= {"layers_per_block": [*c["layers_per_block"][:-1], c["layers_per_block"][0]]}
    if halving:
        fixed |= {"decoder_block_out_channels": [top >> level for level in reversed(range(decoder_levels))]}
    else:
        blocks = c["decoder_layers_per_block"]
        fixed |= {"decoder_layers_per_block": [*blocks[:-1], blocks[0]], "timestep_conditioning": False}
        fixed |= {"decoder_inject_noise": len(c["decoder_inject_noise"]) * [False]}
    same = ("in_channels", "out_channels", "patch_size_t", "scaling_factor", "encoder_causal")
    arguments(given, _DEFAULTS, fixed=fixed | {name: _DEFAULTS[name] for name in same})
    config = autoencoder(
        latent=c["latent_channels"],
        widths=c["block_out_channels"],
        blocks=c["layers_per_block"],
        folds=c["downsample_type"] if folding else (),
        decoder_widths=c["decoder_block_out_channels"],
        decoder_blocks=c["decoder_layers_per_block"],
        halving=halving,
        timed=c["timestep_conditioning"],
        noise=c["decoder_inject_noise"] if halving else (),
        patch=c["patch_size"],
        eps=c["resnet_norm_eps"],
        causal=c["decoder_causal"],
    )
    for axis, stride in (("spatial", config.spatial_stride), ("temporal", config.temporal_stride)):
        if c[f"{axis}_compression_ratio"] not in (None, stride):
            raise CheckpointError(
                f"config.json has {axis}_compression_ratio={c[f'{axis}_compression_ratio']}; its layers make {stride}"
            )
    return config


def write(config: VAEConfig) -> dict[str, Any]:
    """Return the config.json of an autoencoder."""
    encoder, decoder = _runs(config.encoder), _runs(config.decoder)[::-1]
    skips = [layer.shortcut[0] for layer in config.encoder if isinstance(layer, Skip)]
    names = {fold: name for name, fold in FOLDS.items()}
    folds = [names[fold.space, fold.time] for fold in skips]
    halving = any(isinstance(layer, Skip) for layer in config.decoder)
    levels, decoder_levels = len(encoder) - bool(folds), len(decoder) - halving
    first = config.decoder[0]
    assert isinstance(first, Conv)
    projected = [layer.projected for layer in (*config.encoder, *config.decoder) if isinstance(layer, Res)]
    return _DEFAULTS | {
        "latent_channels": config.latent_channels,
        "block_out_channels": [run[0].channels for run in encoder],
        "down_block_types": levels * [_FOLDING_DOWN if folds else _DOWN],
        "decoder_block_out_channels": [run[0].channels * (1 + halving) for run in decoder[:decoder_levels]],
        "layers_per_block": _counts(encoder, apart=bool(folds)),
        "decoder_layers_per_block": _counts(decoder, apart=halving),
        "spatio_temporal_scaling": [*(levels - 1) * [True], bool(folds)],
        "decoder_spatio_temporal_scaling": [*(decoder_levels - 1) * [True], halving],
        "decoder_inject_noise": [run[0].noise for run in decoder] if halving else (decoder_levels + 1) * [False],
        "downsample_type": folds or levels * ["conv"],
        "upsample_residual": decoder_levels * [halving],
        "upsample_factor": decoder_levels * [1 + halving],
        "timestep_conditioning": config.timed,
        "patch_size": config.patch,
        "resnet_norm_eps": next((norm.eps for norm in projected if norm is not None), 1e-6),
        "decoder_causal": first.pad == PAST,
        "spatial_compression_ratio": config.spatial_stride,
        "temporal_compression_ratio": config.temporal_stride,
    }


def _runs(layers: Sequence[Layer]) -> list[list[Res]]:
    """Return the blocks of each size, but for those that change the width."""
    runs: list[list[Res]] = [[]]
    for layer in layers:
        if layer.space * layer.time > 1:
            runs.append([])
        blocks = layer.layers if isinstance(layer, Timed) else (layer,)
        runs[-1] += [block for block in blocks if isinstance(block, Res) and block.projected is None]
    return runs


def _counts(runs: Sequence[Sequence[Res]], *, apart: bool) -> list[int]:
    """Return the numbers of blocks, those of the middle last, which may not be apart from a level of its size."""
    counts = [len(run) for run in runs]
    return counts if apart else [*counts[:-1], counts[-1] - counts[0], counts[0]]


def weights(config: VAEConfig) -> tuple[Row, ...]:
    """Relate our weights to the published ones."""
    c, p = write(config), config.patch
    folding, halving, eps = c["downsample_type"][0] != "conv", c["upsample_residual"][0], c["resnet_norm_eps"]
    encoder = _encoder(
        config.latent_channels,
        c["block_out_channels"],
        c["layers_per_block"],
        c["downsample_type"] if folding else (),
        eps,
    )
    decoder = _decoder(
        3 * p**2,
        c["decoder_block_out_channels"],
        c["decoder_layers_per_block"],
        halving=halving,
        timed=config.timed,
        noise=c["decoder_inject_noise"],
        pad=AROUND,
        eps=eps,
    )
    pixels = {  # theirs fold columns before rows
        "encoder.conv_in.conv": rearranged("d (c w h) t y x -> d (c h w) t y x", h=p, w=p),
        "decoder.conv_out.conv": rearranged("(c w h) ... -> (c h w) ...", h=p, w=p),
    }

    def rows(layer: Part | Timed, channels: int, ours: str, theirs: str) -> Iterable[Row]:
        if isinstance(layer, Timed):
            return vector_rows(f"{ours}.embed.mlp", f"{theirs}.timestep_embedder")
        if isinstance(layer, Res):
            return _res_rows(layer, ours, theirs)
        if isinstance(layer, Act):
            return (parameter(f"{ours}.norm.table", f"{theirs}.scale_shift_table"),)
        changes = (pixels[theirs],) if theirs == "decoder.conv_out.conv" else ()
        return linear(
            f"{ours}.conv",
            theirs,
            *changes,
            weight=pixels["encoder.conv_in.conv"] if theirs == "encoder.conv_in.conv" else None,
        )

    return table(
        coder_rows(
            config,
            (name for _, name in encoder),
            (name for _, name in decoder),
            rows,
            statistics=("latents_mean", "latents_std"),
        ),
        parameter("time_scale", "decoder.timestep_scale_multiplier") if config.timed else (),
    )


def _res_rows(layer: Res, ours: str, theirs: str) -> tuple[Row, ...]:
    flat = rearranged("d 1 1 -> d")
    measures = [(f"noise{n}.measure", f"per_channel_scale{n}") for n in (1, 2) if layer.noise]
    tables = {"norm1.table": "first", "norm2.table": "second"}
    return table(
        linear("conv1.conv", "conv1.conv"),
        linear("conv2.conv", "conv2.conv"),
        linear("norm3.norm", "norm3") if layer.projected else (),
        linear("shortcut", "conv_shortcut.conv") if layer.projected else (),
        (parameter(*names, flat) for names in measures),
        parameter(tables, "scale_shift_table") if isinstance(layer.norm, Shifted) else (),
        ours=f"{ours}.",
        theirs=f"{theirs}.",
    )


_HALVING: dict[str, Any] = {"decoder_widths": (256, 512, 1024), "halving": True, "timed": True}

LTX_VAE = Coder(
    name="ltx_vae",
    class_name="AutoencoderKLLTXVideo",
    sizes={
        "0_9_0": CoderSize(autoencoder(), 419_193_649, "Lightricks/LTX-Video", clip=(161, 512, 704)),
        "0_9_1": CoderSize(
            autoencoder(decoder_blocks=(5, 6, 7, 8), noise=(False, True, True, True), **_HALVING),
            934_991_538,
            "a-r-r-o-w/LTX-Video-0.9.1-diffusers",
            clip=(161, 512, 704),
        ),
        "0_9_5": CoderSize(
            autoencoder(
                widths=(128, 256, 512, 1024, 2048),
                blocks=(4, 6, 6, 2, 2),
                folds=("spatial", "temporal", "spatiotemporal", "spatiotemporal"),
                decoder_blocks=(5, 5, 5, 5),
                **_HALVING,
            ),
            1_246_913_522,
            "Lightricks/LTX-Video-0.9.5",
            clip=(161, 512, 704),
        ),
    },
    licence="RAIL-M (0.9.0, 0.9.1), OpenRAIL-M (0.9.5)",
    read=read,
    write=write,
    weights=weights,
    notes=(
        "diffusers draws the noise of 0.9.1's decoder from torch's own generator; ours from the one that decode is given.",
        "Its pipelines say how noisy latents are, 1 - t of ours, after they mixed noise of unit variance into latents that are "
        "not normalised: (1 - s) x + s (noise - mean) / std of ours, with s = 0.025 as published.",
        "0.9.7 and 0.9.8 have the autoencoder of 0.9.5.",
    ),
)
