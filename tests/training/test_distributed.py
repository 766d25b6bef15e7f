"""However many processes there are, they learn what one learns; whichever is killed, nothing is lost."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import flow_run
import pytest
import torch
import toy_run
from flow_run import CONFIG, NETWORK, UNGATED, flow_task, run_flow
from safetensors.torch import load_file
from toy_run import run_toy

from reelflow.errors import CheckpointError, ConfigError, ReelflowError
from reelflow.parallel.mesh import MeshConfig, alone, start
from reelflow.parallel.shard import ParallelConfig
from reelflow.training.guard import Guard, replay

sys.path.append(str(Path(__file__).parents[1] / "parallel"))
import processes

TIMES = ("seconds", "per_second", "data_wait", "memory")
TWO = MeshConfig(shard=2)


def tensors(folder, step=CONFIG.steps):
    names = ("weights", "ema", "optimizer")
    files = {name: load_file(folder / f"step-{step:08d}" / f"{name}.safetensors") for name in names}
    return {f"{name}/{key}": value for name, file in files.items() for key, value in file.items()}


def assert_equal(folder, other, *, atol):
    one, two = tensors(folder), tensors(other)
    assert one.keys() == two.keys()
    far = {name: float((one[name].double() - two[name].double()).abs().max()) for name in one}
    assert not {name: distance for name, distance in far.items() if distance > atol}


def log_lines(folder):
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if not any(word in k for word in TIMES)} for line in lines]


def assert_same_log(folder, other):
    one, two = log_lines(folder), log_lines(other)
    assert len(one) == len(two) > 0
    for a, b in zip(one, two, strict=True):
        assert a.keys() == b.keys()
        for name in a.keys() - {"kind", "bins"}:
            assert a[name] == pytest.approx(b[name], rel=1e-5), name


class Died(Exception):
    pass


def go(folder, mesh, died_at=None, **options):
    """Train in a process of the pool; all die after a step, if one is named."""

    def on_step(step):
        if step == died_at:
            raise Died

    try:
        result = run_flow(folder, mesh, on_step=on_step, **options)
    except Died:
        return None
    return result.skipped


def many(folder, mesh, *arguments, **options):
    return processes.run(mesh.world_size, go_with, folder, mesh, arguments, options)


def go_with(folder, mesh, arguments, options):
    return go(folder, mesh, *arguments, **options)


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    folder = tmp_path_factory.mktemp("one")
    run_flow(folder)
    return folder


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    many(folder, TWO)
    return folder


def test_two_processes_learn_and_log_what_one_does(one, two):
    assert_equal(two, one, atol=1e-9)
    assert_same_log(two, one)
    moved = (load_file(two / f"step-{step:08d}" / "weights.safetensors") for step in (4, 6))
    assert all(not torch.equal(a, b) for a, b in zip(*(weights.values() for weights in moved), strict=True))


FOUR = pytest.param(MeshConfig(replicate=2, shard=2), marks=pytest.mark.slow)  # two more processes to start


@pytest.mark.parametrize("mesh", [FOUR, MeshConfig(sequence=2)], ids=str)
def test_a_mesh_learns_and_logs_what_one_process_does(one, tmp_path, mesh):
    many(tmp_path, mesh)
    assert_equal(tmp_path, one, atol=1e-9)
    assert_same_log(tmp_path, one)


CASES = [
    pytest.param(TWO, {"packed": True}, id="rows of unequal numbers of clips"),
    pytest.param(TWO, {"stream": True}, id="packed rows of a stream"),
    pytest.param(
        MeshConfig(sequence=2), {"stream": True, "network": UNGATED}, id="packed rows, cut", marks=pytest.mark.slow
    ),
    pytest.param(TWO, {"dealt": False}, id="a loader that cannot deal"),
    pytest.param(MeshConfig(tensor=2), {"network": UNGATED}, id="dealt heads", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("mesh", "options"), CASES)
def test_other_runs_learn_the_same_too(tmp_path, mesh, options):
    run_flow(tmp_path / "one", **options)
    many(tmp_path / "many", mesh, **options)
    assert_equal(tmp_path / "many", tmp_path / "one", atol=1e-9)
    assert_same_log(tmp_path / "many", tmp_path / "one")


def test_a_step_that_is_not_finite_in_one_process_is_skipped_by_all(tmp_path):
    bad = (9,)  # batch 1 of step 2, which is the second process's
    run_flow(tmp_path / "one", bad=bad)
    assert many(tmp_path / "two", TWO, bad=bad) == [1, 1]
    assert_equal(tmp_path / "two", tmp_path / "one", atol=1e-9)


def stopped(folder):
    try:
        run_flow(folder, TWO, config=replace(CONFIG, guard=Guard(patience=1)), bad=(9,))
    except ReelflowError as error:
        return str(error)


def test_a_run_stopped_by_one_process_leaves_the_batches_of_all(tmp_path):
    assert all("the loss is inf" in said for said in processes.run(2, stopped, tmp_path))
    folder = tmp_path / "stopped-00000003"
    assert sorted(path.name for path in folder.glob("batch-*")) == [
        f"batch-{number}.safetensors" for number in (10, 11, 8, 9)
    ]
    task = flow_task(NETWORK, alone(), ParallelConfig())
    assert replay(task, folder, 9).value.isfinite()  # infinite by the test's own hand
    before, left = (load_file(path / "weights.safetensors") for path in (tmp_path / "step-00000002", folder))
    assert all(torch.equal(left[name], value) for name, value in before.items())


def run_plain(folder):
    run_toy(folder, workers=start(TWO, "cpu"), config=replace(toy_run.CONFIG, steps=8))


def test_a_model_that_is_not_spread_learns_the_same_dropout_and_all(tmp_path):
    run_toy(tmp_path / "one", config=replace(toy_run.CONFIG, steps=8))
    processes.run(2, run_plain, tmp_path / "two")
    one, two = (load_file(tmp_path / n / "step-00000008" / "weights.safetensors") for n in ("one", "two"))
    for name in one.keys() - {"calls"}:
        torch.testing.assert_close(one[name], two[name], rtol=0, atol=1e-5)


@pytest.mark.parametrize(("before", "after"), [(2, 2), (2, 1), (1, 2)])
def test_a_run_goes_on_at_any_number_of_processes(tmp_path, one, two, before, after):
    for count, died_at in ((before, 5), (after, None)):
        if count == 1:
            go(tmp_path, MeshConfig(), died_at)
        else:
            many(tmp_path, TWO, died_at)
    assert_equal(tmp_path, two, atol=0 if before == after else 1e-9)
    assert_same_log(tmp_path, two)


@pytest.mark.slow
def test_a_run_of_dealt_heads_goes_on_in_one_process(tmp_path):
    run_flow(tmp_path / "one", network=UNGATED)
    many(tmp_path / "two", MeshConfig(tensor=2), 5, network=UNGATED)
    run_flow(tmp_path / "two", network=UNGATED)
    assert_equal(tmp_path / "two", tmp_path / "one", atol=1e-9)


def test_batches_that_cannot_be_dealt_evenly_are_refused_with_the_nearest():
    with pytest.raises(ConfigError, match=r"4 processes .* accumulate=6 .* nearest: batch_size=3, accumulate=4"):
        replace(CONFIG, batch_size=2, accumulate=6).check(4)
    with pytest.raises(ConfigError, match="nearest: accumulate=3"):
        replace(CONFIG, batch_size=1, accumulate=2).check(3)
    CONFIG.check(2)


def full_disk(folder):
    """The disk of the second process is full when it writes its part of the second checkpoint."""
    workers, pwrite, written = start(TWO, "cpu"), os.pwrite, 0

    def filling(descriptor, data, at):
        nonlocal written
        written += len(data)
        if workers.rank == 1 and (folder / "step-00000002").exists() and written > 2000:
            raise OSError(28, os.strerror(28))
        return pwrite(descriptor, data, at)

    os.pwrite = filling
    try:
        run_flow(folder, TWO, workers=workers)
    except CheckpointError as error:
        return str(error)
    finally:
        os.pwrite = pwrite


def test_a_disk_that_is_full_for_one_process_stops_all_and_leaves_the_last_checkpoint(tmp_path, two):
    for said in processes.run(2, full_disk, tmp_path):
        assert "rank 1" in said
        assert "No space left" in said
    assert [path.name for path in tmp_path.glob("*step-*")] == ["step-00000002"]
    many(tmp_path, TWO)
    assert_equal(tmp_path, two, atol=0)


# Real deaths


def environment(rank=None, port=0):
    source = Path(__file__).parents[2] / "src"
    found = {**os.environ, "PYTHONPATH": str(source), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    if rank is not None:
        found |= {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return found


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def test_when_one_process_is_killed_the_other_ends_and_names_it_and_the_run_goes_on(tmp_path, two):
    port = free_port()
    command = [sys.executable, flow_run.__file__, str(tmp_path), "2", "step", "3", "1"]
    first, second = (
        subprocess.Popen(command, env=environment(rank, port), stderr=subprocess.PIPE, text=True) for rank in (0, 1)
    )
    second.communicate(timeout=120)
    killed = time.monotonic()
    _, said = first.communicate(timeout=60)
    assert second.returncode == -signal.SIGKILL
    assert first.returncode == 1
    assert time.monotonic() - killed < 45  # the time-out is 30 s; a connection that breaks is seen at once
    assert "ReelflowError: rank 0 of 2 cannot go on: no answer from rank 1" in said
    many(tmp_path, TWO)
    assert_equal(tmp_path, two, atol=0)


def killed_under_torchrun(folder, where, count, rank, *more):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["--max-restarts", "1", flow_run.__file__, str(folder), "2", where, str(count), str(rank), *more]
    done = subprocess.run(command, env=environment(), check=False, timeout=540, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (folder / "killed").exists()


def test_torchrun_restarts_a_run_killed_in_a_save_and_nothing_is_lost(tmp_path, two):
    killed_under_torchrun(tmp_path, "fsync", 5, 1)  # 3 syncs a checkpoint
    assert_equal(tmp_path, two, atol=0)
    assert_same_log(tmp_path, two)


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize(("where", "count"), [("step", 1), ("step", 4), ("fsync", 1), ("fsync", 9)])
def test_torchrun_restarts_a_run_killed_anywhere(tmp_path, two, where, count, rank):
    killed_under_torchrun(tmp_path, where, count, rank)
    assert_equal(tmp_path, two, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize(("where", "count"), [("step", 3), ("fsync", 5)])
def test_torchrun_restarts_a_run_on_a_packed_stream_and_nothing_is_lost(tmp_path, where, count):
    many(tmp_path / "whole", TWO, stream=True)
    killed_under_torchrun(tmp_path / "killed", where, count, 1, "stream")
    assert_equal(tmp_path / "killed", tmp_path / "whole", atol=0)
    assert_same_log(tmp_path / "killed", tmp_path / "whole")
