from collections.abc import Callable
from typing import Any

import pytest
import torch
from coders import EXAMPLES, Case, check, check_export, cut, normal, random_model, random_reference
from diffusers import AutoencoderKLLTXVideo
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from parity import error

from reelflow.errors import CheckpointError, ConfigError
from reelflow.families.autoencoders import load_vae, save_vae
from reelflow.families.ltx_vae import LTX_VAE
from reelflow.models.vae import CausalVAE, Posterior

DOWN, FOLDING = "LTXVideoDownBlock3D", "LTXVideo095DownBlock3D"
FOLDS = {  # by how often they halve both time and space
    1: [["spatial", "temporal"], ["temporal", "spatial"], ["spatiotemporal"]],
    2: [["spatial", "temporal", "spatiotemporal"], ["spatiotemporal", "spatiotemporal"]],
}


CELLS = {"spatial": 4, "temporal": 2, "spatiotemporal": 8}


def strided(widths: list[int], blocks: list[int]) -> dict[str, Any]:
    levels = len(widths)
    return {
        "block_out_channels": widths,
        "down_block_types": levels * [DOWN],
        "layers_per_block": blocks,
        "spatio_temporal_scaling": [*(levels - 1) * [True], False],
        "downsample_type": levels * ["conv"],
    }


def folding(widths: list[int], blocks: list[int], folds: list[str]) -> dict[str, Any]:
    return {
        "block_out_channels": widths,
        "down_block_types": len(folds) * [FOLDING],
        "layers_per_block": blocks,
        "spatio_temporal_scaling": len(folds) * [True],
        "downsample_type": folds,
    }


def plain(widths: list[int], blocks: list[int]) -> dict[str, Any]:
    levels = len(widths)
    return {
        "decoder_block_out_channels": widths,
        "decoder_layers_per_block": blocks,
        "decoder_spatio_temporal_scaling": [*(levels - 1) * [True], False],
        "decoder_inject_noise": (levels + 1) * [False],
        "upsample_residual": levels * [False],
        "upsample_factor": levels * [1],
        "timestep_conditioning": False,
    }


def halving(base: int, blocks: list[int], noise: list[bool], *, timed: bool) -> dict[str, Any]:
    levels = len(blocks) - 1
    return {
        "decoder_block_out_channels": [base * 2**level for level in range(levels)],
        "decoder_layers_per_block": blocks,
        "decoder_spatio_temporal_scaling": levels * [True],
        "decoder_inject_noise": noise,
        "upsample_residual": levels * [True],
        "upsample_factor": levels * [2],
        "timestep_conditioning": timed,
    }


def case(
    sizes: dict[str, Any], clip: torch.Tensor, latents: torch.Tensor, seed: int = 0, noisy: tuple[float, ...] = (0.0,)
) -> Case:
    """Return the case in which the decoder is told how noisy each of the latents is, and draws noise by the seed."""
    timed = sizes["timestep_conditioning"]

    def decode(reference: AutoencoderKLLTXVideo, x: torch.Tensor) -> torch.Tensor:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return reference.decode(x, torch.tensor(noisy, dtype=x.dtype) if timed else None).sample

    def decode_ours(vae: CausalVAE, x: torch.Tensor) -> torch.Tensor:
        t = 1 - torch.tensor(noisy, dtype=x.dtype) if timed else None
        return vae.decode(x, t=t, generator=torch.Generator().manual_seed(seed))

    return Case(LTX_VAE, AutoencoderKLLTXVideo, sizes, clip, latents, seed, decode=decode, decode_ours=decode_ours)


def drawn(draw: Callable[[st.SearchStrategy[Any]], Any]) -> Case:
    seed, latent, patch = draw(st.integers(0, 2**16)), draw(st.integers(1, 3)), draw(st.sampled_from([1, 2]))
    levels, causal = draw(st.integers(1, 2)), draw(st.booleans())
    counts = st.lists(st.integers(1, 2), min_size=3, max_size=3)
    if draw(st.booleans()):
        chain = draw(st.sampled_from(FOLDS[levels]))
        widths = [draw(st.sampled_from([2, 4])), *(CELLS[fold] * draw(st.integers(1, 2)) for fold in chain)]
        encoder = folding(widths, (2 * draw(counts))[: len(widths)], chain)
    else:
        widths, blocks = [draw(st.integers(2, 5)) for _ in range(levels + 1)], draw(counts)[: levels + 1]
        encoder = strided(widths, [*blocks, blocks[0]])
    if draw(st.booleans()):
        noise, timed = [draw(st.booleans()) for _ in range(levels + 1)], draw(st.booleans())
        decoder = halving(16 // levels, draw(counts)[: levels + 1], noise, timed=timed)
    else:
        widths, blocks = [draw(st.integers(2, 5)) for _ in range(levels + 1)], draw(counts)[: levels + 1]
        decoder = plain(widths, [*blocks, blocks[0]])
    stride, (rows, columns) = 2**levels, draw(st.sampled_from([(1, 2), (2, 1), (2, 2)]))
    sizes = {
        "latent_channels": latent,
        "patch_size": patch,
        "resnet_norm_eps": draw(st.sampled_from([1e-6, 1e-3])),
        "decoder_causal": causal,
        "spatial_compression_ratio": patch * stride,
        "temporal_compression_ratio": stride,
    }
    frames, side = 1 + stride * draw(st.integers(0, 2)), patch * stride
    clip = normal(draw(st.integers(1, 2)), 3, frames, rows * side, columns * side, seed=seed)
    latents = normal(2, latent, draw(st.integers(1, 3)), rows, columns, seed=seed)
    return case(encoder | decoder | sizes, clip, latents, seed, noisy=(0.0625, 0.75))


@settings(max_examples=EXAMPLES // 2, deadline=None, phases=[Phase.generate])
@given(st.data())
def test_outputs_and_gradients_are_those_of_the_reference(data):
    check(drawn(data.draw))


def tiny(encoder: dict[str, Any], decoder: dict[str, Any], **others: Any) -> Case:
    sizes = {
        "latent_channels": 2,
        "patch_size": 2,
        "spatial_compression_ratio": 8,
        "temporal_compression_ratio": 4,
    }
    return case(encoder | decoder | sizes | others, normal(1, 3, 9, 8, 16), normal(1, 2, 3, 1, 2), noisy=(0.0625,))


PLAIN = tiny(strided([4, 4, 8], [1, 2, 1, 1]), plain([4, 4, 8], [1, 2, 1, 1]))
NOISY = tiny(strided([4, 4, 8], [1, 2, 1, 1]), halving(8, [1, 2, 1], [False, True, True], timed=True))
LATER = tiny(
    folding([4, 8, 16, 16], [1, 2, 1, 1], FOLDS[2][0]), halving(8, [1, 2, 1], [False, False, False], timed=True)
)
EVERY = pytest.mark.parametrize("each", [PLAIN, NOISY, LATER], ids=["plain", "noisy", "later"])


@EVERY
def test_small_ones_of_the_published_designs_are_those_of_the_reference(each):
    check(each)


@EVERY
def test_a_folder_of_theirs_goes_through_ours_and_back(each, tmp_path):
    check_export(each, tmp_path)


@pytest.mark.parametrize("each", [PLAIN, LATER], ids=["strided", "folding"])
@settings(max_examples=EXAMPLES, deadline=None, phases=[Phase.generate])
@given(lengths=st.sets(st.integers(1, 8)))
def test_any_chunks_encode_to_the_whole_clips_latents(each, lengths):
    vae, parts, state = random_model(each), [], None
    for chunk in each.clip.split(cut(9, lengths), dim=2):
        posterior, state = vae.encode_chunk(chunk, state)
        parts += [] if posterior is None else [posterior]
    whole = vae.encode(each.clip)
    streamed = Posterior(*(torch.cat(list(part), dim=2) for part in zip(*parts, strict=True)))
    assert error(streamed.mean, whole.mean) <= 1e-12
    assert error(streamed.logvar, whole.logvar) <= 1e-12


def test_the_first_frame_depends_on_the_last_latent_so_chunks_are_not_decoded():
    vae, latents = random_model(PLAIN), PLAIN.latents.clone()
    whole = vae.decode(latents)
    latents[:, :, -1] += 1
    assert (vae.decode(latents)[:, :, 0] != whole[:, :, 0]).any()
    assert not vae.config.streams
    assert all(obstacle.startswith("decoder[") for obstacle in vae.config.obstacles)
    with pytest.raises(ConfigError, match="looks at later frames, so chunks would not give the whole clip's result"):
        vae.decode_chunk(latents)


def test_statistics_that_lie_among_the_weights_are_read_and_written(tmp_path):
    theirs = random_reference(LATER)
    theirs.latents_mean.copy_(torch.tensor([0.5, -1.0]))
    theirs.latents_std.copy_(torch.tensor([2.0, 0.25]))
    theirs.save_pretrained(tmp_path / "theirs")
    vae, clip = load_vae(tmp_path / "theirs"), LATER.clip.float()
    mean, std = (x.view(1, 2, 1, 1, 1) for x in (theirs.latents_mean, theirs.latents_std))
    latents = vae.encode(clip).mean
    assert error(latents, (theirs.encode(clip).latent_dist.mean - mean) / std) <= 1e-5
    assert error(vae.decode(latents), theirs.decode(latents * std + mean, torch.zeros(1)).sample) <= 1e-5
    vae.set_statistics(torch.ones(2), torch.full((2,), 2.0))
    save_vae(vae, tmp_path / "again", LTX_VAE)
    again = AutoencoderKLLTXVideo.from_pretrained(tmp_path / "again")
    torch.testing.assert_close(again.latents_mean, torch.tensor([2.5, -0.75]))
    torch.testing.assert_close(again.latents_std, torch.tensor([4.0, 0.5]))


def test_latents_are_clean_unless_said_and_each_clip_has_its_time():
    vae, latents = random_model(LATER), normal(2, 2, 2, 1, 1)
    assert vae.time_scale is not None
    vae.time_scale.fill_(1000)
    assert torch.equal(vae.decode(latents), vae.decode(latents, t=1.0))
    both = vae.decode(latents, t=torch.tensor([1.0, 0.5], dtype=torch.float64))
    torch.testing.assert_close(both, torch.cat([vae.decode(latents[:1]), vae.decode(latents[1:], t=0.5)]))
    assert error(both[1:], vae.decode(latents[1:])) > 0.01


def test_the_noise_of_a_decoder_is_that_of_the_generator_in_all_frames():
    vae, latents = random_model(NOISY), NOISY.latents

    def decode(seed: int) -> torch.Tensor:
        return vae.decode(latents, generator=torch.Generator().manual_seed(seed))

    assert torch.equal(decode(0), decode(0))
    assert error(decode(0), decode(1)) > 1e-3


def test_a_time_is_refused_where_no_decoder_hears_it_or_it_is_of_another_batch():
    latents = normal(2, 2, 1, 1, 1)
    with pytest.raises(ConfigError, match="this decoder is told no time; leave t out"):
        random_model(PLAIN).decode(latents, t=0.95)
    with pytest.raises(ConfigError, match=r"one for each of 2 clips, got \(3,\)"):
        random_model(LATER).decode(latents, t=torch.ones(3))


def test_frames_that_the_reference_would_floor_are_refused():
    with pytest.raises(ConfigError, match=r"num_frames must be 1 \+ 4 k, got 8; nearest: 5 or 9"):
        random_model(PLAIN).encode(normal(1, 3, 8, 8, 8))


@pytest.mark.parametrize(
    "change",
    [
        {"spatio_temporal_scaling": [True, False, False]},
        {"layers_per_block": [1, 2, 1, 2]},
        {"decoder_layers_per_block": [1, 2, 1, 2]},
        {"upsample_factor": [1, 1, 2]},
        {"timestep_conditioning": True},
        {"encoder_causal": False},
        {"temporal_compression_ratio": 8},
    ],
)
def test_designs_that_were_never_published_are_refused(change):
    with pytest.raises(CheckpointError, match=next(iter(change))):
        LTX_VAE.read({**PLAIN.arguments, **change})
