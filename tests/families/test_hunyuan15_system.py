import json

import pytest
import tiny
from diffusers import (
    AutoencoderKLHunyuanVideo15,
    ClassifierFreeGuidance,
    FlowMatchEulerDiscreteScheduler,
    HunyuanVideo15ImageToVideoPipeline,
    HunyuanVideo15Pipeline,
    HunyuanVideo15Transformer3DModel,
)
from pipelines import check, normal, tiny_picture

from reelflow.errors import CheckpointError
from reelflow.families.systems import sketch_system

PROMPTS, NEGATIVE = (
    ["a red kite over the dunes", 'a cat walks to the sea, with "night" and “sun” over it'],
    ['"blue"', ""],
)
GRID = (2, 3, 4, 6)


def transformer(**changes) -> HunyuanVideo15Transformer3DModel:
    sizes = {"num_attention_heads": 2, "attention_head_dim": 12, "rope_axes_dim": [4, 4, 4], "num_layers": 1}
    widths = {"text_embed_dim": 32, "text_embed_2_dim": 32, "image_embed_dim": 32, "in_channels": 5, "out_channels": 2}
    return HunyuanVideo15Transformer3DModel(**sizes | widths | {"num_refiner_layers": 1, "mlp_ratio": 2.0} | changes)


def vae() -> AutoencoderKLHunyuanVideo15:
    model = AutoencoderKLHunyuanVideo15(
        latent_channels=2, block_out_channels=(4, 8, 16), layers_per_block=1, spatial_compression_ratio=4
    )
    model.enable_slicing()  # without, its mask takes no batch
    return model


@pytest.fixture(scope="module")
def readers(tmp_path_factory) -> dict:
    """What both kinds of pipeline have."""
    folder = tmp_path_factory.mktemp("readers")
    tokenizer, encoder = tiny.qwen_vl(folder)
    tokenizer_2, encoder_2 = tiny.byt5(folder)
    names = {"tokenizer": tokenizer, "text_encoder": encoder, "tokenizer_2": tokenizer_2, "text_encoder_2": encoder_2}
    return names | {"scheduler": FlowMatchEulerDiscreteScheduler(shift=5.0)}


@pytest.fixture(scope="module")
def seer(tmp_path_factory) -> dict:
    processor, encoder = tiny.siglip(tmp_path_factory.mktemp("seer"))
    return {"feature_extractor": processor, "image_encoder": encoder}


@pytest.fixture(scope="module")
def written(tmp_path_factory, readers):
    """The folder of a system that was compared, with guidance and its rescaling."""
    guider = ClassifierFreeGuidance(guidance_scale=6.0, guidance_rescale=0.7)
    pipeline = HunyuanVideo15Pipeline(transformer=transformer(), vae=vae(), guider=guider, **readers)
    folder = tmp_path_factory.mktemp("system") / "hunyuan"
    run(pipeline, folder, {"prompt": PROMPTS, "negative_prompt": NEGATIVE, "height": 16, "width": 24}, {})
    return folder


def test_text_to_video(written):
    sketch = sketch_system(written)
    assert (sketch.defaults.guidance_scale, sketch.rescale, sketch.defaults.clip) == (6.0, 0.7, (121, 480, 848))


def test_a_picture(tmp_path, readers, seer):
    guider = ClassifierFreeGuidance(guidance_scale=2.0, use_original_formulation=True)
    animate(tmp_path / "hunyuan", transformer(), guider, 2, **readers, **seer)


def test_networks_distilled_to_few_steps_are_told_where_a_step_leads(tmp_path, readers, seer):
    guider = ClassifierFreeGuidance(guidance_scale=6.0, enabled=False)
    animate(tmp_path / "hunyuan", transformer(use_meanflow=True), guider, 1, **readers, **seer)
    path = tmp_path / "hunyuan" / "model_index.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"_class_name": "HunyuanVideo15Pipeline"}))
    with pytest.raises(CheckpointError, match="HunyuanVideo15Pipeline does not tell it"):
        sketch_system(tmp_path / "hunyuan")


def animate(folder, network, guider, count, **parts) -> None:
    """Compare on one picture, which is all that the reference takes, for so many prompts."""
    pipeline = HunyuanVideo15ImageToVideoPipeline(transformer=network, vae=vae(), guider=guider, **parts)
    pipeline.target_size = 20  # the reference looks for 16 x 24 among grids of 5 x 5 cells
    picture, image = tiny_picture(1, 16, 24)
    said = {"prompt": PROMPTS[-count:], "negative_prompt": NEGATIVE[-count:]}
    run(pipeline, folder, said | {"image": picture}, {"image": image.expand(count, -1, -1, -1)})


def run(pipeline, folder, theirs, ours) -> None:
    prompts, negative = theirs["prompt"], theirs["negative_prompt"]
    noise = normal(0, len(prompts), *GRID)
    theirs = theirs | {"num_frames": 9, "num_inference_steps": 3, "latents": noise}
    ours = ours | {"prompts": prompts, "negative_prompts": negative, "num_frames": 9, "height": 16, "width": 24}
    check(pipeline, folder, theirs, ours | {"num_steps": 3, "noise": noise})


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("guider/guider_config", {"stop": 0.6}, "guidance of a part of the steps is not reproduced"),
        ("guider/guider_config", {"_class_name": "AutoGuidance"}, "of 'AutoGuidance'"),
        ("guider/guider_config", {"momentum": 0.5}, "momentum"),
        ("transformer/config", {"target_size": 641}, "target_size must be one of"),
    ],
)
def test_what_is_not_reproduced_is_refused(written, name, change, message):
    path = written / f"{name}.json"
    before = path.read_text()
    path.write_text(json.dumps(json.loads(before) | change))
    try:
        with pytest.raises(CheckpointError, match=message):
            sketch_system(written)
    finally:
        path.write_text(before)
