"""Mochi 1 (Genmo 2024): two streams attend jointly, and the text's is half as wide as the video's.

Blocks scale and gate, and shift nothing; gates pass a tanh and meet a branch's normalised result. The vector is that of
time and a pool, by attention, of T5's features. Every head learns how fast each of its pairs turns along t, h and w
together, on grids that all have the area of 192 x 192 cells. The last block only reads the text, though checkpoints
hold queries for it. The network is told 1000 t and predicts data - noise, which is our direction.
"""

from dataclasses import replace
from typing import Any

from reelflow.errors import ConfigError
from reelflow.families.family import Family, Size, arguments, readout_rows, vector_rows
from reelflow.families.originals import Original, Shapes, count_blocks, sequential_rows
from reelflow.interop.mapping import Row, linear, parameter, rearranged, table
from reelflow.models.blocks import Dual
from reelflow.models.context import Layers
from reelflow.models.dit import DiTConfig
from reelflow.nn.attention import QKNorm
from reelflow.nn.embed import Number
from reelflow.nn.norm import Norm
from reelflow.nn.patchify import Patch
from reelflow.nn.rope import Centred

__all__ = ["MOCHI", "transformer"]


def transformer(
    *,
    heads: int,
    depth: int,
    context: int,
    channels: int = 12,
    out_channels: int = 0,
    head_dim: int = 128,
    text: int = 4096,
    waves: int = 256,
    patch: int = 2,
) -> DiTConfig:
    """Return the network of `heads` x `head_dim` channels, with a text stream `context` wide.

    Raises:
        ConfigError: no one ratio makes the MLPs of both streams 8/3 as wide as they are, rounded down.
    """
    dim, space = heads * head_dim, head_dim // 6 * 2
    ratio = (8 * dim // 3) / dim
    if round(ratio * context) != 8 * context // 3:
        raise ConfigError(
            f"MLPs are 8/3 as wide as their streams, which widths {dim} and {context} do not allow; "
            f"nearest: multiples of 3, or {dim} for both"
        )
    rms = Norm("rms")
    block = Dual(
        mlp_ratio=ratio,
        norm=rms,
        post=rms,
        qk_norm=QKNorm(eps=1e-5),
        shift=False,
        gate="tanh",
        qkv_bias=False,
        mlp_bias=False,
    )
    last = replace(block, context_out=False, idle_query=True)
    return DiTConfig(
        in_channels=channels,
        out_channels=out_channels,
        dim=dim,
        num_heads=heads,
        layers=(*(depth - 1) * (block,), last),
        patch=Patch(1, patch, patch),
        rope=(head_dim - 2 * space, space, space),
        coordinates=Centred(area=192.0**2),
        frequencies="learned",
        activation="swiglu",
        time=Number(channels=waves),
        context=Layers(text),
        context_width=context,
        pool=8,
    )


_DEFAULTS: dict[str, Any] = {
    "patch_size": 2,
    "num_attention_heads": 24,
    "attention_head_dim": 128,
    "num_layers": 48,
    "pooled_projection_dim": 1536,
    "in_channels": 12,
    "out_channels": None,
    "qk_norm": "rms_norm",
    "text_embed_dim": 4096,
    "time_embed_dim": 256,
    "activation_fn": "swiglu",
    "max_sequence_length": 256,  # nothing in the network depends on it
}


def read(found: dict[str, Any]) -> DiTConfig:
    """Return the network of a config.json.

    Raises:
        CheckpointError: a value is unknown.
        ConfigError: as `transformer`.
    """
    c = arguments(found, _DEFAULTS, fixed={"qk_norm": "rms_norm", "activation_fn": "swiglu"})
    return transformer(
        heads=c["num_attention_heads"],
        head_dim=c["attention_head_dim"],
        depth=c["num_layers"],
        context=c["pooled_projection_dim"],
        channels=c["in_channels"],
        out_channels=c["out_channels"] or 0,
        text=c["text_embed_dim"],
        waves=c["time_embed_dim"],
        patch=c["patch_size"],
    )


def write(config: DiTConfig) -> dict[str, Any]:
    """Return the config.json of a network."""
    return _DEFAULTS | {
        "patch_size": config.patch.h,
        "num_attention_heads": config.num_heads,
        "attention_head_dim": config.dim // config.num_heads,
        "num_layers": len(config.layers),
        "pooled_projection_dim": config.context_width,
        "in_channels": config.in_channels,
        "out_channels": config.out_channels or None,
        "text_embed_dim": config.context_dim,
        "time_embed_dim": config.time.channels,
    }


def weights(config: DiTConfig) -> tuple[Row, ...]:
    """Relate our weights to the published ones."""
    h, w = config.patch.h, config.patch.w
    last = len(config.layers) - 1
    return table(
        linear("embed", "patch_embed.proj", weight=rearranged("d c h w -> d (c h w)", h=h, w=w)),
        parameter("frequencies", "pos_frequencies"),
        vector_rows("time.mlp", "time_embed.timestep_embedder"),
        linear("pool.query", "time_embed.pooler.to_q"),
        linear("pool.kv", "time_embed.pooler.to_kv"),
        linear("pool.out", "time_embed.pooler.to_out"),
        linear("context.maps.0", "time_embed.caption_proj"),
        (
            table(_video(), _read() if i == last else _text(), ours=f"blocks.{i}.", theirs=f"transformer_blocks.{i}.")
            for i in range(last + 1)
        ),
        readout_rows(),
        linear("out", "proj_out", rearranged("(h w c) ... -> (c h w) ...", h=h, w=w)),
    )


def _video() -> tuple[Row, ...]:
    return table(
        linear("video.modulation.linear", "norm1.linear"),
        linear("video.project.qkv", ["attn1.to_q", "attn1.to_k", "attn1.to_v"], bias=False),
        linear("video.project.norm_q", "attn1.norm_q", bias=False),
        linear("video.project.norm_k", "attn1.norm_k", bias=False),
        linear("video.out", "attn1.to_out.0"),
        linear({"video.mlp.up": "gate value"}, {"ff.net.0.proj": "value gate"}, bias=False),
        linear("video.mlp.down", "ff.net.2", bias=False),
    )


def _text() -> tuple[Row, ...]:
    return table(
        linear("context.modulation.linear", "norm1_context.linear"),
        linear("context.project.qkv", ["attn1.add_q_proj", "attn1.add_k_proj", "attn1.add_v_proj"], bias=False),
        linear("context.project.norm_q", "attn1.norm_added_q", bias=False),
        linear("context.project.norm_k", "attn1.norm_added_k", bias=False),
        linear("context.out", "attn1.to_add_out"),
        linear({"context.mlp.up": "gate value"}, {"ff_context.net.0.proj": "value gate"}, bias=False),
        linear("context.mlp.down", "ff_context.net.2", bias=False),
    )


def _read() -> tuple[Row, ...]:
    """The last block's text, which is read only."""
    return table(
        linear("context.modulation.linear", "norm1_context.linear_1"),
        linear("context.idle.query", "attn1.add_q_proj", bias=False),
        linear("context.idle.norm_q", "attn1.norm_added_q", bias=False),
        linear("context.project.kv", ["attn1.add_k_proj", "attn1.add_v_proj"], bias=False),
        linear("context.project.norm_k", "attn1.norm_added_k", bias=False),
    )


def read_original(shapes: Shapes, found: dict[str, Any]) -> dict[str, Any]:
    """Return what diffusers' config.json would say."""
    _, heads, pairs = shapes["pos_frequencies"]
    context, text = shapes["t5_yproj.weight"]
    _, channels, patch, _ = shapes["x_embedder.proj.weight"]
    out_channels = shapes["final_layer.linear.weight"][0] // patch**2
    return {
        "patch_size": patch,
        "num_attention_heads": heads,
        "attention_head_dim": 2 * pairs,
        "num_layers": count_blocks(shapes, "blocks."),
        "pooled_projection_dim": context,
        "in_channels": channels,
        "out_channels": None if out_channels == channels else out_channels,
        "text_embed_dim": text,
        "time_embed_dim": shapes["t_embedder.mlp.0.weight"][1],
    }


def original_weights(config: DiTConfig) -> tuple[Row, ...]:
    """Relate our weights to the original repository's."""
    h, w = config.patch.h, config.patch.w
    last = len(config.layers) - 1
    return table(
        linear("embed", "x_embedder.proj", weight=rearranged("d c h w -> d (c h w)", h=h, w=w)),
        parameter("frequencies", "pos_frequencies"),
        sequential_rows("time.mlp", "t_embedder.mlp"),
        linear("pool.query", "t5_y_embedder.to_q"),
        linear("pool.kv", "t5_y_embedder.to_kv"),
        linear("pool.out", "t5_y_embedder.to_out"),
        linear("context.maps.0", "t5_yproj"),
        (
            table(
                _original_stream("video", "x"),
                _original_read() if i == last else _original_stream("context", "y"),
                ours=f"blocks.{i}.",
                theirs=f"blocks.{i}.",
            )
            for i in range(last + 1)
        ),
        linear("modulation.linear", "final_layer.mod"),
        linear("out", "final_layer.linear", rearranged("(h w c) ... -> (c h w) ...", h=h, w=w)),
    )


def _original_stream(ours: str, theirs: str) -> tuple[Row, ...]:
    return table(
        linear(f"{ours}.modulation.linear", f"mod_{theirs}"),
        linear(f"{ours}.project.qkv", f"attn.qkv_{theirs}", bias=False),
        linear(f"{ours}.project.norm_q", f"attn.q_norm_{theirs}", bias=False),
        linear(f"{ours}.project.norm_k", f"attn.k_norm_{theirs}", bias=False),
        linear(f"{ours}.out", f"attn.proj_{theirs}"),
        linear(f"{ours}.mlp.up", f"mlp_{theirs}.w1", bias=False),
        linear(f"{ours}.mlp.down", f"mlp_{theirs}.w2", bias=False),
    )


def _original_read() -> tuple[Row, ...]:
    return table(
        linear("context.modulation.linear", "mod_y"),
        linear({"context.idle.query": "q", "context.project.kv": "k v"}, {"attn.qkv_y": "q k v"}, bias=False),
        linear("context.idle.norm_q", "attn.q_norm_y", bias=False),
        linear("context.project.norm_k", "attn.k_norm_y", bias=False),
    )


MOCHI = Family(
    name="mochi",
    class_name="MochiTransformer3DModel",
    sizes={"10b": Size(transformer(heads=24, depth=48, context=1536), 10_027_677_744, "genmo/mochi-1-preview")},
    licence="Apache-2.0",
    read=read,
    write=write,
    weights=weights,
    original=Original(
        telling=("pos_frequencies", "t5_yproj.weight", "blocks.0.attn.qkv_x.weight"),
        read=read_original,
        weights=original_weights,
        file="dit",
    ),
    clip=(163, 480, 848),
    stride=(6, 8, 8),
    context_tokens=256,
    notes=(
        "the original rounds the widths of MLPs up to a multiple of 256, diffusers takes 8/3 of the stream's; they agree at "
        "the published size, and ours is diffusers'.",
        "the original stores an MLP as [gate, value] and the readout as [shift, scale], diffusers the other way round; ours "
        "are the original's.",
        "the original drops padded text, diffusers hides it; what the video's tokens see is the same.",
        "with force_zeros_for_empty_prompt diffusers' pipeline empties a whole batch if its last prompt is empty; ours "
        "empties prompts one by one.",
        "guidance is 4.5 and a clip has 19 frames unless said, as in diffusers' pipeline; the original has 6.0 and 163.",
    ),
)
