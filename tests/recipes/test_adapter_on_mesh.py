"""A recipe of an adapter, with clips that the network made before beside a subject's, in two processes."""

import os
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import test_fine_tuning
import torch
from rich.console import Console
from safetensors.torch import load_file
from test_subject import subject

from reelflow.families.adapters import load_adapter
from reelflow.generation.pipeline import Pipeline
from reelflow.models.adapters import LoRA, merge
from reelflow.parallel.mesh import MeshConfig
from reelflow.parallel.shard import ParallelConfig
from reelflow.recipes.recipe import Recipe
from reelflow.recipes.runs import run

sys.path.append(str(Path(__file__).parents[1] / "parallel"))
import processes

QUIET = Console(quiet=True)
FILES = ("adapter/adapter_model.safetensors", "model/dit.safetensors")
base = test_fine_tuning.base


def recipe_of(base: Path) -> Recipe:
    """Two batches a step, from a subject and its class; samples are shown at the end."""
    recipe = subject(base, LoRA(rank=2, magnitudes=True))
    optimizer = replace(recipe.dit.training.optimizer, eps=1e-4)  # or rounding decides where gradients are all but zero
    training = replace(recipe.dit.training, accumulate=2, precision="fp32", optimizer=optimizer, preview_every=3)
    return replace(recipe, dit=replace(recipe.dit, training=training))


def on_two(recipe: Recipe, folder: Path) -> Path | None:
    parallel = ParallelConfig(MeshConfig(shard=2), recompute="blocks")
    os.environ["WORLD_SIZE"] = "2"  # as torchrun does
    try:
        return run(replace(recipe, dit=replace(recipe.dit, parallel=parallel)), folder, console=QUIET).model
    finally:
        del os.environ["WORLD_SIZE"]


def test_an_adapter_learned_by_two_processes_is_that_of_one_and_one_can_go_on(base, tmp_path):
    recipe, folder = recipe_of(base), tmp_path / "two"
    alone = run(recipe, tmp_path / "one", console=QUIET).folder
    shutil.copytree(alone, folder, ignore=lambda _, names: {"dit", "adapter", "model"} & set(names))
    assert processes.run(2, on_two, recipe, folder) == 2 * [folder / "model"]
    found = {name: load_file(folder / name) for name in FILES}
    for name, tensors in found.items():
        expected = load_file(alone / name)
        assert tensors.keys() == expected.keys()
        for key, value in tensors.items():
            torch.testing.assert_close(value, expected[key], rtol=0, atol=1e-6)
    config = "adapter/adapter_config.json"
    assert (folder / config).read_bytes() == (alone / config).read_bytes()
    assert [path.name for path in (folder / "dit" / "previews").iterdir()] == ["00000003.png"]
    dit = Pipeline.load(base).dit
    merge(dit, [(load_adapter(folder / "adapter", dit), 1.0)])
    for key, value in dit.state_dict().items():
        torch.testing.assert_close(found[FILES[1]][key], value, rtol=0, atol=1e-6)

    shutil.rmtree(folder / "model")  # killed before it was written: the weights that two have left serve one
    shutil.rmtree(folder / "dit" / "step-00000003")
    assert run(recipe, folder, console=QUIET).model == folder / "model"
    for key, value in load_file(folder / FILES[0]).items():
        torch.testing.assert_close(value, found[FILES[0]][key], rtol=0, atol=1e-6)
