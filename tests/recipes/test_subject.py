"""A subject is learned beside what the model made before: on the synthetic world, small."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from test_recipe import tiny

from reelflow.config import from_dict, to_dict
from reelflow.data.store import Store
from reelflow.data.worlds import World, split_combinations
from reelflow.errors import ConfigError, DataError
from reelflow.generation.pipeline import Pipeline
from reelflow.models.adapters import LoRA
from reelflow.models.dit import VideoDiT
from reelflow.models.vae import CausalVAE
from reelflow.recipes.recipe import Prior, Recipe, SubjectData, WorldData
from reelflow.recipes.runs import run
from reelflow.recipes.subject import score_subject, small_world, subject_world
from reelflow.training.flow import FlowTask, Preserved

QUIET = Console(quiet=True)
PRIOR = Prior(("a red disc moving up", "a blue disc moving up"), num_clips=5, weight=0.5, seed=3)
SMALL = World(height=32, width=32, num_frames=9)
DISC = SubjectData(
    world=SMALL,
    colour="magenta",
    shape="disc",
    word="zwx",
    shown=("still",),
    unshown=("left", "up"),
    num_clips=2,
    num_validation=2,
    seed=0,
)


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """A model that has learned nothing, its transformer random everywhere."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        card = tiny().card()
        pipeline = Pipeline(card, CausalVAE(card.vae), VideoDiT(card.dit))
        for parameter in pipeline.dit.parameters():
            torch.nn.init.normal_(parameter, std=0.1)
    folder = tmp_path_factory.mktemp("base") / "model"
    pipeline.save(folder)
    return folder


def subject(base: Path, adapter: LoRA | None) -> Recipe:
    recipe = tiny()
    training = replace(recipe.dit.training, preview_every=0)
    return replace(
        recipe,
        data=DISC,
        vae=replace(recipe.vae, pretrained=str(base)),
        dit=replace(recipe.dit, pretrained=str(base), adapter=adapter, prior=PRIOR, training=training),
    )


@pytest.mark.parametrize("adapter", [None, LoRA(rank=2, magnitudes=True)], ids=["all of it", "an adapter"])
def test_every_batch_brings_as_many_clips_that_the_model_made_before(base, adapter, tmp_path, monkeypatch):
    loss, batches = FlowTask.loss, []

    def watching(self, batch, generator):
        if isinstance(batch, Preserved):
            batches.append(batch)
        return loss(self, batch, generator)

    monkeypatch.setattr(FlowTask, "loss", watching)
    assert run(subject(base, adapter), tmp_path / "run", console=QUIET).model is not None
    assert len(batches) == 3
    assert all(len(batch.own.posterior.mean) == len(batch.prior.posterior.mean) == 2 for batch in batches)
    store = Store.open(tmp_path / "run" / "latents_prior")
    made = Pipeline.load(base).generate(["a red disc moving up", "a blue disc moving up"], seed=3, output="latents")
    torch.testing.assert_close(store.batch("mean", torch.arange(2)), made.half(), atol=2e-3, rtol=2e-3)
    assert [store.meta(row) for row in (1, 4)] == [
        {"caption": "a blue disc moving up", "seed": 4},
        {"caption": "a red disc moving up", "seed": 7},
    ]
    assert len(store.fingerprint["model"]) == 64
    assert (tmp_path / "run" / "latents_prior" / "clips.png").is_file()
    every = store.batch("mean", torch.arange(5)).float()
    for batch in batches:
        assert batch.weight == 0.5
        assert all(any(torch.equal(clip, each) for each in every) for clip in batch.prior.posterior.mean)
        assert torch.allclose(batch.prior.posterior.sample(), batch.prior.posterior.mean, atol=1e-5)
    lines = [json.loads(line) for line in (tmp_path / "run" / "dit" / "log.jsonl").read_text().splitlines()]
    parts = [line for line in lines if "prior" in line]
    assert len(parts) == 3
    assert all(line["loss"] == pytest.approx(line["own"] + 0.5 * line["prior"]) for line in parts)


def test_a_subject_s_clips_are_called_by_its_word_and_those_set_aside_move_otherwise(base, tmp_path):
    run(subject(base, None), tmp_path / "run", console=QUIET)
    captions = {
        name: [path.read_text() for path in sorted((tmp_path / "run" / name).glob("*.txt"))]
        for name in ("videos", "videos_unseen")
    }
    for name, texts in captions.items():
        assert len(texts) == 2
        assert all("zwx" in text and "disc" in text and "magenta" not in text for text in texts)
        assert all(("still" in text or "not moving" in text) == (name == "videos") for text in texts)
    weights = load_file(tmp_path / "run" / "model" / "dit.safetensors")
    assert any(not torch.equal(x, weights[name]) for name, x in Pipeline.load(base).dit.state_dict().items())
    scores = score_subject(Pipeline.load(tmp_path / "run"), DISC, per_prompt=2)
    assert (scores.subject.num_clips, scores.others.num_clips) == (4, 12)


def test_a_prior_of_another_model_is_not_taken(base, tmp_path):
    recipe = subject(base, None)
    run(recipe, tmp_path / "run", console=QUIET)
    for name in ("model", "dit"):
        (tmp_path / "run" / name).rename(tmp_path / f"old-{name}")
    other = tmp_path / "other"
    pipeline = Pipeline.load(base)
    with torch.no_grad():
        next(pipeline.dit.parameters()).add_(1)
    pipeline.save(other)
    stage = replace(recipe.dit, pretrained=str(other))
    (tmp_path / "run" / "recipe.json").write_text(json.dumps(to_dict(replace(recipe, dit=stage))))
    with pytest.raises(DataError, match=r"latents_prior was made from something else: .*model"):
        run(replace(recipe, dit=stage), tmp_path / "run", console=QUIET)


def test_a_world_without_a_thing_never_shows_it():
    whole = WorldData(world=SMALL, num_clips=1, num_validation=1, seed=0)
    assert whole.combinations == split_combinations(seed=0)
    learned, held_out = replace(whole, without=(("magenta", "ring"),)).combinations
    assert not any((each.colour, each.shape) == ("magenta", "ring") for each in learned + held_out)
    assert len(learned + held_out) == 144 - 6
    corner = replace(whole, names=("red", "disc", "ring", "left", "up")).combinations
    assert sorted(corner[0] + corner[1]) == sorted(
        ("red", shape, way) for shape in ("disc", "ring") for way in ("left", "up")
    )
    held_out = small_world().data.combinations[1]
    assert held_out


def test_the_recipes_of_a_subject_fit_their_base_and_survive_json():
    recipe, base = subject_world("runs/base"), small_world()
    assert (recipe.dit.model, recipe.vae.model, recipe.text) == (base.dit.model, base.vae.model, base.text)
    assert from_dict(Recipe, json.loads(json.dumps(to_dict(recipe)))) == recipe
    assert isinstance(recipe.data, SubjectData)
    assert recipe.dit.prior is not None
    assert not any(recipe.data.colour in text or recipe.data.word in text for text in recipe.dit.prior.prompts)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"word": "red"}, "one word in lower case that captions do not know yet, got 'red'"),
        ({"word": "two words"}, "one word"),
        ({"colour": "magneta"}, "did you mean magenta"),
        ({"shown": ()}, "is shown in some motions and set aside in others"),
        ({"unshown": ("still",)}, "is shown in some motions"),
    ],
)
def test_a_subject_that_cannot_be_is_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        replace(DISC, **changes)


def test_a_prior_that_cannot_be_is_refused():
    with pytest.raises(ConfigError, match=r"set dit\.pretrained, or leave dit\.prior out"):
        replace(tiny().dit, prior=PRIOR)
    for changes in ({"prompts": ()}, {"num_clips": 0}, {"weight": 0.0}):
        with pytest.raises(ConfigError, match=r"nearest to none at all: dit\.prior=null"):
            replace(PRIOR, **changes)


@pytest.mark.slow
def test_a_prior_keeps_the_class_when_all_of_the_transformer_learns_a_subject(tmp_path):
    base = tmp_path / "small-world"
    assert run(small_world(), base, console=QUIET).model is not None
    recipe = subject_world(str(base))
    training = replace(recipe.dit.training, optimizer=replace(recipe.dit.training.optimizer, lr=5e-4))
    dit = replace(recipe.dit, adapter=None, training=training)
    scores = []
    for name, prior in (("full_prior", dit.prior), ("full_alone", None)):
        run(replace(recipe, dit=replace(dit, prior=prior)), tmp_path / name, console=QUIET)
        scores.append(score_subject(Pipeline.load(tmp_path / name), recipe.data))
    kept, lost = scores
    assert min(each.subject.colour for each in scores) > 0.9
    assert min(each.subject.motion for each in scores) > 0.8
    assert kept.others.colour > 0.95 > 0.8 > lost.others.colour
    assert kept.taken < 0.03 < 0.1 < lost.taken
