import dataclasses
import json
import math
from types import SimpleNamespace

import pytest
import torch
import toy_run
from flow_run import clip
from safetensors.torch import save_file
from toy_run import Toy, ToyTask, run_toy

from reelflow.errors import CheckpointError, ConfigError, ReelflowError
from reelflow.training.guard import Guard, Watch, read_batch, replay, seed_draws, write_batch

PLAIN = Guard(spike=10.0, window=4, patience=3)


def watching(losses, guard=PLAIN, norm=1.0):
    watch = Watch(guard)
    return [bool(watch.refuses(float(loss), norm)) for loss in losses], watch


def test_what_is_not_finite_is_refused_from_the_first_step_on():
    refused, watch = watching([math.nan, 1.0, math.inf, 1.0, -math.inf])
    assert refused == [True, False, True, False, True]
    assert (watch.skipped, watch.in_a_row) == (3, 1)
    assert "the gradient norm is inf" in Watch(PLAIN).refuses(1.0, math.inf)


def test_a_spike_is_many_medians_of_a_full_window():
    assert watching([1, 1, 1, 1000.0, 1.0])[0] == [False] * 5  # three steps are no window
    assert watching([1, 1, 1, 1, 10.0, 10.1])[0] == [False] * 5 + [True]
    assert watching([1, 1, 1, 1, 1000.0], Guard(spike=None))[0] == [False] * 5
    assert "12 times the median of the last 4 steps" in watching([1, 1, 1, 1])[1].refuses(12.0, 1.0)


def test_a_refused_step_does_not_move_the_median_and_a_falling_loss_is_no_spike():
    refused, _ = watching([8, 4, 2, 1, 500, 500, 0.5, 0.25])
    assert refused == [False, False, False, False, True, True, False, False]
    assert watching([-1.0, -1.0, -1.0, -1.0, 5.0])[0] == [False] * 5  # it has no scale of its own


def test_a_watch_goes_on_from_its_state():
    _, watch = watching([1, 1, 1, 1, 50.0])
    other = Watch(PLAIN)
    other.load_state_dict(json.loads(json.dumps(watch.state_dict())))
    assert other.state_dict() == watch.state_dict()
    assert other.refuses(50.0, 1.0)


@pytest.mark.parametrize("wrong", [{"spike": 1.0}, {"spike": math.inf}, {"window": 0}, {"patience": 0}])
def test_impossible_guards_are_refused(wrong):
    with pytest.raises(ConfigError):
        Guard(**wrong)


def test_draws_depend_on_the_seed_and_the_number_alone():
    def drawn(seed, number):
        generator = torch.Generator()
        seed_draws(generator, seed, number)
        return (*torch.rand(2, generator=generator).tolist(), *torch.rand(2).tolist())

    with torch.random.fork_rng():
        first = drawn(3, 7)
        assert len(set(first)) == 4
        assert drawn(3, 7) == first
        assert not set(first) & {*drawn(3, 8), *drawn(4, 7)}


# Batches as files


def same(one, other):
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other) and one.dtype == other.dtype
    if dataclasses.is_dataclass(one):
        return type(one) is type(other) and same(vars(one), vars(other))
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[name], other[name]) for name in one)
    if isinstance(one, (list, tuple)):
        return type(one) is type(other) and all(same(a, b) for a, b in zip(one, other, strict=True))
    return one == other


@pytest.mark.parametrize(
    "batch",
    [torch.eye(3), clip(1), [clip(0), clip(1)], {"a": (torch.ones(2).bfloat16(), None), "n": [1, 2.5, "x", True]}],
    ids=["tensor", "clips", "packed", "plain"],
)
def test_batches_survive_a_file(tmp_path, batch):
    write_batch(tmp_path / "batch.safetensors", batch)
    assert same(read_batch(tmp_path / "batch.safetensors"), batch)


def test_a_batch_of_a_class_of_ones_own_is_read_when_it_is_named(tmp_path):
    batch = SimpleBatch(torch.ones(2))
    write_batch(tmp_path / "batch.safetensors", batch)
    assert same(read_batch(tmp_path / "batch.safetensors", kinds=[SimpleBatch]), batch)
    with pytest.raises(CheckpointError, match="SimpleBatch, which is not known"):
        read_batch(tmp_path / "batch.safetensors")
    with pytest.raises(CheckpointError, match="holds a SimpleNamespace"):
        write_batch(tmp_path / "batch.safetensors", SimpleNamespace())


@dataclasses.dataclass
class SimpleBatch:
    values: torch.Tensor


@pytest.mark.parametrize(
    "structure",
    [
        '{"class": "os:system", "fields": {"command": {"value": "true"}}}',
        '{"class": "reelflow.training.guard:write_batch", "fields": {}}',
        '{"class": "reelflow.errors:ConfigError", "fields": {}}',
        '{"tensor": 3}',
        "[]",
        "no json",
    ],
)
def test_a_hostile_batch_calls_nothing(tmp_path, structure):
    save_file({"0": torch.ones(1)}, tmp_path / "b.safetensors", metadata={"structure": structure})
    with pytest.raises(CheckpointError):
        read_batch(tmp_path / "b.safetensors")


# Runs


class Exploding(ToyTask):
    """From batch `first` on its losses are `factor` times as large."""

    def __init__(self, first, factor):
        super().__init__()
        self.first, self.factor, self.calls, self.seen = first, factor, 0, []

    def loss(self, batch, generator):
        found = super().loss(batch, generator)
        self.calls += 1
        if self.calls > self.first:
            found = dataclasses.replace(found, value=found.value * self.factor)
        self.seen.append(float(found.value.detach()))
        return found


CONFIG = dataclasses.replace(toy_run.CONFIG, guard=Guard(spike=20.0, window=3, patience=2), ema_decay=None)


def test_a_run_that_spikes_stops_and_its_batch_gives_the_same_loss_again(tmp_path):
    task = Exploding(12, 1e4)
    with pytest.raises(ReelflowError, match="2 steps in a row, up to step 8, were left out; of the last, the loss is"):
        run_toy(tmp_path, task=task, config=CONFIG)
    stopped = tmp_path / "stopped-00000008"
    assert sorted(path.name for path in stopped.iterdir()) == [
        "batch-14.safetensors",
        "batch-15.safetensors",
        "stopped.json",
        "weights.safetensors",
    ]
    for number in (14, 15):
        again = Exploding(0, 1e4)
        assert float(replay(again, stopped, number).value.detach()) == task.seen[number]
    assert float(replay(Exploding(0, 1e4), stopped).value.detach()) == task.seen[14]


def test_single_spikes_are_left_out_and_counted(tmp_path):
    class Once(Exploding):
        def loss(self, batch, generator):
            self.factor = 1e4 if self.calls == 15 else 1.0
            return super().loss(batch, generator)

    assert run_toy(tmp_path, task=Once(0, 1.0), config=CONFIG).skipped == 1


def test_a_guard_that_finds_nothing_changes_nothing(tmp_path):
    tasks = ToyTask(), ToyTask()
    for task, guard in zip(tasks, (Guard(), Guard(spike=None, patience=1)), strict=True):
        run_toy(
            tmp_path / str(guard.patience), task=task, config=dataclasses.replace(toy_run.CONFIG, guard=guard, steps=6)
        )
    one, two = (task.model.state_dict().values() for task in tasks)
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def test_what_a_stopped_run_left_is_recognised(tmp_path):
    with pytest.raises(CheckpointError, match="not what a stopped run left"):
        replay(SimpleNamespace(model=Toy()), tmp_path)
