import json

import numpy as np
import pytest

from reelflow.cli.evaluate import named_combination
from reelflow.data.video import read_clip, write_video
from reelflow.data.worlds import COMBINATIONS, PHRASINGS, Combination, World, caption, render_world
from reelflow.evaluation.frechet import PixelPyramid, frechet_between
from reelflow.evaluation.pixels import flicker, jitter, psnr, ssim

ASKED = (Combination("red", "ring", "left"), Combination("blue", "disc", "still"), Combination("cyan", "square", "up"))


@pytest.fixture(scope="module")
def rendered(tmp_path_factory):
    """Two folders of the same three names; the second is another draw of the first."""
    folder = tmp_path_factory.mktemp("world")
    for name, seed in (("a", 0), ("b", 1)):
        render_world(folder / name, World(), num_clips=3, combinations=ASKED, seed=seed)
    return folder


def numbers(path):
    return json.loads(path.read_text())


def test_a_clip_alone_is_measured_for_steadiness(reelflow, rendered, tmp_path):
    status, out, err = reelflow("evaluate", rendered / "a" / "00000.mp4", "--json", "out.json")
    assert (status, err) == (0, "")
    row = numbers(tmp_path / "out.json")["clips"]["00000"]
    clip = read_clip(rendered / "a" / "00000.mp4").to_float()[None]
    assert row["flicker"] == pytest.approx(flicker(clip).item())
    assert row["jitter"] == pytest.approx(jitter(clip).item())
    assert "psnr" not in row
    assert "flicker" in out


def test_folders_are_compared_by_name_and_as_sets(reelflow, rendered, tmp_path):
    status, out, _ = reelflow("evaluate", rendered / "a", "--against", rendered / "b", "--json", "out.json")
    assert status == 0
    values = numbers(tmp_path / "out.json")
    clips = {
        side: [read_clip(rendered / side / f"0000{k}.mp4").to_float()[None] for k in range(3)] for side in ("a", "b")
    }
    assert values["clips"]["00001"]["psnr"] == pytest.approx(psnr(clips["a"][1], clips["b"][1]).item())
    assert values["mean"]["ssim"] == pytest.approx(
        np.mean([ssim(a, b).item() for a, b in zip(*clips.values(), strict=True)])
    )
    expected = frechet_between(clips["a"], clips["b"], PixelPyramid(num_frames=17), frame_stride=1)
    assert str(expected) in out
    assert values["frechet"]["value"] == pytest.approx(expected.value)


def test_equal_files_are_infinitely_close_which_json_calls_null(reelflow, rendered, tmp_path):
    a, b = rendered / "a" / "00000.mp4", tmp_path / "copy.mp4"
    b.write_bytes(a.read_bytes())
    status, out, _ = reelflow("evaluate", a, "--against", b, "--json", "out.json")
    assert status == 0
    assert "inf" in out
    row = numbers(tmp_path / "out.json")["clips"]["00000"]
    assert row["psnr"] is None
    assert row["ssim"] == pytest.approx(1)


def test_the_world_reads_its_own_clips_as_their_captions_say(reelflow, rendered, tmp_path):
    status, out, _ = reelflow("evaluate", rendered / "a", "--world", "--json", "out.json")
    assert status == 0
    assert numbers(tmp_path / "out.json")["mean"]["all"] == 1
    assert "red ring left" in out


def test_a_prompt_in_the_json_goes_before_the_sidecar_and_can_be_wrong(reelflow, rendered, tmp_path):
    for suffix in (".mp4", ".txt"):
        (tmp_path / f"clip{suffix}").write_bytes((rendered / "a" / f"00000{suffix}").read_bytes())
    asked = named_combination((tmp_path / "clip.txt").read_text())
    (tmp_path / "clip.json").write_text(json.dumps({"prompt": f"a {asked.colour} {asked.shape} going around"}))
    assert reelflow("evaluate", "clip.mp4", "--world", "--json", "out.json")[0] == 0
    row = numbers(tmp_path / "out.json")["clips"]["clip"]
    assert (row["colour"], row["shape"], row["motion"], row["all"]) == (1, 1, 0, 0)


def test_a_broken_file_in_a_folder_is_skipped_and_named(reelflow, rendered, tmp_path):
    (tmp_path / "clips").mkdir()
    (tmp_path / "clips" / "good.mp4").write_bytes((rendered / "a" / "00000.mp4").read_bytes())
    (tmp_path / "clips" / "bad.mp4").write_bytes(b"nothing")
    status, out, err = reelflow("evaluate", "clips")
    assert status == 0
    assert "good" in out
    assert "bad.mp4" in err


@pytest.mark.parametrize("num_frames", [1, 2])
def test_short_clips_have_the_measures_that_make_sense(reelflow, tmp_path, num_frames):
    write_video(tmp_path / "short.mkv", np.zeros((num_frames, 16, 16, 3), np.uint8), fps=8)
    assert reelflow("evaluate", "short.mkv", "--json", "out.json")[0] == 0
    row = numbers(tmp_path / "out.json")["clips"]["short"]
    assert ("flicker" in row, "jitter" in row) == (num_frames > 1, False)


def test_every_phrasing_of_every_combination_is_understood():
    world, rng = World(), np.random.default_rng(0)
    for index, combination in enumerate(COMBINATIONS):
        scene = world.draw_scene(rng, **combination._asdict())
        for phrasing in (index % len(PHRASINGS), (index + 1) % len(PHRASINGS)):
            assert named_combination(caption(type(scene)(**{**vars(scene), "phrasing": phrasing}))) == combination


@pytest.mark.parametrize("text", ["", "a red ring", "a red blue ring moving left", "a ring moving left", "красный"])
def test_captions_that_name_too_little_or_too_much_ask_for_nothing(text):
    assert named_combination(text) is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "nowhere"),
        (["empty"], "no videos"),
        (["clip.mkv", "--world"], "names a colour, a shape and a motion"),
        (["clip.mkv", "--against", "other.mkv"], "clips to compare must be of one shape"),
        (["clip.mkv", "--json", "taken.json"], "taken.json exists"),
        (["broken.mp4"], "broken.mp4"),
    ],
)
def test_what_cannot_be_measured_is_one_line(reelflow, tmp_path, arguments, message):
    (tmp_path / "empty").mkdir()
    (tmp_path / "taken.json").touch()
    (tmp_path / "broken.mp4").write_bytes(b"nothing")
    for name, size in (("clip", 16), ("other", 24)):
        write_video(tmp_path / f"{name}.mkv", np.zeros((3, size, size, 3), np.uint8), fps=8)
    status, _, err = reelflow("evaluate", *arguments)
    assert (status, err.count("\n")) == (2, 1)
    assert message in err
