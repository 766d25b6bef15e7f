"""A recipe by torchrun, as a user starts it."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console
from test_recipe import tiny

from reelflow.config import to_dict
from reelflow.data.loader import Packed
from reelflow.errors import ConfigError
from reelflow.models.adapters import LoRA
from reelflow.models.weights import read_tensors
from reelflow.parallel.mesh import MeshConfig
from reelflow.parallel.shard import ParallelConfig
from reelflow.recipes.recipe import Recipe
from reelflow.recipes.runs import run

QUIET = Console(quiet=True)


def dealt() -> Recipe:
    """Two batches a step, and no Muon, which rounds to bfloat16."""
    base = tiny()
    optimizer = replace(base.dit.training.optimizer, muon_lr=None)
    training = replace(base.dit.training, accumulate=2, precision="fp32", optimizer=optimizer)
    return replace(base, dit=replace(base.dit, training=training))


def on_mesh(recipe: Recipe, **mesh: int) -> Recipe:
    return replace(recipe, dit=replace(recipe.dit, parallel=ParallelConfig(MeshConfig(**mesh))))


def test_two_processes_that_torchrun_starts_learn_what_one_does_and_one_can_go_on(tmp_path):
    recipe = on_mesh(dealt(), shard=2)
    assignments = [f"{name}={json.dumps(value)}" for name, value in to_dict(recipe).items()]
    sets = [part for assignment in assignments for part in ("--set", assignment)]
    alone = run(dealt(), tmp_path / "one", console=QUIET)
    folder = tmp_path / "two"  # from the same latents: x264 does not give the same files every time
    shutil.copytree(alone.folder, folder, ignore=lambda _, names: {"dit", "model"} & set(names))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*torchrun, "-m", "reelflow", "train", "world", *sets, "--out", str(folder)]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("is ready; try: reelflow generate") == 1  # one process speaks
    for ours, theirs in zip(weights(folder), weights(alone.folder), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)
    again = run(dealt(), folder, console=QUIET)  # the mesh may change
    assert again.model == folder / "model"


def weights(folder: Path) -> list[torch.Tensor]:
    found = read_tensors(folder / "model" / "dit.safetensors")
    return [found[name] for name in sorted(found)]


def test_a_mesh_is_refused_before_anything_begins(tmp_path):
    with pytest.raises(ConfigError, match=r"2 processes cannot share .*accumulate=1.* nearest: batch_size=1"):
        on_mesh(tiny(), shard=2)
    cut = ParallelConfig(MeshConfig(shard=2, tensor=2))
    with pytest.raises(ConfigError, match=r"an adapter .* tensor=2 cuts.* nearest: .*tensor=1 and .*shard=4"):
        replace(dealt().dit, pretrained="x", adapter=LoRA(rank=2), parallel=cut)
    with pytest.raises(ConfigError, match=r"compiled blocks .*nearest: dit\.parallel\.compile=none"):
        replace(dealt().dit, parallel=ParallelConfig(compile="blocks"), batches=Packed(100))
    with pytest.raises(ConfigError, match=r"shard=2 is of 2 processes, but there are 1.*torchrun --nproc-per-node 2"):
        run(on_mesh(dealt(), shard=2), tmp_path / "run", console=QUIET)
    assert not (tmp_path / "run").exists()
