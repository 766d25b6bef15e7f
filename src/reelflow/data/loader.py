"""Batches in shuffled order, each a pure function of its number.

Batch k holds the items at positions k * batch_size ... of an endless stream: one permutation of all items after the
other, cut without regard to where one ends, so that nothing is ever dropped. Because a batch depends on nothing but
its number, a reader that stopped after k batches continues exactly by starting at k.
"""

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor

from reelflow.errors import ConfigError, DataError

__all__ = ["ShuffledBatches"]

Batch = TypeVar("Batch")
ORDER, DRAWS = 0, 1  # the two independent streams of randomness under one seed


class ShuffledBatches(Generic[Batch]):
    """An endless iterator over shuffled batches that can be stopped and continued at any batch.

    `collate` receives the items of one batch and a generator seeded for that batch alone; whatever it draws (crops,
    flips) it draws from there. With `prefetch` > 0 it runs in one background thread, at most that many batches ahead.
    What it raises is raised by `next()`, and the position stays. Use as a context manager, or call `close()`.

    Raises:
        ConfigError: there are no items, or a count or the seed is out of range.
    """

    def __init__(
        self,
        num_items: int,
        batch_size: int,
        collate: Callable[[Int64[Tensor, " B"], torch.Generator], Batch],
        *,
        seed: int,
        prefetch: int = 2,
    ) -> None:
        for name, value, least in (
            ("num_items", num_items, 1),
            ("batch_size", batch_size, 1),
            ("seed", seed, 0),
            ("prefetch", prefetch, 0),
        ):
            if value < least:
                raise ConfigError(f"{name} must be at least {least}, got {value}")
        self.num_items, self.batch_size, self.seed, self.prefetch = num_items, batch_size, seed, prefetch
        self.collate = collate
        self.consumed = 0
        self._permutation = lru_cache(maxsize=2)(self._draw_permutation)
        self._ahead: deque[Future[Batch]] = deque()
        self._worker: ThreadPoolExecutor | None = None

    def _draw_permutation(self, epoch: int) -> Int64[Tensor, " N"]:
        return torch.randperm(self.num_items, generator=_generator(self.seed, ORDER, epoch))

    def indices(self, number: int) -> Int64[Tensor, " B"]:
        """Return the items of batch `number` (from 0)."""
        start, stop = number * self.batch_size, (number + 1) * self.batch_size
        epochs = range(start // self.num_items, (stop - 1) // self.num_items + 1)
        stream = torch.cat([self._permutation(epoch) for epoch in epochs])
        return stream[start - epochs[0] * self.num_items :][: self.batch_size]

    def batch(self, number: int) -> Batch:
        """Build batch `number` (from 0), here and now, whatever has been read before."""
        return self.collate(self.indices(number), _generator(self.seed, DRAWS, number))

    def __iter__(self) -> "ShuffledBatches[Batch]":
        return self

    def __next__(self) -> Batch:
        batch = self._from_worker() if self.prefetch else self.batch(self.consumed)
        self.consumed += 1
        return batch

    def _from_worker(self) -> Batch:
        if self._worker is None:
            self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="batches")
        while len(self._ahead) <= self.prefetch:  # the batch about to be handed out, and `prefetch` more
            self._ahead.append(self._worker.submit(self.batch, self.consumed + len(self._ahead)))
        try:
            batch = self._ahead[0].result()
        except BaseException:
            self._forget()
            raise
        self._ahead.popleft()
        return batch

    def _forget(self) -> None:
        for future in self._ahead:
            future.cancel()
        self._ahead.clear()

    def state_dict(self) -> dict[str, Any]:
        """Return the position, in plain JSON values: how many batches were handed out, and of what."""
        return {
            "consumed": self.consumed,
            "num_items": self.num_items,
            "batch_size": self.batch_size,
            "seed": self.seed,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state_dict()` was taken.

        Raises:
            DataError: the state is of another data set, batch size or seed, so its position means nothing here.
        """
        for name, here in self.state_dict().items():
            if name != "consumed" and state.get(name) != here:
                raise DataError(
                    f"cannot continue reading: {name} was {state.get(name)}, now it is {here}; "
                    f"restore the data as it was, or start a new run"
                )
        self._forget()
        self.consumed = int(state["consumed"])

    def close(self) -> None:
        """Stop the background thread; the next `next()` would start it again."""
        self._forget()
        if self._worker is not None:
            self._worker.shutdown(wait=True, cancel_futures=True)
            self._worker = None

    def __enter__(self) -> "ShuffledBatches[Batch]":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _generator(seed: int, stream: int, number: int) -> torch.Generator:
    state = np.random.SeedSequence([seed, stream, number]).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state[0]))
