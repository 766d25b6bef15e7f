"""The layout in which a family's own repository keeps a network, where diffusers has another one."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from reelflow.errors import CheckpointError
from reelflow.interop.mapping import Entry, Row, linear, table
from reelflow.models.dit import DiTConfig

__all__ = ["Original", "Shapes", "agreeing", "count_blocks", "relabelled", "sequential_rows"]

Shapes = Mapping[str, Sequence[int]]


@dataclass(frozen=True)
class Original:
    """How to recognise the layout, and the way between it and ours.

    Some repositories keep a configuration: in a config.json beside the weights (then there may be shards), or in the
    metadata of the one file, under `config`, as JSON of {"transformer": ...}. Of others the shapes are all there is.
    """

    telling: tuple[str, ...]  # tensors that only this layout has, together
    read: Callable[[Shapes, dict[str, Any]], dict[str, Any]]
    """From shapes, and the repository's configuration ({} without one), to what the family's own config.json would say.

    Raises:
        CheckpointError: they do not go together, or do not tell what the network is.
    """
    weights: Callable[[DiTConfig], tuple[Row, ...]]
    file: str  # without the suffix
    write: Callable[[DiTConfig], dict[str, Any]] | None = None  # the repository's configuration, if it keeps one
    class_name: str = ""  # in that configuration
    beside: bool = False  # it is a config.json
    prefix: str = ""  # of all names in a file; any of the usual ones is read


def agreeing(found: Mapping[str, Any], known: Mapping[str, Any], seen: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values of a configuration over those that are `known`, once it agrees with what is `seen` in the weights.

    Raises:
        CheckpointError: a value is unknown, or says something else.
    """
    given = {name: value for name, value in found.items() if not name.startswith("_")}
    if strange := [name for name in given if name not in known and name not in seen]:
        raise CheckpointError(f"the configuration has unknown values: {', '.join(strange)}")
    for name, value in seen.items():
        if name in given and given[name] != value:
            raise CheckpointError(f"the configuration has {name}={given[name]!r}, the weights have {value!r}")
    return {**known, **given, **seen}


def count_blocks(shapes: Shapes, prefix: str) -> int:
    """Return how many numbers follow the prefix (which ends with a dot) in names."""
    return len({name.removeprefix(prefix).partition(".")[0] for name in shapes if name.startswith(prefix)})


def sequential_rows(ours: str, theirs: str) -> tuple[Row, ...]:
    """Relate two linear maps with an activation between."""
    return table(linear(f"{ours}.up", f"{theirs}.0"), linear(f"{ours}.down", f"{theirs}.2"))


def relabelled(rows: Sequence[Row], names: Mapping[str, str]) -> tuple[Row, ...]:
    """Return a table with their tensors called by other names, where `names` has one.

    Names lack ".weight" and ".bias"; a star stands for the number of a block, on both sides.
    """

    def call(name: str) -> str:
        stem, ending = (name[: -len(end)], end) if (end := f".{name.rpartition('.')[2]}") in ENDINGS else (name, "")
        block = re.search(r"\.(\d+)\.", stem)
        starred = f"{stem[: block.start(1)]}*{stem[block.end(1) :]}" if block else stem
        new = names.get(stem) or names.get(starred, stem).replace("*", block[1] if block else "*")
        return new + ending

    return tuple(
        replace(row, theirs={call(name): pieces for name, pieces in row.theirs.items()})
        if isinstance(row, Entry)
        else replace(row, theirs=tuple(call(name) for name in row.theirs))
        for row in rows
    )


ENDINGS = (".weight", ".bias")
