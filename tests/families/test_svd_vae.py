from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from coders import EXAMPLES, Case, check, check_export, normal, random_model
from diffusers import AutoencoderKLTemporalDecoder
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from parity import error
from torch import Tensor, nn

from reelflow.errors import CheckpointError, ConfigError
from reelflow.families.svd_vae import SVD_VAE


class Pictures(NamedTuple):
    """Their posterior of pictures, as of clips."""

    posterior: Any
    clips: int

    @property
    def mean(self) -> Tensor:
        return self._clips(self.posterior.mean)

    @property
    def logvar(self) -> Tensor:
        return self._clips(self.posterior.logvar)

    def sample(self, generator: torch.Generator) -> Tensor:
        mean = self.mean
        return mean + torch.exp(0.5 * self.logvar) * torch.randn(mean.shape, generator=generator, dtype=mean.dtype)

    def _clips(self, pictures: Tensor) -> Tensor:
        return pictures.unflatten(0, (self.clips, -1)).movedim(2, 1)


def encode(reference: nn.Module, clip: Tensor) -> Pictures:
    return Pictures(reference.encode(clip.movedim(2, 1).flatten(0, 1)).latent_dist, len(clip))


def decode(reference: nn.Module, latents: Tensor) -> Tensor:
    pictures = latents.movedim(2, 1)
    decoded = reference.decode(pictures.flatten(0, 1), num_frames=pictures.shape[1]).sample
    return decoded.unflatten(0, pictures.shape[:2]).movedim(2, 1)


def case(widths: list[int], clip: Tensor, latents: Tensor, seed: int = 0, scale: float = 0.18215) -> Case:
    arguments = {
        "down_block_types": len(widths) * ["DownEncoderBlock2D"],
        "block_out_channels": widths,
        "layers_per_block": 2,
        "latent_channels": latents.shape[1],
        "scaling_factor": scale,
        "sample_size": 768,
    }
    return Case(SVD_VAE, AutoencoderKLTemporalDecoder, arguments, clip, latents, seed, encode=encode, decode=decode)


def drawn(draw: Callable[[st.SearchStrategy[Any]], Any]) -> Case:
    seed, latent, frames = draw(st.integers(0, 2**16)), draw(st.integers(1, 3)), draw(st.integers(1, 3))
    widths = draw(st.sampled_from([[32], [64], [32, 64], [64, 32]]))  # theirs has 32 groups
    rows, columns = draw(st.sampled_from([(4, 6), (6, 4)]))
    clip = normal(draw(st.integers(1, 2)), 3, frames, rows, columns, seed=seed)
    latents = normal(draw(st.integers(1, 2)), latent, draw(st.integers(1, 3)), rows // 2, columns // 2, seed=seed)
    return case(widths, clip, latents, seed, draw(st.sampled_from([0.18215, 2.0])))


@settings(max_examples=max(2, EXAMPLES // 2), deadline=None, phases=[Phase.generate])
@given(st.data())
def test_outputs_and_gradients_are_those_of_the_reference(data):
    check(drawn(data.draw))


TINY = case([32, 64], normal(1, 3, 4, 4, 6), normal(1, 2, 4, 2, 3))


def test_a_clip_of_several_frames_is_that_of_the_reference():
    check(TINY)


def test_a_folder_of_theirs_goes_through_ours_and_back(tmp_path):
    check_export(TINY, tmp_path)


def test_pictures_are_encoded_each_by_itself():
    vae, clip = random_model(TINY), TINY.clip
    whole = vae.encode(clip).mean
    first, state = vae.encode_chunk(clip[:, :, :3])
    rest, _ = vae.encode_chunk(clip[:, :, 3:], state)
    assert error(torch.cat([first.mean, rest.mean], dim=2), whole) <= 1e-12
    assert error(vae.encode(clip[:, :, 2:3]).mean, whole[:, :, 2:3]) <= 1e-12


def test_every_frame_depends_on_every_latent_so_chunks_are_not_decoded():
    vae, latents = random_model(TINY), TINY.latents.clone()
    whole = vae.decode(latents)
    latents[:, :, -1] += 1
    assert (vae.decode(latents) != whole).flatten(3).any(-1).any(1).all()
    assert all(obstacle.startswith("decoder[") for obstacle in vae.config.obstacles)
    with pytest.raises(ConfigError, match="so chunks would not give the whole clip's result"):
        vae.decode_chunk(latents)


def test_blocks_that_the_reference_leaves_out_are_refused():
    with pytest.raises(CheckpointError, match="layers_per_block=3"):
        SVD_VAE.read({**TINY.arguments, "layers_per_block": 3})
