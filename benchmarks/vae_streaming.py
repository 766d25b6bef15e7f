"""The autoencoder of `make demo` over a whole clip and over a stream: seconds, and memory against the clip's length.

Run: python benchmarks/vae_streaming.py (OMP_NUM_THREADS=1 for one thread). Each row is a process of its own, because
a process never forgets its peak; memory is that peak less the peak before the first frame, so 0 means less than
starting up had needed. The stream makes its frames as it goes and keeps none: its memory is what streaming needs.
"""

import resource
import subprocess
import sys
import time

import torch

from reelflow.models.vae import CausalVAE
from reelflow.planning.cost import vae_cost
from reelflow.recipes.world import world

CONFIG = world().vae.model
SIZE, LENGTHS, CHUNK = 64, (17, 65, 257, 1025), 4 * CONFIG.temporal_stride


def peak_mib() -> float:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1024**2 if sys.platform == "darwin" else 1024)


def frames(num_frames: int) -> torch.Tensor:
    return torch.zeros(1, 3, num_frames, SIZE, SIZE)


@torch.no_grad()
def measure(mode: str, num_frames: int) -> None:
    """Encode and decode one clip in this process; print seconds and MiB."""
    torch.manual_seed(0)
    vae = CausalVAE(CONFIG)
    vae.decode(vae.encode(frames(1)).mean)  # load what is loaded once
    before, start = peak_mib(), time.perf_counter()
    if mode == "whole":
        decoded = vae.decode(vae.encode(frames(num_frames)).mean).shape[2]
    else:
        decoded, state, decoder_state = 0, None, ()
        for length in [1] + (num_frames - 1) // CHUNK * [CHUNK]:
            posterior, state = vae.encode_chunk(frames(length), state)
            clip, decoder_state = vae.decode_chunk(posterior.mean, decoder_state)
            decoded += clip.shape[2]
    assert decoded == num_frames
    print(time.perf_counter() - start, peak_mib() - before)


def main() -> None:
    cost = vae_cost(CONFIG, LENGTHS[0], SIZE, SIZE)
    print(
        f"{cost.num_parameters:,} parameters, {SIZE} x {SIZE}, chunks of {CHUNK} frames, {torch.get_num_threads()} threads"
    )
    print("FLOP = 2 per multiply-add of every convolution, encode and decode, counted on the whole clip\n")
    print(
        f"{'frames':>6} {'GFLOP':>7} {'whole s':>9} {'stream s':>9} {'stream/whole':>12} {'whole MiB':>10} {'stream MiB':>10}"
    )
    for num_frames in LENGTHS:
        cost = vae_cost(CONFIG, num_frames, SIZE, SIZE)
        seconds, mib = {}, {}
        for mode in ("whole", "stream"):
            command = [sys.executable, __file__, mode, str(num_frames)]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            seconds[mode], mib[mode] = map(float, done.stdout.split())
        print(
            f"{num_frames:>6} {(cost.encode_flops + cost.decode_flops) / 1e9:>7.1f} {seconds['whole']:>9.2f}"
            f" {seconds['stream']:>9.2f} {seconds['stream'] / seconds['whole']:>12.2f}"
            f" {mib['whole']:>10.0f} {mib['stream']:>10.0f}"
        )


if __name__ == "__main__":
    if len(sys.argv) == 3:
        measure(sys.argv[1], int(sys.argv[2]))
    else:
        main()
