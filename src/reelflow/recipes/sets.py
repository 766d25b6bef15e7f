"""Sets of shards for a transformer to learn from, as `reelflow data build` and `reelflow data shards` make them.

    reelflow train folder --set data='{"kind": "shards", "sets": ["set/shards"], "validation": "held/shards"}' \\
        --set vae.pretrained=demo/run

Latents are read as they are wanted, from local or remote shards; the autoencoder is the one that made them. They are of
the recipe's shape, or of any shapes where `dit.batches` says how these make batches.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from reelflow.config import configuration
from reelflow.data.loader import Buckets, Packed
from reelflow.data.remote import Cache
from reelflow.data.shards import Sample, ShardSet
from reelflow.data.store import Store, write_store
from reelflow.data.stream import Grouped, ShardedBatches, Sizes
from reelflow.errors import ConfigError, DataError
from reelflow.models.condition import Condition
from reelflow.models.dit import DiTConfig
from reelflow.models.vae import Posterior
from reelflow.training.flow import LatentBatch, clip_sizes

__all__ = ["ShardsData", "aside_of", "mean_flops", "open_sets", "sharded_batches", "sizes_of"]


@configuration
class ShardsData:
    """Sets of shards: folders, or URLs that fsspec knows.

    Of every sum(weights) samples, `weights[k]` come from `sets[k]`. The first samples of another set, `validation`, are
    never learned from.

    Raises:
        ConfigError: there are no sets, or not a weight for each.
    """

    sets: tuple[str, ...]
    validation: str
    weights: tuple[int, ...] = ()  # (): one sample of each in turn
    window: int = 8  # shards that are shuffled together
    reservoir: int = 1024  # samples that are made into batches together, where dit.batches says how
    cache: Cache | None = None  # of remote shards
    num_validation: int = 32
    kind: Literal["shards"] = "shards"

    def __post_init__(self) -> None:
        if not self.sets or (self.weights and len(self.weights) != len(self.sets)):
            near = [1] * max(1, len(self.sets))
            raise ConfigError(f"{len(self.sets)} sets with the weights {list(self.weights)}; nearest: weights={near}")
        for name in ("num_validation", "window", "reservoir"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")


def open_sets(data: ShardsData, *, made_by: Collection[str]) -> tuple[list[ShardSet], ShardSet]:
    """Open the sets to learn from and the one set aside, of latents of an autoencoder that has one of these hashes.

    Raises:
        DataError: one is not there, not finished, or of latents of another autoencoder.
    """
    opened = [ShardSet.open(url, cache=data.cache) for url in (*data.sets, data.validation)]
    for each in opened:
        if (found := each.fingerprint.get("vae")) not in made_by:
            what = "are not latents" if found is None else f"are latents of another autoencoder ({str(found)[:12]})"
            raise DataError(f"the samples of {each.name} {what}; set vae.pretrained to the model they were built with")
    return opened[:-1], opened[-1]


def aside_of(shards: ShardSet, num: int, folder: Path) -> Store:
    """Copy the first samples of a set into a store, or open the one that holds them.

    Raises:
        DataError: a sample cannot be read.
    """
    made_by: dict[str, Any] = {"set": shards.identity, "num": num}
    if (folder / "store.json").is_file():
        return Store.open(folder, fingerprint=made_by)
    samples = [shards.read(number) for number in range(min(num, len(shards)))]
    captions = [{"caption": str(sample.meta.get("caption", ""))} for sample in samples]

    def tensors() -> Iterator[dict[str, Tensor]]:
        return (sample.tensors for sample in samples)

    write_store(folder, tensors(), fingerprint=made_by, meta=captions)
    return Store.open(folder)


def sizes_of(sets: list[ShardSet], model: DiTConfig, *, context_tokens: int) -> list[Sizes]:
    """Return what the samples of each set take in training; their shapes are the indexes'.

    Raises:
        ConfigError: as `clip_sizes`.
        DataError: latents do not have the network's channels, or there are none.
    """
    found = []
    for each in sets:
        shapes = each.shapes("mean")
        for shape in shapes.found:
            if len(shape) != 4 or shape[0] != model.in_channels:
                raise DataError(
                    f"{each.name} holds latents of {list(shape)}; the transformer takes {model.in_channels} channels of "
                    f"frames, rows and columns"
                )
        extents = [(t, h, w) for _, t, h, w in shapes.found]
        found.append(Sizes(clip_sizes(model, extents, context_tokens=context_tokens), shapes.which))
    return found


def mean_flops(sizes: Sequence[Sizes], weights: Sequence[int]) -> float:
    """Return what a sample of the mixture costs to train on once, on average."""
    total, shares = 0.0, weights or [1] * len(sizes)
    for share, (found, which) in zip(shares, sizes, strict=True):
        counts = which.bincount(minlength=len(found)).tolist()
        total += share * sum(count * size.flops for count, size in zip(counts, found, strict=True)) / len(which)
    return total / sum(shares)


def sharded_batches(
    sets: list[ShardSet],
    data: ShardsData,
    batches: int | Packed | Buckets,
    sizes: Sequence[Sizes],
    *,
    seed: int,
    on_skip: Callable[[str], object],
) -> ShardedBatches[LatentBatch | list[LatentBatch]]:
    """Return batches of latents, with their conditions, from sets of shards: so many to a batch, or as they are grouped.

    Raises:
        ConfigError: a sample is larger than a batch.
    """

    def collate(samples: list[Sample], generators: list[torch.Generator]) -> LatentBatch | list[LatentBatch]:
        return [stack([each]) for each in samples] if isinstance(batches, Packed) else stack(samples)

    def stack(samples: list[Sample]) -> LatentBatch:
        stacked = {name: torch.stack([s.tensors[name] for s in samples]) for name in samples[0].tensors}
        posterior = Posterior(*(stacked.pop(name).float() for name in ("mean", "logvar")))
        parts: dict[str, Any] = stacked
        return LatentBatch(posterior, Condition(**parts))

    size = batches if isinstance(batches, int) else Grouped(batches, sizes, data.reservoir)
    return ShardedBatches(
        sets, size, collate, seed=seed, weights=data.weights or None, window=data.window, on_skip=on_skip
    )
