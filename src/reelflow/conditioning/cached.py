"""Features of prompts kept on disk, so that a large encoder reads each prompt once."""

import hashlib
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable
from uuid import uuid4

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from reelflow.conditioning.text import TextFeatures
from reelflow.models.weights import write_tensors

__all__ = ["Cached", "Identified"]

LOG = logging.getLogger(__name__)


@runtime_checkable
class Identified(Protocol):
    """An encoder that says by `identity` all that its features depend on, and reads each prompt by itself."""

    @property
    def identity(self) -> str: ...

    def __call__(self, prompts: Sequence[str]) -> TextFeatures: ...


class Cached:
    """An encoder whose features are read from `folder` where they are there, and written there where not.

    An entry is a safetensors file named by the SHA-256 of the encoder's identity and of the prompt, written whole or not
    at all, so several processes may share a folder. It holds a digest of itself; one that does not agree is made anew, and
    the log says why. Features are those of the encoder, bit for bit, but on the CPU.
    """

    def __init__(self, encoder: Identified, folder: Path) -> None:
        self.encoder, self.folder = encoder, Path(folder)

    @property
    def identity(self) -> str:
        return self.encoder.identity

    def __call__(self, prompts: Sequence[str]) -> TextFeatures:
        """Encode prompts, those not yet known by the encoder."""
        asked = dict.fromkeys(prompts)
        known = {prompt: row for prompt in asked if (row := self._load(prompt)) is not None}
        missing = [prompt for prompt in asked if prompt not in known]
        if missing:
            made = {name: part for name, part in self.encoder(missing)._asdict().items() if part is not None}
            for number, prompt in enumerate(missing):
                known[prompt] = {name: part[number].cpu().contiguous() for name, part in made.items()}
                self._save(prompt, known[prompt])
        rows = [known[prompt] for prompt in prompts]
        return TextFeatures(
            tokens=torch.stack([row["tokens"] for row in rows]),
            mask=torch.stack([row["mask"] for row in rows]),
            pooled=torch.stack([row["pooled"] for row in rows]) if "pooled" in rows[0] else None,
        )

    def path(self, prompt: str) -> Path:
        """Return where the features of a prompt are, or would be."""
        key = hashlib.sha256(f"{self.identity} {prompt}".encode()).hexdigest()
        return self.folder / key[:2] / f"{key}.safetensors"

    def _load(self, prompt: str) -> dict[str, Tensor] | None:
        path = self.path(prompt)
        try:
            with safe_open(path, framework="pt") as file:
                row = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                stated = (file.metadata() or {}).get("sha256")
        except FileNotFoundError:
            return None
        except (OSError, SafetensorError) as error:
            LOG.warning("%s cannot be read and is made anew: %s", path, error)
            return None
        if stated != _digest(row):
            LOG.warning("%s is made anew: its contents are not those that were written", path)
            return None
        return row

    def _save(self, prompt: str, row: dict[str, Tensor]) -> None:
        path = self.path(prompt)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{uuid4().hex}.partial")
        try:
            write_tensors(row, partial, metadata={"sha256": _digest(row)})
            os.replace(partial, path)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise


def _digest(row: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name, value in sorted(row.items()):
        digest.update(f"{name} {value.dtype} {list(value.shape)}".encode())
        digest.update(value.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
