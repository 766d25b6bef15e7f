"""DiT-XL/2 (Peebles & Xie 2022, arXiv:2212.09748): the first of them, a clip of one frame of one of a thousand classes.

The class's row joins the vector of time. Half of the output is the variance. A grid of any size is shown as the trained
one. This is the network as diffusers has it, whose sinusoid of the time ends a step further and whose second norm has
another epsilon than the original's, and which keeps a copy of both embedders in every block.
"""

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from reelflow.errors import CheckpointError
from reelflow.families.family import FORMER, Family, Size, arguments, attend_rows, mlp_rows, places, side_of_places
from reelflow.families.originals import Original, Shapes, count_blocks, sequential_rows
from reelflow.interop.mapping import Row, derived, linear, parameter, rearranged, table
from reelflow.models.blocks import Attend, Branches, FeedForward
from reelflow.models.dit import DiTConfig
from reelflow.nn.embed import Number, SinCos
from reelflow.nn.norm import Norm
from reelflow.nn.patchify import Patch

__all__ = ["DIT", "transformer"]


def transformer(
    *,
    heads: int = 16,
    head_dim: int = 72,
    depth: int = 28,
    channels: int = 4,
    out_channels: int = 8,
    classes: int = 1000,
    patch: int = 2,
    side: float = 16.0,
    eps: float = 1e-5,
) -> DiTConfig:
    """Return the network of `heads` x `head_dim` channels, trained on pictures of `side` x `side` tokens."""
    dim = heads * head_dim
    block = Branches((Attend(qk_norm=None), FeedForward(norm=Norm(eps=eps))))
    return DiTConfig(
        in_channels=channels,
        out_channels=out_channels,
        dim=dim,
        num_heads=heads,
        layers=depth * (block,),
        patch=Patch(1, patch, patch),
        rope="none",
        absolute=(places(dim, side),),
        time=Number(counts="1 - x", closed=True),
        num_classes=classes,
    )


_DEFAULTS: dict[str, Any] = {
    "num_attention_heads": 16,
    "attention_head_dim": 72,
    "in_channels": 4,
    "out_channels": None,
    "num_layers": 28,
    "dropout": 0.0,
    "norm_num_groups": 32,
    "attention_bias": True,
    "sample_size": 32,
    "patch_size": 2,
    "activation_fn": "gelu-approximate",
    "num_embeds_ada_norm": 1000,
    "upcast_attention": False,
    "norm_type": "ada_norm_zero",
    "norm_elementwise_affine": False,
    "norm_eps": 1e-5,
}
_FIXED = ("dropout", "attention_bias", "activation_fn", "norm_type", "norm_elementwise_affine")


def read(found: dict[str, Any]) -> DiTConfig:
    """Return the network of a config.json.

    Raises:
        CheckpointError: a value is unknown.
    """
    former = FORMER | {"cross_attention_dim": None}
    c = arguments(found, former | _DEFAULTS, fixed=former | {name: _DEFAULTS[name] for name in _FIXED})
    return transformer(
        heads=c["num_attention_heads"],
        head_dim=c["attention_head_dim"],
        depth=c["num_layers"],
        channels=c["in_channels"],
        out_channels=c["out_channels"] or c["in_channels"],
        classes=c["num_embeds_ada_norm"],
        patch=c["patch_size"],
        side=float(c["sample_size"] // c["patch_size"]),
        eps=c["norm_eps"],
    )


def write(config: DiTConfig) -> dict[str, Any]:
    """Return the config.json of a network."""
    layer = config.layers[0]
    assert isinstance(layer, Branches)
    norm = layer.branches[-1].norm
    assert norm is not None
    return _DEFAULTS | {
        "num_attention_heads": config.num_heads,
        "attention_head_dim": config.dim // config.num_heads,
        "in_channels": config.in_channels,
        "out_channels": config.out_channels,
        "num_layers": len(config.layers),
        "sample_size": round(side_of_places(config)) * config.patch.h,
        "patch_size": config.patch.h,
        "num_embeds_ada_norm": config.num_classes,
        "norm_eps": norm.eps,
    }


def weights(config: DiTConfig) -> tuple[Row, ...]:
    """Relate our weights to the published ones."""
    depth, h, w = len(config.layers), config.patch.h, config.patch.w
    return table(
        linear("embed", "pos_embed.proj", weight=rearranged("d c h w -> d (c h w)", h=h, w=w)),
        _embedders(depth),
        (table(_block(), ours=f"blocks.{i}.", theirs=f"transformer_blocks.{i}.") for i in range(depth)),
        linear("modulation.linear", "proj_out_1"),
        linear("out", "proj_out_2", rearranged("(h w c) ... -> (c h w) ...", h=h, w=w)),
    )


def _embedders(depth: int) -> Iterator[Row]:
    def copies(name: str) -> dict[str, str]:
        return {f"transformer_blocks.{i}.norm1.emb.{name}": "copy" for i in range(depth)}

    yield from linear("time.mlp.up", copies("timestep_embedder.linear_1"))
    yield from linear("time.mlp.down", copies("timestep_embedder.linear_2"))
    yield parameter("classes.weight", copies("class_embedder.embedding_table.weight"))


def _block() -> tuple[Row, ...]:
    return table(
        linear("modulation.linear", "norm1.linear"),
        attend_rows("branches.0.function", "attn1", norms=False),
        mlp_rows("branches.1.function", "ff"),
    )


_HEADS = {384: 6, 768: 12, 1024: 16, 1152: 16}  # of the original's S, B, L and XL, by width


def read_original(shapes: Shapes, found: dict[str, Any]) -> dict[str, Any]:
    """Return what diffusers' config.json would say.

    Raises:
        CheckpointError: the width is none of the original's, so that the heads are not known.
    """
    width, channels, patch, _ = shapes["x_embedder.proj.weight"]
    if width not in _HEADS:
        raise CheckpointError(f"shapes do not tell the heads at width {width}; published widths: {list(_HEADS)}")
    return {
        "num_attention_heads": _HEADS[width],
        "attention_head_dim": width // _HEADS[width],
        "in_channels": channels,
        "out_channels": shapes["final_layer.linear.weight"][0] // patch**2,
        "num_layers": count_blocks(shapes, "blocks."),
        "sample_size": math.isqrt(shapes["pos_embed"][1]) * patch,
        "patch_size": patch,
        "num_embeds_ada_norm": shapes["y_embedder.embedding_table.weight"][0] - 1,
    }


def original_weights(config: DiTConfig) -> tuple[Row, ...]:
    """Relate our weights to the original repository's, which stores the table of positions too."""
    h, w = config.patch.h, config.patch.w
    return table(
        linear("embed", "x_embedder.proj", weight=rearranged("d c h w -> d (c h w)", h=h, w=w)),
        derived("pos_embed", lambda: _positions(config)),
        sequential_rows("time.mlp", "t_embedder.mlp"),
        parameter("classes.weight", "y_embedder.embedding_table.weight"),
        (table(_original_block(), ours=f"blocks.{i}.", theirs=f"blocks.{i}.") for i in range(len(config.layers))),
        linear("modulation.linear", "final_layer.adaLN_modulation.1"),
        linear("out", "final_layer.linear", rearranged("(h w c) ... -> (c h w) ...", h=h, w=w)),
    )


def _original_block() -> tuple[Row, ...]:
    return table(
        linear("modulation.linear", "adaLN_modulation.1"),
        linear("branches.0.function.project.qkv", "attn.qkv"),
        linear("branches.0.function.out", "attn.proj"),
        linear("branches.1.function.up", "mlp.fc1"),
        linear("branches.1.function.down", "mlp.fc2"),
    )


def _positions(config: DiTConfig) -> Tensor:
    (positions,), side = config.absolute, round(side_of_places(config))
    assert isinstance(positions, SinCos)
    return positions.vectors((1, side, side), config.dim, torch.device("cpu"))[None].float()


DIT = Family(
    name="dit",
    class_name="DiTTransformer2DModel",
    sizes={  # the original adds a frozen table of positions, 675,129,632 at 256 pixels; diffusers has 749,826,464
        "xl_2_256": Size(transformer(), 674_834_720, "facebook/DiT-XL-2-256"),
        "xl_2_512": Size(transformer(side=32.0), 674_834_720, "facebook/DiT-XL-2-512", clip=(1, 512, 512)),
    },
    licence="CC-BY-NC-4.0",
    read=read,
    write=write,
    weights=weights,
    original=Original(
        telling=("pos_embed", "y_embedder.embedding_table.weight", "blocks.0.adaLN_modulation.1.weight"),
        read=read_original,
        weights=original_weights,
        file="dit",
    ),
    clip=(1, 256, 256),
    stride=(1, 8, 8),
    former_names=("Transformer2DModel",),
    notes=(
        "diffusers differs from the original: its sinusoid's last frequency is 1/10000, and the norm before the MLP has eps "
        "1e-5. Ours are diffusers'.",
        "diffusers stores the embeddings of time and class once in every block; they must agree when read, and are written so.",
        "diffusers' pipeline guides all four channels, the original the first three; ours as diffusers.",
        "a name that several classes have (crane) means the last of them in diffusers, and here. No class is the row after "
        "the last; diffusers always takes row 1000.",
    ),
)
