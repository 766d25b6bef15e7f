from collections.abc import Callable, Iterator
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch
from coders import EXAMPLES, Case, check, check_export, check_streams, cut, normal, random_model
from diffusers import AutoencoderKLCosmos
from diffusers.models.autoencoders import autoencoder_kl_cosmos as theirs
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from reelflow.errors import CheckpointError, ConfigError
from reelflow.families.cosmos_vae import COSMOS_VAE


@pytest.fixture(autouse=True, scope="module")
def exact_wavelets() -> Iterator[None]:
    """Give the reference its wavelets in float64, which it keeps in float32 whatever its type."""
    with mock.patch.dict(theirs._WAVELETS, {"haar": torch.full((2,), 0.5, dtype=torch.float64).sqrt()}):
        yield


class Point(NamedTuple):
    """Their latents, as a normalised posterior of almost no variance, with which ours is drawn from."""

    mean: Tensor

    @property
    def logvar(self) -> Tensor:
        return torch.full_like(self.mean, -30)

    def sample(self, generator: torch.Generator) -> Tensor:
        noise = torch.randn(self.mean.shape, generator=generator, dtype=self.mean.dtype)
        return self.mean + torch.exp(0.5 * self.logvar) * noise


def statistics(reference: nn.Module, latents: Tensor) -> list[Tensor]:
    """Return what its pipelines make of its configuration."""
    values = (reference.config.latents_mean, reference.config.latents_std)
    return [
        torch.tensor(each, dtype=latents.dtype).view(1, latents.shape[1], -1, 1, 1)[:, :, : latents.shape[2]]
        for each in values
    ]


def encode(reference: nn.Module, clip: Tensor) -> Point:
    latents = reference.encode(clip).latent_dist.mode()
    mean, std = statistics(reference, latents)
    return Point((latents - mean) / std)


def decode(reference: nn.Module, latents: Tensor) -> Tensor:
    mean, std = statistics(reference, latents)
    return reference.decode(latents * std + mean).sample


def case(clip: Tensor, latents: Tensor, seed: int = 0, frames: int = 4, **others: Any) -> Case:
    channels = latents.shape[1]
    arguments = {
        "latent_channels": channels,
        "latents_mean": normal(frames * channels, seed=seed).tolist(),
        "latents_std": (0.5 + normal(frames * channels, seed=seed + 1).abs()).tolist(),
    }
    return Case(COSMOS_VAE, AutoencoderKLCosmos, arguments | others, clip, latents, seed, encode=encode, decode=decode)


STRIDES = [  # patch, strides of space and of time, and levels in which they are reached
    (2, 2, 2, 1),
    (2, 4, 4, 3),
    (2, 4, 2, 2),
    (4, 8, 8, 3),
    (2, 8, 4, 3),
]


def drawn(draw: Callable[[st.SearchStrategy[Any]], Any]) -> Case:
    patch, space, time, levels = draw(st.sampled_from(STRIDES))
    seed, latent = draw(st.integers(0, 2**16)), draw(st.integers(1, 3))
    widths = st.lists(st.integers(2, 4), min_size=levels + 1, max_size=levels + 1)
    rows, columns = draw(st.sampled_from([(1, 2), (2, 1), (2, 2)]))
    frames = 1 + time * draw(st.integers(0, 2 if time < 8 else 1))
    clip = normal(draw(st.integers(1, 2)), 3, frames, rows * space, columns * space, seed=seed)
    latents = normal(1, latent, draw(st.integers(1, 3)), rows, columns, seed=seed)
    return case(
        clip,
        latents,
        seed,
        frames=draw(st.integers(3, 5)),
        encoder_block_out_channels=draw(widths),
        decode_block_out_channels=draw(widths),
        num_layers=draw(st.integers(1, 2)),
        patch_size=patch,
        spatial_compression_ratio=space,
        temporal_compression_ratio=time,
    )


@settings(max_examples=EXAMPLES // 2 + 1, deadline=None, phases=[Phase.generate])
@given(st.data())
def test_outputs_and_gradients_are_those_of_the_reference(data):
    check(drawn(data.draw))


TINY = case(
    normal(1, 3, 13, 8, 8),
    normal(1, 2, 4, 2, 2),
    encoder_block_out_channels=[2, 3, 4, 4],
    decode_block_out_channels=[3, 4, 4, 2],
    num_layers=1,
    patch_size=2,
    spatial_compression_ratio=4,
    temporal_compression_ratio=4,
)


def test_a_folder_of_theirs_goes_through_ours_and_back(tmp_path):
    check_export(TINY, tmp_path)


@settings(max_examples=EXAMPLES, deadline=None, phases=[Phase.generate])
@given(frames=st.sets(st.integers(1, 12)), latents=st.sets(st.integers(1, 3)))
def test_any_chunks_give_the_whole_clip(frames, latents):
    check_streams(random_model(TINY), TINY.clip, cut(13, frames), cut(4, latents))


def test_a_first_picture_is_the_mean_and_no_difference_of_its_transform():
    vae, picture = random_model(TINY), torch.ones(1, 3, 1, 8, 8, dtype=torch.float64)
    parts, _ = vae.encoder[1](vae.encoder[0](picture, None)[0], None)
    assert torch.equal(parts[:, :3], torch.ones_like(parts[:, :3]))
    assert not parts[:, 3:].any()


def test_more_frames_than_there_are_statistics_for_are_refused():
    vae, latents = random_model(TINY), normal(1, 2, 5, 2, 2)
    with pytest.raises(ConfigError, match="latents have statistics in 4 frames, got 5"):
        vae.decode(latents)
    _, state = vae.decode_chunk(latents[:, :, :4])
    with pytest.raises(ConfigError, match="latents have statistics in 4 frames, got 5"):
        vae.decode_chunk(latents[:, :, 4:], state)


def test_a_file_may_have_no_statistics():
    bare = {**TINY.arguments, "latents_mean": None, "latents_std": None}
    config = COSMOS_VAE.read(bare)
    assert COSMOS_VAE.write(config)["latents_mean"] is None
    assert COSMOS_VAE.read(COSMOS_VAE.write(config)) == config


def test_frames_that_the_reference_would_round_up_are_refused():
    with pytest.raises(ConfigError, match=r"num_frames must be 1 \+ 4 k, got 8; nearest: 5 or 9"):
        random_model(TINY).encode(normal(1, 3, 8, 8, 8))


def test_attention_in_a_level_is_refused():
    widths = 5 * [4]
    with pytest.raises(CheckpointError, match="4 levels, the last with attention"):
        COSMOS_VAE.read({"encoder_block_out_channels": widths, "decode_block_out_channels": widths})
