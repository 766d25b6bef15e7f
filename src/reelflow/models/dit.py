"""The video transformer: embed the latents' patches, walk a list of blocks, read out a prediction.

    tokens  = linear(patches of latents [+ channels door] [+ stem]) [+ linear(patches of the channels door)]
              [+ positions] [+ residual door]
    context = layers or refiner(context door), of each of its sources
    vector  = embed(t) [+ embed(vector door)] [+ embed(numbers)] [+ class row] [+ pool(context door)]
                                                                       one per clip, per frame or per token
    tokens  = blocks(tokens, context, vector, rotary positions)
    output  = unpatchify(linear(modulate(norm(tokens))))

What the output means (velocity, noise, data) is not the network's affair; it learns what the process asks of it.
"""

import math
from collections import ChainMap
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from reelflow.config import configuration
from reelflow.errors import ConfigError
from reelflow.models.blocks import (
    Branches,
    BranchesBlock,
    Cross,
    CrossAttention,
    Layer,
    Reads,
    Single,
    Streams,
    Widths,
    build_block,
)
from reelflow.models.condition import Condition, Source
from reelflow.models.context import ContextLayers, ContextSources, Layers, Pool, Refine, Refiner, Sources, build_context
from reelflow.models.packing import Packed
from reelflow.nn.embed import (
    Apart,
    ApartEmbedding,
    Learned,
    LearnedPositions,
    Number,
    NumberEmbedding,
    SinCos,
    VectorEmbedding,
)
from reelflow.nn.linear import Linear
from reelflow.nn.mlp import Activation
from reelflow.nn.modulation import Modulation, Table, modulate
from reelflow.nn.norm import Norm, build_norm
from reelflow.nn.patchify import Grid, Patch, patchify, token_grid, unpatchify
from reelflow.nn.patterns import Segments, Share
from reelflow.nn.rope import (
    Coordinates,
    Extension,
    Rope,
    Steps,
    Stretch,
    axial_frequencies,
    check_axes,
    full_width_frequencies,
    mixed_rope_table,
    rope_table,
    token_positions,
)

__all__ = ["DiTConfig", "Prepared", "VideoDiT"]


@configuration
class DiTConfig:
    """Shape of a `VideoDiT`.

    `rope` "width" lets frequencies run over all heads together (`full_width_frequencies`).

    Raises:
        ConfigError: heads do not divide the width, the rotary split does not fill a head, an extent is impossible, or a
            layer needs a context stream that is not there or has another width.
    """

    in_channels: int  # latent channels
    dim: int
    num_heads: int
    layers: tuple[Layer, ...]
    patch: Patch = Patch(1, 2, 2)
    rope: tuple[int, int, int] | Literal["none", "width"] = (16, 24, 24)  # channels of a head turned by t, h, w
    absolute: tuple[SinCos | Learned, ...] = ()  # positions added to the tokens, beside the rotary ones
    theta: float = 10_000.0  # base of rotary frequencies; about 100 suits grids of a few tokens a side
    coordinates: Coordinates = Steps()  # where tokens stand, for the rotary positions
    frequencies: Literal["fixed", "learned"] = "fixed"  # learned: per head, each pair mixes t, h and w
    extension: Extension | None = None  # for axes longer than `trained`
    trained: tuple[float, float, float] | None = None  # lengths of t, h, w in training, in units of position
    activation: Activation = "gelu_tanh"
    modulation: Literal["own", "shared"] = "own"  # a map of the vector in each block, or one for all and tables in each
    time: Number = Number()  # how t becomes a vector
    vector_width: int = 0  # of the vector of time and the rest; 0: dim
    stem: int = 0  # channels of a 3 x 3 x 3 convolution set beside the latents, so that patches know their neighbours
    context: Layers | Refine | Sources | None = None  # context door
    context_width: int = 0  # width of the context stream inside; 0: dim
    pool: int = 0  # heads of attention that makes one vector of the context; 0: none is made
    image: Layers | None = None  # image door
    vector_dim: int = 0  # width of the vector door's features; 0 closes it
    numbers: tuple[Number, ...] = ()  # numbers door
    extra_channels: int = 0  # channels door
    extra_apart: Apart | None = None  # maps of its own for the channels door; null: it goes through the latents'
    num_classes: int = 0  # rows of the class table, to which one more is added for "no class"
    last_norm: Norm | None = None  # of the tokens after the last block
    out_norm: Norm = Norm()  # of the tokens before the readout's shift and scale
    out_groups: Literal["own", "first"] = "own"  # the time a token's readout goes by: its own, or the noisiest one's
    out_channels: int = 0  # of the prediction; 0: in_channels (twice as many carry a learned variance)

    def __post_init__(self) -> None:
        for name in ("stem", "extra_channels", "out_channels", "context_width", "vector_width", "pool"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name} must not be negative, got {getattr(self, name)}; nearest: 0")
        if self.extra_apart is not None and sum(self.extra_apart.parts) != self.extra_channels:
            raise ConfigError(
                f"the parts that have maps of their own are {self.extra_apart.parts}, of {self.extra_channels} "
                f"channels; nearest: extra_channels={sum(self.extra_apart.parts)}"
            )
        if self.in_channels < 1 or min(self.patch) < 1:
            raise ConfigError(
                f"in_channels and patch must be at least 1, got {self.in_channels} and {tuple(self.patch)}"
            )
        if self.dim < 1 or self.num_heads < 1 or self.dim % self.num_heads:
            near = max(1, round(self.dim / max(1, self.num_heads))) * max(1, self.num_heads)
            raise ConfigError(
                f"dim must be a multiple of num_heads ({self.num_heads}), got {self.dim}; nearest: {near}"
            )
        if not isinstance(self.rope, str):
            check_axes(self.rope, self.dim // self.num_heads)
        elif self.frequencies == "learned" or self.extension is not None:
            raise ConfigError(f"learned frequencies and extensions need a split of the head, got rope={self.rope!r}")
        for absolute in self.absolute:
            if isinstance(absolute, SinCos) and absolute.split is not None:
                check_axes(absolute.split, self.dim, parts="sin-cos parts", whole="width")
            together = self.context is not None and self.context_width in (0, self.dim)
            if isinstance(absolute, Learned) and absolute.context and not together:
                raise ConfigError(
                    "positions of context and clip in one table need a context as wide as the clip's tokens; got "
                    f"context={self.context}, dim={self.dim}, context_width={self.context_width}"
                )
        if (self.extension is None) != (self.trained is None) or (self.extension and self.frequencies == "learned"):
            raise ConfigError(
                "an extension needs the trained lengths, and fixed frequencies; got "
                f"extension={self.extension}, trained={self.trained}, frequencies={self.frequencies!r}"
            )
        if self.pool and self.context is not None and self.context.in_dim % self.pool:
            raise ConfigError(
                f"{self.pool} heads do not cut the context's {self.context.in_dim} channels into even parts"
            )
        for index, layer in enumerate(self.layers):
            self._check_layer(f"layers[{index}]", layer)
        if self.modulation == "shared" and self.vector_width not in (0, self.dim):
            raise ConfigError(f"shared modulation reads a vector as wide as the tokens, got {self.vector_width}")

    def _check_layer(self, name: str, layer: Layer) -> None:
        if isinstance(layer, Single) and self.context_width not in (0, self.dim):
            raise ConfigError(
                f"{name} is a Single, which joins streams of one width; got dim={self.dim} and "
                f"context_width={self.context_width}; nearest: context_width=0"
            )
        branches = layer.branches if isinstance(layer, Branches) else ()
        for branch in branches:
            if isinstance(branch, Cross) and self.context is None:
                raise ConfigError(f"{name} attends to a context, but there is no context door; set context")
            if isinstance(branch, Cross) and branch.image and self.image is None:
                raise ConfigError(f"{name} attends to a picture, but there is no image door; set image")
        if self.modulation == "shared":
            chunks = layer.num_chunks if isinstance(layer, Branches) else None
            if not chunks or chunks != self.num_chunks:
                raise ConfigError(
                    f"shared modulation needs Branches with as many adaptive branches each; {name} is {layer}"
                )

    @property
    def num_chunks(self) -> int:
        """How many vectors modulate the first block, and with shared modulation every block."""
        first = self.layers[0] if self.layers else None
        return first.num_chunks if isinstance(first, Branches) else 0

    @property
    def context_dim(self) -> int:
        """Width of the context door's features; 0 if it is closed."""
        return 0 if self.context is None else self.context.in_dim


@dataclass(frozen=True)
class Prepared:
    """A condition, and what a network makes of it for latents of one shape (`VideoDiT.prepare`)."""

    condition: Condition
    grid: Grid
    rope: Rope | None
    pooled: Float[Tensor, "B V"] | None
    image: Float[Tensor, "B P D"] | None
    context: Source | None  # None where it depends on the time
    weights: Float[Tensor, "1 1 1 L"] | None = None  # added to the scores of the context's tokens
    reads: Mapping[CrossAttention, Reads] = field(default_factory=dict)


class VideoDiT(nn.Module):
    """A video diffusion transformer (see the module's docstring)."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.config = config
        dim, cells = config.dim, config.patch.t * config.patch.h * config.patch.w
        channels = config.in_channels + (0 if config.extra_apart else config.extra_channels)
        width, context_width = config.vector_width or dim, config.context_width or dim
        self.stem = nn.Conv3d(channels, config.stem, 3, padding=1) if config.stem else None
        self.embed = Linear((channels + config.stem) * cells, dim)
        self.extra = None if config.extra_apart is None else ApartEmbedding(config.extra_apart, config.patch, dim)
        self.tables = nn.ModuleList(LearnedPositions(a, dim) for a in config.absolute if isinstance(a, Learned))
        self.frequencies = None
        if config.frequencies == "learned" and not isinstance(config.rope, str):
            start = axial_frequencies(config.rope, theta=config.theta).float()
            self.frequencies = nn.Parameter(start[:, None].repeat(1, config.num_heads, 1))
        self.time = NumberEmbedding(config.time, width)
        self.vector = VectorEmbedding(config.vector_dim, width) if config.vector_dim else None
        self.numbers = nn.ModuleList(NumberEmbedding(number, width) for number in config.numbers)
        self.classes = nn.Embedding(config.num_classes + 1, width) if config.num_classes else None
        self.context = (
            None
            if config.context is None
            else build_context(config.context, context_width, config.num_heads, config.time)
        )
        self.pool = Pool(config.context_dim, config.pool, width) if config.pool else None
        self.image = None if config.image is None else ContextLayers(config.image, dim)
        shared = config.modulation == "shared"
        self.shared = Modulation(width, dim, config.num_chunks) if shared else None
        widths = Widths(dim, config.num_heads, width, context_width, config.activation, shared=shared)
        # Of `Streams`. A hook here may leave a `Share` of the tokens to the blocks and the readout.
        self.enter = nn.Identity()
        self.blocks = nn.ModuleList(build_block(layer, widths) for layer in config.layers)
        self.last_norm = None if config.last_norm is None else build_norm(config.last_norm, dim)
        self.norm = build_norm(config.out_norm, dim)
        self.modulation: Table | Modulation = Table(dim, 2) if shared else Modulation(width, dim, 2)
        self.out = Linear(dim, (config.out_channels or config.in_channels) * cells)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(
        self,
        latents: Float[Tensor, "B C T H W"],
        t: Float[Tensor, "B"] | Float[Tensor, "B groups"],
        condition: "Condition | Prepared" = Condition(),
        *,
        skip: Collection[int] = (),
        token_rate: float | Float[Tensor, "B"] | None = None,
    ) -> Float[Tensor, "B out T H W"]:
        """Predict from noisy latents at time t in [0, 1] (0 is noise, 1 is data).

        `t` is one number per clip, or a row per clip with one number per token frame or per token, in scan order. A
        condition that is the same for many predictions may be given as `prepare` makes it, once for all of them.
        Blocks whose index is in `skip` are passed by: a weaker model for guidance to lead away from.

        Raises:
            ConfigError: extents do not fit the patch or a layer's pattern of attention; a door is used that the model
                does not have, or the reverse; what comes through it has another width; `skip` names no block; or the
                condition was prepared for another shape.
        """
        grid = token_grid(latents.shape[2:], self.config.patch)
        told = condition.condition if isinstance(condition, Prepared) else condition
        t = self._check(latents, t, grid, told)
        x = self._with_positions(self._embed(latents, told.channels), (grid,), 0)
        ready = condition if isinstance(condition, Prepared) else self._prepared(told, x, grid, token_rate)
        if ready is condition and (ready.grid != grid or token_rate is not None):
            raise ConfigError(
                f"the condition was prepared for {tuple(ready.grid)} tokens and their rate, and is used for {tuple(grid)} "
                f"and a rate of {token_rate}; prepare it for these"
            )
        if told.residual is not None:
            x = x + told.residual
        vector = self._vector(t, told, ready.pooled)
        # A context token belongs to no frame: it is told of the noisiest one, whose work is still to be done.
        single = vector if t.shape[1] == 1 else self._vector(t.amin(1, keepdim=True), told, ready.pooled)
        chunks = self._chunks(vector)
        context = ready.context or self._context(told, x, t)
        streams = Streams(
            video=x,
            context=context.tokens,
            vector=chunks,
            context_vector=chunks if single is vector else self._chunks(single),
            rope=ready.rope,
            mask=_with_video(context.mask, grid) if ready.weights is None else ready.weights,
            grid=grid,
            image=ready.image,
            reads=ready.reads,
            last=vector if self.config.out_groups == "own" else single,
        )
        return unpatchify(self._through(streams, skip), grid, self.config.patch)

    def prepare(
        self,
        latents: Float[Tensor, "B C T H W"],
        condition: Condition,
        *,
        token_rate: float | Float[Tensor, "B"] | None = None,
    ) -> "Prepared":
        """Return a condition with all that the network makes of it whatever the time, and the latents but for their shape.

        That is positions, pooled and embedded contexts and pictures, and, where no block changes the context, all keys
        and values of cross-attention: 2 * tokens * dim numbers for each such branch are kept. There, a context that ends in
        many equal tokens (padding that is not hidden) is read as if it had one or two of them, which count as many. Under
        FSDP2 register it, and `reads` of the blocks, as forward methods.

        Raises:
            ConfigError: as `forward`.
        """
        grid, batch = token_grid(latents.shape[2:], self.config.patch), latents.shape[0]
        self._check(latents, latents.new_zeros(batch), grid, condition)
        ready = self._prepared(condition, self._embed(latents, condition.channels), grid, token_rate)
        blocks = [block for block in self.blocks if isinstance(block, BranchesBlock)]
        if ready.context is None or len(blocks) < len(self.blocks):
            return ready
        tokens, weights = ready.context.tokens, None
        if self._tells_no_places() and condition.context is not None and ready.context.mask is None:
            kept, weights = _merged(condition.context, tokens.dtype)
            tokens = tokens[:, :kept]
        reads = dict(ChainMap(*(block.reads(tokens, ready.image) for block in blocks)))
        return replace(ready, context=ready.context._replace(tokens=tokens), weights=weights, reads=reads)

    def _tells_no_places(self) -> bool:
        """Say whether equal features become equal tokens of the context, wherever they stand."""
        config = self.config
        placed = any(isinstance(absolute, Learned) and absolute.context for absolute in config.absolute)
        return isinstance(config.context, Layers) and not config.context.positions and not placed

    def _prepared(
        self, condition: Condition, x: Float[Tensor, "B N D"], grid: Grid, token_rate: float | Tensor | None
    ) -> "Prepared":
        rope, any_time = self._rope(grid, token_rate, x.device), x.new_zeros(x.shape[0], 1)
        refined = self.context is not None and any(isinstance(each, Refiner) for each in self.context.modules())
        return Prepared(
            condition=condition,
            grid=grid,
            rope=None if rope is None else rope.to(torch.promote_types(x.dtype, torch.float32)),
            pooled=self._pooled(condition),
            image=None if self.image is None else self.image(condition.image, None, any_time).to(x.dtype),
            context=None if refined else self._context(condition, x, any_time),
        )

    def forward_packed(self, packed: Packed, *, skip: Collection[int] = ()) -> tuple[Float[Tensor, "1 out _ _ _"], ...]:
        """Predict every clip of a row, as `forward` predicts each alone: the same numbers, in one pass and unpadded.

        Under FSDP2 register it: `register_fsdp_forward_method(model, "forward_packed")`.

        Raises:
            ConfigError: as `forward`, of any clip.
        """
        clips, condition, device = packed.clips, packed.condition, packed.clips[0].latents.device
        grids = [token_grid(clip.latents.shape[2:], self.config.patch) for clip in clips]
        times = [self._check(c.latents, c.t, grid, c.condition) for c, grid in zip(clips, grids, strict=True)]
        segments = Segments(packed.context_lengths, tuple(grids))

        def each(counts: list[int] | tuple[int, ...]) -> Tensor:
            """Name for each token its clip, or its group."""
            rows = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
            return rows.to(device, non_blocking=True)

        x = torch.cat([self._embed(clip.latents, clip.condition.channels) for clip in clips], dim=1)
        x = self._with_positions(x, grids, 0)
        if clips[0].condition.residual is not None:
            x = x + torch.cat([clip.condition.residual for clip in clips if clip.condition.residual is not None], dim=1)
        # One row of vectors: of all groups of all clips, and of all clips.
        pooled, groups = self._pooled(condition), [t.shape[1] for t in times]
        first = torch.cat([t.amin(1, keepdim=True) for t in times])
        vector = single = self._vector(first, condition, pooled).transpose(0, 1)
        rows = whole = each(segments.video)
        if max(groups) > 1:
            owner = each(groups)
            told, t = condition.vectors(owner), torch.cat(times, dim=1).transpose(0, 1)
            vector = self._vector(t, told, None if pooled is None else pooled[owner]).transpose(0, 1)
            rows = each([n // count for n, count in zip(segments.video, groups, strict=True) for _ in range(count)])
        chunks, rope = self._chunks(vector), self._rope_of_row(packed, grids, x.device)
        context = self._context(condition, x, first).tokens
        if condition.context is not None:
            context = context.flatten(0, 1)[packed.context_places][None]
        image = None if self.image is None else self.image(condition.image, None, first).to(x.dtype)
        streams = Streams(
            video=x,
            context=context,
            vector=chunks,
            context_vector=chunks if single is vector else self._chunks(single),
            rope=None if rope is None else rope.to(torch.promote_types(x.dtype, torch.float32)),
            mask=None,
            grid=segments,
            image=None if image is None else image.flatten(0, 1)[None],
            rows=rows,
            context_rows=each(packed.context_lengths),
            last=vector if self.config.out_groups == "own" else single,
            last_rows=rows if self.config.out_groups == "own" else whole,
        )
        y = self._through(streams, skip)
        parts = zip(y.split(segments.video, dim=1), grids, strict=True)
        return tuple(unpatchify(part, grid, self.config.patch) for part, grid in parts)

    def _through(self, streams: Streams, skip: Collection[int]) -> Float[Tensor, "B N out"]:
        """Take the tokens through the blocks, and read them out."""
        for index in skip:
            if not 0 <= index < len(self.blocks):
                raise ConfigError(f"skip takes blocks 0 to {len(self.blocks) - 1}, got {index}")
        streams = self.enter(streams)
        whole, here = (
            (streams.grid.whole, streams.grid.here) if isinstance(streams.grid, Share) else (streams.grid, None)
        )
        grids = (whole,) if isinstance(whole, Grid) else whole.grids
        for index, block in enumerate(self.blocks):
            if index:
                streams = replace(streams, video=self._with_positions(streams.video, grids, index, here))
            if index in skip:
                continue
            video, context = block(streams)
            streams = replace(streams, video=video, context=context)
        assert streams.last is not None
        x = streams.video if self.last_norm is None else self.last_norm(streams.video)
        shift, scale = self.modulation(streams.last)
        y = self.out(modulate(self.norm(x), shift, scale, streams.last_rows))
        return streams.grid.join(y) if isinstance(streams.grid, Share) else y

    def _embed(self, x: Float[Tensor, "B C T H W"], extra: Float[Tensor, "B E T H W"] | None) -> Float[Tensor, "B N D"]:
        if extra is not None and self.extra is None:
            x = torch.cat([x, extra], dim=1)
        if self.stem is not None:
            x = torch.cat([x, self.stem(x).to(x.dtype)], dim=1)
        tokens = self.embed(patchify(x, self.config.patch))
        return tokens if extra is None or self.extra is None else tokens + self.extra(extra)

    def _with_positions(
        self, x: Float[Tensor, "B N D"], grids: Sequence[Grid], block: int, here: slice | None = None
    ) -> Float[Tensor, "B N D"]:
        """Add the positions that are added before a block, to the tokens of one grid or of several, one after the other.

        The tokens are all, or those `here`.
        """

        def positions(grid: Grid) -> Tensor:
            if isinstance(absolute, Learned):
                return table(grid)
            if grid.t > 1 or absolute.still:
                return absolute.vectors(grid, self.config.dim, x.device)
            return x.new_zeros(grid.num_tokens, self.config.dim)

        tables = iter(self.tables)
        for absolute in self.config.absolute:
            if isinstance(absolute, Learned):
                table = next(tables)
                due = block == 0 or absolute.every
            else:
                due = absolute.before == block and (absolute.still or any(grid.t > 1 for grid in grids))
            if due:
                rows = [positions(grid) for grid in grids]
                every = rows[0] if len(rows) == 1 else torch.cat(rows)
                x = x + (every if here is None else every[here]).to(x.dtype)
        return x

    def _chunks(self, vector: Float[Tensor, "B groups V"]) -> Float[Tensor, "B groups width"]:
        """Return what blocks are given of the vector: itself, or the chunks that all share."""
        return vector if self.shared is None else self.shared.linear(F.silu(vector))

    def _check(self, latents: Tensor, t: Tensor, grid: Grid, condition: Condition) -> Float[Tensor, "B groups"]:
        if latents.shape[1] != self.config.in_channels:
            raise ConfigError(f"the model reads {self.config.in_channels} latent channels, got {latents.shape[1]}")
        groups = (1, grid.t, grid.num_tokens)
        if t.ndim == 2 and t.shape[1] not in groups:
            raise ConfigError(
                f"t takes {groups[0]}, {groups[1]} (frames) or {groups[2]} (tokens) values per clip, got {t.shape[1]}"
            )
        extra = 0 if condition.channels is None else condition.channels.shape[1]
        if extra != self.config.extra_channels:
            raise ConfigError(f"the model reads {self.config.extra_channels} channels beside the latents, got {extra}")
        for name, given, width in (
            ("context", condition.context, self.config.context_dim),
            ("image", condition.image, 0 if self.config.image is None else self.config.image.in_dim),
            ("vector", condition.vector, self.config.vector_dim),
            ("numbers", condition.numbers, len(self.config.numbers)),
            ("label", condition.label, self.config.num_classes),
        ):
            if (given is not None) != bool(width):
                raise ConfigError(f"the model {'needs' if width else 'has no door for'} condition.{name}")
            if given is not None and name != "label" and given.shape[-1] != width:
                raise ConfigError(f"the model reads condition.{name} of width {width}, got {given.shape[-1]}")
        sources = self.config.context.sources if isinstance(self.config.context, Sources) else ()
        widths, found = [s.in_dim for s in sources[1:]], [s.tokens.shape[-1] for s in condition.further or ()]
        if widths != found:
            raise ConfigError(f"the model reads condition.further of widths {widths}, got {found}")
        return t if t.ndim == 2 else t[:, None]

    def _rope(self, grid: Grid, token_rate: float | Tensor | None, device: torch.device) -> Rope | None:
        config = self.config
        if config.rope == "none":
            return None
        positions = token_positions(config.coordinates, grid, token_rate=token_rate, device=device)
        if isinstance(config.rope, str):
            turns = full_width_frequencies(config.dim, config.num_heads, theta=config.theta, device=device)
            return mixed_rope_table(positions, turns)
        if self.frequencies is not None:
            return mixed_rope_table(positions, self.frequencies)
        stretch: list[Stretch | None] = []
        if config.extension is not None and config.trained is not None:
            # An axis no longer than in training keeps its frequencies.
            lengths = [step * n for step, n in zip(config.coordinates.line(grid)[0], grid, strict=True)]
            stretch = [
                Stretch(config.extension, was, now) if now > was else None
                for was, now in zip(config.trained, lengths, strict=True)
            ]
        return rope_table(positions, config.rope, theta=config.theta, stretch=stretch)

    def _rope_of_row(self, packed: Packed, grids: list[Grid], device: torch.device) -> Rope | None:
        """Return the positions of every clip's tokens, each clip's from its own grid."""
        keys = [(grid, clip.token_rate) for grid, clip in zip(grids, packed.clips, strict=True)]
        tables = {key: self._rope(*key, device) for key in set(keys)}
        found = [table for key in keys if (table := tables[key]) is not None]
        return torch.cat(found, dim=-3) if found else None

    def _pooled(self, condition: Condition) -> Float[Tensor, "B V"] | None:
        if self.pool is None or condition.context is None:
            return None
        return self.pool(condition.context, condition.context_mask)

    def _vector(
        self, t: Float[Tensor, "B groups"], condition: Condition, pooled: Float[Tensor, "B V"] | None
    ) -> Float[Tensor, "B groups V"]:
        total = self.time(t)
        if self.vector is not None and condition.vector is not None:
            total = total + self.vector(condition.vector)[:, None]
        if condition.numbers is not None:
            for config, embed, number in zip(
                self.config.numbers, self.numbers, condition.numbers.unbind(1), strict=True
            ):
                part = embed(number[:, None])
                # Tokens at t = 1 are given, not made: a number may be none of their business.
                total = total + (part if config.clean else part * (t < 1).to(part.dtype)[..., None])
        if self.classes is not None and condition.label is not None:
            total = total + self.classes(condition.label)[:, None]
        if pooled is not None:
            total = total + pooled[:, None]
        return total

    def _context(self, condition: Condition, x: Tensor, t: Tensor) -> Source:
        if self.context is None or condition.context is None:
            return Source(x.new_zeros(x.shape[0], 0, self.config.context_width or self.config.dim))
        if isinstance(self.context, ContextSources):
            tokens, mask = self.context(condition.sources, t)
        else:
            tokens, mask = self.context(condition.context, condition.context_mask, t), condition.context_mask
        tokens = tokens.to(x.dtype)
        for table in self.tables:
            if isinstance(table, LearnedPositions) and table.config.context:
                tokens = tokens + table.of_context(tokens.shape[1]).to(x.dtype)
        return Source(tokens, mask)


def _with_video(mask: Bool[Tensor, "B L"] | None, grid: Grid) -> Bool[Tensor, "B 1 1 M"] | None:
    """Extend the context's mask by the video's tokens, which none hides."""
    if mask is None:
        return None
    return torch.cat([mask, mask.new_ones(mask.shape[0], grid.num_tokens)], dim=1)[:, None, None]


def _merged(context: Float[Tensor, "B L F"], dtype: torch.dtype) -> tuple[int, Float[Tensor, "1 1 1 _"] | None]:
    """Return how many tokens stand for all where the last ones are equal, and what is then added to their scores.

    A token with ln n counts as n. What the type at hand cannot say of ln n, one or two tokens more say. Weights keep the
    fastest kernels of attention away, so that all tokens are kept unless half of them can go.
    """
    length = context.shape[1]
    if context.is_meta or isinstance(context, FakeTensor) or not length:  # nothing is known of the features
        return length, None
    differ = (context != context[:, -1:]).any(2).any(0).nonzero()
    alone = int(differ.max()) + 1 if len(differ) else 0
    rest, logs, eps = float(length - alone), [], torch.finfo(dtype).eps
    while rest > eps * (length - alone):
        log = math.log(rest)
        logs.append(float(torch.tensor(log - eps * abs(log), dtype=dtype)))  # rounded, it is still below
        rest -= math.exp(logs[-1])
    if 2 * (alone + len(logs)) > length:
        return length, None
    return alone + len(logs), torch.tensor(alone * [0.0] + logs, dtype=dtype, device=context.device)[None, None, None]
