"""A computation walked with tensors that have shapes and no data: what it holds at its peak, and every operation in it.

Bytes are those of tensors (`reelflow.models.weighing`), and those of a heap that serves them as glibc's does when it keeps
what is freed (`Heap`): holes that nothing fits are resident too, and on a CPU that is a tenth of a training step.
"""

import weakref
from bisect import bisect_left, insort
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch.utils._pytree import TreeSpec, tree_flatten

from reelflow.models.weighing import Weighing

__all__ = ["Counts", "Heap", "Kernel", "Shaped", "Walk"]

MAPPED = 1 << 25  # bytes from which a tensor has pages of its own, given back when it goes
ALIGNED = 64  # of tensors, and what that costs each


class Shaped(NamedTuple):
    """What the cost of an operation depends on of a tensor."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of the values, each counted once however often it is seen."""
        count = self.dtype.itemsize
        for size, stride in zip(self.shape, self.stride, strict=True):
            count *= size if stride or not size else 1
        return count


@dataclass(frozen=True)
class Kernel:
    """An operation, and what it is given and gives; two that are equal take as long."""

    func: Any
    spec: TreeSpec  # of arguments and keywords
    leaves: tuple[Any, ...]
    results: tuple[Any, ...]  # None where a gradient was not asked for

    @property
    def tensors(self) -> tuple[Shaped, ...]:
        return tuple(leaf for leaf in (*self.leaves, *self.results) if isinstance(leaf, Shaped))

    @property
    def nbytes(self) -> int:
        """Bytes read and written."""
        return sum(each.nbytes for each in self.tensors)


Counts = Mapping[Kernel, int | float]
"""How often operations occur."""


class Heap:
    """Where a best-fit allocator that merges what is freed puts things, and how far it has reached: bytes ever touched.

    What is to be aligned is asked for with room to move (glibc's memalign), so that a hole between neighbours that stay is
    not filled by a tensor of the size of the one that left it, and a heap spreads.
    """

    def __init__(self) -> None:
        self.reached = self.mapped = self.peak = 0
        self.pages = 0  # of the peak: what was mapped then, and goes back to the system
        self._holes: list[tuple[int, int]] = []  # size, start; sorted
        self._starts: dict[int, int] = {}  # of a hole: its size
        self._ends: dict[int, int] = {}  # of a hole: its start

    def take(self, size: int) -> tuple[int, int]:
        """Return where and how much a tensor of `size` bytes takes; where is -1 for one with pages of its own."""
        if size >= MAPPED:
            self.mapped += size
            self._look()
            return -1, size
        size = -(-(size + ALIGNED) // ALIGNED) * ALIGNED
        top = self._ends.get(self.reached)  # the last hole, which is taken when no other fits, and grows
        place = bisect_left(self._holes, (size + ALIGNED, -1))
        if place < len(self._holes) and self._holes[place][1] == top:
            place += 1
        hole, start = self._holes[place] if place < len(self._holes) else (0, self.reached if top is None else top)
        if start == top:
            hole = self.reached - start
        if hole:
            self._remove(start)
        if hole > size:
            self._insert(start + size, hole - size)
        self.reached = max(self.reached, start + size)
        self._look()
        return start, size

    def give(self, start: int, size: int) -> None:
        """Take back what `take` returned."""
        if start < 0:
            self.mapped -= size
            return
        if start in self._ends:
            before = self._ends[start]
            size += self._starts[before]
            self._remove(before)
            start = before
        if start + size in self._starts:
            after = start + size
            size += self._starts[after]
            self._remove(after)
        self._insert(start, size)

    def _look(self) -> None:
        if self.reached + self.mapped > self.peak:
            self.peak, self.pages = self.reached + self.mapped, self.mapped

    def _insert(self, start: int, size: int) -> None:
        insort(self._holes, (size, start))
        self._starts[start], self._ends[start + size] = size, start

    def _remove(self, start: int) -> None:
        size = self._starts.pop(start)
        del self._ends[start + size]
        del self._holes[bisect_left(self._holes, (size, start))]


class Walk(Weighing):
    """Weigh tensors, place them on a heap, and count operations by kind, but for those that only look at a tensor anew.

    Where a computation asks for a value it is told 0, or, of an integer, a number past every threshold.
    """

    def __init__(self) -> None:
        super().__init__()
        self.kernels: Counter[Kernel] = Counter()
        self.num_calls = 0
        self.heap = Heap()

    @contextmanager
    def phase(self) -> Iterator["Phase"]:
        """Tell what happens inside apart from what was before."""
        whole, self.kernels, calls = self.kernels, Counter(), self.num_calls
        start, self.peak = self.alive, self.alive
        phase = Phase()
        try:
            yield phase
        finally:
            phase.start, phase.peak, phase.end = start, self.peak, self.alive
            phase.kernels, phase.num_calls = self.kernels, self.num_calls - calls
            self.kernels = whole + self.kernels

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace in ("prim", "profiler"):  # questions about tensors, and marks
            return super().__torch_dispatch__(func, types, args, kwargs)
        self.num_calls += 1
        if func is torch.ops.aten._local_scalar_dense.default:
            return 0.0 if args[0].is_floating_point() else 2**30
        results = super().__torch_dispatch__(func, types, args, kwargs)
        if not func.is_view and func is not torch.ops.aten.detach.default:
            leaves, spec = tree_flatten((args, kwargs or {}))
            made = tuple(map(_shaped, tree_flatten(results)[0]))
            self.kernels[Kernel(func, spec, tuple(map(_shaped, leaves)), made)] += 1
        return results

    def _weigh(self, storage: torch.UntypedStorage) -> None:
        if storage not in self._known:
            placed = self.heap.take(storage.nbytes())
            weakref.finalize(storage, self.heap.give, *placed)
        super()._weigh(storage)


class Phase:
    """Part of a walk: bytes alive at its start, peak and end; its operations; and how many calls, views among them."""

    start: int
    peak: int
    end: int
    kernels: Counter[Kernel]
    num_calls: int


def _shaped(leaf: Any) -> Any:
    return Shaped(tuple(leaf.shape), leaf.stride(), leaf.dtype) if isinstance(leaf, torch.Tensor) else leaf
