"""All published families, and folders of their weights into models and back."""

import json
from pathlib import Path
from typing import Any

import torch

from reelflow.errors import CheckpointError, ConfigError, ReelflowError, nearest
from reelflow.families.cogvideox import COGVIDEOX
from reelflow.families.dit import DIT
from reelflow.families.family import Family, Size
from reelflow.families.hunyuan import HUNYUAN
from reelflow.families.hunyuan15 import HUNYUAN15
from reelflow.families.latte import LATTE
from reelflow.families.latte_class import LATTE_CLASS
from reelflow.families.ltx import LTX
from reelflow.families.mochi import MOCHI
from reelflow.families.moviegen import MOVIEGEN
from reelflow.families.opensora import OPENSORA
from reelflow.families.opensora2 import OPENSORA2
from reelflow.families.opensora_plan import OPENSORA_PLAN, OPENSORA_PLAN_GIVEN
from reelflow.families.sd3 import SD3
from reelflow.families.wan import WAN
from reelflow.interop.checkpoints import read_into, write_folder
from reelflow.models.dit import VideoDiT

__all__ = ["FAMILIES", "family_of", "find_size", "load_transformer", "save_transformer"]

FAMILIES: tuple[Family, ...] = (
    *(HUNYUAN, HUNYUAN15, WAN, MOCHI, COGVIDEOX, LTX, LATTE, LATTE_CLASS, OPENSORA, OPENSORA2),
    *(OPENSORA_PLAN, OPENSORA_PLAN_GIVEN, MOVIEGEN, SD3, DIT),
)


def find_size(name: str) -> tuple[Family, Size]:
    """Return the family and the size of a name such as wan.t2v_14b.

    Raises:
        ConfigError: there is none of that name; the nearest is offered.
    """
    known = {f"{family.name}.{size}": (family, family.sizes[size]) for family in FAMILIES for size in family.sizes}
    if name not in known:
        raise ConfigError(f"no published network is called {name!r}; {nearest(name, known)}")
    return known[name]


def family_of(config: dict[str, Any], source: Path) -> Family:
    """Return the family that a config.json is of, by the class it names.

    Raises:
        CheckpointError: it names none, or one that is not known here.
    """
    known = {name: family for family in FAMILIES for name in (family.class_name, *family.former_names) if name}
    name = config.get("_class_name") or (config.get("architectures") or [None])[0]
    if name not in known:
        raise CheckpointError(
            f"{source} is of {name!r}, which is no transformer known here; {nearest(str(name), known)}"
        )
    return known[name]


def load_transformer(
    folder: str | Path, *, dtype: torch.dtype | None = None, device: torch.device | str = "cpu"
) -> VideoDiT:
    """Return the transformer in a folder of published weights (config.json and safetensors), as diffusers writes them.

    Weights keep the type they are stored in, or are cast to `dtype`; at no time is there more than one copy of them.

    Raises:
        CheckpointError: the folder holds no such transformer, or the weights are not those of its configuration.
    """
    folder = Path(folder)
    found = _config(folder)
    family = family_of(found, folder / "config.json")
    config = family.read(found)
    with torch.device("meta"):
        model = VideoDiT(config)
    read_into(model, family.weights(config), folder, dtype=dtype, device=device)
    return model.eval()


def save_transformer(model: VideoDiT, folder: str | Path, family: Family, *, dtype: torch.dtype | None = None) -> None:
    """Write a transformer of a family as diffusers would: config.json and safetensors, which it reads again.

    Raises:
        CheckpointError: the folder is not empty, or the disk is full.
        ConfigError: the network is not of this family.
    """
    try:  # what a family writes of its own networks; of others it may not find what it looks for
        config = family.write(model.config)
        own = family.read(config) == model.config
    except (AssertionError, AttributeError, LookupError, ReelflowError, TypeError, ValueError):
        own = False
    if not own:
        raise ConfigError(f"the network is none of {family.name}; {family.name} has {', '.join(family.sizes)}")
    write_folder(
        model,
        family.weights(model.config),
        Path(folder),
        config={"_class_name": family.class_name, **config},
        dtype=dtype,
    )


def _config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    try:
        found = json.loads(path.read_text())
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror}); give the folder of one network") from error
    except ValueError as error:
        raise CheckpointError(f"{path} is not JSON: {error}") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{path} holds no configuration")
    return found
