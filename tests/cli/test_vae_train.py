"""`reelflow vae train`: from a folder of videos to an autoencoder that the other commands read."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from reelflow.config import to_dict
from reelflow.data.video import read_clip, write_video
from reelflow.families import wan_vae
from reelflow.families.autoencoders import load_vae, save_vae
from reelflow.models.vae import CausalVAE
from reelflow.recipes.runs import pretrained_autoencoder
from reelflow.training.autoencoder import AutoencoderTask
from tiny_model import CARD

BRIEF = {"steps": 3, "batch_size": 2, "validate_every": 0, "preview_every": 3, "checkpoint_every": 0}


@pytest.fixture
def videos(tmp_path):
    (tmp_path / "my videos").mkdir()
    rng = np.random.default_rng(0)
    for index in range(4):
        frames = rng.integers(0, 256, (9, 4, 4, 3), np.uint8).repeat(8, 1).repeat(8, 2)
        write_video(tmp_path / "my videos" / f"{index}.mkv", frames, fps=8)
    return tmp_path / "my videos"


def settings(**more: object) -> list[str]:
    values = {
        "clip": to_dict(CARD.clip),
        "vae.loss.crop_size": 16,
        "data.num_validation": 1,
        **{f"vae.training.{name}": value for name, value in BRIEF.items()},
        **more,
    }
    return [word for path, value in values.items() for word in ("--set", f"{path}={json.dumps(value)}")]


SMALL = settings(**{"vae.model": to_dict(CARD.vae)})


@pytest.fixture
def published(tmp_path):
    folder = tmp_path / "small-vae"
    torch.manual_seed(0)
    config = wan_vae.autoencoder(base=8, decoder_base=8, latent=4, multiples=(1, 1), blocks=1, halvings=(True,))
    save_vae(CausalVAE(config), folder, wan_vae.WAN_VAE)
    return folder


def test_a_folder_of_videos_becomes_an_autoencoder_that_encodes_and_decodes(reelflow, videos, tmp_path):
    status, out, err = reelflow("vae", "train", "my videos", "-o", "mine", *SMALL)
    assert (status, err) == (0, "")
    assert "each 4 x 8 x 8 pixels become a latent of 4 channels; 3 steps of 2 crops of 9 x 16 x 16" in out
    assert "mine is ready; try: reelflow vae encode clip.mp4 --vae mine" in out
    assert [path.name for path in (tmp_path / "mine" / "vae" / "previews").iterdir()] == ["00000003.png"]
    assert not (tmp_path / "mine" / "published").exists()
    assert not (tmp_path / "mine" / "latents").exists()
    weights = (tmp_path / "mine" / "vae" / "final.safetensors").read_bytes()
    assert reelflow("vae", "train", "my videos", "-o", "mine", *SMALL)[0] == 0
    assert (tmp_path / "mine" / "vae" / "final.safetensors").read_bytes() == weights  # finished: not done twice

    assert "streams exactly" in reelflow("vae", "info", "mine")[1]
    assert reelflow("vae", "encode", videos / "0.mkv", "--vae", "mine", "-o", "l.safetensors")[::2] == (0, "")
    vae = pretrained_autoencoder(tmp_path / "mine")
    with torch.no_grad():
        mean = vae.eval().encode(read_clip(videos / "0.mkv").to_float()[None]).mean[0]
    torch.testing.assert_close(load_file("l.safetensors")["mean"], mean, atol=1e-5, rtol=0)
    assert reelflow("vae", "decode", "l.safetensors", "--vae", "mine", "-o", "again.mkv")[::2] == (0, "")


def test_an_interrupted_run_keeps_its_steps_and_goes_on(reelflow, videos, tmp_path, monkeypatch):
    import signal

    loss, calls = AutoencoderTask.loss, []

    def interrupting(self, batch, generator):
        calls.append(None)
        if len(calls) == 2:
            signal.raise_signal(signal.SIGINT)
        return loss(self, batch, generator)

    monkeypatch.setattr(AutoencoderTask, "loss", interrupting)
    status, out, _ = reelflow("vae", "train", "my videos", "-o", "mine", *SMALL)
    assert status == 130
    assert "the same command goes on with mine" in out
    assert reelflow("vae", "info", "mine")[0] == 2  # it has none yet
    assert reelflow("vae", "train", "my videos", "-o", "mine", *SMALL)[0] == 0
    assert len(calls) == 3


def test_a_published_decoder_is_tuned_alone_and_published_again(reelflow, videos, published, tmp_path):
    brief = settings(**{"vae.loss.crop_frames": 5})
    arguments = ("vae", "train", "my videos", "-o", "mine", "--from", published, "--decoder-only", *brief)
    status, out, err = reelflow(*arguments)
    assert (status, err) == (0, "")
    assert "mine/published: the same in the published format" in out
    before, after = load_vae(published), load_vae(tmp_path / "mine" / "published")
    changed = {name for name, x in after.state_dict().items() if not torch.equal(x, before.state_dict()[name])}
    assert changed
    assert all(name.startswith("decoder.") for name in changed)
    assert reelflow("vae", "train", "my videos", "-o", "more", "--from", "mine", *brief)[0] == 0  # all of it, once more
    whole, ours = load_vae(tmp_path / "more" / "published"), pretrained_autoencoder(tmp_path / "more")
    assert not torch.equal(whole.latent_mean, after.latent_mean)
    assert all(torch.equal(x, ours.state_dict()[name]) for name, x in whole.state_dict().items())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["wrold"], "wrold is no recipe and no folder of videos; did you mean world"),
        (["folder", "--data", "no_videos"], "no_videos is missing"),
        (["my videos", "--data", "my videos"], "leave out --data"),
        (["my videos", "--decoder-only"], "say whose with --from"),
        (["my videos", "--from", "wan_vae.2_1"], "has no weights to go on from"),
        (["world", "--set", "vae.model.latent_chanels=4"], "did you mean latent_channels"),
        (["my videos", *SMALL, "--set", "data.num_validation=9"], "at most 3"),
    ],
)
def test_what_cannot_be_trained_is_one_line(reelflow, videos, arguments, message):
    status, _, err = reelflow("vae", "train", *arguments)
    assert (status, err.count("\n")) == (2, 1)
    assert message in err
