"""Attention to a whole sequence, of which each process has a run: keys and values go round, queries stay at home.

    step 0      every process asks its own block of keys and values
    step s      it asks the block of the s-th before it; meanwhile this goes on to the next process, and another comes

Of R processes. A step gives a part of the answer and the logarithm l_s of the sum of its weights. Parts join exactly:

    l = log sum_s exp(l_s)        o = sum_s exp(l_s - l) o_s

(Liu et al. 2023, Ring Attention.) With l and o of the whole each block's gradients are its own affair, for p = exp(q
k / sqrt(d) - l), dv = p do, d(q k) = p (v do - o do). So backward blocks go round once more, and behind them the sums
of their gradients, R - 1 steps to get home. Kernels of flash attention compute both from l and o (Dao 2023); masked
keys, and numbers that have no such kernel, take the plain way, a part of the queries at a time.

At any time a process has three blocks at most: its own, the one it asks and the one that comes; backward also three of
sums of gradients, in float32 at least: of its own, those that leave and those that come. Recomputation that keeps what
attention gives (`parallel.recompute`) keeps the part of every step: R times the answer.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Bool, Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from reelflow.nn.attention import merge_heads
from reelflow.nn.patchify import Grid
from reelflow.nn.patterns import Segments, tokens_within

__all__ = ["Ring", "attend_ring"]

SCORES = 2**24  # the most that the plain way holds at a time
aten = torch.ops.aten


@dataclass(frozen=True)
class Ring:
    """Processes that pass blocks on, each to the next: their ranks in a group."""

    group: dist.ProcessGroup
    ranks: tuple[int, ...]

    @property
    def place(self) -> int:
        return self.ranks.index(self.group.rank())

    def pass_on(self, block: Tensor, tokens: int, tag: int) -> Callable[[], Tensor]:
        """Begin to send a block to the next process; what is returned waits for one of so many tokens from the last."""
        coming = block.new_empty(*block.shape[:3], tokens, block.shape[4])
        after, before = (self.ranks[(self.place + step) % len(self.ranks)] for step in (1, -1))
        works = dist.batch_isend_irecv(
            [
                dist.P2POp(dist.isend, block, group=self.group, tag=tag, group_peer=after),
                dist.P2POp(dist.irecv, coming, group=self.group, tag=tag, group_peer=before),
            ]
        )

        def arrived() -> Tensor:
            for work in works:
                work.wait()
            return coming

        return arrived


def attend_ring(
    q: Float[Tensor, "B heads Q d"],
    k: Float[Tensor, "B heads n d"],
    v: Float[Tensor, "B heads n d"],
    context: tuple[Float[Tensor, "B heads L d"], Float[Tensor, "B heads L d"]],
    mask: Bool[Tensor, "B 1 1 L"] | None,
    whole: Grid | Segments,
    runs: Sequence[slice],
    ring: Ring,
) -> Float[Tensor, "B Q heads*d"]:
    """Attend from the tokens of this process's run, and from the context's where they ask first, to all that there are.

    `runs` are the tokens of each process of the ring. All of them have the keys and values of the context, of which
    `mask` hides some; k and v are those of the run. Of `Segments` each clip sees itself and its own context.
    """
    counts = [tokens_within(whole, run.start, run.stop) for run in runs]
    own, length = counts[ring.place], context[0].shape[2]
    clips = whole.context if isinstance(whole, Segments) and length else (length, *(0 for _ in own[1:]))
    asking = clips if q.shape[2] > k.shape[2] else (0,) * len(own)
    keys, contexts = torch.stack([k, v]), torch.stack(context)
    if torch.is_autocast_enabled(q.device.type) and q.dtype != torch.float64:  # as attention anywhere else
        q, keys, contexts = (x.to(torch.get_autocast_dtype(q.device.type)) for x in (q, keys, contexts))
    if len(own) > 1:  # clip by clip, each after its context
        pieces = q.split([*asking, *own], dim=2)
        q = torch.cat([piece for pair in zip(pieces, pieces[len(own) :], strict=False) for piece in pair], dim=2)
    asked = [sum(pair) for pair in zip(asking, own, strict=True)]
    found = _Ring.apply(q, keys, contexts, mask, asked, clips, counts, ring)
    if len(own) > 1:
        pieces = found.split([n for pair in zip(asking, own, strict=True) for n in pair], dim=2)
        found = torch.cat([*pieces[::2], *pieces[1::2]], dim=2)
    return merge_heads(found)


class _Ring(torch.autograd.Function):
    """Attend to blocks as they go round; `asked`, `clips` and `counts` are queries and keys of each clip of a row."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        own: Tensor,
        context: Tensor,
        mask: Tensor | None,
        asked: Sequence[int],
        clips: Sequence[int],
        counts: Sequence[Sequence[int]],
        ring: Ring,
    ) -> Tensor:
        dtype = torch.promote_types(q.dtype, torch.float32)
        out = q.new_zeros(q.shape, dtype=dtype)
        lse = q.new_full(q.shape[:3], float("-inf"), dtype=dtype)

        def ask(block: Tensor, told: Sequence[int], mask: Tensor | None = None) -> None:
            for queries, found, total, keys, values in _clips((q, out, lse), block, asked, told):
                part, added = _attend(queries, keys, values, mask)
                found.lerp_(part.to(dtype), (added - total).sigmoid().unsqueeze(-1))
                torch.logaddexp(total, added, out=total)

        for place, block in _round(own, counts, ring):
            ask(block, counts[place])
            del block  # that one more may come in its place
        ask(context, clips, mask)
        out = out.to(q.dtype)
        ctx.save_for_backward(q, own, context, mask, out, lse)
        ctx.arguments = asked, clips, counts, ring
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, own, context, mask, out, lse = ctx.saved_tensors
        asked, clips, counts, ring = ctx.arguments
        grad, dq = grad.contiguous(), torch.zeros_like(q, dtype=lse.dtype)

        def ask(block: Tensor, told: Sequence[int], sums: Callable[[], Tensor], mask: Tensor | None = None) -> Tensor:
            """Return sums of gradients of keys and values with those added that come from the queries here."""
            found = []
            for sums_of_queries, *given in _clips((dq, grad, q, out, lse), block, asked, told):
                do, queries, answers, totals, keys, values = given
                part, *others = _gradients(do, queries, answers, totals, keys, values, mask)
                sums_of_queries += part
                found.append(others)
            total = sums()  # only now: they come while this block is asked
            for views, others in zip(_clips((), total, asked, told), found, strict=True):
                for view, part in zip(views, others, strict=True):
                    view += part
            return total

        def zeros(block: Tensor) -> Callable[[], Tensor]:
            return lambda: torch.zeros_like(block, dtype=lse.dtype)

        blocks = _round(own, counts, ring)
        home = ask(next(blocks)[1], counts[ring.place], zeros(own))
        arrived: Callable[[], Tensor] | None = None
        for place, block in blocks:
            sums = ask(block, counts[place], arrived or zeros(block))
            del block
            arrived = ring.pass_on(sums, sum(counts[place - 1]), 1)
        if arrived is not None:
            home += arrived()
        dcontext = ask(context, clips, zeros(context), mask)
        return dq.to(q.dtype), home.to(own.dtype), dcontext.to(context.dtype), *(None,) * 5


def _round(block: Tensor, counts: Sequence[Sequence[int]], ring: Ring) -> Iterator[tuple[int, Tensor]]:
    """Yield every process's block, with its place, from the own one backwards."""
    for step in range(len(counts)):
        place = (ring.place - step) % len(counts)
        coming = None if step + 1 == len(counts) else ring.pass_on(block, sum(counts[place - 1]), 0)
        yield place, block
        if coming is not None:
            block, coming = coming(), None


def _clips(
    queries: Sequence[Tensor], block: Tensor, asked: Sequence[int], told: Sequence[int]
) -> Iterator[list[Tensor]]:
    """Yield what is told of the queries, and the keys and values, of each clip that has some of both."""
    cuts = [*(x.split(list(asked), dim=2) for x in queries), *(x.split(list(told), dim=2) for x in block.unbind())]
    return (views for n, m, *views in zip(asked, told, *cuts, strict=True) if n and m)


def _has_kernel(q: Tensor, mask: Tensor | None) -> bool:
    half = q.dtype in (torch.bfloat16, torch.float16) and q.shape[-1] % 8 == 0 and q.shape[-1] <= 256
    return mask is None and (q.device.type == "cpu" or (q.is_cuda and half))


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the attention of some queries to some keys, and the logarithm of the sum of its weights."""
    if _has_kernel(q, mask):
        if q.is_cuda:
            out, lse, *_ = aten._scaled_dot_product_flash_attention(q, k, v)
            return out, lse
        return aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)
    outs, sums = [], []
    with torch.autocast(q.device.type, enabled=False):
        for part in q.split(_rows(q, k), dim=2):
            scores = _scores(part, k, mask)
            sums.append(scores.logsumexp(-1))
            outs.append(_weights(scores, sums[-1]) @ v.to(scores.dtype))
    return torch.cat(outs, dim=2), torch.cat(sums, dim=2)


def _gradients(
    grad: Tensor, q: Tensor, out: Tensor, lse: Tensor, k: Tensor, v: Tensor, mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of queries, keys and values, where out and lse are of all keys that the queries see."""
    if _has_kernel(q, mask):
        if q.is_cuda:
            drawn = (torch.empty(size, dtype=torch.uint64, device=q.device) for size in ((2,), ()))  # for dropout
            extents = None, None, q.shape[2], k.shape[2], 0.0, False
            lse = lse.contiguous()  # read as if it were
            return aten._scaled_dot_product_flash_attention_backward(grad, q, k, v, out, lse, *extents, *drawn)
        return aten._scaled_dot_product_flash_attention_for_cpu_backward(grad, q, k, v, out, lse, 0.0, False)
    keys, values = k.to(lse.dtype), v.to(lse.dtype)
    dq, dk, dv = [], torch.zeros_like(keys), torch.zeros_like(values)
    parts = (x.to(lse.dtype).split(_rows(q, k), dim=2) for x in (grad, q, out, lse))
    with torch.autocast(q.device.type, enabled=False):
        for do, part, o, total in zip(*parts, strict=True):
            weights = _weights(_scores(part, k, mask), total)
            dscores = weights * (do @ values.mT - (do * o).sum(-1, keepdim=True)) * q.shape[-1] ** -0.5
            dq.append(dscores @ keys)
            dk += dscores.mT @ part
            dv += weights.mT @ do
    return torch.cat(dq, dim=2), dk, dv


def _rows(q: Tensor, k: Tensor) -> int:
    return max(1, SCORES // (q.shape[0] * q.shape[1] * k.shape[2]))


def _scores(q: Tensor, k: Tensor, mask: Tensor | None) -> Tensor:
    dtype = torch.promote_types(q.dtype, torch.float32)
    scores = (q.to(dtype) * q.shape[-1] ** -0.5) @ k.to(dtype).mT
    return scores if mask is None else scores.masked_fill(mask.logical_not(), float("-inf"))


def _weights(scores: Tensor, lse: Tensor) -> Tensor:
    """Return exp(scores - lse); zeros where all keys are hidden."""
    return (scores - lse.clamp(min=torch.finfo(lse.dtype).min).unsqueeze(-1)).exp()
