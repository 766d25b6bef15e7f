"""Open-Sora 2.0's repository as a system, against what its own sampling function made (see make_system_fixtures)."""

import json
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pipelines
import pytest
import tiny
import torch
from parity import error
from safetensors import safe_open
from safetensors.torch import save_file

import reelflow
from reelflow.cli.main import run
from reelflow.cli.vae import find
from reelflow.conditioning.text import TextFeatures
from reelflow.data.video import read_clip
from reelflow.errors import CheckpointError, ConfigError
from reelflow.families.autoencoders import empty_vae, load_vae
from reelflow.families.hunyuan_vae import HUNYUAN_VAE
from reelflow.families.opensora2 import OPENSORA2
from reelflow.families.opensora2_system import CLIP, NETWORK, T5, VAE, ended, text_or_image_to_video
from reelflow.families.published import find_transformer, load_transformer
from reelflow.families.system import Asked
from reelflow.generation.pipeline import to_frames
from reelflow.generation.published import PublishedPipeline, PublishedSampling
from reelflow.interop.checkpoints import state_as_theirs
from reelflow.models.vae import CausalVAE

with safe_open(Path(__file__).parent / "fixtures" / "opensora2_system.safetensors", framework="pt") as file:
    NOTES = {key: json.loads(value) for key, value in file.metadata().items()}
    STORED = {key: file.get_tensor(key).float() for key in file.keys()}  # noqa: SIM118
FRAMES, HEIGHT, WIDTH = NOTES["size"]
SMALL = PublishedSampling(num_steps=NOTES["steps"], height=HEIGHT, width=WIDTH)


def part(prefix: str) -> dict[str, torch.Tensor]:
    return {key.removeprefix(prefix): x.contiguous() for key, x in STORED.items() if key.startswith(prefix)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """The repository's two files; heads of this width need a configuration."""
    path = tmp_path_factory.mktemp("Open-Sora-v2")
    said = {"transformer": {"_class_name": OPENSORA2.class_name, **NOTES["arguments"]}}
    save_file(part("network "), path / NETWORK, metadata={"config": json.dumps(said)})
    save_file(part("coder "), path / VAE)
    return path


@pytest.fixture(scope="module")
def system(folder) -> PublishedPipeline:
    def read(prompts) -> TextFeatures:
        rows = [NOTES["known"].index(prompt) for prompt in prompts]
        tokens = STORED["tokens"][rows]
        return TextFeatures(tokens, torch.ones(tokens.shape[:2], dtype=torch.bool), STORED["pooled"][rows])

    return PublishedPipeline(text_or_image_to_video(load_transformer(folder), load_vae(folder / VAE), read, read))


@pytest.mark.parametrize("name", NOTES["runs"])
def test_latents_and_frames_are_those_of_the_original(system, name):
    asked = NOTES["runs"][name]
    said = {
        "prompts": asked["prompts"],
        "negative_prompts": asked["negative"],
        "num_frames": FRAMES,
        "noise": STORED[f"{name}.noise"],
        "seed": NOTES["seed"],
        "image": STORED["image"] if "picture" in asked else None,
        "sampling": PublishedSampling(
            num_steps=NOTES["steps"], height=HEIGHT, width=WIDTH, picture_guidance=asked.get("picture")
        ),
    }
    errors = [error(system.generate(**said, output="latents"), STORED[f"{name}.latents"])]
    if f"{name}.frames" in STORED:
        made = system.system.vae.decode(STORED[f"{name}.latents"][:1])
        errors.append(error(made, STORED[f"{name}.frames"]))
        torch.testing.assert_close(system.generate(**said)[:1], made.clamp(-1, 1), rtol=0, atol=1e-3)
        pipelines.MEASURED.setdefault("prepare_api of Open-Sora 2.0", []).append((errors[0], errors[1]))
    floors = NOTES["floors"]
    assert errors[0] <= max(pipelines.BOUND, 3 * floors[f"{name}.latents"]), errors
    assert max(errors) <= pipelines.BOUND, errors


def test_the_picture_ends_where_it_began_and_is_asked_for_no_more_than_needed(system):
    asked = {"prompts": ["a"], "num_frames": FRAMES, "image": STORED["image"], "seed": 1}
    network, counted = system.system.experts[0].network, []
    with (
        mock.patch.dict(NOTES, known=["a. 24 FPS. 4 motion score.", ""]),
        mock.patch.object(network, "forward", side_effect=lambda *a, f=network.forward: counted.append(1) or f(*a)),
    ):
        made = system.generate(**asked, sampling=SMALL, output="latents")
    assert len(counted) == 3 * 12 + 1  # the eleventh step is with guidance, the twelfth without
    posterior = system.system.vae.encode(STORED["image"][:, :, None])
    drawn = torch.randn(posterior.mean.shape, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(made[:, :, :1], posterior.mean + (0.5 * posterior.logvar).exp() * drawn)


def test_encoders_read_as_the_original_does_and_the_command_makes_a_clip(folder, tmp_path, capsys):
    """All 512 tokens of T5, padding too; of CLIP the vector at the end of the text."""
    for name in (NETWORK, VAE):
        (tmp_path / name).symlink_to(folder / name)
    words, encoder = tiny.t5(tmp_path, tokenizer=T5, encoder=T5, dim=NOTES["arguments"]["context_in_dim"])
    others, other = tiny.clip_text(tmp_path, tokenizer=CLIP, encoder=CLIP, dim=NOTES["arguments"]["vec_in_dim"])
    system = reelflow.load(tmp_path)
    asked = Asked(["A red kite."], [""], 9, 16, 32, 8.0, None, None, (4, 3, 2, 4), [torch.Generator()], guided=False)
    cond, text = system.system.conditions(asked).cond, "A red kite. 8 FPS. 4 motion score."
    with torch.no_grad():
        numbers = words(text, padding="max_length", max_length=512, truncation=True, return_tensors="pt").input_ids
        torch.testing.assert_close(cond.context, encoder(numbers).last_hidden_state)
        numbers = others(text, padding="max_length", max_length=77, truncation=True, return_tensors="pt").input_ids
        torch.testing.assert_close(cond.vector, other(numbers).pooler_output)
    assert cond.context_mask is None
    clip, size = tmp_path / "a.mkv", ["--frames", "5", "--height", "16", "--width", "32", "--steps", "2"]
    assert run(["generate", "A red kite.", "--model", str(tmp_path), "-o", str(clip), *size]) == 0, capsys.readouterr()
    made = system.generate(["A red kite."], num_frames=5, sampling=replace(SMALL, num_steps=2))
    assert torch.equal(read_clip(clip).frames, to_frames(made[0]))


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("a kite", "a kite. 24 FPS. 4 motion score."),
        (" a kite. 8 FPS.", "a kite. 8 FPS. 4 motion score."),
        ("a kite. 24 FPS. 7 motion score.", "a kite. 24 FPS. 7 motion score."),
    ],
)
def test_a_prompt_says_its_rate_and_motion_once(prompt, expected):
    assert ended(prompt, 24.0) == expected


def test_files_are_recognised_and_others_refused(folder, tmp_path):
    assert find_transformer(folder).family is OPENSORA2
    assert empty_vae(folder / VAE)[1] is HUNYUAN_VAE
    assert find(str(folder / VAE)).weights == (folder / VAE,)
    published = HUNYUAN_VAE.sizes["video"].config
    with torch.device("meta"):
        whole = CausalVAE(published)
    shapes = {name: x.shape for name, x in state_as_theirs(whole, HUNYUAN_VAE.weights(published)).items()}
    assert HUNYUAN_VAE.read(HUNYUAN_VAE.bare(shapes)) == published
    with pytest.raises(CheckpointError, match="no autoencoder that shapes tell"):
        empty_vae(folder / NETWORK)
    save_file(part("network "), tmp_path / "bare.safetensors")
    with pytest.raises(CheckpointError, match="do not tell the rotary axes of heads of 12 channels"):
        find_transformer(tmp_path / "bare.safetensors")
    (tmp_path / "Open_Sora_v2_Video_DC_AE.safetensors").touch()
    with pytest.raises(CheckpointError, match="Video DC-AE"):
        reelflow.load(tmp_path)


def test_picture_guidance_needs_a_picture(system):
    with pytest.raises(ConfigError, match="there is no picture: leave out picture_guidance"):
        system.check(["a"], sampling=PublishedSampling(picture_guidance=2.0))
