"""The original repositories' layouts: their names against diffusers' converters, and the way there and back."""

import inspect
import json
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers.loaders import single_file_utils as converters
from parity import randomise
from safetensors.torch import load_file, save_file
from torch import Tensor

from reelflow.errors import CheckpointError, ConfigError
from reelflow.families.cogvideox import COGVIDEOX
from reelflow.families.dit import DIT
from reelflow.families.family import Family
from reelflow.families.hunyuan import HUNYUAN
from reelflow.families.hunyuan15 import HUNYUAN15
from reelflow.families.latte_class import LATTE_CLASS
from reelflow.families.ltx import LTX
from reelflow.families.mochi import MOCHI
from reelflow.families.opensora import OPENSORA
from reelflow.families.published import (
    FAMILIES,
    export_transformer,
    find_transformer,
    load_transformer,
    save_transformer,
    sizes_of,
)
from reelflow.families.sd3 import SD3
from reelflow.families.wan import WAN
from reelflow.interop.checkpoints import state_as_theirs
from reelflow.models.dit import DiTConfig, VideoDiT

Converter = Callable[[dict[str, Tensor]], dict[str, Tensor]]


def rewritten(convert: Converter, *changes: tuple[str, str]) -> Converter:
    """Return a converter of diffusers with the published extents that are written into it replaced by ours."""
    code = inspect.getsource(convert)
    for old, new in changes:
        assert code.count(old) == 1
        code = code.replace(old, new)
    names = dict(vars(converters))
    exec(code, names)
    return names[convert.__name__]


def chunks_of_adaln(state: dict[str, Tensor]) -> None:
    for name in [name for name in state if "adaLN_modulations" in name]:
        *_, index, _, ending = name.split(".")
        chunk = state.pop(name).chunk(12)
        state[f"transformer_blocks.{index}.norm1.linear.{ending}"] = torch.cat([*chunk[0:3], *chunk[6:9]])
        state[f"transformer_blocks.{index}.norm2.linear.{ending}"] = torch.cat([*chunk[3:6], *chunk[9:12]])


def apart(state: dict[str, Tensor], fused: str, *parts: str) -> None:
    """Cut tensors whose name has `fused` into thirds."""
    for name in [name for name in state if fused in name]:
        for part, x in zip(parts, state.pop(name).chunk(3), strict=True):
            state[name.replace(fused, part)] = x


def swapped(state: dict[str, Tensor], name: str) -> None:
    for ending in (".weight", ".bias"):
        state[name + ending] = torch.cat(state[name + ending].chunk(2)[::-1])


def renamed(state: dict[str, Tensor], *names: tuple[str, str]) -> dict[str, Tensor]:
    result = {}
    for name, x in state.items():
        for old, new in names:
            name = re.sub(old, new, name)
        result[name] = x
    return result


# Where diffusers has no converter among its modules, the facts of its conversion scripts.


def from_sat(state: dict[str, Tensor]) -> dict[str, Tensor]:
    chunks_of_adaln(state)
    apart(state, "attention.query_key_value", *(f"attn1.to_{x}" for x in "qkv"))
    return renamed(
        state,
        (r"^mixins\.adaln_layer\.(query|key)_layernorm_list\.(\d+)", r"transformer_blocks.\2.attn1.norm_\1"),
        (r"norm_query", "norm_q"),
        (r"norm_key", "norm_k"),
        (r"^transformer\.final_layernorm", "norm_final"),
        (r"^transformer\.layers", "transformer_blocks"),
        (r"post_attention_layernorm", "norm2.norm"),
        (r"input_layernorm", "norm1.norm"),
        (r"attention\.dense", "attn1.to_out.0"),
        (r"mlp\.dense_h_to_4h", "ff.net.0.proj"),
        (r"mlp\.dense_4h_to_h", "ff.net.2"),
        (r"^(time|ofs)_embed\.0", r"\1_embedding.linear_1"),
        (r"^(time|ofs)_embed\.2", r"\1_embedding.linear_2"),
        (r"^mixins\.final_layer\.norm_final", "norm_out.norm"),
        (r"^mixins\.final_layer\.adaLN_modulation\.1", "norm_out.linear"),
        (r"^mixins\.final_layer\.linear", "proj_out"),
        (r"^mixins\.(patch_embed|pos_embed)", "patch_embed"),
    )


def from_two_streams(state: dict[str, Tensor]) -> dict[str, Tensor]:
    apart(state, "self_attn_qkv", *(f"attn.to_{x}" for x in "qkv"))
    swapped(state, "final_layer.adaLN_modulation.1")
    return renamed(
        state,
        (r"^final_layer\.adaLN_modulation\.1", "norm_out.linear"),
        (r"^final_layer\.linear", "proj_out"),
        (r"^img_in", "x_embedder"),
        (r"^time_in\.mlp", "time_embed.timestep_embedder"),
        (r"^time_r_in\.mlp", "time_embed.timestep_embedder_r"),
        (r"^txt_in\.t_embedder\.mlp", "context_embedder.time_text_embed.timestep_embedder"),
        (r"(timestep_embedder|timestep_embedder_r)\.0", r"\1.linear_1"),
        (r"(timestep_embedder|timestep_embedder_r)\.2", r"\1.linear_2"),
        (r"^txt_in\.c_embedder", "context_embedder.time_text_embed.text_embedder"),
        (r"^txt_in\.input_embedder", "context_embedder.proj_in"),
        (r"^txt_in\.individual_token_refiner\.blocks", "context_embedder.token_refiner.refiner_blocks"),
        (r"self_attn_proj", "attn.to_out.0"),
        (r"adaLN_modulation\.1", "norm_out.linear"),
        (r"^byt5_in\.layernorm", "context_embedder_2.norm"),
        (r"^byt5_in\.fc", "context_embedder_2.linear_"),
        (r"^vision_in\.proj\.0", "image_embedder.norm_in"),
        (r"^vision_in\.proj\.1", "image_embedder.linear_1"),
        (r"^vision_in\.proj\.3", "image_embedder.linear_2"),
        (r"^vision_in\.proj\.4", "image_embedder.norm_out"),
        (r"^cond_type_embedding", "cond_type_embed"),
        (r"^double_blocks", "transformer_blocks"),
        (r"img_mod", "norm1"),
        (r"txt_mod", "norm1_context"),
        (r"img_attn_([qkv])\.", r"attn.to_\1."),
        (r"txt_attn_([qkv])\.", r"attn.add_\1_proj."),
        (r"img_attn_([qk])_norm", r"attn.norm_\1"),
        (r"txt_attn_([qk])_norm", r"attn.norm_added_\1"),
        (r"img_attn_proj", "attn.to_out.0"),
        (r"txt_attn_proj", "attn.to_add_out"),
        (r"(img_|\.)mlp\.", r"\1ff."),
        (r"txt_mlp", "ff_context"),
        (r"img_ff", "ff"),
        (r"fc1", "net.0.proj"),
        (r"fc2", "net.2"),
    )


def from_one_embedder(state: dict[str, Tensor]) -> dict[str, Tensor]:
    state.pop("pos_embed")
    apart(state, "attn.qkv", *(f"attn1.to_{x}" for x in "qkv"))
    depth = 1 + max(int(name.split(".")[1]) for name in state if name.startswith("blocks."))
    for name in [name for name in state if name.startswith(("t_embedder", "y_embedder"))]:
        x = state.pop(name)
        state |= {f"blocks.{i}.norm1.emb.{name}": x for i in range(depth)}
    return renamed(
        state,
        (r"^x_embedder", "pos_embed"),
        (r"t_embedder\.mlp\.0", "timestep_embedder.linear_1"),
        (r"t_embedder\.mlp\.2", "timestep_embedder.linear_2"),
        (r"y_embedder", "class_embedder"),
        (r"^blocks", "transformer_blocks"),
        (r"^(transformer_blocks\.\d+)\.adaLN_modulation\.1", r"\1.norm1.linear"),
        (r"attn\.proj", "attn1.to_out.0"),
        (r"mlp\.fc1", "ff.net.0.proj"),
        (r"mlp\.fc2", "ff.net.2"),
        (r"^final_layer\.adaLN_modulation\.1", "proj_out_1"),
        (r"^final_layer\.linear", "proj_out_2"),
    )


DUAL = {"num_attention_heads": 2, "attention_head_dim": 12, "rope_axes_dim": [4, 4, 4], "text_embed_dim": 10}
SPACE = {"num_attention_heads": 2, "attention_head_dim": 16, "text_embed_dim": 10, "num_layers": 2, "time_embed_dim": 8}
WAN_TINY = {
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "in_channels": 3,
    "out_channels": 3,
    "text_dim": 10,
    "freq_dim": 8,
    "ffn_dim": 20,
    "num_layers": 2,
}
PICTURE = {"in_channels": 7, "image_dim": 6, "added_kv_proj_dim": 24}
LTX_TINY = {
    "in_channels": 3,
    "out_channels": 3,
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "cross_attention_dim": 16,
    "num_layers": 2,
    "caption_channels": 10,
}
SD3_TINY = {
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 3,
    "attention_head_dim": 64,
    "num_attention_heads": 1,
    "joint_attention_dim": 10,
    "caption_projection_dim": 64,
    "pooled_projection_dim": 7,
    "pos_embed_max_size": 5,
}
from_hunyuan = rewritten(
    converters.convert_hunyuan_video_transformer_to_diffusers, ("hidden_size = 3072", "hidden_size = 24")
)
from_mochi = rewritten(
    converters.convert_mochi_transformer_checkpoint_to_diffusers, ("num_layers = 48", "num_layers = 2")
)

CASES: dict[str, tuple[Any, dict[str, Any], Converter]] = {
    "wan": (WAN, WAN_TINY, converters.convert_wan_transformer_to_diffusers),
    "wan, a picture": (WAN, WAN_TINY | PICTURE, converters.convert_wan_transformer_to_diffusers),
    "sd3": (SD3, SD3_TINY, converters.convert_sd3_transformer_checkpoint_to_diffusers),
    "sd3, norms, twice": (
        SD3,
        SD3_TINY | {"qk_norm": "rms_norm", "dual_attention_layers": [0, 1]},
        converters.convert_sd3_transformer_checkpoint_to_diffusers,
    ),
    "ltx": (
        LTX,
        LTX_TINY | {"_causal_temporal_positioning": True},
        converters.convert_ltx_transformer_checkpoint_to_diffusers,
    ),
    "mochi": (
        MOCHI,
        {"num_attention_heads": 2, "attention_head_dim": 12, "num_layers": 2, "pooled_projection_dim": 48}
        | {"text_embed_dim": 16, "time_embed_dim": 8},
        from_mochi,
    ),
    "hunyuan": (HUNYUAN, DUAL | {"num_layers": 2, "num_single_layers": 2, "pooled_projection_dim": 7}, from_hunyuan),
    "hunyuan, a picture": (
        HUNYUAN,
        DUAL
        | {"num_layers": 1, "num_single_layers": 1, "pooled_projection_dim": 7, "guidance_embeds": False}
        | {"in_channels": 33, "image_condition_type": "latent_concat"},
        from_hunyuan,
    ),
    "hunyuan15": (
        HUNYUAN15,
        DUAL | {"num_layers": 2, "text_embed_2_dim": 6, "image_embed_dim": 8, "use_meanflow": True},
        from_two_streams,
    ),
    "dit": (
        DIT,
        {
            "num_attention_heads": 2,
            "attention_head_dim": 8,
            "num_layers": 2,
            "sample_size": 8,
            "num_embeds_ada_norm": 5,
        },
        from_one_embedder,
    ),
    "cogvideox, sinusoids": (COGVIDEOX, SPACE, from_sat),
    "cogvideox, table": (
        COGVIDEOX,
        SPACE
        | {"in_channels": 32, "use_rotary_positional_embeddings": True, "use_learned_positional_embeddings": True}
        | {"sample_width": 8, "sample_height": 8, "sample_frames": 5, "max_text_seq_length": 3},
        from_sat,
    ),
    "cogvideox, 1.5": (
        COGVIDEOX,
        SPACE
        | {"in_channels": 32, "use_rotary_positional_embeddings": True, "patch_size_t": 2, "ofs_embed_dim": 8}
        | {"sample_width": 300, "sample_height": 300, "sample_frames": 81, "patch_bias": False},
        from_sat,
    ),
}
EVERY_CASE = pytest.mark.parametrize("name", CASES)


def model_of(name: str) -> VideoDiT:
    family, arguments, _ = CASES[name]
    torch.manual_seed(0)
    model = VideoDiT(family.read(dict(arguments)))
    randomise(model, 0)
    return model


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    assert a.keys() == b.keys(), sorted(a.keys() ^ b.keys())
    return all(a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]) for name in a)


@EVERY_CASE
def test_original_weights_converted_by_the_reference_are_those_of_its_layout(name):
    family, _, convert = CASES[name]
    model = model_of(name)
    original = state_as_theirs(model, family.original.weights(model.config))
    assert same(convert(dict(original)), state_as_theirs(model, family.weights(model.config)))


@EVERY_CASE
def test_a_network_survives_its_original_layout(name, tmp_path):
    family, _, _ = CASES[name]
    model = model_of(name)
    save_transformer(model, tmp_path / "original", layout="original")
    found = find_transformer(tmp_path / "original")
    assert (found.family, found.layout, found.config) == (family, "original", model.config)
    again = load_transformer(tmp_path / "original")
    assert same(model.state_dict(), again.state_dict())
    save_transformer(again, tmp_path / "again", layout="original")
    files = sorted(path.name for path in (tmp_path / "original").iterdir())
    assert files == sorted(path.name for path in (tmp_path / "again").iterdir())
    assert ("config.json" in files) == family.original.beside
    assert same(*(load_file(next((tmp_path / x).glob("*.safetensors"))) for x in ("original", "again")))


QUICK = {
    "wan.t2v_1_3b",
    "wan.i2v_14b",
    "sd3.3_5_medium",
    "ltx.2b_0_9_5",
    "mochi.10b",
    "hunyuan.t2v",
    "hunyuan15.t2v_480p",
}
QUICK |= {"dit.xl_2_256", "cogvideox.2b", "cogvideox.5b_i2v", "cogvideox.1_5_5b_i2v", "latte_class.xl_2_ucf101"}
QUICK |= {"opensora2.11b", "opensora2.11b_deep"}
SIZES = [
    pytest.param(family, name, id=(full := f"{family.name}.{name}"), marks=() if full in QUICK else pytest.mark.slow)
    for family in FAMILIES
    if family.original
    for name in family.sizes
]
UNTOLD = {"hunyuan.t2v", "hunyuan.i2v"}  # by shapes
STORED = {  # tables of positions, which are not counted among the parameters
    "cogvideox.5b_i2v": 17_776 * 3072,
    "dit.xl_2_256": 16**2 * 1152,
    "dit.xl_2_512": 32**2 * 1152,
    "latte_class.xl_2": (16**2 + 16) * 1152,
    "latte_class.xl_2_ucf101": (16**2 + 16) * 1152,
    "sd3.3_medium": 192**2 * 1536,
    "sd3.3_5_medium": 384**2 * 1536,
    "sd3.3_5_large": 192**2 * 2432,
}


def original_shapes(family: Family, config: DiTConfig) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        model = VideoDiT(config)
    rows = family.original.weights(config)
    return {name: tuple(x.shape) for name, x in state_as_theirs(model, rows).items()}


@pytest.mark.parametrize(("family", "name"), SIZES)
def test_a_published_size_is_told_by_the_shapes_of_its_original_weights(family, name):
    config, full = family.sizes[name].config, f"{family.name}.{name}"
    shapes = original_shapes(family, config)
    values = sum(torch.Size(shape).numel() for shape in shapes.values())
    assert values == family.sizes[name].parameters + STORED.get(full, 0)
    said = family.original.write(config) if family.original.write else {}
    if full in UNTOLD:
        with pytest.raises(CheckpointError, match="begins with a picture"):
            family.original.read(shapes, said)
    else:
        assert family.read(family.original.read(shapes, json.loads(json.dumps(said)))) == config
    telling = [each for each in FAMILIES if each.original and all(x in shapes for x in each.original.telling)]
    assert telling[0] is family


def test_without_a_configuration_the_width_tells_the_heads():
    config = WAN.read(WAN_TINY | {"num_attention_heads": 3, "attention_head_dim": 128})
    assert WAN.read(WAN.original.read(original_shapes(WAN, config), {})) == config


# Files that others wrote.


def state(name: str, prefix: str = "") -> dict[str, Tensor]:
    family, _, _ = CASES[name]
    model = model_of(name)
    tensors = state_as_theirs(model, family.original.weights(model.config))
    return {f"{prefix}{key}": x.contiguous().clone() for key, x in tensors.items()}


def test_one_file_with_other_networks_beside_is_read_by_its_prefix(tmp_path):
    tensors = state("sd3, norms, twice", "model.diffusion_model.") | {"first_stage_model.x": torch.ones(2)}
    save_file(tensors, tmp_path / "sd3_medium.safetensors")
    model = load_transformer(tmp_path / "sd3_medium.safetensors", dtype=torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    expected = model_of("sd3, norms, twice")
    assert model.config == expected.config
    assert same(model.state_dict(), expected.bfloat16().state_dict())


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("hunyuan", r"begins with a picture; .* say which: hunyuan\.t2v, hunyuan\.i2v_concat"),
        ("ltx", "how long the first token lasts"),
        ("dit", "do not tell the heads at width 16"),
        ("cogvideox, table", "do not tell the positions at width 32"),
    ],
)
def test_what_weights_do_not_tell_must_be_said(tmp_path, name, said):
    save_file(state(name), tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match=said):
        find_transformer(tmp_path / "a.safetensors")


def test_a_size_says_what_weights_do_not_tell(tmp_path):
    save_file(state("hunyuan"), tmp_path / "a.safetensors")
    found = find_transformer(tmp_path / "a.safetensors", size="hunyuan.i2v")
    assert sizes_of(found.config) == ["hunyuan.i2v"]
    with pytest.raises(CheckpointError, match=r"missing .*double_blocks\.2\."):  # this file being a smaller one
        found.empty()
    with pytest.raises(ConfigError, match=r"hunyuan\.i2v"):
        find_transformer(tmp_path / "a.safetensors", size="hunyuan.iv2")
    with pytest.raises(CheckpointError, match=r"is of hunyuan, not mochi\.10b"):
        find_transformer(tmp_path / "a.safetensors", size="mochi.10b")


def test_a_size_says_what_a_bare_file_of_diffusers_is(tmp_path):
    model = model_of("wan")
    save_transformer(model, tmp_path / "wan")
    (tmp_path / "wan" / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"no layout known here; a file of diffusers needs the config\.json"):
        find_transformer(tmp_path / "wan")
    found = find_transformer(tmp_path / "wan", size="wan.t2v_1_3b")
    assert (found.family, found.layout) == (WAN, "diffusers")


def test_a_configuration_that_contradicts_the_weights_is_refused(tmp_path):
    save_transformer(model_of("wan"), tmp_path / "wan", layout="original")
    path = tmp_path / "wan" / "config.json"
    said = json.loads(path.read_text())
    assert said["_class_name"] == "WanModel"
    path.write_text(json.dumps(said | {"num_layers": 3}))
    with pytest.raises(CheckpointError, match="has num_layers=3, the weights have 2"):
        load_transformer(tmp_path / "wan")
    path.write_text(json.dumps(said | {"causal": True}))
    with pytest.raises(CheckpointError, match="unknown values: causal"):
        load_transformer(tmp_path / "wan")


def test_a_tensor_that_is_missing_is_named(tmp_path):
    tensors = state("mochi")
    for name in ("t5_y_embedder.to_q.bias", "x_embedder.proj.weight"):
        tensors.pop(name)
        save_file(tensors, tmp_path / f"{name}.safetensors")
        with pytest.raises(CheckpointError, match=re.escape(name)):
            load_transformer(tmp_path / f"{name}.safetensors")


def test_the_file_of_the_network_is_found_among_others(tmp_path):
    save_file(state("mochi"), tmp_path / "dit.safetensors")
    save_file({"x": torch.ones(1)}, tmp_path / "decoder.safetensors")
    assert load_transformer(tmp_path).config == model_of("mochi").config


def test_tables_that_only_some_files_hold_are_read_by_nobody(tmp_path):
    extra = {"mixins.pos_embed.freqs_sin": torch.ones(2), "mixins.pos_embed.freqs_cos": torch.ones(2)}
    config = model_of("cogvideox, 1.5").config
    kept = {"config": json.dumps({"transformer": {"_class_name": COGVIDEOX.class_name, **COGVIDEOX.write(config)}})}
    save_file(state("cogvideox, 1.5") | extra, tmp_path / "a.safetensors", metadata=kept)
    assert same(load_transformer(tmp_path / "a.safetensors").state_dict(), model_of("cogvideox, 1.5").state_dict())


def test_a_table_of_positions_is_checked(tmp_path):
    save_transformer(model_of("dit"), tmp_path / "dit", layout="original")
    tensors = load_file(tmp_path / "dit" / "dit.safetensors")
    config = model_of("dit").config
    kept = {"config": json.dumps({"transformer": {"_class_name": DIT.class_name, **DIT.write(config)}})}
    save_file(tensors | {"pos_embed": tensors["pos_embed"] + 0.1}, tmp_path / "a.safetensors", metadata=kept)
    with pytest.raises(CheckpointError, match="pos_embed is not what the configuration makes"):
        load_transformer(tmp_path / "a.safetensors")


def test_an_original_without_a_config_json_is_read_by_its_shapes(tmp_path):
    torch.manual_seed(0)
    arguments = {"input_size": 8, "hidden_size": 384, "num_heads": 6, "depth": 2, "num_frames": 4}
    model = VideoDiT(LATTE_CLASS.read(arguments | {"num_classes": 7, "extras": 2}))
    tensors = state_as_theirs(model, LATTE_CLASS.weights(model.config))
    save_file({name: x.contiguous() for name, x in tensors.items()}, tmp_path / "ucf101.safetensors")
    found = find_transformer(tmp_path / "ucf101.safetensors")
    assert (found.family, found.config) == (LATTE_CLASS, model.config)


TINY_OPENSORA = {"hidden_size": 64, "num_heads": 2, "depth": 1, "caption_channels": 8, "model_max_length": 3}


def test_a_layout_that_is_not_there_is_refused():
    config = OPENSORA.read(TINY_OPENSORA)
    with pytest.raises(ConfigError, match="diffusers has no class for opensora; its layouts are original and reelflow"):
        export_transformer(config, "diffusers")
    assert export_transformer(config, "original").config["_class_name"] == "STDiT3"
