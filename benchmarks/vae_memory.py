"""Is the model of an autoencoder's peak memory right?

Every case is planned and carried out in a process of its own, on a CPU with one thread: whole, in chunks (a budget of less
than the whole clip's peak) or in tiles. Measured is how far the resident size rises above what it is before, when weights
and inputs are in memory and the same call has been made once, with freed memory given back at once
(MALLOC_MMAP_THRESHOLD_=65536; VmHWM, reset by /proc/self/clear_refs). Predicted is `Budgeted.peak`:

    the most bytes alive at once among the tensors that operations make, walked without data, plus, while a convolution
    runs, a copy of its weight and what else oneDNN was seen to copy (`reelflow.models.weighing.scratch_bytes`)

    python benchmarks/vae_memory.py
"""

import argparse
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from reelflow.families import cogvideox_vae, hunyuan_vae, kl_vae, ltx_vae, mochi_vae, wan_vae
from reelflow.models.vae import CausalVAE, VAEConfig


@dataclass(frozen=True)
class Case:
    """What goes through, and in which parts."""

    name: str
    way: str  # encode or decode
    latents: int
    side: int  # in latents
    parts: str = "whole"
    dtype: str = "float32"


CASES = (
    Case("wan", "decode", 3, 16),
    Case("wan", "decode", 8, 12, "chunks"),
    Case("wan", "decode", 2, 20, "tiles"),
    Case("wan", "encode", 3, 16),
    Case("wan", "encode", 8, 12, "chunks"),
    Case("wan", "decode", 3, 16, "whole", "bfloat16"),
    Case("hunyuan", "decode", 3, 12),
    Case("cogvideox", "decode", 4, 12),
    Case("mochi", "decode", 3, 12),
    Case("ltx", "decode", 5, 6),
    Case("ltx", "decode", 96, 2, "chunks"),
    Case("ltx", "encode", 3, 6),
    Case("kl", "decode", 1, 32),
    Case("kl", "encode", 1, 32),
)


def config_of(name: str) -> VAEConfig:
    """Return a published design, at half of its width but for the image autoencoder."""
    match name:
        case "wan":
            return wan_vae.autoencoder(base=48, decoder_base=48, latent=16)
        case "hunyuan":
            return hunyuan_vae.autoencoder(widths=(64, 128, 256, 256))
        case "cogvideox":
            return cogvideox_vae.autoencoder(widths=(64, 128, 128, 256))
        case "mochi":
            return mochi_vae.autoencoder(encoder=(32, 64, 128, 192), decoder=(64, 128, 256, 384))
        case "ltx":
            return ltx_vae.autoencoder(widths=(64, 128, 256, 256), decoder_widths=(64, 128, 256, 256))
    return next(iter(kl_vae.KL_VAE.sizes.values())).config


@torch.no_grad()
def measure(case: Case) -> None:
    """Print a row of the table; for a process of its own."""
    torch.set_num_threads(1)
    config, dtype = config_of(case.name), getattr(torch, case.dtype)
    vae = CausalVAE(config).to(dtype).eval()
    t, side = case.latents, case.side

    def given(t: int, side: int) -> torch.Tensor:
        if case.way == "decode":
            return torch.zeros(1, config.latent_channels, t, side, side, dtype=dtype)
        return torch.zeros(1, 3, *config.clip_shape(t, side, side), dtype=dtype)

    x = given(t, side)
    plan_of = vae.plan_decode if case.way == "decode" else vae.plan_encode
    run = vae.decode if case.way == "decode" else vae.encode
    memory = 2**50
    if case.parts == "chunks":
        memory = int(0.8 * plan_of(x.shape, memory).peak)
    elif case.parts == "tiles":  # half of what a stream of single latents takes
        memory = int(0.5 * plan_of(x.shape, memory).peak)
    plan = plan_of(x.shape, memory)
    run(x, memory=memory)  # a convolution of a new shape is compiled, which stays in memory
    Path("/proc/self/clear_refs").write_text("5")
    before, start = status("VmRSS"), time.perf_counter()
    run(x, memory=memory)
    seconds, peak = time.perf_counter() - start, status("VmHWM") - before
    cut = f"{plan.chunk} of {t} latents" + (
        f", tiles of {plan.tile[0]} x {plan.tile[1]}" if plan.tile[0] < side else ""
    )
    print(
        f"| {case.name} | {case.way} | {t} x {side} x {side}, {case.dtype} | {cut} | {plan.peak / 2**20:.1f} | "
        f"{peak / 2**20:.1f} | {plan.peak / peak:.2f} | {seconds:.1f} |",
        flush=True,
    )


def status(name: str) -> int:
    """Return a line of /proc/self/status in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(name))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", type=int, help="this one, in this process")
    asked = parser.parse_args().case
    if asked is not None:
        return measure(CASES[asked])
    print("| autoencoder | way | latents | at a time | predicted MiB | measured MiB | ratio | s |")
    print("|---|---|---|---|---|---|---|---|", flush=True)
    for index in range(len(CASES)):
        command = [sys.executable, __file__, "--case", str(index)]
        subprocess.run(command, env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}, check=True)
    return None


if __name__ == "__main__":
    main()
