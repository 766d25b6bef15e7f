"""The whole line, end to end, at the smallest size that walks all of it."""

import json
import os
import re
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console
from safetensors.torch import load_file, save_file

from reelflow.config import from_dict, set_values, to_dict
from reelflow.data.folder import ClipSpec
from reelflow.data.store import Store
from reelflow.data.worlds import World
from reelflow.diffusion.process import Parameterization, VariancePreserving
from reelflow.errors import ConfigError, DataError
from reelflow.generation.pipeline import read_card
from reelflow.models.vae import Stage, staged
from reelflow.recipes.demo import demo
from reelflow.recipes.page import Results
from reelflow.recipes.recipe import Recipe, WorldData
from reelflow.recipes.runs import run
from reelflow.recipes.world import world
from reelflow.training.autoencoder import AutoencoderTask

QUIET = Console(quiet=True)
MODEL_FILES = ("model.json", "vae.safetensors", "dit.safetensors")


def tiny() -> Recipe:
    base = world()
    vae = staged(
        latent_channels=4,
        patch=4,
        conv="factorised",
        resample_kernel=1,
        encoder=(Stage(16, 0, space=2, time=4),),
        decoder=(Stage(16, 0, space=2, time=4),),
    )
    brief = {
        "steps": 3,
        "batch_size": 2,
        "log_every": 1,
        "validate_every": 2,
        "preview_every": 3,
        "checkpoint_every": 2,
    }
    dit = replace(base.dit.model, in_channels=4, dim=32, num_heads=2, rope=(4, 6, 6), layers=base.dit.model.layers[:2])
    return replace(
        base,
        data=WorldData(world=World(height=32, width=32, num_frames=9), num_clips=6, num_validation=3, seed=0),
        clip=ClipSpec(num_frames=9, height=32, width=32, fps=8.0),
        vae=replace(base.vae, model=vae, training=replace(base.vae.training, **brief)),
        dit=replace(base.dit, model=dit, training=replace(base.dit.training, **brief)),
        sampling=replace(base.sampling, num_steps=2),
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> tuple[Path, bool]:
    """A folder with a finished demo, and what the demo thought of it."""
    out = tmp_path_factory.mktemp("demo") / "out"
    counts = {"per_prompt": 2, "num_familiar": 2, "num_animated": 2, "long_frames": 13}
    return out, demo(out, console=QUIET, recipe=tiny(), **counts)


def model_bytes(folder: Path) -> list[bytes]:
    return [(folder / "model" / name).read_bytes() for name in MODEL_FILES]


def test_the_demo_measures_and_shows_a_model_that_has_learned_nothing(finished):
    out, good = finished
    results = from_dict(Results, json.loads((out / "results.json").read_text()))
    assert not good
    assert {target.name for target in results.targets if target.missed_widely} >= {"Unseen clips reconstructed"}
    assert len(results.samples) == 2 * 16
    page = (out / "index.html").read_text()
    shown = re.findall(r"src=[\"']([^\"']+)", page)
    assert len(shown) == 16 + 1 + 3 + 2 * 2 + len(results.long)  # prompts, all of them, pairs, pictures, long clips
    assert [name for name in shown if not (out / name).is_file()] == []
    assert page.count("<svg") == 3


def test_the_model_is_described_as_it_was_trained(finished):
    card = read_card(finished[0] / "run")
    assert card == tiny().card(card.words)
    other = set_values(
        tiny(), ['dit.flow.parameterization={"process": {"kind": "variance_preserving"}, "prediction": "v"}']
    )
    assert other.card().parameterization == Parameterization(VariancePreserving(), "v")


@pytest.mark.parametrize(
    ("assignments", "message"),
    [
        (
            ["dit.flow.condition_dropout=0"],
            r"guidance needs an unconditional branch.*nearest: a condition_dropout of 0\.1",
        ),
        (['dit.flow.shift={"kind": "table", "rows": [[20, 1.0]]}'], "reaches from 20 to 20 tokens, got 12"),
        (["dit.flow.parameterization.prediction=noise"], "noise prediction"),
        (["dit.flow.parameterization.learned_variance=true"], "set dit.out_channels=8"),
    ],
)
def test_what_could_be_trained_but_not_sampled_or_the_reverse_is_refused_at_construction(assignments, message):
    with pytest.raises(ConfigError, match=message):
        set_values(tiny(), assignments)


def test_a_shift_that_depends_on_tokens_must_reach_images_too():
    table = 'dit.flow.shift={"kind": "table", "rows": [[12, 1.0]]}'
    set_values(tiny(), [table])
    with pytest.raises(ConfigError, match="got 4; nearest: 12"):
        set_values(tiny(), [table, "dit.flow.image_fraction=0.5"])


def test_a_finished_run_called_again_changes_nothing(finished):
    folder = finished[0] / "run"
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
    again = run(tiny(), folder, console=QUIET)
    after = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
    assert again.model == folder / "model"
    assert {path.name for path in before.keys() | after.keys() if before.get(path) != after.get(path)} <= {
        "seconds.json"
    }


def test_an_interrupted_run_goes_on_to_the_same_model_bit_for_bit(finished, tmp_path, monkeypatch):
    loss, calls = AutoencoderTask.loss, []

    def interrupting(self, batch, generator):
        calls.append(None)
        if len(calls) == 1:
            os.kill(os.getpid(), signal.SIGINT)
        return loss(self, batch, generator)

    # Both train on the same files: a video encoder's bytes are not ours to promise (docs/log.md).
    shutil.copytree(finished[0] / "run" / "videos", tmp_path / "run" / "videos")
    shutil.copy(finished[0] / "run" / "recipe.json", tmp_path / "run")
    monkeypatch.setattr(AutoencoderTask, "loss", interrupting)
    stopped = run(tiny(), tmp_path / "run", console=QUIET)
    assert stopped.model is None
    assert len(calls) == 1
    assert run(tiny(), tmp_path / "run", console=QUIET).model == tmp_path / "run" / "model"
    assert model_bytes(tmp_path / "run") == model_bytes(finished[0] / "run")


def test_a_changed_recipe_is_refused_by_the_name_of_what_changed(finished):
    changed = set_values(tiny(), ["dit.training.steps=5"])
    with pytest.raises(ConfigError, match=r"dit\.training\.steps was 3, now 5"):
        run(changed, finished[0] / "run", console=QUIET)


def test_latents_of_another_autoencoder_are_refused(finished, tmp_path):
    folder = shutil.copytree(finished[0] / "run", tmp_path / "run")
    weights = folder / "vae" / "final.safetensors"
    save_file({name: 1.5 * value for name, value in load_file(weights).items()}, weights)
    with pytest.raises(DataError, match="vae"):
        run(tiny(), folder, console=QUIET)


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "index.html").write_text("mine")
    with pytest.raises(ConfigError, match=r"holds index\.html"):
        demo(tmp_path, console=QUIET, recipe=tiny())
    assert [path.name for path in tmp_path.iterdir()] == ["index.html"]


def test_an_impossible_long_clip_is_refused_before_anything_is_made(tmp_path):
    with pytest.raises(ConfigError, match="nearest: 61 or 65"):
        demo(tmp_path / "out", console=QUIET, recipe=tiny(), long_frames=64)
    assert not (tmp_path / "out").exists()


SHAPES = 'also=[{"num_frames": 1, "height": 32, "width": 32, "fps": 8.0}, {"num_frames": 5, "height": 48, "width": 48, "fps": 8.0}]'


TOLD = ['dit.flow.tells=["aspect", "frames"]', 'dit.model.numbers=[{"channels": 8}, {"channels": 8}]']


@pytest.mark.parametrize(("kind", "told"), [("packed", TOLD), ("buckets", [])], ids=["packed, told", "buckets"])
def test_a_transformer_learns_clips_of_several_shapes(finished, tmp_path, kind, told):
    """Images, short clips and whole ones of the same videos, each in the shape that was asked for."""
    batches = f'dit.batches={{"kind": "{kind}", "tokens": 64}}'
    recipe = set_values(tiny(), [SHAPES, batches, "dit.training.steps=8", *told])
    for name in ("videos", "videos_unseen", "vae"):
        shutil.copytree(finished[0] / "run" / name, tmp_path / "run" / name)
    (tmp_path / "run" / "recipe.json").write_text(json.dumps(to_dict(recipe)))
    assert run(recipe, tmp_path / "run", console=QUIET).model is not None
    assert read_card(tmp_path / "run").tells == (("aspect", "frames") if told else ())  # as previews were, of this run
    found = {name: Store.open(tmp_path / "run" / name) for name in ("latents", "latents_1", "latents_2")}
    assert {name: (len(store), store.shape("mean")[1:]) for name, store in found.items()} == {
        "latents": (6, (3, 4, 4)),
        "latents_1": (54, (1, 4, 4)),
        "latents_2": (6, (2, 6, 6)),
    }


@pytest.mark.parametrize(
    ("assignments", "message"),
    [
        ([SHAPES], "clips of 3 shapes need dit.batches; nearest: .*tokens: 3"),
        ([SHAPES, 'dit.batches={"kind": "packed", "tokens": 20}'], "cannot hold a clip of 3.*nearest: dit.batches"),
        ([SHAPES.replace("8.0}]", "4.0}]"), 'dit.batches={"kind": "packed", "tokens": 90}'], "frame rate of clip, 8"),
        (['dit.flow.tells=["aspect"]'], r"of 0 numbers is told as many .* not aspect; nearest: 1 in dit\.numbers"),
    ],
)
def test_shapes_that_cannot_be_trained_together_are_refused(assignments, message):
    with pytest.raises(ConfigError, match=message):
        set_values(tiny(), assignments)
