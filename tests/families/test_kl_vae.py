from collections.abc import Callable
from typing import Any

import pytest
import torch
from coders import EXAMPLES, Case, check, check_export, check_streams, cut, normal, random_model, random_reference
from diffusers import AutoencoderKL
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from parity import error
from safetensors.torch import load_file, save_file
from torch import Tensor

from reelflow.errors import CheckpointError
from reelflow.families.autoencoders import load_vae
from reelflow.families.kl_vae import KL_VAE


def encode(reference: AutoencoderKL, clip: Tensor) -> DiagonalGaussianDistribution:
    """Encode every frame as a picture."""
    moments = reference.encode(clip.movedim(2, 1).flatten(0, 1)).latent_dist.parameters
    return DiagonalGaussianDistribution(moments.unflatten(0, (len(clip), -1)).movedim(1, 2))


def decode(reference: AutoencoderKL, latents: Tensor) -> Tensor:
    frames = reference.decode(latents.movedim(2, 1).flatten(0, 1)).sample
    return frames.unflatten(0, (len(latents), -1)).movedim(1, 2)


def arguments(widths: list[int], **changes: Any) -> dict[str, Any]:
    return {
        "down_block_types": len(widths) * ["DownEncoderBlock2D"],
        "up_block_types": len(widths) * ["UpDecoderBlock2D"],
        "block_out_channels": widths,
        "norm_num_groups": 4,
        "sample_size": 512,
    } | changes


def case(draw: Callable[[st.SearchStrategy[Any]], Any]) -> Case:
    widths = draw(st.sampled_from([[8], [8, 16], [16, 8, 8], [8, 8, 16, 16]]))
    latent, frames, seed = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.integers(0, 2**16))
    side = 2 ** (len(widths) - 1)
    rows, columns = draw(st.sampled_from([(2, 1), (1, 2), (3, 2)]))
    chosen = arguments(
        widths,
        layers_per_block=draw(st.integers(1, 2)),
        latent_channels=latent,
        norm_num_groups=draw(st.sampled_from([1, 4])),
        scaling_factor=draw(st.sampled_from([0.18215, 1.5305])),
        shift_factor=draw(st.sampled_from([None, 0.0609])),
        use_quant_conv=draw(st.booleans()),
        use_post_quant_conv=draw(st.booleans()),
        mid_block_add_attention=draw(st.booleans()),
    )
    clip = normal(draw(st.integers(1, 2)), 3, frames, rows * side, columns * side, seed=seed)
    latents = normal(2, latent, frames, rows, columns, seed=seed + 1)
    return Case(KL_VAE, AutoencoderKL, chosen, clip, latents, seed, encode=encode, decode=decode)


@settings(max_examples=EXAMPLES, deadline=None, phases=[Phase.generate])
@given(st.data())
def test_outputs_and_gradients_are_those_of_the_reference(data):
    check(case(data.draw))


TINY = Case(
    KL_VAE,
    AutoencoderKL,
    arguments([8, 16], latent_channels=2, scaling_factor=1.5305, shift_factor=0.0609),
    normal(2, 3, 5, 4, 8),
    normal(2, 2, 5, 2, 4),
)


@settings(max_examples=EXAMPLES, deadline=None, phases=[Phase.generate])
@given(frames=st.sets(st.integers(1, 4)), latents=st.sets(st.integers(1, 4)))
def test_any_chunks_give_the_whole_clip(frames, latents):
    check_streams(random_model(TINY), TINY.clip, cut(5, frames), cut(5, latents))


def test_a_frame_is_the_picture_that_it_would_be_alone():
    vae = random_model(TINY)
    assert error(vae.encode(TINY.clip).mean[:, :, 3:4], vae.encode(TINY.clip[:, :, 3:4]).mean) <= 1e-12
    assert error(vae.decode(TINY.latents)[:, :, 3:4], vae.decode(TINY.latents[:, :, 3:4])) <= 1e-12


def test_a_folder_of_theirs_goes_through_ours_and_back(tmp_path):
    check_export(TINY, tmp_path)


OLDER = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}


def test_files_with_the_older_names_of_attention_are_read(tmp_path):
    random_reference(TINY).save_pretrained(tmp_path)
    vae, file = load_vae(tmp_path), tmp_path / "diffusion_pytorch_model.safetensors"
    state = load_file(file)
    for new, old in OLDER.items():
        state = {name.replace(new, old): x for name, x in state.items()}
    save_file(state, file)
    older = load_vae(tmp_path)
    assert all(torch.equal(x, older.state_dict()[name]) for name, x in vae.state_dict().items())
    del state["encoder.mid_block.attentions.0.query.weight"]
    save_file(state, file)
    with pytest.raises(CheckpointError, match=r"missing .*to_q"):
        load_vae(tmp_path)


def test_blocks_of_another_kind_are_refused():
    with pytest.raises(CheckpointError, match="down_block_types"):
        KL_VAE.read(TINY.arguments | {"down_block_types": ["DownEncoderBlock2D", "AttnDownEncoderBlock2D"]})
