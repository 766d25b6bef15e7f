"""Open-Sora-Plan 1.3's pipeline up to its latents, against what it made itself (see make_system_fixtures)."""

import json
from pathlib import Path

import pipelines
import pytest
import tiny
import torch
from parity import as_ours, error
from safetensors import safe_open

import reelflow
from reelflow.conditioning.text import TextFeatures
from reelflow.errors import ConfigError
from reelflow.families.opensora_plan import OPENSORA_PLAN
from reelflow.families.opensora_plan_system import BLAME, MT5, NETWORK, PRAISE, text_to_latents
from reelflow.families.published import save_transformer
from reelflow.families.systems import sketch_system
from reelflow.generation.published import PublishedPipeline, PublishedSampling
from reelflow.models.dit import VideoDiT

with safe_open(Path(__file__).parent / "fixtures" / "opensora_plan_system.safetensors", framework="pt") as file:
    NOTES = {key: json.loads(value) for key, value in file.metadata().items()}
    STORED = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
SMALL = PublishedSampling(num_steps=NOTES["steps"], height=32, width=48)


@pytest.fixture(scope="module")
def network() -> VideoDiT:
    weights = {key.removeprefix("network "): x for key, x in STORED.items() if key.startswith("network ")}
    return as_ours(OPENSORA_PLAN, NOTES["arguments"], weights, torch.float32).eval().requires_grad_(False)


def test_latents_are_those_of_the_original(network):
    prompts, negative = ["a red kite", "two cats"], ["", "blue"]
    known = [*(PRAISE.replace("{}", prompt) for prompt in prompts), *negative]

    def read(asked) -> TextFeatures:
        rows = [known.index(prompt) for prompt in asked]
        return TextFeatures(STORED["tokens"][rows].float(), STORED["mask"][rows], None)

    system = PublishedPipeline(text_to_latents(network, read))
    made = system.generate(
        prompts,
        negative_prompts=negative,
        num_frames=9,
        noise=STORED["noise"].float(),
        seed=NOTES["seed"],
        sampling=SMALL,
        output="latents",
    )
    found = error(made, STORED["latents"])
    pipelines.MEASURED.setdefault("OpenSoraPipeline of Open-Sora-Plan 1.3", []).append((found, float("nan")))
    assert found <= max(pipelines.BOUND, 3 * NOTES["floors"]["latents"]), found


def test_a_folder_gives_latents_and_refuses_frames(network, tmp_path):
    save_transformer(network, tmp_path / NETWORK, layout="original")
    words, encoder = tiny.mt5(tmp_path, tokenizer=MT5, encoder=MT5, dim=NOTES["arguments"]["caption_channels"])
    system = reelflow.load(tmp_path)
    asked = {"num_frames": 9, "sampling": PublishedSampling(num_steps=2, height=32, width=48), "seed": 3}
    made = system.generate(["a kite"], **asked, output="latents")
    assert made.shape == (1, 4, 3, 4, 6)

    def read(prompts) -> TextFeatures:
        told = words(prompts, padding="max_length", max_length=512, truncation=True, return_tensors="pt")
        with torch.no_grad():
            tokens = encoder(told.input_ids, attention_mask=told.attention_mask).last_hidden_state
        return TextFeatures(tokens, told.attention_mask.bool(), None)

    alike = PublishedPipeline(text_to_latents(network, read)).generate(["a kite"], **asked, output="latents")
    torch.testing.assert_close(made, alike, rtol=1e-4, atol=1e-4)
    assert "blurry" in system.system.defaults.negative == BLAME
    with pytest.raises(ConfigError, match=r"WF-VAE\) is not reproduced; nearest: generate\(output='latents'\)"):
        PublishedPipeline(sketch_system(tmp_path)).check(["a kite"])
