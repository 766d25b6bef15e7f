from functools import partial

import pytest
import tiny
import torch
from diffusers import (
    AutoencoderKLCogVideoX,
    CogVideoXDDIMScheduler,
    CogVideoXDPMScheduler,
    CogVideoXImageToVideoPipeline,
    CogVideoXPipeline,
    CogVideoXTransformer3DModel,
)
from pipelines import check, normal, tiny_picture
from transformers import AutoTokenizer, T5EncoderModel

from reelflow.families.schedulers import dynamic_guidance

PROMPTS, NEGATIVE = ["a red kite", "two cats run slowly to the sea"], ["blue", ""]
SIZE = {"num_frames": 9, "height": 32, "width": 48}
FRAMES = 3
BETAS = {"prediction_type": "v_prediction", "timestep_spacing": "trailing", "rescale_betas_zero_snr": True}


def transformer(**changes) -> CogVideoXTransformer3DModel:
    sizes = {"num_attention_heads": 2, "attention_head_dim": 16, "time_embed_dim": 24, "text_embed_dim": 32}
    base = {"sample_height": 4, "sample_width": 6, "sample_frames": 9, "num_layers": 1, "in_channels": 8}
    return CogVideoXTransformer3DModel(**sizes | base | {"out_channels": 8} | changes).eval()


def later(**changes) -> CogVideoXTransformer3DModel:
    rotary = {"use_rotary_positional_embeddings": True, "patch_size_t": 2, "patch_bias": False}
    return transformer(sample_height=20, sample_width=20, **rotary, **changes)


def vae(**changes) -> AutoencoderKLCogVideoX:
    widths = {"block_out_channels": (8, 8, 16, 16), "norm_num_groups": 4, "layers_per_block": 1}
    return AutoencoderKLCogVideoX(**{**widths, "latent_channels": 8, "scaling_factor": 0.7} | changes).eval()


@pytest.fixture(scope="module")
def parts(tmp_path_factory) -> dict:
    """The tokenizer and the text encoder."""
    folder = tmp_path_factory.mktemp("parts")
    tiny.t5(folder, length=226)
    return {
        "tokenizer": AutoTokenizer.from_pretrained(folder / "tokenizer"),
        "text_encoder": T5EncoderModel.from_pretrained(folder / "text_encoder"),
    }


def unpacked(latents: torch.Tensor) -> torch.Tensor:
    """Put time behind channels, and drop what was made to fill a patch."""
    return latents.transpose(1, 2)[:, :, -FRAMES:]


def seeded(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def noises(seed: int, batch: int, frames: int = FRAMES) -> tuple[dict, dict]:
    noise = normal(seed, batch, 8, frames, 4, 6)
    return {"latents": noise.transpose(1, 2)}, {"noise": noise}


def test_text_to_video_by_a_solver_that_draws(tmp_path, parts):
    scheduler = CogVideoXDPMScheduler(snr_shift_scale=1.0, **BETAS)
    rotary = transformer(use_rotary_positional_embeddings=True)
    pipeline = CogVideoXPipeline(transformer=rotary, vae=vae(), scheduler=scheduler, **parts)
    theirs, ours = noises(0, 2)
    theirs |= {"prompt": PROMPTS, "negative_prompt": NEGATIVE, "generator": partial(seeded, 5, 6)}
    ours |= {"prompts": PROMPTS, "negative_prompts": NEGATIVE, "seed": 5, "num_steps": 4}
    check(pipeline, tmp_path / "cog", theirs | SIZE | {"num_inference_steps": 4}, ours | SIZE, unpacked=unpacked)


def test_text_to_video_by_ddim_with_guidance_that_varies(tmp_path, parts):
    scheduler = CogVideoXDDIMScheduler(snr_shift_scale=3.0, **BETAS)
    pipeline = CogVideoXPipeline(transformer=transformer(), vae=vae(), scheduler=scheduler, **parts)
    (theirs, ours), steps = noises(1, 2), 4
    theirs |= {"prompt": PROMPTS, "use_dynamic_cfg": True, "num_inference_steps": steps}
    ours |= {"prompts": PROMPTS, "num_steps": steps}
    guidance = {"guidance": dynamic_guidance(6.0, steps)}
    check(pipeline, tmp_path / "cog", theirs | SIZE, ours | SIZE | guidance, unpacked=unpacked)


def test_an_odd_number_of_latent_frames_in_patches_of_two(tmp_path, parts):
    scheduler = CogVideoXDPMScheduler(snr_shift_scale=1.0, **BETAS)
    pipeline = CogVideoXPipeline(transformer=later(), vae=vae(), scheduler=scheduler, **parts)
    theirs, ours = noises(2, 2, FRAMES + 1)
    theirs |= {"prompt": PROMPTS, "generator": partial(seeded, 5, 6), "num_inference_steps": 3}
    ours |= {"prompts": PROMPTS, "seed": 5, "num_steps": 3}
    check(pipeline, tmp_path / "cog", theirs | SIZE, ours | SIZE, unpacked=unpacked)


def test_a_picture_beside_the_latents(tmp_path, parts):
    scheduler = CogVideoXDPMScheduler(snr_shift_scale=1.0, **BETAS)
    places = {"use_rotary_positional_embeddings": True, "use_learned_positional_embeddings": True}
    network = transformer(in_channels=16, **places)
    pipeline = CogVideoXImageToVideoPipeline(transformer=network, vae=vae(), scheduler=scheduler, **parts)
    animate(pipeline, tmp_path / "cog", seed=3, frames=FRAMES)


def test_a_picture_beside_an_odd_number_of_latent_frames(tmp_path, parts):
    scheduler = CogVideoXDDIMScheduler(snr_shift_scale=1.0, **BETAS)
    network, coder = later(in_channels=16, ofs_embed_dim=24), vae(invert_scale_latents=True)
    pipeline = CogVideoXImageToVideoPipeline(transformer=network, vae=coder, scheduler=scheduler, **parts)
    animate(pipeline, tmp_path / "cog", seed=4, frames=FRAMES + 1)


def animate(pipeline: CogVideoXImageToVideoPipeline, folder, seed: int, frames: int) -> None:
    pictures, images = zip(*(tiny_picture(each, 32, 48) for each in (seed, seed + 1)), strict=True)
    theirs, ours = noises(seed, 2, frames)
    theirs |= {"image": list(pictures), "prompt": PROMPTS, "generator": partial(seeded, 7, 8), "num_inference_steps": 3}
    ours |= {"image": torch.cat(images), "prompts": PROMPTS, "seed": 7, "num_steps": 3}
    check(pipeline, folder, theirs | SIZE, ours | SIZE, unpacked=unpacked)
