import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console
from test_recipe import tiny

from reelflow.cli.recipes import find_recipe
from reelflow.config import from_dict, to_dict
from reelflow.data.store import Store
from reelflow.errors import ConfigError
from reelflow.generation.pipeline import Pipeline
from reelflow.models.coder import Act, Conv, Fold, Nearest, Padding, Part, Unfold
from reelflow.models.dit import VideoDiT
from reelflow.models.inflate import inflated
from reelflow.models.linear import linear
from reelflow.models.vae import CausalVAE, VAEConfig
from reelflow.models.weights import load_weights
from reelflow.recipes.recipe import FolderData, Recipe, WorldData
from reelflow.recipes.runs import run, train_autoencoder
from reelflow.training.autoencoder import Crops, to_float
from reelflow.training.discriminator import Adversarial

QUIET = Console(quiet=True)


def zeros(channels: int, space: int = 1) -> Conv:
    pad = Padding("zeros", "zeros" if space == 1 else "after")
    return Conv(channels, (1, 3), (1, space), pad)


IMAGES = VAEConfig(
    4,
    (zeros(8), Act(), zeros(8, 2), Act(), zeros(8, 2), Act(), zeros(8)),
    (zeros(8), Act(), Nearest(), zeros(8), Act(), Nearest(), zeros(12)),
    patch=2,
)


def images() -> Recipe:
    base = tiny()
    return replace(base, vae=replace(base.vae, model=IMAGES), dit=replace(base.dit))


def saved(recipe: Recipe, folder: Path) -> CausalVAE:
    """Write a model folder of untrained networks, and return its autoencoder."""
    torch.manual_seed(3)
    vae = CausalVAE(recipe.vae.model).eval()
    vae.set_statistics(torch.full((4,), 0.1), torch.full((4,), 0.7))
    Pipeline(recipe.card(("a", "disc")), vae, VideoDiT(recipe.dit.model).eval()).save(folder)
    return vae


def trained(recipe: Recipe, folder: Path) -> CausalVAE:
    file = train_autoencoder(recipe, folder, console=QUIET)
    assert file is not None
    vae = CausalVAE(recipe.vae.model).eval()
    load_weights(file, vae)
    return vae


def log(folder: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (folder / "vae" / "log.jsonl").read_text().splitlines()]


def test_recipes_for_fine_autoencoders_can_be_named():
    world, real = find_recipe("fine-world", []), find_recipe("real-clips", ["data.folder=here"])
    assert isinstance(world.data, WorldData)
    assert isinstance(real.data, FolderData)
    for recipe in (world, real):  # as a run writes and reads them
        assert from_dict(Recipe, json.loads(json.dumps(to_dict(recipe)))) == recipe


def projected(**network: tuple[Part, ...]) -> Recipe:
    base = tiny()
    return replace(base, vae=replace(base.vae, model=linear(4, patch=4, space=2, time=4, **network), start="linear"))


def test_a_run_goes_on_from_its_autoencoder_here_a_projection_that_needs_no_training(tmp_path):
    file = train_autoencoder(projected(), tmp_path / "run", console=QUIET)
    before = file.read_bytes()
    assert not (tmp_path / "run" / "latents").exists()
    (line,) = log(tmp_path / "run")
    assert line["psnr"] > 15  # a grey clip is at 9
    assert run(projected(), tmp_path / "run", console=QUIET).model is not None
    assert file.read_bytes() == before


def test_a_network_beside_a_projection_learns_and_leaves_it_as_it_was_fitted(tmp_path):
    encoder = (Conv(8), Conv(2, (1, 1)), Fold(2, 4), Act(), Conv(8))
    decoder = (Conv(32), Act(), Conv(256, (1, 1)), Unfold(2, 4), Act(), Conv(48))
    alone = trained(projected(), tmp_path / "alone")
    wider = projected(encoder=encoder, decoder=decoder)
    # Both are fitted to the same files: a video encoder's bytes are not ours to promise (docs/log.md).
    shutil.copytree(tmp_path / "alone" / "videos", tmp_path / "beside" / "videos")
    (tmp_path / "beside" / "recipe.json").write_text(json.dumps(to_dict(wider)))
    beside = trained(wider, tmp_path / "beside")
    fitted, after = (dict(vae.named_parameters()) for vae in (alone, beside))
    kernel = after["encoder.0.shortcut.1.conv.weight"]
    torch.testing.assert_close(kernel[:4], fitted["encoder.1.conv.weight"])
    assert not kernel[4:].any()
    assert all(after[f"{side}.0.layers.{n}.conv.weight"].any() for side, n in (("encoder", 4), ("decoder", 5)))
    first, *_, last = (line["psnr"] for line in log(tmp_path / "beside") if "psnr" in line)
    assert min(first, last) > log(tmp_path / "alone")[0]["psnr"] - 1


def test_a_decoder_tuned_alone_decodes_the_latents_of_before(tmp_path):
    before = saved(tiny(), tmp_path / "model")
    base = tiny()
    loss = replace(base.vae.loss, learned="decoder", adversarial=Adversarial(start=1, channels=8, layers=1))
    stage = replace(base.vae, pretrained=str(tmp_path / "model"), tuned=True, loss=loss)
    after = trained(replace(base, vae=stage), tmp_path / "run")
    unseen = Store.open(tmp_path / "run" / "clips_unseen")
    clip = to_float(unseen.batch("frames", torch.arange(len(unseen))))
    assert all(torch.equal(one, two) for one, two in zip(before.encode(clip), after.encode(clip), strict=True))
    latents = before.encode(clip).mean
    assert not torch.equal(before.decode(latents), after.decode(latents))


def test_an_autoencoder_of_images_is_inflated_and_trained_near_its_latents(tmp_path):
    saved(images(), tmp_path / "model")
    base = images()
    loss = replace(
        base.vae.loss,
        identity=0.5,
        perceptual=0.1,
        schedule=(Crops(0.5, (1, 5), (16,)), Crops(1.0, (9,), (16, 32))),
        image_fraction=0.0,
    )
    stage = replace(
        base.vae,
        model=inflated(IMAGES, halvings=2),
        pretrained=str(tmp_path / "model"),
        tuned=True,
        loss=loss,
        training=replace(base.vae.training, steps=2),
    )
    after = trained(replace(base, vae=stage), tmp_path / "run")
    assert after.config.temporal_stride == 4
    lines = log(tmp_path / "run")
    steps = [line for line in lines if "identity" in line]
    assert len(steps) == 2
    last = lines[-1]
    assert {"psnr", "psnr_image", "ssim", "flicker_ratio", "perceptual", "frechet_pixel_pyramid"} <= last.keys()
    assert {"channels_used", "latent_peak", "posterior_std", "health"} <= last.keys()


def test_an_autoencoder_of_another_shape_is_not_taken(tmp_path):
    saved(tiny(), tmp_path / "model")
    stage = replace(images().vae, pretrained=str(tmp_path / "model"), tuned=True)
    with pytest.raises(ConfigError, match="has another shape"):
        train_autoencoder(replace(images(), vae=stage), tmp_path / "run", console=QUIET)


@pytest.mark.parametrize(
    ("changes", "loss", "message"),
    [
        ({"tuned": True}, {}, "vae.tuned is about an autoencoder that exists"),
        ({}, {"learned": "decoder"}, "vae.learned is about an autoencoder that exists"),
        ({"pretrained": "there"}, {"learned": "decoder"}, "set vae.pretrained and vae.tuned"),
        ({}, {"identity": 0.1}, "set vae.pretrained and vae.tuned"),
        ({"start": "linear"}, {}, "vae.start=linear fits the projection"),
    ],
)
def test_what_needs_a_pretrained_autoencoder_says_so(changes, loss, message):
    stage = tiny().vae
    with pytest.raises(ConfigError, match=message):
        replace(stage, loss=replace(stage.loss, **loss), **changes)
