"""Configurations are frozen dataclasses; this file turns them into JSON and back, and changes one value by its path.

Nothing is guessed on the way in: an unknown field, a wrong type or a missing value is a `ConfigError` that names the
path and, for a misspelt name, the nearest one that exists.
"""

import dataclasses
import json
from collections.abc import Iterable
from types import UnionType
from typing import Any, TypeVar, Union, dataclass_transform, get_args, get_origin, get_type_hints

from pydantic import ConfigDict, TypeAdapter, ValidationError

from reelflow.errors import ConfigError, nearest

__all__ = ["configuration", "from_dict", "set_values", "to_dict"]

T = TypeVar("T")


@dataclass_transform(frozen_default=True)
def configuration(cls: type[T]) -> type[T]:
    """Make `cls` a frozen dataclass that can be read from JSON without tolerance for unknown fields."""
    cls.__pydantic_config__ = ConfigDict(extra="forbid")  # type: ignore[attr-defined]
    return dataclasses.dataclass(frozen=True)(cls)


def to_dict(config: Any) -> dict[str, Any]:
    """Turn a (nested) configuration into plain JSON values."""
    return _plain(config)


def _plain(value: Any) -> Any:
    return TypeAdapter(type(value)).dump_python(value, mode="json")


def from_dict(cls: type[T], values: Any) -> T:
    """Build `cls` from plain values, checking every field.

    Raises:
        ConfigError: a field is unknown, missing, of the wrong type, or refused by the class itself.
    """
    try:
        return TypeAdapter(cls).validate_json(json.dumps(values), strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        path = ".".join(str(part) for part in first["loc"]) or "value"
        raise ConfigError(f"{cls.__name__}: {path}: {first['msg']} (got {first.get('input')!r})") from error


def set_values(config: T, assignments: Iterable[str]) -> T:
    """Return `config` with each `path=value` applied, as in `dit.optimizer.lr=2e-4`; values are read as JSON, else text.

    Where a value may be of several kinds, `path.kind=other` makes it one of that kind: fields that both have stay as they
    are, and the others get their defaults.

    Raises:
        ConfigError: a path names no field (the nearest is offered), or a value is refused.
    """
    values = to_dict(config)
    for assignment in assignments:
        path, equals, text = assignment.partition("=")
        if not equals:
            raise ConfigError(f"expected path=value, got {assignment!r}; for example seed=1")
        node: Any = values
        names, classes = path.strip().split("."), [type(config)]
        for depth, name in enumerate(names):
            known = _fields(classes, node)
            if name not in known:
                where = ".".join(names[:depth]) or type(config).__name__
                hint = nearest(name, known) if known else f"{where} has no fields"
                raise ConfigError(f"{where} has no field {name!r}; {hint}")
            if depth < len(names) - 1:
                node, classes = node.get(name), known[name]
        try:
            node[names[-1]] = json.loads(text)
        except json.JSONDecodeError:
            node[names[-1]] = text
        if names[-1] == "kind":
            _become(classes, node)
    return from_dict(type(config), values)


def _fields(classes: Iterable[type], node: Any) -> dict[str, list[type]]:
    """Return the fields of a value, which is of one of `classes`, and the configurations that each may hold."""
    found: dict[str, list[type]] = {}
    for cls in _of_kind(classes, node):
        hints = get_type_hints(cls)
        found |= {field.name: _configurations(hints[field.name]) for field in dataclasses.fields(cls)}
    return found


def _become(classes: Iterable[type], node: dict[str, Any]) -> None:
    """Give a value the fields of the kind it now says it is; a kind that is not known, `from_dict` refuses."""
    for cls in _of_kind(classes, node):
        fields = dataclasses.fields(cls)
        kept = {field.name: node[field.name] for field in fields if field.name in node}
        defaults = {f.name: _plain(f.default) for f in fields if f.default is not dataclasses.MISSING}
        node.clear()
        node.update(defaults | kept)


def _of_kind(classes: Iterable[type], node: Any) -> list[type]:
    return [c for c in classes if isinstance(node, dict) and getattr(c, "kind", None) == node.get("kind")]


def _configurations(annotation: Any) -> list[type]:
    """Return the configurations among the types that a union, or one type, allows."""
    if get_origin(annotation) in (Union, UnionType):
        return [cls for part in get_args(annotation) for cls in _configurations(part)]
    return [annotation] if dataclasses.is_dataclass(annotation) and isinstance(annotation, type) else []
