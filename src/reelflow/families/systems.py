"""All published systems that a folder of diffusers can be read as."""

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
    sd3_system,
    wan_system,
)
from reelflow.families.autoencoders import empty_vae, load_vae
from reelflow.families.published import find_transformer, load_transformer
from reelflow.families.system import System, SystemFolder

__all__ = ["SYSTEMS", "load_system", "sketch_system"]

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


def load_system(folder: str | Path, *, dtype: torch.dtype | None = None, device: torch.device | str = "cpu") -> System:
    """Read a folder of a whole published system (model_index.json and a folder for each part), as diffusers writes it.

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
    name = str(parts.index.get("_class_name"))
    if name not in SYSTEMS:
        raise CheckpointError(
            f"{parts.folder} is of {name!r}, which is no pipeline known here; {nearest(name, list(SYSTEMS))}"
        )
    return SYSTEMS[name](parts)
