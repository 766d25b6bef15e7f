"""A transformer of ours trained on: all of it, or an adapter."""

import json
import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from test_recipe import tiny

from reelflow.conditioning.text import HashedWords
from reelflow.config import from_dict, set_values, to_dict
from reelflow.errors import ConfigError
from reelflow.families.adapters import load_adapter
from reelflow.generation.pipeline import Pipeline, read_card
from reelflow.models.adapters import LoRA, merge
from reelflow.models.dit import VideoDiT
from reelflow.models.vae import CausalVAE
from reelflow.recipes.recipe import Recipe
from reelflow.recipes.runs import run
from reelflow.training.adapter import AdapterTask

QUIET = Console(quiet=True)


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """A model that has learned nothing, its transformer random everywhere."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        card = tiny().card(("magenta",))
        pipeline = Pipeline(card, CausalVAE(card.vae), VideoDiT(card.dit))
        for parameter in pipeline.dit.parameters():
            torch.nn.init.normal_(parameter, std=0.1)
    folder = tmp_path_factory.mktemp("base") / "model"
    pipeline.save(folder)
    return folder


def tuned(base: Path, adapter: LoRA | None = LoRA(rank=2)) -> Recipe:
    recipe = tiny()
    world = replace(recipe.data, seed=1)
    return replace(
        recipe,
        data=world,
        vae=replace(recipe.vae, pretrained=str(base)),
        dit=replace(
            recipe.dit,
            pretrained=str(base),
            adapter=adapter,
            training=replace(recipe.dit.training, preview_every=0),
        ),
    )


@pytest.fixture(scope="module")
def finished(base, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tuned") / "run"
    run(tuned(base), folder, console=QUIET)
    return folder


def test_the_finished_model_is_the_pretrained_one_with_the_adapter_in_its_weights(base, finished):
    dit = Pipeline.load(base).dit
    before = {name: x.clone() for name, x in dit.state_dict().items()}
    merge(dit, [(load_adapter(finished / "adapter", dit), 1.0)])
    made = load_file(finished / "model" / "dit.safetensors")
    assert all(torch.allclose(x, made[name], atol=1e-6) for name, x in dit.state_dict().items())
    changed = {name for name, x in made.items() if not torch.equal(x, before[name])}
    assert changed == {f"{name}.weight" for name in load_adapter(finished / "adapter", dit).updates}
    assert {path.name for path in (finished / "adapter").iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    assert "magenta" in read_card(finished).words


def test_the_log_says_what_the_adapter_changes(finished):
    lines = [json.loads(line) for line in (finished / "dit" / "log.jsonl").read_text().splitlines()]
    changes = [line["change"] for line in lines if "change" in line]
    assert len(changes) == 2
    assert all(change > 0 for change in changes)


def test_an_interrupted_run_goes_on_to_the_same_adapter_bit_for_bit(base, finished, tmp_path, monkeypatch):
    loss, calls = AdapterTask.loss, []

    def interrupting(self, batch, generator):
        calls.append(None)
        if len(calls) == 1:
            os.kill(os.getpid(), signal.SIGINT)
        return loss(self, batch, generator)

    shutil.copytree(finished / "videos", tmp_path / "run" / "videos")  # whose bytes an encoder may make otherwise
    (tmp_path / "run" / "recipe.json").write_text((finished / "recipe.json").read_text())
    monkeypatch.setattr(AdapterTask, "loss", interrupting)
    assert run(tuned(base), tmp_path / "run", console=QUIET).model is None
    assert run(tuned(base), tmp_path / "run", console=QUIET).model is not None
    for name in ("adapter/adapter_model.safetensors", "model/dit.safetensors"):
        assert (tmp_path / "run" / name).read_bytes() == (finished / name).read_bytes()


def test_without_an_adapter_all_of_it_is_trained_on(base, finished, tmp_path):
    for name in ("videos", "videos_unseen", "clips", "clips_unseen"):
        if (finished / name).exists():
            shutil.copytree(finished / name, tmp_path / "run" / name)
    (tmp_path / "run" / "recipe.json").write_text(json.dumps(to_dict(tuned(base, None))))
    result = run(tuned(base, None), tmp_path / "run", console=QUIET)
    before, made = (Pipeline.load(path).dit.state_dict() for path in (base, result.folder))
    distance = {name: float((made[name] - x).norm() / x.norm()) for name, x in before.items()}
    assert 0 < max(distance.values()) < 0.9  # a new one would be farther away
    assert not (result.folder / "adapter").exists()


def test_a_recipe_with_an_adapter_survives_json_and_is_set_by_its_path():
    recipe = tuned(Path("runs/base"), LoRA(rank=4, targets=("mlp",), magnitudes=True))
    assert from_dict(Recipe, json.loads(json.dumps(to_dict(recipe)))) == recipe
    assert set_values(recipe, ["dit.adapter.rank=8"]).dit.adapter == LoRA(rank=8, targets=("mlp",), magnitudes=True)


def test_what_an_adapter_cannot_be_learned_for_is_refused(base, tmp_path):
    with pytest.raises(ConfigError, match=r"set dit\.pretrained"):
        replace(tiny().dit, adapter=LoRA(rank=1))
    with pytest.raises(ConfigError, match=r"set vae\.pretrained=runs/base"):
        replace(tiny(), dit=replace(tiny().dit, pretrained="runs/base"))
    recipe = tuned(base)
    assert isinstance(recipe.text, HashedWords)
    with pytest.raises(ConfigError, match=r"text of .* differ from the recipe's; copy them"):
        run(replace(recipe, text=replace(recipe.text, max_words=20)), tmp_path / "run", console=QUIET)
