"""A published system on the command line, and what is refused before anything is computed."""

import json

import pytest
import tiny
import torch

import reelflow
from reelflow.cli.main import run
from reelflow.data.video import read_clip
from reelflow.errors import CheckpointError, ConfigError
from reelflow.generation.pipeline import Progress, to_frames
from reelflow.generation.published import PublishedSampling

PROMPT = "a red kite"
SMALL = PublishedSampling(num_steps=2, height=32, width=48)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("system") / "wan"
    tiny.wan(path)
    return path


@pytest.fixture
def command(capsys, tmp_path, monkeypatch):
    """Run a command line in an empty folder; returns (status, standard output, standard error)."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        status = run([str(argument) for argument in arguments])
        return status, *capsys.readouterr()

    return call


SIZE = ("--frames", 5, "--height", 32, "--width", 48, "--steps", 2)


def test_the_file_shows_what_the_system_makes_and_can_be_made_again(command, folder):
    status, out, _ = command(
        "generate", PROMPT, "--model", folder, "-o", "a.mkv", *SIZE, "--negative", "blue", "--seed", 3
    )
    assert status == 0
    assert "5 frames of 48 x 32 at 16 fps" in out
    sampling = PublishedSampling(num_steps=2, height=32, width=48, negative_prompt="blue")
    clip = reelflow.load(folder).generate([PROMPT], num_frames=5, seed=3, sampling=sampling)
    assert torch.equal(read_clip("a.mkv").frames, to_frames(clip[0]))
    status, out, _ = command("generate", "--from", "a.json", "-o", "b.mkv")
    assert status == 0
    assert "bit for bit" in out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ("--height", 30),
            "height must be a multiple of 16 (the autoencoder's stride times the network's patch), got 30; nearest: 16 or 32",
        ),
        (("--frames", 6), "num_frames must be 1 + 4 k, got 6; nearest: 5 or 9"),
        (("--shift", 2.0), "--shift is not for this model"),
        (("--set", "guidance_scale=[1, 2]"), "one number, or one for each of 1 networks"),
        (("--steps", 0), "num_steps must be positive"),
    ],
)
def test_what_it_cannot_make_is_refused_before_weights_are_read(command, folder, monkeypatch, options, message):
    monkeypatch.setattr("reelflow.families.systems.load_transformer", None)
    status, _, err = command("generate", PROMPT, "--model", folder, "-o", "a.mkv", *SIZE, *options)
    assert status == 2
    assert message in " ".join(err.split())


def test_a_clip_of_a_batch_depends_on_its_own_seed_and_can_be_stopped(folder):
    system = reelflow.load(folder)
    both = system.generate([PROMPT, PROMPT], num_frames=5, seed=1, sampling=SMALL, output="latents")
    second = system.generate([PROMPT], num_frames=5, seed=2, sampling=SMALL, output="latents")
    torch.testing.assert_close(both[1:], second, atol=1e-4, rtol=1e-4)
    shown = []
    progress = Progress(on_step=lambda done, total: shown.append((done, total)), should_stop=lambda: True)
    stopped = system.generate([PROMPT], num_frames=5, seed=2, sampling=SMALL, output="latents", progress=progress)
    assert shown == [(1, 2)]
    assert stopped.isfinite().all()
    assert not torch.equal(stopped, second)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompts": PROMPT}, "a list"),
        ({"prompts": []}, "at least one"),
        ({"image": torch.zeros(1, 3, 32, 48)}, "reads no image"),
        ({"negative_prompts": ["a", "b"]}, "a negative prompt for each of 1"),
        ({"noise": torch.zeros(1, 16, 1, 4, 6)}, r"shaped \[1, 16, 2, 4, 6\]"),
    ],
)
def test_what_does_not_fit_the_prompts_is_refused(folder, arguments, message):
    with pytest.raises(ConfigError, match=message):
        reelflow.load(folder).generate(**{"prompts": [PROMPT], "num_frames": 5, "sampling": SMALL} | arguments)


def test_a_folder_that_is_no_known_system_is_refused(folder, tmp_path):
    index = json.loads((folder / "model_index.json").read_text())
    (tmp_path / "model_index.json").write_text(json.dumps(index | {"_class_name": "WanPipelin"}))
    with pytest.raises(CheckpointError, match="did you mean WanPipeline"):
        reelflow.load(tmp_path)
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="has no part"):
        reelflow.load(tmp_path)
