"""Batches in shuffled order, each a pure function of its number.

Batch k holds the items at positions k * batch_size ... of an endless stream: one permutation of all items after the
other, cut without regard to where one ends, so that nothing is ever dropped. Because a batch depends on nothing but
its number, a reader that stopped after k batches continues exactly by starting at k.

Items of several sizes are grouped by `Packed`, each batch as much work as any other, or by `Buckets`, each batch of one
shape. Then an epoch is a plan: every item in one of its batches, the batches in shuffled order.
"""

from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from heapq import heapify, heappop, heappush
from typing import Any, Generic, Literal, NamedTuple, TypeVar

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor

from reelflow.config import configuration, to_dict
from reelflow.data.ahead import Ahead
from reelflow.errors import ConfigError, DataError

__all__ = ["Buckets", "Packed", "Plan", "ShuffledBatches", "Size", "check_room"]

Batch = TypeVar("Batch")
ORDER, DRAWS = 0, 1  # the two independent streams of randomness under one seed


@configuration
class Packed:
    """Clips of all shapes together, at most `tokens` to a batch, the batches alike in predicted FLOPs.

    Raises:
        ConfigError: `tokens` is below 1.
    """

    tokens: int
    kind: Literal["packed"] = "packed"

    def __post_init__(self) -> None:
        _check_tokens(self.tokens)


@configuration
class Buckets:
    """Clips of one shape together, as many as `tokens` allow.

    Raises:
        ConfigError: `tokens` is below 1.
    """

    tokens: int
    kind: Literal["buckets"] = "buckets"

    def __post_init__(self) -> None:
        _check_tokens(self.tokens)


def _check_tokens(tokens: int) -> None:
    if tokens < 1:
        raise ConfigError(f"a batch has at least 1 token, got {tokens}")


class Size(NamedTuple):
    """What an item takes: its shape, its tokens (context among them), and what it costs to train on it once."""

    shape: tuple[int, ...]
    tokens: int
    flops: float


def check_room(grouping: Packed | Buckets, sizes: Iterable[Size]) -> None:
    """Refuse items of which one is larger than a batch.

    Raises:
        ConfigError: one is, or there are none.
    """
    largest = max((size.tokens for size in sizes), default=0)
    if not 0 < largest <= grouping.tokens:
        raise ConfigError(
            f"a batch of {grouping.tokens} tokens cannot hold an item of {largest}; nearest: tokens={largest}"
            if largest
            else "there are no items to make batches of"
        )


class Plan:
    """How items of several sizes make the batches of an epoch: each in exactly one, and none too large for its batch.

    `Packed` deals items in falling order of FLOPs, each to the batch that has the least so far of those with room for its
    tokens; there are as few batches as that allows. Items of one size are exchanged from epoch to epoch.

    Raises:
        ConfigError: there are no items, or one is larger than a batch.
    """

    def __init__(self, grouping: Packed | Buckets, sizes: Sequence[Size]) -> None:
        check_room(grouping, sizes)
        self.grouping = grouping
        self.num_items, self.num_tokens = len(sizes), sum(size.tokens for size in sizes)
        alike: dict[Size, list[int]] = {}
        for item, size in enumerate(sizes):
            alike.setdefault(size, []).append(item)
        self.alike = [alike[size] for size in sorted(alike)]
        order = sorted(alike)
        counts = [len(alike[size]) for size in order]
        self.batches = (_packed if isinstance(grouping, Packed) else _bucketed)(order, counts, grouping.tokens)

    @property
    def num_batches(self) -> int:
        """Batches of an epoch."""
        return len(self.batches)

    def epoch(self, generator: torch.Generator) -> list[Int64[Tensor, " _"]]:
        """Return the items of each batch."""
        queues = []
        for items in self.alike:
            order = torch.randperm(len(items), generator=generator).tolist()
            queues.append(iter([items[place] for place in order]))
        batches = [torch.tensor([next(queues[kind]) for kind in batch]) for batch in self.batches]
        return [batches[number] for number in torch.randperm(len(batches), generator=generator).tolist()]

    def state(self) -> dict[str, Any]:
        """What a position among the batches depends on, in plain JSON values."""
        return {**to_dict(self.grouping), "num_batches": self.num_batches, "num_tokens": self.num_tokens}


def _packed(sizes: list[Size], counts: list[int], tokens: int) -> list[list[int]]:
    """Return the kinds of item in each batch, `counts` of each kind in all."""
    kinds = [kind for kind, count in enumerate(counts) for _ in range(count)]
    kinds.sort(key=lambda kind: (-sizes[kind].flops, -sizes[kind].tokens, kind))
    least = min(size.tokens for size in sizes)
    num_batches = -(-sum(sizes[kind].tokens for kind in kinds) // tokens)
    while True:
        loads = [(0.0, number, 0) for number in range(num_batches)]  # FLOPs, batch, tokens
        heapify(loads)
        batches: list[list[int]] = [[] for _ in loads]
        for kind in kinds:
            full = []
            while loads and loads[0][2] + sizes[kind].tokens > tokens:
                full.append(heappop(loads))
            if not loads:
                break
            flops, number, used = heappop(loads)
            batches[number].append(kind)
            for load in (*full, (flops + sizes[kind].flops, number, used + sizes[kind].tokens)):
                if load[2] + least <= tokens:  # else it is full for good
                    heappush(loads, load)
        else:
            return batches
        num_batches += max(1, num_batches // 50)


def _bucketed(sizes: list[Size], counts: list[int], tokens: int) -> list[list[int]]:
    """Return the kinds of item in each batch; kinds of one shape share a bucket, and its last batch may be small."""
    buckets: dict[tuple[int, ...], list[int]] = {}
    for kind, (size, count) in enumerate(zip(sizes, counts, strict=True)):
        buckets.setdefault(size.shape, []).extend(count * [kind])
    batches = []
    for kinds in buckets.values():
        room = tokens // max(sizes[kind].tokens for kind in kinds)
        batches += [kinds[start : start + room] for start in range(0, len(kinds), room)]
    return batches


class ShuffledBatches(Generic[Batch]):
    """An endless iterator over shuffled batches that can be stopped and continued at any batch.

    `collate` receives the items of one batch and a generator seeded for that batch alone; whatever it draws (crops,
    flips) it draws from there. With `prefetch` > 0 it runs in one background thread, at most that many batches ahead.
    What it raises is raised by `next()`, and the position stays. Use as a context manager, or call `close()`.
    `batch_size` is a number of items or a `Plan` of all of them.

    Raises:
        ConfigError: there are no items, or a count or the seed is out of range.
    """

    def __init__(
        self,
        num_items: int,
        batch_size: int | Plan,
        collate: Callable[[Int64[Tensor, " B"], torch.Generator], Batch],
        *,
        seed: int,
        prefetch: int = 2,
    ) -> None:
        for name, value, least in (
            ("num_items", num_items, 1),
            ("batch_size", batch_size if isinstance(batch_size, int) else 1, 1),
            ("seed", seed, 0),
            ("prefetch", prefetch, 0),
        ):
            if value < least:
                raise ConfigError(f"{name} must be at least {least}, got {value}")
        if isinstance(batch_size, Plan) and batch_size.num_items != num_items:
            raise ConfigError(f"the plan is of {batch_size.num_items} items, and there are {num_items}")
        self.num_items, self.batch_size, self.seed = num_items, batch_size, seed
        self.collate = collate
        self._permutation = lru_cache(maxsize=2)(self._draw_permutation)
        self._epoch = lru_cache(maxsize=2)(self._draw_epoch)
        self._ahead = Ahead(self.batch, prefetch=prefetch, threads=1)

    @property
    def consumed(self) -> int:
        """Batches handed out so far, to all readers together."""
        return self._ahead.consumed

    def _draw_permutation(self, epoch: int) -> Int64[Tensor, " N"]:
        return torch.randperm(self.num_items, generator=_generator(self.seed, ORDER, epoch))

    def _draw_epoch(self, plan: Plan, epoch: int) -> list[Tensor]:
        return plan.epoch(_generator(self.seed, ORDER, epoch))

    def indices(self, number: int) -> Int64[Tensor, " B"]:
        """Return the items of batch `number` (from 0)."""
        if isinstance(self.batch_size, Plan):
            epoch, place = divmod(number, self.batch_size.num_batches)
            return self._epoch(self.batch_size, epoch)[place]
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
        return self._ahead.next()

    def deal(self, part: int, parts: int) -> None:
        """From now on hand out only batches `part`, `part` + `parts`, ... after those handed out so far.

        The others are for other readers, each with a part of its own, and the position counts the batches of all.

        Raises:
            ConfigError: there is no such part.
        """
        self._ahead.deal(part, parts)

    def state_dict(self) -> dict[str, Any]:
        """Return the position, in plain JSON values: how many batches were handed out, and of what."""
        return {
            "consumed": self.consumed,
            "num_items": self.num_items,
            "batch_size": self.batch_size if isinstance(self.batch_size, int) else self.batch_size.state(),
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
        self._ahead.seek(int(state["consumed"]))

    def close(self) -> None:
        """Stop the background thread; the next `next()` would start it again."""
        self._ahead.close()

    def __enter__(self) -> "ShuffledBatches[Batch]":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _generator(seed: int, stream: int, number: int) -> torch.Generator:
    state = np.random.SeedSequence([seed, stream, number]).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state[0]))
