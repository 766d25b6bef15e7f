"""What a family of published autoencoders says of itself, and the tables of weights that several share."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch

from reelflow.interop.mapping import Row, given, parameter, rearranged, table
from reelflow.models.coder import Layer, Res, Skip, Timed
from reelflow.models.vae import VAEConfig

__all__ = ["FLAT", "Coder", "CoderSize", "Level", "Name", "Rows", "coder_rows", "levels_of", "scale_of"]


@dataclass(frozen=True)
class CoderSize:
    """One published autoencoder."""

    config: VAEConfig
    parameters: int  # as published, of encoder and decoder together
    repository: str  # where its weights are, in the folder vae/ unless said
    clip: tuple[int, int, int] = (17, 256, 256)  # frames, height and width that it takes


@dataclass(frozen=True)
class Coder:
    """A published design of autoencoders: its sizes, and the way between its checkpoints, as of diffusers, and ours."""

    name: str
    class_name: str  # as a checkpoint's config.json calls it
    sizes: Mapping[str, CoderSize]
    licence: str  # of the weights
    read: Callable[[dict[str, Any]], VAEConfig]  # of a config.json
    write: Callable[[VAEConfig], dict[str, Any]]
    weights: Callable[[VAEConfig], tuple[Row, ...]]
    older_weights: Callable[[VAEConfig], tuple[Row, ...]] | None = None  # where older files have other names
    bare: Callable[[Mapping[str, Sequence[int]]], dict[str, Any]] | None = None
    """From the shapes in a file without config.json to what that would say.

    Raises:
        KeyError: they are not of this design.
    """
    notes: tuple[str, ...] = ()  # where references disagree, and what was chosen


Name = str | tuple[str, ...]
"""What theirs call a layer; "" where there are no weights.

Of a `Skip`, its layers and then those of its shortcut; of a `Timed`, itself and then its layers.
"""


Rows = Callable[[Any, int, str, str], Iterable[Row]]
"""Relates a `Part`, or a `Timed`, that has weights, given the channels that come in, our name and theirs."""


def coder_rows(
    config: VAEConfig,
    encoder: Iterable[Name],
    decoder: Iterable[Name],
    rows: Rows,
    *,
    statistics: tuple[str, str] | None = None,
) -> tuple[Row, ...]:
    """Relate an autoencoder, whose layers theirs call so.

    The latents' mean and std are constants of the family, or have these names among theirs.
    """

    def make(values: tuple[float, ...]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.float64).expand(config.latent_channels).clone()

    own = ("latent_mean", "latent_std")
    return table(
        _rows(config.encoder, 3 * config.patch**2, "encoder", encoder, rows),
        _rows(config.decoder, config.latent_channels, "decoder", decoder, rows),
        (parameter(ours, theirs) for ours, theirs in zip(own, statistics, strict=True))
        if statistics
        else (given(name, partial(make, getattr(config, name))) for name in own),
    )


def _rows(layers: Sequence[Layer], channels: int, ours: str, names: Iterable[Name], rows: Rows) -> Iterator[Row]:
    for index, (layer, name) in enumerate(zip(layers, names, strict=True)):
        if isinstance(layer, Skip):
            cut = len(layer.layers)
            yield from _rows(layer.layers, channels, f"{ours}.{index}.layers", name[:cut], rows)
            yield from _rows(layer.shortcut, channels, f"{ours}.{index}.shortcut", name[cut:], rows)
        elif isinstance(layer, Timed):
            yield from rows(layer, channels, f"{ours}.{index}", name[0])
            yield from _rows(layer.layers, channels, f"{ours}.{index}.layers", name[1:], rows)
        elif name:
            assert isinstance(name, str)
            yield from rows(layer, channels, f"{ours}.{index}", name)
        channels = layer.width(channels)


FLAT = rearranged("d c y x -> d c 1 y x")
"""Of the weight of a convolution that theirs do in two dimensions."""


class Level(NamedTuple):
    """A level of an encoder."""

    channels: int
    blocks: int
    time: int  # by how much it divides time after its blocks
    space: int


def levels_of(encoder: Sequence[Layer], *, middle: int) -> list[Level]:
    """Return an encoder's levels, which are apart where something is resampled; `middle` blocks come after the last."""
    parts = [part for layer in encoder for part in (layer.layers if isinstance(layer, Skip) else (layer,))]
    levels: list[Level] = []
    channels = count = 0
    for part in parts:
        if isinstance(part, Res):
            channels, count = part.channels, count + 1
        elif part.time * part.space > 1 and count:
            levels.append(Level(channels, count, part.time, part.space))
            count = 0
        elif part.time * part.space > 1 and levels:  # resampled in two steps
            before = levels.pop()
            levels.append(before._replace(time=before.time * part.time, space=before.space * part.space))
    return [*levels, Level(channels, count - middle, 1, 1)]


def scale_of(config: VAEConfig) -> float:
    """Return the number that theirs multiply latents by, up to the rounding of its inverse.

    Raises:
        ValueError: channels have numbers of their own, or a mean.
    """
    (std,) = config.latent_std
    if any(config.latent_mean):
        raise ValueError("latents with a mean")
    return float(f"{1 / std:.12g}")
