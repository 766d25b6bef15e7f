"""HunyuanVideo (Kong et al. 2024, arXiv:2412.03603): twenty blocks of two streams, then forty of one.

The text is a language model's features, refined by a small transformer that knows the time; a second encoder's one
vector, and the guidance that was distilled into the weights, join the vector of time. Two models begin with a picture:
the first reads its latents and a mask beside the noisy ones; the second has them in place of the first frame, whose
time is then 1, which guidance does not concern and the readout does not see.
"""

import math
from typing import Any

from reelflow.errors import CheckpointError
from reelflow.families.family import Family, Size, arguments, dual_rows, readout_rows, refiner_rows, vector_rows
from reelflow.families.originals import Original, Shapes, count_blocks, sequential_rows
from reelflow.interop.mapping import NEGATED, Row, linear, rearranged, table
from reelflow.models.blocks import Dual, Single
from reelflow.models.context import Refine
from reelflow.models.dit import DiTConfig
from reelflow.nn.embed import Number
from reelflow.nn.patchify import Patch

__all__ = ["HUNYUAN", "original_mlp", "original_refiner", "original_vector", "seen_in", "transformer"]


def transformer(
    *,
    heads: int = 24,
    head_dim: int = 128,
    dual: int = 20,
    single: int = 40,
    mlp_ratio: float = 4.0,
    channels: int = 16,
    extra_channels: int = 0,
    guidance: bool = True,
    first_given: bool = False,
    text: int = 4096,
    refiner: int = 2,
    pooled: int = 768,
    patch: Patch = Patch(1, 2, 2),
    rope: tuple[int, int, int] = (16, 56, 56),
    theta: float = 256.0,
) -> DiTConfig:
    """Return the network of `dual` and `single` blocks; `first_given`: the first frame is a picture, at time 1."""
    return DiTConfig(
        in_channels=channels,
        extra_channels=extra_channels,
        dim=heads * head_dim,
        num_heads=heads,
        layers=(*dual * (Dual(mlp_ratio=mlp_ratio),), *single * (Single(mlp_ratio=mlp_ratio),)),
        patch=patch,
        rope=rope,
        theta=theta,
        time=Number(counts="1 - x"),
        numbers=(Number(clean=not first_given),) if guidance else (),
        vector_dim=pooled,
        context=Refine(text, depth=refiner),
        out_groups="first" if first_given else "own",
    )


_DEFAULTS: dict[str, Any] = {
    "in_channels": 16,
    "out_channels": 16,
    "num_attention_heads": 24,
    "attention_head_dim": 128,
    "num_layers": 20,
    "num_single_layers": 40,
    "num_refiner_layers": 2,
    "mlp_ratio": 4.0,
    "patch_size": 2,
    "patch_size_t": 1,
    "qk_norm": "rms_norm",
    "guidance_embeds": True,
    "text_embed_dim": 4096,
    "pooled_projection_dim": 768,
    "rope_theta": 256.0,
    "rope_axes_dim": [16, 56, 56],
    "image_condition_type": None,
}


def read(found: dict[str, Any]) -> DiTConfig:
    """Return the network of a config.json.

    Raises:
        CheckpointError: a value is unknown.
    """
    c = arguments(found, _DEFAULTS, fixed={"qk_norm": "rms_norm"})
    return transformer(
        heads=c["num_attention_heads"],
        head_dim=c["attention_head_dim"],
        dual=c["num_layers"],
        single=c["num_single_layers"],
        mlp_ratio=c["mlp_ratio"],
        channels=c["out_channels"],
        extra_channels=c["in_channels"] - c["out_channels"],
        guidance=c["guidance_embeds"],
        first_given=c["image_condition_type"] == "token_replace",
        text=c["text_embed_dim"],
        refiner=c["num_refiner_layers"],
        pooled=c["pooled_projection_dim"],
        patch=Patch(c["patch_size_t"], c["patch_size"], c["patch_size"]),
        rope=tuple(c["rope_axes_dim"]),
        theta=c["rope_theta"],
    )


def write(config: DiTConfig) -> dict[str, Any]:
    """Return the config.json of a network."""
    first = config.layers[0]
    assert isinstance(first, Dual | Single)
    assert isinstance(config.context, Refine)
    picture = "token_replace" if config.out_groups == "first" else "latent_concat" if config.extra_channels else None
    return _DEFAULTS | {
        "in_channels": config.in_channels + config.extra_channels,
        "out_channels": config.in_channels,
        "num_attention_heads": config.num_heads,
        "attention_head_dim": config.dim // config.num_heads,
        "num_layers": sum(isinstance(layer, Dual) for layer in config.layers),
        "num_single_layers": sum(isinstance(layer, Single) for layer in config.layers),
        "num_refiner_layers": config.context.depth,
        "mlp_ratio": first.mlp_ratio,
        "patch_size": config.patch.h,
        "patch_size_t": config.patch.t,
        "guidance_embeds": bool(config.numbers),
        "text_embed_dim": config.context.in_dim,
        "pooled_projection_dim": config.vector_dim,
        "rope_theta": config.theta,
        "rope_axes_dim": list(config.rope),
        "image_condition_type": picture,
    }


def weights(config: DiTConfig) -> tuple[Row, ...]:
    """Relate our weights to the published ones."""
    assert isinstance(config.context, Refine)
    duals = sum(isinstance(layer, Dual) for layer in config.layers)
    singles = len(config.layers) - duals
    return table(
        linear("embed", "x_embedder.proj", weight=rearranged("d c t h w -> d (c t h w)", **config.patch._asdict())),
        vector_rows("time.mlp", "time_text_embed.timestep_embedder"),
        vector_rows("vector", "time_text_embed.text_embedder"),
        vector_rows("numbers.0.mlp", "time_text_embed.guidance_embedder") if config.numbers else (),
        table(refiner_rows(config.context.depth), ours="context.", theirs="context_embedder."),
        (table(dual_rows(), ours=f"blocks.{i}.", theirs=f"transformer_blocks.{i}.") for i in range(duals)),
        (
            table(_single(), ours=f"blocks.{duals + i}.", theirs=f"single_transformer_blocks.{i}.")
            for i in range(singles)
        ),
        readout_rows(),
        linear("out", "proj_out", NEGATED),
    )


def _single() -> tuple[Row, ...]:
    return table(
        linear("modulation.linear", "norm.linear"),
        linear("project.qkv", ["attn.to_q", "attn.to_k", "attn.to_v"]),
        linear("project.norm_q", "attn.norm_q", bias=False),
        linear("project.norm_k", "attn.norm_k", bias=False),
        linear("up", "proj_mlp"),
        linear("out", "proj_out"),
    )


def read_original(shapes: Shapes, found: dict[str, Any]) -> dict[str, Any]:
    """Return what diffusers' config.json would say.

    Raises:
        CheckpointError: shapes do not tell whether the first frame is given.
    """
    seen = seen_in(shapes)
    if seen["in_channels"] == seen["out_channels"]:
        raise CheckpointError("shapes do not tell whether the network begins with a picture")
    return seen | {
        "num_single_layers": count_blocks(shapes, "single_blocks."),
        "guidance_embeds": "guidance_in.mlp.0.weight" in shapes,
        "pooled_projection_dim": shapes["vector_in.in_layer.weight"][1],
        "image_condition_type": "latent_concat",
    }


def seen_in(shapes: Shapes) -> dict[str, Any]:
    """Return what the shapes of an original checkpoint tell of blocks of two streams and of the refiner."""
    dim, channels, *patch = shapes["img_in.proj.weight"]
    head_dim = shapes["double_blocks.0.img_attn_q_norm.weight"][0]
    return {
        "in_channels": channels,
        "out_channels": shapes["final_layer.linear.weight"][0] // math.prod(patch),
        "num_attention_heads": dim // head_dim,
        "attention_head_dim": head_dim,
        "num_layers": count_blocks(shapes, "double_blocks."),
        "num_refiner_layers": count_blocks(shapes, "txt_in.individual_token_refiner.blocks."),
        "mlp_ratio": shapes["double_blocks.0.img_mlp.fc1.weight"][0] / dim,
        "patch_size": patch[1],
        "patch_size_t": patch[0],
        "text_embed_dim": shapes["txt_in.input_embedder.weight"][1],
    }


def original_weights(config: DiTConfig) -> tuple[Row, ...]:
    """Relate our weights to the original repository's."""
    assert isinstance(config.context, Refine)
    duals = sum(isinstance(layer, Dual) for layer in config.layers)
    return table(
        linear("embed", "img_in.proj", weight=rearranged("d c t h w -> d (c t h w)", **config.patch._asdict())),
        sequential_rows("time.mlp", "time_in.mlp"),
        original_vector("vector", "vector_in", "in_layer", "out_layer"),
        sequential_rows("numbers.0.mlp", "guidance_in.mlp") if config.numbers else (),
        table(original_refiner(config.context.depth), ours="context.", theirs="txt_in."),
        (table(_original_dual(), ours=f"blocks.{i}.", theirs=f"double_blocks.{i}.") for i in range(duals)),
        (
            table(_original_single(config), ours=f"blocks.{duals + i}.", theirs=f"single_blocks.{i}.")
            for i in range(len(config.layers) - duals)
        ),
        linear("modulation.linear", "final_layer.adaLN_modulation.1"),
        linear("out", "final_layer.linear", NEGATED),
    )


def original_refiner(depth: int) -> tuple[Row, ...]:
    """Relate a `Refiner` to the original repository's."""
    block = table(
        linear("norm1", "norm1"),
        linear("norm2", "norm2"),
        linear("qkv", "self_attn_qkv"),
        linear("out", "self_attn_proj"),
        original_mlp("mlp", "mlp"),
        linear("gates", "adaLN_modulation.1"),
    )
    return table(
        sequential_rows("time.mlp", "t_embedder.mlp"),
        original_vector("mean", "c_embedder", "linear_1", "linear_2"),
        linear("embed", "input_embedder"),
        (table(block, ours=f"blocks.{i}.", theirs=f"individual_token_refiner.blocks.{i}.") for i in range(depth)),
    )


def original_vector(ours: str, theirs: str, first: str, second: str) -> tuple[Row, ...]:
    """Relate a `VectorEmbedding`."""
    return table(linear(f"{ours}.up", f"{theirs}.{first}"), linear(f"{ours}.down", f"{theirs}.{second}"))


def original_mlp(ours: str, theirs: str) -> tuple[Row, ...]:
    """Relate an `Mlp`."""
    return original_vector(ours, theirs, "fc1", "fc2")


def _original_dual() -> tuple[Row, ...]:
    return table(
        table(
            linear(f"{ours}.modulation.linear", f"{theirs}_mod.linear"),
            linear(f"{ours}.project.qkv", f"{theirs}_attn_qkv"),
            linear(f"{ours}.project.norm_q", f"{theirs}_attn_q_norm", bias=False),
            linear(f"{ours}.project.norm_k", f"{theirs}_attn_k_norm", bias=False),
            linear(f"{ours}.out", f"{theirs}_attn_proj"),
            original_mlp(f"{ours}.mlp", f"{theirs}_mlp"),
        )
        for ours, theirs in (("video", "img"), ("context", "txt"))
    )


def _original_single(config: DiTConfig) -> tuple[Row, ...]:
    layer = config.layers[-1]
    assert isinstance(layer, Single)
    heights = {"qkv": 3 * config.dim, "mlp": round(layer.mlp_ratio * config.dim)}
    return table(
        linear("modulation.linear", "modulation.linear"),
        linear({"project.qkv": "qkv", "up": "mlp"}, {"linear1": "qkv mlp"}, heights=heights),
        linear("project.norm_q", "q_norm", bias=False),
        linear("project.norm_k", "k_norm", bias=False),
        linear("out", "linear2"),
    )


HUNYUAN = Family(
    name="hunyuan",
    class_name="HunyuanVideoTransformer3DModel",
    sizes={
        "t2v": Size(transformer(), 12_821_012_544, "hunyuanvideo-community/HunyuanVideo"),
        "i2v_concat": Size(
            transformer(extra_channels=17, guidance=False),
            12_810_991_680,
            "hunyuanvideo-community/HunyuanVideo-I2V-33ch",
        ),
        "i2v": Size(transformer(first_given=True), 12_821_012_544, "hunyuanvideo-community/HunyuanVideo-I2V"),
    },
    licence="tencent-hunyuan-community",
    read=read,
    write=write,
    weights=weights,
    original=Original(
        telling=(
            "double_blocks.0.img_attn_qkv.weight",
            "txt_in.individual_token_refiner.blocks.0.self_attn_qkv.weight",
        ),
        read=read_original,
        weights=original_weights,
        file="mp_rank_00_model_states",
    ),
    clip=(129, 720, 1280),
    stride=(4, 8, 8),
    context_tokens=256,
    notes=(
        "the original attends in two segments, the clip with its text and the padding; diffusers hides the padding. What the "
        "clip's tokens and the text's see is the same.",
        "diffusers lets padded tokens of the refiner see token 0, so that their rows are defined; ours see the text, and no "
        "other token sees them.",
        "the readout is [shift, scale] in the original and here, [scale, shift] in diffusers.",
        "a prompt without any token divides by zero in diffusers; ours takes zero for its mean.",
        "with a picture beside the latents, the pipeline of diffusers gives four frames fewer than it is asked for: it makes one "
        "latent frame before those of the clip, and drops it. Ours does so too, and gives as many as it is asked for.",
        "while it reads the negative prompt, the language model sees a black picture, and keeps every second token of it, also "
        "where it keeps every fourth for the prompt: ours as in diffusers.",
        "diffusers tells a network that makes a picture move a guidance of 1 where nothing is said, and so does ours; its authors "
        "advise 6.",
        "in diffusers true_cfg_scale does nothing without a negative prompt, and prompt_2 is not read; ours leads away from the "
        "empty prompt, and has one prompt.",
        "in diffusers the language model sees the picture as it was given, the autoencoder at the clip's size; ours takes pictures "
        "of that size.",
    ),
)
