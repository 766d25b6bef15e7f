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
from reelflow.families.family import FORMER, Family, Size, arguments, attend_rows, cross_rows, vector_rows
from reelflow.families.originals import Original, Shapes, agreeing, count_blocks, relabelled
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


_ORIGINAL: dict[str, Any] = FORMER | {
    "activation_fn": "gelu-approximate",
    "adaptive_norm": "single_scale_shift",
    "attention_bias": True,
    "dropout": 0.0,
    "norm_elementwise_affine": False,
    "num_embeds_ada_norm": 1000,
    "positional_embedding_max_pos": [20, 2048, 2048],
    "positional_embedding_theta": 10000.0,
    "positional_embedding_type": "rope",
    "qk_norm": "rms_norm",
    "standardization_norm": "rms_norm",
    "timestep_scale_multiplier": 1000,
}
_ELSEWHERE = {  # which says nothing of the network, but the last
    "project_to_2d_pos": True,
    "cross_attention_norm": True,
    "use_tpu_flash_attention": False,
    "use_chipmunk_attention": False,
    "norm_eps": 1e-6,
}
_CAUSAL_ORIGINAL = _CAUSAL.removeprefix("_")


def read_original(shapes: Shapes, found: dict[str, Any]) -> dict[str, Any]:
    """Return what diffusers' config.json would say, and ours besides.

    Raises:
        CheckpointError: the configuration is of another design, or there is none, and shapes do not tell how long the
            first token lasts.
    """
    if not found:
        raise CheckpointError(
            "the file has no configuration in its metadata, and shapes do not tell how long the first token lasts"
        )
    dim, channels = shapes["patchify_proj.weight"]
    heads = found["num_attention_heads"]
    seen = {
        "in_channels": channels,
        "out_channels": shapes["proj_out.weight"][0],
        "num_attention_heads": heads,
        "attention_head_dim": dim // heads,
        "cross_attention_dim": shapes["transformer_blocks.0.attn2.to_k.weight"][1],
        "num_layers": count_blocks(shapes, "transformer_blocks."),
        "caption_channels": shapes["caption_projection.linear_1.weight"][1],
    }
    c = agreeing(found, _ORIGINAL | _ELSEWHERE | {_CAUSAL_ORIGINAL: False}, seen)
    for name, value in _ORIGINAL.items():
        if c[name] != value:
            raise CheckpointError(f"the configuration has {name}={c[name]!r}; published weights have {value!r}")
    return seen | {"norm_eps": c["norm_eps"], _CAUSAL: c[_CAUSAL_ORIGINAL]}


def write_original(config: DiTConfig) -> dict[str, Any]:
    """Return the configuration that the original repository keeps in the file's metadata."""
    found = write(config)
    kept = {name: value for name, value in found.items() if name not in _FIXED and not name.startswith("_")}
    return _ORIGINAL | kept | {_CAUSAL_ORIGINAL: found.get(_CAUSAL, False)}


_NAMES = {
    "proj_in": "patchify_proj",
    "time_embed.emb.timestep_embedder.linear_1": "adaln_single.emb.timestep_embedder.linear_1",
    "time_embed.emb.timestep_embedder.linear_2": "adaln_single.emb.timestep_embedder.linear_2",
    "time_embed.linear": "adaln_single.linear",
} | {
    f"transformer_blocks.*.{attend}.norm_{x}": f"transformer_blocks.*.{attend}.{x}_norm"
    for attend in ("attn1", "attn2")
    for x in "qk"
}


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
    licence="RAIL-M (0.9.0), OpenRAIL-M (0.9.5), LTXV Open Weights License (0.9.7)",
    read=read,
    write=write,
    weights=weights,
    original=Original(
        telling=("patchify_proj.weight", "adaln_single.linear.weight", "transformer_blocks.0.attn1.q_norm.weight"),
        read=read_original,
        weights=lambda config: relabelled(weights(config), _NAMES),
        file="ltx-video",
        write=write_original,
        class_name="Transformer3DModel",
        prefix="model.diffusion_model.",
    ),
    clip=(161, 512, 704),
    stride=(8, 32, 32),
    context_tokens=128,
    notes=(
        "where time begins depends on the version: since 0.9.5 the first token stands for one frame (causal positions). The "
        "original has a value for it in its configuration, diffusers decides by the pipeline's class and stores nothing; ours "
        "is a value, written as `_causal_temporal_positioning`, which diffusers keeps and ignores.",
        "LTXConditionPipeline (0.9.5 and later): text of 256 tokens, which attend only to each other, where those before read "
        "128 and padding too; a first frame gets fresh noise at each step, 0.15 sigma^2, though it is told to be clean, and "
        "keeps the last. Where the scheduler has a shift or shift_terminal, steps land on shifted sigmas and the network "
        "is told the others. So do ours. A first frame is all that ours can be given; decoding is at t = 1, its default.",
        "LTXImageToVideoPipeline forgets the picture if latents are given; ours does not.",
        "diffusers hides text by adding -10000 to scores, so that a text of padding alone is read evenly; ours reads nothing "
        "then.",
    ),
)
