"""HunyuanVideo-1.5 (Wu et al. 2025, arXiv:2511.18870): blocks of two streams alone, narrower and more of them.

The text stream joins three sources, each marked by a learned vector: a language model's features, refined as in
HunyuanVideo; the bytes of what is to be written, from a byte encoder; and a picture's features. In the reference text
to video has a picture of zeros, whose tokens none sees: give no tokens. Every network reads 32 + 1 channels beside the
latents, the first picture's and a mask, zeros without one. The model distilled to few steps is also told the time that
the step leads to: the one of `numbers`, as t.
"""

from typing import Any

from reelflow.errors import CheckpointError
from reelflow.families.family import Family, Size, arguments, dual_rows, readout_rows, refiner_rows, vector_rows
from reelflow.families.hunyuan import original_mlp, original_refiner, seen_in
from reelflow.families.originals import Original, Shapes, agreeing, sequential_rows
from reelflow.interop.mapping import NEGATED, Row, linear, parameter, rearranged, table
from reelflow.models.blocks import Dual
from reelflow.models.context import Layers, Refine, Sources
from reelflow.models.dit import DiTConfig
from reelflow.nn.embed import Number
from reelflow.nn.patchify import Patch

__all__ = ["HUNYUAN15", "transformer"]


def transformer(
    *,
    heads: int = 16,
    head_dim: int = 128,
    depth: int = 54,
    mlp_ratio: float = 4.0,
    channels: int = 32,
    extra_channels: int = 33,
    text: int = 3584,
    refiner: int = 2,
    glyphs: int = 1472,
    picture: int = 1152,
    next_time: bool = False,
    patch: Patch = Patch(1, 1, 1),
    rope: tuple[int, int, int] = (16, 56, 56),
    theta: float = 256.0,
) -> DiTConfig:
    """Return the network of `depth` blocks; `text`, `glyphs` and `picture` are the widths of the sources' features."""
    return DiTConfig(
        in_channels=channels,
        extra_channels=extra_channels,
        dim=heads * head_dim,
        num_heads=heads,
        layers=depth * (Dual(mlp_ratio=mlp_ratio),),
        patch=patch,
        rope=rope,
        theta=theta,
        time=Number(counts="1 - x"),
        numbers=(Number(counts="1 - x"),) if next_time else (),
        context=Sources(
            (
                Refine(text, depth=refiner),
                Layers(glyphs, (2048, 2048), activation="gelu", norms="in"),
                Layers(picture, (picture,), activation="gelu", norms=True),
            )
        ),
    )


_DEFAULTS: dict[str, Any] = {
    "in_channels": 65,
    "out_channels": 32,
    "num_attention_heads": 16,
    "attention_head_dim": 128,
    "num_layers": 54,
    "num_refiner_layers": 2,
    "mlp_ratio": 4.0,
    "patch_size": 1,
    "patch_size_t": 1,
    "qk_norm": "rms_norm",
    "text_embed_dim": 3584,
    "text_embed_2_dim": 1472,
    "image_embed_dim": 1152,
    "rope_theta": 256.0,
    "rope_axes_dim": [16, 56, 56],
    "use_meanflow": False,
}
_ELSEWHERE = {"target_size": 640, "task_type": "i2v"}  # what the weights were trained for: nothing is computed from it


def read(found: dict[str, Any]) -> DiTConfig:
    """Return the network of a config.json.

    Raises:
        CheckpointError: a value is unknown.
    """
    c = arguments(found, _DEFAULTS | _ELSEWHERE, fixed={"qk_norm": "rms_norm"})
    return transformer(
        heads=c["num_attention_heads"],
        head_dim=c["attention_head_dim"],
        depth=c["num_layers"],
        mlp_ratio=c["mlp_ratio"],
        channels=c["out_channels"],
        extra_channels=c["in_channels"] - c["out_channels"],
        text=c["text_embed_dim"],
        refiner=c["num_refiner_layers"],
        glyphs=c["text_embed_2_dim"],
        picture=c["image_embed_dim"],
        next_time=c["use_meanflow"],
        patch=Patch(c["patch_size_t"], c["patch_size"], c["patch_size"]),
        rope=tuple(c["rope_axes_dim"]),
        theta=c["rope_theta"],
    )


def write(config: DiTConfig) -> dict[str, Any]:
    """Return the config.json of a network."""
    text, glyphs, picture = _sources(config)
    first = config.layers[0]
    assert isinstance(first, Dual)
    return _DEFAULTS | {
        "in_channels": config.in_channels + config.extra_channels,
        "out_channels": config.in_channels,
        "num_attention_heads": config.num_heads,
        "attention_head_dim": config.dim // config.num_heads,
        "num_layers": len(config.layers),
        "num_refiner_layers": text.depth,
        "mlp_ratio": first.mlp_ratio,
        "patch_size": config.patch.h,
        "patch_size_t": config.patch.t,
        "text_embed_dim": text.in_dim,
        "text_embed_2_dim": glyphs.in_dim,
        "image_embed_dim": picture.in_dim,
        "rope_theta": config.theta,
        "rope_axes_dim": list(config.rope),
        "use_meanflow": bool(config.numbers),
    }


def weights(config: DiTConfig) -> tuple[Row, ...]:
    """Relate our weights to the published ones."""
    text, _, _ = _sources(config)
    return table(
        linear("embed", "x_embedder.proj", weight=rearranged("d c t h w -> d (c t h w)", **config.patch._asdict())),
        vector_rows("time.mlp", "time_embed.timestep_embedder"),
        vector_rows("numbers.0.mlp", "time_embed.timestep_embedder_r") if config.numbers else (),
        table(refiner_rows(text.depth), ours="context.sources.0.", theirs="context_embedder."),
        table(
            linear("norm_in", "norm"),
            (linear(f"maps.{i}", f"linear_{i + 1}") for i in range(3)),
            ours="context.sources.1.",
            theirs="context_embedder_2.",
        ),
        table(
            linear("norm_in", "norm_in"),
            (linear(f"maps.{i}", f"linear_{i + 1}") for i in range(2)),
            linear("norm_out", "norm_out"),
            ours="context.sources.2.",
            theirs="image_embedder.",
        ),
        parameter("context.kinds", "cond_type_embed.weight"),
        (table(dual_rows(), ours=f"blocks.{i}.", theirs=f"transformer_blocks.{i}.") for i in range(len(config.layers))),
        readout_rows(),
        linear("out", "proj_out", NEGATED),
    )


def _sources(config: DiTConfig) -> tuple[Refine, Layers, Layers]:
    assert isinstance(config.context, Sources)
    text, glyphs, picture = config.context.sources
    assert isinstance(text, Refine)
    assert isinstance(glyphs, Layers)
    assert isinstance(picture, Layers)
    return text, glyphs, picture


_ORIGINAL: dict[str, Any] = {
    "concat_condition": True,
    "glyph_byT5_v2": True,
    "guidance_embed": False,
    "is_reshape_temporal_channels": False,
    "mlp_act_type": "gelu_tanh",
    "mm_single_blocks_depth": 0,
    "qk_norm": True,
    "qk_norm_type": "rms",
    "qkv_bias": True,
    "text_pool_type": None,
    "text_projection": "single_refiner",
    "text_states_dim_2": None,
    "use_attention_mask": True,
    "use_cond_type_embedding": True,
    "vision_projection": "linear",
}
_ROPE = {"rope_dim_list": [16, 56, 56], "rope_theta": 256}
_RUNNING = dict.fromkeys(("attn_mode", "attn_param", "ideal_resolution", "ideal_task"))  # how it is run, and for what


def read_original(shapes: Shapes, found: dict[str, Any]) -> dict[str, Any]:
    """Return what diffusers' config.json would say.

    Raises:
        CheckpointError: the configuration is of another design.
    """
    seen = seen_in(shapes)
    told = {
        "heads_num": seen["num_attention_heads"],
        "hidden_size": seen["num_attention_heads"] * seen["attention_head_dim"],
        "in_channels": seen["out_channels"],
        "out_channels": seen["out_channels"],
        "mlp_width_ratio": seen["mlp_ratio"],
        "mm_double_blocks_depth": seen["num_layers"],
        "patch_size": [seen["patch_size_t"], seen["patch_size"], seen["patch_size"]],
        "text_states_dim": seen["text_embed_dim"],
        "use_meanflow": "time_r_in.mlp.0.weight" in shapes,
        "vision_states_dim": shapes["vision_in.proj.0.weight"][0],
    }
    c = agreeing(found, _ROPE | _RUNNING, _ORIGINAL | told)
    if c["attn_mode"] == "flex-block-attn":
        raise CheckpointError("the network attends sparsely (attn_mode='flex-block-attn'), which is not here yet")
    return seen | {
        "text_embed_2_dim": shapes["byt5_in.layernorm.weight"][0],
        "image_embed_dim": c["vision_states_dim"],
        "rope_theta": float(c["rope_theta"]),
        "rope_axes_dim": c["rope_dim_list"],
        "use_meanflow": c["use_meanflow"],
    }


def write_original(config: DiTConfig) -> dict[str, Any]:
    """Return the config.json of the original repository."""
    c = write(config)
    return _ORIGINAL | {
        "heads_num": c["num_attention_heads"],
        "hidden_size": config.dim,
        "in_channels": c["out_channels"],
        "out_channels": c["out_channels"],
        "mlp_width_ratio": c["mlp_ratio"],
        "mm_double_blocks_depth": c["num_layers"],
        "patch_size": list(config.patch),
        "rope_dim_list": c["rope_axes_dim"],
        "rope_theta": c["rope_theta"],
        "text_states_dim": c["text_embed_dim"],
        "use_meanflow": c["use_meanflow"],
        "vision_states_dim": c["image_embed_dim"],
    }


def original_weights(config: DiTConfig) -> tuple[Row, ...]:
    """Relate our weights to the original repository's."""
    text, _, _ = _sources(config)
    return table(
        linear("embed", "img_in.proj", weight=rearranged("d c t h w -> d (c t h w)", **config.patch._asdict())),
        sequential_rows("time.mlp", "time_in.mlp"),
        sequential_rows("numbers.0.mlp", "time_r_in.mlp") if config.numbers else (),
        table(original_refiner(text.depth), ours="context.sources.0.", theirs="txt_in."),
        linear("context.sources.1.norm_in", "byt5_in.layernorm"),
        (linear(f"context.sources.1.maps.{i}", f"byt5_in.fc{i + 1}") for i in range(3)),
        (
            linear(f"context.sources.2.{ours}", f"vision_in.proj.{i}")
            for ours, i in (("norm_in", 0), ("maps.0", 1), ("maps.1", 3), ("norm_out", 4))
        ),
        parameter("context.kinds", "cond_type_embedding.weight"),
        (
            table(_original_stream(ours, theirs), ours=f"blocks.{i}.", theirs=f"double_blocks.{i}.")
            for i in range(len(config.layers))
            for ours, theirs in (("video", "img"), ("context", "txt"))
        ),
        linear("modulation.linear", "final_layer.adaLN_modulation.1"),
        linear("out", "final_layer.linear", NEGATED),
    )


def _original_stream(ours: str, theirs: str) -> tuple[Row, ...]:
    return table(
        linear(f"{ours}.modulation.linear", f"{theirs}_mod.linear"),
        linear(f"{ours}.project.qkv", [f"{theirs}_attn_{name}" for name in "qkv"]),
        linear(f"{ours}.project.norm_q", f"{theirs}_attn_q_norm", bias=False),
        linear(f"{ours}.project.norm_k", f"{theirs}_attn_k_norm", bias=False),
        linear(f"{ours}.out", f"{theirs}_attn_proj"),
        original_mlp(f"{ours}.mlp", f"{theirs}_mlp"),
    )


_REPOSITORY = "hunyuanvideo-community/HunyuanVideo-1.5-Diffusers-"

HUNYUAN15 = Family(
    name="hunyuan15",
    class_name="HunyuanVideo15Transformer3DModel",
    sizes={
        "t2v_480p": Size(transformer(), 8_326_608_160, f"{_REPOSITORY}480p_t2v"),
        "t2v_720p": Size(transformer(), 8_326_608_160, f"{_REPOSITORY}720p_t2v", clip=(121, 720, 1280)),
        "i2v_480p": Size(transformer(), 8_326_608_160, f"{_REPOSITORY}480p_i2v"),
        "i2v_720p": Size(transformer(), 8_326_608_160, f"{_REPOSITORY}720p_i2v", clip=(121, 720, 1280)),
        "i2v_480p_few_steps": Size(transformer(next_time=True), 8_331_330_848, f"{_REPOSITORY}480p_i2v_step_distilled"),
    },
    licence="tencent-hunyuan-community",
    read=read,
    write=write,
    weights=weights,
    original=Original(
        telling=("double_blocks.0.img_attn_q.weight", "byt5_in.layernorm.weight", "cond_type_embedding.weight"),
        read=read_original,
        weights=original_weights,
        file="diffusion_pytorch_model",
        write=write_original,
        class_name="HunyuanVideo_1_5_DiffusionTransformer",
        beside=True,
    ),
    clip=(121, 480, 848),
    stride=(4, 16, 16),
    context_tokens=(1000, 256, 729),
    notes=(
        "diffusers puts the tokens of all sources that are real first; ours keeps them in their places and hides the rest: they "
        "have no positions, so the clip's tokens see the same.",
        "diffusers decides for the whole batch whether there is a picture, by its being all zeros; ours goes by the mask.",
        "`target_size` and `task_type` change no network; they are read and not written.",
        "diffusers chooses the size of a clip by its picture, and cuts the picture to it; ours makes the size that is asked for, "
        "and takes pictures of that size.",
        "diffusers takes 50 steps where nothing is said, also of the network that was distilled to few, and so does ours; its "
        "authors advise 8 or 12.",
        "a guider that works in a part of the steps only (`start`, `stop`), or is of another class, is refused.",
    ),
)
