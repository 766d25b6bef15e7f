"""All published families, and their weights into models and back, in any of three layouts.

diffusers     config.json, and safetensors by its names, perhaps in shards
original      as the family's own repository has them (`families/originals.py`); where the two are one, that one
reelflow      config.json that holds a `DiTConfig`, and safetensors by our names
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from reelflow.config import from_dict, to_dict
from reelflow.errors import CheckpointError, ConfigError, ReelflowError, nearest
from reelflow.families.cogvideox import COGVIDEOX
from reelflow.families.dit import DIT
from reelflow.families.family import Family, Size, written
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
from reelflow.families.originals import Original
from reelflow.families.sd3 import SD3
from reelflow.families.wan import WAN
from reelflow.interop.checkpoints import (
    PICKLES,
    AsOurs,
    Progress,
    Stored,
    check_empty,
    check_fits,
    read_configuration,
    read_into,
    state_as_theirs,
    write_folder,
)
from reelflow.interop.mapping import Row, parameter, table
from reelflow.models.adapters import Adapter, merged_weight
from reelflow.models.dit import DiTConfig, VideoDiT

__all__ = [
    "FAMILIES",
    "Export",
    "Found",
    "Layout",
    "convert_transformer",
    "export_transformer",
    "family_of",
    "find_family",
    "find_size",
    "find_transformer",
    "load_transformer",
    "save_transformer",
    "sizes_of",
]

Layout = Literal["diffusers", "original", "reelflow"]

OURS = "VideoDiT"  # as the class is called in a config.json of ours
PREFIXES = (
    "",
    "model.diffusion_model.",
    "diffusion_model.",
    "model.model.",
    "model.",
    "net.",
)  # that files are known to have
WEIGHTS = "diffusion_pytorch_model"

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
    name = _class(config)
    if name not in known:
        raise CheckpointError(
            f"{source} is of {name!r}, which is no transformer known here; {nearest(str(name), known)}"
        )
    return known[name]


def find_family(config: DiTConfig) -> Family | None:
    """Return the family that a network is of, or None."""
    return next((each for each in FAMILIES if written(each, config) is not None), None)


def sizes_of(config: DiTConfig) -> list[str]:
    """Return the names of the published networks of a configuration."""
    return [
        f"{family.name}.{name}" for family in FAMILIES for name, size in family.sizes.items() if size.config == config
    ]


@dataclass(frozen=True)
class Found:
    """A network on disk, recognised and not yet read."""

    stored: Stored = field(repr=False)
    layout: Layout
    config: DiTConfig
    rows: tuple[Row, ...] = field(repr=False)
    family: Family | None = None  # if it is kept in a published layout

    def empty(self) -> VideoDiT:
        """Return the network on the meta device, which is what the weights are for.

        Raises:
            CheckpointError: the weights are not those of the configuration.
        """
        with torch.device("meta"):
            model = VideoDiT(self.config)
        check_fits(model, self.rows, self.stored.meta, self.stored.where)
        return model


def find_transformer(source: str | Path, *, size: str | None = None) -> Found:
    """Return what a folder or a safetensors file holds; `size`, such as wan.t2v_14b, says it where weights do not.

    Raises:
        CheckpointError: it is no transformer known here, or one that weights do not tell from another.
        ConfigError: no published network is called `size`.
    """
    source, told = Path(source), find_size(size) if size else None
    for root in (source, source / "model"):  # as training leaves a network, beside its autoencoder
        if (root / "model.json").is_file():
            return _ours(read_configuration(root / "model.json").get("dit"), Stored(root / "dit.safetensors"))
    said = read_configuration(source / "config.json") if (source / "config.json").exists() else {}
    name = _class(said)
    if name == OURS:
        return _ours({key: value for key, value in said.items() if not key.startswith("_")}, Stored(source))
    if name and not any(family.original and name == family.original.class_name for family in FAMILIES):
        family = family_of(said, source / "config.json")
        _agree(source, family, told, size)
        return _as_family(family, told[1].config if told else family.read(said), Stored(source))
    if not said and source.is_dir() and not any(path.suffix in (".safetensors", *PICKLES) for path in source.iterdir()):
        inside = sorted(path.parent.name for path in source.glob("*/config.json"))
        raise CheckpointError(
            f"{source} holds neither config.json nor safetensors; give the folder of one network"
            + (f", such as {source / ('transformer' if 'transformer' in inside else inside[0])}" if inside else "")
        )
    stored = Stored(source, names=(WEIGHTS, *(family.original.file for family in FAMILIES if family.original)))
    recognised = _recognise(stored)
    if recognised is None and told is not None:
        return _as_family(told[0], told[1].config, stored)
    if recognised is None:
        some = ", ".join(list(stored)[:3])
        raise CheckpointError(
            f"{stored.where} holds {len(stored)} tensors ({some}, ...), which is no layout known here; a file of diffusers "
            f"needs the config.json of its folder (give the folder), or the name of a published size"
        )
    family, original, stored = recognised
    _agree(source, family, told, size)
    config = told[1].config if told else _read_original(family, original, stored, said or _kept(stored))
    return Found(stored, "original", config, original.weights(config), family)


def load_transformer(
    source: str | Path,
    *,
    size: str | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
) -> VideoDiT:
    """Return the transformer in a folder or a safetensors file, in any layout; see `find_transformer`.

    Weights keep the type they are stored in, or are cast to `dtype`; at no time is there more than one copy of them.

    Raises:
        CheckpointError: there is no such transformer, or the weights are not those of its configuration.
        ConfigError: no published network is called `size`.
    """
    found = find_transformer(source, size=size)
    model = found.empty()
    read_into(model, found.rows, found.stored, dtype=dtype, device=device)
    return model.eval()


@dataclass(frozen=True)
class Export:
    """How a network is written."""

    rows: tuple[Row, ...] = field(repr=False)
    config: Mapping[str, Any] | None  # the config.json
    file: str = WEIGHTS  # without the suffix
    metadata: Mapping[str, str] = field(default_factory=dict)
    max_shard_size: int | None = 10_000_000_000  # bytes; None: one file

    def bytes_of(self, shapes: Mapping[str, Tensor], dtype: torch.dtype | None) -> int:
        """Return how many bytes of weights there will be."""
        return sum(x.nbytes for x in state_as_theirs(shapes, self.rows, dtype=dtype).values())


def export_transformer(config: DiTConfig, layout: Layout, family: Family | None = None) -> Export:
    """Return how a network is written in a layout; its family is found, unless it is said.

    Raises:
        ConfigError: the network is of no family, or not of this one, or the layout does not have it.
    """
    if layout == "reelflow":
        return Export(_own_rows(config), {"_class_name": OURS, **to_dict(config)})
    family = family or find_family(config)
    if family is None:
        raise ConfigError("the network is of no published family; its layout is reelflow")
    if (said := written(family, config)) is None:
        raise ConfigError(f"the network is none of {family.name}; {family.name} has {', '.join(family.sizes)}")
    if layout == "diffusers" and family.native:
        raise ConfigError(f"diffusers has no class for {family.name}; its layouts are original and reelflow")
    said = {"_class_name": family.class_name, **said}
    if layout == "diffusers" or family.original is None:
        return Export(family.weights(config), said)
    original = family.original
    rows = table(original.weights(config), theirs=original.prefix)
    if original.write:
        said = {"_class_name": original.class_name, **original.write(config)}
    if original.beside:
        return Export(rows, said, original.file)
    kept = {"config": json.dumps({"transformer": said})}
    return Export(rows, None, original.file, kept, max_shard_size=None)


def save_transformer(
    model: VideoDiT,
    folder: str | Path,
    family: Family | None = None,
    *,
    layout: Layout = "diffusers",
    dtype: torch.dtype | None = None,
) -> None:
    """Write a transformer in a layout; its family is found, unless it is said.

    Raises:
        CheckpointError: the folder is not empty, or the disk is full.
        ConfigError: as `export_transformer`.
    """
    _write(model, export_transformer(model.config, layout, family), Path(folder), dtype, None)


def convert_transformer(
    found: Found,
    export: Export,
    folder: str | Path,
    *,
    dtype: torch.dtype | None = None,
    adapters: Sequence[tuple[Adapter, float]] = (),
    progress: Progress | None = None,
) -> None:
    """Write what was found in another layout, a file at a time: memory holds one, and never the network.

    Adapters, each in a strength, are added to the weights.

    Raises:
        CheckpointError: the folder is not empty, the disk is full, or the weights are not those of the configuration.
        ConfigError: an adapter is of another network.
    """
    check_empty(Path(folder))
    model = found.empty()
    for adapter, _ in adapters:
        adapter.check(model)

    changed = {f"{name}.weight": name for adapter, _ in adapters for name in adapter.updates}

    def merged(name: str, x: Tensor) -> Tensor:
        return merged_weight(changed[name], x, adapters) if name in changed else x

    _write(AsOurs(found.stored, found.rows, merged), export, Path(folder), dtype, progress)


def _write(
    source: VideoDiT | AsOurs, export: Export, folder: Path, dtype: torch.dtype | None, progress: Progress | None
) -> None:
    write_folder(
        source,
        export.rows,
        folder,
        config=export.config,
        dtype=dtype,
        max_shard_size=export.max_shard_size,
        name=export.file,
        metadata=export.metadata,
        progress=progress,
    )


def _agree(source: Path, family: Family, told: tuple[Family, Size] | None, size: str | None) -> None:
    if told is not None and told[0] is not family:
        raise CheckpointError(
            f"{source} is of {family.name}, not {size}; leave the size out, or say one of {family.name}"
        )


def _as_family(family: Family, config: DiTConfig, stored: Stored) -> Found:
    return Found(stored, "original" if family.native else "diffusers", config, family.weights(config), family)


def _ours(values: Any, stored: Stored) -> Found:
    try:
        config = from_dict(DiTConfig, values)
    except ConfigError as error:
        raise CheckpointError(f"{stored.where} is of no network that this version reads: {error}") from error
    return Found(stored, "reelflow", config, _own_rows(config))


def _own_rows(config: DiTConfig) -> tuple[Row, ...]:
    with torch.device("meta"):
        model = VideoDiT(config)
    return tuple(parameter(name, name) for name in model.state_dict())


def _recognise(stored: Stored) -> tuple[Family, Original, Stored] | None:
    for prefix in PREFIXES:
        for family in FAMILIES:
            if family.original and all(prefix + name in stored.meta for name in family.original.telling):
                return family, family.original, stored.under(prefix)
    return None


def _read_original(family: Family, original: Original, stored: Stored, said: dict[str, Any]) -> DiTConfig:
    name = _class(said)
    if name in (family.class_name, *family.former_names):  # as we write it where the repository keeps nothing
        return family.read(said)
    try:
        shapes = {name: tuple(x.shape) for name, x in stored.meta.items()}
        return family.read(original.read(shapes, said if name in (None, original.class_name) else {}))
    except KeyError as error:
        raise CheckpointError(f"{stored.where} lacks {error}, which networks of {family.name} have") from error
    except (ReelflowError, ValueError) as error:
        sizes = ", ".join(f"{family.name}.{size}" for size in family.sizes)
        raise CheckpointError(f"{stored.where}: {error}; if it is a published one, say which: {sizes}") from error


def _class(said: Mapping[str, Any]) -> str | None:
    return said.get("_class_name") or (said.get("architectures") or [None])[0]


def _kept(stored: Stored) -> dict[str, Any]:
    """Return the configuration in a file's metadata, or {}."""
    try:
        found = json.loads(stored.metadata["config"])["transformer"]
    except (KeyError, TypeError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
