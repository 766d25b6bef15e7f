"""From the features of an encoder to the context stream: what stands between the two in a model.

Layers     linear maps, the same for every token
Refine     a small transformer over the tokens, told of the time and of the tokens' mean
Sources    the tokens of several encoders, each through its own of these, side by side
Pool       one vector for the whole context, by attention from its mean
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from reelflow.config import configuration
from reelflow.errors import ConfigError
from reelflow.models.condition import Source
from reelflow.nn.attention import attend, split_heads
from reelflow.nn.embed import Number, NumberEmbedding, VectorEmbedding
from reelflow.nn.linear import Linear
from reelflow.nn.mlp import Mlp
from reelflow.nn.modulation import gated

__all__ = [
    "ContextLayers",
    "ContextSources",
    "Layers",
    "Pool",
    "Refine",
    "Refiner",
    "Sources",
    "build_context",
]


@configuration
class Layers:
    """A `ContextLayers`: features of width `in_dim` through the widths `hidden` to the stream's, a line if there are none.

    Raises:
        ConfigError: a width is below 1, or `positions` or `null` is negative.
    """

    in_dim: int
    hidden: tuple[int, ...] = ()
    activation: Literal["gelu", "gelu_tanh", "silu"] = "gelu_tanh"
    norms: bool | Literal["in", "out"] = False  # layer norms with weights, of eps 1e-5, before the maps, after, or both
    positions: int = 0  # tokens to which learned vectors are added first
    null: int = 0  # tokens of features that stand for no condition, kept as a checkpoint has them, for guidance
    kind: Literal["layers"] = "layers"

    def __post_init__(self) -> None:
        if min(self.in_dim, *self.hidden, 1) < 1 or min(self.positions, self.null) < 0:
            raise ConfigError(
                f"widths are at least 1, positions and null at least 0, got in_dim={self.in_dim}, hidden={self.hidden}, "
                f"positions={self.positions}, null={self.null}"
            )


@configuration
class Refine:
    """A `Refiner` of `depth` blocks over features of width `in_dim`.

    Raises:
        ConfigError: a width or the depth is below 1.
    """

    in_dim: int
    depth: int = 2
    mlp_ratio: float = 4.0
    kind: Literal["refine"] = "refine"

    def __post_init__(self) -> None:
        if min(self.in_dim, self.depth) < 1:
            raise ConfigError(f"in_dim and depth are at least 1, got {self.in_dim} and {self.depth}")


@configuration
class Sources:
    """A `ContextSources`: the context's way to the stream, and those of the further contexts of a `Condition`.

    Raises:
        ConfigError: there is no source.
    """

    sources: tuple[Layers | Refine, ...]
    kind: Literal["sources"] = "sources"

    def __post_init__(self) -> None:
        if not self.sources:
            raise ConfigError("a context has at least one source; without a context, set it to null")

    @property
    def in_dim(self) -> int:
        """Width of the first source's features."""
        return self.sources[0].in_dim


class ContextLayers(nn.Module):
    """The maps of `Layers`, and in `null` the features that stand for no condition, zero until a checkpoint is read."""

    null: Tensor | None

    def __init__(self, config: Layers, dim: int) -> None:
        super().__init__()
        self.config = config
        self.register_buffer("null", torch.zeros(config.null, config.in_dim) if config.null else None)
        start = torch.zeros(config.positions, config.in_dim) if config.positions else None
        self.positions = None if start is None else nn.Parameter(start)
        self.norm_in = nn.LayerNorm(config.in_dim) if config.norms in (True, "in") else None
        self.maps = nn.ModuleList(Linear(a, b) for a, b in pairwise((config.in_dim, *config.hidden, dim)))
        self.norm_out = nn.LayerNorm(dim) if config.norms in (True, "out") else None

    def forward(
        self, x: Float[Tensor, "B L F"], mask: Bool[Tensor, "B L"] | None, t: Float[Tensor, "B groups"]
    ) -> Float[Tensor, "B L C"]:
        """Map every token alike, whatever the mask and the time.

        Raises:
            ConfigError: there are other than `positions` tokens.
        """
        if self.positions is not None:
            if x.shape[1] != len(self.positions):
                raise ConfigError(f"the model reads {len(self.positions)} tokens here, got {x.shape[1]}")
            x = x + self.positions
        if self.norm_in is not None:
            x = self.norm_in(x)
        for index, each in enumerate(self.maps):
            x = each(self._activate(x) if index else x)
        return x if self.norm_out is None else self.norm_out(x)

    def _activate(self, x: Tensor) -> Tensor:
        if self.config.activation == "silu":
            return F.silu(x)
        return F.gelu(x, approximate="tanh" if self.config.activation == "gelu_tanh" else "none")


class RefinerBlock(nn.Module):
    """Attention and MLP among context tokens; a vector gates both."""

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm1, self.norm2 = (nn.LayerNorm(dim, eps=1e-6) for _ in range(2))
        self.qkv = Linear(dim, 3 * dim)
        self.out = Linear(dim, dim)
        self.mlp = Mlp(dim, round(mlp_ratio * dim), activation="silu")
        self.gates = Linear(dim, 2 * dim)

    def forward(
        self, x: Float[Tensor, "B L C"], vector: Float[Tensor, "B 1 C"], mask: Bool[Tensor, "B 1 1 L"] | None
    ) -> Float[Tensor, "B L C"]:
        first, second = self.gates(F.silu(vector)).chunk(2, dim=-1)
        q, k, v = (split_heads(part, self.num_heads) for part in self.qkv(self.norm1(x)).chunk(3, dim=-1))
        x = gated(x, first, self.out(attend(q, k, v, mask=mask)))
        return gated(x, second, self.mlp(self.norm2(x)))


class Refiner(nn.Module):
    """A linear map and blocks gated by a vector of the time and of the mean of the features (`Refine`)."""

    def __init__(self, config: Refine, dim: int, num_heads: int, time: Number) -> None:
        super().__init__()
        self.time = NumberEmbedding(time, dim)
        self.mean = VectorEmbedding(config.in_dim, dim)
        self.embed = Linear(config.in_dim, dim)
        self.blocks = nn.ModuleList(RefinerBlock(dim, num_heads, config.mlp_ratio) for _ in range(config.depth))

    def forward(
        self, x: Float[Tensor, "B L F"], mask: Bool[Tensor, "B L"] | None, t: Float[Tensor, "B groups"]
    ) -> Float[Tensor, "B L C"]:
        """Refine tokens; those that the mask hides are seen by no other, and come out as anything."""
        vector = self.time(t.amin(1, keepdim=True)) + self.mean(_mean(x, mask))[:, None]
        x = self.embed(x)
        for block in self.blocks:
            x = block(x, vector, None if mask is None else mask[:, None, None])
        return x


class ContextSources(nn.Module):
    """Contexts side by side, to the tokens of each a learned vector added that says whose they are (`Sources`)."""

    def __init__(self, config: Sources, dim: int, num_heads: int, time: Number) -> None:
        super().__init__()
        self.sources = nn.ModuleList(build_context(source, dim, num_heads, time) for source in config.sources)
        self.kinds = nn.Parameter(nn.init.normal_(torch.empty(len(config.sources), dim), std=0.02))

    def forward(self, sources: Sequence[Source], t: Float[Tensor, "B groups"]) -> Source:
        """Join what `sources` become, in their order."""
        rows = zip(self.sources, sources, self.kinds, strict=True)
        tokens = torch.cat([door(source.tokens, source.mask, t) + kind for door, source, kind in rows], dim=1)
        masked = any(source.mask is not None for source in sources)
        return Source(tokens, torch.cat([source.real() for source in sources], dim=1) if masked else None)


class Pool(nn.Module):
    """One vector for a context, by attention of its mean to the mean and all tokens."""

    def __init__(self, in_dim: int, num_heads: int, dim: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.query = Linear(in_dim, in_dim)
        self.kv = Linear(in_dim, 2 * in_dim)
        self.out = Linear(in_dim, dim)

    def forward(self, x: Float[Tensor, "B L F"], mask: Bool[Tensor, "B L"] | None) -> Float[Tensor, "B D"]:
        mean = _mean(x, mask)[:, None]
        k, v = (split_heads(part, self.num_heads) for part in self.kv(torch.cat([mean, x], dim=1)).chunk(2, dim=-1))
        seen = None if mask is None else F.pad(mask, (1, 0), value=True)[:, None, None]
        return self.out(attend(split_heads(self.query(mean), self.num_heads), k, v, mask=seen))[:, 0]


def _mean(x: Float[Tensor, "B L F"], mask: Bool[Tensor, "B L"] | None) -> Float[Tensor, "B F"]:
    """Return the mean of the tokens that the mask shows; of none, zero."""
    if mask is None:
        return x.mean(1)
    weight = mask.to(x.dtype)[..., None]
    return (x * weight).sum(1) / weight.sum(1).clamp_min(1)


def build_context(
    config: Layers | Refine | Sources, dim: int, num_heads: int, time: Number
) -> ContextLayers | Refiner | ContextSources:
    """Return the module of a context's way to a stream of width `dim`."""
    if isinstance(config, Layers):
        return ContextLayers(config, dim)
    if isinstance(config, Sources):
        return ContextSources(config, dim, num_heads, time)
    return Refiner(config, dim, num_heads, time)
