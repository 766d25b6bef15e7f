"""The tokens of one clip, or of one row of clips, shared out among the S processes of a group.

    embedding    every process embeds the whole clip and keeps its own run of tokens: 1 / S of them, or one more
    blocks       norms, projections, MLPs and attention to the context: its own tokens alone
    attention    [my tokens, all heads] -> [all tokens, my heads], attend under any pattern, and back
    readout      its own tokens; then the prediction, which is small, is joined on every process

The exchange of tokens for heads is that of Jacobs et al. 2023 (DeepSpeed-Ulysses). Context tokens are few and stay on
every process, whose heads of their queries, keys and values it uses. Runs need not be equal, nor parts of the heads:
nothing is padded, and no token is dropped.

**Fewer heads than processes.** Then the heads are cut into P parts, where P divides S. P processes, neighbours,
exchange tokens for heads, so that each has a part of the heads of P / S of the tokens; and the S / P processes of one
part are a ring, round which keys and values pass (`parallel.ring`; Fang and Zhao 2024, USP). No process ever has more
than 1 / S of all keys and values of its own, and two such blocks of others. Clips of a row cost a process the pairs
that its own queries make: those of a long clip more than those of short ones, and the ring waits for the last. What a
ring's processes make of the context, each for itself, differs by rounding: they meet the blocks in different orders.
Under any pattern but `Full` a run may cut what attends together. There every process of a part gathers the keys and
values of all tokens and answers all queries of its heads: S / P times the memory, and the work, but local patterns
are cheap.

**Bytes.** With N tokens of width D, e bytes a number and B clips, one attention sends from each process, forward,

    heads alone (P = S)      4 B N D e (S - 1) / S^2           q, k, v out and the result back
    P parts of the heads     4 B N D e (P - 1) / (S P)  +  2 B N D e (S - P) / (S P)         3, not 2, unless `Full`

and backward as much again, the ring twice as much: keys and values travel, and so do their gradients, in float32 at
least. The ring alone (P = 1) sends S / 2 times what the heads alone do, but while it computes.
To this the L context tokens add B L D e (P - 1) / P per process, for what comes of their queries. Once per step
the joined prediction adds B N O e (S - 1) / S, with the O numbers that are read out of a token.

**Gradients.** Every exchange is linear and its backward is its adjoint; a ring brings each block's gradients home. So
the gradients of the parameters on the processes *sum* to the gradient of the *sum* of the losses that the processes
compute, whatever these are. When each takes the loss of the joined prediction, that is S times the gradient of one
process: divide the losses, or the sum, by S (`parallel.shard.loss_share` does). The same holds for gradients of
inputs.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain
from math import prod
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from reelflow.errors import ConfigError
from reelflow.models.blocks import Projection, Streams
from reelflow.models.dit import VideoDiT
from reelflow.nn.modulation import Rows
from reelflow.nn.patchify import Grid
from reelflow.nn.patterns import Full, Gated, Pattern, Segments, Share, attend_pattern
from reelflow.parallel.ring import Ring, attend_ring

__all__ = ["head_parts", "shard_sequence", "token_counts"]

Shape = tuple[int, ...]


def shard_sequence(model: VideoDiT, group: dist.ProcessGroup, *, parts: int | None = None) -> RemovableHandle:
    """Let the processes of a group share every clip's tokens between the model's embedding and its prediction.

    All of them call the model with the same input, as many times, and each gets the whole prediction; see above for what
    gradients mean. `parts` is P, by default `head_parts`: 12 heads on 8 processes are 2 heads for half of them and 1 for
    the others, or, with parts=4, 3 heads for half the queries, which is 3/4 of the longest time for more bytes. `remove()`
    of what is returned ends the sharing.

    Raises:
        ConfigError: `parts` does not divide the group, or exceeds the heads; and, when the model is called, a clip or row
            has fewer tokens than the group has processes.
    """
    attentions = (module.num_heads for module in model.blocks.modules() if isinstance(module, Projection))
    head_parts(min(attentions, default=model.config.num_heads), group.size(), parts)  # fewer, where heads are dealt too

    def enter(module: nn.Module, given: tuple[Streams], streams: Streams) -> Streams:
        return _share(streams, group, parts)

    return model.enter.register_forward_hook(enter)


def token_counts(num_tokens: int, processes: int) -> list[int]:
    """Return the length of each process's run of tokens: equal, but for one token more in the first.

    Raises:
        ConfigError: there are fewer tokens than processes.
    """
    if not 1 <= processes <= num_tokens:
        raise ConfigError(
            f"{num_tokens} tokens cannot be shared among {processes} processes, at least one for each; "
            f"nearest: {max(1, min(processes, num_tokens))}"
        )
    return _even(num_tokens, processes)


def head_parts(num_heads: int, processes: int, asked: int | None = None) -> int:
    """Return into how many parts the heads are cut: `asked`, or the largest number that divides the processes.

    Raises:
        ConfigError: `asked` does not divide the processes, or there are fewer heads.
    """
    possible = [parts for parts in range(1, min(num_heads, processes) + 1) if processes % parts == 0]
    if asked is not None and asked not in possible:
        near = min(possible, key=lambda parts: abs(parts - asked))
        raise ConfigError(
            f"{num_heads} heads on {processes} processes are cut into {' or '.join(map(str, possible))} parts, "
            f"got {asked}; nearest: {near}"
        )
    return possible[-1] if asked is None else asked


def _even(total: int, parts: int) -> list[int]:
    return [total // parts + (part < total % parts) for part in range(parts)]


def _slices(counts: Sequence[int]) -> list[slice]:
    ends = [sum(counts[: part + 1]) for part in range(len(counts))]
    return [slice(end - count, end) for count, end in zip(counts, ends, strict=True)]


def _share(streams: Streams, group: dist.ProcessGroup, parts: int | None) -> Streams:
    """Keep this process's tokens, and what is told of each."""
    whole = streams.grid
    assert not isinstance(whole, Share), "the model is sharded twice"
    ranks = _Ranks(group, whole, token_counts(whole.num_tokens, group.size()), parts)
    here, context = ranks.mine, streams.context.shape[1]
    vector, rows = _told(streams.vector, streams.rows, whole, here)
    last, last_rows = (None, None) if streams.last is None else _told(streams.last, streams.last_rows, whole, here)
    return replace(
        streams,
        video=streams.video[:, here].clone(),  # a view would keep all tokens in memory until the backward is done
        vector=vector,
        rows=rows,
        rope=None if streams.rope is None else streams.rope[..., here, :, :].clone(),
        mask=None if streams.mask is None else streams.mask[..., : context + here.stop - here.start],
        grid=Share(whole, here.start, here.stop, ranks.attend, ranks.join),
        last=last,
        last_rows=last_rows,
    )


def _told(vector: Tensor, rows: Rows | None, whole: Grid | Segments, here: slice) -> tuple[Tensor, Rows | None]:
    """Return the vector of each group of tokens, and which of them is that of each token here."""
    groups = vector.shape[1]
    if rows is not None:
        return vector, rows[here].clone()
    if groups == 1:
        return vector, None
    if groups == whole.num_tokens:
        return vector[:, here].clone(), None
    rows = torch.arange(here.start, here.stop, device=vector.device) // (whole.num_tokens // groups)
    # Rows name the groups of one clip; of several, each token gets a vector of its own.
    return (vector, rows) if vector.shape[0] == 1 else (vector[:, rows], None)


@dataclass(frozen=True)
class _Ranks:
    """Who has which tokens, and which heads of which: rank r = run * P + part, of S / P runs of P processes each."""

    group: dist.ProcessGroup
    whole: Grid | Segments
    counts: list[int]  # tokens of each rank
    parts: int | None

    @property
    def mine(self) -> slice:
        return _slices(self.counts)[self.group.rank()]

    @torch.compiler.disable  # blocks are compiled up to here and from here on: exchanges are no work for a compiler
    def attend(
        self, pattern: Pattern, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, alpha: Tensor | None
    ) -> Float[Tensor, "B Q D"]:
        """Attend from the tokens here, and the context's, to all tokens."""
        rank, size = self.group.rank(), len(self.counts)
        parts = head_parts(q.shape[1], size, self.parts)
        tokens, heads = _slices(self.counts), _slices(_even(q.shape[1], parts))
        part, n = rank % parts, self.counts[rank]
        mine, run = heads[part], range(rank - part, rank - part + parts)  # ranks that together have all heads
        aside, length = q.shape[2] - n, k.shape[2] - n  # context queries, context keys
        ring = parts < size and isinstance(pattern, Full)
        peers = run if ring else range(size)

        # Tokens go to those who have the heads: of this run, or of all.
        sent: list[list[Tensor]] = [[] for _ in range(size)]
        shapes: list[list[Shape]] = [[] for _ in range(size)]
        for other in peers:
            own = heads[other % parts]
            sent[other] = [q[:, own, aside:], k[:, own, length:], v[:, own, length:]]
            shape: Shape = (q.shape[0], mine.stop - mine.start, self.counts[other], q.shape[3])
            shapes[other] = 3 * [shape]
        got = _exchange(sent, shapes, self.group)
        queries, keys, values = (torch.cat(each, dim=2) for each in zip(*(got[other] for other in peers), strict=True))
        queries = torch.cat([q[:, mine, :aside], queries], dim=2)
        context = k[:, mine, :length], v[:, mine, :length]

        if ring:
            hidden = None if mask is None else mask[..., :length]
            runs = [slice(tokens[a].start, tokens[a + parts - 1].stop) for a in range(0, size, parts)]
            others = Ring(self.group, tuple(range(part, size, parts)))
            found = attend_ring(queries, keys, values, context, hidden, self.whole, runs, others)
        else:
            keys, values = (torch.cat(pair, dim=2) for pair in zip(context, (keys, values), strict=True))
            if mask is not None:
                mask = torch.cat([mask[..., :length], mask.new_ones(*mask.shape[:3], self.whole.num_tokens)], dim=-1)
            if isinstance(pattern, Gated) and alpha is not None:
                alpha = self._gates(pattern, alpha, mine)
            found = attend_pattern(pattern, queries, keys, values, self.whole, mask=mask, alpha=alpha)
        first = aside - (tokens[run[0]].start if ring else 0)  # where token 0 is, or would be

        # What was found goes back to those who asked: all heads of a token meet again.
        sent, shapes = [[] for _ in range(size)], [[] for _ in range(size)]
        for other in run:
            theirs = slice(first + tokens[other].start, first + tokens[other].stop)
            own = heads[other % parts]
            sent[other] = [torch.cat([found[:, :aside], found[:, theirs]], dim=1)]
            shapes[other] = [(q.shape[0], q.shape[2], (own.stop - own.start) * q.shape[3])]
        got = _exchange(sent, shapes, self.group)
        return torch.cat([got[other][0] for other in run], dim=-1)

    def join(self, x: Float[Tensor, "B n D"]) -> Float[Tensor, "B N D"]:
        """Return the rows of all tokens, on every process."""
        shapes = [[(x.shape[0], count, x.shape[2])] for count in self.counts]
        return torch.cat([part for (part,) in _exchange([[x]] * len(self.counts), shapes, self.group)], dim=1)

    def _gates(self, pattern: Gated, alpha: Tensor, mine: slice) -> Tensor:
        """Return what all tokens mix by, in these heads."""
        if pattern.granularity == "token":
            return self.join(alpha)
        return alpha[..., mine] if pattern.granularity == "head" else alpha


def _exchange(
    sent: Sequence[Sequence[Tensor]], shapes: Sequence[Sequence[Shape]], group: dist.ProcessGroup
) -> list[list[Tensor]]:
    """Send some tensors to each process, and return those of the given shapes from each."""
    sizes = [[prod(shape) for shape in each] for each in shapes]
    flat = torch.cat([x.reshape(-1) for each in sent for x in each])
    counts = [sum(x.numel() for x in each) for each in sent]
    got = iter(_AllToAll.apply(flat, counts, [sum(each) for each in sizes], group).split([*chain(*sizes)]))
    return [[next(got).view(shape) for shape in each] for each in shapes]


class _AllToAll(torch.autograd.Function):
    """Send `out` numbers to each process and get `back` from each; the adjoint sends them home."""

    @staticmethod
    def forward(ctx: Any, flat: Tensor, out: list[int], back: list[int], group: dist.ProcessGroup) -> Tensor:
        ctx.arguments = back, out, group
        got = flat.new_empty(sum(back))
        dist.all_to_all_single(got, flat.contiguous(), back, out, group=group)
        return got

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        return _AllToAll.apply(grads[0], *ctx.arguments), None, None, None
