"""What every family of autoencoders promises of its published sizes, and of folders of weights."""

import json
from functools import cache

import diffusers
import pytest
import torch

import reelflow
from reelflow.errors import CheckpointError, ConfigError
from reelflow.families.autoencoders import AUTOENCODERS, load_vae, save_vae
from reelflow.families.wan_vae import WAN_VAE, autoencoder
from reelflow.interop.mapping import differences
from reelflow.models.vae import CausalVAE, VAEConfig

SIZES = [(family, name) for family in AUTOENCODERS for name in family.sizes]
EVERY_SIZE = pytest.mark.parametrize(("family", "name"), SIZES, ids=[f"{f.name}.{n}" for f, n in SIZES])
EVERY_FAMILY = pytest.mark.parametrize("family", AUTOENCODERS, ids=lambda family: family.name)


@cache
def shapes_of(config: VAEConfig) -> CausalVAE:
    with torch.device("meta"):
        return CausalVAE(config)


@EVERY_SIZE
def test_a_published_size_has_the_published_parameters(family, name):
    size = family.sizes[name]
    assert sum(p.numel() for p in shapes_of(size.config).parameters()) == size.parameters


@pytest.mark.parametrize(  # of a class that diffusers has not, names are held to those recorded with its fixture
    ("family", "name"),
    [(f, n) for f, n in SIZES if hasattr(diffusers, f.class_name)],
    ids=[f"{f.name}.{n}" for f, n in SIZES if hasattr(diffusers, f.class_name)],
)
def test_a_published_size_has_the_names_and_shapes_of_the_reference(family, name):
    config = family.sizes[name].config
    with torch.device("meta"):
        reference = getattr(diffusers, family.class_name)(**family.write(config))
    shapes = {key: value.shape for key, value in reference.state_dict().items()}
    assert differences(family.weights(config), shapes_of(config), shapes) == ""


@EVERY_SIZE
def test_a_configuration_survives_the_way_to_theirs_and_back(family, name):
    config = family.sizes[name].config
    theirs = json.loads(json.dumps(family.write(config)))
    assert family.read(theirs) == config
    assert family.write(family.read(theirs)) == theirs


@EVERY_SIZE
def test_latents_of_the_clip_a_size_is_made_for_decode_to_as_many_frames(family, name):
    size, vae = family.sizes[name], shapes_of(family.sizes[name].config)
    shape = size.config.latent_shape(*size.clip)
    assert vae.decode(torch.empty(1, *shape, device="meta")).shape == (1, 3, *size.clip)
    assert vae.encode(torch.empty(1, 3, *size.clip, device="meta")).mean.shape == (1, *shape)


@EVERY_FAMILY
def test_an_unknown_value_is_refused_and_the_nearest_named(family):
    theirs = family.write(next(iter(family.sizes.values())).config)
    first = next(iter(theirs))
    with pytest.raises(CheckpointError, match=first):
        family.read(theirs | {f"{first}s": 3})


@EVERY_FAMILY
def test_a_side_that_does_not_fit_is_refused_with_the_nearest(family):
    config = next(iter(family.sizes.values())).config
    stride = config.spatial_stride
    with pytest.raises(ConfigError, match=f"nearest: {stride} or {2 * stride}"):
        config.latent_shape(1, stride, stride + 1)


TINY = autoencoder(base=4, decoder_base=4, latent=2, multiples=(1, 2), blocks=1, halvings=(True,))


@pytest.fixture
def vae():
    torch.manual_seed(0)
    return CausalVAE(TINY).requires_grad_(False)


def test_an_autoencoder_is_loaded_in_the_type_asked_for_and_channels_last(vae, tmp_path):
    save_vae(vae, tmp_path / "vae", WAN_VAE)
    loaded = reelflow.load_vae(tmp_path / "vae", dtype=torch.bfloat16)
    assert {x.dtype for x in loaded.state_dict().values()} == {torch.bfloat16}
    assert loaded.encoder[0].conv.weight.is_contiguous(memory_format=torch.channels_last_3d)
    assert not loaded.training
    clip = torch.zeros(1, 3, 5, 4, 4)
    with torch.no_grad():
        assert torch.equal(load_vae(tmp_path / "vae").encode(clip).mean, vae.encode(clip).mean)


@pytest.mark.parametrize(
    "family", [each for each in AUTOENCODERS if each is not WAN_VAE], ids=lambda family: family.name
)
def test_an_autoencoder_is_not_written_as_one_of_another_family(family, vae, tmp_path):
    with pytest.raises(ConfigError, match=f"the network is none of {family.name}"):
        save_vae(vae, tmp_path / "vae", family)
    assert not (tmp_path / "vae").exists()


def test_statistics_that_the_file_has_no_place_for_are_not_lost_silently(vae, tmp_path):
    vae.set_statistics(torch.zeros(2), torch.tensor([1.0, 2.0]))
    with pytest.raises(CheckpointError, match="latent_std is not what the configuration makes of it"):
        save_vae(vae, tmp_path / "vae", WAN_VAE)
    assert not (tmp_path / "vae").exists()


def test_a_folder_that_holds_something_else_is_refused(vae, tmp_path):
    with pytest.raises(CheckpointError, match="give the folder of one network"):
        load_vae(tmp_path)
    folder = tmp_path / "vae"
    save_vae(vae, folder, WAN_VAE)
    config = json.loads((folder / "config.json").read_text())
    for change, message in (
        ({"_class_name": "AutoencoderKLWann"}, "did you mean AutoencoderKLWan"),
        ({"num_res_blocks": 2}, r"missing .*down_blocks"),
        ({"attn_scales": [1.0]}, "attn_scales"),
    ):
        (folder / "config.json").write_text(json.dumps(config | change))
        with pytest.raises(CheckpointError, match=message):
            load_vae(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="not JSON"):
        load_vae(folder)
