"""From videos to shards to a transformer that has learned from them."""

import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console
from test_recipe import model_bytes, tiny

from reelflow.config import set_values
from reelflow.data.shards import Sample, ShardWriter, StoreSamples, shards_from_store
from reelflow.data.store import Store
from reelflow.errors import ConfigError, DataError
from reelflow.generation.pipeline import Pipeline
from reelflow.recipes.build import BuildConfig, build
from reelflow.recipes.recipe import Recipe
from reelflow.recipes.runs import run, train_autoencoder
from reelflow.recipes.sets import ShardsData
from reelflow.training.flow import FlowTask

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


@pytest.fixture(scope="module")
def mixed(base) -> ShardsData:
    """A run's latents, and a set of the same cut to several shapes."""
    rows, folder = StoreSamples(Store.open(base / "latents")), base.parent / "mixed"
    with ShardWriter(folder, fingerprint=rows.store.fingerprint, shard_bytes=20_000) as writer:
        for number in range(24):
            frames, side = (1, 2, 3)[number % 3], (2, 4)[number // 3 % 2]
            row = rows.read(number % len(rows))
            cut = {name: row.tensors[name][:, :frames, :side] for name in ("mean", "logvar")}
            writer.add(Sample(f"{number:08d}", {**row.tensors, **cut}, row.meta))
        writer.finish()
    shards_from_store(Store.open(base / "latents_unseen"), base.parent / "held")
    return ShardsData(sets=(str(folder), str(base.parent / "held")), validation=str(base.parent / "held"), reservoir=10)


def grouped(base: Path, data: ShardsData, *assignments: str) -> Recipe:
    brief = {"steps": 4, "precision": "fp32", "validate_every": 0, "preview_every": 0}
    values = [f"dit.training.{name}={value}" for name, value in brief.items()]
    return set_values(on_shards(base, data), [*values, *assignments])


@pytest.mark.parametrize("kind", ["packed", "buckets"])
def test_a_transformer_learns_from_sets_of_several_shapes_and_goes_on_where_it_was_stopped(
    base, mixed, tmp_path, monkeypatch, kind
):
    recipe = grouped(base, mixed, f'dit.batches={{"kind": "{kind}", "tokens": 64}}')
    loss, seen = FlowTask.loss, []

    def seeing(self, batch, generator):
        parts = batch if isinstance(batch, list) else [batch]
        seen.append([tuple(part.posterior.mean.shape) for part in parts])
        if len(seen) == 4 + 3:
            os.kill(os.getpid(), signal.SIGINT)
        return loss(self, batch, generator)

    monkeypatch.setattr(FlowTask, "loss", seeing)
    assert run(recipe, tmp_path / "whole", console=QUIET).model is not None
    assert len({shape[2:] for batch in seen for shape in batch}) > 2
    assert all(shape[0] == 1 for batch in seen for shape in batch) == (kind == "packed")
    assert run(recipe, tmp_path / "parts", console=QUIET).model is None
    assert run(recipe, tmp_path / "parts", console=QUIET).model is not None
    assert seen[4:] == seen[:4]
    assert model_bytes(tmp_path / "parts") == model_bytes(tmp_path / "whole")


def test_sets_of_several_shapes_need_to_be_told_how_they_make_batches(base, mixed, tmp_path):
    with pytest.raises(DataError, match=r"mixed holds latents of \(1, 2, 4\) .* gives \(3, 4, 4\); .* dit\.batches"):
        run(grouped(base, mixed), tmp_path / "alone", console=QUIET)
    held = replace(mixed, sets=(mixed.validation,))
    small = grouped(base, held, 'dit.batches={"kind": "packed", "tokens": 40}')
    wide = ShardWriter(tmp_path / "wide", fingerprint=Store.open(base / "latents").fingerprint)
    with wide as writer:
        writer.add(Sample("a", {name: torch.zeros(4, 9, 4, 4) for name in ("mean", "logvar")}))
        writer.finish()
    with pytest.raises(ConfigError, match=r"of 40 tokens cannot hold an item of \d+; nearest: tokens="):
        run(replace(small, data=replace(held, sets=(str(tmp_path / "wide"),))), tmp_path / "small", console=QUIET)


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
