import pytest
import tiny
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from pipelines import check, normal

import reelflow
from reelflow.errors import ConfigError
from reelflow.generation.published import PublishedSampling

PROMPTS, NEGATIVE = ["a red kite & dunes", "two cats run slowly to the sea"], ["blue", ""]
SIZE = {"height": 24, "width": 40}
NOISE = normal(0, 2, 4, 6, 10)


def transformer(**changes) -> SD3Transformer2DModel:
    sizes = {
        "sample_size": 8,
        "in_channels": 4,
        "out_channels": 4,
        "num_layers": 2,
        "attention_head_dim": 8,
        "num_attention_heads": 2,
        "joint_attention_dim": 48,
        "caption_projection_dim": 16,
        "pooled_projection_dim": 32,
        "pos_embed_max_size": 6,
    }
    return SD3Transformer2DModel(**sizes | changes).eval()


def vae() -> AutoencoderKL:
    return AutoencoderKL(
        down_block_types=3 * ["DownEncoderBlock2D"],
        up_block_types=3 * ["UpDecoderBlock2D"],
        block_out_channels=[8, 8, 16],
        norm_num_groups=4,
        latent_channels=4,
        scaling_factor=1.5305,
        shift_factor=0.0609,
        use_quant_conv=False,
        use_post_quant_conv=False,
    ).eval()


@pytest.fixture(scope="module")
def encoders(tmp_path_factory) -> dict:
    """Three, 16 + 24 and 48 wide, and their tokenizers."""
    folder = tmp_path_factory.mktemp("parts")
    first = tiny.clip_text(folder, tokenizer="tokenizer", encoder="text_encoder", dim=16, projection=12, seed=1)
    second = tiny.clip_text(folder, dim=24, projection=20, pad="!", seed=2)
    third = tiny.t5(folder, tokenizer="tokenizer_3", encoder="text_encoder_3", dim=48)
    parts = {}
    for end, (words, encoder) in (("", first), ("_2", second), ("_3", third)):
        parts |= {f"tokenizer{end}": words, f"text_encoder{end}": encoder}
    return parts


def compare(pipeline: StableDiffusion3Pipeline, folder, *, steps: int, **more) -> None:
    theirs = {"prompt": PROMPTS, "num_inference_steps": steps, "latents": NOISE} | SIZE | more
    ours = {"prompts": PROMPTS, "num_steps": steps, "noise": NOISE[:, :, None]} | SIZE
    if "negative_prompt" in more:
        ours |= {"negative_prompts": more["negative_prompt"]}
    check(pipeline, folder, theirs, ours, unpacked=lambda latents: latents[:, :, None])


def test_text_to_a_picture(tmp_path, encoders):
    pipeline = StableDiffusion3Pipeline(
        transformer=transformer(),
        vae=vae(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        **encoders,
    )
    compare(pipeline, tmp_path / "sd3", steps=5, negative_prompt=NEGATIVE)


def test_without_the_third_encoder_and_with_a_shift_that_depends_on_the_size(tmp_path, encoders):
    pipeline = StableDiffusion3Pipeline(
        transformer=transformer(dual_attention_layers=(0,), qk_norm="rms_norm"),
        vae=vae(),
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, max_image_seq_len=300),
        **encoders | {"text_encoder_3": None, "tokenizer_3": None},
    )
    compare(pipeline, tmp_path / "sd3", steps=4)
    system = reelflow.load(tmp_path / "sd3")
    assert system.generate(PROMPTS[:1], sampling=PublishedSampling(num_steps=1)).shape == (1, 3, 1, 32, 32)
    for wrong, message in (
        ({"num_frames": 5}, "makes pictures: num_frames must be 1, got 5; nearest: 1"),
        ({"sampling": PublishedSampling(width=56)}, "width must be at most 48 .* got 56; nearest: 48"),
        ({"sampling": PublishedSampling(height=36)}, "height must be a multiple of 8 .* got 36; nearest: 32 or 40"),
    ):
        with pytest.raises(ConfigError, match=message):
            system.check(PROMPTS, **wrong)
