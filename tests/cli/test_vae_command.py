"""`reelflow vae` on tiny autoencoders: a run folder of ours, a published one that streams and one that does not."""

import json

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from reelflow.cli.main import run
from reelflow.data.video import VideoWriter, probe, read_clip, write_video
from reelflow.families import hunyuan_vae, wan_vae
from reelflow.families.autoencoders import load_vae, save_vae
from reelflow.models.vae import CausalVAE
from tiny_model import CARD, tiny_pipeline


@pytest.fixture(scope="module")
def wan(tmp_path_factory):
    """A system's folder, of which there is only the autoencoder."""
    folder = tmp_path_factory.mktemp("system")
    torch.manual_seed(0)
    config = wan_vae.autoencoder(base=8, decoder_base=8, latent=4, multiples=(1, 1, 1), blocks=1, halvings=(True, True))
    save_vae(CausalVAE(config), folder / "vae", wan_vae.WAN_VAE)
    (folder / "model_index.json").write_text("{}")
    return folder


@pytest.fixture(scope="module")
def hunyuan(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hunyuan")
    config = hunyuan_vae.autoencoder(widths=(8, 8, 8, 8), groups=2, blocks=1, latent=4)
    save_vae(CausalVAE(config), folder, hunyuan_vae.HUNYUAN_VAE)
    return folder


@pytest.fixture
def video(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (13, 4, 4, 3), np.uint8).repeat(8, 1).repeat(8, 2)
    write_video(tmp_path / "video.mkv", pixels, fps=8)
    return tmp_path / "video.mkv"


def latents_of(path, shape=(4, 4, 4, 4), **metadata):
    save_file({"mean": torch.randn(shape, generator=torch.Generator().manual_seed(0))}, path, metadata=metadata or None)
    return path


def test_info_says_what_an_autoencoder_is(reelflow, wan, hunyuan, model):
    out = reelflow("vae", "info", wan, "--size", "32x64", "--frames", 9)[1]
    assert "each 4 x 4 x 4 pixels become a latent of 4 channels, 48 times fewer values; takes 1 + 4 k frames" in out
    assert "encoder: widths 3 8;" in out
    assert "for 9 frames of 64 x 32, float32" in out
    assert out.count("streams exactly, and remembers") == 2
    out = reelflow("vae", "info", hunyuan, "--size", "32x64", "--frames", 1)[1]
    assert "does not stream: encoder[1] (res): its norm sees all frames (and" in out
    assert "takes 1 + 4 k frames" in reelflow("vae", "info", model)[1]


def test_what_is_remembered_is_what_a_state_weighs(reelflow, wan):
    vae = load_vae(wan / "vae")
    with torch.no_grad():
        state = vae.decode_chunk(torch.zeros(1, 4, 2, 8, 16))[1]
    size = sum(leaf.nbytes for leaf in torch.utils._pytree.tree_leaves(state) if isinstance(leaf, torch.Tensor))
    out = reelflow("vae", "info", wan, "--size", "32x64", "--frames", 9)[1]
    assert out.rstrip().endswith(f"remembers {size / 2**20:.3g} MiB from one chunk to the next")


@pytest.mark.parametrize("which", ["wan", "model"])
def test_a_video_goes_to_latents_and_back_chunk_by_chunk_as_in_one(reelflow, request, video, which):
    folder = request.getfixturevalue(which)
    vae = load_vae(folder / "vae") if which == "wan" else tiny_pipeline().vae
    clip = read_clip(video).to_float()[None]
    whole = vae.plan_encode(clip.shape, "1GiB").peak
    memory = whole if which == "wan" else whole - 1
    status, out, err = reelflow("vae", "encode", video, "--vae", folder, "-o", "l.safetensors", "--memory", memory)
    assert (status, err) == (0, "")
    assert ("13 frames of 32 x 32, whole, peak" if which == "wan" else "of 4 latents at a time, peak") in out
    with torch.no_grad():
        posterior = vae.encode(clip)
        decoded = vae.decode(posterior.mean).clamp(-1, 1)
    latents = load_file("l.safetensors")
    torch.testing.assert_close(latents["mean"], posterior.mean[0], atol=1e-5, rtol=0)
    torch.testing.assert_close(latents["logvar"], posterior.logvar[0], atol=1e-4, rtol=0)
    status, out, err = reelflow("vae", "decode", "l.safetensors", "--vae", folder, "-o", "again.mkv", "--stream")
    assert (status, err) == (0, "")
    assert "1 of 4 latents at a time" in out
    assert "13 frames of 32 x 32 at 8 fps" in out
    again = read_clip("again.mkv")
    assert again.fps == 8
    torch.testing.assert_close(again.to_float(), decoded[0], atol=1.01 / 127.5, rtol=0)


def test_latents_of_the_other_command_are_read_too(reelflow, model, video):
    assert reelflow("encode", video, "--model", model, "-o", "l.safetensors")[0] == 0
    assert reelflow("vae", "decode", "l.safetensors", "--vae", model, "-o", "a.mkv")[::2] == (0, "")
    with safe_open("l.safetensors", "pt") as file:
        assert file.metadata()["clip"].endswith("at 8 fps")
    assert probe("a.mkv").fps == 8


def test_ctrl_c_keeps_a_playable_file(wan, tmp_path, monkeypatch, capsys):
    import signal

    monkeypatch.chdir(tmp_path)
    latents_of("l.safetensors", (4, 6, 4, 4))
    write = VideoWriter.write

    def interrupted_write(self, frames):
        write(self, frames)
        if self.num_frames == 5:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(VideoWriter, "write", interrupted_write)
    status = run(["vae", "decode", "l.safetensors", "--vae", str(wan), "-o", "a.mp4", "--stream", "--fps", "8"])
    assert status == 130
    assert "stopped after 5 of 21 frames" in capsys.readouterr().out
    assert len(read_clip("a.mp4").frames) == 5


def test_less_memory_than_the_picture_needs_is_said_to_be_an_approximation(reelflow, wan):
    latents_of("l.safetensors", (4, 1, 24, 24))
    arguments = ("vae", "decode", "l.safetensors", "--vae", wan, "-o", "a.mkv", "--fps", 8, "--memory")
    err = reelflow(*arguments, "1kB")[2]
    least = err.rpartition(" is ")[2].strip()
    status, out, err = reelflow(*arguments, least)
    assert status == 0
    assert ", tiles of " in out
    assert "warning: tiles are blended where they overlap, an approximation" in err


WRONG = [
    (["l.safetensors"], {"shape": (5, 2, 4, 4)}, "mean is 5 x 2 x 4 x 4; "),
    (["l.safetensors"], {"shape": (4, 0, 4, 4)}, "mean is 4 x 0 x 4 x 4; "),
    (["l.safetensors"], {"vae_sha256": "ab" * 32}, "was made by another autoencoder (sha256 abababababab...)"),
    (["l.safetensors", "--fps", "0"], {}, "fps must be between"),
    (["l.safetensors", "-o", "a.avi"], {}, "cannot write .avi"),
    (["l.safetensors", "--memory", "much"], {}, "such as 4GiB or 500MB"),
    (["l.safetensors", "--memory", "9kB"], {}, "nothing fits in"),
    (["nothing.safetensors"], {}, "nothing.safetensors does not exist"),
    (["video.mkv"], {}, "is missing or is not a whole safetensors file"),
    (["l.safetensors", "--vae", "wan_vae"], {}, "is no folder, and no published size; did you mean wan_vae.2_"),
]


@pytest.mark.parametrize(("arguments", "latents", "message"), WRONG)
def test_what_cannot_be_decoded_is_one_line_before_weights_are_read(
    reelflow, wan, video, tmp_path, monkeypatch, arguments, latents, message
):
    monkeypatch.setattr("reelflow.families.autoencoders.load_vae", None)
    latents_of("l.safetensors", **latents)
    options = [] if "--fps" in arguments else ["--fps", "8"]
    base = ("vae", "decode", "--vae", wan, "-o", "a.mkv")
    status, _, err = reelflow(*base, *arguments, *options)
    errors = [line for line in err.splitlines() if not line.startswith("warning")]
    assert (status, len(errors)) == (2, 1)
    assert message in errors[0]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["l.safetensors", "video.mkv"]


def test_latents_that_overflowed_or_do_not_say_their_rate_are_refused(reelflow, wan, hunyuan, tmp_path):
    save_file({"latents": torch.full((4, 1, 2, 2), torch.nan)}, "l.safetensors")
    base = ("vae", "decode", "l.safetensors", "--vae", wan, "-o", "a.mkv")
    assert "latents holds NaN or infinity" in reelflow(*base)[2]
    latents_of("l.safetensors")
    assert "does not say its frames per second; give --fps" in reelflow(*base)[2]
    save_file({"x": torch.ones(1)}, "l.safetensors")
    assert "holds neither mean nor latents, but x" in reelflow(*base)[2]
    latents_of("l.safetensors")
    base = ("vae", "decode", "l.safetensors", "--vae", hunyuan, "-o", "a.mkv", "--fps", 8)
    assert "sees all frames, so frames exist only when all do; leave out --stream" in reelflow(*base, "--stream")[2]
    assert [path.name for path in tmp_path.iterdir()] == ["l.safetensors"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--frames", "12"], "num_frames must be 1 + 4 k, got 12; nearest: 9 or 13"),
        (["--frames", "17"], "has 13 frames at 8 fps, asked for 17"),
        (["--size", "30x32"], "height must be a multiple of 4"),
        (["-o", "l.pt"], "must end in .safetensors"),
        (["--fps", "0"], "--fps must be positive"),
    ],
)
def test_what_cannot_be_encoded_is_one_line_before_weights_are_read(
    reelflow, wan, video, tmp_path, monkeypatch, arguments, message
):
    monkeypatch.setattr("reelflow.families.autoencoders.load_vae", None)
    status, _, err = reelflow("vae", "encode", video, "--vae", wan, "-o", "l.safetensors", *arguments)
    assert (status, err.count("\n")) == (2, 1)
    assert message in err
    assert [path.name for path in tmp_path.iterdir()] == ["video.mkv"]


def test_bench_measures_against_length(reelflow, wan):
    status, out, _ = reelflow("vae", "bench", wan, "--size", "16x16", "--frames", "1,5")
    assert status == 0
    assert "clips of 16 x 16, float32" in out
    assert [line.split()[1] for line in out.splitlines() if line.startswith("│")] == ["1", "5"]
    assert "nearest: 1 or 5" in reelflow("vae", "bench", wan, "--size", "16x16", "--frames", "4")[2]
    assert json.loads((wan / "vae" / "config.json").read_text())["z_dim"] == CARD.vae.latent_channels
