"""The video transformer: embed the latents' patches, walk a list of blocks, read out a prediction.

    tokens  = linear(patches of latents [+ channels door] [+ stem]) [+ sin-cos positions] [+ residual door]
    context = linear(context door)
    vector  = embed(t) [+ embed(vector door)] [+ class row]          one per clip, per frame or per token
    tokens  = blocks(tokens, context, vector, rotary positions)
    output  = unpatchify(linear(modulate(norm(tokens))))

What the output means (velocity, noise, data) is not the network's affair; it learns what the process asks of it.
"""

from dataclasses import replace
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from reelflow.config import configuration
from reelflow.errors import ConfigError
from reelflow.models.blocks import Layer, Streams, build_block
from reelflow.models.condition import Condition
from reelflow.nn.embed import TimeEmbedding, VectorEmbedding, grid_sinusoid
from reelflow.nn.mlp import Activation
from reelflow.nn.modulation import Modulation, modulate
from reelflow.nn.patchify import Grid, Patch, patchify, token_grid, unpatchify
from reelflow.nn.rope import check_axes, grid_positions, rope_table

__all__ = ["DiTConfig", "VideoDiT"]


@configuration
class DiTConfig:
    """Shape of a `VideoDiT`.

    Raises:
        ConfigError: heads do not divide the width, the rotary split does not fill a head, or an extent is impossible.
    """

    in_channels: int  # latent channels
    dim: int
    num_heads: int
    layers: tuple[Layer, ...]
    patch: Patch = Patch(1, 2, 2)
    rope: tuple[int, int, int] = (16, 24, 24)  # head channels turned by t, h, w
    absolute: Literal["none", "sincos"] = "none"  # positions added to the tokens, beside the rotary ones
    theta: float = 10_000.0  # base of rotary and absolute frequencies; about 100 suits grids of a few tokens a side
    activation: Activation = "gelu_tanh"
    stem: int = 0  # channels of a 3 x 3 x 3 convolution set beside the latents, so that patches know their neighbours
    context_dim: int = 0  # width of the context door's features; 0 closes it
    vector_dim: int = 0  # width of the vector door's features; 0 closes it
    extra_channels: int = 0  # channels door
    num_classes: int = 0  # rows of the class table, to which one more is added for "no class"

    def __post_init__(self) -> None:
        if self.stem < 0 or self.extra_channels < 0:
            raise ConfigError(f"stem and extra_channels count channels, got {self.stem} and {self.extra_channels}")
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


class VideoDiT(nn.Module):
    """A video diffusion transformer (see the module's docstring)."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.config = config
        dim, cells = config.dim, config.patch.t * config.patch.h * config.patch.w
        channels = config.in_channels + config.extra_channels
        self.stem = nn.Conv3d(channels, config.stem, 3, padding=1) if config.stem else None
        self.embed = nn.Linear((channels + config.stem) * cells, dim)
        self.time = TimeEmbedding(dim)
        self.vector = VectorEmbedding(config.vector_dim, dim) if config.vector_dim else None
        self.classes = nn.Embedding(config.num_classes + 1, dim) if config.num_classes else None
        self.context = nn.Linear(config.context_dim, dim) if config.context_dim else None
        self.blocks = nn.ModuleList(
            build_block(layer, dim, config.num_heads, dim, config.activation) for layer in config.layers
        )
        self.norm = nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False)
        self.modulation = Modulation(dim, dim, 2)
        self.out = nn.Linear(dim, config.in_channels * cells)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(
        self,
        latents: Float[Tensor, "B C T H W"],
        t: Float[Tensor, "B"] | Float[Tensor, "B groups"],
        condition: Condition = Condition(),
    ) -> Float[Tensor, "B C T H W"]:
        """Predict from noisy latents at time t in [0, 1] (0 is noise, 1 is data).

        `t` is one number per clip, or a row per clip with one number per token frame or per token, in scan order.

        Raises:
            ConfigError: extents do not fit the patch; a door is used that the model does not have, or the reverse; or
                what comes through it has another width.
        """
        grid = token_grid(latents.shape[2:], self.config.patch)
        t = self._check(latents, t, grid, condition)
        x = latents if condition.channels is None else torch.cat([latents, condition.channels], dim=1)
        if self.stem is not None:
            x = torch.cat([x, self.stem(x).to(x.dtype)], dim=1)
        x = self.embed(patchify(x, self.config.patch))
        positions = grid_positions(*grid, device=x.device)
        if self.config.absolute == "sincos":
            x = x + grid_sinusoid(positions, self.config.dim, max_period=self.config.theta).to(x.dtype)
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
            rope=rope_table(positions, self.config.rope, theta=self.config.theta).to(
                torch.promote_types(x.dtype, torch.float32)
            ),
            mask=self._mask(condition, grid),
        )
        for block in self.blocks:
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

    def _vector(self, condition: Condition) -> Float[Tensor, "B 1 D"] | float:
        total: Tensor | float = 0.0
        if self.vector is not None and condition.vector is not None:
            total = total + self.vector(condition.vector)[:, None]
        if self.classes is not None and condition.label is not None:
            total = total + self.classes(condition.label)[:, None]
        return total

    def _context(self, condition: Condition, x: Tensor) -> Float[Tensor, "B L D"]:
        if self.context is None or condition.context is None:
            return x.new_zeros(x.shape[0], 0, x.shape[2])
        return self.context(condition.context).to(x.dtype)

    def _mask(self, condition: Condition, grid: Grid) -> Tensor | None:
        if condition.context_mask is None:
            return None
        seen = condition.context_mask.new_ones(condition.context_mask.shape[0], grid.num_tokens)
        return torch.cat([condition.context_mask, seen], dim=1)[:, None, None]
