import pytest
import torch

from pretended import Pretended
from reelflow.errors import ConfigError
from reelflow.parallel.device import moved, take_device


@pytest.fixture
def machine(monkeypatch):
    """Say how many accelerators there are, of what kind, and which of how many processes this is."""
    taken = []

    def equipped(kind, count, *, rank=None, processes=1):
        found = torch.device(kind) if count else None
        monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available=False: found)
        monkeypatch.setattr(torch.accelerator, "device_count", lambda: count)
        monkeypatch.setattr(torch.accelerator, "set_device_index", taken.append)
        monkeypatch.delenv("LOCAL_RANK", raising=False)
        if rank is not None:
            monkeypatch.setenv("LOCAL_RANK", str(rank))
            monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
        return taken

    return equipped


def test_the_accelerator_is_taken_where_there_is_one(machine):
    taken = machine("cuda", 2)
    assert take_device() == take_device("cuda") == torch.device("cuda", 0)
    assert take_device("cuda:1") == torch.device("cuda", 1)
    assert take_device("cpu") == torch.device("cpu")
    assert taken == [0, 0, 1]


@pytest.mark.parametrize(("kind", "count"), [("cuda", 0), ("mps", 1)])
def test_else_it_is_the_cpu(machine, kind, count):
    assert machine(kind, count) == []
    assert take_device() == torch.device("cpu")


def test_each_process_of_a_machine_takes_a_device_of_its_own(machine):
    taken = machine("cuda", 4, rank=3, processes=4)
    assert take_device("auto") == take_device("cuda") == torch.device("cuda", 3)
    assert take_device("cpu") == torch.device("cpu")
    assert taken == [3, 3]


@pytest.mark.parametrize(
    ("there", "asked", "message"),
    [
        (("cuda", 0), "cuda", "there is no cuda:0 here; there are cpu; nearest: cpu"),
        (("cuda", 2), "cuda:2", "there is no cuda:2 here; there are cpu, cuda:0, cuda:1; nearest: cuda:1"),
        (("cuda", 2), "xpu", "no xpu:0 here; there are cpu, cuda:0, cuda:1"),
        (("mps", 1), "mps", "no mps:0 here; there are cpu"),
        (("cuda", 1), "gpu", "'gpu' names no device; there are cpu, cuda:0"),
    ],
)
def test_a_device_that_is_not_there_is_refused_with_those_that_are(machine, there, asked, message):
    machine(*there)
    with pytest.raises(ConfigError, match=message):
        take_device(asked)


def test_more_processes_than_devices_are_refused(machine):
    machine("cuda", 2, rank=3, processes=4)
    with pytest.raises(ConfigError, match=r"there is no cuda:3 here.*nearest: torchrun --nproc-per-node 2"):
        take_device()
    with pytest.raises(ConfigError, match="each of 4 processes needs a device of its own, not cuda:1; nearest: cuda"):
        take_device("cuda:1")


def test_nobody_waits_for_what_is_moved_to_a_device():
    spread = torch.arange(3.0)[:, None].expand(3, 4)
    assert moved(spread, torch.device("cpu")) is spread
    with Pretended() as there:
        there_now = moved(spread, there.device)
        assert (there_now.device, there_now.shape, there.copies) == (there.device, (3, 4), 0)
        assert moved(there_now, there.device).device == there.device
        assert spread.to(there.device).device == there.device
        assert there.copies == 1
        with pytest.raises(RuntimeError, match="on the same device"):
            there_now + spread
