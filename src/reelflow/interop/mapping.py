"""Which of our tensors are which of theirs, both ways: a published checkpoint as a table.

Every tensor is a stack of *pieces* along its first dimension. Most rows of a table say that some of ours and some of
theirs hold the same pieces:

    linear("out", "attn.to_out.0")                                              one piece, renamed; weight and bias
    linear("qkv", ["attn.to_q", "attn.to_k", "attn.to_v"])                      ours is theirs, stacked
    linear({"modulation": "shift scale"}, {"norm_out.linear": "scale shift"})   pieces by name, in another order
    linear({"video": "v1 v2", "text": "t1 t2"}, {"norm1": "v1 t1", "norm2": "v2 t2"})      and in other tensors
    parameter("table", "scale_shift_table", rearranged("1 n d -> n d"))         changed on the way

A `Change` moves entries and may flip their sign, no more. So the way back is exact, and gradients travel as weights do.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from typing import Any, ClassVar

import torch
from einops import rearrange
from jaxtyping import Int
from torch import Tensor, nn

from reelflow.errors import CheckpointError, ConfigError
from reelflow.models.weights import count_names
from reelflow.nn.rope import permute_channels

__all__ = [
    "NEGATED",
    "Change",
    "Entry",
    "Fixed",
    "Ignored",
    "Row",
    "Side",
    "chained",
    "derived",
    "differences",
    "given",
    "ignored",
    "linear",
    "parameter",
    "rearranged",
    "reordered",
    "table",
]

Tensors = Mapping[str, Tensor]


# Changes: what happens to a piece on the way.


@dataclass(frozen=True)
class Change:
    """A signed permutation of a tensor's entries, and perhaps another shape; the two functions undo each other."""

    to_ours: Callable[[Tensor], Tensor]
    to_theirs: Callable[[Tensor], Tensor]


NEGATED = Change(torch.neg, torch.neg)
"""For outputs of the other sign, such as noise - data."""


def rearranged(pattern: str, **sizes: int) -> Change:
    """Return the change from theirs to ours that an einops pattern says; `sizes` must do for both directions.

    "(h w c) ... -> (c h w) ..." suits a weight and its bias; "d c t h w -> d (c t h w)" makes a convolution a linear map.
    """
    theirs, ours = pattern.split("->")
    return Change(
        lambda x: rearrange(x, f"{theirs} -> {ours}", **sizes), lambda x: rearrange(x, f"{ours} -> {theirs}", **sizes)
    )


def reordered(order: Int[Tensor, "d"]) -> Change:
    """Return the change of rows ours[i] = theirs[order[i]], in each run of d rows: of each head, say.

    `interleaved_from_half` is an order of this kind.
    """
    back = order.argsort()
    return Change(lambda x: permute_channels(x, order), lambda x: permute_channels(x, back))


def chained(*changes: Change) -> Change:
    """Return the changes one after the other, as one goes from theirs to ours."""
    return Change(
        lambda x: reduce(lambda y, change: change.to_ours(y), changes, x),
        lambda x: reduce(lambda y, change: change.to_theirs(y), reversed(changes), x),
    )


# Rows: what a table is made of.


@dataclass(frozen=True)
class Entry:
    """Tensors of ours and of theirs that hold the same pieces; made by `parameter` and `linear`.

    `ours` and `theirs` give each tensor's pieces in their order. A piece that theirs hold several times is a copy: copies
    must agree when read, and each is written.

    Raises:
        ConfigError: the two sides do not hold the same pieces, or a change or a height is of a piece that is not there.
    """

    ours: Mapping[str, tuple[str, ...]]
    theirs: Mapping[str, tuple[str, ...]]
    changes: Mapping[str, Change]  # by piece
    heights: Mapping[str, int]  # by piece, in units that tensors of several pieces share; 1 unless said

    def __post_init__(self) -> None:
        ours, theirs = ([piece for pieces in side.values() for piece in pieces] for side in (self.ours, self.theirs))
        if set(ours) != set(theirs) or len(ours) != len(set(ours)):
            raise ConfigError(
                f"both sides must hold the same pieces, ours each once; got {ours} in ours ({', '.join(self.ours)}) and "
                f"{theirs} in theirs ({', '.join(self.theirs)})"
            )
        if strange := (self.changes.keys() | self.heights.keys()) - set(ours):
            raise ConfigError(f"changes or heights of pieces {sorted(strange)}, but the pieces are {ours}")

    def to_ours(self, tensors: Tensors) -> dict[str, Tensor]:
        """Return our tensors, given theirs (among others), which are asked for one at a time.

        Raises:
            CheckpointError: copies differ, or the rows do not divide by the heights.
        """
        return self._convert(tensors, self.theirs, self.ours, lambda piece, x: self.changes[piece].to_ours(x))

    def to_theirs(self, tensors: Tensors) -> dict[str, Tensor]:
        """Return their tensors, given ours (among others).

        Raises:
            CheckpointError: the rows do not divide by the heights.
        """
        return self._convert(tensors, self.ours, self.theirs, lambda piece, x: self.changes[piece].to_theirs(x))

    def renamed(self, ours: str, theirs: str, suffix: str = "") -> "Entry":
        """Return the entry with prefixes, and a suffix, put to the names of its tensors."""
        return replace(
            self,
            ours={f"{ours}{name}{suffix}": pieces for name, pieces in self.ours.items()},
            theirs={f"{theirs}{name}{suffix}": pieces for name, pieces in self.theirs.items()},
        )

    def _convert(
        self,
        tensors: Tensors,
        source: Mapping[str, tuple[str, ...]],
        target: Mapping[str, tuple[str, ...]],
        change: Callable[[str, Tensor], Tensor],
    ) -> dict[str, Tensor]:
        held: dict[str, Tensor] = {}
        for name, pieces in source.items():
            for piece, x in zip(pieces, self._cut(name, tensors[name], pieces), strict=True):
                x = change(piece, x) if piece in self.changes else x
                if piece in held and not x.is_meta and not torch.equal(held[piece], x):
                    raise CheckpointError(f"{name} holds another {piece!r} than the tensor before it, not a copy")
                held.setdefault(piece, x)
        return {
            name: held[pieces[0]] if len(pieces) == 1 else torch.cat([held[piece] for piece in pieces])
            for name, pieces in target.items()
        }

    def _cut(self, name: str, x: Tensor, pieces: tuple[str, ...]) -> Sequence[Tensor]:
        if len(pieces) == 1:
            return (x,)
        heights = [self.heights.get(piece, 1) for piece in pieces]
        unit, rest = divmod(x.shape[0], sum(heights))
        if rest:
            raise CheckpointError(f"{name} has {x.shape[0]} rows, which {pieces} of heights {heights} do not divide")
        return x.split([unit * height for height in heights])


@dataclass(frozen=True)
class Fixed:
    """A tensor of one side that follows from the configuration: made by `derived` and `given`."""

    ours: tuple[str, ...]
    theirs: tuple[str, ...]
    make: Callable[[], Tensor]

    def to_ours(self, tensors: Tensors) -> dict[str, Tensor]:
        """Return ours, and check theirs.

        Raises:
            CheckpointError: theirs is not what `make` makes, up to rounding.
        """
        self._check(self.theirs, tensors)
        return {name: self.make() for name in self.ours}

    def to_theirs(self, tensors: Tensors) -> dict[str, Tensor]:
        """Return theirs, and check ours.

        Raises:
            CheckpointError: ours is not what `make` makes, up to rounding, and theirs have no place for it.
        """
        self._check(self.ours, tensors)
        return {name: self.make() for name in self.theirs}

    def renamed(self, ours: str, theirs: str) -> "Fixed":
        """Return the same with prefixes."""
        return replace(
            self, ours=tuple(ours + name for name in self.ours), theirs=tuple(theirs + name for name in self.theirs)
        )

    def _check(self, names: Sequence[str], tensors: Tensors) -> None:
        for name in names:
            if (found := tensors[name]).is_meta or (made := self.make()).is_meta:
                continue
            slack = max(1e-4, torch.finfo(found.dtype).eps if found.is_floating_point() else 0)
            if not torch.allclose(found.float().cpu(), made.float().cpu(), rtol=slack, atol=slack):
                raise CheckpointError(f"{name} is not what the configuration makes of it, and cannot be carried over")


@dataclass(frozen=True)
class Ignored:
    """Tensors that published files may hold and nobody reads: dropped at load, not written at export."""

    theirs: tuple[str, ...]
    ours: ClassVar[tuple[str, ...]] = ()

    def to_ours(self, tensors: Tensors) -> dict[str, Tensor]:
        """Return nothing."""
        return {}

    def to_theirs(self, tensors: Tensors) -> dict[str, Tensor]:
        """Return nothing."""
        return {}

    def renamed(self, ours: str, theirs: str) -> "Ignored":
        """Return the same with a prefix."""
        return Ignored(tuple(theirs + name for name in self.theirs))


Row = Entry | Fixed | Ignored

Side = str | Sequence[str] | Mapping[str, str]
"""The tensors on one side of an entry.

    "name"                    one tensor: all pieces of the other side, in their order there
    ["a", "b"]                tensors that are one piece each, called as they are
    {"a": "x y", "b": "z"}    tensors and their pieces, separated by spaces
"""


def parameter(
    ours: Side,
    theirs: Side,
    *changes: Change,
    each: Mapping[str, Change] | None = None,
    heights: Mapping[str, int] | None = None,
) -> Entry:
    """Relate tensors; `changes` befall every piece one after the other, after those in `each` of single pieces.

    Pieces of one tensor are equally high, or as `heights` says, in any common unit: {"mlp": 4} is four of the others.

    Raises:
        ConfigError: as `Entry`.
    """
    left, right = _pieces(ours, theirs), _pieces(theirs, ours)
    each = each or {}
    named = dict.fromkeys(piece for pieces in left.values() for piece in pieces) if changes else {}
    befall = {piece: chained(*([each[piece]] if piece in each else []), *changes) for piece in {**each, **named}}
    return Entry(left, right, befall, heights or {})


def linear(
    ours: Side,
    theirs: Side,
    *changes: Change,
    weight: Change | None = None,
    bias: bool = True,
    each: Mapping[str, Change] | None = None,
    heights: Mapping[str, int] | None = None,
) -> tuple[Entry, ...]:
    """Relate the weight and bias of linear maps, convolutions or norms, as `parameter` does; names lack their endings.

    `changes` and `each` are of rows, and befall weight and bias alike; `weight` befalls the weight's pieces alone, first.

    Raises:
        ConfigError: as `Entry`.
    """
    rows = parameter(ours, theirs, *changes, each=each, heights=heights)
    weights = replace(
        rows,
        changes={
            piece: chained(*(change for change in (weight, rows.changes.get(piece)) if change is not None))
            for pieces in rows.ours.values()
            for piece in pieces
        },
    )
    return (weights.renamed("", "", ".weight"), *([rows.renamed("", "", ".bias")] if bias else []))


def derived(theirs: str, make: Callable[[], Tensor]) -> Fixed:
    """Return the row of a tensor of theirs that follows from the configuration: checked at load, written at export."""
    return Fixed((), (theirs,), make)


def given(ours: str, make: Callable[[], Tensor]) -> Fixed:
    """Return the row of a tensor of ours that follows from their configuration: set at load, checked at export."""
    return Fixed((ours,), (), make)


def ignored(*theirs: str) -> Ignored:
    """Return the row of tensors that published files may hold and nobody reads."""
    return Ignored(theirs)


def table(*rows: Row | Iterable[Row] | Iterable[Iterable[Row]], ours: str = "", theirs: str = "") -> tuple[Row, ...]:
    """Put rows and tables, as deep as they lie, into one, with a prefix to our names and one to theirs."""
    return tuple(row.renamed(ours, theirs) for row in _flat(rows))


def differences(rows: Sequence[Row], model: nn.Module, found: Mapping[str, Sequence[int] | None]) -> str:
    """Say all that is wrong between a model, a table and a checkpoint's names and shapes, or "" if nothing is.

    A shape that is None is not compared. Tensors that a model ties are one, under any of their names.
    """
    tensors: dict[str, Tensor] = model.state_dict(keep_vars=True)
    ours = [name for row in rows for name in row.ours]
    theirs = Counter(name for row in rows for name in row.theirs)
    optional = {name for row in rows if isinstance(row, Ignored) for name in row.theirs}
    filled = Counter(id(tensors[name]) for name in ours if name in tensors)
    names = {id(tensors[name]): name for name in reversed(tensors)}
    reshaped, misshapen = [], []
    flat = {name: torch.empty_like(x, device="meta") for name, x in tensors.items()}
    for row in rows:
        if all(name in tensors for name in row.ours):
            expected = row.to_theirs(flat)
            reshaped += _other_shapes({name: found[name] for name in expected if name in found}, expected)
            back = row.to_ours(expected) if row.ours else {}
            misshapen += _other_shapes({name: x.shape for name, x in back.items()}, flat)
    return count_names(
        {
            "missing": [name for name in theirs if name not in found and name not in optional],
            "unexpected": [name for name in found if name not in theirs],
            "of another shape": reshaped,
            "of ours that no row fills": [name for key, name in names.items() if not filled[key]],
            "of ours that several rows fill": [name for key, name in names.items() if filled[key] > 1],
            "of ours that a row gives another shape": misshapen,
            "of ours that the model lacks": [name for name in ours if name not in tensors],
            "of theirs that several rows hold": [name for name, count in theirs.items() if count > 1],
        }
    )


def _other_shapes(found: Mapping[str, Sequence[int] | None], expected: Tensors) -> list[str]:
    return [
        f"{name} is {list(shape)}, expected {list(expected[name].shape)}"
        for name, shape in found.items()
        if shape is not None and tuple(shape) != tuple(expected[name].shape)
    ]


def _pieces(side: Side, other: Side) -> dict[str, tuple[str, ...]]:
    if isinstance(side, Mapping):
        return {name: tuple(pieces.split()) for name, pieces in side.items()}
    if not isinstance(side, str):
        return {name: (name,) for name in side}
    if isinstance(other, str):
        return {side: ("whole",)}
    return {side: tuple(dict.fromkeys(piece for pieces in _pieces(other, side).values() for piece in pieces))}


def _flat(rows: Iterable[Any]) -> Iterator[Row]:
    for row in rows:
        if isinstance(row, Row):
            yield row
        else:
            yield from _flat(row)
