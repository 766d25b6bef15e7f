"""Small changes of a network's linear maps, as values outside of it: LoRA and DoRA.

    LoRA    W + s B A                                                   (Hu et al. 2021, eq. 3)
    DoRA    m (W + s B A) / |W + s B A|, row by row                     (Liu et al. 2024, eq. 5)

A has `rank` rows and B as many columns. Maps that hold several in one (queries, keys, values) have factors for each. Several
adapters add their changes, each in some strength: with D_i what adapter i alone adds to W, the map is W + sum_i strength_i D_i.

    with apply(model, [(style, 0.8), (motion, 1.0)]):       beside the weights, which stay as they are
        model(latents, t, text)
    merge(model, [(style, 0.8)])                            into the weights; .undo() restores them to the last bit
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from itertools import pairwise
from types import TracebackType
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from reelflow.config import configuration
from reelflow.errors import ConfigError, nearest

__all__ = [
    "Adapter",
    "Extracted",
    "LoRA",
    "Undo",
    "Update",
    "apply",
    "extract",
    "merge",
    "merged_weight",
    "new_adapter",
]

KINDS = {
    "attention": ("blocks.*.qkv", "blocks.*.kv", "blocks.*.query", "blocks.*.out"),
    "mlp": ("blocks.*.up", "blocks.*.down"),
    "all": ("blocks.*",),
}
LEAST = 1e-12  # length of a row that is divided by: rows that nothing has taught yet are zero
PARTS = {"qkv": 3, "kv": 2}  # maps that hold several, by the last of their names


@configuration
class LoRA:
    """A new adapter of a network.

    Raises:
        ConfigError: the rank or alpha is not positive, or there are no targets.
    """

    rank: int
    alpha: float | None = None  # s = alpha / rank; None: s = 1
    targets: tuple[str, ...] = ("attention",)  # of the blocks' maps: attention, mlp, all; or patterns of names (*)
    magnitudes: bool = False  # lengths of rows are learned apart from their directions: DoRA

    def __post_init__(self) -> None:
        if self.rank < 1 or not (self.alpha is None or 0 < self.alpha < math.inf):
            raise ConfigError(f"rank is at least 1 and alpha above 0, got {self.rank} and {self.alpha}")
        if not self.targets:
            raise ConfigError(f"an adapter without targets changes nothing; known: {', '.join(KINDS)}, or patterns")

    @property
    def scale(self) -> float:
        """What B A is multiplied by."""
        return 1.0 if self.alpha is None else self.alpha / self.rank


@dataclass(frozen=True)
class Update:
    """A change of a linear map's rows from `start` on.

    Raises:
        ConfigError: the factors do not go together.
    """

    start: int
    down: Float[Tensor, "rank width"]  # A
    up: Float[Tensor, "_ _"]  # B, rows x rank
    scale: float = 1.0
    magnitude: Float[Tensor, " _"] | None = None  # of DoRA, one of each row

    def __post_init__(self) -> None:
        shapes = self.down.shape[0], self.up.shape[0]
        if self.up.shape[1:] != shapes[:1] or (self.magnitude is not None and self.magnitude.shape != shapes[1:]):
            raise ConfigError(
                f"factors of shapes {list(self.up.shape)} and {list(self.down.shape)} have no product, or not one row "
                f"for each of the magnitudes {None if self.magnitude is None else list(self.magnitude.shape)}"
            )

    @property
    def rows(self) -> slice:
        return slice(self.start, self.start + self.up.shape[0])

    def change(self, weight: Float[Tensor, "rows width"]) -> Float[Tensor, "rows width"]:
        """Return what is added to these rows of the weight."""
        delta = self.scale * (self.up.to(weight) @ self.down.to(weight))
        if self.magnitude is None:
            return delta
        moved = weight + delta
        return (self.magnitude.to(weight) / moved.norm(dim=1).clamp_min(LEAST))[:, None] * moved - weight

    def output(
        self, linear: nn.Linear, base: Float[Tensor, "... rows"], low: Float[Tensor, "... rank"]
    ) -> Float[Tensor, "... rows"]:
        """Return what is added to these channels of the map's output `base`, given A x.

        The length of a row counts as a constant in gradients (Liu et al. 2024, sec. 4.3).
        """
        added = self.scale * F.linear(low, self.up.to(low.dtype))
        if self.magnitude is None:
            return added
        weight = linear.weight[self.rows].to(torch.promote_types(linear.weight.dtype, self.up.dtype))
        with torch.no_grad():
            length = (weight + self.scale * (self.up.to(weight) @ self.down.to(weight))).norm(dim=1)
        factor = (self.magnitude.to(weight) / length.clamp_min(LEAST)).to(base.dtype)
        if linear.bias is not None:
            base = base - linear.bias[self.rows].to(base.dtype)
        return (factor - 1) * base + factor * added


@dataclass(frozen=True)
class Adapter:
    """Changes of linear maps, by their names in the network.

    Raises:
        ConfigError: two updates change the same rows of a map.
    """

    updates: Mapping[str, tuple[Update, ...]] = field(repr=False)

    def __post_init__(self) -> None:
        for name, updates in self.updates.items():
            ordered = sorted(updates, key=lambda update: update.start)
            if any(a.rows.stop > b.start for a, b in pairwise(ordered)):
                raise ConfigError(f"two updates of one adapter change the same rows of {name}")

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Give all tensors with names of their own; of those that updates share, the first."""
        seen: set[int] = set()
        for name, updates in self.updates.items():
            for index, update in enumerate(updates):
                for part in ("down", "up", "magnitude"):
                    if (value := getattr(update, part)) is not None and id(value) not in seen:
                        seen.add(id(value))
                        yield f"{name}.{index}.{part}", value

    def map(self, change: Callable[[Tensor], Tensor]) -> "Adapter":
        """Return the adapter with every tensor changed; what was shared stays so."""
        done = {id(value): change(value) for _, value in self.tensors()}
        return Adapter(
            {
                name: tuple(
                    Update(
                        update.start,
                        done[id(update.down)],
                        done[id(update.up)],
                        update.scale,
                        None if update.magnitude is None else done[id(update.magnitude)],
                    )
                    for update in updates
                )
                for name, updates in self.updates.items()
            }
        )

    def check(self, model: nn.Module) -> None:
        """Refuse a network that the adapter is not of.

        Raises:
            ConfigError: it lacks a map, or has one of another shape.
        """
        maps = linear_maps(model)
        for name, updates in self.updates.items():
            if name not in maps:
                raise ConfigError(f"the network has no linear map {name!r}; {nearest(name, maps)}")
            height, width = maps[name].weight.shape
            for update in updates:
                if update.down.shape[1] != width or update.rows.stop > height:
                    raise ConfigError(
                        f"{name} has {height} rows of {width}; the adapter changes rows {update.start} to "
                        f"{update.rows.stop} of {update.down.shape[1]}: it is of another network"
                    )


Adapters = Sequence[tuple[Adapter, float]]
"""Adapters and the strengths they are used in."""


class Undo:
    """Takes back what was done, once; as a context, at its end. Of several, the last done is to be taken back first."""

    def __init__(self, steps: Iterable[Callable[[], Any]]) -> None:
        self._steps = list(steps)

    def undo(self) -> None:
        while self._steps:
            self._steps.pop()()

    def __enter__(self) -> "Undo":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.undo()


def linear_maps(model: nn.Module) -> dict[str, nn.Linear]:
    """Return a network's linear maps by their names."""
    return {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}


def apply(model: nn.Module, adapters: Adapters) -> Undo:
    """Let a network answer as with the adapters, its weights untouched; gradients reach the adapters' tensors.

    Raises:
        ConfigError: an adapter is of another network, or a strength is not finite.
    """
    _check(model, adapters)
    return Undo(
        linear.register_forward_hook(_hook(found)).remove
        for name, linear in linear_maps(model).items()
        if (found := [(adapter.updates[name], strength) for adapter, strength in adapters if name in adapter.updates])
    )


@torch.no_grad()
def merge(model: nn.Module, adapters: Adapters) -> Undo:
    """Add the adapters to a network's weights; rounded once where these are of fewer digits.

    The weights as they were are kept for `undo`, until what is returned is dropped.

    Raises:
        ConfigError: an adapter is of another network, or a strength is not finite.
    """
    _check(model, adapters)
    steps: list[Callable[[], Any]] = []
    for name, linear in linear_maps(model).items():
        if any(name in adapter.updates for adapter, _ in adapters):
            was = linear.weight.detach().clone()
            linear.weight.copy_(merged_weight(name, was, adapters))
            steps.append(_restoring(linear.weight, was))
    return Undo(steps)


def merged_weight(name: str, weight: Float[Tensor, "rows width"], adapters: Adapters) -> Float[Tensor, "rows width"]:
    """Return the weight of a linear map, by its name, with the adapters added."""
    changes = [(update, strength) for adapter, strength in adapters for update in adapter.updates.get(name, ())]
    if not changes:
        return weight
    base = weight.to(torch.promote_types(weight.dtype, torch.float32))
    total = base.clone()
    for update, strength in changes:
        total[update.rows] += strength * update.change(base[update.rows])
    return total.to(weight.dtype)


def new_adapter(model: nn.Module, config: LoRA, generator: torch.Generator) -> Adapter:
    """Return an adapter that changes nothing yet: A uniform within 1 / sqrt(width), B zero, magnitudes as they are.

    Its tensors are of float32 at least.

    Raises:
        ConfigError: a target is no map of the network.
    """
    maps = linear_maps(model)
    updates: dict[str, tuple[Update, ...]] = {}
    for name in chosen(maps, config.targets):
        weight = maps[name].weight.detach()
        weight = weight.to(torch.promote_types(weight.dtype, torch.float32))
        updates[name] = tuple(_new(part, start, config, generator) for start, part in parts_of(name, weight))
    return Adapter(updates)


def chosen(maps: Iterable[str], targets: Sequence[str]) -> list[str]:
    """Return the names of the maps that targets choose, in the network's order.

    Raises:
        ConfigError: a target chooses none.
    """
    maps = list(maps)
    found = {
        target: {name for name in maps for pattern in KINDS.get(target, (target,)) if fnmatchcase(name, pattern)}
        for target in targets
    }
    for target, names in found.items():
        if not names:
            raise ConfigError(f"no linear map is called {target!r}; {nearest(target, [*KINDS, *maps])}")
    return [name for name in maps if any(name in names for names in found.values())]


def parts_of(name: str, weight: Float[Tensor, "rows width"]) -> Iterator[tuple[int, Float[Tensor, "part width"]]]:
    """Give the maps that one map holds: the first row of each, and its rows."""
    count = PARTS.get(name.rpartition(".")[2], 1)
    height = weight.shape[0] // count
    for index in range(count):
        yield index * height, weight[index * height : (index + 1) * height]


@dataclass(frozen=True)
class Extracted:
    """An adapter that stands for the difference of two networks."""

    adapter: Adapter
    share: float  # of the squared difference of all weights that it carries; 1 is all of it


@torch.no_grad()
def extract(
    before: Mapping[str, Tensor],
    after: Mapping[str, Tensor],
    rank: int,
    *,
    maps: Iterable[str],
) -> Extracted:
    """Return the best adapter of a rank from one network to the other (Eckart and Young 1936).

    `maps` names linear maps, whose weights are `NAME.weight`; differences of all else are not carried, but count in `share`.

    Raises:
        ConfigError: the networks differ in names or shapes, or no map differs.
    """
    if before.keys() != after.keys() or any(before[name].shape != after[name].shape for name in before):
        raise ConfigError("the two networks have other names or shapes; extract needs two of one configuration")
    total = sum(float((after[name].double() - before[name].double()).square().sum()) for name in before)
    updates, carried = {}, 0.0
    for name in maps:
        wide = torch.promote_types(before[f"{name}.weight"].dtype, torch.float32)
        difference = after[f"{name}.weight"].to(wide) - before[f"{name}.weight"].to(wide)
        found = []
        for start, part in parts_of(name, difference):
            if part.any():
                u, s, v = torch.linalg.svd(part, full_matrices=False)
                root = s[:rank].sqrt()
                found.append(Update(start, root[:, None] * v[:rank], u[:, :rank] * root))
                carried += float(s[:rank].double().square().sum())
        if found:
            updates[name] = tuple(found)
    if not updates:
        raise ConfigError("the two networks do not differ in any linear map: there is nothing to extract")
    return Extracted(Adapter(updates), carried / total)


def _new(weight: Float[Tensor, "rows width"], start: int, config: LoRA, generator: torch.Generator) -> Update:
    rows, width = weight.shape
    down = (2 * torch.rand(config.rank, width, generator=generator, dtype=weight.dtype) - 1) / math.sqrt(width)
    length = weight.norm(dim=1) if config.magnitudes else None
    return Update(start, down.to(weight.device), weight.new_zeros(rows, config.rank), config.scale, length)


def _check(model: nn.Module, adapters: Adapters) -> None:
    for adapter, strength in adapters:
        if not math.isfinite(strength):
            raise ConfigError(f"the strength of an adapter is a finite number, got {strength}; 1 is as it was trained")
        adapter.check(model)


def _restoring(weight: Tensor, was: Tensor) -> Callable[[], Any]:
    @torch.no_grad()
    def restore() -> None:
        weight.copy_(was)

    return restore


def _hook(
    changes: Sequence[tuple[tuple[Update, ...], float]],
) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
    def hook(linear: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        assert isinstance(linear, nn.Linear)
        lows: dict[int, Tensor] = {}  # A x, which updates may share
        total = output
        for updates, strength in changes:
            pieces, end = [], 0
            for update in sorted(updates, key=lambda update: update.start):
                if (key := id(update.down)) not in lows:
                    lows[key] = F.linear(inputs[0], update.down.to(inputs[0].dtype))
                if update.start > end:
                    pieces.append(output.new_zeros(()).expand(*output.shape[:-1], update.start - end))
                pieces.append(update.output(linear, output[..., update.rows], lows[key]).to(output.dtype))
                end = update.rows.stop
            if end < output.shape[-1]:
                pieces.append(output.new_zeros(()).expand(*output.shape[:-1], output.shape[-1] - end))
            added = pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=-1)
            total = total + strength * added
        return total

    return hook
