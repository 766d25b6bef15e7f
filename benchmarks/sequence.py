"""Attention to tokens that processes share: keys and values passed round a ring, against all of them gathered by each.

Run: python benchmarks/sequence.py. Processes exchange through gloo on one machine, one thread each. One attention,
forward and backward, of HEADS heads that are not cut (P = 1: the case of too few heads); queries are each process's
own.

    gathered    every process receives all keys and values, and attends once
    ring        `reelflow.parallel.ring`
    kept        bytes alive between forward and backward, which every layer keeps
    peak        the most bytes alive at once, of both passes, without what kernels use inside themselves
    keys        what of the peak are keys and values and their gradients, by formula, of N tokens of width D:
                gathered 2 x 2 N D e, ring (3 + 3) x 2 N D e / S
    layers      what LAYERS such attentions take in a step: LAYERS x kept + peak - kept
    seconds     of the clock, of the slowest process; the ways in turn, medians. With few cores processes wait for them
    work        seconds of all processors together, which other work on the machine disturbs less

FLOP = 3 * 4 * N^2 * D / S for each process, if the backward takes twice the forward.
"""

import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from reelflow.models.weighing import Weighing
from reelflow.nn.attention import attend
from reelflow.nn.patchify import Grid
from reelflow.parallel.ring import Ring, attend_ring
from reelflow.parallel.sequence import _exchange

HEADS, HEAD_DIM, LAYERS = 2, 64, 30
PROCESSES, TOKENS = (2, 4), (2048, 4096)
TURNS = 4
Way = Callable[[Tensor, Tensor, Tensor], Tensor]


def ways(tokens: int) -> dict[str, Way]:
    group, processes = dist.group.WORLD, dist.get_world_size()
    assert group is not None
    run = tokens // processes

    def gathered(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        blocks = _exchange(processes * [[k, v]], processes * [2 * [tuple(k.shape)]], group)
        keys, values = (torch.cat(each, dim=2) for each in zip(*blocks, strict=True))
        return attend(q, keys, values)

    def ring(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        runs = [slice(rank * run, (rank + 1) * run) for rank in range(processes)]
        none = q[:, :, :0], q[:, :, :0]
        return attend_ring(q, k, v, none, None, Grid(1, 1, tokens), runs, Ring(group, tuple(range(processes))))

    return {"gathered": gathered, "ring": ring}


def measure(rank: int, processes: int, folder: str) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    meeting = f"file://{Path(folder, 'meeting')}"
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=processes)
    for tokens in TOKENS:
        generator = torch.Generator().manual_seed(rank)
        shape = 1, HEADS, tokens // processes, HEAD_DIM
        q, k, v, grad = (torch.randn(shape, generator=generator) for _ in range(4))
        given = [x.requires_grad_() for x in (q, k, v)]
        bytes_of, seconds = {}, {name: list[tuple[float, float]]() for name in ways(tokens)}
        for name, way in ways(tokens).items():
            with Weighing() as weighing:
                found = way(q, k, v)
                kept = weighing.alive
                gradients = torch.autograd.grad(found, given, grad.transpose(1, 2).flatten(2))
            bytes_of[name] = kept, weighing.peak
            del found, gradients
        for _ in range(TURNS):
            for name, way in ways(tokens).items():
                dist.barrier()
                begin = time.perf_counter(), time.process_time()
                torch.autograd.grad(way(q, k, v), given, grad.transpose(1, 2).flatten(2))
                taken = torch.tensor([time.perf_counter() - begin[0], time.process_time() - begin[1]])
                everyone = [torch.empty_like(taken) for _ in range(processes)]
                dist.all_gather(everyone, taken)
                clocks, works = torch.stack(everyone).unbind(1)
                seconds[name].append((float(clocks.max()), float(works.sum())))
        if rank == 0:
            whole = 2 * tokens * HEADS * HEAD_DIM * q.itemsize
            keys = {"gathered": 2 * whole, "ring": 6 * whole // processes}
            for name, (kept, peak) in bytes_of.items():
                layers = (LAYERS - 1) * kept + peak
                sizes = " ".join(f"{size / 2**20:>8.1f}" for size in (kept, peak, keys[name], layers))
                clock, work = (statistics.median(turn[which] for turn in seconds[name]) for which in (0, 1))
                print(f"{processes:>9} {tokens:>7} {name:>9} {sizes} {clock:>8.2f} {work:>8.2f}", flush=True)
    dist.barrier()
    dist.destroy_process_group()


def main() -> None:
    print(f"{HEADS} heads of {HEAD_DIM}, float32, torch {torch.__version__}, {os.cpu_count()} cores")
    print("kept, peak, keys and layers in MiB")
    names = " ".join(f"{name:>8}" for name in ("kept", "peak", "keys", "layers", "seconds", "work"))
    print(f"{'processes':>9} {'tokens':>7} {'way':>9} {names}")
    for processes in PROCESSES:
        with tempfile.TemporaryDirectory() as folder:
            mp.spawn(measure, args=(processes, folder), nprocs=processes)


if __name__ == "__main__":
    main()
