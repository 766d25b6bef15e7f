import json

import pytest
import tiny
import torch
from diffusers import (
    AutoencoderKLHunyuanVideo,
    FlowMatchEulerDiscreteScheduler,
    HunyuanVideoImageToVideoPipeline,
    HunyuanVideoPipeline,
    HunyuanVideoTransformer3DModel,
)
from pipelines import check, normal, tiny_picture

from reelflow.errors import CheckpointError, ConfigError
from reelflow.families.systems import sketch_system
from reelflow.generation.published import PublishedPipeline, PublishedSampling

PROMPTS, NEGATIVE = ["a red kite over the dunes", "two cats run slowly to the sea at night"], ["blue", ""]


def transformer(**changes) -> HunyuanVideoTransformer3DModel:
    sizes = {"num_attention_heads": 2, "attention_head_dim": 12, "rope_axes_dim": [4, 4, 4], "num_layers": 1}
    widths = {"text_embed_dim": 32, "pooled_projection_dim": 32, "in_channels": 4, "out_channels": 4}
    depths = {"num_single_layers": 1, "num_refiner_layers": 1, "mlp_ratio": 2.0}
    return HunyuanVideoTransformer3DModel(**sizes | widths | depths | changes).eval()


def vae() -> AutoencoderKLHunyuanVideo:
    return AutoencoderKLHunyuanVideo(
        latent_channels=4, block_out_channels=(4, 4, 4, 4), layers_per_block=1, norm_num_groups=2
    ).eval()


@pytest.fixture(scope="module")
def common(tmp_path_factory) -> dict:
    """What both kinds of pipeline have."""
    tokenizer, encoder = tiny.clip_text(tmp_path_factory.mktemp("clip"))
    scheduler = FlowMatchEulerDiscreteScheduler(shift=7.0)
    return {"tokenizer_2": tokenizer, "text_encoder_2": encoder, "scheduler": scheduler}


@pytest.fixture(scope="module")
def blind(tmp_path_factory, common) -> dict:
    tokenizer, encoder = tiny.llama(tmp_path_factory.mktemp("llama"))
    return common | {"tokenizer": tokenizer, "text_encoder": encoder}


@pytest.fixture(scope="module")
def seeing(tmp_path_factory, common) -> dict:
    tokenizer, processor, encoder = tiny.llava(tmp_path_factory.mktemp("llava"))
    return common | {"tokenizer": tokenizer, "image_processor": processor, "text_encoder": encoder}


def test_text_to_video_told_of_guidance_and_led_away_from_a_negative_prompt(tmp_path, blind):
    pipeline = HunyuanVideoPipeline(transformer=transformer(), vae=vae(), **blind)
    theirs = {"prompt": PROMPTS, "negative_prompt": NEGATIVE, "true_cfg_scale": 3.0, "guidance_scale": 2.5}
    ours = {"prompts": PROMPTS, "negative_prompts": NEGATIVE, "guidance_scale": 3.0, "embedded_guidance": 2.5}
    run(pipeline, tmp_path / "hunyuan", theirs, ours)
    path = tmp_path / "hunyuan" / "model_index.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"_class_name": "HunyuanVideoImageToVideoPipeline"}))
    with pytest.raises(CheckpointError, match="its transformer reads none"):
        sketch_system(tmp_path / "hunyuan")


def test_a_picture_beside_the_latents(tmp_path, seeing):
    """A latent frame is made before those of the clip, and dropped: of 9 frames the reference gives 5."""
    network = transformer(image_condition_type="latent_concat", in_channels=9, guidance_embeds=False)
    pipeline = HunyuanVideoImageToVideoPipeline(transformer=network, vae=vae(), **seeing)
    picture, image = tiny_picture(2, 32, 48)
    theirs = {"image": picture, "prompt": PROMPTS[0], "negative_prompt": NEGATIVE[0], "true_cfg_scale": 3.0}
    ours = {"image": image, "prompts": PROMPTS[:1], "negative_prompts": NEGATIVE[:1], "guidance_scale": 3.0}
    run(pipeline, tmp_path / "hunyuan", theirs, ours | {"num_frames": 5})
    sketch = PublishedPipeline(sketch_system(tmp_path / "hunyuan"))
    assert sketch.clip(None, PublishedSampling()) == (125, 720, 1280)
    asked = PublishedSampling(height=32, width=48, embedded_guidance=6.0)
    with pytest.raises(ConfigError, match="reads no guidance"):
        sketch.check(PROMPTS[:1], num_frames=5, image=image, sampling=asked)


def test_a_picture_in_place_of_the_first_frame(tmp_path, seeing):
    pipeline = replacing(seeing)
    picture, image = tiny_picture(3, 32, 48)
    theirs = {"image": picture, "prompt": PROMPTS[0], "negative_prompt": NEGATIVE[0], "true_cfg_scale": 3.0}
    ours = {"image": image, "prompts": PROMPTS[:1], "negative_prompts": NEGATIVE[:1], "guidance_scale": 3.0}
    run(pipeline, tmp_path / "hunyuan", theirs, ours)


def test_two_pictures(tmp_path, seeing):
    """With a negative prompt the reference takes one at a time."""
    (one, ours_one), (other, ours_other) = tiny_picture(4, 32, 48), tiny_picture(5, 32, 48)
    theirs = {"image": [one, other], "prompt": PROMPTS, "guidance_scale": 6.0}
    ours = {"image": torch.cat([ours_one, ours_other]), "prompts": PROMPTS, "embedded_guidance": 6.0}
    run(replacing(seeing), tmp_path / "hunyuan", theirs, ours)


def replacing(parts) -> HunyuanVideoImageToVideoPipeline:
    network = transformer(image_condition_type="token_replace")
    return HunyuanVideoImageToVideoPipeline(transformer=network, vae=vae(), **parts)


def run(pipeline, folder, theirs, ours) -> None:
    noise, size = normal(0, len(ours["prompts"]), 4, 3, 4, 6), {"height": 32, "width": 48, "num_frames": 9}
    theirs = theirs | size | {"num_inference_steps": 4, "latents": noise}
    check(pipeline, folder, theirs, size | ours | {"num_steps": 4, "noise": noise})
