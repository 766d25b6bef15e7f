"""Convolutions with fewer products than their definition has, for CPUs, whose time is products. Without gradients.

Two outputs of a kernel of three are three-tap sums of four inputs; four products give both instead of six (Winograd 1980;
Lavin & Gray 2016, eq. 1). In time this costs a few sums, and each product is a convolution of pictures:

    y0 = x0 k0 + x1 k1 + x2 k2      a = (x1 + x2) (k0 + k1 + k2) / 2      y0 = (x0 - x2) k0 + a + b
    y1 = x1 k0 + x2 k1 + x3 k2      b = (x2 - x1) (k0 - k1 + k2) / 2      y1 = a - b - (x1 - x3) k2

Where positions are fewer than channels, reading and reordering the kernel takes the time: then patches are rows of a matrix.

Of a video whose positions are repeated, a kernel of three sees only two: x_i and a neighbour, one of them twice. So each place
of a repeated cell has a kernel of two, and nothing is repeated. What comes out is the same but for rounding.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

__all__ = ["can", "causal", "doubled"]

Video = Float[Tensor, "B C T H W"]
Output = Float[Tensor, "B D T2 H2 W2"]
Kernel = Float[Tensor, "D C t h w"]
Bias = Float[Tensor, " D"] | None

POSITIONS = 4096  # of several frames that go through one call: fewer would not pay for reading the kernel


def can(x: Tensor, weight: Tensor) -> bool:
    """Say whether products are what counts, and precision and gradients allow to save them."""
    learns = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    return (
        x.device.type == "cpu" and x.dtype in (torch.float32, torch.float64) and x.dtype == weight.dtype and not learns
    )


def causal(x: Video, weight: Kernel, bias: Bias, stride: tuple[int, int], padding: tuple[int, int]) -> Output:
    """Convolve with a kernel over three frames, without padding in time."""
    B, _, T, H, W = x.shape
    h, w = ((n + 2 * p - k) // s + 1 for n, p, k, s in zip((H, W), padding, weight.shape[3:], stride, strict=True))
    if B * (T - 2) * h * w <= len(weight):
        return _rows(x, weight, bias, stride, padding)
    out = x.new_empty((B, T - 2, h, w, len(weight))).movedim(-1, 1)
    for video, result in zip(x.movedim(2, 1), out.movedim(2, 1), strict=True):
        _pairs(video, weight, bias, stride, padding, result)
    return out


def _rows(x: Tensor, weight: Tensor, bias: Tensor | None, stride: tuple[int, int], padding: tuple[int, int]) -> Tensor:
    t, h, w = weight.shape[2:]
    x = F.pad(x, (padding[1], padding[1], padding[0], padding[0]))
    patches = x.unfold(2, t, 1).unfold(3, h, stride[0]).unfold(4, w, stride[1]).movedim(1, -1)  # B T H W t h w C
    rows, matrix = patches.flatten(4).flatten(0, 3), weight.movedim(1, -1).flatten(1).T
    y = rows @ matrix if bias is None else torch.addmm(bias, rows, matrix)
    return y.unflatten(0, patches.shape[:4]).movedim(-1, 1)


def _pairs(
    video: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: tuple[int, int],
    padding: tuple[int, int],
    out: Tensor,
) -> None:
    """Convolve frames, T C H W, two at a time."""

    def convolve(frames: Tensor, kernel: Tensor, bias: Tensor | None = None) -> Tensor:
        return F.conv2d(frames, kernel, bias, stride, padding)

    first, middle, last = weight.unbind(2)
    T, _, H, W = out.shape
    step = 2 * max(1, POSITIONS // (H * W))
    if T > 1:
        plus = (first + last).add_(middle).mul_(0.5)
        minus = plus - middle
    for start in range(0, T - 1, step):
        stop = min(start + step, T - T % 2)
        x0, x1, x2, x3 = (video[start + k : stop + k : 2] for k in range(4))
        even, odd = out[start:stop:2], out[start + 1 : stop : 2]
        a, b = convolve(x1 + x2, plus, bias), convolve(x2 - x1, minus)
        torch.add(a, b, out=even)
        a -= b
        del b
        even += convolve(x0 - x2, first)
        torch.sub(a, convolve(x1 - x3, last), out=odd)
        del a
    if T % 2:
        y = convolve(video[-3:-2], first, bias)
        y += convolve(video[-2:-1], middle)
        out[-1:] = y.add_(convolve(video[-1:], last))


def doubled(x: Video, weight: Kernel, bias: Bias, mode: str) -> Output:
    """Convolve positions that are repeated twice along height and width, of which `mode` says what lies beyond them.

    With a kernel over three frames, frames are repeated twice too but for the first, before which it is repeated forever.
    """
    time = weight.shape[2] > 1
    kernels = [weight]
    for axis in (2, 3, 4) if time else (3, 4):
        kernels = [part for kernel in kernels for part in _halves(kernel, axis)]
    stacked = torch.cat(kernels).contiguous(memory_format=torch.channels_last_3d)
    bias = None if bias is None else bias.repeat(len(kernels))
    B, _, T, H, W = x.shape
    out = x.new_empty((B, 2 * T - 1 if time else T, 2 * H, 2 * W, len(weight))).movedim(-1, 1)
    step = max(1, POSITIONS // (H * W))
    for start in range(0, T, step):
        stop = min(start + step, T)
        part = x[:, :, max(0, start - time) : stop]
        if time and not start:
            part = torch.cat([part[:, :, :1], part], dim=2)
        part = F.pad(part, (1, 1, 1, 1, 0, 0), mode=mode)
        if time:
            places = F.conv3d(part, stacked, bias)
        else:
            places = F.conv2d(part.movedim(2, 1).flatten(0, 1), stacked[:, :, 0], bias)
            places = places.unflatten(0, (B, -1)).movedim(1, 2)
        for index, place in enumerate(places.chunk(len(kernels), dim=1)):
            t, p, q = index // 4, index % 4 // 2, index % 2
            place = place[:, :, :, p : p + H, q : q + W]
            if not time:
                out[:, :, start:stop, p::2, q::2] = place
            elif t:  # the first of a repeated frame, to a kernel that looks back; frame 0 has none
                out[:, :, max(1, 2 * start - 1) : 2 * stop - 2 : 2, p::2, q::2] = place[:, :, int(not start) :]
            else:
                out[:, :, 2 * start : 2 * stop : 2, p::2, q::2] = place
    return out


def _halves(kernel: Tensor, axis: int) -> tuple[Tensor, Tensor]:
    """Return what a kernel is to the first of two equal positions, over the one before and it, and to the second."""
    a, b, c = kernel.split(1, dim=axis)
    return torch.cat([a, b + c], dim=axis), torch.cat([a + b, c], dim=axis)
