"""The autoencoder of Mochi 1 (Genmo 2024): 6 x in time, norms per frame, attention of each position to its own past.

The encoder reads the sines and cosines of colours beside them, and is narrower than the decoder, which has no attention.
Beyond the clip a convolution sees the border, and before it the first frame. Cells are folded by one convolution with them
as kernel and stride, and unfolded from a map of each position; what unfolds before frame 0 is dropped at the end, since
the convolutions between have seen it. Streams are exact; the encoder's state grows by the keys of each latent frame.
"""

from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from math import prod
from typing import Any

from reelflow.errors import CheckpointError
from reelflow.families.coder import Coder, CoderSize, Name, coder_rows
from reelflow.families.family import arguments
from reelflow.interop.mapping import Row, linear, rearranged, table
from reelflow.models.coder import Act, Attention, Conv, Drop, Groups, Layer, Padding, Part, Res, Unfold, Waves
from reelflow.models.vae import VAEConfig

__all__ = ["MOCHI_VAE", "autoencoder"]

EDGE = Padding("first", "replicate")
NORM = Groups(32, "frame", eps=1e-5)
HEAD = 32  # channels of a head


def autoencoder(
    *,
    latent: int = 12,
    encoder: Sequence[int] = (64, 128, 256, 384),
    decoder: Sequence[int] = (128, 256, 512, 768),
    blocks: Sequence[int] = (3, 3, 4, 6, 3),
    attention: Sequence[bool] = (False, True, True, True, True),
    times: Sequence[int] = (1, 2, 3),
    spaces: Sequence[int] = (2, 2, 2),
    mean: Sequence[float] = (0.0,),
    std: Sequence[float] = (1.0,),
) -> VAEConfig:
    """Return the autoencoder of these widths, finest first, with `blocks` at the start, at each level, and at the end.

    `times` and `spaces` are what each level but the first divides by.
    """
    return VAEConfig(
        latent,
        tuple(layer for layer, _ in _encoder(latent, encoder, blocks, attention, times, spaces)),
        tuple(layer for layer, _ in _decoder(latent, decoder, blocks, times, spaces)),
        latent_mean=tuple(mean),
        latent_std=tuple(std),
    )


def _encoder(
    latent: int,
    widths: Sequence[int],
    blocks: Sequence[int],
    attention: Sequence[bool],
    times: Sequence[int],
    spaces: Sequence[int],
) -> Iterator[tuple[Layer, Name]]:
    def run(width: int, index: int, name: str) -> Iterator[tuple[Layer, Name]]:
        for i in range(blocks[index]):
            yield Res(width, NORM, pad=EDGE), f"encoder.{name}.resnets.{i}"
            if attention[index]:
                yield Attention("pixel", NORM, width // HEAD, "one", bias=False), f"encoder.{name}.attentions.{i}"

    yield Waves(6, 2), ""
    yield Conv(widths[0], (1, 1)), "encoder.proj_in"
    yield from run(widths[0], 0, "block_in")
    for level, (width, time, space) in enumerate(zip(widths[1:], times, spaces, strict=True)):
        yield Conv(width, (time, space), (time, space), EDGE), f"encoder.down_blocks.{level}.conv_in.conv"
        yield from run(width, level + 1, f"down_blocks.{level}")
    yield from run(widths[-1], -1, "block_out")
    yield Act(NORM), "encoder.norm_out.norm_layer"
    yield Conv(2 * latent, (1, 1), bias=False), "encoder.proj_out"


def _decoder(
    latent: int, widths: Sequence[int], blocks: Sequence[int], times: Sequence[int], spaces: Sequence[int]
) -> Iterator[tuple[Layer, Name]]:
    def run(width: int, count: int, name: str) -> Iterator[tuple[Layer, Name]]:
        return ((Res(width, NORM, pad=EDGE), f"decoder.{name}.resnets.{i}") for i in range(count))

    yield Conv(widths[-1], (1, 1)), "decoder.conv_in"
    yield from run(widths[-1], blocks[-1], "block_in")
    for level in range(len(times)):
        time, space = times[-1 - level], spaces[-1 - level]
        yield from run(widths[-1 - level], blocks[-2 - level], f"up_blocks.{level}")
        yield Conv(widths[-2 - level] * space**2 * time, (1, 1)), f"decoder.up_blocks.{level}.proj"
        yield Unfold(space, time, first="keep"), ""
    yield from run(widths[0], blocks[0], "block_out")
    yield Drop(prod(times) - 1), ""
    yield Act(None), ""
    yield Conv(3, (1, 1)), "decoder.proj_out"


_DEFAULTS: dict[str, Any] = {
    "in_channels": 15,
    "out_channels": 3,
    "encoder_block_out_channels": [64, 128, 256, 384],
    "decoder_block_out_channels": [128, 256, 512, 768],
    "latent_channels": 12,
    "layers_per_block": [3, 3, 4, 6, 3],
    "act_fn": "silu",
    "temporal_expansions": [1, 2, 3],
    "spatial_expansions": [2, 2, 2],
    "add_attention_block": [False, True, True, True, True],
    "latents_mean": [
        *(-0.06730895953510081, -0.038011381506090416, -0.07477820912866141, -0.05565264470995561),
        *(0.012767231469026969, -0.04703542746246419, 0.043896967884726704, -0.09346305707025976),
        *(-0.09918314763016893, -0.008729793427399178, -0.011931556316503654, -0.0321993391887285),
    ],
    "latents_std": [
        *(0.9263795028493863, 0.9248894543193766, 0.9393059390890617, 0.959253732819592),
        *(0.8244560132752793, 0.917259975397747, 0.9294154431013696, 1.3720942357788521),
        *(0.881393668867029, 0.9168315692124348, 0.9185249279345552, 0.9274757570805041),
    ],
    "scaling_factor": 1.0,
}


def read(found: dict[str, Any]) -> VAEConfig:
    """Return the autoencoder of a config.json.

    Raises:
        CheckpointError: a value is unknown, or one that the published weights do not have.
    """
    c = arguments(
        found, _DEFAULTS, fixed={"in_channels": 15, "out_channels": 3, "act_fn": "silu", "scaling_factor": 1.0}
    )
    blocks = c["layers_per_block"]
    if blocks[0] != blocks[-1]:
        raise CheckpointError(
            f"config.json has layers_per_block={blocks!r}; published weights have as many at the end as at the start"
        )
    return autoencoder(
        latent=c["latent_channels"],
        encoder=c["encoder_block_out_channels"],
        decoder=c["decoder_block_out_channels"],
        blocks=blocks,
        attention=c["add_attention_block"],
        times=c["temporal_expansions"],
        spaces=c["spatial_expansions"],
        mean=c["latents_mean"],
        std=c["latents_std"],
    )


def write(config: VAEConfig) -> dict[str, Any]:
    """Return the config.json of an autoencoder."""
    runs: list[list[bool]] = []  # of each level's blocks, whether attention follows
    folds, widths = [], []
    for layer in config.encoder[1:-2]:
        if isinstance(layer, Conv):
            folds.append(layer)
            widths.append(layer.channels)
            runs.append([])
        elif isinstance(layer, Res):
            runs[-1].append(False)
        else:
            assert isinstance(layer, Attention)
            runs[-1][-1] = True
    ends = len(runs[0])
    runs = [*runs[:-1], runs[-1][:-ends], runs[-1][-ends:]]
    first = config.decoder[0]
    assert isinstance(first, Conv)
    wide = [first.channels]
    for layer, after in pairwise(config.decoder):
        if isinstance(after, Unfold):
            wide.append(after.width(layer.width(wide[-1])))
    return _DEFAULTS | {
        "encoder_block_out_channels": widths,
        "decoder_block_out_channels": wide[::-1],
        "latent_channels": config.latent_channels,
        "layers_per_block": [len(run) for run in runs],
        "temporal_expansions": [fold.time for fold in folds[1:]],
        "spatial_expansions": [fold.space for fold in folds[1:]],
        "add_attention_block": [run[0] for run in runs],
        "latents_mean": list(config.latent_mean),
        "latents_std": list(config.latent_std),
    }


def weights(config: VAEConfig) -> tuple[Row, ...]:
    """Relate our weights to the published ones."""
    c = write(config)
    ends = c["temporal_expansions"], c["spatial_expansions"]
    blocks, latent = c["layers_per_block"], config.latent_channels
    encoder = _encoder(latent, c["encoder_block_out_channels"], blocks, c["add_attention_block"], *ends)
    decoder = _decoder(latent, c["decoder_block_out_channels"], blocks, *ends)
    return coder_rows(config, (name for _, name in encoder), (name for _, name in decoder), _rows)


def _rows(layer: Part, channels: int, ours: str, theirs: str) -> Iterable[Row]:
    if isinstance(layer, Act):
        return linear(f"{ours}.norm", theirs)
    if isinstance(layer, Conv):
        flat = rearranged("d c -> d c 1 1 1") if "proj" in theirs else None
        return linear(f"{ours}.conv", theirs, weight=flat, bias=layer.bias)
    if isinstance(layer, Attention):
        norm, inside = theirs.replace("attentions", "norms"), f"{theirs}."
        return table(
            linear(f"{ours}.norm", f"{norm}.norm_layer"),
            linear(f"{ours}.qkv", [f"{inside}to_q", f"{inside}to_k", f"{inside}to_v"], bias=False),
            linear(f"{ours}.out", f"{inside}to_out.0"),
        )
    return table(
        linear("norm1", "norm1.norm_layer"),
        linear("conv1.conv", "conv1.conv"),
        linear("norm2", "norm2.norm_layer"),
        linear("conv2.conv", "conv2.conv"),
        ours=f"{ours}.",
        theirs=f"{theirs}.",
    )


MOCHI_VAE = Coder(
    name="mochi_vae",
    class_name="AutoencoderKLMochi",
    sizes={"preview": CoderSize(read({}), 459_748_611, "genmo/mochi-1-preview", clip=(163, 480, 848))},
    licence="Apache-2.0",
    read=read,
    write=write,
    weights=weights,
    notes=(
        "diffusers rounds any number of frames up to 1 + 6 k latents' worth; ours refuses what does not fit.",
        "diffusers streams neither way (its frame-wise decoding raises); ours streams both, exactly.",
    ),
)
