"""What an autoencoder's rebuilt clips are worth beside the clips, and beside a resampling that keeps as many numbers."""

from collections.abc import Callable
from math import sqrt

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import interpolate

from reelflow.errors import ConfigError
from reelflow.evaluation.frechet import PixelPyramid, frechet_between
from reelflow.evaluation.perceptual import pyramid_distance
from reelflow.evaluation.pixels import WINDOW, flicker, psnr, ssim

__all__ = ["best_resampled", "measure_rebuilt", "resampled"]

Clip = Float[Tensor, "B 3 T H W"]


def measure_rebuilt(
    rebuilt: Clip, clips: Clip, *, perceptual: Callable[[Tensor, Tensor], Tensor] = pyramid_distance
) -> dict[str, float]:
    """Return SSIM, a perceptual distance, flicker as a multiple of the clips' own, and a Frechet distance.

    The Frechet distance is over `PixelPyramid`, which is no trained network: it is for curves of one run. What clips are
    too small, too short or too few for is left out.

    Raises:
        ConfigError: the two differ in shape, or leave [-1, 1].
    """
    T, H, W = clips.shape[2:]
    parts = list(zip(rebuilt.split(4), clips.split(4), strict=True))
    values = {"perceptual": torch.stack([perceptual(a, b) * len(a) for a, b in parts]).sum().item() / len(clips)}
    if min(H, W) >= WINDOW:
        values["ssim"] = torch.cat([ssim(a, b) for a, b in parts]).mean().item()
    own = flicker(clips).mean().item() if T > 1 else 0.0
    if own > 0:
        values["flicker_ratio"] = flicker(rebuilt).mean().item() / own
    if T >= 3 and min(H, W) >= 16 and len(clips) > 1:
        pyramid = PixelPyramid(num_frames=T, size=(H, W))
        values["frechet_pixel_pyramid"] = frechet_between([rebuilt], [clips], pyramid, frame_stride=1).value
    return values


@torch.no_grad()
def resampled(clips: Clip, factor: float, *, time: int = 1) -> Clip:
    """Return clips that went through a `factor` times smaller number of values: bicubic in space, means in time.

    Sides are divided by sqrt(factor / time), rounded up, so that it keeps as many values or a few more. In time frame 0
    stays, and each `time` that follow become their mean, joined again by straight lines.

    Raises:
        ConfigError: the frames are not 1 + time k, or the factor is below that of time.
    """
    B, _, T, H, W = clips.shape
    if (T - 1) % time or factor < time:
        raise ConfigError(f"needs 1 + {time} k frames and a factor of at least {time}, got {T} and {factor:g}")
    side = sqrt(factor / time)
    h, w = (-int(-extent // side) for extent in (H, W))
    kept = clips
    if time > 1:
        kept = torch.cat([clips[:, :, :1], clips[:, :, 1:].unflatten(2, (-1, time)).mean(3)], dim=2)
    images = kept.movedim(2, 1).flatten(0, 1)
    small = interpolate(images, (h, w), mode="bicubic", antialias=True)
    images = interpolate(small, (H, W), mode="bicubic").clamp(-1, 1)
    kept = images.unflatten(0, (B, -1)).movedim(1, 2)
    if time == 1:
        return kept
    middles = torch.cat([torch.zeros(1), torch.arange((T - 1) // time) * time + (time + 1) / 2])
    frames = torch.arange(T, dtype=torch.float32)
    after = torch.searchsorted(middles, frames).clamp(1, len(middles) - 1)
    share = ((frames - middles[after - 1]) / (middles[after] - middles[after - 1])).clamp(0, 1).view(-1, 1, 1)
    return torch.lerp(kept[:, :, after - 1], kept[:, :, after], share.to(kept))


def best_resampled(clips: Clip, factor: float, *, times: tuple[int, ...]) -> tuple[int, float]:
    """Return which division of time resamples clips best, and its mean PSNR in dB."""
    found = {time: psnr(resampled(clips, factor, time=time), clips).mean().item() for time in times}
    best = max(found, key=lambda time: found[time])
    return best, found[best]
