"""Sets of shards for a transformer to learn from, as `reelflow data build` and `reelflow data shards` make them.

    reelflow train folder --set data='{"kind": "shards", "sets": ["set/shards"], "validation": "held/shards"}' \\
        --set vae.pretrained=demo/run

Latents are read as they are wanted, from local or remote shards; the autoencoder is the one that made them.
"""

from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from reelflow.config import configuration
from reelflow.data.remote import Cache
from reelflow.data.shards import Sample, ShardSet
from reelflow.data.store import Store, write_store
from reelflow.data.stream import ShardedBatches
from reelflow.errors import ConfigError, DataError
from reelflow.models.condition import Condition
from reelflow.models.vae import Posterior
from reelflow.training.flow import LatentBatch

__all__ = ["ShardsData", "aside_of", "open_sets", "sharded_batches"]


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
    cache: Cache | None = None  # of remote shards
    num_validation: int = 32
    kind: Literal["shards"] = "shards"

    def __post_init__(self) -> None:
        if not self.sets or (self.weights and len(self.weights) != len(self.sets)):
            near = [1] * max(1, len(self.sets))
            raise ConfigError(f"{len(self.sets)} sets with the weights {list(self.weights)}; nearest: weights={near}")
        if self.num_validation < 1 or self.window < 1:
            raise ConfigError(
                f"num_validation and window must be at least 1, got {self.num_validation} and {self.window}"
            )


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


def sharded_batches(
    sets: list[ShardSet], data: ShardsData, batch_size: int, *, seed: int, on_skip: Callable[[str], object]
) -> ShardedBatches[LatentBatch]:
    """Return batches of latents, with their conditions, from sets of shards."""

    def collate(samples: list[Sample], generators: list[torch.Generator]) -> LatentBatch:
        stacked = {name: torch.stack([s.tensors[name] for s in samples]) for name in samples[0].tensors}
        posterior = Posterior(*(stacked.pop(name).float() for name in ("mean", "logvar")))
        parts: dict[str, Any] = stacked
        return LatentBatch(posterior, Condition(**parts))

    return ShardedBatches(
        sets, batch_size, collate, seed=seed, weights=data.weights or None, window=data.window, on_skip=on_skip
    )
