"""Transformer blocks: lists of residual branches `x <- x + gate * f(modulate(norm(x)))`.

    Dual     two streams, video and context, with their own weights and one joint attention (Esser et al. 2024, MM-DiT)
    Single   one stream, context then video, attention and MLP side by side in one branch (Dehghani et al. 2023)

A block kind is a value in the model's list of layers; a new kind is a new class here.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from reelflow.config import configuration
from reelflow.nn.attention import HeadNorm, attend, split_heads
from reelflow.nn.mlp import Activation, Mlp, activate, inner_width
from reelflow.nn.modulation import Modulation, gated, modulate, spread
from reelflow.nn.rope import apply_rope

__all__ = ["Dual", "DualBlock", "Layer", "Single", "SingleBlock", "Streams", "build_block"]


@configuration
class Dual:
    """A `DualBlock`; the MLP is `mlp_ratio` times as wide as the stream."""

    kind: Literal["dual"] = "dual"
    mlp_ratio: float = 4.0


@configuration
class Single:
    """A `SingleBlock`."""

    kind: Literal["single"] = "single"
    mlp_ratio: float = 4.0


Layer = Dual | Single


@dataclass(frozen=True)
class Streams:
    """What blocks pass on, and what they look at.

    `vector` has one row per group of video tokens (per clip, per frame or per token); `context_vector` has one.
    """

    video: Float[Tensor, "B N D"]
    context: Float[Tensor, "B L D"]
    vector: Float[Tensor, "B groups V"]
    context_vector: Float[Tensor, "B 1 V"]
    rope: Float[Tensor, "N half 2"]
    mask: Bool[Tensor, "B 1 1 L+N"] | None


def rotated(x: Float[Tensor, "B heads M d"], rope: Float[Tensor, "N half 2"]) -> Float[Tensor, "B heads M d"]:
    """Rotate the last N tokens, which are the video's; the context before them has no position."""
    length = x.shape[2] - rope.shape[0]
    if length == 0:
        return apply_rope(x, rope)
    return torch.cat([x[:, :, :length], apply_rope(x[:, :, length:], rope)], dim=2)


class Projection(nn.Module):
    """Queries, keys and values of one stream, normalised per head."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.norm_q, self.norm_k = (HeadNorm(dim // num_heads, eps=1e-6) for _ in range(2))

    def forward(self, x: Float[Tensor, "B N D"]) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = (split_heads(part, self.num_heads) for part in self.qkv(x).chunk(3, dim=-1))
        return self.norm_q(q), self.norm_k(k), v


class DualStream(nn.Module):
    """One stream's half of a `DualBlock`: everything but the attention itself."""

    def __init__(self, dim: int, num_heads: int, vector_dim: int, mlp_ratio: float, activation: Activation) -> None:
        super().__init__()
        self.modulation = Modulation(vector_dim, dim, 6)
        self.norm1 = nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False)
        self.project = Projection(dim, num_heads)
        self.out = nn.Linear(dim, dim)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False)
        self.mlp = Mlp(dim, round(mlp_ratio * dim), activation=activation)

    def finish(self, x: Tensor, attention: Tensor, gate: Tensor, mlp: tuple[Tensor, ...]) -> Tensor:
        """Add the attention's branch, then the MLP's."""
        x = gated(x, gate, self.out(attention))
        shift, scale, mlp_gate = mlp
        return gated(x, mlp_gate, self.mlp(modulate(self.norm2(x), shift, scale)))


class DualBlock(nn.Module):
    """Two streams with their own weights that attend jointly."""

    def __init__(self, spec: Dual, dim: int, num_heads: int, vector_dim: int, activation: Activation) -> None:
        super().__init__()
        self.video = DualStream(dim, num_heads, vector_dim, spec.mlp_ratio, activation)
        self.context = DualStream(dim, num_heads, vector_dim, spec.mlp_ratio, activation)

    def forward(self, s: Streams) -> tuple[Float[Tensor, "B N D"], Float[Tensor, "B L D"]]:
        shift, scale, gate, *mlp = self.video.modulation(s.vector)
        c_shift, c_scale, c_gate, *c_mlp = self.context.modulation(s.context_vector)
        q, k, v = self.video.project(modulate(self.video.norm1(s.video), shift, scale))
        cq, ck, cv = self.context.project(modulate(self.context.norm1(s.context), c_shift, c_scale))

        q = torch.cat([cq, apply_rope(q, s.rope)], dim=2)
        k = torch.cat([ck, apply_rope(k, s.rope)], dim=2)
        joint = attend(q, k, torch.cat([cv, v], dim=2), mask=s.mask)
        length = s.context.shape[1]
        video = self.video.finish(s.video, joint[:, length:], gate, tuple(mlp))
        context = self.context.finish(s.context, joint[:, :length], c_gate, tuple(c_mlp))
        return video, context


class SingleBlock(nn.Module):
    """One stream: attention and MLP read the same normalised tokens and leave through one linear map."""

    def __init__(self, spec: Single, dim: int, num_heads: int, vector_dim: int, activation: Activation) -> None:
        super().__init__()
        hidden = round(spec.mlp_ratio * dim)
        self.activation: Activation = activation
        self.modulation = Modulation(vector_dim, dim, 3)
        self.norm = nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False)
        self.project = Projection(dim, num_heads)
        self.up = nn.Linear(dim, inner_width(activation, hidden))
        self.out = nn.Linear(dim + hidden, dim)

    def forward(self, s: Streams) -> tuple[Float[Tensor, "B N D"], Float[Tensor, "B L D"]]:
        x = torch.cat([s.context, s.video], dim=1)
        shift, scale, gate = (self._join(s, *pair) for pair in self._modulations(s))
        y = modulate(self.norm(x), shift, scale)
        q, k, v = self.project(y)
        attention = attend(rotated(q, s.rope), rotated(k, s.rope), v, mask=s.mask)
        x = gated(x, gate, self.out(torch.cat([attention, activate(self.up(y), self.activation)], dim=-1)))
        length = s.context.shape[1]
        return x[:, length:], x[:, :length]

    def _modulations(self, s: Streams) -> list[tuple[Tensor, Tensor]]:
        video = self.modulation(s.vector)
        context = video if s.vector.shape[1] == 1 else self.modulation(s.context_vector)
        return list(zip(context, video, strict=True))

    def _join(self, s: Streams, context: Tensor, video: Tensor) -> Tensor:
        """One row when the whole sequence shares it, else one row per token of [context, video]."""
        if video.shape[1] == 1:
            return video
        return torch.cat([context.expand(-1, s.context.shape[1], -1), spread(video, s.video.shape[1])], dim=1)


def build_block(
    spec: Layer, dim: int, num_heads: int, vector_dim: int, activation: Activation
) -> DualBlock | SingleBlock:
    """Return the module of a layer's specification."""
    if isinstance(spec, Dual):
        return DualBlock(spec, dim, num_heads, vector_dim, activation)
    return SingleBlock(spec, dim, num_heads, vector_dim, activation)
