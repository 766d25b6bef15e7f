import pytest
import tiny
from diffusers import (
    AutoencoderKLWan,
    UniPCMultistepScheduler,
    WanImageToVideoPipeline,
    WanPipeline,
    WanTransformer3DModel,
)
from pipelines import check, normal, tiny_picture
from transformers import AutoTokenizer, CLIPImageProcessorPil, CLIPVisionModel, UMT5EncoderModel

PROMPTS, NEGATIVE = ["a red kite &amp;  dunes", "two cats run slowly to the sea"], ["blue", ""]
SIZE = {"num_frames": 9, "height": 32, "width": 48}
GRID = (2, 16, 3, 4, 6)


def transformer(**changes) -> WanTransformer3DModel:
    sizes = {"num_attention_heads": 2, "attention_head_dim": 12, "text_dim": 32, "freq_dim": 16, "ffn_dim": 20}
    return WanTransformer3DModel(**sizes | {"num_layers": 2} | changes).eval()


def vae(**changes) -> AutoencoderKLWan:
    return AutoencoderKLWan(**{"base_dim": 4, "dim_mult": [1, 1, 2, 2], "num_res_blocks": 1} | changes).eval()


@pytest.fixture(scope="module")
def parts(tmp_path_factory) -> dict:
    """The tokenizer, the text encoder and the scheduler."""
    folder = tmp_path_factory.mktemp("parts")
    tiny.umt5(folder)
    return {
        "tokenizer": AutoTokenizer.from_pretrained(folder / "tokenizer"),
        "text_encoder": UMT5EncoderModel.from_pretrained(folder / "text_encoder"),
        "scheduler": UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
    }


def test_text_to_video(tmp_path, parts):
    pipeline = WanPipeline(transformer=transformer(), vae=vae(), **parts)
    noise, steps = normal(0, *GRID), 5
    theirs = {"prompt": PROMPTS, "negative_prompt": NEGATIVE, "num_inference_steps": steps, "latents": noise}
    ours = {"prompts": PROMPTS, "negative_prompts": NEGATIVE, "num_steps": steps, "noise": noise}
    check(pipeline, tmp_path / "wan", theirs | SIZE, ours | SIZE)


def test_two_experts_with_two_scales(tmp_path, parts):
    second = transformer(num_layers=1)
    pipeline = WanPipeline(transformer=transformer(), transformer_2=second, vae=vae(), boundary_ratio=0.875, **parts)
    noise, steps = normal(1, *GRID), 6
    theirs = {"prompt": PROMPTS, "num_inference_steps": steps, "latents": noise, "guidance_scale": 4.0}
    ours = {"prompts": PROMPTS, "num_steps": steps, "noise": noise, "guidance_scale": (4.0, 3.0)}
    check(pipeline, tmp_path / "wan", theirs | {"guidance_scale_2": 3.0} | SIZE, ours | SIZE)


def test_a_picture_with_its_features(tmp_path, parts):
    tiny.clip_vision(tmp_path)
    pipeline = WanImageToVideoPipeline(
        transformer=transformer(in_channels=36, image_dim=32, added_kv_proj_dim=24),
        vae=vae(),
        image_encoder=CLIPVisionModel.from_pretrained(tmp_path / "image_encoder"),
        image_processor=CLIPImageProcessorPil.from_pretrained(tmp_path / "image_processor"),
        **parts,
    )
    animate(pipeline, tmp_path / "wan", seed=2)


def test_a_picture_beside_the_latents(tmp_path, parts):
    pipeline = WanImageToVideoPipeline(transformer=transformer(in_channels=36), vae=vae(), **parts)
    animate(pipeline, tmp_path / "wan", seed=3)


def test_a_picture_in_place_of_the_first_frame(tmp_path, parts):
    pipeline = WanImageToVideoPipeline(transformer=transformer(), vae=vae(), expand_timesteps=True, **parts)
    animate(pipeline, tmp_path / "wan", seed=4)


def animate(pipeline: WanImageToVideoPipeline, folder, seed: int) -> None:
    """Compare on one picture, which is all that the reference takes at once."""
    noise, steps = normal(seed, 1, *GRID[1:]), 4
    picture, image = tiny_picture(seed, 32, 48)
    theirs = {"image": picture, "prompt": PROMPTS[0], "num_inference_steps": steps, "latents": noise}
    ours = {"image": image, "prompts": PROMPTS[:1], "num_steps": steps, "noise": noise}
    check(pipeline, folder, theirs | SIZE, ours | SIZE)
