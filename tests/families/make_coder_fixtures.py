"""Record what an autoencoder computes that diffusers has no class for: its own repository is run, on a tiny network.

    python tests/families/make_coder_fixtures.py CHECKOUT      hpcaitech/Open-Sora at v1.2.0

writes tests/families/fixtures/opensora_vae.safetensors: the weights of tiny networks, drawn at random and rounded to
float16, clips and latents; the posterior's mean and log-variance of each piece and the decoded clips, in float64; and of
each gradient of a random projection of these its product with a random tensor, which is as good as all of it and a
hundredth of the size. The repository's own encoder draws the pictures' latents; here, as in ours, it takes their means.
"""

import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from coders import normal
from diffusers import AutoencoderKL
from parity import randomise
from safetensors.torch import save_file
from torch import Tensor, nn

FIXTURE = Path(__file__).parent / "fixtures" / "opensora_vae.safetensors"
PICTURE = {
    "down_block_types": 2 * ["DownEncoderBlock2D"],
    "up_block_types": 2 * ["UpDecoderBlock2D"],
    "block_out_channels": [4, 4],
    "latent_channels": 2,
    "norm_num_groups": 2,
    "sample_size": 512,
}
TIME = {"in_out_channels": 2, "latent_embed_dim": 2, "embed_dim": 2, "num_groups": 2}
CASES = [  # arguments of the autoencoder in time, frames of a piece, of the clip, latents
    ({"filters": 4, "num_res_blocks": 2, "channel_multipliers": [1, 2], "temporal_downsample": [True]}, 5, 8, 4),
    (
        {"filters": 4, "num_res_blocks": 1, "channel_multipliers": [2, 1, 1], "temporal_downsample": [False, True]},
        9,
        12,
        6,
    ),
    (
        {"filters": 4, "num_res_blocks": 1, "channel_multipliers": [1, 2, 1], "temporal_downsample": [True, True]},
        17,
        1,
        1,
    ),
]


def main(checkout: Path) -> None:
    """Write the fixture."""
    registry, files = ModuleType("opensora.registry"), ModuleType("opensora.utils.ckpt_utils")
    registry.MODELS = type("Models", (), {"register_module": staticmethod(lambda *_: lambda x: x)})()
    files.load_checkpoint = None
    sys.modules |= {"opensora.registry": registry, "opensora.utils.ckpt_utils": files}
    for name in ("opensora", "opensora.models", "opensora.models.vae", "opensora.utils"):
        module = sys.modules[name] = ModuleType(name)
        module.__path__ = [str(checkout / name.replace(".", "/"))]
    from opensora.models.vae.vae_temporal import VAE_Temporal

    tensors: dict[str, Tensor] = {}
    notes: list[dict[str, Any]] = []
    for index, (arguments, frames, clip_frames, latent_frames) in enumerate(CASES):
        both = nn.ModuleDict(
            {"spatial": AutoencoderKL(**PICTURE), "temporal": VAE_Temporal(**TIME, **arguments)}
        ).double()
        randomise(both, index)
        both.load_state_dict({name: x.half().double() for name, x in both.state_dict().items()})
        stride = 2 ** sum(arguments["temporal_downsample"])
        clip, latents = normal(1, 3, clip_frames, 4, 8, seed=index), normal(1, 2, latent_frames, 2, 4, seed=index)
        found = run(both["spatial"], both["temporal"], clip, latents, frames, (frames - 1) // stride + 1, stride)
        probes = torch.stack(
            [(p.grad * normal(*p.shape, seed=i)).sum() for i, p in enumerate(both.parameters())]
        )  # in the order of names
        names = [called(name) for name, _ in both.named_parameters()]
        tensors |= {f"{index}.weight {called(name)}": x.half() for name, x in both.state_dict().items()}
        tensors |= {f"{index}.{name}": x.detach().contiguous() for name, x in found.items()} | {
            f"{index}.probes": probes
        }
        notes.append({"time": TIME | arguments, "picture": PICTURE, "frames": frames, "clip": list(clip.shape),
                      "latents": list(latents.shape), "names": names})  # fmt: skip
    command = "python tests/families/make_coder_fixtures.py CHECKOUT"
    save_file(tensors, FIXTURE, metadata={"cases": json.dumps(notes), "command": command})


def called(name: str) -> str:
    return name.replace("spatial.", "spatial_vae.module.", 1).replace("temporal.", "temporal_vae.", 1)


def run(
    spatial: nn.Module, temporal: nn.Module, clip: Tensor, latents: Tensor, frames: int, size: int, stride: int
) -> dict[str, Tensor]:
    """Encode and decode in pieces, and walk back from a random projection."""
    pictures = spatial.encode(clip.movedim(2, 1).flatten(0, 1)).latent_dist.mean * 0.18215
    pictures = pictures.unflatten(0, (1, -1)).movedim(1, 2)
    posteriors = [temporal.encode(piece) for piece in pictures.split(frames, dim=2)]
    pieces = [
        temporal.decode(piece, num_frames=(piece.shape[2] - 1) * stride + 1) for piece in latents.split(size, dim=2)
    ]
    decoded = spatial.decode(torch.cat(pieces, dim=2).movedim(2, 1).flatten(0, 1) / 0.18215).sample
    found = {
        "mean": torch.cat([each.mean for each in posteriors], dim=2),
        "logvar": torch.cat([each.logvar for each in posteriors], dim=2),
        "decoded": decoded.unflatten(0, (1, -1)).movedim(1, 2),
    }
    sum((x * normal(*x.shape, seed=i)).sum() for i, x in enumerate(found.values())).backward()
    for parameter in [*spatial.parameters(), *temporal.parameters()]:
        parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
    return found


if __name__ == "__main__":
    main(Path(sys.argv[1]))
