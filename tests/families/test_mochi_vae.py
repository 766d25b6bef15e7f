from collections.abc import Callable
from typing import Any

import pytest
import torch
from coders import EXAMPLES, Case, check, check_export, check_streams, cut, normal, random_model
from diffusers import AutoencoderKLMochi
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from reelflow.errors import CheckpointError, ConfigError
from reelflow.families.mochi_vae import MOCHI_VAE

FACTORS = [([1, 2], [2, 2]), ([2, 1], [1, 2]), ([3], [2]), ([2, 3], [2, 1])]


def arguments(times: list[int], spaces: list[int], blocks: list[int], latent: int, seed: int) -> dict[str, Any]:
    levels = len(times) + 1
    return {
        "encoder_block_out_channels": levels * [32],
        "decoder_block_out_channels": [*(levels - 1) * [32], 64],
        "layers_per_block": blocks,
        "latent_channels": latent,
        "temporal_expansions": times,
        "spatial_expansions": spaces,
        "latents_mean": normal(latent, seed=seed).tolist(),
        "latents_std": (0.5 + normal(latent, seed=seed + 1).abs()).tolist(),
    }


def case(draw: Callable[[st.SearchStrategy[Any]], Any]) -> Case:
    times, spaces = draw(st.sampled_from(FACTORS))
    seed, latent = draw(st.integers(0, 2**16)), draw(st.integers(1, 3))
    ends = draw(st.integers(1, 2))
    values = arguments(times, spaces, [ends, *(draw(st.integers(1, 2)) for _ in times), ends], latent, seed)
    values["add_attention_block"] = [draw(st.booleans()) for _ in range(len(times) + 2)]
    rows, columns = draw(
        st.sampled_from([(2, 3), (3, 2)])
    )  # a group has a channel of one frame: few positions divide by nothing
    side = torch.tensor(spaces).prod().item()
    clip = normal(
        1, 3, 1 + torch.tensor(times).prod().item() * draw(st.integers(0, 2)), rows * side, columns * side, seed=seed
    )
    latents = normal(draw(st.integers(1, 2)), latent, draw(st.integers(1, 2)), rows, columns, seed=seed)
    return Case(MOCHI_VAE, AutoencoderKLMochi, values, clip, latents, seed)


@settings(max_examples=EXAMPLES, deadline=None, phases=[Phase.generate])
@given(st.data())
def test_outputs_and_gradients_are_those_of_the_reference(data):
    check(case(data.draw))


TINY = Case(
    MOCHI_VAE,
    AutoencoderKLMochi,
    arguments([2, 3], [2, 1], [1, 1, 1, 1], 2, 0) | {"add_attention_block": [False, True, True, True]},
    normal(1, 3, 13, 4, 4),
    normal(1, 2, 3, 2, 2),
)


@settings(max_examples=EXAMPLES, deadline=None, phases=[Phase.generate])
@given(frames=st.sets(st.integers(1, 12)), latents=st.sets(st.integers(1, 2)))
def test_any_chunks_give_the_whole_clip(frames, latents):
    check_streams(random_model(TINY), TINY.clip, cut(13, frames), cut(3, latents))


def test_a_folder_of_theirs_goes_through_ours_and_back(tmp_path):
    check_export(TINY, tmp_path)


def test_a_length_that_does_not_fit_is_refused():
    with pytest.raises(ConfigError, match=r"num_frames must be 1 \+ 6 k, got 12; nearest: 7 or 13"):
        random_model(TINY).encode(normal(1, 3, 12, 4, 4))


def test_another_number_of_blocks_at_the_end_is_refused():
    with pytest.raises(CheckpointError, match="as many at the end as at the start"):
        MOCHI_VAE.read({"layers_per_block": [3, 3, 4, 6, 2]})
