import json
import signal
from contextlib import contextmanager
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch

from reelflow.cli import generate as command
from reelflow.config import from_dict, to_dict
from reelflow.data.video import read_clip, write_image
from reelflow.generation.pipeline import to_frames
from reelflow.generation.sampling import Guidance, Method, Sampling, UniPC
from tiny_model import tiny_pipeline

PROMPT = "a red ring moving left"


@pytest.fixture
def make(reelflow, model):
    return lambda *arguments: reelflow("generate", PROMPT, "--model", model, *arguments)


@pytest.fixture
def picture(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (5, 8, 3), np.uint8).repeat(10, 0).repeat(10, 1)
    write_image(tmp_path / "first.png", pixels)
    return tmp_path / "first.png"


def frames(path):
    return read_clip(path).frames


def told(path):
    return json.loads(Path(path).read_text(encoding="utf-8"))


@contextmanager
def interrupted_at(*steps):
    """Press Ctrl-C when the bar shows these steps."""

    @contextmanager
    def bar(title, unit):
        yield lambda done, total: [signal.raise_signal(signal.SIGINT) for step in steps if step == done]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(command, "progress_bar", bar)
        yield


def test_the_file_shows_what_the_pipeline_makes(make):
    status, out, err = make("-o", "out.mkv", "--seed", 3, "--steps", 2)
    assert (status, err) == (0, "")
    assert "out.mkv: 9 frames of 32 x 32 at 8 fps" in out
    pipeline = tiny_pipeline()
    sampling = told("out.json")["sampling"]
    assert sampling == to_dict(Sampling(num_steps=2, guidance_scale=2.0))
    clip = pipeline.generate([PROMPT], seed=3, sampling=from_dict(Sampling, sampling))
    assert torch.equal(frames("out.mkv"), to_frames(clip[0]))
    assert read_clip("out.mkv").fps == 8


@pytest.mark.parametrize(
    "options",
    [
        [],
        ["--frames", 13, "--seed", 9, "--sampler", "heun", "--guidance", 1, "--shift", 2.5],
        ["--image", "first.png", "--steps", 3, "--sampler", "ancestral", "--set", "guidance.rescale=0.5"],
    ],
)
def test_from_makes_the_same_frames_bit_for_bit(make, reelflow, picture, options):
    assert make("-o", "out.mkv", *options)[0] == 0
    status, out, _ = reelflow("generate", "--from", "out.json", "-o", "other.mkv")
    assert status == 0
    assert "the same frames as out.json tells of, bit for bit" in out
    assert torch.equal(frames("out.mkv"), frames("other.mkv"))
    assert told("out.json") == told("other.json")


def test_from_says_when_the_frames_are_not_the_same(make, reelflow, tmp_path):
    make("-o", "out.mkv", "--steps", 1)
    (tmp_path / "out.json").write_text(json.dumps({**told("out.json"), "frames_sha256": 64 * "0"}))
    status, out, _ = reelflow("generate", "--from", "out.json", "-o", "other.mkv")
    assert status == 1
    assert "NOT the frames" in out


def test_from_warns_of_other_versions(make, reelflow, tmp_path):
    make("-o", "out.mkv", "--steps", 1)
    old = told("out.json")
    (tmp_path / "out.json").write_text(json.dumps({**old, "versions": {**old["versions"], "torch": "0.1"}}))
    status, _, err = reelflow("generate", "--from", "out.json", "-o", "other.mkv")
    assert status == 0
    assert "torch was 0.1" in err


def test_from_refuses_another_model_naming_both(make, reelflow, model, tmp_path):
    make("-o", "out.mkv", "--steps", 1)
    tiny_pipeline(seed=1).save(tmp_path / "other_model")
    status, _, err = reelflow("generate", "--from", "out.json", "--model", "other_model", "-o", "other.mkv")
    assert (status, err.count("\n")) == (2, 1)
    assert str(model) in err
    assert "other_model" in err
    assert not (tmp_path / "other.mkv").exists()


def test_from_refuses_another_image(make, reelflow, picture):
    make("-o", "out.mkv", "--steps", 1, "--image", picture)
    write_image(picture, np.zeros((32, 32, 3), np.uint8))
    status, _, err = reelflow("generate", "--from", "out.json", "-o", "other.mkv")
    assert status == 2
    assert "SHA-256" in err


def test_every_sampler_has_a_flag_but_the_one_that_needs_options():
    kinds = {method.kind for method in get_args(get_args(Method)[0])}
    assert {*get_args(command.SamplerKind), "restart"} == kinds


def test_set_changes_any_value_of_the_sampling_after_the_flags(make):
    options = ["--sampler", "unipc", "--set", "sampler.order=3", "--set", "guidance.interval=[0.1, 0.8]", "--steps", 5]
    assert make("-o", "out.mkv", *options)[0] == 0
    wanted = Sampling(num_steps=5, guidance_scale=2.0, sampler=UniPC(order=3), guidance=Guidance(interval=(0.1, 0.8)))
    assert told("out.json")["sampling"] == to_dict(wanted)


@pytest.mark.parametrize(
    "extra", [[PROMPT], ["--seed", 0], ["--frames", 9], ["--steps", 3], ["--set", "guidance.rescale=0.5"]]
)
def test_from_takes_no_other_wishes(reelflow, extra):
    status, _, err = reelflow("generate", "--from", "out.json", "-o", "other.mkv", *extra)
    assert status == 2
    assert "--from makes the same clip again" in err


def test_a_long_clip_is_written_as_it_comes(make):
    status, out, _ = make("-o", "out.mkv", "--frames", 29, "--steps", 1)
    assert status == 0
    assert "29 frames" in out
    sampling = Sampling(num_steps=1, guidance_scale=2.0)
    clip = tiny_pipeline().generate([PROMPT], num_frames=29, sampling=sampling)
    assert torch.equal(frames("out.mkv"), to_frames(clip[0]))


@pytest.mark.parametrize("suffix", [".mp4", ".gif", ".webm"])
def test_the_suffix_chooses_the_format(make, suffix):
    assert make("-o", f"out{suffix}", "--steps", 1)[0] == 0
    assert frames(f"out{suffix}").shape == (9, 32, 32, 3)


def test_an_image_of_any_size_is_fitted_and_this_is_said(make, picture):
    status, out, _ = make("-o", "out.mkv", "--image", picture)
    assert status == 0
    assert f"{picture}: 80 x 50, resized and centre-cropped to 32 x 32" in out
    pipeline = tiny_pipeline()
    given = read_clip(picture, size=(32, 32)).to_float()[None]
    with torch.no_grad():
        again = pipeline.vae.decode(pipeline.vae.encode(given).mean)[0]
    assert (frames("out.mkv")[:1].int() - to_frames(again).int()).abs().max() <= 1


def test_ctrl_c_keeps_what_is_known_and_from_makes_that_again(make, reelflow):
    with interrupted_at(6):
        status, out, err = make("-o", "out.mkv", "--frames", 17)
    assert status == 130
    assert "stopping" in err
    assert "stopped after 6 steps" in out
    assert (told("out.json")["interrupted_after"], told("out.json")["frames_made"]) == (6, 13)
    assert len(frames("out.mkv")) == 13
    status, out, err = reelflow("generate", "--from", "out.json", "-o", "other.mkv")
    assert status == 0
    assert "was interrupted after 6 steps" in err
    assert torch.equal(frames("out.mkv"), frames("other.mkv"))


def test_a_second_ctrl_c_leaves_at_once_with_the_chunks_that_are_done(make, reelflow):
    with interrupted_at(6, 6):
        assert make("-o", "out.mkv", "--frames", 17)[0] == 130
    assert told("out.json")["frames_made"] == len(frames("out.mkv")) == 9
    assert reelflow("generate", "--from", "out.json", "-o", "other.mkv")[0] == 0
    assert torch.equal(frames("out.mkv"), frames("other.mkv"))


def test_two_ctrl_c_before_the_first_chunk_leave_nothing(make, tmp_path):
    with interrupted_at(2, 2):
        assert make("-o", "out.mkv")[0] == 130
    assert list(tmp_path.iterdir()) == []


def test_a_preview_is_a_contact_sheet(make):
    assert make("-o", "out.mkv", "--preview", "look.png")[0] == 0
    assert frames("look.png").shape == (1, 32, 6 * 34 - 2, 3)


def test_words_the_model_has_never_read_are_named_once_with_the_nearest(reelflow, model):
    arguments = ("--model", model, "-o", "out.mkv", "--steps", 1)
    status, _, err = reelflow("generate", "a redd RING, redd dragon", *arguments)
    assert status == 0
    assert err.count("\n") == 1
    assert "redd (did you mean red?), dragon" in err


@pytest.mark.parametrize("prompt", ["", "赤い輪", "حلقة حمراء", "🔴", "[bold]x[/bold]"])
def test_prompts_in_any_script_and_empty_ones_are_taken(reelflow, model, prompt):
    assert reelflow("generate", prompt, "--model", model, "-o", "out.mkv", "--steps", 1)[0] == 0
    assert told("out.json")["prompt"] == prompt


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["a", "-o", "out.mkv"], "--model RUN"),
        (["-o", "out.mkv", "--model", "MODEL"], "give a prompt"),
        (["a", "-o", "out.mkv", "--model", "nowhere"], "nowhere does not exist"),
        (["a", "-o", "out.avi", "--model", "MODEL"], "cannot write .avi"),
        (["a", "-o", "no/out.mkv", "--model", "MODEL"], "the folder no does not exist"),
        (["a", "-o", "taken.mkv", "--model", "MODEL"], "taken.mkv exists"),
        (["a", "-o", "taken2.mkv", "--model", "MODEL"], "taken2.json exists"),
        (["a", "-o", "out.mkv", "--model", "MODEL", "--preview", "out.jpg"], "must end in .png"),
        (["a", "-o", "out.mkv", "--model", "MODEL", "--frames", "30"], "nearest: 29 or 33"),
        (["a", "-o", "out.mkv", "--model", "MODEL", "--steps", "0"], "num_steps must be at least 1"),
        (["a", "-o", "out.mkv", "--model", "MODEL", "--guidance", "nan"], "guidance_scale"),
        (["a", "-o", "out.mkv", "--model", "MODEL", "--set", "guidance.resale=1"], "did you mean rescale"),
        (
            ["a", "-o", "out.mkv", "--model", "MODEL", "--set", 'shift={"kind":"table","rows":[[9,2.0]]}'],
            "got 12; nearest: 9",
        ),
        (["a b c d e f g", "-o", "out.mkv", "--model", "MODEL"], "7 words"),
        (["\udc80", "-o", "out.mkv", "--model", "MODEL"], "not valid Unicode at character 1"),
        (["a", "-o", "out.mkv", "--model", "MODEL", "--image", "taken.mkv"], "empty"),
        (["a", "-o", "out.mkv", "--model", "MODEL", "--image", "none.png"], "none.png"),
        (["--from", "none.json", "-o", "out.mkv"], "none.json"),
    ],
)
def test_what_cannot_work_is_one_line_before_weights_are_read(
    reelflow, model, tmp_path, monkeypatch, arguments, message
):
    (tmp_path / "taken.mkv").touch()
    (tmp_path / "taken2.json").touch()
    monkeypatch.setattr("reelflow.generation.pipeline.load_weights", None)
    status, _, err = reelflow("generate", *(model if word == "MODEL" else word for word in arguments))
    assert (status, err.count("\n")) == (2, 1)
    assert message in err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["taken.mkv", "taken2.json"]


def test_overwrite_replaces_the_clip_and_its_json(make):
    for seed in (1, 2):
        assert make("-o", "out.mkv", "--steps", 1, "--seed", seed, "--overwrite")[0] == 0
    assert told("out.json")["seed"] == 2


@pytest.mark.parametrize("damage", ["truncated", "another model", "missing"])
def test_a_model_that_is_not_whole_is_one_line(reelflow, tmp_path, damage):
    tiny_pipeline().save(tmp_path / "model")
    weights = tmp_path / "model" / "dit.safetensors"
    if damage == "truncated":
        weights.write_bytes(weights.read_bytes()[:100])
    elif damage == "another model":
        weights.write_bytes((tmp_path / "model" / "vae.safetensors").read_bytes())
    else:
        weights.unlink()
    status, _, err = reelflow("generate", "x", "--model", "model", "-o", "out.mkv")
    assert (status, err.replace("warning", "").count("error: ")) == (2, 1)
    assert "dit.safetensors" in err
    assert not (tmp_path / "out.mkv").exists()
