"""Latte-1 (Ma et al. 2024, arXiv:2401.03048): attention within each frame and to the text, then along time, in turn.

The vector of time is mapped once for all blocks, and each adds a table to it. Places are told once, after the patches;
times once, before the first block that looks along time, and not to a single frame. The text is T5's features through
two layers, and none is hidden. Half of the output is the variance.
"""

from typing import Any

from reelflow.families.family import (
    FORMER,
    Family,
    Size,
    arguments,
    attend_rows,
    cross_rows,
    mlp_rows,
    places,
    side_of_places,
    vector_rows,
)
from reelflow.interop.mapping import Row, linear, parameter, rearranged, table
from reelflow.models.blocks import Attend, Branches, Cross, FeedForward
from reelflow.models.context import Layers
from reelflow.models.dit import DiTConfig
from reelflow.nn.embed import Number, SinCos
from reelflow.nn.norm import Norm
from reelflow.nn.patchify import Patch
from reelflow.nn.patterns import Space, Time

__all__ = ["LATTE", "transformer"]


def transformer(
    *,
    heads: int = 16,
    head_dim: int = 72,
    depth: int = 28,
    channels: int = 4,
    out_channels: int = 8,
    text: int = 4096,
    patch: int = 2,
    side: float = 32.0,
    eps: float = 1e-6,
) -> DiTConfig:
    """Return the network of `depth` pairs of blocks; any grid of places is shown as one of `side` x `side`."""
    dim, norm = heads * head_dim, Norm(eps=eps)
    space = Branches((Attend(Space(), norm=norm, qk_norm=None), Cross(norm=None, qk_norm=None), FeedForward(norm=norm)))
    time = Branches((Attend(Time(), norm=norm, qk_norm=None), FeedForward(norm=norm)))
    return DiTConfig(
        in_channels=channels,
        out_channels=out_channels,
        dim=dim,
        num_heads=heads,
        layers=depth * (space, time),
        patch=Patch(1, patch, patch),
        rope="none",
        absolute=(places(dim, side), SinCos(split=(dim, 0, 0), first="sin", before=1, still=False)),
        modulation="shared",
        time=Number(counts="1 - x"),
        context=Layers(text, hidden=(dim,)),
    )


_DEFAULTS: dict[str, Any] = {
    "num_attention_heads": 16,
    "attention_head_dim": 88,
    "in_channels": None,
    "out_channels": None,
    "num_layers": 1,
    "dropout": 0.0,
    "cross_attention_dim": None,
    "attention_bias": False,
    "sample_size": 64,
    "patch_size": None,
    "activation_fn": "geglu",
    "num_embeds_ada_norm": None,
    "norm_type": "layer_norm",
    "norm_elementwise_affine": True,
    "norm_eps": 1e-5,
    "caption_channels": None,
    "video_length": 16,
}
_FIXED = {
    "dropout": 0.0,
    "attention_bias": True,
    "activation_fn": "gelu-approximate",
    "norm_type": "ada_norm_single",
    "norm_elementwise_affine": False,
}


def read(found: dict[str, Any]) -> DiTConfig:
    """Return the network of a config.json.

    Raises:
        CheckpointError: a value is unknown, or two do not go together.
    """
    width = found.get("num_attention_heads", 16) * found.get("attention_head_dim", 88)
    c = arguments(found, FORMER | _DEFAULTS, fixed=FORMER | _FIXED | {"cross_attention_dim": width})
    return transformer(
        heads=c["num_attention_heads"],
        head_dim=c["attention_head_dim"],
        depth=c["num_layers"],
        channels=c["in_channels"],
        out_channels=c["out_channels"] or c["in_channels"],
        text=c["caption_channels"],
        patch=c["patch_size"],
        side=c["sample_size"] // c["patch_size"] / max(c["sample_size"] // 64, 1),
        eps=c["norm_eps"],
    )


def write(config: DiTConfig) -> dict[str, Any]:
    """Return the config.json of a network."""
    layer = config.layers[0]
    assert isinstance(layer, Branches)
    norm = layer.branches[0].norm
    assert norm is not None
    return (
        _DEFAULTS
        | _FIXED
        | {
            "num_attention_heads": config.num_heads,
            "attention_head_dim": config.dim // config.num_heads,
            "in_channels": config.in_channels,
            "out_channels": config.out_channels,
            "num_layers": len(config.layers) // 2,
            "cross_attention_dim": config.dim,
            "sample_size": round(side_of_places(config) * config.patch.h),
            "patch_size": config.patch.h,
            "num_embeds_ada_norm": 1000,
            "norm_eps": norm.eps,
            "caption_channels": config.context_dim,
        }
    )


def weights(config: DiTConfig) -> tuple[Row, ...]:
    """Relate our weights to the published ones."""
    pairs, h, w = len(config.layers) // 2, config.patch.h, config.patch.w
    return table(
        linear("embed", "pos_embed.proj", weight=rearranged("d c h w -> d (c h w)", h=h, w=w)),
        vector_rows("time.mlp", "adaln_single.emb.timestep_embedder"),
        linear("shared.linear", "adaln_single.linear"),
        linear("context.maps.0", "caption_projection.linear_1"),
        linear("context.maps.1", "caption_projection.linear_2"),
        (table(_space(), ours=f"blocks.{2 * i}.", theirs=f"transformer_blocks.{i}.") for i in range(pairs)),
        (table(_time(), ours=f"blocks.{2 * i + 1}.", theirs=f"temporal_transformer_blocks.{i}.") for i in range(pairs)),
        parameter("modulation.rows", "scale_shift_table"),
        linear("out", "proj_out", rearranged("(h w c) ... -> (c h w) ...", h=h, w=w)),
    )


def _space() -> tuple[Row, ...]:
    return table(
        parameter("modulation.rows", "scale_shift_table"),
        attend_rows("branches.0.function", "attn1", norms=False),
        cross_rows("branches.1.function", "attn2", norms=False),
        mlp_rows("branches.2.function", "ff"),
    )


def _time() -> tuple[Row, ...]:
    return table(
        parameter("modulation.rows", "scale_shift_table"),
        attend_rows("branches.0.function", "attn1", norms=False),
        mlp_rows("branches.1.function", "ff"),
    )


LATTE = Family(
    name="latte",
    class_name="LatteTransformer3DModel",
    sizes={"1_t2v": Size(transformer(), 1_057_246_880, "maxin-cn/Latte-1")},
    licence="Apache-2.0",
    read=read,
    write=write,
    weights=weights,
    clip=(16, 512, 512),
    stride=(1, 8, 8),
    context_tokens=120,
    notes=(
        "diffusers repeats the text for each frame; here the clip's tokens read it once, which is the same.",
        "diffusers' pipeline cuts the text where the prompt ends if there is one prompt, and shows zeros beyond it if there "
        "are several, so that a clip depends on whether it is made alone. So do ours.",
        "beyond the negative prompt it shows what T5 makes of padding, cut where the prompt ends, not the negative one; so "
        "does ours.",
    ),
)
