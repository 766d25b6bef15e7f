import pytest
import torch
from rich.console import Console

from reelflow.cli.recipes import find_recipe, known_recipes
from reelflow.generation.pipeline import Pipeline
from reelflow.models.dit import DiTConfig
from reelflow.recipes.runs import run

NAMES = [name for name in known_recipes() if name.startswith("vdit")]
BRIEF = ["data.num_clips=4", "data.num_validation=2", "sampling.num_steps=2"] + [
    f"{stage}.training.{name}={value}"
    for stage in ("vae", "dit")
    for name, value in (("steps", 2), ("batch_size", 2), ("validate_every", 0), ("checkpoint_every", 0))
]


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_becomes_a_model_that_makes_clips_of_prompts(name, tmp_path):
    finished = run(find_recipe(name, BRIEF), tmp_path / "run", console=Console(quiet=True))
    pipeline = Pipeline.load(finished.model)
    clips = pipeline.generate(["a red disc moving left", "a blue ring staying still"], seed=1)
    assert clips.shape == (2, 3, 9, 32, 32)
    assert torch.isfinite(clips).all()
    assert torch.equal(pipeline.generate(["a blue ring staying still"], seed=2)[0], clips[1])


def test_recipes_differ_in_their_transformer_alone():
    """Size, data and steps are the same, so that what differs in a result is the model's."""
    recipes = [find_recipe(name, []) for name in NAMES]
    for recipe in recipes[1:]:
        assert (recipe.data, recipe.clip, recipe.dit.training) == (
            recipes[0].data,
            recipes[0].clip,
            recipes[0].dit.training,
        )
    models: list[DiTConfig] = [recipe.dit.model for recipe in recipes]
    assert {(m.dim, m.num_heads, len(m.layers)) for m in models} == {(128, 2, 4)}
    assert len({m.layers for m in models}) >= len(models) - 1  # the pixel model has its sibling's blocks
