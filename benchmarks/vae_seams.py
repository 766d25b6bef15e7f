"""Do the seams of tiles show? A small autoencoder, trained for a minute, decodes pictures in tiles and whole.

Attention in its middle sees the whole frame, so tiles are an approximation. Clips of the synthetic world, 5 frames of
192 x 192, are encoded whole and decoded in tiles of 16 x 16 latents (64 x 64 pixels, as it was trained) that overlap by so
many, blended linearly. PSNR is against the same latents decoded whole. Seam energy is the mean squared difference of
neighbours across the ends of tiles over that elsewhere (`reelflow.evaluation.seams`): of what is decoded, where whole
decoding has another number than 1 by chance; and of its difference from whole decoding, where it says how much of the error
lies at the seams.

    python benchmarks/vae_seams.py
"""

import time

import numpy as np
import torch
from torch import Tensor

from reelflow.data.worlds import World
from reelflow.evaluation.pixels import psnr
from reelflow.evaluation.seams import seam_energy
from reelflow.models.budget import Budgeted
from reelflow.models.parts import collect, spans
from reelflow.models.vae import CausalVAE, Stage, staged
from reelflow.training.autoencoder import to_float

SECONDS, FRAMES, SIZE, TILE = 60, 5, 192, 16


def clips(count: int, size: int, seed: int) -> Tensor:
    """Return clips of the world."""
    world, rng = World(height=size, width=size, num_frames=FRAMES), np.random.default_rng(seed)
    return to_float(torch.from_numpy(np.stack([world.render(world.draw_scene(rng)).frames for _ in range(count)])))


def main() -> None:
    torch.manual_seed(0)
    stages = (Stage(48, 1, space=2, time=2), Stage(64, 1))
    vae = CausalVAE(staged(8, stages, stages[::-1], patch=2, mid_attention="frame"))
    data, generator = clips(64, 64, seed=0), torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam(vae.parameters(), lr=1e-3)
    steps, start = 0, time.process_time()
    while time.process_time() - start < SECONDS:
        batch = data[torch.randint(len(data), (4,), generator=generator)]
        loss = (vae.decode(vae.encode(batch).mean) - batch).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        steps += 1

    vae.eval().requires_grad_(False)
    test = clips(4, SIZE, seed=1)
    latents = vae.encode(test).mean
    whole, side = vae.decode(latents).clamp(-1, 1), latents.shape[3]
    print(f"{steps} steps; decoded whole: {psnr(whole, test).mean():.2f} dB against the clips\n")
    print("| overlap, latents | PSNR against whole, dB | seam energy | decoded whole | of the difference |")
    print("|---|---|---|---|---|")
    for overlap in (0, 2, 4, 8):
        plan = Budgeted(latents.shape[2], (TILE, TILE), overlap, exact=False, peak=0)
        tiled = collect(vae.way("decoder"), latents, plan, tuple(whole.shape)).clamp(-1, 1)
        scale = SIZE // side
        ends = {end * scale for span in spans(side, TILE, overlap) for end in (span.start, span.stop)} - {0, SIZE}
        of = [seam_energy(x, sorted(ends), sorted(ends)).mean() for x in (tiled, whole, tiled - whole)]
        print(f"| {overlap} | {psnr(tiled, whole).mean():.2f} | {of[0]:.3f} | {of[1]:.3f} | {of[2]:.2f} |")


if __name__ == "__main__":
    main()
