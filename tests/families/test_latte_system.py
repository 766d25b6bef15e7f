import pytest
import tiny
from diffusers import AutoencoderKL, DDIMScheduler, LattePipeline, LatteTransformer3DModel
from pipelines import check, normal

PROMPTS, NEGATIVE = ["A red kite (2 x) &amp; dunes", "two cats run slowly to the sea"], ["Blue", ""]
SIZE = {"height": 16, "width": 24}
NOISE = normal(0, 2, 4, 3, 4, 6)


@pytest.fixture
def pipeline(tmp_path) -> LattePipeline:
    words, encoder = tiny.t5(tmp_path / "parts")
    return LattePipeline(
        tokenizer=words,
        text_encoder=encoder,
        transformer=LatteTransformer3DModel(
            num_attention_heads=2,
            attention_head_dim=8,
            in_channels=4,
            out_channels=8,
            num_layers=1,
            cross_attention_dim=16,
            attention_bias=True,
            sample_size=6,
            patch_size=2,
            activation_fn="gelu-approximate",
            num_embeds_ada_norm=1000,
            norm_type="ada_norm_single",
            norm_elementwise_affine=False,
            norm_eps=1e-6,
            caption_channels=32,
            video_length=3,
        ).eval(),
        vae=AutoencoderKL(
            down_block_types=3 * ["DownEncoderBlock2D"],
            up_block_types=3 * ["UpDecoderBlock2D"],
            block_out_channels=[8, 8, 16],
            norm_num_groups=4,
        ).eval(),
        scheduler=DDIMScheduler(beta_schedule="linear", clip_sample=False),
    )


def compare(pipeline: LattePipeline, folder, count: int) -> None:
    noise, steps = NOISE[:count], 5
    theirs = {"prompt": PROMPTS[:count], "negative_prompt": NEGATIVE[:count], "num_inference_steps": steps}
    ours = {"prompts": PROMPTS[:count], "negative_prompts": NEGATIVE[:count], "num_steps": steps}
    theirs |= {"video_length": 3, "latents": noise}
    check(pipeline, folder, theirs | SIZE, ours | {"num_frames": 3, "noise": noise} | SIZE)


def test_two_prompts_with_zeros_beyond_them(tmp_path, pipeline):
    compare(pipeline, tmp_path / "latte", 2)


def test_one_prompt_cut_where_it_ends(tmp_path, pipeline):
    compare(pipeline, tmp_path / "latte", 1)
