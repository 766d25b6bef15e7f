"""LTX-Video 0.9 (HaCohen et al. 2024, arXiv:2501.00103): attention to the clip, to the text, then an MLP.

Latents are so compressed that each is a token. The vector of time is mapped once for all blocks, and each adds a table
to it; every token may have its own time (a given frame has t = 1). Tokens read the text as they are, without a norm.
Rotary frequencies run over the whole width, so that heads differ, and positions are fractions of 20 seconds and of 2048
pixels, each from -1 to 1: `token_rate` is fps / 8.

From 0.9.5 on, the first token lasts as long as the one frame that it holds, an eighth of the others. The reference
leaves this to its pipelines, and a config.json of theirs does not say it. In ours `_causal_temporal_positioning` does,
which they pass over (without the underscore it is the name in the original repository).
"""

from typing import Any

from reelflow.errors import CheckpointError
from reelflow.families.family import Family, Size, arguments, attend_rows, cross_rows, vector_rows
from reelflow.interop.mapping import NEGATED, Row, linear, parameter, table
from reelflow.models.blocks import Attend, Branches, Cross, FeedForward
from reelflow.models.context import Layers
from reelflow.models.dit import DiTConfig
from reelflow.nn.attention import QKNorm
from reelflow.nn.embed import Number
from reelflow.nn.norm import Norm
from reelflow.nn.patchify import Patch
from reelflow.nn.rope import Steps

__all__ = ["LTX", "transformer"]

FRAMES, PIXELS = 8, 32  # that a latent covers


def transformer(
    *,
    depth: int,
    causal: bool,
    heads: int = 32,
    head_dim: int,
    channels: int = 128,
    out_channels: int = 0,
    text: int = 4096,
    eps: float = 1e-6,
) -> DiTConfig:
    """Return the network of `heads` x `head_dim` channels; if `causal`, the first token lasts one frame."""
    dim, rms, qk_norm = heads * head_dim, Norm("rms", eps), QKNorm(over="width", eps=1e-5)
    branches = (
        Attend(norm=rms, qk_norm=qk_norm),
        Cross(norm=None, qk_norm=qk_norm),
        FeedForward(norm=rms),
    )
    return DiTConfig(
        in_channels=channels,
        out_channels=out_channels,
        dim=dim,
        num_heads=heads,
        layers=depth * (Branches(branches),),
        patch=Patch(1, 1, 1),
        rope="width",
        coordinates=Steps(
            step=(2 / 20, 2 * PIXELS / 2048, 2 * PIXELS / 2048),
            start=(-1.0, -1.0, -1.0),
            time="seconds",
            first=1 / FRAMES if causal else 1.0,
        ),
        modulation="shared",
        time=Number(counts="1 - x"),
        context=Layers(text, hidden=(dim,)),
    )


_FIXED: dict[str, Any] = {
    "patch_size": 1,
    "patch_size_t": 1,
    "activation_fn": "gelu-approximate",
    "qk_norm": "rms_norm_across_heads",
    "norm_elementwise_affine": False,
    "attention_bias": True,
    "attention_out_bias": True,
}
_DEFAULTS: dict[str, Any] = _FIXED | {
    "in_channels": 128,
    "out_channels": 128,
    "num_attention_heads": 32,
    "attention_head_dim": 64,
    "cross_attention_dim": 2048,
    "num_layers": 28,
    "norm_eps": 1e-6,
    "caption_channels": 4096,
}
_CAUSAL = "_causal_temporal_positioning"


def read(found: dict[str, Any]) -> DiTConfig:
    """Return the network of a config.json.

    Raises:
        CheckpointError: a value is unknown, or the text is not as wide inside as the video.
    """
    c = arguments(found, _DEFAULTS, fixed=_FIXED)
    dim = c["num_attention_heads"] * c["attention_head_dim"]
    if c["cross_attention_dim"] != dim:
        raise CheckpointError(
            f"config.json has cross_attention_dim={c['cross_attention_dim']}; the width of the heads together is {dim}"
        )
    return transformer(
        depth=c["num_layers"],
        causal=found.get(_CAUSAL, False),
        heads=c["num_attention_heads"],
        head_dim=c["attention_head_dim"],
        channels=c["in_channels"],
        out_channels=0 if c["out_channels"] in (None, c["in_channels"]) else c["out_channels"],
        text=c["caption_channels"],
        eps=c["norm_eps"],
    )


def write(config: DiTConfig) -> dict[str, Any]:
    """Return the config.json of a network."""
    layer, coordinates = config.layers[0], config.coordinates
    assert isinstance(layer, Branches)
    norm = layer.branches[0].norm
    assert norm is not None
    assert isinstance(coordinates, Steps)
    values = _DEFAULTS | {
        "in_channels": config.in_channels,
        "out_channels": config.out_channels or config.in_channels,
        "num_attention_heads": config.num_heads,
        "attention_head_dim": config.dim // config.num_heads,
        "cross_attention_dim": config.dim,
        "num_layers": len(config.layers),
        "norm_eps": norm.eps,
        "caption_channels": config.context_dim,
    }
    return values | ({_CAUSAL: True} if coordinates.first < 1 else {})


def weights(config: DiTConfig) -> tuple[Row, ...]:
    """Relate our weights to the published ones."""
    return table(
        linear("embed", "proj_in"),
        vector_rows("time.mlp", "time_embed.emb.timestep_embedder"),
        linear("shared.linear", "time_embed.linear"),
        linear("context.maps.0", "caption_projection.linear_1"),
        linear("context.maps.1", "caption_projection.linear_2"),
        (table(_block(), ours=f"blocks.{i}.", theirs=f"transformer_blocks.{i}.") for i in range(len(config.layers))),
        parameter("modulation.rows", "scale_shift_table"),
        linear("out", "proj_out", NEGATED),
    )


def _block() -> tuple[Row, ...]:
    return table(
        parameter("modulation.rows", "scale_shift_table"),
        attend_rows("branches.0.function", "attn1"),
        cross_rows("branches.1.function", "attn2"),
        linear("branches.2.function.up", "ff.net.0.proj"),
        linear("branches.2.function.down", "ff.net.2"),
    )


LTX = Family(
    name="ltx",
    class_name="LTXVideoTransformer3DModel",
    sizes={
        "2b_0_9_0": Size(transformer(head_dim=64, depth=28, causal=False), 1_923_385_472, "Lightricks/LTX-Video"),
        "2b_0_9_5": Size(transformer(head_dim=64, depth=28, causal=True), 1_923_385_472, "Lightricks/LTX-Video-0.9.5"),
        "13b_0_9_7": Size(
            transformer(head_dim=128, depth=48, causal=True), 13_042_569_344, "Lightricks/LTX-Video-0.9.7-dev"
        ),
    },
    licence="",
    read=read,
    write=write,
    weights=weights,
    clip=(161, 512, 704),
    stride=(8, 32, 32),
    context_tokens=128,
    notes=(
        "where time begins depends on the version: since 0.9.5 the first token stands for one frame (causal positions). The "
        "original has a value for it in its configuration, diffusers decides by the pipeline's class and stores nothing; ours "
        "is a value, written as `_causal_temporal_positioning`, which diffusers keeps and ignores.",
        "diffusers hides text by adding -10000 to scores, so that a text of padding alone is read evenly; ours reads nothing "
        "then.",
    ),
)
