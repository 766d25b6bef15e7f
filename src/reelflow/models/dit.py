"""The video transformer: embed the latents' patches, walk a list of blocks, read out a prediction.

    tokens  = linear(patches of latents [+ channels door] [+ stem]) [+ sin-cos positions] [+ residual door]
    context = linear(context door)
    vector  = embed(t) [+ embed(vector door)] [+ class row]          one per clip, per frame or per token
    tokens  = blocks(tokens, context, vector, rotary positions)
    output  = unpatchify(linear(modulate(norm(tokens))))

What the output means (velocity, noise, data) is not the network's affair; it learns what the process asks of it.
"""

from collections.abc import Collection
from dataclasses import replace
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from reelflow.config import configuration
from reelflow.errors import ConfigError
from reelflow.models.blocks import Branches, Cross, Layer, Single, Streams, build_block
from reelflow.models.condition import Condition
from reelflow.nn.embed import Learned, LearnedPositions, SinCos, TimeEmbedding, VectorEmbedding, grid_sinusoid
from reelflow.nn.mlp import Activation
from reelflow.nn.modulation import Modulation, modulate
from reelflow.nn.patchify import Grid, Patch, patchify, token_grid, unpatchify
from reelflow.nn.rope import (
    Coordinates,
    Extension,
    Rope,
    Steps,
    Stretch,
    axial_frequencies,
    check_axes,
    grid_positions,
    mixed_rope_table,
    rope_table,
    token_positions,
)

__all__ = ["DiTConfig", "VideoDiT"]


@configuration
class DiTConfig:
    """Shape of a `VideoDiT`.

    Raises:
        ConfigError: heads do not divide the width, the rotary split does not fill a head, an extent is impossible, or a
            layer needs a context stream that is not there or has another width.
    """

    in_channels: int  # latent channels
    dim: int
    num_heads: int
    layers: tuple[Layer, ...]
    patch: Patch = Patch(1, 2, 2)
    rope: tuple[int, int, int] = (16, 24, 24)  # head channels turned by t, h, w
    absolute: Literal["none", "sincos"] | SinCos | Learned = (
        "none"  # positions added to the tokens, beside the rotary ones
    )
    theta: float = 10_000.0  # base of rotary and absolute frequencies; about 100 suits grids of a few tokens a side
    coordinates: Coordinates = Steps()  # where tokens stand, for the rotary positions
    frequencies: Literal["fixed", "learned"] = "fixed"  # learned: per head, each pair mixes t, h and w
    extension: Extension | None = None  # for axes longer than `trained`
    trained: tuple[float, float, float] | None = None  # lengths of t, h, w in training, in units of position
    activation: Activation = "gelu_tanh"
    stem: int = 0  # channels of a 3 x 3 x 3 convolution set beside the latents, so that patches know their neighbours
    context_dim: int = 0  # width of the context door's features; 0 closes it
    context_width: int = 0  # width of the context stream inside; 0: dim
    vector_dim: int = 0  # width of the vector door's features; 0 closes it
    extra_channels: int = 0  # channels door
    num_classes: int = 0  # rows of the class table, to which one more is added for "no class"
    out_channels: int = 0  # of the prediction; 0: in_channels (twice as many carry a learned variance)

    def __post_init__(self) -> None:
        for name in ("stem", "extra_channels", "out_channels", "context_width"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name} counts channels, got {getattr(self, name)}; nearest: 0")
        if self.in_channels < 1 or min(self.patch) < 1:
            raise ConfigError(
                f"in_channels and patch must be at least 1, got {self.in_channels} and {tuple(self.patch)}"
            )
        if self.dim < 1 or self.num_heads < 1 or self.dim % self.num_heads:
            near = max(1, round(self.dim / max(1, self.num_heads))) * max(1, self.num_heads)
            raise ConfigError(
                f"dim must be a multiple of num_heads ({self.num_heads}), got {self.dim}; nearest: {near}"
            )
        check_axes(self.rope, self.dim // self.num_heads)
        if isinstance(self.absolute, SinCos) and self.absolute.split is not None:
            check_axes(self.absolute.split, self.dim, parts="sin-cos parts", whole="width")
        if (self.extension is None) != (self.trained is None) or (self.extension and self.frequencies == "learned"):
            raise ConfigError(
                "an extension needs the trained lengths, and fixed frequencies; got "
                f"extension={self.extension}, trained={self.trained}, frequencies={self.frequencies!r}"
            )
        for index, layer in enumerate(self.layers):
            if isinstance(layer, Single) and self.context_width not in (0, self.dim):
                raise ConfigError(
                    f"layers[{index}] is a Single, which joins streams of one width; got dim={self.dim} and "
                    f"context_width={self.context_width}; nearest: context_width=0"
                )
            if isinstance(layer, Branches) and not self.context_dim:
                for branch in layer.branches:
                    if isinstance(branch, Cross):
                        raise ConfigError(
                            f"layers[{index}] attends to a context, but context_dim is 0; set it to the features' width"
                        )


class VideoDiT(nn.Module):
    """A video diffusion transformer (see the module's docstring)."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.config = config
        dim, cells = config.dim, config.patch.t * config.patch.h * config.patch.w
        channels = config.in_channels + config.extra_channels
        self.stem = nn.Conv3d(channels, config.stem, 3, padding=1) if config.stem else None
        self.embed = nn.Linear((channels + config.stem) * cells, dim)
        self.table = LearnedPositions(config.absolute, dim) if isinstance(config.absolute, Learned) else None
        start = axial_frequencies(config.rope, theta=config.theta).float()[:, None].repeat(1, config.num_heads, 1)
        self.frequencies = nn.Parameter(start) if config.frequencies == "learned" else None
        self.time = TimeEmbedding(dim)
        self.vector = VectorEmbedding(config.vector_dim, dim) if config.vector_dim else None
        self.classes = nn.Embedding(config.num_classes + 1, dim) if config.num_classes else None
        width = config.context_width or dim
        self.context = nn.Linear(config.context_dim, width) if config.context_dim else None
        self.blocks = nn.ModuleList(
            build_block(layer, dim, config.num_heads, dim, config.activation, context_width=width)
            for layer in config.layers
        )
        self.norm = nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False)
        self.modulation = Modulation(dim, dim, 2)
        self.out = nn.Linear(dim, (config.out_channels or config.in_channels) * cells)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(
        self,
        latents: Float[Tensor, "B C T H W"],
        t: Float[Tensor, "B"] | Float[Tensor, "B groups"],
        condition: Condition = Condition(),
        *,
        skip: Collection[int] = (),
        token_rate: float | Float[Tensor, "B"] | None = None,
    ) -> Float[Tensor, "B out T H W"]:
        """Predict from noisy latents at time t in [0, 1] (0 is noise, 1 is data).

        `t` is one number per clip, or a row per clip with one number per token frame or per token, in scan order.
        Blocks whose index is in `skip` are passed by: a weaker model for guidance to lead away from.

        Raises:
            ConfigError: extents do not fit the patch or a layer's pattern of attention; a door is used that the model
                does not have, or the reverse; what comes through it has another width; or `skip` names no block.
        """
        grid = token_grid(latents.shape[2:], self.config.patch)
        t = self._check(latents, t, grid, condition)
        for index in skip:
            if not 0 <= index < len(self.blocks):
                raise ConfigError(f"skip takes blocks 0 to {len(self.blocks) - 1}, got {index}")
        x = latents if condition.channels is None else torch.cat([latents, condition.channels], dim=1)
        if self.stem is not None:
            x = torch.cat([x, self.stem(x).to(x.dtype)], dim=1)
        x = self.embed(patchify(x, self.config.patch))
        absolute = SinCos(max_period=self.config.theta) if self.config.absolute == "sincos" else self.config.absolute
        if isinstance(absolute, SinCos):
            waves = grid_sinusoid(
                grid_positions(*grid, device=x.device),
                self.config.dim,
                max_period=absolute.max_period,
                split=absolute.split,
                first=absolute.first,
            )
            x = x + waves.to(x.dtype)
        if self.table is not None:
            x = x + self.table(grid).to(x.dtype)
        if condition.residual is not None:
            x = x + condition.residual
        vector = self.time(t) + self._vector(condition)
        context = self._context(condition, x)
        streams = Streams(
            video=x,
            context=context,
            vector=vector,
            # A context token belongs to no frame: it is told of the noisiest one, whose work is still to be done.
            context_vector=vector if t.shape[1] == 1 else self.time(t.amin(1, keepdim=True)) + self._vector(condition),
            rope=self._rope(grid, token_rate, x.device).to(torch.promote_types(x.dtype, torch.float32)),
            mask=self._mask(condition, grid),
            grid=grid,
        )
        for index, block in enumerate(self.blocks):
            if index in skip:
                continue
            video, context = block(streams)
            streams = replace(streams, video=video, context=context)
        shift, scale = self.modulation(vector)
        return unpatchify(self.out(modulate(self.norm(streams.video), shift, scale)), grid, self.config.patch)

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
            ("vector", condition.vector, self.config.vector_dim),
            ("label", condition.label, self.config.num_classes),
        ):
            if (given is not None) != bool(width):
                raise ConfigError(f"the model {'needs' if width else 'has no door for'} condition.{name}")
            if given is not None and name != "label" and given.shape[-1] != width:
                raise ConfigError(f"the model reads condition.{name} of width {width}, got {given.shape[-1]}")
        return t if t.ndim == 2 else t[:, None]

    def _rope(self, grid: Grid, token_rate: float | Tensor | None, device: torch.device) -> Rope:
        config = self.config
        positions = token_positions(config.coordinates, grid, token_rate=token_rate, device=device)
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

    def _vector(self, condition: Condition) -> Float[Tensor, "B 1 D"] | float:
        total: Tensor | float = 0.0
        if self.vector is not None and condition.vector is not None:
            total = total + self.vector(condition.vector)[:, None]
        if self.classes is not None and condition.label is not None:
            total = total + self.classes(condition.label)[:, None]
        return total

    def _context(self, condition: Condition, x: Tensor) -> Float[Tensor, "B L C"]:
        if self.context is None or condition.context is None:
            return x.new_zeros(x.shape[0], 0, self.config.context_width or self.config.dim)
        return self.context(condition.context).to(x.dtype)

    def _mask(self, condition: Condition, grid: Grid) -> Tensor | None:
        if condition.context_mask is None:
            return None
        seen = condition.context_mask.new_ones(condition.context_mask.shape[0], grid.num_tokens)
        return torch.cat([condition.context_mask, seen], dim=1)[:, None, None]
