"""From videos to shards to a transformer that has learned from them."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console
from test_recipe import tiny

from reelflow.data.shards import Sample, ShardWriter, shards_from_store
from reelflow.data.store import Store
from reelflow.errors import ConfigError, DataError
from reelflow.generation.pipeline import Pipeline
from reelflow.recipes.build import BuildConfig, build
from reelflow.recipes.recipe import Recipe
from reelflow.recipes.runs import run, train_autoencoder
from reelflow.recipes.sets import ShardsData

QUIET = Console(quiet=True)


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("base") / "run"
    run(tiny(), folder, console=QUIET)
    return folder


@pytest.fixture(scope="module")
def sets(base) -> tuple[str, str]:
    """One set as `data build` makes it of videos, and one as `data shards` makes it of a run's latents."""
    config = BuildConfig(tiny().clip)
    built = build(base / "videos", base.parent / "set", config, model=base)
    assert built.num_ready == built.num_kept > 0  # clips that stand still are not kept
    shards_from_store(Store.open(base / "latents_unseen"), base.parent / "aside")
    return str(base.parent / "set" / "shards"), str(base.parent / "aside")


def on_shards(base: Path, data: ShardsData) -> Recipe:
    recipe = tiny()
    return replace(recipe, data=data, vae=replace(recipe.vae, pretrained=str(base)))


def test_a_transformer_learns_from_sets_that_were_built_and_converted(base, sets, tmp_path):
    data = ShardsData(sets=sets, validation=sets[1], weights=(2, 1))
    result = run(on_shards(base, data), tmp_path / "run", console=QUIET)
    assert result.model is not None
    clip = Pipeline.load(result.model).generate(["a red disc moving left"])
    assert clip.shape == (1, 3, 9, 32, 32)
    assert torch.isfinite(clip).all()
    again = run(on_shards(base, data), tmp_path / "run", console=QUIET)  # finished: nothing is done twice
    assert again.seconds == result.seconds


def test_latents_of_another_autoencoder_and_samples_without_latents_are_refused(base, sets, tmp_path):
    with ShardWriter(tmp_path / "other", fingerprint={"vae": "0123456789abcdef"}) as writer:
        writer.add(Sample("a", {"mean": torch.zeros(4, 3, 4, 4)}))
        writer.finish()
    with pytest.raises(
        DataError, match=r"other are latents of another autoencoder \(0123456789ab\); set vae.pretrained"
    ):
        run(on_shards(base, ShardsData((sets[0],), str(tmp_path / "other"))), tmp_path / "run", console=QUIET)
    recipe = on_shards(base, ShardsData((sets[0],), sets[1]))
    longer = replace(recipe, clip=replace(recipe.clip, num_frames=13))
    with pytest.raises(DataError, match=r"latents of \[4, 3, 4, 4\], the recipe's clip gives \[4, 4, 4, 4\]"):
        run(longer, tmp_path / "longer", console=QUIET)


def test_what_shards_cannot_give_is_refused_at_once(base, sets, tmp_path):
    data = ShardsData((sets[0],), sets[1])
    with pytest.raises(ConfigError, match=r"latents of one autoencoder; set vae\.pretrained"):
        replace(tiny(), data=data)
    with pytest.raises(ConfigError, match=r"2 sets with the weights \[1\]; nearest: weights=\[1, 1\]"):
        ShardsData(sets, sets[1], weights=(1,))
    with pytest.raises(ConfigError, match=r"shards hold latents; nearest: data\.kind=folder"):
        train_autoencoder(on_shards(base, data), tmp_path / "run", console=QUIET)
