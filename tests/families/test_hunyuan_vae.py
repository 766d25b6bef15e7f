from collections.abc import Callable
from typing import Any

import pytest
import torch
from coders import EXAMPLES, Case, check, check_export, normal, random_model
from diffusers import AutoencoderKLHunyuanVideo
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from reelflow.errors import ConfigError
from reelflow.families.hunyuan_vae import HUNYUAN_VAE


def arguments(widths: list[int], **others: Any) -> dict[str, Any]:
    levels = len(widths)
    return {
        "down_block_types": levels * ["HunyuanVideoDownBlock3D"],
        "up_block_types": levels * ["HunyuanVideoUpBlock3D"],
        "block_out_channels": widths,
        "spatial_compression_ratio": 2 ** (levels - 1),
    } | others


def case(draw: Callable[[st.SearchStrategy[Any]], Any]) -> Case:
    groups, seed, latent = draw(st.integers(1, 2)), draw(st.integers(0, 2**16)), draw(st.integers(1, 3))
    levels = draw(st.sampled_from([3, 4]))
    widths = [groups * 2 * draw(st.integers(1, 3)) for _ in range(levels)]
    values = arguments(
        widths,
        latent_channels=latent,
        layers_per_block=draw(st.integers(1, 2)),
        norm_num_groups=groups,
        scaling_factor=draw(st.sampled_from([0.5, 0.476986, 3.0])),
        mid_block_add_attention=draw(st.booleans()),
    )
    rows, columns = draw(st.sampled_from([(1, 2), (2, 1), (2, 2)]))
    side, frames = 2 ** (levels - 1), draw(st.sampled_from([1, 5, 9] if levels < 4 else [1, 5]))
    clip = normal(draw(st.integers(1, 2)), 3, frames, rows * side, columns * side, seed=seed)
    latents = normal(1, latent, draw(st.integers(1, 3)), rows, columns, seed=seed)
    return Case(HUNYUAN_VAE, AutoencoderKLHunyuanVideo, values, clip, latents, seed)


@settings(max_examples=EXAMPLES, deadline=None, phases=[Phase.generate])
@given(st.data())
def test_outputs_and_gradients_are_those_of_the_reference(data):
    check(case(data.draw))


TINY = Case(
    HUNYUAN_VAE,
    AutoencoderKLHunyuanVideo,
    arguments([4, 8, 8], latent_channels=2, layers_per_block=1, norm_num_groups=2),
    normal(1, 3, 9, 8, 8),
    normal(1, 2, 3, 2, 2),
)


def test_a_folder_of_theirs_goes_through_ours_and_back(tmp_path):
    check_export(TINY, tmp_path)


def test_the_first_latent_depends_on_the_last_frame_so_chunks_are_refused():
    vae, clip = random_model(TINY), TINY.clip.clone()
    whole = vae.encode(clip).mean
    clip[:, :, -1] += 1
    assert (vae.encode(clip).mean != whole).any()
    assert (vae.encode(clip).mean[:, :, 0] != whole[:, :, 0]).all()
    assert "encoder[1] (res): its norm sees all frames" in vae.config.obstacles
    with pytest.raises(ConfigError, match="its norm sees all frames"):
        vae.encode_chunk(clip[:, :, :1])
    with pytest.raises(ConfigError, match="its norm sees all frames"):
        vae.decode_chunk(torch.zeros(1, 2, 1, 2, 2, dtype=torch.float64))


def test_frames_that_the_reference_would_floor_are_refused():
    with pytest.raises(ConfigError, match=r"num_frames must be 1 \+ 4 k, got 18; nearest: 17 or 21"):
        random_model(TINY).encode(normal(1, 3, 18, 8, 8))
