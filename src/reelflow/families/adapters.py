"""Adapters on disk, for a network of ours or of any family, or for the networks of a whole system.

A file says more or less of what it is for: modules in one of several layouts, the second of two networks by a prefix, the
times it was trained for. What it says is held to; where a system has two networks and nothing says which, it is asked.
"""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch

from reelflow.config import configuration
from reelflow.errors import CheckpointError, ConfigError, nearest
from reelflow.families.family import Family
from reelflow.families.published import export_transformer, find_family
from reelflow.families.system import Expert
from reelflow.interop.adapters import (
    AdapterFile,
    Format,
    adapter_as_ours,
    adapter_as_theirs,
    read_adapter,
    write_adapter,
)
from reelflow.interop.mapping import Row
from reelflow.models.adapters import Adapter, Undo, apply
from reelflow.models.dit import DiTConfig, VideoDiT

__all__ = ["AdapterUse", "apply_files", "check_files", "load_adapter", "save_adapter"]

NETWORKS = ("transformer", "transformer_2")  # as the folders of a system are called
MARGIN = 1e-6  # of times


@configuration
class AdapterUse:
    """A file or folder of an adapter, and how it is to be used.

    Raises:
        ConfigError: the network has none of the two names.
    """

    file: str
    strength: float = 1.0
    network: str | None = None  # transformer or transformer_2, of a system that has two

    def __post_init__(self) -> None:
        if self.network is not None and self.network not in NETWORKS:
            raise ConfigError(f"a system has no network {self.network!r}; {nearest(self.network, NETWORKS)}")


def load_adapter(source: str | Path, model: VideoDiT, *, network: str | None = None) -> Adapter:
    """Return the adapter in a file or folder, for a network (shapes are enough); `network` says which of two it is.

    Raises:
        CheckpointError: there is none that can be read whole, or it is of another network.
    """
    file = read_adapter(source)
    said = network or NETWORKS[0]
    if "" not in file.networks and said not in file.networks:
        raise CheckpointError(f"{file.where} is for {' and '.join(file.networks)}; say so if that is what you have")
    if network is None and len(file.networks) > 1:
        raise CheckpointError(f"{file.where} holds adapters of two networks; say which: {' or '.join(NETWORKS)}")
    return adapter_as_ours(file.networks.get(said) or file.networks[""], _tables(model.config), model, file.where)


def save_adapter(
    adapter: Adapter,
    model: VideoDiT,
    folder: str | Path,
    family: Family | None = None,
    *,
    layout: Format = "peft",
    network: str = NETWORKS[0],
    times: tuple[float, float] | None = None,
) -> None:
    """Write an adapter of a network (shapes are enough) by the names of its family, or ours if it is of none.

    `times` are those that it was trained for, as `write_adapter` has them.

    Raises:
        CheckpointError: the folder is not empty, the disk is full, or the family has no place for a change.
        ConfigError: the adapter is of another network.
    """
    family = family or find_family(model.config)
    rows = export_transformer(model.config, "reelflow").rows if family is None else family.weights(model.config)
    write_adapter(adapter_as_theirs(adapter, rows, model), folder, layout=layout, network=network, times=times)


def check_files(experts: Sequence[Expert], uses: Sequence[AdapterUse]) -> None:
    """Refuse adapters that are not of these networks, whose shapes are enough.

    Raises:
        CheckpointError: as `apply_files`.
        ConfigError: as `apply_files`.
    """
    _read(experts, uses)


def apply_files(experts: Sequence[Expert], uses: Sequence[AdapterUse]) -> Undo:
    """Apply adapters to the networks of a system; those of one network add.

    Raises:
        CheckpointError: a file cannot be read whole, is of another network, or of other times than the one it is to be
            used on.
        ConfigError: it is not said on which of two networks to use it, or a strength is not finite.
    """
    undos = []
    for expert, adapters in zip(experts, _read(experts, uses), strict=True):
        to = partial(torch.Tensor.to, device=next(expert.network.parameters()).device)
        moved = [(adapter.map(to), strength) for adapter, strength in adapters]
        undos.append(apply(expert.network, moved).undo)
    return Undo(undos)


def _read(experts: Sequence[Expert], uses: Sequence[AdapterUse]) -> list[list[tuple[Adapter, float]]]:
    """Return the adapters of each network."""
    found: list[list[tuple[Adapter, float]]] = [[] for _ in experts]
    for use in uses:
        file = read_adapter(use.file)
        for index in _networks(file, use, experts):
            factors = file.networks.get(NETWORKS[index]) or file.networks[""]
            network = experts[index].network
            adapter = adapter_as_ours(factors, _tables(network.config), network, file.where)
            found[index].append((adapter, use.strength))
    return found


def _networks(file: AdapterFile, use: AdapterUse, experts: Sequence[Expert]) -> list[int]:
    """Return the numbers of the networks that a file is to be used on."""
    known = NETWORKS[: len(experts)]
    if use.network is not None and use.network not in known:
        raise ConfigError(f"{use.file} is to be used on {use.network}, but the system has {known[0]} only")
    if "" not in file.networks:
        if other := [name for name in file.networks if name not in known]:
            raise CheckpointError(
                f"{file.where} is for {' and '.join(file.networks)}, but the system has no {other[0]}"
            )
        if use.network is not None and use.network not in file.networks:
            raise CheckpointError(f"{file.where} is for {' and '.join(file.networks)}, not for {use.network}")
        return [known.index(name) for name in ([use.network] if use.network else file.networks)]
    starts = [0.0, *(expert.until for expert in experts[:-1])]
    low, high = file.times or (0.0, 1.0)
    fits = [
        index
        for index, (start, expert) in enumerate(zip(starts, experts, strict=True))
        if low < expert.until - MARGIN and high > start + MARGIN
    ]
    if use.network is not None and (chosen := known.index(use.network)) not in fits:
        raise CheckpointError(
            f"{file.where} was trained for t from {low:g} to {high:g}; {use.network} works from {starts[chosen]:g} to "
            f"{experts[chosen].until:g}; use it on {known[fits[0]]}"
        )
    if use.network is None and len(fits) > 1:
        raise ConfigError(
            f"the system has two networks, {known[0]} until t = {starts[1]:g} (0 is noise) and {known[1]} from there on, "
            f"and {use.file} does not say which it is for: say {known[0]}={use.file} or {known[1]}={use.file}"
        )
    return fits if use.network is None else [known.index(use.network)]


def _tables(config: DiTConfig) -> list[tuple[Row, ...]]:
    """Return the layouts that files may have."""
    family = find_family(config)
    layouts = [export_transformer(config, "reelflow").rows]
    if family is not None:
        layouts += [family.weights(config), *([family.original.weights(config)] if family.original else [])]
    return layouts
