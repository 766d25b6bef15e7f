"""Open-Sora-Plan 1.3 (Lin et al. 2024, arXiv:2412.00131): attention that skips tokens, a look at the text, then an MLP.

The first and the last two of its blocks attend to all tokens; between them, blocks attend within one of four groups, to
which tokens are dealt one by one and four by four in turn. The vector of time is mapped once for all blocks, and each
adds a table to it. The text is mT5's features through two layers, padding hidden. The network predicts v. A second one
reads latents that are given and a mask of them, each through two maps of their own, and adds them to the noisy ones.

Rotary positions come in the half layout within each axis, which the table of weights turns round.
"""

from dataclasses import replace
from typing import Any

from reelflow.families.family import Family, Size, arguments, cross_rows, mlp_rows, vector_rows
from reelflow.interop.mapping import Row, linear, parameter, rearranged, reordered, table
from reelflow.models.blocks import Attend, Branches, Cross, FeedForward
from reelflow.models.context import Layers
from reelflow.models.dit import DiTConfig
from reelflow.nn.embed import Apart, Number
from reelflow.nn.norm import Norm
from reelflow.nn.patchify import Patch
from reelflow.nn.patterns import Full, Skip
from reelflow.nn.rope import Steps, interleaved_from_half

__all__ = ["OPENSORA_PLAN", "OPENSORA_PLAN_GIVEN", "transformer"]

SKIPPING = range(2, 30)  # blocks, however many there are


def transformer(
    *,
    heads: int = 24,
    head_dim: int = 96,
    depth: int = 32,
    groups: int = 4,
    channels: int = 8,
    out_channels: int = 8,
    mask: int = 0,
    text: int = 4096,
    patch: Patch = Patch(1, 2, 2),
    scale: tuple[float, float, float] = (1.0, 1.0, 1.0),
    eps: float = 1e-6,
) -> DiTConfig:
    """Return the network of `depth` blocks; `groups` 1: all attend to all. Positions are divided by `scale`.

    With `mask` channels of a mask, it reads latents that are given, then the mask, beside the noisy ones.
    """
    dim, norm, third = heads * head_dim, Norm(eps=eps), head_dim // 3
    patterns = [
        Skip(groups, run=groups if i % 2 else 1) if groups > 1 and i in SKIPPING else Full() for i in range(depth)
    ]
    read, feed = Cross(norm=None, qk_norm=None), FeedForward(norm=norm)
    t, h, w = (1 / s for s in scale)
    return DiTConfig(
        in_channels=channels,
        out_channels=out_channels,
        extra_channels=channels + mask if mask else 0,
        extra_apart=Apart((channels, mask), twice=True) if mask else None,
        dim=dim,
        num_heads=heads,
        layers=tuple(Branches((Attend(pattern, norm=norm, qk_norm=None), read, feed)) for pattern in patterns),
        patch=patch,
        rope=(third, third, third),
        coordinates=Steps((t, h, w)),
        modulation="shared",
        time=Number(counts="1 - x"),
        context=Layers(text, hidden=(dim,)),
    )


_DEFAULTS: dict[str, Any] = {
    "num_attention_heads": 16,
    "attention_head_dim": 88,
    "in_channels": None,
    "out_channels": None,
    "num_layers": 1,
    "dropout": 0.0,
    "cross_attention_dim": None,
    "attention_bias": True,
    "sample_size_h": None,
    "sample_size_w": None,
    "sample_size_t": None,
    "patch_size": None,
    "patch_size_t": None,
    "activation_fn": "geglu",
    "only_cross_attention": False,
    "double_self_attention": False,
    "upcast_attention": False,
    "norm_elementwise_affine": False,
    "norm_eps": 1e-6,
    "caption_channels": None,
    "interpolation_scale_h": 1.0,
    "interpolation_scale_w": 1.0,
    "interpolation_scale_t": 1.0,
    "sparse1d": False,
    "sparse_n": 2,
    "vae_scale_factor_t": 0,  # the mask's channels, in the class that has a mask
}
_FIXED = {
    "dropout": 0.0,
    "attention_bias": True,
    "activation_fn": "gelu-approximate",
    "only_cross_attention": False,
    "double_self_attention": False,
    "norm_elementwise_affine": False,
}


def read(found: dict[str, Any]) -> DiTConfig:
    """Return the network of a config.json.

    Raises:
        CheckpointError: a value is unknown, or two do not go together.
    """
    width = found.get("num_attention_heads", 16) * found.get("attention_head_dim", 88)
    c = arguments(found, _DEFAULTS, fixed=_FIXED | {"cross_attention_dim": width})
    return transformer(
        heads=c["num_attention_heads"],
        head_dim=c["attention_head_dim"],
        depth=c["num_layers"],
        groups=c["sparse_n"] if c["sparse1d"] else 1,
        channels=c["in_channels"],
        out_channels=c["out_channels"] or c["in_channels"],
        mask=c["vae_scale_factor_t"],
        text=c["caption_channels"],
        patch=Patch(c["patch_size_t"], c["patch_size"], c["patch_size"]),
        scale=(c["interpolation_scale_t"], c["interpolation_scale_h"], c["interpolation_scale_w"]),
        eps=c["norm_eps"],
    )


def write(config: DiTConfig) -> dict[str, Any]:
    """Return the config.json of a network."""
    patterns = [_attend(config, i).pattern for i in range(len(config.layers))]
    groups = next((pattern.stride for pattern in patterns if isinstance(pattern, Skip)), 1)
    norm = _attend(config, 0).norm
    assert norm is not None
    assert isinstance(config.coordinates, Steps)
    t, h, w = (1 / step for step in config.coordinates.step)
    mask = {"vae_scale_factor_t": config.extra_apart.parts[1]} if config.extra_apart else {}
    return (
        {name: value for name, value in _DEFAULTS.items() if name != "vae_scale_factor_t"}
        | _FIXED
        | {
            "num_attention_heads": config.num_heads,
            "attention_head_dim": config.dim // config.num_heads,
            "in_channels": config.in_channels,
            "out_channels": config.out_channels,
            "num_layers": len(config.layers),
            "cross_attention_dim": config.dim,
            "patch_size": config.patch.h,
            "patch_size_t": config.patch.t,
            "norm_eps": norm.eps,
            "caption_channels": config.context_dim,
            "interpolation_scale_t": t,
            "interpolation_scale_h": h,
            "interpolation_scale_w": w,
            "sparse1d": groups > 1,
            "sparse_n": groups,
        }
        | mask
    )


def weights(config: DiTConfig) -> tuple[Row, ...]:
    """Relate our weights to the published ones."""
    t, h, w = config.patch
    flat = rearranged("d c h w -> d (c h w)", h=h, w=w)
    given = enumerate(("masked_hidden_states", "mask") if config.extra_apart else ())
    return table(
        linear("embed", "pos_embed.proj", weight=flat),
        (
            table(
                linear(f"extra.maps.{i}", f"pos_embed_{name}.0.proj", weight=flat),
                linear(f"extra.then.{i}", f"pos_embed_{name}.1", bias=False),
            )
            for i, name in given
        ),
        vector_rows("time.mlp", "adaln_single.emb.timestep_embedder"),
        linear("shared.linear", "adaln_single.linear"),
        linear("context.maps.0", "caption_projection.linear_1"),
        linear("context.maps.1", "caption_projection.linear_2"),
        (
            table(_block(config), ours=f"blocks.{i}.", theirs=f"transformer_blocks.{i}.")
            for i in range(len(config.layers))
        ),
        parameter("modulation.rows", "scale_shift_table"),
        linear("out", "proj_out", rearranged("(t h w c) ... -> (c t h w) ...", t=t, h=h, w=w)),
    )


def _block(config: DiTConfig) -> tuple[Row, ...]:
    assert not isinstance(config.rope, str)
    half = reordered(interleaved_from_half(config.rope))
    attend, parts = "branches.0.function", [f"attn1.to_{name}" for name in "qkv"]
    return table(
        parameter("modulation.rows", "scale_shift_table"),
        linear(f"{attend}.project.qkv", parts, each=dict.fromkeys(parts[:2], half)),
        linear(f"{attend}.out", "attn1.to_out.0"),
        cross_rows("branches.1.function", "attn2", norms=False),
        mlp_rows("branches.2.function", "ff"),
    )


def _attend(config: DiTConfig, index: int) -> Attend:
    layer = config.layers[index]
    assert isinstance(layer, Branches)
    attend = layer.branches[0]
    assert isinstance(attend, Attend)
    return attend


OPENSORA_PLAN = Family(
    name="opensora_plan",
    class_name="OpenSoraT2V_v1_3",
    sizes={"t2v_v1_3": Size(transformer(), 2_771_981_600, "LanguageBind/Open-Sora-Plan-v1.3.0")},
    licence="MIT",
    read=read,
    write=write,
    weights=weights,
    native=True,
    clip=(93, 640, 640),
    stride=(4, 8, 8),
    context_tokens=512,
    notes=(
        "the original can hide a clip's padding (`attention_mask`) and fills its last groups of tokens up with hidden ones; "
        "here nothing is padded, and groups may be unequal, which is the same.",
        "where axes are equally long, the original gives them the scale of the first; published scales are 1 all three.",
    ),
)

OPENSORA_PLAN_GIVEN = replace(
    OPENSORA_PLAN,
    name="opensora_plan_given",
    class_name="OpenSoraInpaint_v1_3",
    sizes={"i2v_v1_3": Size(transformer(mask=4), 2_782_713_632, "LanguageBind/Open-Sora-Plan-v1.3.0")},
)
