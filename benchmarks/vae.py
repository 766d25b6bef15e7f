"""Published autoencoders against diffusers: encode and decode, float32, eager, the same weights and the same results.

Run: python benchmarks/vae.py [FAMILY ...] [--threads N] [--rounds N] [--lengths]. Networks of each family's shape at a
fraction of its width. Ours and theirs run in turn; medians are shown, and the median of each round's ratios. On one
thread seconds are those of the process. Memory is the most that results of operations take at once, beside weights and
inputs; what kernels use inside themselves is not in it. diffusers' windows in time are switched off where they would
change the result. With --lengths the first family named runs over clips of rising length instead.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import diffusers
import torch
from torch import Tensor, nn

from reelflow.cli.main import keep_freed_memory
from reelflow.families.coder import Coder
from reelflow.families.cogvideox_vae import COGVIDEOX_VAE
from reelflow.families.hunyuan_vae import HUNYUAN_VAE
from reelflow.families.ltx_vae import LTX_VAE
from reelflow.families.mochi_vae import MOCHI_VAE
from reelflow.families.wan_vae import WAN_VAE
from reelflow.models.vae import CausalVAE
from reelflow.models.weighing import Weighing

LENGTHS = (17, 33, 65, 129, 257)


@dataclass(frozen=True)
class Case:
    """One family at the size of this benchmark."""

    family: Coder
    reference: type[nn.Module]
    arguments: dict[str, Any]
    clip: tuple[int, int, int]  # frames, height, width
    whole: dict[str, bool] | None = None  # attributes of the reference that make it take a clip whole


WINDOWS = {"use_framewise_encoding": False, "use_framewise_decoding": False}
CASES = {
    "wan": Case(WAN_VAE, diffusers.AutoencoderKLWan, {"base_dim": 32}, (81, 64, 64)),
    "hunyuan": Case(
        HUNYUAN_VAE,
        diffusers.AutoencoderKLHunyuanVideo,
        {"block_out_channels": [32, 64, 128, 128]},
        (33, 64, 64),
        WINDOWS,
    ),
    "cogvideox": Case(
        COGVIDEOX_VAE, diffusers.AutoencoderKLCogVideoX, {"block_out_channels": [64, 128, 128, 256]}, (17, 72, 72)
    ),
    "mochi": Case(
        MOCHI_VAE,
        diffusers.AutoencoderKLMochi,
        {"encoder_block_out_channels": [32, 64, 128, 192], "decoder_block_out_channels": [64, 128, 128, 192]},
        (31, 64, 64),
        WINDOWS,
    ),
    "ltx": Case(
        LTX_VAE,
        diffusers.AutoencoderKLLTXVideo,
        {"block_out_channels": [64, 128, 256, 256], "decoder_block_out_channels": [64, 128, 256, 256]},
        (33, 128, 128),
        WINDOWS,
    ),
}


def sides(case: Case) -> tuple[CausalVAE, nn.Module]:
    """Build both, with the same random weights."""
    torch.manual_seed(0)
    reference = case.reference(**case.arguments).eval()
    for name, value in (case.whole or {}).items():
        setattr(reference, name, value)
    vae, state = CausalVAE(case.family.read(case.arguments)).eval(), reference.state_dict()
    ours = vae.state_dict()
    for row in case.family.weights(vae.config):
        for name, value in row.to_ours(state).items():
            ours[name].copy_(value)
    return vae, reference


def clock() -> float:
    """Return seconds: of this process where one thread works, so that others on the machine count for less."""
    return time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()


def memory(run: Callable[[], Tensor]) -> float:
    """Return the MiB that results of operations take at once."""
    with Weighing() as weighing:
        run()
    return weighing.peak / 2**20


def compare(name: str, case: Case, rounds: int) -> None:
    """Print a row for encoding and one for decoding."""
    vae, reference = sides(case)
    frames, height, width = case.clip
    generator = torch.Generator().manual_seed(1)
    clip = torch.rand(1, 3, *case.clip, generator=generator) * 2 - 1
    latents = torch.randn(1, *vae.config.latent_shape(*case.clip), generator=generator)
    std, mean = (statistic.view(1, -1, 1, 1, 1) for statistic in (vae.latent_std, vae.latent_mean))
    theirs = latents * std + mean
    pairs: dict[str, tuple[Callable[[], Tensor], Callable[[], Tensor]]] = {
        "encode": (
            lambda: vae.encode(clip).mean,
            lambda: (reference.encode(clip).latent_dist.mean - mean) / std,
        ),
        "decode": (lambda: vae.decode(latents), lambda: reference.decode(theirs).sample),
    }
    for kind, runs in pairs.items():
        rows = []
        ours, reference_output = (run() for run in runs)
        error = (
            (ours.clamp(-1, 1) - reference_output.clamp(-1, 1) if kind == "decode" else ours - reference_output)
            .abs()
            .max()
        )
        for _ in range(rounds):
            row = []
            for run in runs:
                start = clock()
                run()
                row.append(clock() - start)
            rows.append(row)
        seconds = [statistics.median(column) for column in zip(*rows, strict=True)]
        ratio = statistics.median(b / a for a, b in rows)
        peaks = [memory(run) for run in runs]
        print(
            f"{name:>10} {kind:>7} {f'{frames} x {height} x {width}':>15} {seconds[0]:>8.2f} {seconds[1]:>8.2f} "
            f"{ratio:>12.2f} {peaks[0]:>9.0f} {peaks[1]:>9.0f} {error:>10.0e}",
            flush=True,
        )


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("families", nargs="*", metavar="FAMILY", help=f"of {', '.join(CASES)}; all unless named")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--lengths", action="store_true", help=f"clips of {', '.join(map(str, LENGTHS))} frames")
    arguments = parser.parse_args()
    if unknown := set(arguments.families) - CASES.keys():
        parser.error(f"unknown: {', '.join(sorted(unknown))}; known: {', '.join(CASES)}")
    torch.set_num_threads(arguments.threads)
    keep_freed_memory()
    print(f"{arguments.threads} threads, torch {torch.__version__}, diffusers {diffusers.__version__}\n")
    heads = f"{'ours s':>8} {'theirs s':>8} {'theirs/ours':>12} {'ours MiB':>9} {'theirs MiB':>9} {'difference':>10}"
    print(f"{'':>10} {'':>7} {'clip':>15} {heads}")
    for name in arguments.families or CASES:
        case = CASES[name]
        if arguments.lengths:
            for length in LENGTHS:
                compare(name, Case(case.family, case.reference, case.arguments, (length, 32, 32), case.whole), 1)
            return
        compare(name, case, arguments.rounds)


if __name__ == "__main__":
    main()
