"""Weights from safetensors files into models: all of them, or an error that lists what differs."""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from reelflow.errors import CheckpointError

__all__ = ["count_names", "files_sha256", "load_weights", "read_tensors", "write_tensors"]


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file.

    Raises:
        CheckpointError: the file is missing, truncated, or something else.
    """
    try:
        return load_file(path)
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} is missing or is not a whole safetensors file: {error}") from error


def files_sha256(paths: Iterable[Path]) -> str:
    """Return the SHA-256 of files, one after the other.

    Raises:
        CheckpointError: one cannot be read.
    """
    digest = hashlib.sha256()
    for path in paths:
        try:
            with path.open("rb") as file:
                while part := file.read(1 << 24):
                    digest.update(part)
        except OSError as error:
            raise CheckpointError(f"cannot read {path}: {error.strerror}") from error
    return digest.hexdigest()


def write_tensors(tensors: Mapping[str, Tensor], path: Path, *, metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file that others may read as they may any new file here; safetensors itself shuts them out.

    Raises:
        OSError, SafetensorError: it cannot be written.
    """
    path.touch()
    mode = path.stat().st_mode
    save_file(dict(tensors), path, metadata=None if metadata is None else dict(metadata))
    path.chmod(mode)


def load_weights(path: Path, model: nn.Module) -> None:
    """Fill `model` from a safetensors file; every name and shape must agree, dtypes are converted to the model's.

    Raises:
        CheckpointError: the file is missing, damaged, or of another model (the differing names are listed).
    """
    found, expected = read_tensors(path), model.state_dict()
    reshaped = [
        f"{name} is {list(found[name].shape)}, expected {list(expected[name].shape)}"
        for name in expected
        if name in found and found[name].shape != expected[name].shape
    ]
    problems = count_names(
        {
            "missing": [name for name in expected if name not in found],
            "unexpected": [name for name in found if name not in expected],
            "of another shape": reshaped,
        }
    )
    if problems:
        raise CheckpointError(
            f"{path} is a checkpoint of another model: {problems}; build {type(model).__name__} from the "
            f"configuration stored with the weights"
        )
    for name, value in expected.items():
        value.copy_(found[name])


def count_names(lists: Mapping[str, Sequence[str]]) -> str:
    """Phrase lists of names, by what is wrong with them, as counts with the first three of each; "" if all are empty."""
    return "; ".join(
        f"{len(names)} {what} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
        for what, names in lists.items()
        if names
    )
