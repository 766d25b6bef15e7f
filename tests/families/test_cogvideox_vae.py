from collections.abc import Callable
from typing import Any

import pytest
import torch
from coders import EXAMPLES, Case, check, check_export, normal, random_model
from diffusers import AutoencoderKLCogVideoX
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from reelflow.errors import CheckpointError, ConfigError
from reelflow.families.cogvideox_vae import COGVIDEOX_VAE


def arguments(widths: list[int], **others: Any) -> dict[str, Any]:
    return {
        "down_block_types": len(widths) * ["CogVideoXDownBlock3D"],
        "up_block_types": len(widths) * ["CogVideoXUpBlock3D"],
        "block_out_channels": widths,
    } | others


def case(draw: Callable[[st.SearchStrategy[Any]], Any]) -> Case:
    groups, seed, latent = draw(st.integers(1, 2)), draw(st.integers(0, 2**16)), draw(st.integers(1, 3))
    levels = 3
    widths = [groups * 2 * draw(st.integers(1, 3)) for _ in range(levels)]
    values = arguments(
        widths,
        latent_channels=latent,
        layers_per_block=1,
        norm_num_groups=groups,
        scaling_factor=draw(st.sampled_from([0.7, 1.15258426])),
    )
    rows, columns = draw(st.sampled_from([(1, 2), (2, 1), (2, 2)]))
    side = 2 ** (levels - 1)
    clip = normal(
        1,
        3,
        draw(st.sampled_from([1, 8, 9, 17])),
        rows * side,
        columns * side,
        seed=seed,
    )
    latents = normal(draw(st.integers(1, 2)), latent, draw(st.integers(1, 5)), rows, columns, seed=seed)
    return Case(COGVIDEOX_VAE, AutoencoderKLCogVideoX, values, clip, latents, seed)


@settings(max_examples=EXAMPLES, deadline=None, phases=[Phase.generate])
@given(st.data())
def test_outputs_and_gradients_are_those_of_the_reference(data):
    check(case(data.draw))


TINY = Case(
    COGVIDEOX_VAE,
    AutoencoderKLCogVideoX,
    arguments([4, 8, 8], latent_channels=2, layers_per_block=1, norm_num_groups=2),
    normal(1, 3, 9, 8, 8),
    normal(1, 2, 3, 2, 2),
)


def test_a_folder_of_theirs_goes_through_ours_and_back(tmp_path):
    check_export(TINY, tmp_path)


@pytest.mark.parametrize("frames", [1, 8, 9, 16, 17])
def test_odd_and_even_clips_come_back_as_long_as_they_were(frames):
    vae = random_model(TINY)
    latents = vae.encode(normal(1, 3, frames, 4, 4)).mean
    assert latents.shape[1:] == vae.config.latent_shape(frames, 4, 4)
    assert vae.decode(latents).shape[2] == frames


@pytest.mark.parametrize(("frames", "near"), [(5, "1 or 8"), (13, "9 or 16"), (2, "1 or 8"), (0, "1 or 8")])
def test_a_length_that_would_come_back_as_another_is_refused(frames, near):
    with pytest.raises(ConfigError, match=rf"num_frames must be 1, 8 k or 8 k \+ 1, got {frames}; nearest: {near}$"):
        random_model(TINY).config.latent_shape(frames, 4, 4)


def test_a_piece_knows_those_before_it_and_its_norm_alone():
    vae, clip = random_model(TINY), normal(1, 3, 24, 8, 8)
    whole = vae.encode(clip).mean
    clip[:, :, 16:] += 1
    assert torch.equal(vae.encode(clip).mean[:, :, :4], whole[:, :, :4])
    clip[:, :, 0] += 1
    assert (vae.encode(clip).mean[:, :, :4] != whole[:, :, :4]).all()
    with pytest.raises(ConfigError, match="its norm sees pieces of the clip"):
        vae.encode_chunk(clip)


def test_what_no_published_weights_have_is_refused():
    with pytest.raises(CheckpointError, match="use_quant_conv=True"):
        COGVIDEOX_VAE.read({"use_quant_conv": True})
