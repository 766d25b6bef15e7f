import io
import json
import sys
import time
import types

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from reelflow.errors import CheckpointError, ConfigError
from reelflow.training.meters import (
    BinnedMean,
    Display,
    RunLog,
    Throughput,
    duration,
    measure_peak_flops,
    peak_device_bytes,
    peak_memory_bytes,
)


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still until it is told to move."""
    now = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])

    def pass_by(seconds):
        now[0] += seconds

    return pass_by


def test_rates_count_the_training_and_not_what_happens_aside(clock):
    meter = Throughput(flops_per_sample=1e6, peak_flops=1e7)
    for _ in range(2):
        meter.waited(1.0)
        meter.consumed(num_samples=4, num_tokens=40)
        meter.stepped()
        clock(4.0)
    with meter.aside():
        clock(1000.0)
    assert meter.read() == {
        "step_seconds": 4.0,
        "samples_per_second": 1.0,
        "tokens_per_second": 10.0,
        "data_wait": 0.25,
        "flops_per_second": 1e6,
        "peak_share": 0.1,
    }
    clock(2.0)
    meter.consumed(num_samples=4, num_tokens=0)
    assert meter.read()["samples_per_second"] == 2.0


def test_the_peak_is_a_plausible_rate():
    peak = measure_peak_flops(torch.float32, torch.device("cpu"), seconds=0.1)
    assert 1e8 < peak < 1e14


def test_peak_memory_is_in_bytes():
    assert 50 * 2**20 < peak_memory_bytes() < 2**40


@pytest.mark.parametrize(("seconds", "text"), [(0.4, "0 s"), (59.6, "1:00"), (187.0, "3:07"), (3753.0, "1:02:33")])
def test_durations_read_well(seconds, text):
    assert duration(seconds) == text


@settings(max_examples=30, deadline=None)
@given(
    samples=st.lists(st.tuples(st.floats(0, 1, width=32), st.floats(-5, 5, width=32)), max_size=40),
    num_bins=st.integers(1, 6),
    cut=st.integers(0, 40),
)
def test_bins_hold_every_sample_once_with_its_mean_and_standard_error(samples, num_bins, cut):
    binned = BinnedMean(num_bins)
    for part in (samples[:cut], samples[cut:]):
        pairs = torch.tensor(part, dtype=torch.float32).reshape(-1, 2)
        binned.add(pairs[:, 0], pairs[:, 1])
    rows = binned.rows()
    assert [row["bin"] for row in rows] == list(range(num_bins))
    assert sum(row["count"] for row in rows) == len(samples)
    for row in rows:
        low, high = row["t"]
        inside = [x for t, x in samples if low <= t < high or (t == 1 and high == 1)]
        if not inside:
            assert row["mean"] is None
            continue
        mean = sum(inside) / len(inside)
        assert row["mean"] == pytest.approx(mean, abs=1e-6)
        if len(inside) > 1:
            variance = sum((x - mean) ** 2 for x in inside) / (len(inside) - 1)
            assert row["stderr"] == pytest.approx((variance / len(inside)) ** 0.5, abs=1e-6)
        else:
            assert row["stderr"] is None


def test_no_bins_are_refused():
    with pytest.raises(ConfigError, match="num_bins"):
        BinnedMean(0)


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_resumed_log_drops_what_came_after_and_never_repeats_a_step(tmp_path):
    log = RunLog(tmp_path, resumed_from=0)
    for step in (1, 2, 3):
        log.write(step, "train", {"loss": step / 2})
    log.close()
    with log.path.open("a") as file:
        file.write('{"step": 4, "lo')  # killed while writing
    log = RunLog(tmp_path, resumed_from=2)
    log.write(3, "train", {"loss": 9.0})
    log.close()
    assert [(line["step"], line["loss"]) for line in lines(log.path)] == [(1, 0.5), (2, 1.0), (3, 9.0)]


def test_the_log_holds_tables_and_writes_null_for_what_is_not_finite(tmp_path):
    log = RunLog(tmp_path, resumed_from=0)
    log.write(1, "validation", {"loss": float("nan"), "rows": [{"bin": 0, "t": (0.0, 0.5), "mean": float("inf")}]})
    log.close()
    assert lines(log.path) == [
        {"step": 1, "kind": "validation", "loss": None, "rows": [{"bin": 0, "t": [0.0, 0.5], "mean": None}]}
    ]


def test_numbers_reach_tensorboard(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    log = RunLog(tmp_path, resumed_from=0)
    log.write(1, "train", {"loss": 0.5})
    log.write(2, "train", {"loss": 0.25})
    log.close()
    time.sleep(0.01)
    log = RunLog(tmp_path, resumed_from=1)
    log.write(2, "train", {"loss": 0.125})
    log.close()
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [(1, 0.5), (2, 0.125)]


def test_a_log_that_is_something_else_is_refused_and_left_alone(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text('my notes\n{"step": 1}\n')
    with pytest.raises(CheckpointError, match="line 1"):
        RunLog(tmp_path, resumed_from=0)
    assert path.read_text().startswith("my notes")


def test_lines_are_printed_where_there_is_no_terminal():
    out = io.StringIO()
    with Display(Console(file=out, width=40), total_steps=5, step=0) as display:
        display.stepped(1)
        display.report(1, "loss 0.5  [bold]")
    assert out.getvalue() == "step       1  loss 0.5  [bold]\n"


def test_a_bar_is_drawn_on_a_terminal():
    out = io.StringIO()
    with Display(Console(file=out, force_terminal=True, width=100), total_steps=5, step=0) as display:
        display.stepped(3)
        display.report(3, "loss 0.5")
    assert "3/5" in out.getvalue()
    assert "loss 0.5" in out.getvalue()


class FakeRun:
    def __init__(self, **options):
        self.options, self.logged, self.finished = options, [], False

    def log(self, values, *, step):
        self.logged.append((step, values))

    def finish(self):
        self.finished = True


def test_numbers_go_to_wandb_too_and_a_resumed_run_is_the_same_one(tmp_path, monkeypatch):
    runs = []
    fake = types.ModuleType("wandb")
    fake.init = lambda **options: runs.append(FakeRun(**options)) or runs[-1]
    monkeypatch.setitem(sys.modules, "wandb", fake)
    for start in (0, 3):
        log = RunLog(tmp_path, resumed_from=start, wandb="films", config={"steps": 9})
        log.write(start + 1, "train", {"loss": 0.5, "bins": [1], "bad": float("nan")})
        log.close()
    first, second = runs
    assert first.logged == [(1, {"train/loss": 0.5})]
    assert second.logged == [(4, {"train/loss": 0.5})]
    assert first.finished
    assert first.options == second.options
    assert (first.options["project"], first.options["config"]) == ("films", {"steps": 9})
    assert first.options["resume"] == "allow"


def test_wandb_is_asked_for_only_where_it_is_wanted_and_missed_with_the_way_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    RunLog(tmp_path, resumed_from=0).close()
    with pytest.raises(ConfigError, match=r"reelflow\[wandb\]"):
        RunLog(tmp_path, resumed_from=0, wandb="films")


def test_a_cpu_has_no_device_memory():
    assert peak_device_bytes(torch.device("cpu")) == {}
