"""Steps that must not be taken: what they look like, and what is kept of the one that ended a run.

    run/stopped-00000314/
        weights.safetensors     as they were
        batch-627.safetensors   one batch of the step, by its number in the run
        stopped.json            the step, why, and what the draws were seeded with

`replay` computes the loss of such a batch again, to the last bit.
"""

import dataclasses
import importlib
import json
import math
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from reelflow.config import configuration
from reelflow.errors import CheckpointError, ConfigError
from reelflow.models.weights import load_weights

__all__ = ["Guard", "Watch", "read_batch", "replay", "seed_draws", "write_batch"]


@configuration
class Guard:
    """Which steps are left out: those whose loss or gradient norm is not finite, and spikes.

    Raises:
        ConfigError: `spike` is not above 1, or a count is below 1.
    """

    spike: float | None = (
        100.0  # this many running medians of the loss or the gradient norm are a spike; None: nothing is
    )
    window: int = 100  # steps that a median is over; until so many were taken, nothing is a spike
    patience: int = 10  # steps left out in a row that end the run

    def __post_init__(self) -> None:
        if self.spike is not None and not 1 < self.spike < math.inf:
            raise ConfigError(f"a spike is more than 1 running median, got {self.spike}; nearest: 2, or null for none")
        if self.window < 1 or self.patience < 1:
            raise ConfigError(f"window and patience must be at least 1, got {self.window} and {self.patience}")


class Watch:
    """The losses and gradient norms of the last steps taken, and how many were not."""

    def __init__(self, guard: Guard) -> None:
        self.guard = guard
        self.skipped = self.in_a_row = 0
        self._last: dict[str, deque[float]] = {name: deque(maxlen=guard.window) for name in ("loss", "gradient norm")}

    def refuses(self, loss: float, norm: float) -> str:
        """Say why a step must not be taken, or "" where it may; either way it is counted."""
        values = dict(zip(self._last, (loss, norm), strict=True))
        why = self._why(values)
        if why:
            self.skipped += 1
            self.in_a_row += 1
        else:
            self.in_a_row = 0
            for name, value in values.items():
                self._last[name].append(value)
        return why

    def _why(self, values: dict[str, float]) -> str:
        for name, value in values.items():
            if not math.isfinite(value):
                return f"the {name} is {value}"
            last = self._last[name]
            if self.guard.spike is None or len(last) < self.guard.window:
                continue
            usual = median(last)
            if 0 < self.guard.spike * usual < value:  # a loss that may be negative has no scale of its own
                return f"the {name} is {value:.3g}, {value / usual:.3g} times the median of the last {len(last)} steps"
        return ""

    @property
    def last_chance(self) -> bool:
        """Whether the run ends if the next step is refused too."""
        return self.in_a_row == self.guard.patience - 1

    def state_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        last = {name: list(values) for name, values in self._last.items()}
        return {"skipped": self.skipped, "in_a_row": self.in_a_row, "last": last}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict()`."""
        self.skipped, self.in_a_row = state["skipped"], state["in_a_row"]
        for name, values in self._last.items():
            values.extend(state["last"][name])


def seed_draws(generator: torch.Generator, seed: int, number: int) -> None:
    """Seed `generator`, and torch's own for draws that take none (dropout), for batch `number` of a run.

    So what is drawn for a batch depends on nothing but its number: not on how many processes share a step, nor on
    where a run was interrupted.
    """
    own, shared = np.random.SeedSequence([seed, number]).generate_state(2, np.uint64).tolist()
    generator.manual_seed(own)
    torch.manual_seed(shared)


# Batches as files.


def write_batch(path: Path, batch: Any) -> None:
    """Write a batch: tensors, plain values, and lists, tuples, dicts, named tuples and dataclasses of such.

    Raises:
        OSError, SafetensorError: it cannot be written.
        CheckpointError: something else is in it.
    """
    tensors: dict[str, Tensor] = {}
    structure = json.dumps(_taken_apart(batch, tensors))
    save_file(tensors, path, metadata={"structure": structure})


def read_batch(path: Path, *, kinds: Sequence[type] = ()) -> Any:
    """Read what `write_batch` wrote. Of classes only reelflow's dataclasses and named tuples, and `kinds`, are made.

    Raises:
        CheckpointError: the file is damaged, or holds another class.
    """
    try:
        with safe_open(path, framework="pt") as file:
            structure = json.loads(file.metadata()["structure"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        return _put_together(structure, tensors, {_name_of(kind): kind for kind in kinds})
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, ImportError) as error:
        raise CheckpointError(f"{path} is not a batch that a run left: {error!r}") from error


def replay(task: Any, folder: Path, number: int | None = None, *, kinds: Sequence[type] = ()) -> Any:
    """Return the loss of a batch that a stopped run left in `folder`, with the weights and draws it had there.

    `number` is that of the batch, by default the first of the step.

    Raises:
        CheckpointError: the folder is of another model or is damaged.
    """
    try:
        stopped = json.loads((folder / "stopped.json").read_text())
        number = min(stopped["batches"]) if number is None else number
        seed, precision = stopped["seed"], stopped["precision"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{folder} is not what a stopped run left: {error}") from error
    load_weights(folder / "weights.safetensors", task.model)
    batch = read_batch(folder / f"batch-{number}.safetensors", kinds=kinds)
    device, generator = next(task.model.parameters()).device, torch.Generator()
    seed_draws(generator, seed, number)
    task.model.train()
    with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
        return task.loss(batch, generator)


def _taken_apart(value: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, Tensor):
        name = str(len(tensors))
        tensors[name] = value.detach().cpu().contiguous().clone()
        return {"tensor": name}
    if value is None or isinstance(value, (bool, int, float, str)):
        return {"value": value}
    if isinstance(value, dict):
        return {"dict": [[key, _taken_apart(item, tensors)] for key, item in value.items()]}
    if dataclasses.is_dataclass(value):
        items = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    elif isinstance(value, tuple) and hasattr(value, "_asdict"):
        items = value._asdict()
    elif isinstance(value, (list, tuple)):
        return {type(value).__name__: [_taken_apart(item, tensors) for item in value]}
    else:
        raise CheckpointError(f"a batch holds a {type(value).__name__}, which cannot be written")
    fields = {name: _taken_apart(item, tensors) for name, item in items.items()}
    return {"class": _name_of(type(value)), "fields": fields}


def _put_together(structure: Any, tensors: dict[str, Tensor], known: dict[str, type]) -> Any:
    match structure:
        case {"tensor": name}:
            return tensors[name]
        case {"value": value}:
            return value
        case {"dict": items}:
            return {key: _put_together(item, tensors, known) for key, item in items}
        case {"list": items}:
            return [_put_together(item, tensors, known) for item in items]
        case {"tuple": items}:
            return tuple(_put_together(item, tensors, known) for item in items)
        case {"class": name, "fields": fields}:
            kind = known.get(name) or _own_class(name)
            return kind(**{key: _put_together(item, tensors, known) for key, item in fields.items()})
    raise CheckpointError(f"a batch cannot be made of {str(structure)[:60]}")


def _name_of(kind: type) -> str:
    return f"{kind.__module__}:{kind.__qualname__}"


def _own_class(name: str) -> type:
    module, _, path = name.partition(":")
    if module.startswith("reelflow.") and path.isidentifier():
        found = getattr(importlib.import_module(module), path, None)
        if isinstance(found, type) and (dataclasses.is_dataclass(found) or hasattr(found, "_fields")):
            return found
    raise CheckpointError(f"a batch is of class {name}, which is not known here; pass it in kinds")
