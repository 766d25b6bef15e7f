import json
from pathlib import Path

import numpy as np
import pytest

from reelflow.cli.recipes import known_recipes
from reelflow.config import to_dict
from reelflow.data.video import write_video
from reelflow.recipes.folder import folder
from reelflow.recipes.recipe import FolderData, Recipe
from reelflow.recipes.runs import Run
from reelflow.recipes.world import world
from tiny_model import CARD


@pytest.fixture
def videos(tmp_path):
    (tmp_path / "my videos").mkdir()
    rng = np.random.default_rng(0)
    for index in range(4):
        frames = rng.integers(0, 256, (9, 4, 4, 3), np.uint8).repeat(8, 1).repeat(8, 2)
        write_video(tmp_path / "my videos" / f"{index}.mp4", frames, fps=8)
        (tmp_path / "my videos" / f"{index}.txt").write_text(f"clip number {index}")
    (tmp_path / "my videos" / "broken.mp4").write_bytes(b"no video")
    return tmp_path / "my videos"


@pytest.fixture
def carried_out(monkeypatch):
    """Runs that were asked for; none is carried out, and what each returns can be chosen."""

    class Asked(list):
        model: Path | None = Path("model")

        def __call__(self, recipe: Recipe, out: Path, *, device: str, console: object) -> Run:
            self.append((recipe, out, device))
            return Run(out, self.model, {})

    asked = Asked()
    monkeypatch.setattr("reelflow.recipes.runs.run", asked)
    return asked


def test_every_recipe_is_listed_with_its_first_line(reelflow):
    status, out, _ = reelflow("train", "--list")
    assert status == 0
    names = [line.split()[0] for line in out.splitlines()]
    assert names[:2] == ["world", "folder"]
    assert names == list(known_recipes())
    assert world.__doc__.splitlines()[0] in out


@pytest.mark.parametrize("command", ["train", "plan"])
def test_a_misspelt_recipe_is_refused_with_the_nearest(reelflow, command):
    status, _, err = reelflow(command, "wrold")
    assert (status, err) == (2, "error: no recipe is called 'wrold'; did you mean world or folder or vdit-world?\n")


def test_a_recipe_goes_to_its_own_folder_with_the_values_set(reelflow, carried_out):
    status, out, _ = reelflow("train", "world", "--set", "dit.training.steps=7", "--set", "sampling.shift=2")
    ((recipe, folder, device),) = carried_out
    assert status == 0
    assert (folder, device) == (Path("runs/world"), "auto")
    assert (recipe.dit.training.steps, recipe.sampling.shift) == (7, 2.0)
    assert "80 + 12 tokens" in out.splitlines()[0]
    assert "--model runs/world" in out


def test_an_interrupted_run_says_how_to_go_on(reelflow, carried_out):
    carried_out.model = None
    status, out, _ = reelflow("train", "world", "--out", "there")
    assert status == 130
    assert "the same command goes on with there" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give a recipe"),
        (["world", "--set", "dit.training.step=7"], "did you mean steps"),
        (["world", "--set", "dit.training.steps=0"], "steps must be at least 1"),
        (["world", "--set", "clip.num_frames=18"], "nearest: 17 or 21"),
        (["world", "--data", "videos"], "no field 'folder'"),
        (["folder", "--data", "no_videos"], "no_videos"),
        (["folder"], "videos"),
        (["world", "--device", "gpu"], "'gpu' names no device; there are cpu"),
    ],
)
def test_what_cannot_be_trained_is_one_line_and_leaves_no_folder(reelflow, tmp_path, arguments, message):
    status, _, err = reelflow("train", *arguments)
    assert (status, err.count("\n")) == (2, 1)
    assert message in err
    assert list(tmp_path.iterdir()) == []


def test_the_folder_recipe_has_the_networks_of_the_world():
    assert folder().vae.model == world().vae.model
    assert folder().dit.model == world().dit.model
    assert isinstance(folder().data, FolderData)


def test_a_folder_of_videos_becomes_a_model_with_one_command(reelflow, videos, tmp_path):
    short = {"steps": 2, "batch_size": 2, "validate_every": 0, "preview_every": 0, "checkpoint_every": 0}
    card = to_dict(CARD)
    values = {
        "clip": card["clip"],
        "vae.model": card["vae"],
        "vae.loss.crop_size": 16,
        "text": card["text"],
        "dit.model": card["dit"],
        "data.num_validation": 1,
        **{f"{part}.training.{name}": value for part in ("vae", "dit") for name, value in short.items()},
    }
    settings = [word for path, value in values.items() for word in ("--set", f"{path}={json.dumps(value)}")]
    command = ["train", "folder", "--data", "my videos", "--out", "mine", *settings]
    status, out, err = reelflow(*command)
    assert (status, err) == (0, "")
    assert "broken.mp4" in out
    assert "mine/model is ready" in out
    assert reelflow(*command)[0] == 0  # finished: nothing is done twice
    status, _, err = reelflow("generate", "clip number 3", "--model", "mine", "-o", "out.mp4", "--steps", 1)
    assert (status, err) == (0, "")
    assert reelflow(*command, "--set", "dit.training.steps=3")[0] == 2
