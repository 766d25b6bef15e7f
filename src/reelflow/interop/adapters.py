"""Adapters in the formats of others, through the tables of weights that relate their networks to ours.

    PEFT's folder          adapter_config.json, adapter_model.safetensors    base_model.model.MODULE.lora_A.weight
    a pipeline's file      pytorch_lora_weights.safetensors                  transformer.MODULE.lora_A.weight
    trainers' files        any name; modules of the original layout          diffusion_model.MODULE.lora_down.weight, .alpha
                           and with _ for every dot                          lora_unet_MODULE.lora_down.weight, .alpha

A MODULE is a map of theirs; what we hold in one may be several there, and the reverse. A table's changes permute rows and
columns, and so the factors too. Whatever is not understood is refused by name: nothing is skipped.
"""

import json
import math
import re
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from reelflow.errors import CheckpointError, nearest
from reelflow.interop.checkpoints import Stored, check_empty
from reelflow.interop.mapping import Change, Entry, Row
from reelflow.models.adapters import Adapter, Update, linear_maps
from reelflow.models.weights import count_names, write_tensors

__all__ = ["AdapterFile", "Factors", "Format", "adapter_as_ours", "adapter_as_theirs", "read_adapter", "write_adapter"]

Format = Literal["peft", "diffusers"]

PEFT, PIPELINE = "adapter_model", "pytorch_lora_weights"
CONFIG, PACKED, TIMES = "adapter_config.json", "lora_adapter_metadata", "reelflow.times"
SECOND = "transformer_2"  # what pipelines call the second of two networks
PREFIX = re.compile(
    r"(?:base_model\.model\.)?"
    rf"(?:(?P<network>{SECOND}|transformer)\.|model\.diffusion_model\.|diffusion_model\.|lora_unet_|lora_transformer_)?"
)
ENDING = re.compile(
    r"\.(?:(?P<down>lora_A|lora_down|lora\.down)(?:\.default)?\.weight|(?P<up>lora_B|lora_up|lora\.up)(?:\.default)?\.weight"
    r"|(?P<magnitude>lora_magnitude_vector(?:\.default)?(?:\.weight)?|dora_scale)|(?P<alpha>alpha))$"
)
UNREAD = ("modules_to_save", "fan_in_fan_out", "layer_replication", "use_qalora", "lora_bias")  # settings of PEFT's


@dataclass(frozen=True, eq=False)
class Factors:
    """The change of one module of theirs, a linear map or a convolution."""

    down: Tensor  # rank, ...
    up: Tensor  # rows, rank, ...
    scale: float
    magnitude: Tensor | None = None  # rows


@dataclass(frozen=True, eq=False)
class AdapterFile:
    """What a file of adapters holds: factors by module, for one network, or for the first and the second of two."""

    where: str
    networks: Mapping[str, Mapping[str, Factors]] = field(repr=False)  # by "", or by the network's name
    times: tuple[float, float] | None = None  # that it was trained for, where the file says it; 0 is noise


def read_adapter(source: str | Path) -> AdapterFile:
    """Read a folder or a safetensors file of adapters.

    Raises:
        CheckpointError: there is none, it is damaged or pickled, or something in it is not understood.
    """
    stored = Stored(Path(source), names=(PEFT, PIPELINE))
    config = _config(Path(source), stored)
    parts: dict[str, dict[str, dict[str, Tensor]]] = {}
    strange = []
    for key in stored:
        if (ending := ENDING.search(key)) is None:
            strange.append(key)
            continue
        prefix = PREFIX.match(key)
        assert prefix is not None
        module = key[prefix.end() : ending.start()]
        network = SECOND if prefix["network"] == SECOND else ""
        assert ending.lastgroup is not None
        parts.setdefault(network, {}).setdefault(module, {})[ending.lastgroup] = stored[key]
    halves = [
        name for network in parts.values() for name, found in network.items() if not found.keys() >= {"down", "up"}
    ]
    if problems := count_names({"not understood": strange, "without one of its two factors": halves}):
        raise CheckpointError(f"{stored.where} is no adapter that can be read whole: {problems}")
    if not parts:
        raise CheckpointError(f"{stored.where} holds no adapter")
    networks = {
        network: {
            module: _factors(module, found, _packed(config, network), stored) for module, found in modules.items()
        }
        for network, modules in parts.items()
    }
    if SECOND in networks and "" in networks:
        networks["transformer"] = networks.pop("")
    return AdapterFile(stored.where, networks, _times(stored))


def adapter_as_ours(
    factors: Mapping[str, Factors], tables: Sequence[Sequence[Row]], model: nn.Module, where: str
) -> Adapter:
    """Return factors of theirs as an adapter of our network (shapes are enough); their names are those of one of `tables`.

    Raises:
        CheckpointError: modules are of no table (they are listed, with the nearest), or of other shapes.
    """
    layouts = [_Layout(table, model) for table in tables]
    spelled = [(layout, sep) for layout in layouts for sep in (".", "_")]
    layout, sep = min(spelled, key=lambda pair: sum(name not in pair[0].named(pair[1]) for name in factors))
    known = layout.named(sep)
    if strange := [name for name in factors if name not in known]:
        raise CheckpointError(
            f"{where}: {len(strange)} of {len(factors)} modules are no linear maps of this network: "
            f"{', '.join(strange[:3])}{', ...' if len(strange) > 3 else ''}; {nearest(strange[0], known)}"
        )
    updates: dict[str, list[Update]] = {}
    for name, found in factors.items():
        for ours, update in layout.to_ours(known[name], found, where):
            updates.setdefault(ours, []).append(update)
    return Adapter({name: tuple(found) for name, found in updates.items()})


def adapter_as_theirs(adapter: Adapter, table: Sequence[Row], model: nn.Module) -> dict[str, Factors]:
    """Return an adapter of our network (shapes are enough) as factors of their modules.

    Where one of theirs holds several of ours with factors of their own, its rank is the sum of theirs.

    Raises:
        CheckpointError: theirs has no place for a change.
        ConfigError: the adapter is of another network.
    """
    adapter.check(model)
    layout = _Layout(table, model)
    left = set(adapter.updates) - {name for piece in layout.pieces for name in (piece.ours,)}
    if left:
        raise CheckpointError(f"the layout has no linear maps for {', '.join(sorted(left)[:3])}")
    found = {module: layout.to_theirs(module, adapter) for module in layout.modules}
    return {module: factors for module, factors in found.items() if factors is not None}


def write_adapter(
    factors: Mapping[str, Factors],
    target: str | Path,
    *,
    layout: Format,
    network: str = "transformer",
    times: tuple[float, float] | None = None,
) -> None:
    """Write factors to a new folder: PEFT's two files, or the one file of a pipeline, whose keys begin with `network`.

    `times` are those that it was trained for, 0 being noise; of two networks it is one's that works then.

    Raises:
        CheckpointError: the folder is not empty, the disk is full, or only some modules have magnitudes.
    """
    folder = Path(target).absolute()
    check_empty(folder)
    if len({each.magnitude is None for each in factors.values()}) != 1:
        raise CheckpointError("either all modules of an adapter have magnitudes, or none; and there is one at least")
    prefix = "base_model.model." if layout == "peft" else f"{network}."
    tensors: dict[str, Tensor] = {}
    for name, each in factors.items():
        parts = {"lora_A.weight": each.down, "lora_B.weight": each.up, "lora_magnitude_vector": each.magnitude}
        tensors |= {f"{prefix}{name}.{part}": x.detach().cpu() for part, x in parts.items() if x is not None}
    tensors = {name: x.contiguous().clone() for name, x in tensors.items()}
    settings = _settings(factors)
    metadata = {"format": "pt"} | ({} if times is None else {TIMES: json.dumps(times)})
    if layout == "diffusers":
        metadata[PACKED] = json.dumps({f"{prefix}{name}": value for name, value in settings.items()}, sort_keys=True)
    partial = folder.with_name(f".{folder.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)  # of a run that was killed
        partial.mkdir(parents=True)
        write_tensors(tensors, partial / f"{PEFT if layout == 'peft' else PIPELINE}.safetensors", metadata=metadata)
        if layout == "peft":
            (partial / CONFIG).write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n")
        partial.rename(folder)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"could not write {folder}: {error}; free some space or choose another folder") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


# What a file says beside its tensors.


def _config(source: Path, stored: Stored) -> dict[str, Any]:
    """Return PEFT's settings, which stand beside the file or in it, or {}."""
    path = (source if source.is_dir() else source.parent) / CONFIG
    beside = path.is_file() and (source.is_dir() or source.stem == PEFT)
    try:
        found = json.loads(path.read_text() if beside else stored.metadata.get(PACKED, "{}"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"the settings of {stored.where} cannot be read: {error}") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"the settings of {stored.where} are no JSON object")
    return found


def _packed(config: Mapping[str, Any], network: str) -> Mapping[str, Any]:
    """Return the settings of a network; a pipeline's file keeps them under its name."""
    prefix = f"{network or 'transformer'}."
    return {name.removeprefix(prefix): value for name, value in config.items() if name.startswith(prefix)} or config


def _times(stored: Stored) -> tuple[float, float] | None:
    if TIMES not in stored.metadata:
        return None
    try:
        low, high = map(float, json.loads(stored.metadata[TIMES]))
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{stored.where}: {TIMES} is not a pair of times: {error}") from error
    return low, high


def _factors(module: str, found: Mapping[str, Tensor], config: Mapping[str, Any], stored: Stored) -> Factors:
    down, up, magnitude = found["down"], found["up"], found.get("magnitude")
    if down.ndim < 2 or up.ndim != down.ndim or up.shape[1] != down.shape[0] or math.prod(up.shape[2:]) != 1:
        raise CheckpointError(
            f"{stored.where}: factors of {module} are shaped {list(down.shape)} and {list(up.shape)}, which have no product"
        )
    if magnitude is not None and magnitude.numel() != up.shape[0]:
        raise CheckpointError(f"{stored.where}: {module} has {magnitude.numel()} magnitudes for {up.shape[0]} rows")
    scale = _scale(module, down.shape[0], found.get("alpha"), config, stored)
    return Factors(down, up, scale, None if magnitude is None else magnitude.flatten())


def _scale(module: str, rank: int, alpha: Tensor | None, config: Mapping[str, Any], stored: Stored) -> float:
    """Return what the product of the factors is multiplied by; 1 where nothing is said."""
    if alpha is not None:
        return float(alpha) / rank
    if not config:
        return 1.0
    if config.get("peft_type", "LORA") != "LORA" or any(config.get(name) for name in UNREAD):
        said = {name: config[name] for name in ("peft_type", *UNREAD) if config.get(name)}
        raise CheckpointError(
            f"{stored.where} is an adapter of a kind that is not read: {said}; LORA is, without these"
        )
    try:
        said_rank = _matching(config.get("rank_pattern"), module, config["r"])
        numerator = float(_matching(config.get("alpha_pattern"), module, config["lora_alpha"]))
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{stored.where}: its settings lack a readable {error}") from error
    if said_rank != rank:
        raise CheckpointError(f"{stored.where}: {module} has rank {rank}, but the settings say {said_rank}")
    return numerator / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _matching(patterns: Mapping[str, Any] | None, module: str, otherwise: Any) -> Any:
    """Return the value of the first pattern that a module's name ends with."""
    return next((x for key, x in (patterns or {}).items() if re.match(rf"(.*\.)?({key})$", module)), otherwise)


def _settings(factors: Mapping[str, Factors]) -> dict[str, Any]:
    ranks = {name: each.down.shape[0] for name, each in factors.items()}
    alphas = {name: each.scale * ranks[name] for name, each in factors.items()}
    rank, alpha = (Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))
    return {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": None,
        "inference_mode": True,
        "bias": "none",
        "lora_dropout": 0.0,
        "fan_in_fan_out": False,
        "modules_to_save": None,
        "target_modules": sorted(factors),
        "r": rank,
        "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
        "rank_pattern": {re.escape(name): each for name, each in ranks.items() if each != rank},
        "alpha_pattern": {re.escape(name): each for name, each in alphas.items() if each != alpha},
        "use_dora": any(each.magnitude is not None for each in factors.values()),
        "use_rslora": False,
    }


# From modules to maps.


@dataclass(frozen=True, eq=False)
class _Piece:
    """Rows that a map of ours and a module of theirs both hold."""

    ours: str  # names of modules
    theirs: str
    our_start: int
    their_start: int
    shape: tuple[int, ...]  # as theirs has it
    change: Change | None

    @cached_property
    def moves(self) -> "_Moves | None":
        """How rows and columns move; None: not at all."""
        if self.change is None and len(self.shape) == 2:
            return None
        height, *rest = self.shape
        width = math.prod(rest)
        rows = (torch.arange(height, dtype=torch.float32) + 1).view(-1, *(1 for _ in rest)).expand(self.shape)
        columns = (torch.arange(width, dtype=torch.float32) + 1).view(1, *rest).expand(self.shape)
        if self.change is not None:
            rows, columns = self.change.to_ours(rows), self.change.to_ours(columns)
        rows, columns = rows.flatten(1), columns.flatten(1)
        if not (torch.equal(rows, rows[:, :1].expand_as(rows)) and bool((columns.abs() == columns[:1].abs()).all())):
            raise CheckpointError(
                f"the rows of {self.theirs} are spread over columns of {self.ours}; it takes no adapter"
            )
        return _Moves(rows[:, 0].abs().long() - 1, rows[:, 0].sign(), columns[0].abs().long() - 1)


@dataclass(frozen=True, eq=False)
class _Moves:
    """ours[i, j] = signs[i] theirs[rows[i], columns[j]]"""

    rows: Tensor
    signs: Tensor
    columns: Tensor


class _Layout:
    """The linear maps of a table: which rows of ours are which of theirs."""

    def __init__(self, table: Sequence[Row], model: nn.Module) -> None:
        flat = {name: torch.empty_like(x, device="meta") for name, x in model.state_dict().items()}
        maps = linear_maps(model)
        self.pieces: list[_Piece] = []
        self.shapes: dict[str, tuple[int, ...]] = {}  # of their modules' weights
        for row in table:
            names = [name.removesuffix(".weight") for name in row.ours if name.endswith(".weight")]
            if isinstance(row, Entry) and names and all(name in maps for name in names) and _of_weights(row):
                theirs = row.to_theirs(flat)
                self.shapes |= {_stem(name): tuple(x.shape) for name, x in theirs.items()}
                self.pieces += _pieces_of(row, flat, theirs)
        self.modules: dict[str, list[_Piece]] = {}
        for piece in self.pieces:
            self.modules.setdefault(piece.theirs, []).append(piece)
        held = Counter((piece.ours, piece.our_start) for piece in self.pieces)
        self.copied = {piece.theirs for piece in self.pieces if held[piece.ours, piece.our_start] > 1}

    def named(self, sep: str) -> dict[str, str]:
        """Return the modules by their names, with another sign for the dots."""
        return {name.replace(".", sep): name for name in self.modules}

    def to_ours(self, module: str, found: Factors, where: str) -> Iterator[tuple[str, Update]]:
        """Give our maps' names and their changes.

        Raises:
            CheckpointError: the factors are of another shape, or of a copy that others would have to follow.
        """
        shape = self.shapes[module]
        if (found.up.shape[0], *found.down.shape[1:]) not in (shape, (shape[0], math.prod(shape[1:]))):
            raise CheckpointError(
                f"{where}: {module} is {list(shape)}, but its factors make "
                f"{[found.up.shape[0], *found.down.shape[1:]]}: it is of another network"
            )
        self._refuse_copies(module)
        flat, up = found.down.flatten(1), found.up.flatten(1)
        moved: list[tuple[Tensor, Tensor]] = []  # the columns' orders so far, and A in each: pieces share it
        for piece in self.modules[module]:
            rows = slice(piece.their_start, piece.their_start + piece.shape[0])
            part, magnitude = up[rows], None if found.magnitude is None else found.magnitude[rows]
            down = flat
            if (moves := piece.moves) is not None:
                part = part[moves.rows] * moves.signs[:, None].to(part)
                magnitude = None if magnitude is None else magnitude[moves.rows]
                same = [x for order, x in moved if torch.equal(order, moves.columns)]
                down = same[0] if same else flat[:, moves.columns]
                moved.append((moves.columns, down))
            yield piece.ours, Update(piece.our_start, down, part, found.scale, magnitude)

    def to_theirs(self, module: str, adapter: Adapter) -> Factors | None:
        """Return what an adapter changes in a module of theirs, or None if it is nothing.

        Raises:
            CheckpointError: only some of its rows have magnitudes, or it is a copy.
        """
        shape, blocks = self.shapes[module], []
        magnitude, lengths = torch.zeros(shape[0]), 0
        for piece in self.modules[module]:
            rows = range(piece.our_start, piece.our_start + piece.shape[0])
            for update in adapter.updates.get(piece.ours, ()):
                low, high = max(rows.start, update.start), min(rows.stop, update.rows.stop)
                if low >= high:
                    continue
                part = slice(low - update.start, high - update.start)
                up = update.up.new_zeros(piece.shape[0], update.up.shape[1])
                up[low - rows.start : high - rows.start] = update.up[part].detach()
                down = update.down.detach()
                length = up.new_zeros(piece.shape[0])
                if update.magnitude is not None:
                    length[low - rows.start : high - rows.start] = update.magnitude[part].detach()
                    lengths += high - low
                if (moves := piece.moves) is not None:
                    back, columns = moves.rows.argsort(), moves.columns.argsort()
                    up, length = (up * moves.signs[:, None].to(up))[back], length[back]
                    down = down[:, columns]
                rest = slice(piece.their_start, piece.their_start + piece.shape[0])
                magnitude[rest] = magnitude[rest] + length.to(magnitude)
                blocks.append((rest, down, up, update.scale))
        if not blocks:
            return None
        self._refuse_copies(module)
        if lengths not in (0, shape[0]):
            raise CheckpointError(f"{module} would have {lengths} magnitudes for {shape[0]} rows; all of them, or none")
        down, up, scale = _stacked(blocks, shape[0])
        if len(shape) > 2:
            down, up = down.view(-1, *shape[1:]), up.view(*up.shape, *(1 for _ in shape[2:]))
        return Factors(down, up, scale, magnitude.to(up.dtype) if lengths else None)

    def _refuse_copies(self, module: str) -> None:
        if module in self.copied:
            raise CheckpointError(
                f"{module} is one of several copies of a map, which an adapter would have to change alike"
            )


def _stacked(blocks: Sequence[tuple[slice, Tensor, Tensor, float]], height: int) -> tuple[Tensor, Tensor, float]:
    """Return one pair of factors for several, each of some rows; those of one A are put together."""
    scales = {scale for *_, scale in blocks}
    scale = scales.pop() if len(scales) == 1 else 1.0
    downs: list[Tensor] = []
    ups: list[Tensor] = []
    for rows, down, up, own in blocks:
        same = [index for index, other in enumerate(downs) if other.shape == down.shape and torch.equal(other, down)]
        if not same:
            downs.append(down)
            ups.append(up.new_zeros(height, up.shape[1]))
        ups[same[0] if same else -1][rows] += up * (own / scale)
    return torch.cat(downs), torch.cat(ups, dim=1), scale


def _of_weights(row: Entry) -> bool:
    return all(name.endswith(".weight") for name in (*row.ours, *row.theirs))


def _stem(name: str) -> str:
    return name.removesuffix(".weight")


def _pieces_of(row: Entry, ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> Iterator[_Piece]:
    places = {piece: (name, start) for name, piece, start, _ in _cut(row.ours, row.heights, ours)}
    for name, piece, start, height in _cut(row.theirs, row.heights, theirs):
        ours_name, our_start = places[piece]
        shape = (height, *theirs[name].shape[1:])
        yield _Piece(_stem(ours_name), _stem(name), our_start, start, shape, row.changes.get(piece))


def _cut(
    side: Mapping[str, tuple[str, ...]], heights: Mapping[str, int], tensors: Mapping[str, Tensor]
) -> Iterator[tuple[str, str, int, int]]:
    """Give each tensor's pieces: the tensor, the piece, its first row and its rows."""
    for name, pieces in side.items():
        unit = tensors[name].shape[0] // sum(heights.get(piece, 1) for piece in pieces)
        start = 0
        for piece in pieces:
            height = unit * heights.get(piece, 1)
            yield name, piece, start, height
            start += height
