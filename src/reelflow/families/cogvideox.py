"""CogVideoX 1.0 and 1.5 (Yang et al. 2024, arXiv:2408.06072): text and clip in one sequence, one set of weights for both.

Only the modulation tells the two apart; it comes from a vector narrower than the tokens. The text is T5's features,
padded to 226 tokens, and none is hidden. The smallest model adds sinusoids to the clip's tokens; the others turn queries
and keys. The first that begins with a picture also adds a stored table, for text and clip of exactly its size; that of
1.5 is told a number besides, which is 2 always. The picture's latents lie beside the noisy ones, zero after its frame.
"""

from typing import Any, Literal

from reelflow.errors import CheckpointError
from reelflow.families.family import Family, Size, arguments, vector_rows
from reelflow.families.originals import Original, Shapes, count_blocks, sequential_rows
from reelflow.interop.mapping import Row, ignored, linear, parameter, rearranged, table
from reelflow.models.blocks import Dual
from reelflow.models.context import Layers
from reelflow.models.dit import DiTConfig
from reelflow.nn.attention import QKNorm
from reelflow.nn.embed import Learned, Number, SinCos
from reelflow.nn.norm import Norm
from reelflow.nn.patchify import Grid, Patch
from reelflow.nn.rope import Inscribed, Steps

__all__ = ["COGVIDEOX", "transformer"]


def transformer(
    *,
    heads: int = 48,
    depth: int = 42,
    head_dim: int = 64,
    channels: int = 16,
    extra_channels: int = 0,
    patch: Patch = Patch(1, 2, 2),
    positions: Literal["sinusoids", "rotary", "rotary and table"] = "rotary",
    grid: Grid = Grid(13, 30, 45),
    spacing: float = 1.875,
    text: int = 4096,
    text_tokens: int = 226,
    vector: int = 512,
    offset: bool = False,
    eps: float = 1e-5,
) -> DiTConfig:
    """Return the network of `heads` x `head_dim` channels, which was trained on clips of `grid` tokens.

    Sinusoids count rows and columns by 1 / `spacing`. `offset`: a number is told besides the time.
    """
    dim, space, norm = heads * head_dim, head_dim // 8 * 3, Norm(eps=eps, affine=True)
    sinusoids = SinCos(
        split=(dim // 4, dim // 8 * 3, dim // 8 * 3),
        first="sin",
        order="twh",
        coordinates=Steps(step=(1.0, 1 / spacing, 1 / spacing)),
    )
    absolute: dict[str, tuple[SinCos | Learned, ...]] = {
        "sinusoids": (sinusoids,),
        "rotary": (),
        "rotary and table": (Learned(grid, form="grid", context=text_tokens, frozen=True),),
    }
    return DiTConfig(
        in_channels=channels,
        extra_channels=extra_channels,
        dim=dim,
        num_heads=heads,
        layers=depth * (Dual(tied=True, norm=norm, qk_norm=QKNorm("layer")),),
        patch=patch,
        rope="none" if positions == "sinusoids" else (head_dim // 4, space, space),
        coordinates=Steps() if positions == "sinusoids" or patch.t > 1 else Inscribed(grid.h, grid.w),
        absolute=absolute[positions],
        time=Number(channels=dim, counts="1 - x"),
        numbers=(Number(channels=vector, scale=1.0),) if offset else (),
        vector_width=vector,
        context=Layers(text),
        last_norm=norm,
        out_norm=norm,
    )


_DEFAULTS: dict[str, Any] = {
    "num_attention_heads": 30,
    "attention_head_dim": 64,
    "in_channels": 16,
    "out_channels": 16,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "time_embed_dim": 512,
    "ofs_embed_dim": None,
    "text_embed_dim": 4096,
    "num_layers": 30,
    "dropout": 0.0,
    "attention_bias": True,
    "sample_width": 90,
    "sample_height": 60,
    "sample_frames": 49,
    "patch_size": 2,
    "patch_size_t": None,
    "temporal_compression_ratio": 4,
    "max_text_seq_length": 226,
    "activation_fn": "gelu-approximate",
    "timestep_activation_fn": "silu",
    "norm_elementwise_affine": True,
    "norm_eps": 1e-5,
    "spatial_interpolation_scale": 1.875,
    "temporal_interpolation_scale": 1.0,
    "use_rotary_positional_embeddings": False,
    "use_learned_positional_embeddings": False,
    "patch_bias": True,
}
_FIXED = (
    "flip_sin_to_cos",
    "freq_shift",
    "dropout",
    "attention_bias",
    "temporal_compression_ratio",
    "activation_fn",
    "timestep_activation_fn",
    "norm_elementwise_affine",
    "temporal_interpolation_scale",
)
_LATER = {"sample_width": 300, "sample_height": 300, "sample_frames": 81, "patch_bias": False}  # 1.5, of any size


def read(found: dict[str, Any]) -> DiTConfig:
    """Return the network of a config.json.

    Raises:
        CheckpointError: a value is unknown, or two do not go together.
    """
    c = arguments(found, _DEFAULTS, fixed={name: _DEFAULTS[name] for name in _FIXED})
    rotary, stored = c["use_rotary_positional_embeddings"], c["use_learned_positional_embeddings"]
    for name, wrong, values in (
        ("ofs_embed_dim", c["ofs_embed_dim"] not in (None, c["time_embed_dim"]), "null or time_embed_dim"),
        ("use_learned_positional_embeddings", stored and not rotary, "false where positions are not rotary"),
        ("patch_bias", not c["patch_bias"] and c["patch_size_t"] is None, "true where patches are of one frame"),
    ):
        if wrong:
            raise CheckpointError(f"config.json has {name}={c[name]!r}; published weights have {values}")
    patch = Patch(c["patch_size_t"] or 1, c["patch_size"], c["patch_size"])
    return transformer(
        heads=c["num_attention_heads"],
        head_dim=c["attention_head_dim"],
        depth=c["num_layers"],
        channels=c["out_channels"],
        extra_channels=c["in_channels"] - c["out_channels"],
        patch=patch,
        positions="rotary and table" if stored else "rotary" if rotary else "sinusoids",
        grid=Grid((c["sample_frames"] - 1) // 4 + 1, c["sample_height"] // patch.h, c["sample_width"] // patch.w),
        spacing=c["spatial_interpolation_scale"],
        text=c["text_embed_dim"],
        text_tokens=c["max_text_seq_length"],
        vector=c["time_embed_dim"],
        offset=c["ofs_embed_dim"] is not None,
        eps=c["norm_eps"],
    )


def write(config: DiTConfig) -> dict[str, Any]:
    """Return the config.json of a network."""
    values = _DEFAULTS | {
        "num_attention_heads": config.num_heads,
        "attention_head_dim": config.dim // config.num_heads,
        "in_channels": config.in_channels + config.extra_channels,
        "out_channels": config.in_channels,
        "time_embed_dim": config.vector_width,
        "ofs_embed_dim": config.vector_width if config.numbers else None,
        "text_embed_dim": config.context_dim,
        "num_layers": len(config.layers),
        "patch_size": config.patch.h,
        "norm_eps": config.out_norm.eps,
        "use_rotary_positional_embeddings": config.rope != "none",
    }
    if config.patch.t > 1:
        values |= _LATER | {"patch_size_t": config.patch.t}
    if isinstance(config.coordinates, Inscribed):
        values |= {
            "sample_height": config.coordinates.h * config.patch.h,
            "sample_width": config.coordinates.w * config.patch.w,
        }
    for absolute in config.absolute:
        if isinstance(absolute, Learned):
            values |= {
                "use_learned_positional_embeddings": True,
                "sample_frames": 4 * (absolute.size[0] - 1) + 1,
                "max_text_seq_length": absolute.context,
            }
        elif isinstance(absolute.coordinates, Steps):
            values["spatial_interpolation_scale"] = round(1 / absolute.coordinates.step[1], 9)
    return values


def weights(config: DiTConfig) -> tuple[Row, ...]:
    """Relate our weights to the published ones."""
    patches = rearranged("d c h w -> d (c h w)", h=config.patch.h, w=config.patch.w) if config.patch.t == 1 else None
    stored = any(isinstance(absolute, Learned) for absolute in config.absolute)
    return table(
        linear("embed", "patch_embed.proj", weight=patches),
        parameter("tables.0.tables.0", "patch_embed.pos_embedding", rearranged("1 n d -> n d")) if stored else (),
        vector_rows("time.mlp", "time_embedding"),
        vector_rows("numbers.0.mlp", "ofs_embedding") if config.numbers else (),
        linear("context.maps.0", "patch_embed.text_proj"),
        (table(_block(), ours=f"blocks.{i}.", theirs=f"transformer_blocks.{i}.") for i in range(len(config.layers))),
        linear("last_norm", "norm_final"),
        linear("norm", "norm_out.norm"),
        linear("modulation.linear", "norm_out.linear"),
        linear("out", "proj_out"),
    )


def _block() -> tuple[Row, ...]:
    return table(
        linear(  # of the clip's tokens and the text's, for attention and MLP
            {"video.modulation.linear": "v1 v2", "context.modulation.linear": "t1 t2"},
            {"norm1.linear": "v1 t1", "norm2.linear": "v2 t2"},
        ),
        linear("video.norm1", "norm1.norm"),
        linear("video.norm2", "norm2.norm"),
        linear("video.project.qkv", ["attn1.to_q", "attn1.to_k", "attn1.to_v"]),
        linear("video.project.norm_q", "attn1.norm_q"),
        linear("video.project.norm_k", "attn1.norm_k"),
        linear("video.out", "attn1.to_out.0"),
        linear("video.mlp.up", "ff.net.0.proj"),
        linear("video.mlp.down", "ff.net.2"),
    )


def read_original(shapes: Shapes, found: dict[str, Any]) -> dict[str, Any]:
    """Return what diffusers' config.json would say, of the published designs.

    Raises:
        CheckpointError: the weights are of none of them.
    """
    dim, columns, *flat = shapes["mixins.patch_embed.proj.weight"]  # 1.5 has a linear map of patches 2 x 2 x 2
    head_dim = shapes["mixins.adaln_layer.query_layernorm_list.0.weight"][0]
    channels, out_channels = columns if flat else columns // 8, shapes["mixins.final_layer.linear.weight"][0] // 4
    given = channels > (out_channels if flat else out_channels // 2)
    positions = {1920: "sinusoids", 3072: "rotary"}
    if dim not in positions:
        raise CheckpointError(f"shapes do not tell the positions at width {dim}; published widths: {list(positions)}")
    return {
        "num_attention_heads": dim // head_dim,
        "attention_head_dim": head_dim,
        "in_channels": channels,
        "out_channels": out_channels if flat else out_channels // 2,
        "time_embed_dim": shapes["time_embed.0.weight"][0],
        "ofs_embed_dim": shapes["ofs_embed.0.weight"][0] if "ofs_embed.0.weight" in shapes else None,
        "text_embed_dim": shapes["mixins.patch_embed.text_proj.weight"][1],
        "num_layers": count_blocks(shapes, "transformer.layers."),
        "use_rotary_positional_embeddings": positions[dim] == "rotary",
        "use_learned_positional_embeddings": bool(given and flat),
    } | ({} if flat else {"patch_size_t": 2} | _LATER)


def original_weights(config: DiTConfig) -> tuple[Row, ...]:
    """Relate our weights to those of the original's SAT checkpoints, of which some hold tables that are computed."""
    patches = rearranged("d c h w -> d (c h w)", h=config.patch.h, w=config.patch.w) if config.patch.t == 1 else None
    stored = any(isinstance(absolute, Learned) for absolute in config.absolute)
    positions = "mixins.pos_embed.pos_embedding"
    return table(
        linear("embed", "mixins.patch_embed.proj", weight=patches),
        parameter("tables.0.tables.0", positions, rearranged("1 n d -> n d")) if stored else ignored(positions),
        ignored("mixins.pos_embed.freqs_sin", "mixins.pos_embed.freqs_cos"),
        ignored("transformer.word_embeddings.weight", "transformer.position_embeddings.weight"),
        sequential_rows("time.mlp", "time_embed"),
        sequential_rows("numbers.0.mlp", "ofs_embed") if config.numbers else (),
        linear("context.maps.0", "mixins.patch_embed.text_proj"),
        (table(_original_block(i), ours=f"blocks.{i}.") for i in range(len(config.layers))),
        linear("last_norm", "transformer.final_layernorm"),
        linear("norm", "mixins.final_layer.norm_final"),
        linear("modulation.linear", "mixins.final_layer.adaLN_modulation.1"),
        linear("out", "mixins.final_layer.linear"),
    )


def _original_block(index: int) -> tuple[Row, ...]:
    layer, adaln = f"transformer.layers.{index}", "mixins.adaln_layer"
    return table(
        linear(
            {"video.modulation.linear": "v1 v2", "context.modulation.linear": "t1 t2"},
            {f"{adaln}.adaLN_modulations.{index}.1": "v1 v2 t1 t2"},
        ),
        linear("video.norm1", f"{layer}.input_layernorm"),
        linear("video.norm2", f"{layer}.post_attention_layernorm"),
        linear("video.project.qkv", f"{layer}.attention.query_key_value"),
        linear("video.project.norm_q", f"{adaln}.query_layernorm_list.{index}"),
        linear("video.project.norm_k", f"{adaln}.key_layernorm_list.{index}"),
        linear("video.out", f"{layer}.attention.dense"),
        linear("video.mlp.up", f"{layer}.mlp.dense_h_to_4h"),
        linear("video.mlp.down", f"{layer}.mlp.dense_4h_to_h"),
    )


COGVIDEOX = Family(
    name="cogvideox",
    class_name="CogVideoXTransformer3DModel",
    sizes={
        "2b": Size(transformer(heads=30, depth=30, positions="sinusoids"), 1_693_783_872, "THUDM/CogVideoX-2b"),
        "5b": Size(transformer(), 5_570_283_072, "THUDM/CogVideoX-5b"),
        "5b_i2v": Size(
            transformer(extra_channels=16, positions="rotary and table"), 5_570_479_680, "THUDM/CogVideoX-5b-I2V"
        ),
        "1_5_5b": Size(transformer(patch=Patch(2, 2, 2)), 5_570_676_352, "THUDM/CogVideoX1.5-5B", clip=(85, 768, 1360)),
        "1_5_5b_i2v": Size(
            transformer(patch=Patch(2, 2, 2), extra_channels=16, offset=True),
            5_571_594_880,
            "THUDM/CogVideoX1.5-5B-I2V",
            clip=(85, 768, 1360),
        ),
    },
    licence="Apache-2.0 (2b), CogVideoX License (the others)",
    read=read,
    write=write,
    weights=weights,
    original=Original(
        telling=("mixins.patch_embed.proj.weight", "transformer.layers.0.attention.query_key_value.weight"),
        read=read_original,
        weights=original_weights,
        file="mp_rank_00_model_states",
        prefix="model.diffusion_model.",
    ),
    clip=(49, 480, 720),
    stride=(4, 8, 8),
    context_tokens=226,
    notes=(
        "1.0: diffusers places tokens by fitting the grid into 30 x 45, the original counts integers; they agree at 480 x 720 "
        "only. Ours are diffusers'.",
        "the second norm at the end has eps 1e-5 in diffusers and here, 1e-6 in the original.",
        "5b_i2v: at another number of frames diffusers silently takes sin-cos positions for the learned table; ours reads its "
        "first frames, and refuses a grid larger than it.",
        "1.5: an odd number of latent frames does not fit the patch; the network refuses it, and the system makes one more "
        "before them and drops it before decoding, as diffusers' pipeline does. A picture then stands beside that one alone.",
        "dynamic guidance has the phase ((steps - timestep) / steps)^5 with timesteps of training, so that it is not "
        "monotone; so it is here, as `dynamic_guidance`, which is off unless asked for.",
        "a picture's latents are drawn from what the autoencoder makes of it, not its mean.",
    ),
)
