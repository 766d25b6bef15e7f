"""What every family promises of its published sizes, and of folders of weights."""

import json
import re
from functools import cache

import diffusers
import pytest
import torch
from safetensors.torch import load_file

from reelflow.cli.plan import published_table
from reelflow.errors import CheckpointError, ConfigError
from reelflow.families.published import FAMILIES, find_size, load_transformer, save_transformer
from reelflow.families.wan import WAN
from reelflow.interop.mapping import differences
from reelflow.models.dit import DiTConfig, VideoDiT
from reelflow.nn.patchify import token_grid

SIZES = [(family, name) for family in FAMILIES for name in family.sizes]
EVERY_SIZE = pytest.mark.parametrize(("family", "name"), SIZES, ids=[f"{f.name}.{n}" for f, n in SIZES])


@cache
def counted(config: DiTConfig) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in VideoDiT(config).parameters() if p.requires_grad)


@EVERY_SIZE
def test_a_published_size_has_the_published_parameters(family, name):
    assert counted(family.sizes[name].config) == family.sizes[name].parameters


IN_DIFFUSERS = {  # one for each configuration; of original formats, names are held to those recorded with the fixtures
    size.config: (family, name)
    for family, name in SIZES
    for size in [family.sizes[name]]
    if hasattr(diffusers, family.class_name or "none")
}


@pytest.mark.parametrize(
    ("family", "name"), IN_DIFFUSERS.values(), ids=[f"{f.name}.{n}" for f, n in IN_DIFFUSERS.values()]
)
def test_a_published_size_has_the_names_and_shapes_of_the_reference(family, name):
    config = family.sizes[name].config
    with torch.device("meta"):
        model, reference = VideoDiT(config), getattr(diffusers, family.class_name)(**family.write(config))
    shapes = {key: value.shape for key, value in reference.state_dict().items()}
    assert differences(family.weights(config), model, shapes) == ""


@EVERY_SIZE
def test_a_configuration_survives_the_way_to_theirs_and_back(family, name):
    config = family.sizes[name].config
    theirs = json.loads(json.dumps(family.write(config)))
    assert family.read(theirs) == config
    assert family.write(family.read(theirs)) == theirs


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_a_published_network_has_a_plan(family):
    name, size = next(iter(family.sizes.items()))
    table = published_table(f"{family.name}.{name}")
    assert f"{size.parameters:,}" in table
    assert "FLOP" in table


@EVERY_SIZE
def test_the_clip_a_size_is_made_for_fits_it(family, name):
    size = family.sizes[name]
    token_grid(family.latent_shape(size, size.clip or family.clip), size.config.patch)


def test_a_clip_that_no_autoencoder_takes_is_refused_with_the_nearest():
    with pytest.raises(ConfigError, match="frames 80 does not fit a stride of 4; nearest: 77 or 81"):
        published_table("wan.t2v_14b", frames=80)
    with pytest.raises(ConfigError, match="height 4 does not fit a stride of 8; nearest: 8"):
        published_table("wan.t2v_14b", height=4)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_an_unknown_value_is_refused_and_the_nearest_named(family):
    theirs = family.write(next(iter(family.sizes.values())).config)
    with pytest.raises(CheckpointError, match="num_layer'"):
        family.read(theirs | {"num_layer": 3})


def test_a_size_is_found_by_name_and_a_misspelt_one_corrected():
    family, size = find_size("wan.t2v_14b")
    assert (family.name, size.parameters) == ("wan", 14_288_491_584)
    with pytest.raises(ConfigError, match=re.escape("wan.t2v_14b")):
        find_size("wan.t2v_14")


TINY = {
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "in_channels": 3,
    "out_channels": 3,
    "text_dim": 10,
    "freq_dim": 8,
    "ffn_dim": 20,
    "num_layers": 2,
}


@pytest.fixture
def folder(tmp_path):
    torch.manual_seed(0)
    reference = diffusers.WanTransformer3DModel(**TINY)
    for name, parameter in reference.named_parameters():  # published files keep some weights in float32
        if "norm" not in name and "table" not in name:
            parameter.data = parameter.data.bfloat16()
    reference.save_pretrained(tmp_path / "theirs")
    return tmp_path / "theirs"


def test_a_folder_of_theirs_goes_through_ours_and_back_bit_for_bit(folder, tmp_path):
    model = load_transformer(folder)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16, torch.float32}
    save_transformer(model, tmp_path / "again", WAN)
    before, after = (load_file(next(path.glob("*.safetensors"))) for path in (folder, tmp_path / "again"))
    assert before.keys() == after.keys()
    assert all(value.dtype == after[name].dtype and torch.equal(value, after[name]) for name, value in before.items())
    reference, again = (
        diffusers.WanTransformer3DModel.from_pretrained(path, low_cpu_mem_usage=True)
        for path in (folder, tmp_path / "again")
    )
    ours, theirs = ({k: v for k, v in x.config.items() if not k.startswith("_")} for x in (again, reference))
    assert ours == theirs
    assert all(torch.equal(*pair) for pair in zip(reference.parameters(), again.parameters(), strict=True))


@pytest.mark.parametrize("family", [each for each in FAMILIES if each is not WAN], ids=lambda family: family.name)
def test_a_network_is_not_written_as_one_of_another_family(folder, tmp_path, family):
    with pytest.raises(ConfigError, match=f"the network is none of {family.name}"):
        save_transformer(load_transformer(folder), tmp_path / "again", family)
    assert not (tmp_path / "again").exists()


def test_a_folder_that_holds_something_else_is_refused(folder, tmp_path):
    with pytest.raises(CheckpointError, match="give the folder of one network"):
        load_transformer(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"_class_name": "WanTransformer2DModel"}))
    with pytest.raises(CheckpointError, match="WanTransformer3DModel"):
        load_transformer(folder)
    (folder / "config.json").write_text(json.dumps(config | {"num_layers": 3}))
    with pytest.raises(CheckpointError, match=r"missing .*blocks\.2"):
        load_transformer(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="not JSON"):
        load_transformer(folder)
