"""Measures on pixels: how close two clips are (PSNR, SSIM), and how steady one clip is in time (flicker, drift).

Clips are `B 3 T H W` floats in [-1, 1], and every measure answers for each clip of the batch. Nothing is clamped
here: a clip that leaves the range is refused, because the viewer of the written file would never see those values.
"""

from typing import NamedTuple

import torch
from einops import rearrange, reduce
from jaxtyping import Float, Shaped
from torch import Tensor
from torch.nn.functional import conv2d

from reelflow.errors import ConfigError

__all__ = ["Drift", "check_clip", "drift", "first_frame_agreement", "flicker", "jitter", "psnr", "ssim"]

Clip = Float[Tensor, "B 3 T H W"]
Other = Shaped[Tensor, "..."]  # should match the clip beside it; a mismatch is refused in the body, by name

PEAK = 2.0  # from -1 to 1
ROUNDING = 2 / 255  # how far outside [-1, 1] a value may lie: one step of 8 bits
WINDOW, WINDOW_SIGMA = 11, 1.5  # Wang et al. 2004, sec. III-C
C1, C2 = (0.01 * PEAK) ** 2, (0.03 * PEAK) ** 2


class Drift(NamedTuple):
    """How fast the colours (`mean`) and the contrast (`std`) of a clip wander, in units of [-1, 1] per frame."""

    mean: Float[Tensor, "B 3"]
    std: Float[Tensor, "B 3"]


def psnr(a: Clip, b: Other) -> Float[Tensor, " B"]:
    """Return 10 log10(2^2 / MSE) in dB, with the error averaged over a whole clip; infinite where clips are equal.

    Raises:
        ConfigError: `a` and `b` differ in shape, or either is no clip.
    """
    _check_pair(a, b)
    error = (_at_least_single(a) - _at_least_single(b)).square()
    return 10 * torch.log10(PEAK**2 / error.mean(dim=(1, 2, 3, 4), dtype=torch.float64))


def ssim(a: Clip, b: Other) -> Float[Tensor, " B"]:
    """Return the structural similarity in [-1, 1], 1 for equal clips, averaged over frames, channels and windows.

    Wang et al. 2004, eq. 13: 11 x 11 Gaussian windows of sigma 1.5 that lie inside the frame, K1 = 0.01, K2 = 0.03,
    a data range of 2 that counts from black, so that the numbers are those of the same clips in 8 bits. It is taken
    on R, G and B separately, where the paper has grey images.

    Raises:
        ConfigError: `a` and `b` differ in shape, either is no clip, or a frame is smaller than a window.
    """
    _check_pair(a, b)
    if min(a.shape[-2:]) < WINDOW:
        raise ConfigError(f"SSIM needs frames of at least {WINDOW} x {WINDOW}, got {a.shape[-2]} x {a.shape[-1]}")
    a, b = _at_least_single(a) + 1, _at_least_single(b) + 1  # black is 0, which the luminance term relies on
    frames = [_frame_ssim(x, y) for x, y in zip(a.unbind(2), b.unbind(2), strict=True)]  # by frame: memory stays flat
    return torch.stack(frames).mean(0)


def first_frame_agreement(clip: Clip, image: Other) -> Float[Tensor, " B"]:
    """Return the PSNR in dB between the first frame of each clip and the image (`B 3 H W`) it should have started from.

    Raises:
        ConfigError: the image is not shaped like a frame, or either is out of range.
    """
    check_clip(clip)
    if image.shape != clip[:, :, 0].shape:
        raise ConfigError(
            f"the image must be shaped like a frame, {list(clip[:, :, 0].shape)}, got {list(image.shape)}"
        )
    return psnr(clip[:, :, :1], image.unsqueeze(2))


def flicker(clip: Clip) -> Float[Tensor, " B"]:
    """Return the mean |x[t+1] - x[t]| / 2, from 0 (a still) to 1 (black and white in turn).

    This is 1 - the temporal-flickering score of VBench (Huang et al. 2024), before its choice of static scenes.
    Motion counts as much as flicker does, and a higher frame rate lowers it: compare like with like.

    Raises:
        ConfigError: a clip has fewer than 2 frames.
    """
    _check_frames(clip, 2)
    return _at_least_single(clip).diff(dim=2).abs().mean(dim=(1, 2, 3, 4)) / PEAK


def jitter(clip: Clip) -> Float[Tensor, " B"]:
    """Return the mean |x[t-1] - 2 x[t] + x[t+1]| / 4, from 0 (every pixel changes steadily) to 1 (black, white, black).

    A fade and slow motion over smooth texture leave no trace here, which they do in `flicker`; a frame that falls
    out of line does. Sharp edges in motion still count a little.

    Raises:
        ConfigError: a clip has fewer than 3 frames.
    """
    _check_frames(clip, 3)
    return _at_least_single(clip).diff(n=2, dim=2).abs().mean(dim=(1, 2, 3, 4)) / (2 * PEAK)


def drift(clip: Clip) -> Drift:
    """Return the least-squares slope over time of each channel's mean (brightness, colour) and deviation (contrast).

    Raises:
        ConfigError: a clip has fewer than 2 frames.
    """
    _check_frames(clip, 2)
    pixels = rearrange(_at_least_single(clip), "B C T H W -> B C T (H W)")
    time = torch.arange(clip.shape[2], dtype=pixels.dtype, device=pixels.device)
    time -= time.mean()
    slope = time / time.square().sum()
    return Drift(pixels.mean(-1) @ slope, pixels.std(-1, correction=0) @ slope)


def check_clip(clip: Shaped[Tensor, "..."]) -> None:
    """Refuse what is not a batch of clips: floats of shape `B 3 T H W`, none empty, all in [-1, 1].

    Raises:
        ConfigError: says which of these it is.
    """
    if clip.ndim != 5 or clip.shape[1] != 3 or 0 in clip.shape:
        raise ConfigError(f"a batch of clips has the shape B 3 T H W, got {list(clip.shape)}")
    if not clip.is_floating_point():
        raise ConfigError(f"clips are floats in [-1, 1], got {clip.dtype}; from 8 bits: frames / 127.5 - 1")
    low, high = (bound.item() for bound in clip.aminmax())
    if not (low >= -1 - ROUNDING and high <= 1 + ROUNDING):  # so written, it catches NaN
        raise ConfigError(
            f"clips are floats in [-1, 1], got {low:.4g} to {high:.4g}; a decoder's output must be clamped first"
        )


def _check_pair(a: Shaped[Tensor, "..."], b: Shaped[Tensor, "..."]) -> None:
    if a.shape != b.shape:
        raise ConfigError(f"clips to compare must be of one shape, got {list(a.shape)} and {list(b.shape)}")
    check_clip(a)
    check_clip(b)


def _check_frames(clip: Shaped[Tensor, "..."], least: int) -> None:
    check_clip(clip)
    if clip.shape[2] < least:
        raise ConfigError(f"this measure needs clips of at least {least} frames, got {clip.shape[2]}")


def _at_least_single(x: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _frame_ssim(a: Float[Tensor, "B 3 H W"], b: Float[Tensor, "B 3 H W"]) -> Float[Tensor, " B"]:
    dtype = torch.promote_types(a.dtype, b.dtype)
    a, b = a.to(dtype), b.to(dtype)
    moments = _window_means(torch.stack([a, b, a * a, b * b, a * b]))
    mean_a, mean_b = moments[0], moments[1]
    var_a, var_b, cov = moments[2] - mean_a**2, moments[3] - mean_b**2, moments[4] - mean_a * mean_b
    luminance = (2 * mean_a * mean_b + C1) / (mean_a**2 + mean_b**2 + C1)
    structure = (2 * cov + C2) / (var_a + var_b + C2)
    return reduce(luminance * structure, "B C H W -> B", "mean")


def _window_means(x: Float[Tensor, "K B C H W"]) -> Float[Tensor, "K B C h w"]:
    offset = torch.arange(WINDOW, dtype=x.dtype, device=x.device) - WINDOW // 2
    weight = torch.exp(-offset.square() / (2 * WINDOW_SIGMA**2))
    weight /= weight.sum()
    flat = rearrange(x, "K B C H W -> (K B C) 1 H W")
    flat = conv2d(conv2d(flat, weight.view(1, 1, -1, 1)), weight.view(1, 1, 1, -1))
    return flat.view(*x.shape[:3], *flat.shape[-2:])
