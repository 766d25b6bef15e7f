"""How many processes work on one model, what each of them has of it, and what becomes of them when one is lost.

    replicate   whole copies of everything below; only gradients travel between them
    shard       parts of the weights, gathered block by block, each with batches of its own (FSDP)
    sequence    parts of one sample's tokens
    tensor      parts of every block's heads and MLP channels

Ranks are counted in this order, the last the fastest, so that those who talk most are neighbours. torchrun starts the
processes and restarts them; a process alone needs none of it, and has the same `Workers`.
"""

import math
import os
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import astuple, dataclass
from datetime import timedelta
from typing import Literal, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from reelflow.config import configuration
from reelflow.errors import ConfigError, ReelflowError

__all__ = ["DIMENSIONS", "Dimension", "MeshConfig", "Workers", "alone", "start"]

T = TypeVar("T")
Dimension = Literal["replicate", "shard", "sequence", "tensor"]
DIMENSIONS: tuple[Dimension, ...] = ("replicate", "shard", "sequence", "tensor")
PATIENCE = 5.0  # seconds in which those that are left say so
PATIENT = timedelta(days=365)
LOST = (
    "gloo",
    "nccl",
    "connection",
    "timed out",
    "timeout",
    "socket",
    "broken pipe",
)  # what the loss of a peer reads like


@configuration
class MeshConfig:
    """The extents of the mesh of processes.

    Raises:
        ConfigError: an extent is below 1.
    """

    replicate: int = 1
    shard: int = 1
    sequence: int = 1
    tensor: int = 1

    def __post_init__(self) -> None:
        for name in DIMENSIONS:
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}; nearest: 1")

    @property
    def world_size(self) -> int:
        return math.prod(astuple(self))

    @property
    def data_parallel(self) -> int:
        """How many different batches make one step."""
        return self.replicate * self.shard

    def check(self, world_size: int, num_heads: Iterable[int] = ()) -> None:
        """Refuse what cannot be, before any process group starts.

        Raises:
            ConfigError: the mesh is not of `world_size` processes, or `tensor` does not divide the heads.
        """
        heads = math.gcd(*num_heads)  # 0, which everything divides, where no heads are named
        if self.world_size == world_size and heads % self.tensor == 0:
            return
        nearest = self._nearest(world_size, heads)
        if heads % self.tensor:
            raise ConfigError(f"tensor={self.tensor} does not divide {heads} heads; nearest: {_text(nearest)}")
        raise ConfigError(
            f"the mesh {_text(self)} is of {self.world_size} processes, but there are {world_size}; nearest: "
            f"{_text(nearest)}, or torchrun --nproc-per-node {self.world_size} on one machine"
        )

    def _nearest(self, world_size: int, heads: int) -> "MeshConfig":
        """Return the mesh of so many processes whose extents differ least, as ratios; of several, the most sharded."""

        def meshes(left: int, count: int) -> Iterator[tuple[int, ...]]:
            if count == 1:
                yield (left,)
                return
            for first in range(1, left + 1):
                if left % first == 0:
                    yield from ((first, *rest) for rest in meshes(left // first, count - 1))

        def distance(extents: tuple[int, ...]) -> tuple[float, int]:
            pairs = zip(extents, astuple(self), strict=True)
            return round(sum(abs(math.log(a / b)) for a, b in pairs), 9), -extents[1]

        return MeshConfig(*min((m for m in meshes(world_size, 4) if heads % m[3] == 0), key=distance))


def _text(mesh: MeshConfig) -> str:
    extents = [f"{name}={getattr(mesh, name)}" for name in DIMENSIONS if getattr(mesh, name) > 1]
    return ", ".join(extents) or "replicate=1"


@dataclass(frozen=True)
class Workers:
    """This process among those that train together; alone, all exchanges are the identity."""

    rank: int
    world_size: int
    device: torch.device
    config: MeshConfig
    mesh: DeviceMesh | None = None  # of all four dimensions
    store: dist.Store | None = None  # where those that are left meet when one is lost
    owned: bool = False  # the process group is ended by `close`

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    @property
    def data_rank(self) -> int:
        """Which of the `data_size` batches of a step is this process's; sequence and tensor ranks share one."""
        return self.rank // (self.config.sequence * self.config.tensor)

    @property
    def data_size(self) -> int:
        return self.config.data_parallel

    def group(self, name: Dimension) -> dist.ProcessGroup | None:
        """Return the processes that differ from this one in that dimension only; alone, none."""
        return None if self.mesh is None else self.mesh.get_group(name)

    def sum(self, x: Tensor) -> Tensor:
        """Return the sum of a tensor over all processes but those of the `tensor` dimension, which have the same one."""
        x = x.clone()
        for name in DIMENSIONS[:3]:
            if getattr(self.config, name) > 1:
                dist.all_reduce(x, group=self.group(name))
        return x

    def agree(self, flag: bool) -> bool:
        """Return whether any process says yes."""
        if self.mesh is None:
            return flag
        said = torch.tensor(float(flag), device=self.device)
        dist.all_reduce(said, op=dist.ReduceOp.MAX)
        return bool(said)

    def first(self, name: str, make: Callable[[], T | None]) -> T | None:
        """Return what `make` returns, here as soon as rank 0 has: for work that leaves files where all can see them.

        However long rank 0 takes, nobody loses patience; where it returns None, or fails, the others return None without
        beginning. `name` is used once.
        """
        if self.mesh is None:
            return make()
        store = self.store or dist.distributed_c10d._get_default_store()
        if not self.is_first:
            store.wait([f"first/{name}"], PATIENT)
            return make() if store.get(f"first/{name}") == b"done" else None
        made = None
        try:
            made = make()
        finally:
            store.set(f"first/{name}", "nothing" if made is None else "done")
        return made

    @contextmanager
    def naming_failures(self) -> Iterator[None]:
        """Turn the loss of another process into an error that names it and the cause.

        Raises:
            ReelflowError: another process died, hangs or failed; the error that told of it is its cause.
        """
        try:
            yield
        except Exception as error:
            text = f"{type(error).__name__}: {error}".strip()
            lost = isinstance(error, RuntimeError) and any(word in text.lower() for word in LOST)
            others = self._ask(text if not lost else "")
            if not lost or self.world_size == 1:
                raise
            silent = [rank for rank, said in others.items() if said is None]
            failed = [f"rank {rank} failed ({said})" for rank, said in others.items() if said]
            if silent:
                failed.append(f"no answer from rank {', '.join(map(str, silent))}: dead, or stuck")
            causes = "; ".join(failed) or "all answer, so the network between them failed"
            raise ReelflowError(
                f"rank {self.rank} of {self.world_size} cannot go on: {causes}. First sign: {text.splitlines()[0]}"
            ) from error

    def _ask(self, failure: str) -> dict[int, str | None]:
        """Tell the others what failed here ("": another's loss), and return what each of them tells; None is nothing."""
        others: dict[int, str | None] = {rank: None for rank in range(self.world_size) if rank != self.rank}
        if self.store is None:
            return others
        with suppress(RuntimeError):  # the store may have died with its process
            self.store.set(f"failure/{self.rank}", failure)
            if self.device.type == "cpu":
                dist.destroy_process_group()  # so that those who wait for this one are told at once
            end = time.monotonic() + (0 if failure else PATIENCE)
            while time.monotonic() < end and None in others.values():
                for rank in others:
                    if others[rank] is None and self.store.check([f"failure/{rank}"]):
                        others[rank] = self.store.get(f"failure/{rank}").decode()
                time.sleep(0.05)
        return others

    def close(self) -> None:
        """End the process group, if `start` began it."""
        if self.owned and dist.is_initialized():
            dist.destroy_process_group()

    def __enter__(self) -> "Workers":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def alone(device: torch.device | str = "cpu") -> Workers:
    """Return the only process there is, without a process group."""
    return Workers(0, 1, torch.device(device), MeshConfig())


def start(mesh: MeshConfig, device: torch.device | str, *, timeout: float = 600.0) -> Workers:
    """Meet the other processes that torchrun started, as its environment says; without one, be alone.

    `timeout`, in seconds, is the longest wait for another process, now and later. Where a process group exists it is
    used. On a GPU tensors of the CPU can be exchanged too, through gloo.

    Raises:
        ConfigError: the mesh does not fit the number of processes.
        ReelflowError: the others cannot be reached.
    """
    device, exists = torch.device(device), dist.is_initialized()
    if not exists and "RANK" not in os.environ:
        mesh.check(1)
        return alone(device)
    rank = dist.get_rank() if exists else int(os.environ["RANK"])
    world_size = dist.get_world_size() if exists else int(os.environ["WORLD_SIZE"])
    mesh.check(world_size)
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)) if device.index is None else device.index)
        torch.cuda.set_device(device)
    store = None
    if not exists:
        limit = timedelta(seconds=timeout)
        try:
            store, _, _ = next(iter(dist.rendezvous("env://", rank, world_size, timeout=limit)))
            store.set_timeout(limit)
            # torchrun's store outlives a restart, and remembers where the dead could be reached
            store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
            backend = "gloo" if device.type == "cpu" else f"cpu:gloo,{device.type}:nccl"
            dist.init_process_group(
                backend, store=dist.PrefixStore("group", store), rank=rank, world_size=world_size, timeout=limit
            )
        except (RuntimeError, ValueError, OSError) as error:
            where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
            raise ReelflowError(
                f"rank {rank} of {world_size} did not meet the others at {where} within {timeout:g} s: "
                f"{str(error).splitlines()[0]}"
            ) from error
    made = init_device_mesh(device.type, astuple(mesh), mesh_dim_names=DIMENSIONS)
    return Workers(rank, world_size, device, mesh, made, store, owned=not exists)
