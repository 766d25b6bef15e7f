"""Every Python snippet in README.md and docs/ runs, in order, against a small model of random weights."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from families.tiny import wan as tiny_wan
from reelflow.generation.pipeline import ModelCard, Pipeline
from reelflow.models.blocks import Dual, Single
from reelflow.models.context import Layers
from reelflow.models.dit import DiTConfig, VideoDiT
from reelflow.models.vae import CausalVAE, Stage, staged
from reelflow.recipes.world import world

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.fixture
def demo_folder(tmp_path, monkeypatch):
    """A working folder that holds `demo/run`, as after `make demo`, with networks too small to be any good."""
    torch.manual_seed(0)
    recipe = world()
    vae = staged(
        latent_channels=4,
        patch=4,
        encoder=(Stage(32, 0, space=2, time=4), Stage(32, 0)),
        decoder=(Stage(32, 0), Stage(32, 0, space=2, time=4)),
    )
    dit = DiTConfig(
        in_channels=4,
        dim=32,
        num_heads=2,
        rope=(4, 6, 6),
        layers=(Dual(), Single()),
        context=Layers(recipe.text.dim),
        vector_dim=recipe.text.dim,
    )
    card = ModelCard(vae, dit, recipe.text, recipe.clip, replace(recipe.sampling, num_steps=2))
    Pipeline(card, CausalVAE(vae), VideoDiT(dit)).save(tmp_path / "demo" / "run" / "model")
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="session")
def published_folder(tmp_path_factory):
    """A published system of tiny random networks."""
    path = tmp_path_factory.mktemp("published") / "system"
    tiny_wan(path)
    return path


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_snippets_run(page, demo_folder, request):
    if page.name == "published.md":
        Path("Wan2.1-T2V-1.3B-Diffusers").symlink_to(request.getfixturevalue("published_folder"))
    names: dict[str, object] = {}
    for snippet in re.findall(r"^```python\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE):
        exec(compile(snippet, str(page), "exec"), names)


def test_files_that_the_pages_name_exist():
    for page in PAGES:
        for target in re.findall(r"\]\(([\w./-]+)\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"
        for file in re.findall(r"`((?:\w+/)+\w+\.(?:py|md))`", page.read_text()):
            assert any((base / file).exists() for base in (ROOT, ROOT / "src" / "reelflow")), (
                f"{page.name} names {file}"
            )
