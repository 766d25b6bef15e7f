from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from unittest import mock

import pytest
import tiny
import torch
from diffusers import (
    AutoencoderKLLTXVideo,
    FlowMatchEulerDiscreteScheduler,
    LTXConditionPipeline,
    LTXImageToVideoPipeline,
    LTXPipeline,
    LTXVideoTransformer3DModel,
)
from diffusers.pipelines.ltx import pipeline_ltx_condition
from pipelines import check, normal, tiny_picture
from transformers import AutoTokenizer, T5EncoderModel

from reelflow.errors import CheckpointError
from reelflow.families.systems import sketch_system

# of the reference's scheduler, with numpy 2
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
PROMPTS, NEGATIVE = ["a red kite", "two cats run slowly to the sea"], ["blue", ""]
SIZE = {"num_frames": 17, "height": 64, "width": 96}
GRID = (2, 8, 3, 2, 3)


def transformer() -> LTXVideoTransformer3DModel:
    sizes = {"num_attention_heads": 2, "attention_head_dim": 10, "cross_attention_dim": 20, "caption_channels": 32}
    return LTXVideoTransformer3DModel(**sizes, in_channels=8, out_channels=8, num_layers=2).eval()


def vae(**changes) -> AutoencoderKLLTXVideo:
    widths = {"block_out_channels": (4, 8, 8, 8), "decoder_block_out_channels": (4, 8, 8, 8)}
    counts = {"layers_per_block": (1, 1, 1, 1, 1), "decoder_layers_per_block": (1, 1, 1, 1, 1)}
    made = AutoencoderKLLTXVideo(**{"latent_channels": 8, **widths, **counts} | changes).eval()
    made.latents_mean, made.latents_std = 0.2 * normal(8, 8), 1 + 0.2 * normal(9, 8).tanh()
    return made


def later_vae() -> AutoencoderKLLTXVideo:
    """Its decoder is told how noisy latents are: not at all."""
    down = {"block_out_channels": (4, 4, 8, 8, 8), "down_block_types": 4 * ("LTXVideo095DownBlock3D",)}
    folds = {"downsample_type": ("spatial", "temporal", "spatiotemporal", "spatiotemporal")}
    up = {"decoder_block_out_channels": (8, 16, 32), "decoder_layers_per_block": (1, 1, 1, 1)}
    up |= {"decoder_spatio_temporal_scaling": 3 * (True,), "decoder_inject_noise": 4 * (False,)}
    up |= {"upsample_residual": 3 * (True,), "upsample_factor": 3 * (2,), "timestep_conditioning": True}
    ratios = {"spatial_compression_ratio": 32, "temporal_compression_ratio": 8}
    return vae(**down, **folds, **up, **ratios, spatio_temporal_scaling=4 * (True,))


@pytest.fixture(scope="module")
def parts(tmp_path_factory) -> dict:
    """The tokenizer, the text encoder and the scheduler."""
    folder = tmp_path_factory.mktemp("parts")
    tiny.t5(folder, length=128)
    return {
        "tokenizer": AutoTokenizer.from_pretrained(folder / "tokenizer"),
        "text_encoder": T5EncoderModel.from_pretrained(folder / "text_encoder"),
        "scheduler": FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True,
            base_shift=0.95,
            max_shift=2.05,
            base_image_seq_len=1024,
            max_image_seq_len=4096,
            shift_terminal=0.1,
        ),
    }


def packed(latents: torch.Tensor) -> torch.Tensor:
    return latents.flatten(2).mT


def unpacked(tokens: torch.Tensor) -> torch.Tensor:
    return tokens.mT.unflatten(2, GRID[2:])


def seeded(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def test_text_to_video(tmp_path, parts):
    pipeline = LTXPipeline(transformer=transformer(), vae=vae(), **parts)
    noise, steps = normal(0, *GRID), 5
    theirs = {"prompt": PROMPTS, "negative_prompt": NEGATIVE, "latents": packed(noise), "frame_rate": 24}
    ours = {"prompts": PROMPTS, "negative_prompts": NEGATIVE, "noise": noise, "fps": 24.0}
    steps = {"num_inference_steps": 5}, {"num_steps": 5}
    check(pipeline, tmp_path / "ltx", theirs | SIZE | steps[0], ours | SIZE | steps[1], unpacked=unpacked)


def test_pictures_in_place_of_the_first_frame(tmp_path, parts):
    """Given latents, theirs would forget the pictures; both draw from the same seeds instead."""
    pipeline = LTXImageToVideoPipeline(transformer=transformer(), vae=vae(), **parts)
    pictures, images = zip(*(tiny_picture(seed, 64, 96) for seed in (1, 2)), strict=True)
    theirs = {"image": list(pictures), "prompt": PROMPTS, "generator": partial(seeded, 3, 4), "num_inference_steps": 4}
    ours = {"image": torch.cat(images), "prompts": PROMPTS, "seed": 3, "num_steps": 4}
    check(pipeline, tmp_path / "ltx", theirs | SIZE, ours | SIZE, unpacked=unpacked)


@contextmanager
def beginning_with(noise: torch.Tensor) -> Iterator[None]:
    """Let the reference, which takes no noise, begin with this one, and draw what else there is."""
    real = pipeline_ltx_condition.randn_tensor

    def drawn(shape, **options) -> torch.Tensor:
        begins = tuple(shape) == noise.shape
        return noise.to(options["dtype"], copy=True) if begins else real(shape, **options)

    with mock.patch.object(pipeline_ltx_condition, "randn_tensor", drawn):
        yield


@pytest.mark.parametrize("terminal", [None, 0.1])
def test_causal_positions_and_a_first_frame_that_is_never_still(tmp_path, parts, terminal):
    """Where sigmas are stretched, the reference tells the network others than it steps to."""
    scheduler = FlowMatchEulerDiscreteScheduler(shift_terminal=terminal)
    pipeline = LTXConditionPipeline(transformer=transformer(), vae=later_vae(), **parts | {"scheduler": scheduler})
    picture, image = tiny_picture(5, 64, 96)
    noise = normal(5, 1, *GRID[1:])
    theirs = {"image": picture, "prompt": PROMPTS[0], "generator": partial(seeded, 6), "num_inference_steps": 4}
    ours = {"image": image, "prompts": PROMPTS[:1], "noise": noise, "seed": 6, "num_steps": 4}
    with beginning_with(noise):
        check(pipeline, tmp_path / "ltx", theirs | SIZE, ours | SIZE)


def test_causal_positions_without_a_first_frame(tmp_path, parts):
    scheduler = FlowMatchEulerDiscreteScheduler()
    pipeline = LTXConditionPipeline(transformer=transformer(), vae=later_vae(), **parts | {"scheduler": scheduler})
    theirs = {"prompt": PROMPTS, "generator": partial(seeded, 7, 8), "num_inference_steps": 5, "frame_rate": 30}
    ours = {"prompts": PROMPTS, "seed": 7, "num_steps": 5, "fps": 30.0}
    check(pipeline, tmp_path / "ltx", theirs | SIZE, ours | SIZE)


def test_a_shift_by_the_size_of_the_clip_is_refused_where_the_pipeline_tells_no_size(tmp_path, parts):
    pipeline = LTXConditionPipeline(transformer=transformer(), vae=later_vae(), **parts)
    pipeline.save_pretrained(tmp_path / "ltx")
    with pytest.raises(CheckpointError, match=r"use_dynamic_shifting=true.* nearest: false"):
        sketch_system(tmp_path / "ltx")
