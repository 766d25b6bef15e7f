"""Rings of 1 to 4 processes, compared with attention in one."""

from functools import partial

import pytest
import torch
import torch.distributed as dist
from processes import run
from torch._subclasses.fake_tensor import FakeTensorMode

from reelflow.models.weighing import Weighing
from reelflow.nn.attention import attend
from reelflow.nn.patchify import Grid
from reelflow.parallel import ring
from reelflow.parallel.ring import Ring, attend_ring


def draw(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.mark.parametrize("keys", [5, 8])
def test_kernel_and_plain_way_give_the_same_parts_and_gradients(monkeypatch, keys):
    """Also when the plain way takes the queries a few at a time; parts of more keys join to the whole."""
    q, k, v, grad = (draw(2, 3, n, 4, seed=n) for n in (7, keys, keys + 1, 6))
    v, grad = v[:, :, 1:], draw(2, 3, 7, 4, seed=9)
    everything = torch.ones(2, 1, 1, keys, dtype=torch.bool)
    more = draw(2, 3, 7, 4, seed=2), draw(2, 3, 7, seed=3).abs() + 3  # as if there were other keys too
    for rows in (2**24, 2 * 3 * keys * 2):
        monkeypatch.setattr(ring, "SCORES", rows)
        for ours, theirs in (
            (ring._attend(q, k, v, everything), ring._attend(q, k, v, None)),
            (ring._gradients(grad, q, *more, k, v, everything), ring._gradients(grad, q, *more, k, v, None)),
        ):
            for a, b in zip(ours, theirs, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    assert ring._rows(q, k) == 2


def test_a_clip_whose_context_is_hidden_gets_nothing_of_it():
    q, k, v = (draw(2, 1, 3, 4, seed=seed) for seed in range(3))
    mask = torch.tensor([[False, False, False], [True, True, False]])[:, None, None]
    out, lse = ring._attend(q, k, v, mask)
    assert not out[0].any()
    assert torch.isneginf(lse[0]).all()
    seen, _ = ring._attend(q[1:], k[1:, :, :2], v[1:, :, :2], None)
    torch.testing.assert_close(out[1:], seen, rtol=1e-12, atol=1e-12)
    grads = ring._gradients(out, q, out, lse.nan_to_num(neginf=0.0), k, v, mask)
    assert all(not grad[0].any() and grad.isfinite().all() for grad in grads)


def between(counts: list[int], dtype: torch.dtype, *, autocast: bool) -> tuple[torch.Tensor, ...]:
    """Return the answer to all queries and the gradients of all keys and values, as every process has them."""
    q, k, v, grad = (draw(1, 2, sum(counts), 16, seed=seed, dtype=dtype) for seed in range(4))
    ends = [sum(counts[: place + 1]) for place in range(len(counts))]
    runs = [slice(end - count, end) for end, count in zip(ends, counts, strict=True)]
    here = runs[dist.get_rank()]
    own = [x[:, :, here].clone().requires_grad_() for x in (q, k, v)]
    around, nothing = Ring(dist.group.WORLD, tuple(range(len(counts)))), q[:, :, :0]
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found = attend_ring(*own, (nothing, nothing), None, Grid(1, 1, sum(counts)), runs, around)
    return found.detach(), *torch.autograd.grad(found, own, grad[:, :, here].transpose(1, 2).flatten(2).to(found.dtype))


@pytest.mark.parametrize(
    ("dtype", "autocast", "tolerance"),
    [(torch.float64, False, 1e-12), (torch.bfloat16, False, 2e-2), (torch.float32, True, 2e-2)],
)
def test_what_goes_round_gives_the_whole(dtype, autocast, tolerance):
    """In bfloat16 to its rounding, also where autocast asks for it."""
    counts = [5, 1, 3]
    q, k, v, grad = (draw(1, 2, sum(counts), 16, seed=seed, dtype=dtype).double().requires_grad_() for seed in range(4))
    whole = attend(q, k, v)
    right = whole, *torch.autograd.grad(whole, (q, k, v), grad.transpose(1, 2).flatten(2))
    parts = zip(*run(3, partial(between, autocast=autocast), counts, dtype), strict=True)
    for index, (ours, theirs) in enumerate(zip(parts, right, strict=True)):
        found = torch.cat(ours, dim=1 if index == 0 else 2)
        assert found.dtype == (torch.bfloat16 if autocast and index == 0 else dtype)
        torch.testing.assert_close(found.double(), theirs, rtol=tolerance, atol=tolerance)


def weights(tokens: int) -> tuple[int, int]:
    """Return the bytes that are kept for the backward, and the most of both passes."""
    size, group = dist.get_world_size(), dist.group.WORLD
    q, k, v = (draw(1, 1, tokens // size, 8, seed=seed).requires_grad_() for seed in range(3))
    runs = [slice(place * tokens // size, (place + 1) * tokens // size) for place in range(size)]
    nothing = q[:, :, :0].detach()
    with Weighing() as weighing:
        around = Ring(group, tuple(range(size)))
        found = attend_ring(q, k, v, (nothing, nothing), None, Grid(1, 1, tokens), runs, around)
        kept = weighing.alive
        found.backward(torch.ones_like(found))
    return kept, weighing.peak


def test_memory_falls_as_processes_are_added():
    tokens, row = 240, 8 * 8  # bytes of a token's numbers
    for size in (2, 4):
        for kept, peak in run(size, weights, tokens):
            n = tokens // size
            assert kept == n * (2 * row + row + 8)  # keys and values in one, the answer, and a number for each query
            blocks = 2 * row * (2 + 3)  # of keys and values beside its own, and of gradients
            parts = row * (3 + 3)  # what the kernel gives, the queries' sums, and two layouts of what is given
            assert peak <= kept + n * (blocks + parts)


class Kept:
    """What a forward leaves to its backward."""

    def save_for_backward(self, *tensors: torch.Tensor | None) -> None:
        self.saved_tensors = tensors


@pytest.mark.parametrize(("dtype", "kernel"), [(torch.bfloat16, True), (torch.float32, False)])
def test_an_accelerator_never_meets_what_lies_elsewhere(monkeypatch, dtype, kernel):
    """Without one: tensors that have a device and no data, blocks that go nowhere, and no graph, which wants a device."""
    monkeypatch.setattr(dist, "P2POp", lambda *args, **kwargs: None)
    monkeypatch.setattr(dist, "batch_isend_irecv", lambda operations: [])
    around, runs, kept = Ring(dist.ProcessGroup(0, 3), (0, 1, 2)), [slice(0, 4), slice(4, 7), slice(7, 9)], Kept()
    with FakeTensorMode(), torch.no_grad():
        q, k, v, c = (torch.empty(2, 3, n, 16, dtype=dtype, device="cuda") for n in (8, 4, 4, 4))
        mask = torch.ones(2, 1, 1, 4, dtype=torch.bool, device="cuda")
        assert ring._has_kernel(q, None) == kernel
        found = [attend_ring(q, k, v, (c, c), mask, Grid(1, 3, 3), runs, around)]
        blocks = torch.stack([k, v]), torch.stack([c, c])
        found.append(ring._Ring.forward(kept, q, *blocks, mask, [8], [4], [[4], [3], [2]], around))
        found += ring._Ring.backward(kept, found[1])[:3]
    assert all((x.device.type, x.dtype) == ("cuda", dtype) for x in found)
    assert [x.shape for x in found] == [(2, 8, 48), q.shape, q.shape, *(block.shape for block in blocks)]
