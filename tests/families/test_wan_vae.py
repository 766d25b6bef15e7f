from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any
from unittest import mock

import pytest
import torch
from coders import EXAMPLES, Case, check, check_export, check_streams, cut, normal, random_model
from diffusers import AutoencoderKLWan
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from parity import promoted

from reelflow.errors import ConfigError
from reelflow.families.wan_vae import WAN_VAE

LEVELS = [  # multiples, and whether time is halved after each but the last
    ([1, 2], [True]),
    ([1, 2, 2], [False, True]),
    ([1, 2, 4, 4], [False, True, True]),
    ([2, 2, 1], [True, True]),
]


def unclamped() -> AbstractContextManager[Any]:
    """Decode without the clamp, which would hide errors and stop gradients."""
    return mock.patch.object(torch, "clamp", lambda x, min, max: x)


def case(draw: Callable[[st.SearchStrategy[Any]], Any]) -> Case:
    multiples, halvings = draw(st.sampled_from(LEVELS))
    residual = multiples[-2] % multiples[-1] == 0 and draw(st.booleans())  # else its last shortcut has no means
    patch, seed, latent = draw(st.sampled_from([None, 2])), draw(st.integers(0, 2**16)), draw(st.integers(1, 3))
    side = (patch or 1) * 2 ** (len(multiples) - 1)
    frames = draw(st.sampled_from([1, 5, 9] if len(multiples) < 4 else [1, 5]))
    rows, columns = draw(st.sampled_from([(1, 1), (1, 2), (2, 1)]))
    base = 2 * draw(st.integers(2, 4))
    arguments = {
        "base_dim": base,
        "decoder_base_dim": draw(st.sampled_from([None, 4, 6])),
        "z_dim": latent,
        "dim_mult": multiples,
        "num_res_blocks": draw(st.integers(1, 2)),
        "temperal_downsample": halvings,
        "latents_mean": normal(latent, seed=seed).tolist(),
        "latents_std": (0.5 + normal(latent, seed=seed + 1).abs()).tolist(),
        "is_residual": residual,
        "in_channels": 3 * (patch or 1) ** 2,
        "out_channels": 3 * (patch or 1) ** 2,
        "patch_size": patch,
    }
    clip = normal(draw(st.integers(1, 2)), 3, frames, rows * side, columns * side, seed=seed)
    latents = normal(1, latent, draw(st.integers(1, 3)), rows, columns, seed=seed)
    return Case(WAN_VAE, AutoencoderKLWan, arguments, clip, latents, seed, around=unclamped)


@settings(max_examples=EXAMPLES, deadline=None, phases=[Phase.generate])
@given(st.data())
def test_outputs_and_gradients_are_those_of_the_reference(data):
    check(case(data.draw))


def tiny(*, residual: bool) -> Case:
    arguments = {
        "base_dim": 4,
        "z_dim": 2,
        "dim_mult": [1, 2, 2],
        "num_res_blocks": 1,
        "temperal_downsample": [True, True],
        "latents_mean": [0.5, -1.0],
        "latents_std": [2.0, 0.5],
        "is_residual": residual,
        "in_channels": 12 if residual else 3,
        "out_channels": 12 if residual else 3,
        "patch_size": 2 if residual else None,
        "scale_factor_spatial": 8 if residual else 4,
    }
    return Case(WAN_VAE, AutoencoderKLWan, arguments, normal(1, 3, 13, 8, 16), normal(1, 2, 3, 1, 2))


@pytest.mark.parametrize("residual", [False, True])
@settings(max_examples=EXAMPLES, deadline=None, phases=[Phase.generate])
@given(frames=st.sets(st.integers(1, 12)), latents=st.sets(st.integers(1, 3)))
def test_any_chunks_give_the_whole_clip(residual, frames, latents):
    each = tiny(residual=residual)
    check_streams(random_model(each), each.clip, cut(13, frames), cut(4, latents))


@pytest.mark.parametrize("residual", [False, True])
def test_a_folder_of_theirs_goes_through_ours_and_back(residual, tmp_path):
    check_export(tiny(residual=residual), tmp_path)


def test_the_reference_clamps_what_ours_leaves():
    each = tiny(residual=False)
    vae = random_model(each)
    reference = AutoencoderKLWan(**each.arguments).double()
    rows = WAN_VAE.weights(vae.config)
    reference.load_state_dict({name: x for row in rows for name, x in row.to_theirs(vae.state_dict()).items()})
    latents = 3 * each.latents
    decoded = vae.decode(latents)
    assert decoded.abs().max() > 1
    with promoted():
        theirs = reference.decode(latents * vae.latent_std.view(1, -1, 1, 1, 1) + vae.latent_mean.view(1, -1, 1, 1, 1))
    torch.testing.assert_close(decoded.clamp(-1, 1), theirs.sample, rtol=0, atol=1e-10)


def test_frames_that_the_reference_would_drop_are_refused():
    vae = random_model(tiny(residual=False))
    with pytest.raises(ConfigError, match=r"num_frames must be 1 \+ 4 k, got 12; nearest: 9 or 13"):
        vae.encode(normal(1, 3, 12, 8, 8))
