"""How long operations take on this machine: each is carried out on its own, on tensors of its shapes, and timed.

    seconds of a step = sum over operations of (count x seconds of one) + calls x seconds that Python needs for a call

An operation too large for that is timed with its longest extent cut, and the time scaled: matrix products, convolutions and
attention by their FLOPs, all others by the bytes they read and write. What Python needs for a call is what a small network's
step takes beyond the sum of its operations.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch.utils._pytree import tree_unflatten
from torch.utils.flop_counter import flop_registry

from reelflow.planning.walk import Counts, Kernel, Shaped

__all__ = ["Rates", "clock", "flops"]

LARGEST = 2e9  # FLOPs, or 8 x bytes, of an operation that is timed whole
MOST_CUTS = 24
ATTEND = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default  # which PyTorch's own counter leaves out
ATTEND_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default
CONVOLUTIONS = {
    torch.ops.aten.convolution.default: 1,
    torch.ops.aten.convolution_backward.default: 2,
}  # batched arguments
SECONDS, TIMES = 0.01, 3  # an operation is repeated until both are reached


def clock() -> float:
    """Return seconds: of this process where one thread works, so that others on the machine count for less."""
    return time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()


def flops(kernel: Kernel) -> float:
    """Return the FLOPs of a matrix product, a convolution or an attention; 0 for all else."""
    args, kwargs = tree_unflatten([_meta(leaf) for leaf in kernel.leaves], kernel.spec)
    if kernel.func is ATTEND:  # of heads of one width
        return 4.0 * args[0].numel() * args[1].shape[-2]
    if kernel.func is ATTEND_BACKWARD:  # the scores again, and four products
        return 10.0 * args[1].numel() * args[2].shape[-2]
    count = flop_registry.get(kernel.func.overloadpacket)
    if count is None:
        return 0.0
    results = [_meta(made) for made in kernel.results]
    return float(count(*args, **kwargs, out_val=results[0] if len(results) == 1 else tuple(results)))


class Rates:
    """Seconds of operations, each measured when it is first asked about."""

    def __init__(self, call_seconds: float, time_one: Callable[[Kernel], float] | None = None) -> None:
        self.call_seconds = call_seconds
        self._time_one = time_one or time_kernel
        self._known: dict[Kernel, float] = {}

    def one(self, kernel: Kernel) -> float:
        """Return the seconds of one operation."""
        if kernel not in self._known:
            self._known[kernel] = self._time_one(kernel)
        return self._known[kernel]

    def seconds(self, kernels: Counts, num_calls: int | float = 0) -> float:
        """Return the seconds of operations, each so many times, and of the calls that lead to them."""
        return sum(count * self.one(kernel) for kernel, count in kernels.items()) + num_calls * self.call_seconds

    @classmethod
    def measure(cls, step: Callable[[], object], kernels: Counts, num_calls: int) -> "Rates":
        """Find what a call costs from a small step, its operations and their number."""
        rates = cls(0.0)
        step()
        alone = rates.seconds(kernels)
        times = []
        for _ in range(5):
            start = clock()
            step()
            times.append(clock() - start)
        rates.call_seconds = max(0.0, statistics.median(times) - alone) / num_calls
        return rates


def time_kernel(kernel: Kernel) -> float:
    """Carry out an operation, or a smaller one of its kind, and return the seconds it takes."""
    small, share = kernel, 1.0
    for _ in range(MOST_CUTS):
        if max(flops(small), 8 * small.nbytes) <= LARGEST:
            break
        cut = _cut(small)
        if cut == small:
            break
        small = cut
        share = flops(kernel) / flops(small) if flops(kernel) else kernel.nbytes / small.nbytes
    args, kwargs = tree_unflatten([_real(leaf) for leaf in small.leaves], small.spec)
    with torch.no_grad():
        small.func(*args, **kwargs)
        times: list[float] = []
        while len(times) < TIMES or sum(times) < SECONDS:
            start = clock()
            small.func(*args, **kwargs)
            times.append(clock() - start)
    return share * statistics.median(times)


def _cut(kernel: Kernel) -> Kernel:
    """Halve the longest extent, in all tensors and wherever else it is named; of convolutions the batch, if it has samples.

    Other extents of a convolution do not stay in proportion.
    """
    if kernel.func in CONVOLUTIONS:
        batched, samples = CONVOLUTIONS[kernel.func], kernel.leaves[0].shape[0]
        half = -(-samples // 2)
        leaves = [_shorter(leaf, (half, *leaf.shape[1:])) for leaf in kernel.leaves[:batched]]
        first, *rest = kernel.results
        made = None if first is None else _shorter(first, (half, *first.shape[1:]))
        return replace(kernel, leaves=(*leaves, *kernel.leaves[batched:]), results=(made, *rest))
    longest = max((size for each in kernel.tensors for size in each.shape), default=1)
    half = -(-longest // 2)

    def shorter(leaf: Any) -> Any:
        if isinstance(leaf, Shaped):
            return _shorter(leaf, tuple(half if size == longest else size for size in leaf.shape))
        return half if type(leaf) is int and leaf == longest else leaf

    return replace(kernel, leaves=tuple(map(shorter, kernel.leaves)), results=tuple(map(shorter, kernel.results)))


def _shorter(tensor: Shaped, shape: tuple[int, ...]) -> Shaped:
    """Return a tensor of another shape whose extents lie in memory in the same order."""
    stride, step = [0] * len(shape), 1
    for axis in sorted(range(len(shape)), key=lambda axis: (tensor.stride[axis], -axis)):
        if tensor.stride[axis]:
            stride[axis] = step
            step *= shape[axis]
    return Shaped(shape, tuple(stride), tensor.dtype)


def _meta(leaf: Any) -> Any:
    if not isinstance(leaf, Shaped):
        return leaf
    return torch.empty_strided(leaf.shape, leaf.stride, dtype=leaf.dtype, device="meta")


def _real(leaf: Any) -> Any:
    """Return a tensor of ones, or, of integers, which may be places, of zeros."""
    if not isinstance(leaf, Shaped):
        return leaf
    x = torch.empty_strided(leaf.shape, leaf.stride, dtype=leaf.dtype)
    if 0 in leaf.stride:  # what is seen many times cannot be written to
        x = x.new_empty(leaf.shape)
    return x.fill_(1 if leaf.dtype.is_floating_point or leaf.dtype.is_complex or leaf.dtype == torch.bool else 0)
