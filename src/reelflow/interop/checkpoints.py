"""Folders of published weights into models, models into such folders, and one layout into another.

    transformer/
        config.json                                          as its system's own code writes it
        diffusion_pytorch_model.safetensors                  or, of large models:
        diffusion_pytorch_model-00001-of-00003.safetensors ...
        diffusion_pytorch_model.safetensors.index.json       which tensor lies in which shard

Names and shapes are compared before any tensor is read. Memory for all of ours is laid out first, and filled a row of the
table at a time, so that the peak is the weights and the largest row. `AsOurs` keeps none of them: from it a folder is
written at the peak of one shard. Nothing is ever unpickled.
"""

import json
import os
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_state_dict_into_shards_factory
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from reelflow.errors import CheckpointError, ConfigError
from reelflow.interop.mapping import Entry, Fixed, Row, differences
from reelflow.models.weights import count_names, write_tensors

__all__ = [
    "PICKLES",
    "AsOurs",
    "Progress",
    "Stored",
    "check_empty",
    "check_fits",
    "gradients_as_theirs",
    "read_configuration",
    "read_into",
    "state_as_theirs",
    "write_folder",
]

NAME = "diffusion_pytorch_model"
SHARD = re.compile(r".*-\d+-of-\d+\.safetensors")
PICKLES = (".bin", ".pt", ".pth", ".ckpt")
UNPICKLE = (
    "import torch; from safetensors.torch import save_file; "
    "x = torch.load({source!r}, map_location='cpu', weights_only=True); "
    "save_file({{name: value.clone() for name, value in x.get('module', x.get('ema', x)).items()}}, {target!r})"
)
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}

Progress = Callable[[int, int], None]
"""Told the bytes done and the bytes in all."""


class Stored(Mapping[str, Tensor]):
    """The tensors of a checkpoint, each read anew whenever it is asked for; `meta` has them all on the meta device.

    `source` is a folder, a safetensors file or an index; of several files in a folder, one of `names` is preferred. With a
    prefix, only names of tensors that begin with it belong to the checkpoint, and lose it. `metadata` is that of the files.

    Raises:
        CheckpointError: there are no weights, several to choose from, pickled ones only, or they are damaged.
    """

    def __init__(self, source: Path, *, prefix: str = "", names: Sequence[str] = (NAME,)) -> None:
        self.source = Path(source)
        self._hold(_open(_locate(self.source, names)), prefix)
        self.metadata: dict[str, str] = {}
        for file in {id(file): file for _, file in self._files.values()}.values():
            self.metadata |= file.metadata() or {}

    def _hold(self, files: Mapping[str, tuple[Path, Any]], prefix: str) -> None:
        self.prefix, self._all = prefix, files
        self._files = {name.removeprefix(prefix): held for name, held in files.items() if name.startswith(prefix)}
        self.meta: dict[str, Tensor] = {}
        for name, (path, file) in self._files.items():
            header = file.get_slice(prefix + name)
            if header.get_dtype() not in DTYPES:
                raise CheckpointError(f"{path}: {name} is of type {header.get_dtype()}; known: {', '.join(DTYPES)}")
            self.meta[name] = torch.empty(header.get_shape(), dtype=DTYPES[header.get_dtype()], device="meta")

    @property
    def where(self) -> str:
        """The source, and the prefix if there is one, in words."""
        return f"{self.source} under {self.prefix!r}" if self.prefix else str(self.source)

    def under(self, prefix: str) -> "Stored":
        """Return the tensors whose names in the files begin with a prefix."""
        part = copy(self)
        part._hold(self._all, prefix)
        return part

    def __getitem__(self, name: str) -> Tensor:
        path, file = self._files[name]
        try:
            return file.get_tensor(self.prefix + name)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{path}: {name} could not be read: {error}") from error

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)


class AsOurs(Mapping[str, Tensor]):
    """Our tensors of a stored checkpoint, each made anew whenever it is asked for; `meta` has them on the meta device.

    `change` is given each tensor's name and value, and returns what to take in its place, of the same shape and type.

    Raises:
        CheckpointError: a tensor of theirs that should follow from the configuration does not.
    """

    def __init__(
        self, stored: Stored, rows: Sequence[Row], change: Callable[[str, Tensor], Tensor] = lambda name, x: x
    ) -> None:
        self._stored, self._change = stored, change
        self._rows = {name: row for row in rows for name in row.ours}
        self.meta = {name: x.to("meta") for row in rows for name, x in row.to_ours(stored.meta).items()}
        for row in rows:
            if not row.ours:
                row.to_ours(stored)

    def __getitem__(self, name: str) -> Tensor:
        return self._change(name, self._rows[name].to_ours(self._stored)[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._rows)

    def __len__(self) -> int:
        return len(self._rows)


def read_into(
    model: nn.Module,
    rows: Sequence[Row],
    source: Path | Stored,
    *,
    prefix: str = "",
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
) -> None:
    """Fill `model`, which best comes from the meta device, from a checkpoint: `Stored(source, prefix=prefix)`, or one given.

    Tensors keep the type they are stored in, or are cast to `dtype` one by one. Parameters are new ones; buffers that no
    checkpoint holds are set by the `reset_buffers()` of the module that has them. On an error the model is as it was.

    Raises:
        CheckpointError: the checkpoint is missing or damaged, or is not of this model (what differs is listed).
        ConfigError: a buffer would stay on the meta device.
    """
    stored = source if isinstance(source, Stored) else Stored(source, prefix=prefix)
    check_fits(model, rows, stored.meta, stored.where)
    transient = _transient_buffers(model)
    filled = {
        name: torch.empty(x.shape, dtype=dtype if dtype and x.is_floating_point() else x.dtype, device=device)
        for row in rows
        for name, x in row.to_ours(stored.meta).items()
    }
    for row in rows:
        for name, x in row.to_ours(stored).items():
            filled[name].copy_(x)
    _replace(model, filled)
    for module, name in transient:
        buffer = getattr(module, name)
        setattr(module, name, torch.empty_like(buffer, device=device) if buffer.is_meta else buffer.to(device))
    for module in dict.fromkeys(module for module, _ in transient):
        if callable(reset := getattr(module, "reset_buffers", None)):
            reset()


def check_fits(model: nn.Module, rows: Sequence[Row], found: Mapping[str, Tensor], where: str) -> None:
    """Compare names and shapes with those of a checkpoint.

    Raises:
        CheckpointError: the checkpoint is not of this model (what differs is listed).
    """
    if problems := differences(rows, model, {name: x.shape for name, x in found.items()}):
        raise CheckpointError(
            f"{where} is not a checkpoint of this {type(model).__name__}: {problems}; build the model from "
            f"the configuration stored with the weights"
        )


def state_as_theirs(
    state: nn.Module | Mapping[str, Tensor], rows: Sequence[Row], *, dtype: torch.dtype | None = None
) -> dict[str, Tensor]:
    """Return weights by their names; without `dtype`, what is derived has the type that most of the weights have.

    On the meta device this says the names, shapes and types that a checkpoint has.

    Raises:
        CheckpointError: a tensor that theirs have no place for is not what their configuration says.
    """
    tensors = state.state_dict() if isinstance(state, nn.Module) else state
    theirs: dict[str, Tensor] = {}
    sizes: Counter[torch.dtype] = Counter()
    for row in sorted(rows, key=lambda row: isinstance(row, Fixed)):
        common = sizes.most_common(1)[0][0] if sizes and isinstance(row, Fixed) else None
        for name, x in row.to_theirs(tensors).items():
            theirs[name] = x.detach().to(dtype=(dtype or common) if x.is_floating_point() else None)
            sizes[theirs[name].dtype] += x.numel()
    return theirs


def gradients_as_theirs(model: nn.Module, rows: Sequence[Row]) -> dict[str, Tensor]:
    """Return the gradients of the parameters by their names; zero where a parameter has none.

    Of a tensor that theirs hold several times, each copy has the whole gradient.
    """
    gradients = {
        name: torch.zeros_like(p) if p.grad is None else p.grad
        for name, p in model.named_parameters(remove_duplicate=False)
    }
    theirs: dict[str, Tensor] = {}
    for row in rows:
        if isinstance(row, Entry) and all(name in gradients for name in row.ours):
            theirs |= row.to_theirs(gradients)
    return theirs


def write_folder(
    source: nn.Module | AsOurs,
    rows: Sequence[Row],
    folder: Path,
    *,
    config: Mapping[str, Any] | None,
    dtype: torch.dtype | None = None,
    max_shard_size: int | None = 10_000_000_000,  # bytes; None: one file
    name: str = NAME,
    metadata: Mapping[str, str] | None = None,
    progress: Progress | None = None,
) -> None:
    """Write weights by their names, and a config.json unless it is None; the folder appears when it is whole, or not at all.

    Raises:
        ConfigError: the model is on the meta device and has no weights.
        CheckpointError: the folder exists and is not empty, a file could not be written, or as `state_as_theirs`.
    """
    folder = Path(folder).absolute()
    check_empty(folder)
    state: Mapping[str, Tensor] = source if isinstance(source, AsOurs) else source.state_dict()
    shapes = (
        source.meta if isinstance(source, AsOurs) else {k: torch.empty_like(x, device="meta") for k, x in state.items()}
    )
    if not isinstance(source, AsOurs) and (empty := [name for name, x in state.items() if x.is_meta]):
        raise ConfigError(f"the model has no weights to write, only shapes (as of {empty[0]}); fill it first")
    planned = state_as_theirs(shapes, rows, dtype=dtype)
    planned = {key: torch.empty_like(x, device="meta") for key, x in planned.items()}
    plan = Plan(planned, name, max_shard_size, {"format": "pt", **(metadata or {})})
    partial = folder.with_name(f".{folder.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)  # of a run that was killed
        partial.mkdir(parents=True)
        if config is not None:
            _write_json(partial / "config.json", config)
        _write_weights(partial, state, rows, plan, progress)
        partial.rename(folder)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"could not write {folder}: {error}; free some space or choose another folder") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def check_empty(folder: Path) -> None:
    """Refuse a place where something is.

    Raises:
        CheckpointError: it is there, and is not an empty folder.
    """
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise CheckpointError(f"{folder} exists and is not an empty folder; choose another, or remove it")


@dataclass(frozen=True)
class Plan:
    """The files to be written."""

    tensors: Mapping[str, Tensor]  # on the meta device
    name: str
    max_shard_size: int | None
    metadata: dict[str, str]


def _write_weights(
    folder: Path, state: Mapping[str, Tensor], rows: Sequence[Row], plan: Plan, progress: Progress | None
) -> None:
    total = sum(x.nbytes for x in plan.tensors.values())
    split = split_state_dict_into_shards_factory(
        dict(plan.tensors),
        get_storage_size=lambda x: x.numel() * x.element_size(),
        filename_pattern=f"{plan.name}{{suffix}}.safetensors",
        max_shard_size=plan.max_shard_size or total + 1,
    )
    for row in rows:
        if not row.theirs:
            row.to_theirs(state)
    done = 0
    for file, names in split.filename_to_tensors.items():
        shard: dict[str, Tensor] = {}
        for row in rows:
            if not set(names).isdisjoint(row.theirs):
                for name in (theirs := row.to_theirs(state)).keys() & set(names):
                    shard[name] = theirs[name].to(plan.tensors[name].dtype).contiguous()
                    done += shard[name].nbytes
                if progress is not None:
                    progress(done, total)
        seen: set[int] = set()  # copies of one tensor share memory, which files do not
        for name in names:
            shard[name] = shard[name].clone() if shard[name].data_ptr() in seen else shard[name]
            seen.add(shard[name].data_ptr())
        write_tensors({name: shard[name] for name in names}, folder / file, metadata=plan.metadata)
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        _write_json(folder / f"{plan.name}.safetensors.index.json", index)


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n")


def _unpickle(path: Path) -> str:
    line = UNPICKLE.format(source=str(path), target=str(path.with_suffix(".safetensors")))
    return f'make safetensors of it, if you trust it, with: python -c "{line}"'


def _locate(source: Path, names: Sequence[str]) -> Path:
    """Return the safetensors file or the index that `source` is or holds."""
    if not source.exists():
        raise CheckpointError(f"{source} does not exist")
    if source.is_file():
        if source.suffix in PICKLES:
            raise CheckpointError(f"{source} is pickled and could run anything when read; {_unpickle(source)}")
        return source
    files = sorted(path.name for path in source.iterdir())
    known = [
        f"{name}.{ending}" for name in dict.fromkeys(names) for ending in ("safetensors", "safetensors.index.json")
    ]
    usual = [name for name in known if name in files]
    others = [
        name
        for name in files
        if name.endswith(".safetensors.index.json") or (name.endswith(".safetensors") and not SHARD.fullmatch(name))
    ]
    found = usual or others
    if len(found) == 1:
        return source / found[0]
    if found:
        raise CheckpointError(f"{source} holds {' and '.join(found)}; name the one to read")
    if pickled := [name for name in files if name.endswith(PICKLES)]:
        raise CheckpointError(
            f"{source} holds pickled weights only ({pickled[0]}), which could run anything when read; "
            f"{_unpickle(source / pickled[0])}"
        )
    shards = [name for name in files if SHARD.fullmatch(name)]
    raise CheckpointError(
        f"{source} holds {f'shards ({shards[0]}) but no *.safetensors.index.json' if shards else 'no safetensors file'}"
    )


def _open(path: Path) -> dict[str, tuple[Path, Any]]:
    """Return, for each name in a file or in the shards of an index, the open file that holds it."""
    if path.suffix != ".json":
        file = _open_file(path)
        return dict.fromkeys(file.keys(), (path, file))
    try:
        places: dict[str, str] = json.loads(path.read_text())["weight_map"]
        shards = sorted({os.fspath(shard) for shard in places.values()})
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} is not a whole index of shards: {error}") from error
    lost = [shard for shard in shards if Path(shard).name != shard or not (path.parent / shard).is_file()]
    if lost:
        raise CheckpointError(f"{path} is of shards that are not beside it: {count_names({'missing': lost})}")
    files = {shard: _open_file(path.parent / shard) for shard in shards}
    held = {(name, shard) for shard, file in files.items() for name in file.keys()}  # noqa: SIM118
    problems = count_names(
        {
            "in the index but not in its shard": [name for name, shard in places.items() if (name, shard) not in held],
            "in a shard but not in the index": sorted(name for name, shard in held if places.get(name) != shard),
        }
    )
    if problems:
        raise CheckpointError(f"{path} and its shards do not agree: {problems}")
    return {name: (path.parent / shard, files[shard]) for name, shard in places.items()}


def _open_file(path: Path) -> Any:
    try:
        # Mapped files would count towards memory twice wherever a tensor is changed on its way.
        return safe_open(path, framework="pt", backend="pread")
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} is missing or is not a whole safetensors file: {error}") from error


def _replace(model: nn.Module, filled: Mapping[str, Tensor]) -> None:
    """Put tensors in the places of the model's, wherever these are tied to."""
    was = model.state_dict(keep_vars=True)
    now = {
        id(was[name]): nn.Parameter(x, requires_grad=was[name].requires_grad)
        if isinstance(was[name], nn.Parameter)
        else x
        for name, x in filled.items()
    }
    for module in model.modules():
        for name, old in [*module._parameters.items(), *module._buffers.items()]:
            if id(old) in now:
                setattr(module, name, now[id(old)])


def _transient_buffers(model: nn.Module) -> list[tuple[nn.Module, str]]:
    """Return the buffers that no checkpoint holds.

    Raises:
        ConfigError: one is on the meta device, and its module cannot set it anew.
    """
    found = [
        (f"{path}.{name}".lstrip("."), module, name)
        for path, module in model.named_modules()
        for name in sorted(module._non_persistent_buffers_set)
        if module._buffers[name] is not None
    ]
    stuck = [
        full for full, module, name in found if getattr(module, name).is_meta and not hasattr(module, "reset_buffers")
    ]
    if stuck:
        raise ConfigError(
            f"{count_names({'buffers have shapes but no values': stuck})}: give their modules a reset_buffers() that "
            f"sets them, or build the model on a real device"
        )
    return [(module, name) for _, module, name in found]


def read_configuration(path: Path, hint: str = "give the folder of one network") -> dict[str, Any]:
    """Return what a JSON file says; `hint` is what to do where there is none.

    Raises:
        CheckpointError: it cannot be read or is no JSON object.
    """
    try:
        found = json.loads(path.read_text())
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror}); {hint}") from error
    except ValueError as error:
        raise CheckpointError(f"{path} is not JSON: {error}") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{path} holds no configuration")
    return found
