"""Wan 2.1 and 2.2 (Wan Team 2025, arXiv:2503.20314): attention to the clip, then to the text, then an MLP, in every block.

The vector of time is mapped once for all blocks, and each adds a table to it. Queries and keys are normalised over all
heads together. The text is T5's features, 512 of them with zeros after the prompt, and none is hidden. The first
picture-to-video models also attend to a picture's features, apart from the text's; all of them read the picture's
latents beside the noisy ones, or, the smallest of 2.2, in place of the first frame, whose time is then 1.
"""

import math
from collections.abc import Iterable, Iterator
from typing import Any

from reelflow.families.family import Family, Size, arguments, attend_rows, cross_rows, vector_rows
from reelflow.families.originals import Original, Shapes, agreeing, count_blocks, relabelled
from reelflow.interop.mapping import NEGATED, Row, linear, parameter, rearranged, table
from reelflow.models.blocks import Attend, Branches, Cross, FeedForward
from reelflow.models.context import Layers
from reelflow.models.dit import DiTConfig
from reelflow.nn.attention import QKNorm
from reelflow.nn.embed import Number
from reelflow.nn.norm import Norm
from reelflow.nn.patchify import Patch

__all__ = ["WAN", "transformer"]


def transformer(
    *,
    heads: int,
    depth: int,
    mlp: int,
    channels: int = 16,
    extra_channels: int = 0,
    picture: int = 0,
    picture_tokens: int = 0,
    head_dim: int = 128,
    text: int = 4096,
    waves: int = 256,
    patch: Patch = Patch(1, 2, 2),
    eps: float = 1e-6,
    cross_norm: bool = True,
) -> DiTConfig:
    """Return the network of `heads` x `head_dim` channels, with an MLP of width `mlp`.

    `picture` is the width of a picture's features (0: none are read), of which there are `picture_tokens` if positions
    are added to them.
    """
    dim, space = heads * head_dim, head_dim // 6 * 2
    norm, qk_norm = Norm(eps=eps), QKNorm(over="width", eps=eps)
    branches = (
        Attend(norm=norm, qk_norm=qk_norm),
        Cross(norm=Norm(eps=eps, affine=True) if cross_norm else None, qk_norm=qk_norm, image=picture > 0),
        FeedForward(ratio=mlp / dim, norm=norm),
    )
    return DiTConfig(
        in_channels=channels,
        extra_channels=extra_channels,
        dim=dim,
        num_heads=heads,
        layers=depth * (Branches(branches),),
        patch=patch,
        rope=(head_dim - 2 * space, space, space),
        modulation="shared",
        time=Number(channels=waves, counts="1 - x"),
        context=Layers(text, hidden=(dim,)),
        image=Layers(picture, (picture,), activation="gelu", norms=True, positions=picture_tokens) if picture else None,
        out_norm=norm,
    )


_DEFAULTS: dict[str, Any] = {
    "patch_size": [1, 2, 2],
    "num_attention_heads": 40,
    "attention_head_dim": 128,
    "in_channels": 16,
    "out_channels": 16,
    "text_dim": 4096,
    "freq_dim": 256,
    "ffn_dim": 13824,
    "num_layers": 40,
    "cross_attn_norm": True,
    "qk_norm": "rms_norm_across_heads",
    "eps": 1e-6,
    "image_dim": None,
    "added_kv_proj_dim": None,
    "rope_max_seq_len": 1024,
    "pos_embed_seq_len": None,
}


def read(found: dict[str, Any]) -> DiTConfig:
    """Return the network of a config.json.

    Raises:
        CheckpointError: a value is unknown.
    """
    c = arguments(found, _DEFAULTS, fixed={"qk_norm": "rms_norm_across_heads"})
    return transformer(
        heads=c["num_attention_heads"],
        head_dim=c["attention_head_dim"],
        depth=c["num_layers"],
        mlp=c["ffn_dim"],
        channels=c["out_channels"],
        extra_channels=c["in_channels"] - c["out_channels"],
        picture=c["image_dim"] or 0,
        picture_tokens=c["pos_embed_seq_len"] or 0,
        text=c["text_dim"],
        waves=c["freq_dim"],
        patch=Patch(*c["patch_size"]),
        eps=c["eps"],
        cross_norm=c["cross_attn_norm"],
    )


def write(config: DiTConfig) -> dict[str, Any]:
    """Return the config.json of a network."""
    cross, feed = _branches(config)
    return _DEFAULTS | {
        "patch_size": list(config.patch),
        "num_attention_heads": config.num_heads,
        "attention_head_dim": config.dim // config.num_heads,
        "in_channels": config.in_channels + config.extra_channels,
        "out_channels": config.in_channels,
        "text_dim": config.context_dim,
        "freq_dim": config.time.channels,
        "ffn_dim": round(feed.ratio * config.dim),
        "num_layers": len(config.layers),
        "cross_attn_norm": cross.norm is not None,
        "eps": config.out_norm.eps,
        "image_dim": config.image.in_dim if config.image else None,
        "added_kv_proj_dim": config.dim if config.image else None,
        "pos_embed_seq_len": (config.image.positions or None) if config.image else None,
    }


def weights(config: DiTConfig) -> tuple[Row, ...]:
    """Relate our weights to the published ones."""
    p = config.patch
    flat = rearranged("d c t h w -> d (c t h w)", t=p.t, h=p.h, w=p.w)
    return table(
        linear("embed", "patch_embedding", weight=flat),
        vector_rows("time.mlp", "condition_embedder.time_embedder"),
        linear("shared.linear", "condition_embedder.time_proj"),
        linear("context.maps.0", "condition_embedder.text_embedder.linear_1"),
        linear("context.maps.1", "condition_embedder.text_embedder.linear_2"),
        _picture(config),
        (table(_block(config), ours=f"blocks.{i}.", theirs=f"blocks.{i}.") for i in range(len(config.layers))),
        parameter("modulation.rows", "scale_shift_table", rearranged("1 n d -> n d")),
        linear("out", "proj_out", rearranged("(t h w c) ... -> (c t h w) ...", t=p.t, h=p.h, w=p.w), NEGATED),
    )


def _picture(config: DiTConfig) -> Iterator[Row]:
    if config.image is not None:
        yield from table(
            linear("norm_in", "norm1"),
            linear("maps.0", "ff.net.0.proj"),
            linear("maps.1", "ff.net.2"),
            linear("norm_out", "norm2"),
            ours="image.",
            theirs="condition_embedder.image_embedder.",
        )
        if config.image.positions:
            name = "condition_embedder.image_embedder.pos_embed"
            yield parameter("image.positions", name, rearranged("1 n d -> n d"))


def _block(config: DiTConfig) -> tuple[Row, ...]:
    cross, _ = _branches(config)
    rows: list[Row | Iterable[Row]] = [
        parameter("modulation.rows", "scale_shift_table", rearranged("1 n d -> n d")),
        attend_rows("branches.0.function", "attn1"),
        cross_rows("branches.1.function", "attn2"),
        linear("branches.2.function.up", "ffn.net.0.proj"),
        linear("branches.2.function.down", "ffn.net.2"),
    ]
    if cross.norm is not None:
        rows.append(linear("branches.1.norm", "norm2"))
    if cross.image:
        rows.append(linear("branches.1.function.image.kv", ["attn2.add_k_proj", "attn2.add_v_proj"]))
        rows.append(linear("branches.1.function.image.norm_k", "attn2.norm_added_k", bias=False))
    return table(*rows)


def _branches(config: DiTConfig) -> tuple[Cross, FeedForward]:
    layer = config.layers[0]
    assert isinstance(layer, Branches)
    _, cross, feed = layer.branches
    assert isinstance(cross, Cross)
    assert isinstance(feed, FeedForward)
    return cross, feed


_ORIGINAL: dict[str, Any] = {  # what no shape tells; what is None is not kept with the weights
    "model_type": "t2v",
    "text_len": 512,
    "eps": 1e-6,
    "num_heads": None,
    "window_size": None,
    "qk_norm": None,
}


def read_original(shapes: Shapes, found: dict[str, Any]) -> dict[str, Any]:
    """Return what diffusers' config.json would say; without a configuration, heads have 128 channels."""
    dim, in_dim, *patch = shapes["patch_embedding.weight"]
    seen = {
        "dim": dim,
        "in_dim": in_dim,
        "ffn_dim": shapes["blocks.0.ffn.0.weight"][0],
        "freq_dim": shapes["time_embedding.0.weight"][1],
        "out_dim": shapes["head.head.weight"][0] // math.prod(patch),
        "num_layers": count_blocks(shapes, "blocks."),
    }
    c = agreeing(found, _ORIGINAL, seen)
    heads, picture = c["num_heads"] or dim // 128, shapes.get("img_emb.proj.0.weight", (None,))[0]
    return {
        "patch_size": patch,
        "num_attention_heads": heads,
        "attention_head_dim": dim // heads,
        "in_channels": in_dim,
        "out_channels": c["out_dim"],
        "text_dim": shapes["text_embedding.0.weight"][1],
        "freq_dim": c["freq_dim"],
        "ffn_dim": c["ffn_dim"],
        "num_layers": c["num_layers"],
        "cross_attn_norm": "blocks.0.norm3.weight" in shapes,
        "eps": c["eps"],
        "image_dim": picture,
        "added_kv_proj_dim": dim if picture else None,
        "pos_embed_seq_len": shapes["img_emb.emb_pos"][1] if "img_emb.emb_pos" in shapes else None,
    }


def write_original(config: DiTConfig) -> dict[str, Any]:
    """Return the config.json of the original repository; the rest is in the shapes."""
    _, feed = _branches(config)
    given = (
        ("flf2v" if config.image.positions else "i2v") if config.image else "i2v" if config.extra_channels else "t2v"
    )
    return {
        "model_type": "ti2v" if config.in_channels == 48 else given,
        "text_len": 512,
        "dim": config.dim,
        "in_dim": config.in_channels + config.extra_channels,
        "out_dim": config.in_channels,
        "ffn_dim": round(feed.ratio * config.dim),
        "freq_dim": config.time.channels,
        "num_heads": config.num_heads,
        "num_layers": len(config.layers),
        "eps": config.out_norm.eps,
    }


_NAMES = {
    "condition_embedder.time_embedder.linear_1": "time_embedding.0",
    "condition_embedder.time_embedder.linear_2": "time_embedding.2",
    "condition_embedder.time_proj": "time_projection.1",
    "condition_embedder.text_embedder.linear_1": "text_embedding.0",
    "condition_embedder.text_embedder.linear_2": "text_embedding.2",
    "condition_embedder.image_embedder.norm1": "img_emb.proj.0",
    "condition_embedder.image_embedder.ff.net.0.proj": "img_emb.proj.1",
    "condition_embedder.image_embedder.ff.net.2": "img_emb.proj.3",
    "condition_embedder.image_embedder.norm2": "img_emb.proj.4",
    "condition_embedder.image_embedder.pos_embed": "img_emb.emb_pos",
    "scale_shift_table": "head.modulation",
    "proj_out": "head.head",
    "blocks.*.scale_shift_table": "blocks.*.modulation",
    "blocks.*.norm2": "blocks.*.norm3",
    "blocks.*.ffn.net.0.proj": "blocks.*.ffn.0",
    "blocks.*.ffn.net.2": "blocks.*.ffn.2",
    "blocks.*.attn2.add_k_proj": "blocks.*.cross_attn.k_img",
    "blocks.*.attn2.add_v_proj": "blocks.*.cross_attn.v_img",
    "blocks.*.attn2.norm_added_k": "blocks.*.cross_attn.norm_k_img",
} | {
    f"blocks.*.{theirs}.{part}": f"blocks.*.{original}.{short}"
    for theirs, original in (("attn1", "self_attn"), ("attn2", "cross_attn"))
    for part, short in (
        *(("to_q", "q"), ("to_k", "k"), ("to_v", "v")),
        *(("to_out.0", "o"), ("norm_q", "norm_q"), ("norm_k", "norm_k")),
    )
}


def _large(*, extra_channels: int = 0, picture: int = 0) -> DiTConfig:
    return transformer(heads=40, depth=40, mlp=13824, extra_channels=extra_channels, picture=picture)


WAN = Family(
    name="wan",
    class_name="WanTransformer3DModel",
    sizes={
        "t2v_1_3b": Size(transformer(heads=12, depth=30, mlp=8960), 1_418_996_800, "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"),
        "t2v_14b": Size(_large(), 14_288_491_584, "Wan-AI/Wan2.1-T2V-14B-Diffusers"),
        "i2v_14b": Size(
            _large(extra_channels=20, picture=1280), 16_394_878_784, "Wan-AI/Wan2.1-I2V-14B-480P-Diffusers"
        ),
        "t2v_a14b": Size(_large(), 14_288_491_584, "Wan-AI/Wan2.2-T2V-A14B-Diffusers"),
        "i2v_a14b": Size(_large(extra_channels=20), 14_288_901_184, "Wan-AI/Wan2.2-I2V-A14B-Diffusers"),
        "ti2v_5b": Size(
            transformer(heads=24, depth=30, mlp=14336, channels=48),
            4_999_787_712,
            "Wan-AI/Wan2.2-TI2V-5B-Diffusers",
            clip=(121, 704, 1280),
            stride=(4, 16, 16),
        ),
    },
    licence="Apache-2.0",
    read=read,
    write=write,
    weights=weights,
    original=Original(
        telling=("head.modulation", "time_projection.1.weight", "blocks.0.self_attn.q.weight"),
        read=read_original,
        weights=lambda config: relabelled(weights(config), _NAMES),
        file="diffusion_pytorch_model",
        write=write_original,
        class_name="WanModel",
        beside=True,
    ),
    clip=(81, 480, 832),
    stride=(4, 8, 8),
    context_tokens=512,
    image_tokens=257,
    notes=(
        "rotary tables and sinusoids are computed in float64 by the original and stored in float32 by diffusers; ours are "
        "computed in float64.",
        "2.2's experts for high and low noise are two networks of one size; which works when is the sampler's affair.",
    ),
)
