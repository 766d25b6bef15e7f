"""Batches from sets of samples too large to shuffle whole, mixed by weights, each a pure function of its number.

The samples of all batches, one after the other, are one endless stream, and what stands at each of its places is known
without reading any: the weights say which set it comes from, that set's own epoch which sample it is. An epoch shuffles
the shards, takes `window` of them at a time, and shuffles all samples of those. So a reader that stopped after k batches
goes on exactly by starting at k, and a rank of many reads its part of the same batch.

Samples of several sizes are `Grouped`: so many of the stream at a time are made into batches, each sample into one, alike
in predicted FLOPs or each of one shape. Sizes are known without reading too, so what is in a batch still follows from its
number, and where the group at hand begins from the position.

A sample that cannot be read is replaced by another of its set, drawn for that place alone: nothing after it moves.
"""

import hashlib
import json
import math
import warnings
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, chain
from threading import Lock
from typing import Any, Generic, NamedTuple, Protocol, TypeVar, runtime_checkable

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor

from reelflow.config import to_dict
from reelflow.data.ahead import Ahead
from reelflow.data.loader import Buckets, Packed, Plan, Size, check_room
from reelflow.data.shards import Sample
from reelflow.errors import ConfigError, DataError

__all__ = ["Grouped", "ShardedBatches", "Sizes", "Source", "rounds"]

Batch = TypeVar("Batch")
SHARDS, SAMPLES, DRAWS, STAND_INS, GROUPS = range(5)  # independent streams of randomness under one seed
TRIES = 32  # stand-ins from the window, and as many from the whole set, before it is given up
LONGEST_ROUND = 100_000
NAMES_KEPT = 1000  # of things that were skipped; beyond, they are only counted


@runtime_checkable
class Source(Protocol):
    """A set of samples, such as `ShardSet` or `StoreSamples`."""

    @property
    def name(self) -> str: ...

    @property
    def identity(self) -> str:
        """A text that differs between any two sets that differ."""

    @property
    def groups(self) -> tuple[int, ...]:
        """How many samples lie together: the first so many numbers, the next, ..."""

    def read(self, number: int) -> Sample:
        """Raises: DataError: the sample cannot be used."""


class Sizes(NamedTuple):
    """The sizes of a source's samples, each once, and which of them each sample has."""

    found: Sequence[Size]
    which: Int64[Tensor, " N"]


@dataclass(frozen=True)
class Grouped:
    """Batches of samples of several sizes.

    `reservoir` samples of the stream at a time are dealt to batches (`reelflow.data.loader.Plan`), each to one: with more,
    packed batches are more alike, and fewer buckets remain partly filled. `sizes` are those of each source.

    Raises:
        ConfigError: the reservoir is empty, or a sample is larger than a batch.
    """

    grouping: Packed | Buckets
    sizes: Sequence[Sizes]
    reservoir: int = 1024

    def __post_init__(self) -> None:
        if self.reservoir < 1:
            raise ConfigError(f"reservoir must be at least 1, got {self.reservoir}")
        check_room(self.grouping, [size for each in self.sizes for size in each.found])

    def state(self) -> dict[str, Any]:
        """What a position among the batches depends on, in plain JSON values."""
        found = hashlib.sha256(json.dumps([sorted(each.found) for each in self.sizes]).encode()).hexdigest()
        return {**to_dict(self.grouping), "reservoir": self.reservoir, "sizes": found}


def rounds(weights: Sequence[int]) -> list[int]:
    """Return which of several sets each place of a round comes from: `weights` places each, spread evenly.

    After any number of places, each set has had its share of them to within less than one sample. Every place has a
    window of time in which it must come (place j of w in n: from floor(j n / w) to ceil((j + 1) n / w)), and the one whose
    window closes first is next (Baruah et al. 1996). A common divisor is taken out.

    Raises:
        ConfigError: a weight is below 1, or a round longer than 100,000.
    """
    if not weights or min(weights) < 1:
        raise ConfigError(f"weights must be at least 1 each, got {list(weights)}")
    common = math.gcd(*weights)
    shares = [weight // common for weight in weights]
    length = sum(shares)
    if length > LONGEST_ROUND:
        nearest = [max(1, share * 1000 // length) for share in shares]
        raise ConfigError(f"weights must repeat within {LONGEST_ROUND:,} samples, not {length:,}; nearest: {nearest}")
    had, places = [0] * len(shares), []
    for place in range(length):
        due = [k for k, share in enumerate(shares) if had[k] < share and had[k] * length // share <= place]
        first = min(due, key=lambda k: -(-(had[k] + 1) * length // shares[k]))
        places.append(first)
        had[first] += 1
    return places


class ShardedBatches(Generic[Batch]):
    """An endless iterator over shuffled batches of `batch_size` samples that can be stopped and continued at any batch.

    `batch_size` is that of all ranks together: rank r of w has samples r B // w to (r + 1) B // w of each batch, so that
    batches are the same whatever the number of ranks, and a position saved under one is good under another. `deal` shares
    out whole batches instead, as `train` does. With `batch_size` a `Grouped`, batches have unequal numbers of samples, and
    whole ones alone are shared out.

    Of every sum(weights) samples, `weights[k]` come from `sources[k]`, spread evenly; a source that ends starts its next
    epoch by itself. `window` is how many shards are shuffled together: more is a better shuffle, and shards are visited
    in a narrower order with fewer. `collate` receives the rank's samples and a generator for each, which depends on the
    place in the stream alone; whatever is drawn for a sample is drawn from there.

    `prefetch` batches are made ahead, each in a thread of its own; 0 means none. What `collate` raises is raised by
    `next()`, and the position stays. Use as a context manager, or call `close()`.

    A sample that cannot be used is counted in `skipped`, said once to `on_skip`, and replaced by another of its source; in
    a grouped batch by one of its size, and where there is none, the batch does without.

    Raises:
        ConfigError: a count, a weight, the rank or the seed is out of range, there are no sources, or not the sizes of each.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        batch_size: int | Grouped,
        collate: Callable[[list[Sample], list[torch.Generator]], Batch],
        *,
        seed: int,
        weights: Sequence[int] | None = None,
        window: int = 8,
        rank: int = 0,
        world_size: int = 1,
        prefetch: int = 2,
        on_skip: Callable[[str], object] = warnings.warn,
    ) -> None:
        grouped = batch_size if isinstance(batch_size, Grouped) else None
        for name, value, least in (
            ("batch_size", batch_size if isinstance(batch_size, int) else 1, 1),
            ("seed", seed, 0),
            ("window", window, 1),
            ("world_size", world_size, 1),
            ("prefetch", prefetch, 0),
        ):
            if value < least:
                raise ConfigError(f"{name} must be at least {least}, got {value}")
        if not 0 <= rank < world_size:
            raise ConfigError(f"rank must lie in 0 to {world_size - 1}, got {rank}")
        if grouped and world_size > 1:
            raise ConfigError(
                "batches of unequal numbers of samples are shared out whole; nearest: world_size=1, and deal(rank, world_size)"
            )
        if isinstance(batch_size, int) and world_size > batch_size:
            raise ConfigError(
                f"batch_size {batch_size} leaves some of {world_size} ranks without a sample; nearest: batch_size={world_size}"
            )
        weights = (1,) * len(sources) if weights is None else tuple(weights)
        if not sources or len(weights) != len(sources):
            raise ConfigError(f"{len(sources)} sources need as many weights, at least one; got {len(weights)}")
        if grouped and [len(each.which) for each in grouped.sizes] != [sum(source.groups) for source in sources]:
            raise ConfigError("every sample of every source needs a size")
        self.sources, self.weights, self.collate = tuple(sources), weights, collate
        self.batch_size, self.seed, self.window = batch_size, seed, window
        self.rank, self.world_size, self.on_skip = rank, world_size, on_skip
        self.skipped: dict[str, int] = {}  # what, and how often, in the batches handed out
        self._round = rounds(weights)
        self._shares = [0] * len(sources)
        self._before = []  # places of the same source in the round
        for k in self._round:
            self._before.append(self._shares[k])
            self._shares[k] += 1
        self._orders = [_Order(source.groups, window, seed, k) for k, source in enumerate(sources)]
        self._grouped = None if grouped is None else _Groups(grouped, seed, self._size)
        self._ahead = Ahead(self._build, prefetch=prefetch, threads=max(1, prefetch))
        self._said: set[str] = set()

    def draws(self, number: int) -> list[tuple[int, int]]:
        """Return the source and the sample at each place of batch `number` (from 0), those of all ranks."""
        return list(map(self._item, self._places(number)))

    def batch(self, number: int) -> Batch:
        """Make batch `number` (from 0), here and now, whatever has been read before; what it skips is not counted."""
        return self._build(number)[0]

    def _drawn(self, place: int) -> tuple[int, int]:
        """Return the source of a place in the stream, and how many samples that source gave before."""
        turn, within = divmod(place, len(self._round))
        source = self._round[within]
        return source, turn * self._shares[source] + self._before[within]

    def _item(self, place: int) -> tuple[int, int]:
        """Return the source of a place in the stream, and the sample."""
        source, turn = self._drawn(place)
        return source, self._orders[source].item(turn)

    def _size(self, place: int) -> Size:
        assert isinstance(self.batch_size, Grouped)
        source, item = self._item(place)
        sizes = self.batch_size.sizes[source]
        return sizes.found[int(sizes.which[item])]

    def _places(self, number: int) -> Sequence[int]:
        """Return the places of a batch in the stream, those of all ranks."""
        if isinstance(self.batch_size, int):
            return range(number * self.batch_size, (number + 1) * self.batch_size)
        assert self._grouped is not None
        return self._grouped.places(number)

    def _build(self, number: int) -> tuple[Batch, list[str]]:
        places, skipped = self._places(number), list[str]()
        start, stop = (r * len(places) // self.world_size for r in (self.rank, self.rank + 1))
        samples = self._samples(places[start:stop], skipped)
        generators = [_generator(self.seed, DRAWS, 0, place) for place in samples]
        return self.collate(list(samples.values()), generators), skipped

    def _samples(self, places: Sequence[int], skipped: list[str]) -> dict[int, Sample]:
        """Read the samples of a batch, by place."""
        if isinstance(self.batch_size, int):
            return {place: self._sample(place, skipped) for place in places}
        samples = {}
        for place in places:
            sizes = self.batch_size.sizes[self._drawn(place)[0]]
            with suppress(DataError):  # none of its size can be used
                samples[place] = self._sample(place, skipped, sizes.which)
        return samples or {places[0]: self._sample(places[0], skipped)}

    def _sample(self, place: int, skipped: list[str], which: Int64[Tensor, " N"] | None = None) -> Sample:
        """Read the sample of a place, or another of its source: where it matters `which` size each has, one of its own."""
        number, turn = self._drawn(place)
        source, order = self.sources[number], self._orders[number]
        tried: set[int] = set()
        for item in chain([order.item(turn)], order.stand_ins(turn, which)):
            if item not in tried:
                tried.add(item)
                try:
                    return source.read(item)
                except DataError as error:
                    skipped.append(str(error))
        raise DataError(
            f"{source.name}: {len(tried)} samples in a row could not be used; the first: {skipped[-len(tried)]}"
        )

    def __iter__(self) -> "ShardedBatches[Batch]":
        return self

    def __next__(self) -> Batch:
        batch, skipped = self._ahead.next()
        for what in skipped:
            known = what if what in self.skipped or len(self.skipped) < NAMES_KEPT else "more"
            self.skipped[known] = self.skipped.get(known, 0) + 1
            if what not in self._said:
                self._said.add(what)
                self.on_skip(f"skipped: {what}")
        return batch

    def deal(self, part: int, parts: int) -> None:
        """From now on hand out only batches `part`, `part` + `parts`, ... after those handed out so far.

        The others are for other readers, each with a part of its own, and the position counts the batches of all.

        Raises:
            ConfigError: there is no such part.
        """
        self._ahead.deal(part, parts)

    @property
    def num_skipped(self) -> int:
        """How often a sample could not be used."""
        return sum(self.skipped.values())

    def state_dict(self) -> dict[str, Any]:
        """Return the position, in plain JSON values: how many batches were handed out, of what, and what was skipped.

        It is the same for every reader, but for what the reader itself skipped.
        """
        position: dict[str, Any] = {"consumed": self._ahead.consumed}
        if self._grouped is not None:
            position["reservoir"] = list(self._grouped.find(self._ahead.consumed))
        return {
            **position,
            "batch_size": self.batch_size if isinstance(self.batch_size, int) else self.batch_size.state(),
            "seed": self.seed,
            "window": self.window,
            "weights": list(self.weights),
            "sources": [source.identity for source in self.sources],
            "skipped": dict(self.skipped),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state_dict()` was taken, by whatever rank of however many; the first goes on counting skips.

        Raises:
            DataError: the state is of other sets, weights, batch size, window or seed, so its position means nothing here.
        """
        for name, here in self.state_dict().items():
            if name not in ("consumed", "reservoir", "skipped") and state.get(name) != here:
                raise DataError(
                    f"cannot continue reading: {name} was {state.get(name)}, now it is {here}; "
                    f"restore the data as it was, or start a new run"
                )
        self._ahead.seek(int(state["consumed"]))
        if self._grouped is not None:
            self._grouped.seek(*state["reservoir"])
        self.skipped = dict(state["skipped"]) if self.rank == self._ahead.part == 0 else {}

    def close(self) -> None:
        """Stop the threads; the next `next()` would start them again."""
        self._ahead.close()

    def __enter__(self) -> "ShardedBatches[Batch]":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Groups:
    """Where the batches of a stream lie that is grouped, `reservoir` samples after the other."""

    def __init__(self, grouped: Grouped, seed: int, size: Callable[[int], Size]) -> None:
        self.grouped, self.seed, self.size = grouped, seed, size
        self.plan = lru_cache(maxsize=4)(self._plan)
        self._lock = Lock()
        self.seek(0, 0)

    def seek(self, reservoir: int, start: int) -> None:
        """Count from here on: batch `start` is the first of a reservoir."""
        with self._lock:
            self._first, self._starts = (
                reservoir,
                [start],
            )  # where this and each later reservoir begins, among the batches

    def find(self, number: int) -> tuple[int, int]:
        """Return the reservoir of a batch, and the number of that one's first batch."""
        with self._lock:
            if number < self._starts[0]:
                self._first, self._starts = 0, [0]
            while self._starts[-1] <= number:
                last = self._first + len(self._starts) - 1
                self._starts.append(self._starts[-1] + len(self.plan(last)))
            found = bisect_right(self._starts, number) - 1
            return self._first + found, self._starts[found]

    def places(self, number: int) -> list[int]:
        """Return the places in the stream that are in a batch."""
        reservoir, start = self.find(number)
        return self.plan(reservoir)[number - start]

    def _plan(self, reservoir: int) -> list[list[int]]:
        """Return the places in each batch of a reservoir."""
        start, count = reservoir * self.grouped.reservoir, self.grouped.reservoir
        plan = Plan(self.grouped.grouping, [self.size(start + place) for place in range(count)])
        batches = plan.epoch(_generator(self.seed, GROUPS, 0, reservoir))
        return [[start + place for place in batch.tolist()] for batch in batches]


class _Order:
    """The samples of one source in the order in which it gives them, epoch after epoch."""

    def __init__(self, groups: tuple[int, ...], window: int, seed: int, source: int) -> None:
        self.starts, self.window, self.seed, self.source = [0, *accumulate(groups)], window, seed, source
        self.epoch = lru_cache(maxsize=2)(self._draw_epoch)
        self.shuffled = lru_cache(maxsize=4)(self._draw_window)

    def _draw_epoch(self, epoch: int) -> tuple[list[list[int]], list[int]]:
        """Return the shards of each window, and how many samples come before each."""
        shards = torch.randperm(
            len(self.starts) - 1, generator=_generator(self.seed, SHARDS, self.source, epoch)
        ).tolist()
        windows = [shards[start : start + self.window] for start in range(0, len(shards), self.window)]
        sizes = [sum(self.starts[shard + 1] - self.starts[shard] for shard in window) for window in windows]
        return windows, [0, *accumulate(sizes)]

    def _draw_window(self, epoch: int, window: int) -> Int64[Tensor, " N"]:
        items = [torch.arange(self.starts[shard], self.starts[shard + 1]) for shard in self.epoch(epoch)[0][window]]
        within = torch.cat(items)
        return within[torch.randperm(len(within), generator=_generator(self.seed, SAMPLES, self.source, epoch, window))]

    def _place(self, turn: int) -> tuple[Int64[Tensor, " N"], int]:
        """Return the window of a turn, and the place in it."""
        epoch, rest = divmod(turn, self.starts[-1])
        before = self.epoch(epoch)[1]
        window = bisect_right(before, rest) - 1
        return self.shuffled(epoch, window), rest - before[window]

    def item(self, turn: int) -> int:
        """Return the sample that comes after `turn` others."""
        items, place = self._place(turn)
        return int(items[place])

    def stand_ins(self, turn: int, which: Int64[Tensor, " N"] | None) -> Iterator[int]:
        """Yield samples to take the place of one, those it is alike in `which`: of the same window, then of all."""
        generator = _generator(self.seed, STAND_INS, self.source, turn)
        items, _ = self._place(turn)
        for among in (items, torch.arange(self.starts[-1])):
            those = among if which is None else among[which[among] == which[self.item(turn)]]
            yield from those[torch.randperm(len(those), generator=generator)[:TRIES]].tolist()


def _generator(*words: int) -> torch.Generator:
    return torch.Generator().manual_seed(int(np.random.SeedSequence(words).generate_state(1, np.uint64)[0]))
