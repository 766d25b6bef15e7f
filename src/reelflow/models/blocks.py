"""Transformer blocks: lists of residual branches `x <- x + gate * post(f(modulate(norm(x))))`.

    Dual       two streams, video and context, with their own weights and one joint attention (Esser et al. 2024, MM-DiT)
    Single     one stream, context then video, attention and MLP side by side in one branch (Dehghani et al. 2023)
    Branches   the video stream alone, any list of branches: `Attend`, `Cross` (reads the context), `FeedForward`

A block kind is a value in the model's list of layers; a new kind is a new class here. Which tokens attend to which is
a value too (`reelflow.nn.patterns`), and so are norms; what changes from layer to layer is said by the list:

    factorised = Branches((Attend(Space()), Attend(Time()), FeedForward()))
    with_text  = Branches((Attend(Space()), Attend(Time()), Cross(), FeedForward()))
    periodic   = 7 * (*3 * (factorised,), Branches((Attend(Full()), FeedForward())))
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from reelflow.config import configuration
from reelflow.errors import ConfigError
from reelflow.nn.attention import QKNorm, attend, attend_segments, build_qk_norm
from reelflow.nn.linear import Linear
from reelflow.nn.mlp import Activation, Mlp, activate, inner_width
from reelflow.nn.modulation import Modulation, Rows, Table, gated, modulate, spread
from reelflow.nn.norm import Norm, build_norm
from reelflow.nn.patchify import Grid
from reelflow.nn.patterns import Full, Gated, Pattern, Segments, Share, attend_pattern
from reelflow.nn.qk import normed_parts, queries_keys_values
from reelflow.nn.rope import Rope

__all__ = [
    "Attend",
    "Branch",
    "Branches",
    "BranchesBlock",
    "Cross",
    "CrossAttention",
    "Dual",
    "DualBlock",
    "DualStream",
    "FeedForward",
    "Gate",
    "Layer",
    "ReadStream",
    "Reads",
    "SelfAttention",
    "Single",
    "SingleBlock",
    "Streams",
    "TiedStream",
    "Widths",
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
    norm: Norm = Norm()
    post: Norm | None = None  # of a branch's result, before its gate
    qk_norm: QKNorm | None = QKNorm()
    shift: bool = True  # without: a branch is scaled and gated only
    gate: Literal["linear", "tanh"] = "linear"
    qkv_bias: bool = True
    mlp_bias: bool = True
    tied: bool = False  # both streams have the same weights, but for their modulation
    again: Pattern | None = None  # a second attention, among the video's tokens, of the same normalised input
    idle_query: bool = False  # a context that is only read has queries that nobody asks, as in published weights

    def __post_init__(self) -> None:
        _check_ratio("mlp_ratio", self.mlp_ratio)
        if self.tied and not self.context_out:
            raise ConfigError("tied streams share all their weights; context_out=False would drop some of one of them")
        if self.idle_query and self.context_out:
            raise ConfigError("idle_query is for a context that is only read; set context_out=False, or leave it out")


@configuration
class Single:
    """A `SingleBlock`."""

    kind: Literal["single"] = "single"
    mlp_ratio: float = 4.0
    attend: Pattern = Full()
    norm: Norm = Norm()
    qk_norm: QKNorm | None = QKNorm()

    def __post_init__(self) -> None:
        _check_ratio("mlp_ratio", self.mlp_ratio)


@configuration
class Attend:
    """A branch of attention among the video's tokens.

    An `adaptive` branch is shifted and scaled after its norm, and its result gated, by the vector (AdaLN-zero). The result
    of any other is added as it is, and its last matrix begins at zero.
    """

    pattern: Pattern = Full()
    norm: Norm | None = Norm()
    adaptive: bool = True
    qk_norm: QKNorm | None = QKNorm()
    kind: Literal["attend"] = "attend"


@configuration
class Cross:
    """A branch of attention from the video's tokens to the context's, which it does not change.

    With `image` they also attend to the tokens of a picture, apart from the context's, and the two results are summed.
    """

    norm: Norm | None = Norm(affine=True)
    adaptive: bool = False
    qk_norm: QKNorm | None = QKNorm()
    image: bool = False
    kind: Literal["cross"] = "cross"


@configuration
class FeedForward:
    """A branch of an MLP, `ratio` times as wide as the stream."""

    ratio: float = 4.0
    norm: Norm | None = Norm()
    adaptive: bool = True
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

    @property
    def num_chunks(self) -> int:
        """How many vectors modulate the block: shift, scale and gate of each adaptive branch."""
        return 3 * sum(branch.adaptive for branch in self.branches)


Layer = Dual | Single | Branches
Reads = tuple[tuple[Tensor, Tensor], ...]  # keys and values of a context, and of a picture


def _check_ratio(name: str, ratio: float) -> None:
    if ratio <= 0:
        raise ConfigError(f"{name} must be above 0, got {ratio}; 4 is usual")


@dataclass(frozen=True)
class Widths:
    """What all blocks of a model agree on."""

    dim: int
    num_heads: int
    vector: int
    context: int
    activation: Activation
    shared: bool = False  # the vector is every block's chunks already, to which each adds a table


@dataclass(frozen=True)
class Streams:
    """What blocks pass on, and what they look at.

    `vector` has one row per group of video tokens (per clip, per frame or per token); `context_vector` has one.
    `rope` turns each video token by its own place in the grid, whatever the pattern of attention. `mask` hides padded
    context tokens; video tokens are never hidden. Where the context is only read it may be numbers, added to scores.

    Clips of several sizes are one row, B = 1, as the `Segments` in `grid` say. Then the vectors have rows for all clips,
    `rows` and `context_rows` name the one of each token, and nothing is hidden because nothing is padded.

    With a `Share` in `grid` the video's tokens, and all that is told of each, are those here. The context is everywhere.
    `last` and `last_rows` are the vector and the rows of the readout.
    """

    video: Float[Tensor, "B N D"]
    context: Float[Tensor, "B L C"]
    vector: Float[Tensor, "B groups V"]
    context_vector: Float[Tensor, "B 1 V"] | Float[Tensor, "B clips V"]
    rope: Rope | None
    mask: Bool[Tensor, "B 1 1 L+N"] | Float[Tensor, "1 1 1 L"] | None
    grid: Grid | Segments | Share
    image: Float[Tensor, "B P D"] | None = None
    rows: Rows | None = None
    context_rows: Rows | None = None
    last: Float[Tensor, "B told W"] | None = None
    last_rows: Rows | None = None
    reads: "Mapping[CrossAttention, Reads]" = field(default_factory=dict)  # what is known of them already


class Gate(nn.Module):
    """The alpha in [0, 1] of a `Gated` pattern, 1/2 at the start: the sigmoid of a logit, or of a map of each token."""

    last: Tensor

    def __init__(self, pattern: Gated, dim: int, num_heads: int) -> None:
        super().__init__()
        per_token = pattern.granularity == "token"
        self.logit = None if per_token else nn.Parameter(torch.zeros(num_heads if pattern.granularity == "head" else 1))
        self.linear = Linear(dim, 1) if per_token else None
        if self.linear is not None:
            nn.init.zeros_(self.linear.weight)
            nn.init.zeros_(self.linear.bias)
            self.register_buffer("last", torch.empty(()), persistent=False)
            self.reset_buffers()

    def reset_buffers(self) -> None:
        """Set what no checkpoint holds, after a way through the meta device."""
        if self.linear is not None:
            self.last.fill_(0.5)

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
    """Queries, keys and values of one stream, normalised; `dim` is the width of each of the three."""

    def __init__(
        self, dim: int, num_heads: int, norm: QKNorm | None, *, in_dim: int | None = None, bias: bool = True
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = Linear(in_dim or dim, 3 * dim, bias=bias)
        self.norm_q, self.norm_k = (build_qk_norm(norm, dim, num_heads) for _ in range(2))

    def forward(self, x: Float[Tensor, "B M I"], rope: Rope | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Positions belong to the last tokens of x; context before them has none."""
        return queries_keys_values(self.qkv(x), self.norm_q, self.norm_k, rope, self.num_heads)


class Read(nn.Module):
    """Keys and values of a stream that asks nothing, keys normalised; `dim` is the width of each of the two."""

    def __init__(self, dim: int, num_heads: int, norm: QKNorm | None, *, in_dim: int, bias: bool = True) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.kv = Linear(in_dim, 2 * dim, bias=bias)
        self.norm_k = build_qk_norm(norm, dim, num_heads)

    def forward(self, x: Float[Tensor, "B L I"]) -> tuple[Tensor, Tensor]:
        k, v = normed_parts(self.kv(x), (self.norm_k,), self.num_heads, parts=2)
        return k, v


class _Chunks(NamedTuple):
    """What modulates one branch."""

    shift: Float[Tensor, "B groups D"] | None
    scale: Float[Tensor, "B groups D"]
    gate: Float[Tensor, "B groups D"]
    rows: Rows | None

    def modulate(self, x: Tensor) -> Tensor:
        return modulate(x, self.shift, self.scale, self.rows)

    def gated(self, x: Tensor, branch: Tensor) -> Tensor:
        return gated(x, self.gate, branch, self.rows)


class DualStream(nn.Module):
    """One stream's half of a `DualBlock`: everything but the attention itself.

    The stream may be narrower than the attention, whose queries, keys and values are as wide as the video's.
    """

    def __init__(self, spec: Dual, dim: int, widths: Widths, *, branches: int = 2) -> None:
        super().__init__()
        self.modulation = Modulation(widths.vector, dim, branches * (2 + spec.shift))
        self.norm1, self.norm2 = (build_norm(spec.norm, dim) for _ in range(2))
        self.project = Projection(widths.dim, widths.num_heads, spec.qk_norm, in_dim=dim, bias=spec.qkv_bias)
        self.out = Linear(widths.dim, dim)
        self.mlp = Mlp(dim, round(spec.mlp_ratio * dim), activation=widths.activation, bias=spec.mlp_bias)
        self.post1, self.post2 = (build_norm(spec.post, dim) for _ in range(2))

    def add_attention(self, x: Tensor, attention: Tensor, chunks: _Chunks) -> Tensor:
        return chunks.gated(x, self.post1(self.out(attention)))

    def add_mlp(self, x: Tensor, chunks: _Chunks) -> Tensor:
        return chunks.gated(x, self.post2(self.mlp(chunks.modulate(self.norm2(x)))))


class ReadStream(nn.Module):
    """What is left of a `DualStream` that is read only."""

    def __init__(self, spec: Dual, dim: int, widths: Widths) -> None:
        super().__init__()
        self.modulation = Modulation(widths.vector, dim, 1 + spec.shift)
        self.norm1 = build_norm(spec.norm, dim)
        self.project = Read(widths.dim, widths.num_heads, spec.qk_norm, in_dim=dim, bias=spec.qkv_bias)
        self.idle = Idle(spec, dim, widths) if spec.idle_query else None

    def keys_values(self, s: Streams) -> tuple[Tensor, Tensor]:
        *shift, scale = self.modulation(s.context_vector)
        return self.project(modulate(self.norm1(s.context), shift[0] if shift else None, scale, s.context_rows))


class Idle(nn.Module):
    """Queries that nobody asks: weights that published checkpoints hold, kept so that they can be written again."""

    def __init__(self, spec: Dual, dim: int, widths: Widths) -> None:
        super().__init__()
        self.query = Linear(dim, widths.dim, bias=spec.qkv_bias)
        self.norm_q = build_qk_norm(spec.qk_norm, widths.dim, widths.num_heads)


class TiedStream(nn.Module):
    """What is left of a `DualStream` that has the other's weights."""

    def __init__(self, spec: Dual, dim: int, widths: Widths) -> None:
        super().__init__()
        self.modulation = Modulation(widths.vector, dim, 2 * (2 + spec.shift))


class DualBlock(nn.Module):
    """Two streams with their own weights, and perhaps widths, that attend jointly."""

    def __init__(self, spec: Dual, widths: Widths) -> None:
        super().__init__()
        self.spec = spec
        dim = widths.dim
        self.video = DualStream(spec, dim, widths, branches=2 + (spec.again is not None))
        if not spec.context_out:
            self.context: DualStream | ReadStream | TiedStream = ReadStream(spec, widths.context, widths)
        elif spec.tied:
            self.context = TiedStream(spec, dim, widths)
        else:
            self.context = DualStream(spec, widths.context, widths)
        self.again = None if spec.again is None else SelfAttention(spec.again, spec.qk_norm, widths)
        self.gate = _gate(spec.attend, dim, widths.num_heads)

    def forward(self, s: Streams) -> tuple[Float[Tensor, "B N D"], Float[Tensor, "B L C"]]:
        own, mlp, *again = self._chunks(self.video.modulation, s.vector, s.rows)
        normed = self.video.norm1(s.video)
        x = own.modulate(normed)
        q, k, v = self.video.project(x, s.rope)
        other = self.video if isinstance(self.context, TiedStream) else self.context
        if isinstance(other, ReadStream):
            ck, cv = other.keys_values(s)
        else:
            c_own, c_mlp = self._chunks(self.context.modulation, s.context_vector, s.context_rows)
            cq, ck, cv = other.project(c_own.modulate(other.norm1(s.context)))
            q = torch.cat([cq, q], dim=2)
        k, v = torch.cat([ck, k], dim=2), torch.cat([cv, v], dim=2)
        joint = attend_pattern(self.spec.attend, q, k, v, s.grid, mask=s.mask, alpha=_alpha(self.gate, x))
        length = joint.shape[1] - s.video.shape[1]  # 0 when the context only is read
        c_attention, attention = joint.split([length, s.video.shape[1]], dim=1)
        video = self.video.add_attention(s.video, attention, own)
        if self.again is not None:
            (chunks,) = again
            video = chunks.gated(video, self.again(chunks.modulate(normed), s))
        video = self.video.add_mlp(video, mlp)
        if isinstance(other, ReadStream):
            return video, s.context
        return video, other.add_mlp(other.add_attention(s.context, c_attention, c_own), c_mlp)

    def _chunks(self, modulation: Modulation, vector: Tensor, rows: Rows | None) -> list[_Chunks]:
        """Return what modulates attention, MLP and, where there is one, the second attention."""
        chunks, found = iter(modulation(vector)), []
        for first in chunks:
            shift, scale = (first, next(chunks)) if self.spec.shift else (None, first)
            gate = next(chunks)
            found.append(_Chunks(shift, scale, gate.tanh() if self.spec.gate == "tanh" else gate, rows))
        return found


class SingleBlock(nn.Module):
    """One stream: attention and MLP read the same normalised tokens and leave through one linear map."""

    def __init__(self, spec: Single, widths: Widths) -> None:
        super().__init__()
        dim, hidden = widths.dim, round(spec.mlp_ratio * widths.dim)
        self.pattern = spec.attend
        self.activation: Activation = widths.activation
        self.modulation = Modulation(widths.vector, dim, 3)
        self.norm = build_norm(spec.norm, dim)
        self.project = Projection(dim, widths.num_heads, spec.qk_norm)
        self.up = Linear(dim, inner_width(widths.activation, hidden))
        self.out = Linear(dim + hidden, dim)
        self.gate = _gate(spec.attend, dim, widths.num_heads)

    def forward(self, s: Streams) -> tuple[Float[Tensor, "B N D"], Float[Tensor, "B L D"]]:
        x, length = torch.cat([s.context, s.video], dim=1), s.context.shape[1]
        shift, scale, gate = (self._join(s, *pair) for pair in self._modulations(s))
        y = modulate(self.norm(x), shift, scale)
        q, k, v = self.project(y, s.rope)
        alpha = _alpha(self.gate, y[:, length:])
        attention = attend_pattern(self.pattern, q, k, v, s.grid, mask=s.mask, alpha=alpha)
        x = gated(x, gate, self.out(torch.cat([attention, activate(self.up(y), self.activation)], dim=-1)))
        context, video = x.split([length, s.video.shape[1]], dim=1)
        return video, context

    def _modulations(self, s: Streams) -> list[tuple[Tensor, Tensor]]:
        video = self.modulation(s.vector)
        context = video if s.context_vector is s.vector else self.modulation(s.context_vector)
        return list(zip(context, video, strict=True))

    def _join(self, s: Streams, context: Tensor, video: Tensor) -> Tensor:
        """One row when the whole sequence shares it, else one row per token of [context, video]."""
        if video is context and video.shape[1] == 1:
            return video
        length, n = s.context.shape[1], s.video.shape[1]
        context = spread(context, length, s.context_rows).expand(-1, length, -1)
        return torch.cat([context, spread(video, n, s.rows).expand(-1, n, -1)], dim=1)


class SelfAttention(nn.Module):
    """The function of an `Attend` branch."""

    def __init__(self, pattern: Pattern, qk_norm: QKNorm | None, widths: Widths) -> None:
        super().__init__()
        self.pattern = pattern
        self.project = Projection(widths.dim, widths.num_heads, qk_norm)
        self.out = Linear(widths.dim, widths.dim)
        self.gate = _gate(pattern, widths.dim, widths.num_heads)

    def forward(self, x: Float[Tensor, "B N D"], s: Streams) -> Float[Tensor, "B N D"]:
        q, k, v = self.project(x, s.rope)
        return self.out(attend_pattern(self.pattern, q, k, v, s.grid, alpha=_alpha(self.gate, x)))


class CrossAttention(nn.Module):
    """The function of a `Cross` branch. A clip without context tokens reads nothing, and adds the last bias."""

    def __init__(self, spec: Cross, widths: Widths) -> None:
        super().__init__()
        dim, self.num_heads = widths.dim, widths.num_heads
        self.query = Linear(dim, dim)
        self.norm_q = build_qk_norm(spec.qk_norm, dim, self.num_heads)
        self.read = Read(dim, self.num_heads, spec.qk_norm, in_dim=widths.context)
        self.image = Read(dim, self.num_heads, spec.qk_norm, in_dim=dim) if spec.image else None
        self.out = Linear(dim, dim)

    def keys_values(self, context: Float[Tensor, "B L C"], image: Float[Tensor, "B P D"] | None) -> Reads:
        """Return keys and values of the context, and of the picture where it is read."""
        read = self.read(context)
        return (read,) if self.image is None or image is None else (read, self.image(image))

    def forward(self, x: Float[Tensor, "B N D"], s: Streams) -> Float[Tensor, "B N D"]:
        (q,) = normed_parts(self.query(x), (self.norm_q,), self.num_heads, parts=1)
        mask = None if s.mask is None else s.mask[..., : s.context.shape[1]]
        (k, v), *picture = s.reads.get(self) or self.keys_values(s.context, s.image)
        whole = s.grid.whole if isinstance(s.grid, Share) else s.grid
        clips = whole if isinstance(whole, Segments) else None
        counts = [] if isinstance(s.grid, Grid) else s.grid.video
        found = attend(q, k, v, mask=mask) if clips is None else _attend_runs(q, k, v, counts, clips.context)
        for k, v in picture:
            each = (k.shape[2] // len(clips.grids),) * len(clips.grids) if clips else ()
            found = found + (attend(q, k, v) if clips is None else _attend_runs(q, k, v, counts, each))
        return self.out(found)


def _attend_runs(q: Tensor, k: Tensor, v: Tensor, counts: list[int], lengths: tuple[int, ...]) -> Tensor:
    """Attend from each clip of a row to its own run of keys: `counts` queries to `lengths` keys."""
    keys, values = (x.split(list(lengths), dim=2) for x in (k, v))
    return torch.cat(attend_segments(q.split(counts, dim=2), keys, values), dim=1)


class Residual(nn.Module):
    """One branch with what goes before and after it."""

    def __init__(self, spec: Branch, widths: Widths) -> None:
        super().__init__()
        self.adaptive = spec.adaptive
        self.norm = build_norm(spec.norm, widths.dim)
        self.function: SelfAttention | CrossAttention | Mlp
        if isinstance(spec, Attend):
            self.function = SelfAttention(spec.pattern, spec.qk_norm, widths)
        elif isinstance(spec, Cross):
            self.function = CrossAttention(spec, widths)
        else:
            self.function = Mlp(widths.dim, round(spec.ratio * widths.dim), activation=widths.activation)
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
        return gated(x, gate, self._branch(modulate(self.norm(x), shift, scale, s.rows), s), s.rows)

    def _branch(self, x: Tensor, s: Streams) -> Tensor:
        return self.function(x) if isinstance(self.function, Mlp) else self.function(x, s)


class BranchesBlock(nn.Module):
    """Residual branches on the video stream, one after the other; the context is at most read.

    One map, or a table added to chunks that all blocks share, gives the shifts, scales and gates of all adaptive
    branches, three chunks each in their order.
    """

    def __init__(self, spec: Branches, widths: Widths) -> None:
        super().__init__()
        chunks = spec.num_chunks
        self.modulation: Table | Modulation | None = None
        if chunks:
            self.modulation = (
                Table(widths.dim, chunks) if widths.shared else Modulation(widths.vector, widths.dim, chunks)
            )
        self.branches = nn.ModuleList(Residual(branch, widths) for branch in spec.branches)

    def reads(
        self, context: Float[Tensor, "B L C"], image: Float[Tensor, "B P D"] | None
    ) -> dict[CrossAttention, Reads]:
        """Return all that the branches read of a context and a picture, whatever the video."""
        branches = [module for module in self.modules() if isinstance(module, CrossAttention)]
        return {branch: branch.keys_values(context, image) for branch in branches}

    def forward(self, s: Streams) -> tuple[Float[Tensor, "B N D"], Float[Tensor, "B L C"]]:
        modulation = iter(() if self.modulation is None else self.modulation(s.vector))
        x = s.video
        for branch in self.branches:
            x = branch(x, s, modulation)
        return x, s.context


def build_block(spec: Layer, widths: Widths) -> DualBlock | SingleBlock | BranchesBlock:
    """Return the module of a layer's specification."""
    if isinstance(spec, Dual):
        return DualBlock(spec, widths)
    if isinstance(spec, Branches):
        return BranchesBlock(spec, widths)
    return SingleBlock(spec, widths)
