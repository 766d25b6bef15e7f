"""What the processes of a run tell each other beside tensors, and how they fail together.

A value has a channel of its own, so that one thread may talk through it while another computes.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist
from safetensors import SafetensorError

from reelflow.errors import ReelflowError
from reelflow.parallel.mesh import Workers

__all__ = ["Peers"]

T = TypeVar("T")


class Peers:
    """The processes of `workers`, all of which must make the same calls in the same order; alone, nothing is sent.

    A process that is lost is noticed when its connection breaks, at the latest after 30 minutes, gloo's time-out.
    """

    def __init__(self, workers: Workers) -> None:
        self.workers = workers
        self.group = None if workers.world_size == 1 else dist.new_group(backend="gloo")

    def gather(self, value: T) -> list[T]:
        """Return each process's value, in order of rank."""
        if self.group is None:
            return [value]
        values: list[Any] = [None] * self.workers.world_size
        dist.all_gather_object(values, value, group=self.group)
        return values

    def together(self, function: Callable[[], T]) -> T:
        """Call `function` here; where it fails in any process, fail in all.

        Raises:
            ReelflowError, OSError, SafetensorError: what `function` raised in the first process where it did.
        """
        result, failure = None, None
        try:
            result = function()
        except (ReelflowError, OSError, SafetensorError) as error:
            failure = error
        for rank, found in enumerate(self.gather(failure)):
            if found is not None:
                if self.group is not None:
                    found = type(found)(f"rank {rank}: {found}")
                raise found
        return result  # type: ignore[return-value]

    def first(self, function: Callable[[], T]) -> T:
        """Call `function` in the first process, and return what it returned there; if it fails, fail in all."""
        result = self.together(lambda: function() if self.workers.is_first else None)
        return self.gather(result)[0]  # type: ignore[return-value]
