"""Open-Sora 2.0 (Peng et al. 2025, arXiv:2503.09642): nineteen blocks of two streams, then thirty-eight of one.

The text is T5's features through one line, none hidden; another encoder's one vector joins that of time. A mask and
latents that are given (a first frame, say, or nothing) have a map of their own, whose tokens are added to the noisy ones.
The second network is for an autoencoder that compresses 32 times along a side, and has patches of one latent.

Rotary positions come in the half layout, which the table of weights turns round.
"""

import math
from typing import Any

from reelflow.errors import CheckpointError
from reelflow.families.family import Family, Size, arguments
from reelflow.families.originals import Original, Shapes, count_blocks
from reelflow.interop.mapping import NEGATED, Change, Row, linear, parameter, reordered, table
from reelflow.models.blocks import Dual, Single
from reelflow.models.context import Layers
from reelflow.models.dit import DiTConfig
from reelflow.nn.embed import Apart, Number
from reelflow.nn.patchify import Patch
from reelflow.nn.rope import interleaved_from_half

__all__ = ["OPENSORA2", "transformer"]


def transformer(
    *,
    heads: int = 24,
    dim: int = 3072,
    dual: int = 19,
    single: int = 38,
    mlp_ratio: float = 4.0,
    channels: int = 16,
    given: bool = True,
    guidance: bool = False,
    text: int = 4096,
    pooled: int = 768,
    patch: int = 2,
    rope: tuple[int, int, int] = (16, 56, 56),
    theta: float = 10_000.0,
    qkv_bias: bool = True,
) -> DiTConfig:
    """Return the network of `dual` and `single` blocks; `given`: it reads a mask, then latents, beside the noisy ones."""
    duals = dual * (Dual(mlp_ratio=mlp_ratio, qkv_bias=qkv_bias),)
    return DiTConfig(
        in_channels=channels,
        extra_channels=channels + 1 if given else 0,
        extra_apart=Apart((channels + 1,)) if given else None,
        dim=dim,
        num_heads=heads,
        layers=(*duals, *single * (Single(mlp_ratio=mlp_ratio),)),
        patch=Patch(1, patch, patch),
        rope=rope,
        theta=theta,
        time=Number(counts="1 - x"),
        numbers=(Number(),) if guidance else (),
        vector_dim=pooled,
        context=Layers(text),
    )


_DEFAULTS: dict[str, Any] = {
    "in_channels": 64,
    "vec_in_dim": 768,
    "context_in_dim": 4096,
    "hidden_size": 3072,
    "mlp_ratio": 4.0,
    "num_heads": 24,
    "depth": 19,
    "depth_single_blocks": 38,
    "axes_dim": [16, 56, 56],
    "theta": 10_000,
    "qkv_bias": True,
    "guidance_embed": False,
    "cond_embed": True,
    "fused_qkv": False,
    "use_liger_rope": True,
    "patch_size": 2,
}
_NOTES = ("type", "from_pretrained", "cache_dir", "grad_ckpt_settings")  # that say nothing of the network


def read(found: dict[str, Any]) -> DiTConfig:
    """Return the network of a config.json, which holds the values of the original MMDiTConfig.

    Raises:
        CheckpointError: a value is unknown.
    """
    kept = {name: value for name, value in found.items() if name not in _NOTES}
    c = arguments(kept, _DEFAULTS, fixed={"fused_qkv": False, "use_liger_rope": True})
    times, rows, columns = c["axes_dim"]
    return transformer(
        heads=c["num_heads"],
        dim=c["hidden_size"],
        dual=c["depth"],
        single=c["depth_single_blocks"],
        mlp_ratio=c["mlp_ratio"],
        channels=c["in_channels"] // c["patch_size"] ** 2,
        given=c["cond_embed"],
        guidance=c["guidance_embed"],
        text=c["context_in_dim"],
        pooled=c["vec_in_dim"],
        patch=c["patch_size"],
        rope=(times, rows, columns),
        theta=float(c["theta"]),
        qkv_bias=c["qkv_bias"],
    )


def write(config: DiTConfig) -> dict[str, Any]:
    """Return the values of the original MMDiTConfig."""
    duals = [layer for layer in config.layers if isinstance(layer, Dual)]
    return _DEFAULTS | {
        "in_channels": config.in_channels * config.patch.h * config.patch.w,
        "vec_in_dim": config.vector_dim,
        "context_in_dim": config.context_dim,
        "hidden_size": config.dim,
        "mlp_ratio": duals[0].mlp_ratio,
        "num_heads": config.num_heads,
        "depth": len(duals),
        "depth_single_blocks": len(config.layers) - len(duals),
        "axes_dim": list(config.rope),
        "theta": round(config.theta),
        "qkv_bias": duals[0].qkv_bias,
        "guidance_embed": bool(config.numbers),
        "cond_embed": config.extra_channels > 0,
        "patch_size": config.patch.h,
    }


def read_original(shapes: Shapes, found: dict[str, Any]) -> dict[str, Any]:
    """Return the values of the original MMDiTConfig, which the published files come without.

    Raises:
        CheckpointError: heads are of another width than the published ones, so that their axes are not known.
    """
    dim, channels = shapes["img_in.weight"]
    given = shapes.get("cond_in.weight")
    (head_dim,) = shapes["double_blocks.0.img_attn.norm.query_norm.scale"]
    if head_dim != sum(_DEFAULTS["axes_dim"]):
        raise CheckpointError(f"shapes do not tell the rotary axes of heads of {head_dim} channels; published: 128")
    return {
        "in_channels": channels,
        "vec_in_dim": shapes["vector_in.in_layer.weight"][1],
        "context_in_dim": shapes["txt_in.weight"][1],
        "hidden_size": dim,
        "mlp_ratio": shapes["double_blocks.0.img_mlp.0.weight"][0] / dim,
        "num_heads": dim // head_dim,
        "depth": count_blocks(shapes, "double_blocks."),
        "depth_single_blocks": count_blocks(shapes, "single_blocks."),
        "qkv_bias": "double_blocks.0.img_attn.q_proj.bias" in shapes,
        "guidance_embed": "guidance_in.in_layer.weight" in shapes,
        "cond_embed": given is not None,
        "patch_size": 2 if given is None else math.isqrt(given[1] - channels),  # the mask has one channel
    }


def weights(config: DiTConfig) -> tuple[Row, ...]:
    """Relate our weights to the published ones."""
    duals = sum(isinstance(layer, Dual) for layer in config.layers)
    half = reordered(interleaved_from_half((config.dim // config.num_heads,)))
    blocks = ((f"double_blocks.{i}.", _dual(config, half)) for i in range(duals))
    rest = ((f"single_blocks.{i}.", _single(config, half)) for i in range(len(config.layers) - duals))
    return table(
        linear("embed", "img_in"),
        linear("extra.maps.0", "cond_in") if config.extra_channels else (),
        linear("context.maps.0", "txt_in"),
        _vector("time.mlp", "time_in"),
        _vector("vector", "vector_in"),
        _vector("numbers.0.mlp", "guidance_in") if config.numbers else (),
        (table(rows, ours=f"blocks.{i}.", theirs=name) for i, (name, rows) in enumerate([*blocks, *rest])),
        linear("modulation.linear", "final_layer.adaLN_modulation.1"),
        linear("out", "final_layer.linear", NEGATED),
    )


def _vector(ours: str, theirs: str) -> tuple[Row, ...]:
    return table(linear(f"{ours}.up", f"{theirs}.in_layer"), linear(f"{ours}.down", f"{theirs}.out_layer"))


def _dual(config: DiTConfig, half: Change) -> tuple[Row, ...]:
    layer = config.layers[0]
    assert isinstance(layer, Dual)
    streams = (("video", "img"), ("context", "txt"))
    return table(_stream(ours, theirs, half, bias=layer.qkv_bias) for ours, theirs in streams)


def _stream(ours: str, theirs: str, half: Change, *, bias: bool) -> tuple[Row, ...]:
    parts = {f"{theirs}_attn.{name}_proj": name for name in "qkv"}
    return table(
        linear(f"{ours}.modulation.linear", f"{theirs}_mod.lin"),
        linear({f"{ours}.project.qkv": "q k v"}, parts, each={"q": half, "k": half}, bias=bias),
        _norms(f"{ours}.project", f"{theirs}_attn.norm", half),
        linear(f"{ours}.out", f"{theirs}_attn.proj"),
        linear(f"{ours}.mlp.up", f"{theirs}_mlp.0"),
        linear(f"{ours}.mlp.down", f"{theirs}_mlp.2"),
    )


def _single(config: DiTConfig, half: Change) -> tuple[Row, ...]:
    layer = config.layers[-1]
    assert isinstance(layer, Single)
    heights = {**dict.fromkeys("qkv", config.dim), "mlp": round(layer.mlp_ratio * config.dim)}
    return table(
        linear("modulation.linear", "modulation.lin"),
        linear(
            {"project.qkv": "q k v", "up": "mlp"},
            {"q_proj": "q", "k_proj": "k", "v_mlp": "v mlp"},
            each={"q": half, "k": half},
            heights=heights,
        ),
        _norms("project", "norm", half),
        linear("out", "linear2"),
    )


def _norms(ours: str, theirs: str, half: Change) -> tuple[Row, ...]:
    return table(
        parameter(f"{ours}.norm_q.weight", f"{theirs}.query_norm.scale", half),
        parameter(f"{ours}.norm_k.weight", f"{theirs}.key_norm.scale", half),
    )


OPENSORA2 = Family(
    name="opensora2",
    class_name="MMDiTModel",
    sizes={
        "11b": Size(transformer(), 11_891_390_528, "hpcai-tech/Open-Sora-v2"),
        "11b_deep": Size(
            transformer(channels=128, patch=1),
            11_891_971_200,
            "hpcai-tech/Open-Sora-v2-Video-DC-AE",
            clip=(125, 576, 1024),
            stride=(4, 32, 32),
        ),
    },
    licence="Apache-2.0",
    read=read,
    write=write,
    weights=weights,
    native=True,
    original=Original(  # which has no config.json: that one is ours
        telling=("double_blocks.0.img_attn.q_proj.weight", "single_blocks.0.v_mlp.weight"),
        read=read_original,
        weights=weights,
        file="Open_Sora_v2",
    ),
    clip=(129, 576, 1024),
    stride=(4, 8, 8),
    context_tokens=512,
    notes=(
        "published weights hold rotary channels in the half layout and unfused projections; the repository's other two "
        "layouts are refused.",
        "the system's autoencoder is HunyuanVideo's, under Tencent's licence (hunyuan_vae.safetensors in the repository). The "
        "original cuts frames wider or higher than 256 pixels into tiles and fades between them; ours takes them whole.",
        "with a picture the original puts its latents back into the first clip of a batch alone, ours into each; a prompt that "
        "ends in a motion score of its own gets no second one.",
        "the network for the deep autoencoder takes 32 latent frames of 128 frames of pixels, ours of 125 (or 4 n + 1).",
    ),
)
