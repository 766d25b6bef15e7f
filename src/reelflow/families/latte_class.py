"""Latte-XL/2 (Ma et al. 2024, arXiv:2401.03048): blocks within a frame and blocks along time in turn, of a class or of none.

Every block has a map of the vector of its own, which is the time's, and the class's row. Places are told once, after the
patches; times once, before the first block that looks along time. A clip of any size is shown as the trained one, which
is the only one that the original takes; it stores both tables of sinusoids. Half of the output is the variance.
"""

import math
from typing import Any

import torch
from torch import Tensor

from reelflow.errors import CheckpointError
from reelflow.families.family import Family, Size, arguments, places, side_of_places
from reelflow.families.originals import Original, Shapes, count_blocks
from reelflow.interop.mapping import Row, derived, linear, parameter, rearranged, table
from reelflow.models.blocks import Attend, Branches, FeedForward
from reelflow.models.dit import DiTConfig
from reelflow.nn.embed import Number, SinCos
from reelflow.nn.patchify import Patch
from reelflow.nn.patterns import Space, Time
from reelflow.nn.rope import Spans

__all__ = ["LATTE_CLASS", "transformer"]


def transformer(
    *,
    heads: int = 16,
    dim: int = 1152,
    depth: int = 28,
    mlp_ratio: float = 4.0,
    channels: int = 4,
    variance: bool = True,
    classes: int = 0,
    patch: int = 2,
    frames: int = 16,
    side: float = 16.0,
) -> DiTConfig:
    """Return the network of `depth` blocks, trained on clips of `frames` x `side` x `side` tokens."""
    feed = FeedForward(ratio=mlp_ratio)
    pair = (Branches((Attend(pattern, qk_norm=None), feed)) for pattern in (Space(), Time()))
    times = Spans((0.0, float(frames)), None, None, at="edge")
    return DiTConfig(
        in_channels=channels,
        out_channels=(1 + variance) * channels,
        dim=dim,
        num_heads=heads,
        layers=depth // 2 * tuple(pair),
        patch=Patch(1, patch, patch),
        rope="none",
        absolute=(places(dim, side), SinCos((dim, 0, 0), first="sin", before=1, coordinates=times)),
        time=Number(counts="1 - x"),
        num_classes=classes,
    )


_DEFAULTS: dict[str, Any] = {
    "input_size": 32,
    "patch_size": 2,
    "in_channels": 4,
    "hidden_size": 1152,
    "depth": 28,
    "num_heads": 16,
    "mlp_ratio": 4.0,
    "num_frames": 16,
    "class_dropout_prob": 0.1,
    "num_classes": 1000,
    "learn_sigma": True,
    "extras": 1,
    "attention_mode": "math",
}
_CLASSES, _NONE = 2, 1  # what `extras` means


def read(found: dict[str, Any]) -> DiTConfig:
    """Return the network of a config.json, which holds the arguments of the original class.

    Raises:
        CheckpointError: a value is unknown.
    """
    extras = _CLASSES if found.get("extras") == _CLASSES else _NONE  # no other was published
    c = arguments(found, _DEFAULTS, fixed={"class_dropout_prob": 0.1, "extras": extras})
    return transformer(
        heads=c["num_heads"],
        dim=c["hidden_size"],
        depth=c["depth"],
        mlp_ratio=c["mlp_ratio"],
        channels=c["in_channels"],
        variance=c["learn_sigma"],
        classes=c["num_classes"] if extras == _CLASSES else 0,
        patch=c["patch_size"],
        frames=c["num_frames"],
        side=float(c["input_size"] // c["patch_size"]),
    )


def write(config: DiTConfig) -> dict[str, Any]:
    """Return the arguments of the original class."""
    layer = config.layers[0]
    assert isinstance(layer, Branches)
    _, feed = layer.branches
    assert isinstance(feed, FeedForward)
    classes = {"num_classes": config.num_classes, "extras": _CLASSES} if config.num_classes else {}
    return (
        _DEFAULTS
        | {
            "input_size": round(side_of_places(config)) * config.patch.h,
            "patch_size": config.patch.h,
            "in_channels": config.in_channels,
            "hidden_size": config.dim,
            "depth": len(config.layers),
            "num_heads": config.num_heads,
            "mlp_ratio": feed.ratio,
            "num_frames": _frames(config),
            "learn_sigma": config.out_channels > config.in_channels,
        }
        | classes
    )


def weights(config: DiTConfig) -> tuple[Row, ...]:
    """Relate our weights to the published ones."""
    h, w = config.patch.h, config.patch.w
    side = round(side_of_places(config))
    return table(
        linear("embed", "x_embedder.proj", weight=rearranged("d c h w -> d (c h w)", h=h, w=w)),
        linear("time.mlp.up", "t_embedder.mlp.0"),
        linear("time.mlp.down", "t_embedder.mlp.2"),
        parameter("classes.weight", "y_embedder.embedding_table.weight") if config.num_classes else (),
        (table(_block(), ours=f"blocks.{i}.", theirs=f"blocks.{i}.") for i in range(len(config.layers))),
        linear("modulation.linear", "final_layer.adaLN_modulation.1"),
        linear("out", "final_layer.linear", rearranged("(h w c) ... -> (c h w) ...", h=h, w=w)),
        derived("pos_embed", lambda: _positions(config, 0, (1, side, side))),
        derived("temp_embed", lambda: _positions(config, 1, (_frames(config), 1, 1))),
    )


def _block() -> tuple[Row, ...]:
    return table(
        linear("modulation.linear", "adaLN_modulation.1"),
        linear("branches.0.function.project.qkv", "attn.qkv"),
        linear("branches.0.function.out", "attn.proj"),
        linear("branches.1.function.up", "mlp.fc1"),
        linear("branches.1.function.down", "mlp.fc2"),
    )


def _positions(config: DiTConfig, index: int, grid: tuple[int, int, int]) -> Tensor:
    positions = config.absolute[index]
    assert isinstance(positions, SinCos)
    return positions.vectors(grid, config.dim, torch.device("cpu"))[None].float()


def read_original(shapes: Shapes, found: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of the original class.

    Raises:
        CheckpointError: the width is none of the original's, so that the heads are not known.
    """
    width, channels, patch, _ = shapes["x_embedder.proj.weight"]
    heads = {384: 6, 768: 12, 1024: 16, 1152: 16}  # of S, B, L and XL
    if width not in heads:
        raise CheckpointError(f"shapes do not tell the heads at width {width}; published widths: {list(heads)}")
    classes, *_ = shapes.get("y_embedder.embedding_table.weight", (0,))
    return {
        "input_size": math.isqrt(shapes["pos_embed"][1]) * patch,
        "patch_size": patch,
        "in_channels": channels,
        "hidden_size": width,
        "depth": count_blocks(shapes, "blocks."),
        "num_heads": heads[width],
        "mlp_ratio": shapes["blocks.0.mlp.fc1.weight"][0] / width,
        "num_frames": shapes["temp_embed"][1],
        "learn_sigma": shapes["final_layer.linear.weight"][0] > channels * patch**2,
    } | ({"num_classes": classes - 1, "extras": _CLASSES} if classes else {})


def _frames(config: DiTConfig) -> int:
    _, times = config.absolute
    assert isinstance(times, SinCos)
    assert isinstance(times.coordinates, Spans)
    assert times.coordinates.t is not None
    return round(times.coordinates.t[1])


LATTE_CLASS = Family(
    name="latte_class",
    class_name="Latte",
    sizes={  # the original adds both tables of positions, 313,344 values
        "xl_2_ucf101": Size(transformer(classes=101), 673_799_072, "maxin-cn/Latte"),
        "xl_2": Size(transformer(), 673_681_568, "maxin-cn/Latte"),
    },
    licence="MIT",
    read=read,
    write=write,
    weights=weights,
    native=True,
    original=Original(  # which has no config.json: that one is ours
        telling=("pos_embed", "temp_embed", "blocks.0.adaLN_modulation.1.weight"),
        read=read_original,
        weights=weights,
        file="latte",
    ),
    clip=(16, 256, 256),
    stride=(1, 8, 8),
    notes=(
        "the original only takes clips of the trained length and size; any other is shown as one of these.",
        "the published files are pickled (ffs.pt, skytimelapse.pt, taichi-hd.pt, ucf101.pt), and hold the averaged weights "
        "under `ema`: convert them to safetensors first.",
    ),
)
