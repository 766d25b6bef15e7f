"""`reelflow convert` on tiny folders."""

import json
from itertools import permutations
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from reelflow.families.published import load_transformer, save_transformer
from reelflow.families.wan import WAN, transformer
from reelflow.models.dit import DiTConfig, VideoDiT

LAYOUTS = ("diffusers", "original", "reelflow")


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    return VideoDiT(transformer(heads=2, depth=2, mlp=20, head_dim=12, text=10, waves=8, picture=6, extra_channels=1))


@pytest.fixture
def folder(network, tmp_path):
    """Makes a folder of the network in a layout."""

    def make(layout: str):
        if not (place := tmp_path / f"from-{layout}").exists():
            save_transformer(network, place, layout=layout)
        return place

    return make


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(a[n].dtype == b[n].dtype and torch.equal(a[n], b[n]) for n in a)


def files(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize(("source", "to"), list(permutations(LAYOUTS, 2)))
def test_any_layout_becomes_any_other_as_if_it_were_written_so(reelflow, folder, network, source, to):
    status, out, _ = reelflow("convert", folder(source), "out", "--to", to)
    assert status == 0
    assert files(folder(to)) == files(folder(to).parent / "out")
    model = load_transformer("out")
    assert model.config == network.config
    assert same(model.state_dict(), network.state_dict())
    parameters = sum(p.numel() for p in network.parameters())
    assert f"no published size, {parameters:,} parameters, layout {source}" in out
    assert f"layout {to}, types as stored, " in out
    assert "wrote config.json, diffusion_pytorch_model.safetensors" in out


def test_weights_are_cast(reelflow, folder):
    assert reelflow("convert", folder("diffusers"), "out", "--to", "original", "--dtype", "bfloat16")[0] == 0
    tensors = load_file("out/diffusion_pytorch_model.safetensors")
    assert {x.dtype for x in tensors.values()} == {torch.bfloat16}
    assert json.loads(Path("out/config.json").read_text())["_class_name"] == "WanModel"


def test_a_trained_network_becomes_what_it_is_a_design_of(reelflow, model):
    status, out, _ = reelflow("convert", model, "out", "--to", "reelflow")
    assert status == 0
    assert "layout reelflow" in out
    assert same(load_transformer("out").state_dict(), load_file(model / "model" / "dit.safetensors"))
    status, _, err = reelflow("convert", model, "else", "--to", "diffusers")
    assert status == 2
    assert "of no published family; its layout is reelflow" in err


def test_what_is_there_is_not_replaced(reelflow, folder, tmp_path):
    source = folder("diffusers")
    before = files(source)
    status, _, err = reelflow("convert", source, source, "--to", "original")
    assert (status, files(source)) == (2, before)
    assert "exists and is not an empty folder" in err


def test_what_is_no_network_is_refused(reelflow, folder, tmp_path):
    status, _, err = reelflow("convert", tmp_path, "out", "--to", "diffusers")
    assert status == 2
    assert "holds neither config.json nor safetensors; give the folder of one network" in err
    (tmp_path / "pipeline" / "transformer").mkdir(parents=True)
    (tmp_path / "pipeline" / "transformer" / "config.json").write_text("{}")
    assert "such as " in reelflow("convert", tmp_path / "pipeline", "out", "--to", "diffusers")[2]
    torch.save({"x": torch.ones(1)}, tmp_path / "a.pt")
    assert "make safetensors of it" in reelflow("convert", tmp_path / "a.pt", "out", "--to", "diffusers")[2]
    config = folder("diffusers") / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"num_layers": 3}))
    assert "missing" in reelflow("convert", config.parent, "out", "--to", "original")[2]
    assert not (tmp_path / "out").exists()


def test_a_network_of_ours_that_this_version_does_not_know_is_refused(reelflow, folder):
    config = folder("reelflow") / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"flavour": 3}))
    status, _, err = reelflow("convert", config.parent, "out", "--to", "original")
    assert status == 2
    assert "is of no network that this version reads" in err
    assert "flavour" in err


def test_a_family_can_be_said(network, tmp_path):
    save_transformer(network, tmp_path / "a", WAN)
    save_transformer(network, tmp_path / "b")
    assert files(tmp_path / "a") == files(tmp_path / "b")


def test_our_own_layout_holds_any_network(tmp_path):
    config = DiTConfig(in_channels=4, dim=32, num_heads=2, layers=(), rope=(4, 6, 6))
    save_transformer(VideoDiT(config), tmp_path / "a", layout="reelflow")
    assert load_transformer(tmp_path / "a").config == config
