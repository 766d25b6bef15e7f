import json
from pathlib import Path
from typing import Any

import pytest
import torch
from coders import normal
from parity import BOUND32, BOUND64, error
from safetensors import safe_open

from reelflow.errors import CheckpointError, ConfigError
from reelflow.families.autoencoders import load_vae, save_vae
from reelflow.families.opensora_vae import OPENSORA_VAE
from reelflow.interop.checkpoints import gradients_as_theirs, state_as_theirs
from reelflow.interop.mapping import differences
from reelflow.models.vae import CausalVAE

FIXTURE = Path(__file__).parent / "fixtures" / "opensora_vae.safetensors"
with safe_open(FIXTURE, framework="pt") as file:
    CASES = json.loads(file.metadata()["cases"])
    TENSORS = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
EVERY_CASE = pytest.mark.parametrize("index", range(len(CASES)))


def found(index: int) -> dict[str, Any]:
    """Return a case's config.json."""
    note = CASES[index]
    return {
        "vae_2d": {"type": "VideoAutoencoderKL", "config": note["picture"]},
        "vae_temporal": {"type": "VAE_Temporal", **note["time"]},
        "micro_frame_size": note["frames"],
        "shift": [0.5, -0.25],
        "scale": [2.0, 4.0],
    }


def loaded(index: int, dtype: torch.dtype = torch.float64) -> CausalVAE:
    prefix = f"{index}.weight "
    theirs = {name.removeprefix(prefix): x.to(dtype) for name, x in TENSORS.items() if name.startswith(prefix)}
    theirs |= {name: torch.tensor(found(index)[name], dtype=dtype).view(1, 2, 1, 1, 1) for name in ("shift", "scale")}
    config = OPENSORA_VAE.read(found(index))
    rows, vae = OPENSORA_VAE.weights(config), CausalVAE(config).to(dtype)
    assert differences(rows, vae, {name: x.shape for name, x in theirs.items()}) == ""
    tensors = vae.state_dict()
    for row in rows:
        for name, x in row.to_ours(theirs).items():
            tensors[name].copy_(x)
    assert all(torch.equal(x, theirs[name]) for name, x in state_as_theirs(vae, rows).items())
    return vae


@EVERY_CASE
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, BOUND64), (torch.float32, 5 * BOUND32)])
def test_outputs_and_gradients_are_those_of_the_original(index, dtype, bound):
    note, vae = CASES[index], loaded(index, dtype)
    clip, latents = (normal(*note[name], seed=index).to(dtype) for name in ("clip", "latents"))
    std, mean = (x.view(1, -1, 1, 1, 1) for x in (vae.latent_std, vae.latent_mean))
    posterior = vae.encode(clip)
    outputs = {
        "mean": posterior.mean * std + mean,
        "logvar": posterior.logvar + 2 * std.log(),
        "decoded": vae.decode((latents - mean) / std),
    }
    for name, x in outputs.items():
        assert error(x.detach(), TENSORS[f"{index}.{name}"]) <= bound, name
    sum((x * normal(*x.shape, seed=i).to(dtype)).sum() for i, x in enumerate(outputs.values())).backward()
    gradients = gradients_as_theirs(vae, OPENSORA_VAE.weights(vae.config))
    probes = torch.stack(
        [
            (gradients[name].double() * normal(*gradients[name].shape, seed=i)).sum()
            for i, name in enumerate(note["names"])
        ]
    )
    assert error(probes, TENSORS[f"{index}.probes"]) <= bound


@EVERY_CASE
def test_a_configuration_of_any_size_survives_the_way_to_theirs_and_back(index):
    config = OPENSORA_VAE.read(found(index))
    assert OPENSORA_VAE.read(json.loads(json.dumps(OPENSORA_VAE.write(config)))) == config


def test_a_folder_is_written_and_read(tmp_path):
    vae = loaded(0, torch.float32).requires_grad_(False)
    save_vae(vae, tmp_path / "vae", OPENSORA_VAE)
    again, before = load_vae(tmp_path / "vae").state_dict(), vae.state_dict()
    assert again.keys() == before.keys()
    assert all(torch.equal(again[name], before[name]) for name in before)


@pytest.mark.parametrize("frames", [1, 5, 13, 17, 18, 30, 34])
def test_a_clip_comes_back_as_long_as_it_was(frames):
    vae = loaded(2).requires_grad_(False)
    latents = vae.encode(normal(1, 3, frames, 4, 4)).mean
    assert latents.shape[2] == 5 * (frames // 17) + (frames % 17 + 3) // 4
    assert vae.decode(latents).shape[2] == frames


def test_a_length_that_latents_would_not_tell_is_refused():
    with pytest.raises(ConfigError, match=r"must be 17 k, or 1 or 5 or 9 or 13 more, got 16; nearest: 13 or 17"):
        loaded(2).encode(normal(1, 3, 16, 4, 4))


def test_pieces_know_nothing_of_each_other_so_chunks_are_refused():
    vae, clip = loaded(2).requires_grad_(False), normal(1, 3, 22, 4, 4)
    whole = vae.encode(clip).mean
    torch.testing.assert_close(vae.encode(clip[:, :, 17:]).mean, whole[:, :, 5:], rtol=0, atol=1e-12)
    clip[:, :, 16] += 1
    changed = (vae.encode(clip).mean != whole).flatten(3).any(-1).any(1)[0]
    assert changed.tolist() == [True] * 5 + [False] * 2  # a norm sees its piece
    with pytest.raises(ConfigError, match="its norm sees pieces of the clip"):
        vae.encode_chunk(clip)


def test_another_network_in_time_is_refused():
    with pytest.raises(CheckpointError, match="vae_temporal of type 'VAE_Temporal_XL'"):
        OPENSORA_VAE.read({"vae_temporal": {"type": "VAE_Temporal_XL"}})
    with pytest.raises(CheckpointError, match="latents of several widths"):
        OPENSORA_VAE.read({"vae_temporal": {"type": "VAE_Temporal", "embed_dim": 8}})
