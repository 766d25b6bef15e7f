import os
import subprocess
import sys
import time
from math import prod

import processes
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from reelflow.config import from_dict, to_dict
from reelflow.errors import ConfigError, ReelflowError
from reelflow.parallel.mesh import MeshConfig, alone, start


def test_a_mesh_is_one_line_of_a_recipe():
    mesh = MeshConfig(replicate=2, shard=3, tensor=4)
    assert from_dict(MeshConfig, to_dict(mesh)) == mesh
    assert (mesh.world_size, mesh.data_parallel) == (24, 6)
    with pytest.raises(ConfigError, match="sequence must be at least 1, got 0; nearest: 1"):
        MeshConfig(sequence=0)


extents = st.integers(1, 6)


@given(st.tuples(extents, extents, extents, extents), st.integers(1, 48), st.integers(1, 24))
def test_the_nearest_mesh_is_possible_and_a_possible_one_is_its_own_nearest(sizes, world_size, heads):
    mesh = MeshConfig(*sizes)
    near = mesh._nearest(world_size, heads)
    near.check(world_size, [heads])
    possible = prod(sizes) == world_size and heads % mesh.tensor == 0
    assert (near == mesh) == possible
    if not possible:
        with pytest.raises(ConfigError, match="nearest: "):
            mesh.check(world_size, [heads])


@pytest.mark.parametrize(
    ("mesh", "world_size", "heads", "message"),
    [
        (MeshConfig(shard=8), 6, 12, "the mesh shard=8 is of 8 processes, but there are 6; nearest: shard=6"),
        (MeshConfig(shard=2, sequence=4), 4, 12, "nearest: shard=2, sequence=2, or torchrun --nproc-per-node 8"),
        (MeshConfig(tensor=8), 8, 12, "tensor=8 does not divide 12 heads; nearest: shard=2, tensor=4"),
    ],
)
def test_an_impossible_mesh_is_refused_with_the_nearest(mesh, world_size, heads, message):
    with pytest.raises(ConfigError, match=message):
        mesh.check(world_size, [heads])


def test_one_process_needs_no_process_group(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    with start(MeshConfig(), "cpu") as workers:
        assert not torch.distributed.is_initialized()
        assert workers == alone("cpu")
        assert (workers.rank, workers.world_size, workers.data_rank, workers.data_size) == (0, 1, 0, 1)
        assert workers.is_first
        assert workers.group("shard") is None
        assert workers.sum(torch.tensor(3.0)) == 3
        assert workers.agree(True)
        assert not workers.agree(False)
    with pytest.raises(ConfigError, match="the mesh shard=2 is of 2 processes, but there are 1; nearest: replicate=1"):
        start(MeshConfig(shard=2), "cpu")
    with pytest.raises(RuntimeError, match="mine"), alone().naming_failures():
        raise RuntimeError("mine")


def places(mesh: MeshConfig) -> tuple[object, ...]:
    workers = start(mesh, "cpu")
    total = workers.sum(torch.tensor([1.0, workers.rank]))
    return workers.data_rank, workers.data_size, total.tolist(), workers.agree(workers.rank == 2), workers.is_first


def test_ranks_of_one_sequence_or_of_one_tensor_group_share_a_batch():
    found = processes.run(4, places, MeshConfig(shard=2, sequence=2))
    assert [rank[:2] for rank in found] == [(0, 2), (0, 2), (1, 2), (1, 2)]
    assert [rank[2] for rank in found] == 4 * [[4.0, 6.0]]
    found = processes.run(4, places, MeshConfig(replicate=2, tensor=2))
    assert [rank[:2] for rank in found] == [(0, 2), (0, 2), (1, 2), (1, 2)]
    assert [rank[2] for rank in found] == [[2.0, 2.0], [2.0, 4.0], [2.0, 2.0], [2.0, 4.0]]
    assert all(rank[3] for rank in found)
    assert [rank[4] for rank in found] == [True, False, False, False]


def test_others_that_cannot_be_reached_are_an_error_with_rank_place_and_time(monkeypatch):
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "9"}.items():
        monkeypatch.setenv(name, value)
    begin = time.monotonic()
    with pytest.raises(ReelflowError, match=r"rank 1 of 2 did not meet the others at 127.0.0.1:9 within 0.5 s: "):
        start(MeshConfig(shard=2), "cpu", timeout=0.5)
    assert time.monotonic() - begin < 20
    with pytest.raises(ConfigError, match="the mesh shard=3 is of 3 processes, but there are 2"):
        start(MeshConfig(shard=3), "cpu")


WORK = """
import os, signal, torch
from reelflow.parallel import mesh
mesh.PATIENCE = 3.0
workers = mesh.start(mesh.MeshConfig(shard=3), "cpu", timeout=30)
try:
    with workers.naming_failures():
        workers.agree(True)
        if workers.rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        if workers.rank == 2:
            raise ValueError("no such clip")
        for _ in range(3):
            workers.sum(torch.ones(2))
except Exception as error:
    print(type(error).__name__, error)
"""


def test_processes_that_died_or_failed_are_named_by_those_that_are_left():
    store = torch.distributed.TCPStore(
        "127.0.0.1", 0, is_master=True, wait_for_workers=False
    )  # torchrun's, in its place
    given = {"WORLD_SIZE": "3", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "OMP_NUM_THREADS": "1"}
    given |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "GLOO_SOCKET_IFNAME": "lo"}
    started = [
        subprocess.Popen(
            [sys.executable, "-c", WORK],
            env={**os.environ, **given, "RANK": str(rank)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(3)
    ]
    try:
        said = [process.communicate(timeout=90)[0] for process in started]
    finally:
        for process in started:
            process.kill()
    expected = "rank 2 failed (ValueError: no such clip); no answer from rank 1: dead, or stuck. First sign: "
    assert said[0].startswith(f"ReelflowError rank 0 of 3 cannot go on: {expected}")
    assert said[1:] == ["", "ValueError no such clip\n"]
