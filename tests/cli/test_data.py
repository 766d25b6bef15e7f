import numpy as np
import pytest

from reelflow.data.video import write_video


@pytest.fixture
def videos(tmp_path):
    (tmp_path / "videos").mkdir()
    for name, num_frames in (("long", 40), ("short", 5)):
        write_video(tmp_path / "videos" / f"{name}.mp4", np.zeros((num_frames, 32, 48, 3), np.uint8), fps=8)
    (tmp_path / "videos" / "long.txt").write_text("a [red] thing")
    (tmp_path / "videos" / "broken.mp4").write_bytes(b"nothing")
    return tmp_path / "videos"


def test_every_file_is_listed_with_its_fate_and_its_tokens(reelflow, videos):
    status, out, err = reelflow("data", "inspect", videos, "--frames", 17, "--size", "64x64", "--fps", 8)
    assert (status, err) == (0, "")
    for text in ("long.mp4", "short.mp4", "broken.mp4", "a [red] thing", "rejected", "160"):
        assert text in out
    assert "1 of 3 videos give 2 clips of 17 x 64 x 64 at 8 fps: 160 tokens (80 a clip" in out


def test_a_folder_that_gives_nothing_is_status_1(reelflow, videos):
    assert reelflow("data", "inspect", videos, "--frames", 101)[0] == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "nowhere is missing"),
        (["videos", "--frames", "18"], "nearest: 17 or 21"),
        (["videos", "--size", "64"], "HEIGHTxWIDTH"),
        (["videos", "--fps", "0"], "clip.fps"),
    ],
)
def test_what_cannot_be_inspected_is_one_line(reelflow, videos, arguments, message):
    status, _, err = reelflow("data", "inspect", *arguments)
    assert (status, err.count("\n")) == (2, 1)
    assert message in err
