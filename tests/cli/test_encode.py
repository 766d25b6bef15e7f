import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from reelflow.data.video import read_clip, write_video
from reelflow.evaluation.pixels import psnr
from tiny_model import tiny_pipeline


@pytest.fixture
def video(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (31, 4, 4, 3), np.uint8).repeat(8, 1).repeat(8, 2)
    write_video(tmp_path / "video.mkv", pixels, fps=8)
    return tmp_path / "video.mkv"


def test_chunk_by_chunk_gives_the_latents_of_the_whole_video(reelflow, model, video):
    arguments = ("--model", model, "-o", "latents.safetensors", "--reconstruct", "again.mkv")
    status, out, err = reelflow("encode", video, *arguments, "--frames", 29)
    assert (status, err) == (0, "")
    vae, clip = tiny_pipeline().vae, read_clip(video, num_frames=29).to_float()[None]
    with torch.no_grad():
        posterior = vae.encode(clip)
        decoded = vae.decode(posterior.mean).clamp(-1, 1)
    latents = load_file("latents.safetensors")
    assert latents["mean"].shape == (4, 8, 4, 4)
    torch.testing.assert_close(latents["mean"], posterior.mean[0], atol=1e-5, rtol=0)
    torch.testing.assert_close(latents["logvar"], posterior.logvar[0], atol=1e-5, rtol=0)
    assert f"{psnr(decoded, clip).item():.2f} dB" in out
    assert "peak memory" in out
    again = read_clip("again.mkv").to_float()
    torch.testing.assert_close(again, decoded[0], atol=1.01 / 127.5, rtol=0)
    with safe_open("latents.safetensors", "pt") as file:
        assert file.metadata()["clip"] == "29 x 32 x 32 at 8 fps"


def test_another_size_and_rate_can_be_asked_for(reelflow, model, video):
    status, out, _ = reelflow(
        "encode", video, "--model", model, "-o", "l.safetensors", "--size", "16x24", "--fps", 4, "--frames", 13
    )
    assert status == 0
    assert "13 frames of 24 x 16 at 4 fps" in out
    assert load_file("l.safetensors")["mean"].shape == (4, 4, 2, 3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "would give 31 at 8 fps; nearest: --frames 29"),
        (["--frames", "28"], "nearest: --frames 25"),
        (["--frames", "0"], "nearest: --frames 1"),
        (["--frames", "33"], "has 31 frames at 8 fps, asked for 33"),
        (["--frames", "29", "--size", "30x32"], "nearest: 24 or 32"),
        (["--size", "big"], "HEIGHTxWIDTH"),
        (["--fps", "0"], "--fps must be positive"),
        (["--frames", "29", "--reconstruct", "video.mkv"], "video.mkv exists"),
        (["--frames", "29", "--reconstruct", "again.avi"], "cannot write .avi"),
        (["-o", "latents.pt"], "must end in .safetensors"),
    ],
)
def test_what_cannot_be_encoded_is_one_line_before_weights_are_read(
    reelflow, model, video, tmp_path, monkeypatch, arguments, message
):
    monkeypatch.setattr("reelflow.models.weights.load_weights", None)
    status, _, err = reelflow("encode", video, "--model", model, "-o", "latents.safetensors", *arguments)
    assert (status, err.count("\n")) == (2, 1)
    assert message in err
    assert [path.name for path in tmp_path.iterdir()] == ["video.mkv"]


def test_latents_are_not_overwritten_unasked(reelflow, model, video):
    command = ("encode", video, "--model", model, "-o", "latents.safetensors", "--frames", 1)
    assert [reelflow(*command)[0], reelflow(*command)[0], reelflow(*command, "--overwrite")[0]] == [0, 2, 0]
