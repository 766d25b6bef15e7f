"""Open-Sora 1.2 (STDiT3, Zheng et al. 2024, arXiv:2412.20404): blocks along space and blocks along time in turn.

Each attends, then reads the text, un-normed and ungated, then has its MLP. The vector of time and frames per second is
mapped once for all blocks, and each adds a table to it. Rotary positions are of time alone; those of rows and columns
are sinusoids added at the start, of any clip as if it were square. The text is T5's features, padding hidden; what
stands for no text is stored with the weights (`context.null`). Frames that are given are clean, and their time is 1.

The positions are those of clips whose sides are whole tokens (16 pixels): the original reckons with the sides that were
asked for, which differ from what is computed where they are not.
"""

import math
from typing import Any

from reelflow.families.family import Family, Size, arguments
from reelflow.interop.mapping import Row, derived, linear, parameter, rearranged, table
from reelflow.models.blocks import Attend, Branches, Cross, FeedForward
from reelflow.models.context import Layers
from reelflow.models.dit import DiTConfig
from reelflow.nn.attention import QKNorm
from reelflow.nn.embed import Number, SinCos
from reelflow.nn.patchify import Patch
from reelflow.nn.patterns import Space, Time
from reelflow.nn.rope import Squared, rope_frequencies

__all__ = ["OPENSORA", "transformer"]

PIXELS = 8  # along a side of a latent


def transformer(
    *,
    heads: int,
    dim: int,
    depth: int = 28,
    mlp_ratio: float = 4.0,
    channels: int = 4,
    variance: bool = True,
    text: int = 4096,
    text_tokens: int = 300,
    qk_norm: bool = True,
    patch: Patch = Patch(1, 2, 2),
    square: int = 512,
) -> DiTConfig:
    """Return the network of `depth` pairs of blocks; positions are shown as those of a clip of `square` pixels a side.

    With `variance` the output has twice the channels, of which the first half is the velocity.
    """
    read, feed = Cross(norm=None, qk_norm=None), FeedForward(ratio=mlp_ratio)
    space, time = (Attend(pattern, qk_norm=QKNorm() if qk_norm else None) for pattern in (Space(), Time()))
    cell = PIXELS * math.sqrt(patch.h * patch.w)
    return DiTConfig(
        in_channels=channels,
        out_channels=(1 + variance) * channels,
        dim=dim,
        num_heads=heads,
        layers=depth * (Branches((space, read, feed)), Branches((time, read, feed))),
        patch=patch,
        rope=(dim // heads, 0, 0),  # within a frame all turn alike, which attention does not see
        absolute=(SinCos((0, dim // 2, dim // 2), first="sin", order="twh", coordinates=Squared(square / cell)),),
        modulation="shared",
        time=Number(counts="1 - x"),
        numbers=(Number(scale=1.0),),
        context=Layers(text, hidden=(dim,), null=text_tokens),
    )


_DEFAULTS: dict[str, Any] = {
    "architectures": ["STDiT3"],
    "model_type": "STDiT3",
    "input_size": [None, None, None],
    "input_sq_size": 512,
    "in_channels": 4,
    "patch_size": [1, 2, 2],
    "hidden_size": 1152,
    "depth": 28,
    "num_heads": 16,
    "mlp_ratio": 4.0,
    "class_dropout_prob": 0.1,
    "pred_sigma": True,
    "drop_path": 0.0,
    "caption_channels": 4096,
    "model_max_length": 300,
    "qk_norm": True,
    "enable_flash_attn": False,
    "enable_layernorm_kernel": False,
    "enable_sequence_parallelism": False,
    "only_train_temporal": False,
    "freeze_y_embedder": False,
    "skip_y_embedder": False,
}
_NOTES = (
    "auto_map",
    "torch_dtype",
    "transformers_version",
)  # that transformers writes, and that say nothing of the network


def read(found: dict[str, Any]) -> DiTConfig:
    """Return the network of a config.json.

    Raises:
        CheckpointError: a value is unknown.
    """
    c = arguments({name: value for name, value in found.items() if name not in _NOTES}, _DEFAULTS)
    return transformer(
        heads=c["num_heads"],
        dim=c["hidden_size"],
        depth=c["depth"],
        mlp_ratio=c["mlp_ratio"],
        channels=c["in_channels"],
        variance=c["pred_sigma"],
        text=c["caption_channels"],
        text_tokens=c["model_max_length"],
        qk_norm=c["qk_norm"],
        patch=Patch(*c["patch_size"]),
        square=c["input_sq_size"],
    )


def write(config: DiTConfig) -> dict[str, Any]:
    """Return the config.json of a network."""
    attend, feed = _branches(config)
    assert isinstance(config.context, Layers)
    (positions,) = config.absolute
    assert isinstance(positions, SinCos)
    assert isinstance(positions.coordinates, Squared)
    return _DEFAULTS | {
        "input_sq_size": round(positions.coordinates.side * PIXELS * math.sqrt(config.patch.h * config.patch.w)),
        "in_channels": config.in_channels,
        "patch_size": list(config.patch),
        "hidden_size": config.dim,
        "depth": len(config.layers) // 2,
        "num_heads": config.num_heads,
        "mlp_ratio": feed.ratio,
        "pred_sigma": config.out_channels > config.in_channels,
        "caption_channels": config.context_dim,
        "model_max_length": config.context.null,
        "qk_norm": attend.qk_norm is not None,
    }


def weights(config: DiTConfig) -> tuple[Row, ...]:
    """Relate our weights to the published ones."""
    p, head_dim = config.patch, config.dim // config.num_heads
    return table(
        linear("embed", "x_embedder.proj", weight=rearranged("d c t h w -> d (c t h w)", t=p.t, h=p.h, w=p.w)),
        linear("time.mlp.up", "t_embedder.mlp.0"),
        linear("time.mlp.down", "t_embedder.mlp.2"),
        linear("numbers.0.mlp.up", "fps_embedder.mlp.0"),
        linear("numbers.0.mlp.down", "fps_embedder.mlp.2"),
        linear("shared.linear", "t_block.1"),
        linear("context.maps.0", "y_embedder.y_proj.fc1"),
        linear("context.maps.1", "y_embedder.y_proj.fc2"),
        parameter("context.null", "y_embedder.y_embedding"),
        derived("rope.freqs", lambda: rope_frequencies(head_dim).float()),
        (
            table(_block(config), ours=f"blocks.{2 * i + j}.", theirs=f"{axis}_blocks.{i}.")
            for i in range(len(config.layers) // 2)
            for j, axis in enumerate(("spatial", "temporal"))
        ),
        parameter("modulation.rows", "final_layer.scale_shift_table"),
        linear("out", "final_layer.linear", rearranged("(t h w c) ... -> (c t h w) ...", t=p.t, h=p.h, w=p.w)),
    )


def _block(config: DiTConfig) -> tuple[Row, ...]:
    attend, _ = _branches(config)
    own, read, feed = (f"branches.{i}.function." for i in range(3))
    norms = attend.qk_norm is not None
    return table(
        parameter("modulation.rows", "scale_shift_table"),
        linear(f"{own}project.qkv", "attn.qkv"),
        linear(f"{own}project.norm_q", "attn.q_norm", bias=False) if norms else (),
        linear(f"{own}project.norm_k", "attn.k_norm", bias=False) if norms else (),
        linear(f"{own}out", "attn.proj"),
        linear(f"{read}query", "cross_attn.q_linear"),
        linear(f"{read}read.kv", "cross_attn.kv_linear"),
        linear(f"{read}out", "cross_attn.proj"),
        linear(f"{feed}up", "mlp.fc1"),
        linear(f"{feed}down", "mlp.fc2"),
    )


def _branches(config: DiTConfig) -> tuple[Attend, FeedForward]:
    layer = config.layers[0]
    assert isinstance(layer, Branches)
    attend, _, feed = layer.branches
    assert isinstance(attend, Attend)
    assert isinstance(feed, FeedForward)
    return attend, feed


# The original counts 36 more: the rotary frequencies, which it stores.
OPENSORA = Family(
    name="opensora",
    class_name="STDiT3",
    sizes={
        "v1_2": Size(transformer(heads=16, dim=1152), 1_207_643_936, "hpcai-tech/OpenSora-STDiT-v3"),
        "v1_2_3b": Size(transformer(heads=26, dim=1872), 3_182_211_536, ""),
    },
    licence="Apache-2.0",
    read=read,
    write=write,
    weights=weights,
    native=True,
    clip=(17, 720, 1280),
    stride=(4, 8, 8),
    context_tokens=300,
    notes=(
        "frames that are given are normalised twice before the original's readout; nobody reads what it says of them, "
        "and ours are normalised once.",
        "positions go by the sides in pixels that were asked for; ours go by the sides of the tokens, which are the same "
        "where sides are multiples of 16.",
        "text that is hidden takes no part, and the features of no text are hidden as the prompt's are, in both.",
    ),
)
