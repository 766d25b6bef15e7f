"""All published systems that a folder can be read as: one of diffusers, or one as its own repository has it."""

from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from reelflow.errors import CheckpointError, nearest
from reelflow.families import (
    cogvideox_system,
    dit_system,
    hunyuan15_system,
    hunyuan_system,
    latte_system,
    ltx_system,
    mochi_system,
    opensora2_system,
    opensora_plan_system,
    sd3_system,
    wan_system,
)
from reelflow.families.autoencoders import empty_vae, load_vae
from reelflow.families.published import find_transformer, load_transformer
from reelflow.families.system import System, SystemFolder

__all__ = ["FOLDERS", "SYSTEMS", "is_system", "load_system", "sketch_system"]

SYSTEMS: Mapping[str, Callable[[SystemFolder], System]] = {
    **cogvideox_system.SYSTEMS,
    **dit_system.SYSTEMS,
    **hunyuan15_system.SYSTEMS,
    **hunyuan_system.SYSTEMS,
    **latte_system.SYSTEMS,
    **ltx_system.SYSTEMS,
    **mochi_system.SYSTEMS,
    **sd3_system.SYSTEMS,
    **wan_system.SYSTEMS,
}
"""By the pipeline's class that a model_index.json names."""

FOLDERS: Mapping[str, Callable[[SystemFolder], System]] = {
    **opensora2_system.FOLDERS,
    **opensora_plan_system.FOLDERS,
}
"""By a file that is there, of repositories without a model_index.json."""


def is_system(folder: str | Path) -> bool:
    """Say whether a folder is of a whole published system."""
    return any((Path(folder) / name).is_file() for name in ("model_index.json", *FOLDERS))


def load_system(folder: str | Path, *, dtype: torch.dtype | None = None, device: torch.device | str = "cpu") -> System:
    """Read a folder of a whole published system (model_index.json and a folder for each part), as diffusers writes it.

    Or one as its own repository has it, known by a file of `FOLDERS`.

    Weights keep the type they are stored in, or are cast to `dtype`.

    Raises:
        CheckpointError: the folder holds no such system, or a part of it cannot be read.
    """
    return _read(SystemFolder(folder, transformer=load_transformer, vae=load_vae, dtype=dtype, device=device))


def sketch_system(folder: str | Path) -> System:
    """Read a folder as `load_system` does, but for the weights: enough to tell what it makes, in an instant.

    Raises:
        CheckpointError: the folder holds no such system, or a part of it is missing.
    """
    return _read(
        SystemFolder(
            folder,
            transformer=lambda part, **_: find_transformer(part).empty(),
            vae=lambda part, **_: empty_vae(part)[0],
        )
    )


def _read(parts: SystemFolder) -> System:
    for file, read in FOLDERS.items():
        if (parts.folder / file).is_file():
            return read(parts)
    name = str(parts.index.get("_class_name"))
    if name not in SYSTEMS:
        raise CheckpointError(
            f"{parts.folder} is of {name!r}, which is no pipeline known here; {nearest(name, list(SYSTEMS))}"
        )
    return SYSTEMS[name](parts)
