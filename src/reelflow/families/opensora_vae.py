"""The autoencoder of Open-Sora 1.2 (Zheng et al. 2024): pictures first, then four frames of their latents into one.

Each frame goes through an image autoencoder, and its latents through a second autoencoder in time only, 17 frames at a
time: three frames of zeros come before them, and what becomes of these is dropped at the end. Pieces know nothing of each
other, and a norm sees one of them, so there are seams every 17 frames.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from reelflow.errors import CheckpointError
from reelflow.families import kl_vae
from reelflow.families.coder import Coder, CoderSize, Name, coder_rows
from reelflow.families.family import arguments
from reelflow.interop.mapping import Entry, Row, derived, linear, table
from reelflow.models.coder import Act, Conv, Drop, Groups, Layer, Lead, Padding, Part, Res, Take, Unfold
from reelflow.models.vae import Pieces, VAEConfig

__all__ = ["OPENSORA_VAE", "autoencoder"]

ZEROS = Padding("zeros", "zeros")
SCALE = 0.18215  # of the pictures' latents


def autoencoder(
    picture: VAEConfig,
    *,
    filters: int = 128,
    multiples: Sequence[int] = (1, 2, 2, 4),
    blocks: int = 4,
    groups: int = 32,
    halvings: Sequence[bool] = (False, True, True),
    frames: int = 17,
    shift: Sequence[float] = (0.0,),
    scale: Sequence[float] = (1.0,),
) -> VAEConfig:
    """Return an image autoencoder with one in time inside, which has as many latent channels.

    `halvings` says after which levels, finest first, time is halved; clips are cut into pieces of `frames`.
    """
    latent, stride = picture.latent_channels, 2 ** sum(halvings)
    shape: dict[str, Any] = {"multiples": multiples, "blocks": blocks, "groups": groups, "halvings": halvings}
    down = (layer for layer, _ in _encoder(latent, filters, **shape))
    up = (layer for layer, _ in _decoder(latent, filters, **shape))
    return VAEConfig(
        latent,
        (*picture.encoder, *down),
        (*up, *picture.decoder),
        latent_mean=tuple(shift),
        latent_std=tuple(scale),
        pieces=Pieces(frames, (frames - 1) // stride + 1, knows="nothing"),
    )


def _encoder(
    latent: int, filters: int, *, multiples: Sequence[int], blocks: int, groups: int, halvings: Sequence[bool]
) -> Iterator[tuple[Layer, Name]]:
    side = "temporal_vae.encoder"
    yield Take(latent, SCALE), ""
    yield Lead(2 ** sum(halvings) - 1), ""
    yield Conv(filters, pad=ZEROS, bias=False), f"{side}.conv_in.conv"
    for level, multiple in enumerate(multiples):
        width = filters * multiple
        yield from ((_res(width, groups), f"{side}.block_res_blocks.{level}.{i}") for i in range(blocks))
        if level < len(multiples) - 1 and halvings[level]:
            yield Conv(width, stride=(2, 1), pad=ZEROS, first="cell"), f"{side}.conv_blocks.{level}.conv"
    yield from ((_res(width, groups), f"{side}.res_blocks.{i}") for i in range(blocks))
    yield Act(_norm(groups)), f"{side}.norm1"
    yield Conv(2 * latent, (1, 1)), f"{side}.conv2.conv"
    yield Conv(2 * latent, (1, 1)), "temporal_vae.quant_conv.conv"


def _decoder(
    latent: int, filters: int, *, multiples: Sequence[int], blocks: int, groups: int, halvings: Sequence[bool]
) -> Iterator[tuple[Layer, Name]]:
    side, width = "temporal_vae.decoder", filters * multiples[-1]
    yield Conv(latent, (1, 1)), "temporal_vae.post_quant_conv.conv"
    yield Conv(width, pad=ZEROS), f"{side}.conv1.conv"
    yield from ((_res(width, groups), f"{side}.res_blocks.{i}") for i in range(blocks))
    for level in reversed(range(len(multiples))):
        width = filters * multiples[level]
        yield from ((_res(width, groups), f"{side}.block_res_blocks.{level}.{i}") for i in range(blocks))
        if level > 0 and halvings[level - 1]:
            yield Conv(2 * width, pad=ZEROS), f"{side}.conv_blocks.{level - 1}.conv"
            yield Unfold(1, 2, first="keep"), ""
    yield Act(_norm(groups)), f"{side}.norm1"
    yield Conv(latent, pad=ZEROS), f"{side}.conv_out.conv"
    yield Drop(2 ** sum(halvings) - 1), ""
    yield Take(latent, 1 / SCALE), ""


def _res(width: int, groups: int) -> Res:
    return Res(width, _norm(groups), pad=ZEROS, bias=False)


def _norm(groups: int) -> Groups:
    return Groups(groups, "piece", eps=1e-5)


_PICTURE = kl_vae.autoencoder(latent=4, scale=SCALE)
_TIME: dict[str, Any] = {
    "in_out_channels": 4,
    "latent_embed_dim": 4,
    "embed_dim": 4,
    "filters": 128,
    "num_res_blocks": 4,
    "channel_multipliers": [1, 2, 2, 4],
    "temporal_downsample": [False, True, True],
    "num_groups": 32,
    "activation_fn": "swish",
}
_SPATIAL: dict[str, Any] = {
    "type": "VideoAutoencoderKL",
    "from_pretrained": "PixArt-alpha/pixart_sigma_sdxlvae_T5_diffusers",
    "subfolder": "vae",
    "micro_batch_size": 4,
    "local_files_only": False,
}
_TEMPORAL: dict[str, Any] = {"type": "VAE_Temporal_SD", "from_pretrained": None}
_DEFAULTS: dict[str, Any] = {
    "architectures": ["VideoAutoencoderPipeline"],
    "model_type": "VideoAutoencoderPipeline",
    "torch_dtype": "float32",
    "transformers_version": None,
    "vae_2d": _SPATIAL,
    "vae_temporal": _TEMPORAL,
    "from_pretrained": None,
    "freeze_vae_2d": False,
    "cal_loss": False,
    "micro_frame_size": 17,
    "shift": [-0.10, 0.34, 0.27, 0.98],
    "scale": [3.85, 2.32, 2.33, 3.06],
}


def read(found: dict[str, Any]) -> VAEConfig:
    """Return the autoencoder of a config.json.

    That of other sizes than the published ones has the arguments of VAE_Temporal in vae_temporal, and in vae_2d, as
    `config`, those of the image autoencoder.

    Raises:
        CheckpointError: a value is unknown, or one that the published weights do not have.
    """
    c = arguments(found, _DEFAULTS, fixed={"model_type": "VideoAutoencoderPipeline", "cal_loss": False})
    spatial = arguments(c["vae_2d"], {**_SPATIAL, "config": None}, fixed={"type": _SPATIAL["type"]})
    picture = _PICTURE if spatial["config"] is None else kl_vae.read(spatial["config"])
    t = arguments(c["vae_temporal"], {**_TEMPORAL, **_TIME})
    if t["type"] not in ("VAE_Temporal_SD", "VAE_Temporal"):
        raise CheckpointError(
            f"config.json has vae_temporal of type {t['type']!r}; known: VAE_Temporal_SD, VAE_Temporal"
        )
    widths = {t[name] for name in ("in_out_channels", "latent_embed_dim", "embed_dim")} | {picture.latent_channels}
    if len(widths) > 1 or t["activation_fn"] != "swish":
        raise CheckpointError("config.json has latents of several widths, or another activation than swish, inside")
    return autoencoder(
        picture,
        filters=t["filters"],
        multiples=t["channel_multipliers"],
        blocks=t["num_res_blocks"],
        groups=t["num_groups"],
        halvings=t["temporal_downsample"],
        frames=c["micro_frame_size"],
        shift=c["shift"],
        scale=c["scale"],
    )


def write(config: VAEConfig) -> dict[str, Any]:
    """Return the config.json of an autoencoder."""
    picture, time = _picture(config), _time(config)
    assert config.pieces is not None
    spatial = _SPATIAL if picture == _PICTURE else {"type": _SPATIAL["type"], "config": kl_vae.write(picture)}
    return _DEFAULTS | {
        "vae_2d": spatial,
        "vae_temporal": _TEMPORAL if time == _TIME else {"type": "VAE_Temporal", **time},
        "micro_frame_size": config.pieces.frames,
        "shift": list(config.latent_mean),
        "scale": list(config.latent_std),
    }


def _cut(config: VAEConfig) -> tuple[int, int]:
    """Return where the encoder of time begins, and where its decoder ends."""
    down, up = (
        [isinstance(layer, Take) for layer in layers].index(True) for layers in (config.encoder, config.decoder)
    )
    return down, up + 1


def _picture(config: VAEConfig) -> VAEConfig:
    down, up = _cut(config)
    return VAEConfig(config.latent_channels, config.encoder[:down], config.decoder[up:], latent_std=(1 / SCALE,))


def _time(config: VAEConfig) -> dict[str, Any]:
    """Return what the autoencoder in time was made of, as arguments of theirs."""
    _, lead, first, *layers = config.encoder[_cut(config)[0] :]
    head = layers[-3]
    assert isinstance(lead, Lead)
    assert isinstance(first, Conv)
    assert isinstance(head, Act)
    assert isinstance(head.norm, Groups)
    widths = [layer.channels for layer in layers if isinstance(layer, Res)]
    halved = [index for index, layer in enumerate(layers) if isinstance(layer, Conv) and layer.time == 2]
    # As many blocks at each level, and after the last: what divides their number so that halvings fall between levels.
    for blocks in range(1, len(widths) + 1):
        levels, rest = divmod(len(widths), blocks)
        ends = [(index - k) // blocks - 1 for k, index in enumerate(halved) if (index - k) % blocks == 0]
        runs = [set(widths[i : i + blocks]) for i in range(0, len(widths), blocks)]
        if not rest and levels > 1 and len(ends) == len(halved) and all(len(run) == 1 for run in runs):
            fits = blocks, levels - 1, ends
    blocks, levels, ends = fits
    return _TIME | {
        **dict.fromkeys(("in_out_channels", "latent_embed_dim", "embed_dim"), config.latent_channels),
        "filters": first.channels,
        "num_res_blocks": blocks,
        "channel_multipliers": [width // first.channels for width in widths[::blocks][:levels]],
        "temporal_downsample": [level in ends for level in range(levels - 1)],
        "num_groups": head.norm.num,
    }


def weights(config: VAEConfig) -> tuple[Row, ...]:
    """Relate our weights to the published ones."""
    t, (down, up) = _time(config), _cut(config)
    shape: dict[str, Any] = {
        "multiples": t["channel_multipliers"],
        "blocks": t["num_res_blocks"],
        "groups": t["num_groups"],
        "halvings": t["temporal_downsample"],
    }
    encoder: list[Name] = [name for _, name in _encoder(config.latent_channels, t["filters"], **shape)]
    decoder: list[Name] = [name for _, name in _decoder(config.latent_channels, t["filters"], **shape)]
    pictures = (
        replace(row, ours=_moved(row.ours, up))
        for row in table(kl_vae.weights(_picture(config)), theirs="spatial_vae.module.")
        if isinstance(row, Entry)
    )
    return table(
        pictures,
        coder_rows(config, [*down * [""], *encoder], [*decoder, *(len(config.decoder) - up) * [""]], _rows),
        (
            derived(name, partial(_spread, values))
            for name, values in zip(("shift", "scale"), (config.latent_mean, config.latent_std), strict=True)
        ),
    )


def _moved(ours: Mapping[str, tuple[str, ...]], by: int) -> dict[str, tuple[str, ...]]:
    """Return our names with layers of the decoder so many places later."""

    def move(name: str) -> str:
        side, index, rest = name.split(".", 2)
        return f"{side}.{int(index) + by}.{rest}" if side == "decoder" else name

    return {move(name): pieces for name, pieces in ours.items()}


def _spread(values: tuple[float, ...]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64).view(1, -1, 1, 1, 1)


def _rows(layer: Part, channels: int, ours: str, theirs: str) -> Iterable[Row]:
    if isinstance(layer, Act):
        return linear(f"{ours}.norm", theirs)
    if isinstance(layer, Conv):
        return linear(f"{ours}.conv", theirs, bias=layer.bias)
    assert isinstance(layer, Res)
    return table(
        linear("norm1", "norm1"),
        linear("conv1.conv", "conv1.conv", bias=False),
        linear("norm2", "norm2"),
        linear("conv2.conv", "conv2.conv", bias=False),
        linear("shortcut", "conv3.conv", bias=False) if channels != layer.channels else (),
        ours=f"{ours}.",
        theirs=f"{theirs}.",
    )


OPENSORA_VAE = Coder(
    name="opensora_vae",
    class_name="VideoAutoencoderPipeline",
    sizes={"1_2": CoderSize(read({}), 393_341_007, "hpcai-tech/OpenSora-VAE-v1.2", clip=(51, 720, 1280))},
    licence="Apache-2.0",
    read=read,
    write=write,
    weights=weights,
    notes=(
        "the original draws the latents of pictures from their posterior before it encodes them in time; ours takes the "
        "mean, so that a clip has one posterior.",
        "the original encodes any number of frames and must be told it to decode; ours takes those that latents tell: "
        "17 k, or 1, 5, 9 or 13 more.",
    ),
)
