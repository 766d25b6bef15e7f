import json
from pathlib import Path
from typing import Any
from unittest import mock

import diffusers
import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler
from pipelines import check, normal

import reelflow
from reelflow.errors import CheckpointError, ConfigError
from reelflow.generation.published import PublishedSampling

NAMES = {"1": "goldfish, Carassius auratus", "2": "crane", "207": "golden retriever", "517": "crane"}


class DiTTransformer2DModel(diffusers.DiTTransformer2DModel):
    """The reference, whose copies of the embedders are written as such."""

    def save_pretrained(self, folder: Path, **options: Any) -> None:
        for block in self.transformer_blocks[1:]:
            block.norm1.emb.load_state_dict(self.transformer_blocks[0].norm1.emb.state_dict())
        super().save_pretrained(folder, **options)


class DiTPipeline(diffusers.DiTPipeline):
    """The reference, which returns latents too, and writes the names that published folders have."""

    def save_pretrained(self, folder: Path, **options: Any) -> None:
        super().save_pretrained(folder, **options)
        index = folder / "model_index.json"
        index.write_text(json.dumps(json.loads(index.read_text()) | {"id2label": NAMES}))

    def __call__(self, *, output_type: str, **arguments: Any) -> Any:
        decode = self.vae.decode
        with mock.patch.object(self.vae, "decode", side_effect=decode) as watched:
            made = super().__call__(output_type="pt", **arguments)
        if output_type == "pt":
            return (made.images,)
        return (watched.call_args.args[0] * self.vae.config.scaling_factor,)


@pytest.fixture
def pipeline() -> DiTPipeline:
    return DiTPipeline(
        transformer=DiTTransformer2DModel(
            num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=2, sample_size=6
        ).eval(),
        vae=AutoencoderKL(
            down_block_types=3 * ["DownEncoderBlock2D"],
            up_block_types=3 * ["UpDecoderBlock2D"],
            block_out_channels=[8, 8, 16],
            norm_num_groups=4,
        ).eval(),
        scheduler=DDIMScheduler(beta_schedule="linear", clip_sample=False),
        id2label=NAMES,
    )


def test_names_and_numbers_of_classes_to_pictures(tmp_path, pipeline):
    asked, steps = ["crane", "golden retriever", "Carassius auratus", "999"], 5
    theirs = {"class_labels": [*pipeline.get_label_ids(asked[:3]), 999], "num_inference_steps": steps}
    ours = {"prompts": asked, "num_steps": steps, "noise": normal(0, 4, 4, 6, 6)[:, :, None]}
    seeded = {"generator": lambda: torch.Generator().manual_seed(0)}
    check(pipeline, tmp_path / "dit", theirs | seeded, ours, unpacked=lambda latents: latents[:, :, None])


def test_what_is_no_class_or_no_picture_is_refused(tmp_path, pipeline):
    pipeline.save_pretrained(tmp_path)
    system = reelflow.load(tmp_path)
    for prompts, changes, message in (
        (["golden retreiver"], {}, "no class .*; nearest: 'golden retriever' or a number from 0 to 999"),
        (["1000"], {}, "numbered 0 to 999, got 1000; nearest: 999"),
        (["crane"], {"sampling": PublishedSampling(negative_prompt="blurry")}, "no class 'blurry'"),
        (["crane"], {"num_frames": 2}, "num_frames must be 1, got 2"),
    ):
        with pytest.raises(ConfigError, match=message):
            system.check(prompts, **changes)
    index = tmp_path / "model_index.json"
    for names, message in (({"1000": "snark"}, "names class 1000; there are 1000"), (["snark"], "no names by number")):
        index.write_text(json.dumps(json.loads(index.read_text()) | {"id2label": names}))
        with pytest.raises(CheckpointError, match=message):
            reelflow.load(tmp_path)


def test_guidance_may_lead_away_from_a_class(tmp_path, pipeline):
    pipeline.save_pretrained(tmp_path)
    system, sampling = reelflow.load(tmp_path), PublishedSampling(num_steps=2)
    usual = system.generate(["crane"], sampling=sampling, output="latents")
    away = system.generate(["crane"], sampling=sampling, negative_prompts=["1"], output="latents")
    itself = system.generate(["crane"], sampling=sampling, negative_prompts=["517"], output="latents")
    off = PublishedSampling(num_steps=2, guidance_scale=(1.0,))
    assert not torch.allclose(usual, away)
    assert torch.allclose(itself, system.generate(["crane"], sampling=off, output="latents"), atol=1e-5)
