from collections.abc import Callable
from typing import Any

import pytest
from coders import EXAMPLES, Case, check, check_export, check_streams, cut, normal, random_model
from diffusers import AutoencoderKLHunyuanVideo15
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from reelflow.errors import ConfigError
from reelflow.families.hunyuan15_vae import HUNYUAN15_VAE

SHAPES = [  # widths, sides and time divided by
    ([4, 8, 16], 4, 4),
    ([8, 8, 16, 16], 8, 2),
]


def case(draw: Callable[[st.SearchStrategy[Any]], Any]) -> Case:
    widths, side, stride = draw(st.sampled_from(SHAPES))
    seed, latent = draw(st.integers(0, 2**16)), draw(st.sampled_from([1, 2, 4]))
    arguments = {
        "latent_channels": latent,
        "block_out_channels": widths,
        "layers_per_block": draw(st.integers(1, 2)),
        "spatial_compression_ratio": side,
        "temporal_compression_ratio": stride,
        "scaling_factor": draw(st.sampled_from([0.5, 1.03682])),
    }
    rows, columns = draw(st.sampled_from([(1, 2), (2, 1), (2, 2)]))
    clip = normal(1, 3, 1 + stride * draw(st.integers(0, 2)), rows * side, columns * side, seed=seed)
    latents = normal(1, latent, draw(st.integers(1, 3)), rows, columns, seed=seed)
    return Case(HUNYUAN15_VAE, AutoencoderKLHunyuanVideo15, arguments, clip, latents, seed)


@settings(max_examples=EXAMPLES, deadline=None, phases=[Phase.generate])
@given(st.data())
def test_outputs_and_gradients_are_those_of_the_reference(data):
    check(case(data.draw))


TINY = Case(
    HUNYUAN15_VAE,
    AutoencoderKLHunyuanVideo15,
    {
        "latent_channels": 2,
        "block_out_channels": [4, 8, 16],
        "layers_per_block": 1,
        "spatial_compression_ratio": 4,
    },
    normal(1, 3, 13, 8, 8),
    normal(1, 2, 3, 2, 2),
)


@settings(max_examples=EXAMPLES, deadline=None, phases=[Phase.generate])
@given(frames=st.sets(st.integers(1, 12)), latents=st.sets(st.integers(1, 3)))
def test_any_chunks_give_the_whole_clip(frames, latents):
    check_streams(random_model(TINY), TINY.clip, cut(13, frames), cut(4, latents))


def test_a_folder_of_theirs_goes_through_ours_and_back(tmp_path):
    check_export(TINY, tmp_path)


def test_no_latent_knows_a_later_frame():
    vae, clip = random_model(TINY), TINY.clip.clone()
    whole = vae.encode(clip).mean
    clip[:, :, 9:] += 1
    changed = vae.encode(clip).mean != whole
    assert not changed[:, :, :3].any()
    assert changed[:, :, 3].all()


def test_a_length_that_does_not_fit_is_refused():
    with pytest.raises(ConfigError, match=r"num_frames must be 1 \+ 4 k, got 8; nearest: 5 or 9"):
        random_model(TINY).encode(normal(1, 3, 8, 8, 8))
