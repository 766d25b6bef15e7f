"""Up to four processes that speak gloo, started once, for the tests of this room.

`run(3, function, *arguments)` calls a function of a test module in three processes and returns what each returned, by
rank. In it `torch.distributed` is ready: every call has a process group of its own, which meets in a file. When a
process raises, or none answers within four minutes, all are ended, and the error is raised here with the other's traceback.
Of one process the tests' own is it, where shapes are checked; the others go without, as that takes 5 s to set up.
"""

import atexit
import os
import pickle
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

__all__ = ["run"]

LARGEST = 4
SECONDS = 240.0  # two cores may be shared with a dozen processes
_workers: list[tuple[BaseProcess, Connection]] = []


def run(world_size: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """Return function(*arguments) of each process; tensors are copied. The function must be importable."""
    assert 1 <= world_size <= LARGEST
    if world_size == 1:
        with tempfile.TemporaryDirectory() as folder:
            return [_call(0, 1, str(Path(folder, "meeting")), function, arguments)]
    new = [_start() for _ in range(world_size - len(_workers))]
    _workers.extend(new)
    for _, pipe in new:
        pipe.recv_bytes()  # it has imported all it needs, which takes seconds, and its time can begin
    with tempfile.TemporaryDirectory() as folder:
        for rank in range(world_size):
            task = rank, world_size, str(Path(folder, "meeting")), function, arguments
            _workers[rank][1].send_bytes(pickle.dumps(task))
        try:
            return _answers([pipe for _, pipe in _workers[:world_size]])
        except BaseException:
            _end()
            raise


def _answers(pipes: list[Connection]) -> list[Any]:
    found: dict[int, Any] = {}
    deadline = time.monotonic() + SECONDS
    while len(found) < len(pipes):
        waiting = [pipe for rank, pipe in enumerate(pipes) if rank not in found]
        ready = wait(waiting, timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            ranks = [rank for rank in range(len(pipes)) if rank not in found]
            raise TimeoutError(f"no answer within {SECONDS:.0f} s from ranks {ranks} of {len(pipes)}")
        for pipe in ready:
            rank = pipes.index(pipe)
            try:
                failed, answer = pickle.loads(pipe.recv_bytes())
            except EOFError:
                raise RuntimeError(f"the process of rank {rank} of {len(pipes)} died") from None
            if failed:
                raise answer  # the others may wait for it, and will not be asked
            found[rank] = answer
    return [found[rank] for rank in range(len(pipes))]


def _start() -> tuple[BaseProcess, Connection]:
    context = get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=_serve, args=(there,), daemon=True)
    process.start()
    there.close()
    return process, here


def _end() -> None:
    for process, pipe in _workers:
        process.kill()
        process.join()
        process.close()
        pipe.close()
    _workers.clear()


atexit.register(_end)


def _serve(pipe: Connection) -> None:
    """Answer task after task; one that fails is the last."""

    torch.set_num_threads(1)
    pipe.send_bytes(b"ready")
    while True:
        try:
            task = pipe.recv_bytes()
        except EOFError:
            return
        try:
            pipe.send_bytes(pickle.dumps((False, _call(*pickle.loads(task)))))
        except Exception as error:
            error.add_note(f"in the process of a test:\n{traceback.format_exc()}")
            try:
                reply = pickle.dumps((True, error))
                pickle.loads(reply)
            except Exception:
                reply = pickle.dumps((True, RuntimeError(traceback.format_exc())))
            pipe.send_bytes(reply)
            time.sleep(1.0)  # let it be read before the others miss this process
            return


def _call(rank: int, world_size: int, meeting: str, function: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    limit = timedelta(seconds=SECONDS)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=world_size, timeout=limit)
    try:
        answer = function(*arguments)
        dist.barrier()  # no one leaves while another still reads
        return answer
    finally:
        dist.destroy_process_group()
