"""How much memory operations take, found by walking them with tensors that have shapes and no data.

Every operation's results are weighed when they are made and given back when the last reference to them is gone, in the
order in which eager PyTorch would. What kernels use inside themselves is not seen, but for convolutions on a CPU: see
`scratch_bytes`.
"""

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

__all__ = ["Weighing", "peak_bytes", "scratch_bytes"]

LAST = torch.channels_last_3d


class Weighing(TorchDispatchMode):
    """Weigh the tensors that operations make while it is entered: bytes `alive`, and their `peak`."""

    def __init__(self) -> None:
        super().__init__()
        self.alive = self.peak = 0
        self._known: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.replication_pad3d.default and args[0].is_contiguous(memory_format=LAST):
            results = results.contiguous(memory_format=LAST)  # as real ones are; without data they are said not to be
        elif func is torch.ops.aten.view.default and 1 in results.shape:
            results = _strided_as_real(args[0], results)
        given = {id(leaf.untyped_storage()) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)}
        for leaf in tree_leaves(results):
            if isinstance(leaf, torch.Tensor):
                storage = leaf.untyped_storage()
                if id(storage) not in given:
                    self._weigh(storage)
        if func is torch.ops.aten.convolution.default:
            self.peak = max(self.peak, self.alive + scratch_bytes(args[0], args[1], results))
        return results

    def _weigh(self, storage: torch.UntypedStorage) -> None:
        if storage in self._known:
            return
        self._known.add(storage)
        size = storage.nbytes()
        self.alive += size
        self.peak = max(self.peak, self.alive)
        weakref.finalize(storage, self._free, size)

    def _free(self, size: int) -> None:
        self.alive -= size


def _strided_as_real(x: torch.Tensor, view: torch.Tensor) -> torch.Tensor:
    """Return a view with the strides that it has with data: of an axis of one they differ, and norms copy for that."""
    with _disable_current_modes():
        real = torch.empty_strided(x.shape, x.stride(), device="meta").view(view.shape).stride()
    return view if real == view.stride() else view.as_strided(view.shape, real)


def scratch_bytes(x: torch.Tensor, weight: torch.Tensor, result: torch.Tensor) -> int:
    """Return what a convolution takes on a CPU while it runs, as measured (benchmarks/vae_memory.py).

    In float64 the input of one sample is laid out, a column for each output. Else oneDNN copies the weight into its own
    order; the input too if only the weight has channels last, or if, in float32, the kernel is a point in space; then also
    the result if the kernel is longer in time.
    """
    if x.dtype == torch.float64:
        return weight[0].numel() * result[0, 0].numel() * x.itemsize
    points = x.dtype == torch.float32 and tuple(weight.shape[-2:]) == (1, 1)
    longer = points and weight.ndim == 5 and weight.shape[2] > 1
    last = LAST if weight.ndim == 5 else torch.channels_last
    turned = weight.is_contiguous(memory_format=last) and not x.is_contiguous(memory_format=last)
    return weight.nbytes + (x.nbytes if points or turned else 0) + (result.nbytes if longer else 0)


def peak_bytes(model: nn.Module, run: Callable[[], Any]) -> int:
    """Return the most that `run` holds at once beside the weights of `model`, which lie on the meta device.

    What `run` makes of them it has to make itself: its own inputs weigh too.
    """

    class Run(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self) -> Any:
            return run()

    with FakeTensorMode():  # unlike the meta device it chooses the kernels of attention that a CPU would
        whole = Run()
        parts = dict(whole.named_buffers()) | dict(whole.named_parameters())
        weights = {name: torch.empty_strided(x.shape, x.stride(), dtype=x.dtype) for name, x in parts.items()}
        with torch.no_grad(), Weighing() as weighing:
            functional_call(whole, weights, ())
    return weighing.peak
