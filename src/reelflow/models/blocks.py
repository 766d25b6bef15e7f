"""Transformer blocks: lists of residual branches `x <- x + gate * f(modulate(norm(x)))`.

    Dual       two streams, video and context, with their own weights and one joint attention (Esser et al. 2024, MM-DiT)
    Single     one stream, context then video, attention and MLP side by side in one branch (Dehghani et al. 2023)
    Branches   the video stream alone, any list of branches: `Attend`, `Cross` (reads the context), `FeedForward`

A block kind is a value in the model's list of layers; a new kind is a new class here. Which tokens attend to which is
a value too (`reelflow.nn.patterns`), and what changes from layer to layer is said by the list:

    factorised = Branches((Attend(Space()), Attend(Time()), FeedForward()))
    with_text  = Branches((Attend(Space()), Attend(Time()), Cross(), FeedForward()))
    periodic   = 7 * (*3 * (factorised,), Branches((Attend(Full()), FeedForward())))
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from reelflow.config import configuration
from reelflow.errors import ConfigError
from reelflow.nn.attention import HeadNorm, attend, split_heads
from reelflow.nn.mlp import Activation, Mlp, activate, inner_width
from reelflow.nn.modulation import Modulation, gated, modulate, spread
from reelflow.nn.patchify import Grid
from reelflow.nn.patterns import Full, Gated, Pattern, attend_pattern
from reelflow.nn.qk import queries_keys_values
from reelflow.nn.rope import Rope

__all__ = [
    "Attend",
    "Branch",
    "Branches",
    "BranchesBlock",
    "Cross",
    "Dual",
    "DualBlock",
    "FeedForward",
    "Gate",
    "Layer",
    "Single",
    "SingleBlock",
    "Streams",
    "build_block",
    "gate_values",
]


@configuration
class Dual:
    """A `DualBlock`; each stream's MLP is `mlp_ratio` times as wide as the stream.

    Without `context_out` the context is read and left as it is, and all that would have changed it is left out: what a
    last block needs, whose context nobody reads.
    """

    kind: Literal["dual"] = "dual"
    mlp_ratio: float = 4.0
    attend: Pattern = Full()
    context_out: bool = True

    def __post_init__(self) -> None:
        _check_ratio("mlp_ratio", self.mlp_ratio)


@configuration
class Single:
    """A `SingleBlock`."""

    kind: Literal["single"] = "single"
    mlp_ratio: float = 4.0
    attend: Pattern = Full()

    def __post_init__(self) -> None:
        _check_ratio("mlp_ratio", self.mlp_ratio)


Norm = Literal["adaptive", "plain"]
"""What goes before a branch, and after it.

    adaptive   layer norm, then shift and scale; the branch's result is gated; all three are the vector's (AdaLN-zero)
    plain      layer norm with its own weights; the result is added as it is, and the last matrix begins at zero
"""


@configuration
class Attend:
    """A branch of attention among the video's tokens."""

    pattern: Pattern = Full()
    norm: Norm = "adaptive"
    kind: Literal["attend"] = "attend"


@configuration
class Cross:
    """A branch of attention from the video's tokens to the context's, which it does not change."""

    norm: Norm = "plain"
    kind: Literal["cross"] = "cross"


@configuration
class FeedForward:
    """A branch of an MLP, `ratio` times as wide as the stream."""

    ratio: float = 4.0
    norm: Norm = "adaptive"
    kind: Literal["feed_forward"] = "feed_forward"

    def __post_init__(self) -> None:
        _check_ratio("ratio", self.ratio)


Branch = Attend | Cross | FeedForward


@configuration
class Branches:
    """A `BranchesBlock`: branches on the video stream, in this order."""

    branches: tuple[Branch, ...]
    kind: Literal["branches"] = "branches"

    def __post_init__(self) -> None:
        if not self.branches:
            raise ConfigError("a block without branches does nothing; for example Branches((Attend(), FeedForward()))")


Layer = Dual | Single | Branches


def _check_ratio(name: str, ratio: float) -> None:
    if ratio <= 0:
        raise ConfigError(f"{name} must be above 0, got {ratio}; 4 is usual")


@dataclass(frozen=True)
class Streams:
    """What blocks pass on, and what they look at.

    `vector` has one row per group of video tokens (per clip, per frame or per token); `context_vector` has one.
    `rope` turns each video token by its own place in the grid, whatever the pattern of attention. `mask` hides padded
    context tokens; video tokens are never hidden.
    """

    video: Float[Tensor, "B N D"]
    context: Float[Tensor, "B L C"]
    vector: Float[Tensor, "B groups V"]
    context_vector: Float[Tensor, "B 1 V"]
    rope: Rope
    mask: Bool[Tensor, "B 1 1 L+N"] | None
    grid: Grid


class Gate(nn.Module):
    """The alpha in [0, 1] of a `Gated` pattern, 1/2 at the start: the sigmoid of a logit, or of a map of each token."""

    last: Tensor

    def __init__(self, pattern: Gated, dim: int, num_heads: int) -> None:
        super().__init__()
        per_token = pattern.granularity == "token"
        self.logit = None if per_token else nn.Parameter(torch.zeros(num_heads if pattern.granularity == "head" else 1))
        self.linear = nn.Linear(dim, 1) if per_token else None
        if self.linear is not None:
            nn.init.zeros_(self.linear.weight)
            nn.init.zeros_(self.linear.bias)
            self.register_buffer("last", torch.tensor(0.5), persistent=False)

    def forward(self, x: Float[Tensor, "B N D"]) -> Float[Tensor, "#B #N #heads"]:
        if self.linear is None:
            assert self.logit is not None
            return self.logit.sigmoid()[None, None]
        alpha = self.linear(x).sigmoid()
        self.last.copy_(alpha.detach().mean())
        return alpha

    def mean(self) -> float:
        """Return the mean alpha: now, or, where it depends on the tokens, over those last seen (1/2 before any)."""
        return float(self.last if self.logit is None else self.logit.detach().float().sigmoid().mean())


def gate_values(model: nn.Module) -> dict[str, float]:
    """Return the mean alpha (the share of space against time) of every gate of a model, by the name of its block."""
    return {name.removesuffix(".gate"): gate.mean() for name, gate in model.named_modules() if isinstance(gate, Gate)}


def _gate(pattern: Pattern, dim: int, num_heads: int) -> Gate | None:
    return Gate(pattern, dim, num_heads) if isinstance(pattern, Gated) else None


def _alpha(gate: Gate | None, x: Tensor) -> Tensor | None:
    return None if gate is None else gate(x)


class Projection(nn.Module):
    """Queries, keys and values of one stream, normalised per head; `dim` is the width of each of the three."""

    def __init__(self, dim: int, num_heads: int, *, in_dim: int | None = None) -> None:
        super().__init__()
        self.qkv = nn.Linear(in_dim or dim, 3 * dim)
        self.norm_q, self.norm_k = (HeadNorm(dim // num_heads, eps=1e-6) for _ in range(2))

    def forward(self, x: Float[Tensor, "B M I"], rope: Rope | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Positions belong to the last tokens of x; context before them has none."""
        return queries_keys_values(self.qkv(x), self.norm_q, self.norm_k, rope)


class Read(nn.Module):
    """Keys and values of a stream that asks nothing, normalised per head; `dim` is the width of each of the two."""

    def __init__(self, dim: int, num_heads: int, *, in_dim: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.kv = nn.Linear(in_dim, 2 * dim)
        self.norm_k = HeadNorm(dim // num_heads, eps=1e-6)

    def forward(self, x: Float[Tensor, "B L I"]) -> tuple[Tensor, Tensor]:
        k, v = (split_heads(part, self.num_heads) for part in self.kv(x).chunk(2, dim=-1))
        return self.norm_k(k), v


class DualStream(nn.Module):
    """One stream's half of a `DualBlock`: everything but the attention itself.

    The stream may be narrower than the attention, whose queries, keys and values are `attention_dim` wide.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        vector_dim: int,
        mlp_ratio: float,
        activation: Activation,
        *,
        attention_dim: int,
    ) -> None:
        super().__init__()
        self.modulation = Modulation(vector_dim, dim, 6)
        self.norm1 = nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False)
        self.project = Projection(attention_dim, num_heads, in_dim=dim)
        self.out = nn.Linear(attention_dim, dim)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False)
        self.mlp = Mlp(dim, round(mlp_ratio * dim), activation=activation)

    def finish(self, x: Tensor, attention: Tensor, gate: Tensor, mlp: tuple[Tensor, ...]) -> Tensor:
        """Add the attention's branch, then the MLP's."""
        x = gated(x, gate, self.out(attention))
        shift, scale, mlp_gate = mlp
        return gated(x, mlp_gate, self.mlp(modulate(self.norm2(x), shift, scale)))


class ReadStream(nn.Module):
    """What is left of a `DualStream` that is read only."""

    def __init__(self, dim: int, num_heads: int, vector_dim: int, *, attention_dim: int) -> None:
        super().__init__()
        self.modulation = Modulation(vector_dim, dim, 2)
        self.norm1 = nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False)
        self.project = Read(attention_dim, num_heads, in_dim=dim)


class DualBlock(nn.Module):
    """Two streams with their own weights, and perhaps widths, that attend jointly."""

    def __init__(
        self, spec: Dual, dim: int, num_heads: int, vector_dim: int, activation: Activation, context_width: int
    ) -> None:
        super().__init__()
        self.pattern = spec.attend
        self.video = DualStream(dim, num_heads, vector_dim, spec.mlp_ratio, activation, attention_dim=dim)
        self.context = (
            DualStream(context_width, num_heads, vector_dim, spec.mlp_ratio, activation, attention_dim=dim)
            if spec.context_out
            else ReadStream(context_width, num_heads, vector_dim, attention_dim=dim)
        )
        self.gate = _gate(spec.attend, dim, num_heads)

    def forward(self, s: Streams) -> tuple[Float[Tensor, "B N D"], Float[Tensor, "B L C"]]:
        shift, scale, gate, *mlp = self.video.modulation(s.vector)
        c_shift, c_scale, *c_rest = self.context.modulation(s.context_vector)
        x = modulate(self.video.norm1(s.video), shift, scale)
        q, k, v = self.video.project(x, s.rope)
        *cq, ck, cv = self.context.project(modulate(self.context.norm1(s.context), c_shift, c_scale))

        q, k, v = (torch.cat(parts, dim=2) for parts in ([*cq, q], [ck, k], [cv, v]))
        joint = attend_pattern(self.pattern, q, k, v, s.grid, mask=s.mask, alpha=_alpha(self.gate, x))
        length = joint.shape[1] - s.video.shape[1]  # 0 when the context only is read
        video = self.video.finish(s.video, joint[:, length:], gate, tuple(mlp))
        if isinstance(self.context, ReadStream):
            return video, s.context
        c_gate, *c_mlp = c_rest
        return video, self.context.finish(s.context, joint[:, :length], c_gate, tuple(c_mlp))


class SingleBlock(nn.Module):
    """One stream: attention and MLP read the same normalised tokens and leave through one linear map."""

    def __init__(self, spec: Single, dim: int, num_heads: int, vector_dim: int, activation: Activation) -> None:
        super().__init__()
        hidden = round(spec.mlp_ratio * dim)
        self.pattern = spec.attend
        self.activation: Activation = activation
        self.modulation = Modulation(vector_dim, dim, 3)
        self.norm = nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False)
        self.project = Projection(dim, num_heads)
        self.up = nn.Linear(dim, inner_width(activation, hidden))
        self.out = nn.Linear(dim + hidden, dim)
        self.gate = _gate(spec.attend, dim, num_heads)

    def forward(self, s: Streams) -> tuple[Float[Tensor, "B N D"], Float[Tensor, "B L D"]]:
        x, length = torch.cat([s.context, s.video], dim=1), s.context.shape[1]
        shift, scale, gate = (self._join(s, *pair) for pair in self._modulations(s))
        y = modulate(self.norm(x), shift, scale)
        q, k, v = self.project(y, s.rope)
        alpha = _alpha(self.gate, y[:, length:])
        attention = attend_pattern(self.pattern, q, k, v, s.grid, mask=s.mask, alpha=alpha)
        x = gated(x, gate, self.out(torch.cat([attention, activate(self.up(y), self.activation)], dim=-1)))
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


class SelfAttention(nn.Module):
    """The function of an `Attend` branch."""

    def __init__(self, pattern: Pattern, dim: int, num_heads: int) -> None:
        super().__init__()
        self.pattern = pattern
        self.project = Projection(dim, num_heads)
        self.out = nn.Linear(dim, dim)
        self.gate = _gate(pattern, dim, num_heads)

    def forward(self, x: Float[Tensor, "B N D"], s: Streams) -> Float[Tensor, "B N D"]:
        q, k, v = self.project(x, s.rope)
        return self.out(attend_pattern(self.pattern, q, k, v, s.grid, alpha=_alpha(self.gate, x)))


class CrossAttention(nn.Module):
    """The function of a `Cross` branch. A clip without context tokens reads nothing, and adds the last bias."""

    def __init__(self, dim: int, num_heads: int, context_width: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.query = nn.Linear(dim, dim)
        self.norm_q = HeadNorm(dim // num_heads, eps=1e-6)
        self.read = Read(dim, num_heads, in_dim=context_width)
        self.out = nn.Linear(dim, dim)

    def forward(self, x: Float[Tensor, "B N D"], s: Streams) -> Float[Tensor, "B N D"]:
        q = self.norm_q(split_heads(self.query(x), self.num_heads))
        k, v = self.read(s.context)
        return self.out(attend(q, k, v, mask=None if s.mask is None else s.mask[..., : s.context.shape[1]]))


class Residual(nn.Module):
    """One branch with what goes before and after it."""

    def __init__(self, spec: Branch, dim: int, num_heads: int, activation: Activation, context_width: int) -> None:
        super().__init__()
        self.adaptive = spec.norm == "adaptive"
        self.norm = nn.LayerNorm(dim, eps=1e-6, elementwise_affine=not self.adaptive)
        self.function: SelfAttention | CrossAttention | Mlp
        if isinstance(spec, Attend):
            self.function = SelfAttention(spec.pattern, dim, num_heads)
        elif isinstance(spec, Cross):
            self.function = CrossAttention(dim, num_heads, context_width)
        else:
            self.function = Mlp(dim, round(spec.ratio * dim), activation=activation)
        if not self.adaptive:
            last = self.function.down if isinstance(self.function, Mlp) else self.function.out
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)

    def forward(
        self, x: Float[Tensor, "B N D"], s: Streams, modulation: Iterator[Float[Tensor, "B groups D"]]
    ) -> Float[Tensor, "B N D"]:
        """Add the branch to x; an adaptive one takes its shift, scale and gate from `modulation`."""
        if not self.adaptive:
            return x + self._branch(self.norm(x), s).to(x.dtype)
        shift, scale, gate = (next(modulation) for _ in range(3))
        return gated(x, gate, self._branch(modulate(self.norm(x), shift, scale), s))

    def _branch(self, x: Tensor, s: Streams) -> Tensor:
        return self.function(x) if isinstance(self.function, Mlp) else self.function(x, s)


class BranchesBlock(nn.Module):
    """Residual branches on the video stream, one after the other; the context is at most read.

    One map gives the shifts, scales and gates of all adaptive branches, three chunks each in their order. (To share it
    between blocks, and add a table in each, is to replace this one module.)
    """

    def __init__(
        self, spec: Branches, dim: int, num_heads: int, vector_dim: int, activation: Activation, context_width: int
    ) -> None:
        super().__init__()
        adaptive = sum(branch.norm == "adaptive" for branch in spec.branches)
        self.modulation = Modulation(vector_dim, dim, 3 * adaptive) if adaptive else None
        self.branches = nn.ModuleList(
            Residual(branch, dim, num_heads, activation, context_width) for branch in spec.branches
        )

    def forward(self, s: Streams) -> tuple[Float[Tensor, "B N D"], Float[Tensor, "B L C"]]:
        modulation = iter(() if self.modulation is None else self.modulation(s.vector))
        x = s.video
        for branch in self.branches:
            x = branch(x, s, modulation)
        return x, s.context


def build_block(
    spec: Layer,
    dim: int,
    num_heads: int,
    vector_dim: int,
    activation: Activation,
    *,
    context_width: int | None = None,
) -> DualBlock | SingleBlock | BranchesBlock:
    """Return the module of a layer's specification; the context stream is as wide as the video's unless said."""
    width = dim if context_width is None else context_width
    if isinstance(spec, Dual):
        return DualBlock(spec, dim, num_heads, vector_dim, activation, width)
    if isinstance(spec, Branches):
        return BranchesBlock(spec, dim, num_heads, vector_dim, activation, width)
    return SingleBlock(spec, dim, num_heads, vector_dim, activation)
