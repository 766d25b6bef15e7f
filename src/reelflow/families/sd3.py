"""Stable Diffusion 3 and 3.5 (Esser et al. 2024, arXiv:2403.03206): the image ancestor, a clip of one frame.

Text and picture have weights of their own and one attention. The text is three encoders' features: two side by side,
padded to the width of the third, whose tokens follow; the first two also give one vector, which joins that of time. The
last block only reads the text. In 3.5 medium the first blocks have a second attention, of the picture alone.

Positions are a stored table, of which a picture takes the middle. It is kept as it comes and not computed: published
ones are said to hold sinusoids of other coordinates than the reference begins with (in sd-scripts, for one).
"""

import math
from collections.abc import Collection
from typing import Any

from reelflow.errors import CheckpointError
from reelflow.families.family import (
    Family,
    Size,
    arguments,
    attend_rows,
    dual_rows,
    dual_video_rows,
    readout_rows,
    vector_rows,
)
from reelflow.families.originals import Original, Shapes, count_blocks, sequential_rows
from reelflow.interop.mapping import NEGATED, Row, linear, parameter, rearranged, table
from reelflow.models.blocks import Dual
from reelflow.models.context import Layers
from reelflow.models.dit import DiTConfig
from reelflow.nn.attention import QKNorm
from reelflow.nn.embed import Learned, Number
from reelflow.nn.patchify import Patch
from reelflow.nn.patterns import Full

__all__ = ["SD3", "transformer"]


def transformer(
    *,
    heads: int,
    depth: int,
    qk_norm: bool,
    head_dim: int = 64,
    twice: Collection[int] = (),
    side: int = 192,
    channels: int = 16,
    patch: int = 2,
    text: int = 4096,
    pooled: int = 2048,
) -> DiTConfig:
    """Return the network of `depth` blocks; those in `twice` have a second attention. The table is `side` x `side`."""
    return DiTConfig(
        in_channels=channels,
        dim=heads * head_dim,
        num_heads=heads,
        layers=tuple(
            Dual(
                qk_norm=QKNorm() if qk_norm else None,
                again=Full() if i in twice else None,
                context_out=i < depth - 1,
                idle_query=i == depth - 1,
            )
            for i in range(depth)
        ),
        patch=Patch(1, patch, patch),
        rope="none",
        absolute=(Learned((1, side, side), form="grid", at="centre", frozen=True),),
        time=Number(counts="1 - x"),
        context=Layers(text),
        vector_dim=pooled,
    )


_DEFAULTS: dict[str, Any] = {
    "sample_size": 128,
    "patch_size": 2,
    "in_channels": 16,
    "num_layers": 18,
    "attention_head_dim": 64,
    "num_attention_heads": 18,
    "joint_attention_dim": 4096,
    "caption_projection_dim": 1152,
    "pooled_projection_dim": 2048,
    "out_channels": 16,
    "pos_embed_max_size": 96,
    "dual_attention_layers": [],
    "qk_norm": None,
}


def read(found: dict[str, Any]) -> DiTConfig:
    """Return the network of a config.json.

    Raises:
        CheckpointError: a value is unknown, or two do not go together.
    """
    c = arguments(found, _DEFAULTS)
    width = c["num_attention_heads"] * c["attention_head_dim"]
    for name, allowed in (
        ("caption_projection_dim", (width,)),
        ("out_channels", (c["in_channels"],)),
        ("qk_norm", (None, "rms_norm")),
    ):
        if c[name] not in allowed:
            raise CheckpointError(f"config.json has {name}={c[name]!r}; published weights have one of {allowed}")
    return transformer(
        heads=c["num_attention_heads"],
        head_dim=c["attention_head_dim"],
        depth=c["num_layers"],
        qk_norm=c["qk_norm"] is not None,
        twice=c["dual_attention_layers"],
        side=c["pos_embed_max_size"],
        channels=c["in_channels"],
        patch=c["patch_size"],
        text=c["joint_attention_dim"],
        pooled=c["pooled_projection_dim"],
    )


def write(config: DiTConfig) -> dict[str, Any]:
    """Return the config.json of a network."""
    (positions,), layers = config.absolute, _layers(config)
    assert isinstance(positions, Learned)
    return _DEFAULTS | {
        "patch_size": config.patch.h,
        "in_channels": config.in_channels,
        "num_layers": len(layers),
        "attention_head_dim": config.dim // config.num_heads,
        "num_attention_heads": config.num_heads,
        "joint_attention_dim": config.context_dim,
        "caption_projection_dim": config.dim,
        "pooled_projection_dim": config.vector_dim,
        "out_channels": config.in_channels,
        "pos_embed_max_size": positions.size[1],
        "dual_attention_layers": [i for i, layer in enumerate(layers) if layer.again],
        "qk_norm": "rms_norm" if layers[0].qk_norm else None,
    }


def weights(config: DiTConfig) -> tuple[Row, ...]:
    """Relate our weights to the published ones."""
    h, w = config.patch.h, config.patch.w
    return table(
        linear("embed", "pos_embed.proj", weight=rearranged("d c h w -> d (c h w)", h=h, w=w)),
        parameter("tables.0.tables.0", "pos_embed.pos_embed", rearranged("1 n d -> n d")),
        vector_rows("time.mlp", "time_text_embed.timestep_embedder"),
        vector_rows("vector", "time_text_embed.text_embedder"),
        linear("context.maps.0", "context_embedder"),
        (
            table(_block(layer), ours=f"blocks.{i}.", theirs=f"transformer_blocks.{i}.")
            for i, layer in enumerate(_layers(config))
        ),
        readout_rows(),
        linear("out", "proj_out", rearranged("(h w c) ... -> (c h w) ...", h=h, w=w), NEGATED),
    )


def _block(layer: Dual) -> tuple[Row, ...]:
    norms = layer.qk_norm is not None
    return table(
        dual_rows(norms=norms) if layer.context_out else (dual_video_rows(norms=norms), _read(norms=norms)),
        attend_rows("again", "attn2", norms=norms) if layer.again else (),
    )


def _read(*, norms: bool) -> tuple[Row, ...]:
    """The last block's text, which is read only."""
    return table(
        linear({"context.modulation.linear": "shift scale"}, {"norm1_context.linear": "scale shift"}),
        linear("context.idle.query", "attn.add_q_proj"),
        linear("context.project.kv", ["attn.add_k_proj", "attn.add_v_proj"]),
        linear("context.idle.norm_q", "attn.norm_added_q", bias=False) if norms else (),
        linear("context.project.norm_k", "attn.norm_added_k", bias=False) if norms else (),
    )


def _layers(config: DiTConfig) -> list[Dual]:
    return [layer for layer in config.layers if isinstance(layer, Dual)]


def read_original(shapes: Shapes, found: dict[str, Any]) -> dict[str, Any]:
    """Return what diffusers' config.json would say; heads have 64 channels, as the original always has them."""
    dim, channels, patch, _ = shapes["x_embedder.proj.weight"]
    depth = count_blocks(shapes, "joint_blocks.")
    return {
        "patch_size": patch,
        "in_channels": channels,
        "out_channels": shapes["final_layer.linear.weight"][0] // patch**2,
        "num_layers": depth,
        "attention_head_dim": 64,
        "num_attention_heads": dim // 64,
        "joint_attention_dim": shapes["context_embedder.weight"][1],
        "caption_projection_dim": dim,
        "pooled_projection_dim": shapes["y_embedder.mlp.0.weight"][1],
        "pos_embed_max_size": math.isqrt(shapes["pos_embed"][1]),
        "dual_attention_layers": [i for i in range(depth) if f"joint_blocks.{i}.x_block.attn2.qkv.weight" in shapes],
        "qk_norm": "rms_norm" if "joint_blocks.0.x_block.attn.ln_q.weight" in shapes else None,
    }


def original_weights(config: DiTConfig) -> tuple[Row, ...]:
    """Relate our weights to the original repository's."""
    h, w = config.patch.h, config.patch.w
    return table(
        linear("embed", "x_embedder.proj", weight=rearranged("d c h w -> d (c h w)", h=h, w=w)),
        parameter("tables.0.tables.0", "pos_embed", rearranged("1 n d -> n d")),
        sequential_rows("time.mlp", "t_embedder.mlp"),
        sequential_rows("vector", "y_embedder.mlp"),
        linear("context.maps.0", "context_embedder"),
        (
            table(_original_block(layer), ours=f"blocks.{i}.", theirs=f"joint_blocks.{i}.")
            for i, layer in enumerate(_layers(config))
        ),
        linear("modulation.linear", "final_layer.adaLN_modulation.1"),
        linear("out", "final_layer.linear", rearranged("(h w c) ... -> (c h w) ...", h=h, w=w), NEGATED),
    )


def _original_block(layer: Dual) -> tuple[Row, ...]:
    norms = layer.qk_norm is not None
    reads = linear({"context.idle.query": "q", "context.project.kv": "k v"}, {"attn.qkv": "q k v"})
    return table(
        linear("video.modulation.linear", "x_block.adaLN_modulation.1"),
        _original_attend("video", "x_block.attn", norms=norms),
        _original_mlp("video", "x_block"),
        _original_attend("again", "x_block.attn2", norms=norms) if layer.again else (),
        linear("context.modulation.linear", "context_block.adaLN_modulation.1"),
        (
            _original_attend("context", "context_block.attn", norms=norms),
            _original_mlp("context", "context_block"),
        )
        if layer.context_out
        else (
            table(reads, theirs="context_block."),
            linear("context.idle.norm_q", "context_block.attn.ln_q", bias=False) if norms else (),
            linear("context.project.norm_k", "context_block.attn.ln_k", bias=False) if norms else (),
        ),
    )


def _original_attend(ours: str, theirs: str, *, norms: bool) -> tuple[Row, ...]:
    return table(
        linear(f"{ours}.project.qkv", f"{theirs}.qkv"),
        linear(f"{ours}.project.norm_q", f"{theirs}.ln_q", bias=False) if norms else (),
        linear(f"{ours}.project.norm_k", f"{theirs}.ln_k", bias=False) if norms else (),
        linear(f"{ours}.out", f"{theirs}.proj"),
    )


def _original_mlp(ours: str, theirs: str) -> tuple[Row, ...]:
    return table(
        linear(f"{ours}.mlp.up", f"{theirs}.mlp.fc1"),
        linear(f"{ours}.mlp.down", f"{theirs}.mlp.fc2"),
    )


SD3 = Family(
    name="sd3",
    class_name="SD3Transformer2DModel",
    sizes={
        "3_medium": Size(
            transformer(heads=24, depth=24, qk_norm=False),
            2_028_328_000,
            "stabilityai/stable-diffusion-3-medium-diffusers",
        ),
        "3_5_medium": Size(
            transformer(heads=24, depth=24, qk_norm=True, twice=range(13), side=384),
            2_243_171_520,
            "stabilityai/stable-diffusion-3.5-medium",
        ),
        "3_5_large": Size(
            transformer(heads=38, depth=38, qk_norm=True), 8_056_627_520, "stabilityai/stable-diffusion-3.5-large"
        ),
    },
    licence="Stability AI Community License",
    read=read,
    write=write,
    weights=weights,
    original=Original(
        telling=("pos_embed", "joint_blocks.0.x_block.attn.qkv.weight"),
        read=read_original,
        weights=original_weights,
        file="sd3",
        prefix="model.diffusion_model.",
    ),
    clip=(1, 1024, 1024),
    stride=(1, 8, 8),
    context_tokens=333,
    notes=(
        "the stored table of positions is kept as it is and never trained, whatever it holds.",
        "diffusers' pipeline without the third encoder shows the network 256 tokens of zeros, which it attends to; so does "
        "ours.",
    ),
)
