"""A safetensors file that several processes fill at once, each with the parts it holds; whoever reads it sees one file.

Where each tensor lies follows from names, types and shapes alone, so processes agree on it without a word, and no tensor
is ever put together in one memory. All processes must see the same folder.
"""

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import product
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = ["DTYPES", "Layout", "Part", "read_part"]

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}


class Part(NamedTuple):
    """A box of a tensor of the file: where it begins, and what is in it."""

    name: str
    offset: tuple[int, ...]
    data: Tensor


class Layout:
    """Where tensors lie in a file; those of the widest types first, so that each is aligned to its type."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        order = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
        described: dict[str, Any] = {}
        places, end = {}, 0
        for name in order:
            places[name], dtype = end, tensors[name].dtype
            end += dtype.itemsize * prod(self.shapes[name])
            described[name] = {
                "dtype": NAMES[dtype],
                "shape": self.shapes[name],
                "data_offsets": [places[name], end],
            }
        header = json.dumps(described, separators=(",", ":")).encode()
        header += b" " * (-len(header) % 8)
        self.head = len(header).to_bytes(8, "little") + header
        self.size = len(self.head) + end
        self.places = {name: len(self.head) + place for name, place in places.items()}

    def create(self, path: Path) -> None:
        """Write the head and take all the space the rest will need, so that a disk that is too small says so now.

        Raises:
            OSError: there is too little space, say.
        """
        with path.open("wb") as file:
            file.write(self.head)
            file.flush()
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, self.size)
            file.truncate(self.size)

    def fill(self, path: Path, parts: Iterable[Part]) -> None:
        """Write parts into a file made by `create`, and sync it.

        Raises:
            OSError: it cannot be written.
        """
        descriptor = os.open(path, os.O_WRONLY)
        try:
            for name, offset, data in parts:
                flat, size = data.contiguous().reshape(-1).view(torch.uint8).numpy(), data.dtype.itemsize
                for there, here, count in _runs(self.shapes[name], offset, tuple(data.shape)):
                    run = memoryview(flat.data)[size * here : size * (here + count)]
                    at = self.places[name] + size * there
                    while run:
                        written = os.pwrite(descriptor, run, at)
                        run, at = run[written:], at + written
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _runs(shape: Sequence[int], offset: Sequence[int], extents: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """Cut a box into stretches without gaps: where each begins in the whole, where in the box, and its elements."""
    if not prod(extents):
        return
    partial = [dim for dim in range(len(shape)) if extents[dim] != shape[dim]]
    last = partial[-1] if partial else 0  # the box has all of every later dimension
    strides = [prod(shape[dim + 1 :]) for dim in range(len(shape))]
    count = prod(extents[last:])
    start = sum(o * stride for o, stride in zip(offset, strides, strict=True))
    for number, index in enumerate(product(*(range(extent) for extent in extents[:last]))):
        yield start + sum(i * stride for i, stride in zip(index, strides, strict=False)), number * count, count


def read_part(file: Any, part: Part) -> None:
    """Copy a box out of a file opened by `safetensors.safe_open` into `part.data`."""
    if not part.offset:
        part.data.copy_(file.get_tensor(part.name))
    elif part.data.numel():
        box = tuple(slice(o, o + extent) for o, extent in zip(part.offset, part.data.shape, strict=True))
        part.data.copy_(file.get_slice(part.name)[box])
