"""Configurations are frozen dataclasses; this file turns them into JSON and back, and changes one value by its path.

Nothing is guessed on the way in: an unknown field, a wrong type or a missing value is a `ConfigError` that names the
path and, for a misspelt name, the nearest one that exists.
"""

import dataclasses
import json
from collections.abc import Iterable
from typing import Any, TypeVar, dataclass_transform

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
    return TypeAdapter(type(config)).dump_python(config, mode="json")


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

    Raises:
        ConfigError: a path names no field (the nearest is offered), or a value is refused.
    """
    values = to_dict(config)
    for assignment in assignments:
        path, equals, text = assignment.partition("=")
        if not equals:
            raise ConfigError(f"expected path=value, got {assignment!r}; for example seed=1")
        node, names = values, path.strip().split(".")
        for depth, name in enumerate(names):
            if not isinstance(node, dict) or name not in node:
                known = list(node) if isinstance(node, dict) else []
                where = ".".join(names[:depth]) or type(config).__name__
                hint = nearest(name, known) if known else f"{where} has no fields"
                raise ConfigError(f"{where} has no field {name!r}; {hint}")
            if depth < len(names) - 1:
                node = node[name]
        try:
            node[names[-1]] = json.loads(text)
        except json.JSONDecodeError:
            node[names[-1]] = text
    return from_dict(type(config), values)
