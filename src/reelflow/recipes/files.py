"""Files that are whole or not there."""

import json
import os
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from reelflow.models.weights import write_tensors

__all__ = ["write_json", "write_text", "write_whole_tensors"]


def write_text(path: Path, text: str) -> None:
    """Write a text in UTF-8."""
    partial = _partial(path)
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


def write_json(path: Path, values: object) -> None:
    """Write `values` as JSON."""
    write_text(path, json.dumps(values, indent=1))


def write_whole_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors as safetensors."""
    partial = _partial(path)
    write_tensors({name: value.detach().contiguous() for name, value in tensors.items()}, partial)
    os.replace(partial, path)


def _partial(path: Path) -> Path:
    return path.with_name(f".{path.name}.partial")
