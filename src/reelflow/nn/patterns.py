"""Attention patterns: which tokens of a clip's grid a token sees, as a value.

    Full      every token                                      (T H W)^2 pairs of query and key
    Space     the tokens of its frame                          T (H W)^2
    Time      the tokens of its place in all frames            H W T^2
    Window    the tokens of its box                            N t h w, less at borders
    Skip      the tokens of its group, spread over the clip    N^2 / stride
    Causal    the tokens of its frame and of those before      (H W)^2 T (T + 1) / 2
    Gated     alpha * Space + (1 - alpha) * Time               the sum of the two

`dense_mask` says exactly which pairs meet and `attended_pairs` how many. `attend_pattern` computes those pairs and no
others, by cutting the sequence into groups of equal size: there is no mask but the one that hides keys.

**Context.** A sequence may begin with L context tokens (text), then come the video's N in scan order. In every pattern
each video token sees all context tokens besides its own group, and each context token sees everything; under `Causal`
the context sees only itself, so that what is cached of it stays true. The groups of a local pattern each get a copy of
the context's keys and values.

**Positions.** A rotary table turns queries and keys by their own (t, h, w) before they come here. Scores depend on
differences of positions, so one table of the whole grid serves every pattern.

**Rows of clips.** Clips of any grids may share a row, as `Segments` say. Each then attends by itself, under any pattern.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from math import prod
from typing import Literal, NamedTuple

import torch
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor

from reelflow.config import configuration
from reelflow.errors import ConfigError
from reelflow.nn.attention import attend, attend_segments
from reelflow.nn.patchify import Grid

__all__ = [
    "Causal",
    "Full",
    "Gated",
    "KVCache",
    "Pattern",
    "Segments",
    "Share",
    "Skip",
    "Space",
    "Time",
    "Window",
    "attend_causal",
    "attend_pattern",
    "attended_pairs",
    "dense_mask",
    "tokens_within",
]


@configuration
class Full:
    """Every token sees every token."""

    kind: Literal["full"] = "full"


@configuration
class Space:
    """A token sees its own frame."""

    kind: Literal["space"] = "space"


@configuration
class Time:
    """A token sees its own place in every frame."""

    kind: Literal["time"] = "time"


@configuration
class Window:
    """A token sees the box of `t` x `h` x `w` tokens that it lies in.

    Along each axis boxes are cut at shift, shift + extent, shift + 2 extent, ... What is left at either border is a
    smaller box of its own: opposite borders never meet, and no grid needs padding. (Liu et al. 2021 join the leftovers
    by a cyclic roll and part them again by a mask, which gives the same pairs.)

    Raises:
        ConfigError: an extent is below 1, a shift is negative or as long as the window; or, when it meets a grid, the
            window is larger than the grid.
    """

    t: int
    h: int
    w: int
    shift: tuple[int, int, int] = (0, 0, 0)
    kind: Literal["window"] = "window"

    def __post_init__(self) -> None:
        for axis, extent, shift in zip("thw", self.extents, self.shift, strict=True):
            if extent < 1:
                raise ConfigError(f"a window is at least 1 token long, got {axis}={extent}; nearest: 1")
            if not 0 <= shift < extent:
                near = min(max(shift, 0), extent - 1)
                raise ConfigError(
                    f"a window of {axis}={extent} is shifted by 0 to {extent - 1} tokens, got {shift}; nearest: {near}"
                )

    @property
    def extents(self) -> tuple[int, int, int]:
        return self.t, self.h, self.w


@configuration
class Skip:
    """A token sees one of `stride` groups, to which runs of `run` adjacent tokens (in scan order) are dealt in turn.

    Token n belongs to group (n // run) mod stride. Layers of run 1 and of run `stride` in turn bring every
    token to every other within two layers (Lin et al. 2024; groups need not be equal here, so nothing is padded).

    Raises:
        ConfigError: stride or run is below 1; or, when it meets a grid, a group would be empty.
    """

    stride: int
    run: int = 1
    kind: Literal["skip"] = "skip"

    def __post_init__(self) -> None:
        if self.stride < 1 or self.run < 1:
            near = max(1, self.stride), max(1, self.run)
            raise ConfigError(
                f"stride and run must be at least 1, got {self.stride} and {self.run}; nearest: {near[0]} and {near[1]}"
            )


@configuration
class Causal:
    """A token sees its own frame and those before it, at most `back` of them (`None`: all).

    Raises:
        ConfigError: `back` is negative.
    """

    back: int | None = None
    kind: Literal["causal"] = "causal"

    def __post_init__(self) -> None:
        if self.back is not None and self.back < 0:
            raise ConfigError(f"back counts frames, got {self.back}; nearest: 0 (the frame alone) or null (all)")


@configuration
class Gated:
    """Mix two attentions of the same queries, keys and values: alpha * Space + (1 - alpha) * Time.

    alpha in [0, 1] is learned: one for the layer, one per head, or one per token (then a function of the token).
    """

    granularity: Literal["scalar", "head", "token"] = "scalar"
    kind: Literal["gated"] = "gated"


Pattern = Full | Space | Time | Window | Skip | Causal | Gated
Mask = Bool[Tensor, "B 1 1 M"]


@dataclass(frozen=True)
class KVCache:
    """Keys and values a later frame of a stream will look at: `context_length` of the context, then past frames'."""

    k: Float[Tensor, "B heads M d"]
    v: Float[Tensor, "B heads M d"]
    mask: Mask | None
    context_length: int


@dataclass(frozen=True)
class Segments:
    """Clips that share one row: the context tokens of all, clip by clip, then the video tokens of all in the same order."""

    context: tuple[int, ...]  # tokens of each clip's context
    grids: tuple[Grid, ...]

    @property
    def video(self) -> list[int]:
        """Tokens of each clip."""
        return [grid.num_tokens for grid in self.grids]

    @property
    def num_tokens(self) -> int:
        return sum(self.video)


@dataclass(frozen=True)
class Share:
    """The video's tokens from `start` to `stop` of a clip or a row; the others are elsewhere.

    Whoever shares the tokens out says how these attend to all of them (`attend`: as `attend_pattern`, but for the grid)
    and how what was made of each token is brought together (`join`: from its own tokens' rows, all tokens' rows).
    """

    whole: Grid | Segments
    start: int
    stop: int
    attend: Callable[[Pattern, Tensor, Tensor, Tensor, Mask | None, Tensor | None], Tensor]
    join: Callable[[Float[Tensor, "B n D"]], Float[Tensor, "B N D"]]

    @property
    def here(self) -> slice:
        return slice(self.start, self.stop)

    @property
    def video(self) -> list[int]:
        """Tokens of each clip that are here."""
        return tokens_within(self.whole, self.start, self.stop)


def tokens_within(whole: Grid | Segments, start: int, stop: int) -> list[int]:
    """Return how many tokens of each clip are among those from start to stop."""
    counts = whole.video if isinstance(whole, Segments) else [whole.num_tokens]
    ends = list(accumulate(counts))
    return [max(0, min(stop, end) - max(start, end - count)) for count, end in zip(counts, ends, strict=True)]


def attend_pattern(
    pattern: Pattern,
    q: Float[Tensor, "B heads Q d"],
    k: Float[Tensor, "B heads M d"],
    v: Float[Tensor, "B heads M d"],
    grid: Grid | Segments | Share,
    *,
    mask: Mask | None = None,
    alpha: Float[Tensor, "#B #N #heads"] | None = None,
) -> Float[Tensor, "B Q heads*d"]:
    """Attend under a pattern, heads side by side.

    Keys are [context, video]; queries too, or of the video alone when nobody will read the context's. `mask` is True
    where a key may be seen by all; a query that sees none gets zero. `alpha` is what `Gated` mixes by. Of `Segments`
    each clip sees itself and its context alone, and nothing is masked. Of a `Share` the video's tokens are those here, but
    they see those elsewhere too.

    Raises:
        ConfigError: the pattern does not fit the grid, or `Gated` is given no alpha.
    """
    if isinstance(grid, Share):
        return grid.attend(pattern, q, k, v, mask, alpha)
    if isinstance(grid, Segments):
        return _attend_clips(pattern, q, k, v, grid, alpha)
    if isinstance(pattern, Full):
        return attend(q, k, v, mask=mask)
    if isinstance(pattern, Causal):
        return attend_causal(pattern, q, k, v, grid, mask=mask)[0]
    aside = q.shape[2] - grid.num_tokens
    video = _attend_video(pattern, q[:, :, aside:], k, v, grid, mask, alpha)
    return torch.cat([attend(q[:, :, :aside], k, v, mask=mask), video], dim=1) if aside else video


def attend_causal(
    pattern: Causal,
    q: Float[Tensor, "B heads Q d"],
    k: Float[Tensor, "B heads M d"],
    v: Float[Tensor, "B heads M d"],
    grid: Grid,
    *,
    mask: Mask | None = None,
    cache: KVCache | None = None,
) -> tuple[Float[Tensor, "B Q heads*d"], KVCache]:
    """Attend to past frames, and return with it what the next frames need; chunk by chunk this gives the whole.

    A stream begins without a cache, with [context, video]. Later chunks bring their own frames only, `grid` being the
    chunk's; keys must have been turned by their frame's place in the whole clip. The cache is a value: a chunk that is
    denoised in several steps starts each time from the same one.
    """
    frame = grid.h * grid.w
    aside = q.shape[2] - grid.num_tokens
    length = k.shape[2] - grid.num_tokens
    if cache is not None:
        mask = _join_masks(cache, k, mask)
        length, k, v = cache.context_length, torch.cat([cache.k, k], dim=2), torch.cat([cache.v, v], dim=2)
    past = k.shape[2] - grid.num_tokens

    def seen(x: Tensor, start: int, stop: int) -> Tensor:
        """The context's tokens and those from start to stop."""
        if start <= length:
            return x[:, :, :stop]
        return torch.cat([x[:, :, :length], x[:, :, start:stop]], dim=2) if length else x[:, :, start:stop]

    def keys(start: int, stop: int) -> tuple[Tensor, Tensor, Tensor | None]:
        return seen(k, start, stop), seen(v, start, stop), None if mask is None else seen(mask.mT, start, stop).mT

    def earliest(stop: int, frames: int | None) -> int:
        return length if frames is None else max(length, stop - frames * frame)

    parts = []
    if aside:
        *pair, hidden = keys(0, length)
        parts.append(attend(q[:, :, :aside], *pair, mask=hidden))
    for start in range(0, grid.num_tokens, frame):
        stop = past + start + frame
        *pair, hidden = keys(earliest(stop, None if pattern.back is None else pattern.back + 1), stop)
        parts.append(attend(q[:, :, aside + start : aside + start + frame], *pair, mask=hidden))
    kept_k, kept_v, kept_mask = keys(earliest(k.shape[2], pattern.back), k.shape[2])
    return torch.cat(parts, dim=1), KVCache(kept_k, kept_v, kept_mask, length)


def dense_mask(
    pattern: Pattern, grid: Grid, context_length: int = 0, *, device: torch.device | None = None
) -> Bool[Tensor, "M M"]:
    """Return which key (column) each query (row) sees, over [context, video]; for reading and for tests.

    Raises:
        ConfigError: the pattern does not fit the grid, or is `Gated`, which is not one mask.
    """
    axes = torch.meshgrid(*(torch.arange(n, device=device) for n in grid), indexing="ij")
    t = axes[0].flatten()
    if isinstance(pattern, Gated):
        raise ConfigError("a gated mix has two masks; ask for those of Space() and Time()")
    if isinstance(pattern, Causal):
        behind = t[:, None] - t
        video = (behind >= 0) & (behind <= (grid.t if pattern.back is None else pattern.back))
    elif isinstance(pattern, Skip):
        _skip_groups(pattern, grid)
        group = torch.arange(grid.num_tokens, device=device) // pattern.run % pattern.stride
        video = group[:, None] == group
    else:
        cuts = zip(axes, _cuts(pattern, grid), strict=True)
        box = torch.stack([(axis.flatten() - shift) // extent for axis, (_, extent, shift) in cuts], dim=-1)
        video = (box[:, None] == box).all(-1)
    size = context_length + grid.num_tokens
    mask = torch.ones(size, size, dtype=torch.bool, device=device)
    mask[context_length:, context_length:] = video
    if isinstance(pattern, Causal):
        mask[:context_length, context_length:] = False
    return mask


def attended_pairs(pattern: Pattern, grid: Grid, context_length: int = 0, *, context_queries: bool = True) -> int:
    """Count the pairs of query and key that `attend_pattern` computes, per sample and head; a pair costs 4 d FLOPs.

    Raises:
        ConfigError: the pattern does not fit the grid.
    """
    n = grid.num_tokens
    if isinstance(pattern, Gated):
        pairs = sum(attended_pairs(part, grid, context_length, context_queries=False) for part in (Space(), Time()))
    elif isinstance(pattern, Causal):
        back = grid.t if pattern.back is None else pattern.back
        pairs = (grid.h * grid.w) ** 2 * sum(1 + min(frame, back) for frame in range(grid.t)) + n * context_length
    elif isinstance(pattern, Skip):
        own = (n - n % (pattern.stride * pattern.run)) // pattern.stride
        pairs = sum(groups * (own + rest) ** 2 for _, groups, rest in _skip_groups(pattern, grid)) + n * context_length
    else:
        squares = [sum(run.pieces * run.extent**2 for run in _runs(*cut)) for cut in _cuts(pattern, grid)]
        pairs = prod(squares) + n * context_length
    if not context_queries:
        return pairs
    return pairs + context_length * (context_length + (0 if isinstance(pattern, Causal) else n))


def _attend_clips(
    pattern: Pattern, q: Tensor, k: Tensor, v: Tensor, clips: Segments, alpha: Tensor | None
) -> Float[Tensor, "1 Q D"]:
    """Attend within each clip of a row, and put what comes out in the row's order."""
    qs, ks, vs = (_clips(x, clips, dim=2) for x in (q, k, v))
    if isinstance(pattern, Full):
        found = attend_segments(qs, ks, vs)
    else:
        count = len(clips.grids)
        alphas = [alpha] * count if alpha is None or alpha.shape[1] == 1 else alpha.split(clips.video, dim=1)
        rows = zip(qs, ks, vs, clips.grids, alphas, strict=True)
        found = [attend_pattern(pattern, a, b, c, grid, alpha=own) for a, b, c, grid, own in rows]
    if q.shape[2] == clips.num_tokens:
        return torch.cat(found, dim=1)
    cuts = [
        part.split([length, part.shape[1] - length], dim=1) for part, length in zip(found, clips.context, strict=True)
    ]
    return torch.cat([part for stream in zip(*cuts, strict=True) for part in stream], dim=1)


def _clips(x: Tensor, clips: Segments, *, dim: int) -> Sequence[Tensor]:
    """Cut a row into its clips, each with its context, if the row has any, before it."""
    length = x.shape[dim] - clips.num_tokens
    if not length:
        return x.split(clips.video, dim=dim)
    contexts, videos = x.split([length, clips.num_tokens], dim=dim)
    pairs = zip(contexts.split(list(clips.context), dim=dim), videos.split(clips.video, dim=dim), strict=True)
    return [torch.cat(pair, dim=dim) for pair in pairs]


def _attend_video(
    pattern: Space | Time | Window | Skip | Gated,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grid: Grid,
    mask: Tensor | None,
    alpha: Tensor | None,
) -> Float[Tensor, "B N D"]:
    """Attend with the video's queries."""
    if isinstance(pattern, Gated):
        if alpha is None:
            raise ConfigError("gated attention needs alpha, of shape B N heads or 1 where it does not vary")
        space, time = (
            _attend_video(part, q, k, v, grid, mask, None).unflatten(-1, (q.shape[1], -1)) for part in (Space(), Time())
        )
        return torch.lerp(time, space, alpha[..., None].to(space.dtype)).flatten(-2)
    if isinstance(pattern, Skip):
        return _attend_skip(pattern, q, k, v, grid, mask)
    return _attend_boxes(pattern, q, k, v, grid, mask)


def _attend_boxes(
    pattern: Space | Time | Window, q: Tensor, k: Tensor, v: Tensor, grid: Grid, mask: Tensor | None
) -> Float[Tensor, "B N D"]:
    """Attend within each box, all boxes of one shape at once: at most three shapes along an axis."""

    def attend_run(t: Run, h: Run, w: Run) -> Float[Tensor, "B T H W D"]:
        extents, pieces = {"t": t.extent, "h": h.extent, "w": w.extent}, {"T": t.pieces, "H": h.pieces, "W": w.pieces}

        def cut(x: Tensor) -> Tensor:
            x = x.unflatten(2, grid)[:, :, t.tokens, h.tokens, w.tokens]
            return rearrange(x, "B heads (T t) (H h) (W w) d -> (B T H W) heads (t h w) d", **extents)

        y = _attend_groups(cut, q, k, v, grid, mask)
        return rearrange(y, "(B T H W) (t h w) D -> B (T t) (H h) (W w) D", **extents, **pieces)

    ts, hs, ws = (_runs(*axis) for axis in _cuts(pattern, grid))
    video = _cat([_cat([_cat([attend_run(t, h, w) for w in ws], dim=3) for h in hs], dim=2) for t in ts], dim=1)
    return video.flatten(1, 3)


def _attend_skip(
    pattern: Skip, q: Tensor, k: Tensor, v: Tensor, grid: Grid, mask: Tensor | None
) -> Float[Tensor, "B N D"]:
    """Attend within each group, all groups of one size at once: at most three sizes."""
    n = grid.num_tokens
    even = n - n % (pattern.stride * pattern.run)  # tokens before the last, incomplete deal
    dealt, last = [], []
    for first, groups, rest in _skip_groups(pattern, grid):
        start = even + first * pattern.run

        def cut(x: Tensor, first: int = first, groups: int = groups, rest: int = rest, start: int = start) -> Tensor:
            deal = "B heads (deals m run) d -> B m heads (deals run) d"
            own = rearrange(x[:, :, :even], deal, m=pattern.stride, run=pattern.run)[:, first : first + groups]
            tail = rearrange(x[:, :, start : start + groups * rest], "B heads (m run) d -> B m heads run d", m=groups)
            return torch.cat([own, tail], dim=3).flatten(0, 1)

        y = _attend_groups(cut, q, k, v, grid, mask).unflatten(0, (-1, groups))
        own, tail = y.tensor_split([even // pattern.stride], dim=2)
        dealt.append(own)
        last.append(tail.flatten(1, 2))
    whole = rearrange(torch.cat(dealt, dim=1), "B m (deals run) D -> B (deals m run) D", run=pattern.run)
    return torch.cat([whole, *last], dim=1)


def _attend_groups(
    cut: Callable[[Tensor], Tensor], q: Tensor, k: Tensor, v: Tensor, grid: Grid, mask: Tensor | None
) -> Float[Tensor, "groups n D"]:
    """Attend within the groups into which `cut` takes B heads N d apart, and from each to the context."""
    length = k.shape[2] - grid.num_tokens

    def keys(x: Tensor) -> Tensor:
        own = cut(x[:, :, length:])
        if length == 0:
            return own
        context = x[:, :, :length].repeat_interleave(own.shape[0] // x.shape[0], dim=0)
        return torch.cat([context, own], dim=2)

    return attend(cut(q), keys(k), keys(v), mask=None if mask is None else keys(mask.mT).mT)


class Run(NamedTuple):
    """Pieces of one extent that follow each other along an axis."""

    start: int
    pieces: int
    extent: int

    @property
    def tokens(self) -> slice:
        return slice(self.start, self.start + self.pieces * self.extent)


def _runs(n: int, extent: int, shift: int) -> list[Run]:
    """The pieces of an axis of n tokens, cut at shift, shift + extent, ...: the first, the whole ones, the last."""
    pieces, rest = divmod(n - shift, extent)
    runs = (Run(0, 1, shift), Run(shift, pieces, extent), Run(n - rest, 1, rest))
    return [run for run in runs if run.pieces and run.extent]


def _cuts(pattern: Full | Space | Time | Window, grid: Grid) -> list[tuple[int, int, int]]:
    """How each axis is cut: its length, the extent of a box and the shift."""
    if isinstance(pattern, Window):
        for axis, n, extent in zip("thw", grid, pattern.extents, strict=True):
            if extent > n:
                raise ConfigError(
                    f"a window of {axis}={extent} tokens is larger than the grid of {tuple(grid)} tokens; nearest: {n}"
                )
        return list(zip(grid, pattern.extents, pattern.shift, strict=True))
    extents = {"full": grid, "space": (1, grid.h, grid.w), "time": (grid.t, 1, 1)}[pattern.kind]
    return [(n, extent, 0) for n, extent in zip(grid, extents, strict=True)]


def _skip_groups(pattern: Skip, grid: Grid) -> list[tuple[int, int, int]]:
    """Groups of equal size: the first of them, how many, and their tokens in the last, incomplete deal."""
    n, stride, run = grid.num_tokens, pattern.stride, pattern.run
    if (stride - 1) * run >= n:
        raise ConfigError(
            f"{stride} groups of runs of {run} tokens need more than {(stride - 1) * run} tokens, got {n}; "
            f"nearest: stride={(n - 1) // run + 1}"
        )
    full, rest = divmod(n % (stride * run), run)
    groups = [(0, full, run), (full, int(rest > 0), rest), (full + (rest > 0), stride - full - (rest > 0), 0)]
    return [group for group in groups if group[1]]


def _join_masks(cache: KVCache, k: Tensor, mask: Tensor | None) -> Tensor | None:
    """The mask of cached and new keys; where one of them has none, all are seen."""
    if cache.mask is None and mask is None:
        return None
    old, new = (
        torch.ones(x.shape[0], 1, 1, x.shape[2], dtype=torch.bool, device=x.device) if given is None else given
        for given, x in ((cache.mask, cache.k), (mask, k))
    )
    return torch.cat([old, new], dim=-1)


def _cat(parts: list[Tensor], dim: int) -> Tensor:
    """Join, without a copy where there is one part."""
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=dim)
