"""What of a tensor lies in this process, where it is spread over several (a DTensor), and the way to the whole and back.

What is computed element by element is exact on parts.
"""

from collections.abc import Iterable

from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate

__all__ = ["here", "part_of", "whole"]


def here(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Return the parts in this process, sharing memory with the tensors."""
    return [x.to_local() if isinstance(x, DTensor) else x for x in (tensor.detach() for tensor in tensors)]


def whole(part: Tensor, like: Tensor) -> Tensor:
    """Put together a tensor that is spread as `like` from the part of each process; all processes call this."""
    if not isinstance(like, DTensor):
        return part
    mesh, placements = like.device_mesh, like.placements
    spread = DTensor.from_local(part, mesh, placements, run_check=False, shape=like.shape, stride=like.stride())
    return spread.full_tensor()


def part_of(full: Tensor, like: Tensor) -> Tensor:
    """Return this process's part of a tensor that every process has, spread as `like`."""
    if not isinstance(like, DTensor):
        return full
    same = [Replicate()] * like.device_mesh.ndim
    spread = DTensor.from_local(full, like.device_mesh, same, run_check=False)
    return spread.redistribute(placements=like.placements).to_local()
