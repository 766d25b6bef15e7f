import dataclasses
import io
import json
import math
import os
import random
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
import toy_run
from rich.console import Console
from safetensors.torch import load_file
from torch import nn
from toy_run import CONFIG, SILENT, ToyTask, is_hidden, run_toy, toy_batches

from reelflow.errors import CheckpointError, ConfigError, ReelflowError
from reelflow.training import loop
from reelflow.training.guard import Guard
from reelflow.training.loop import Loss, TrainingConfig, train
from reelflow.training.optim import OptimizerConfig

STEPS = CONFIG.steps


def replace(**changes):
    return dataclasses.replace(CONFIG, **changes)


def final_tensors(folder, step=STEPS):
    names = ("weights", "ema", "optimizer")
    return {n: load_file(folder / f"step-{step:08d}" / f"{n}.safetensors") for n in names}


def assert_same_run(folder, other, step=STEPS):
    one, two = final_tensors(folder, step), final_tensors(other, step)
    for name, tensors in one.items():
        assert tensors.keys() == two[name].keys()
        different = [key for key, value in tensors.items() if not torch.equal(value, two[name][key])]
        assert not different, f"{name}: {different}"


TIMES = ("seconds", "per_second", "data_wait", "memory")


def log_lines(folder):
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if not any(word in k for word in TIMES)} for line in lines]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("uninterrupted")
    result = run_toy(folder)
    assert (result.step, result.interrupted, result.skipped) == (STEPS, False, 0)
    return folder


def run_to_death(folder: Path, where: str, count: int) -> int:
    command = [sys.executable, toy_run.__file__, str(folder), where, str(count)]
    source = Path(toy_run.__file__).parents[2] / "src"
    environment = {**os.environ, "PYTHONPATH": str(source), "OMP_NUM_THREADS": str(torch.get_num_threads())}
    return subprocess.run(command, env=environment, check=False, timeout=120).returncode


def test_a_run_killed_in_a_step_and_in_a_save_and_resumed_ends_bit_identical(tmp_path, uninterrupted):
    draw = random.Random(int.from_bytes(os.urandom(4)))
    calls, syncs = draw.randint(11, 40), draw.randint(1, 12)  # 2 losses a step; 7 syncs a checkpoint
    assert run_to_death(tmp_path, "loss", calls) == -signal.SIGKILL, (calls, syncs)
    assert run_to_death(tmp_path, "fsync", syncs) == -signal.SIGKILL, (calls, syncs)
    run_toy(tmp_path)
    assert_same_run(tmp_path, uninterrupted)
    assert log_lines(tmp_path) == log_lines(uninterrupted)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("where", "count"),
    [("loss", 1), ("step", 5), ("step", 6), ("rename", 1), ("rename", 2), *(("fsync", n) for n in range(1, 16))],
)
def test_a_run_killed_anywhere_and_resumed_ends_bit_identical(tmp_path, uninterrupted, where, count):
    assert run_to_death(tmp_path, where, count) == -signal.SIGKILL
    run_toy(tmp_path)
    assert_same_run(tmp_path, uninterrupted)
    assert log_lines(tmp_path) == log_lines(uninterrupted)


class Died(Exception):
    pass


def dying_at(step):
    def on_step(done):
        if done == step:
            raise Died

    return on_step


def test_resuming_falls_back_over_a_torn_checkpoint_and_still_ends_identical(tmp_path, uninterrupted):
    with pytest.raises(Died):
        run_toy(tmp_path, on_step=dying_at(17))
    weights = tmp_path / "step-00000015" / "weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    run_toy(tmp_path)
    assert_same_run(tmp_path, uninterrupted)


def test_prefetching_intervals_and_draws_made_before_do_not_change_the_weights(tmp_path, uninterrupted):
    task = ToyTask()
    torch.manual_seed(99)
    config = replace(log_every=7, validate_every=0, preview_every=3, checkpoint_every=0)
    with toy_batches(prefetch=0) as batches:
        train(task, batches, config, tmp_path, hidden=is_hidden, console=SILENT)
    assert_same_run(tmp_path, uninterrupted)


def test_a_finished_run_is_left_as_it_is(tmp_path):
    first = run_toy(tmp_path)
    again = run_toy(tmp_path)
    assert (again.step, again.interrupted, again.best) == (STEPS, False, first.best)
    assert again.checkpoint == first.checkpoint


def test_ctrl_c_finishes_the_step_saves_and_the_run_can_go_on(tmp_path, uninterrupted):
    class Interrupted(ToyTask):
        calls = 0

        def loss(self, batch, generator):
            self.calls += 1
            if self.calls == 15:
                os.kill(os.getpid(), signal.SIGINT)
            return super().loss(batch, generator)

    before = signal.getsignal(signal.SIGINT)
    result = run_toy(tmp_path, task=Interrupted())
    assert result.interrupted
    assert result.step == 8
    assert result.checkpoint == tmp_path / "step-00000008"
    assert signal.getsignal(signal.SIGINT) is before
    assert not run_toy(tmp_path).interrupted
    assert_same_run(tmp_path, uninterrupted)


def test_a_second_ctrl_c_stops_at_once(tmp_path):
    class Impatient(ToyTask):
        def loss(self, batch, generator):
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
            return super().loss(batch, generator)

    with pytest.raises(KeyboardInterrupt):
        run_toy(tmp_path, task=Impatient())


def test_the_loop_runs_outside_the_main_thread(tmp_path):
    results = []
    thread = threading.Thread(target=lambda: results.append(run_toy(tmp_path, config=replace(steps=2))))
    thread.start()
    thread.join()
    assert results[0].step == 2


class Fit:
    """A deterministic least-squares fit, so that a batch in one piece or in parts must give the same step."""

    flops_per_sample = 1000.0

    def __init__(self):
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 3)).double()

    def loss(self, batch, generator):
        value = (self.model(batch) - batch.flip(1)).square().mean()
        return Loss(value, {}, num_tokens=0, num_samples=len(batch))

    def validate(self, generator):
        return {"draw": torch.rand(1, generator=generator).item(), "training": float(self.model.training)}

    def preview(self, folder, step):
        (folder / f"{step}").write_text("")


ADAMW = OptimizerConfig(lr=1e-2, muon_lr=None, warmup_steps=0, decay="constant", grad_clip=0.1)
SHORT = TrainingConfig(steps=6, batch_size=8, optimizer=ADAMW, seed=0, log_every=1)


class Stream:
    """Items 0, 1, 2, ... of a fixed random sequence, `size` at a time."""

    def __init__(self, size):
        self.size, self.position = size, 0
        self.items = torch.randn(48, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def __next__(self):
        self.position += self.size
        return self.items[self.position - self.size : self.position]

    def state_dict(self):
        return {"position": self.position}

    def load_state_dict(self, state):
        self.position = state["position"]


def test_accumulated_gradients_equal_those_of_the_big_batch(tmp_path):
    whole, parts = Fit(), Fit()
    train(whole, Stream(8), SHORT, tmp_path / "whole", console=SILENT)
    train(parts, Stream(2), dataclasses.replace(SHORT, batch_size=2, accumulate=4), tmp_path / "parts", console=SILENT)
    for a, b in zip(whole.model.parameters(), parts.model.parameters(), strict=True):
        assert torch.allclose(a, b, rtol=0, atol=1e-12)
    losses = [[line["loss"] for line in log_lines(tmp_path / name)] for name in ("whole", "parts")]
    assert losses[0] == pytest.approx(losses[1])


def test_the_loop_is_the_plain_loop_written_out(tmp_path):
    task, plain, stream = Fit(), Fit(), Stream(8)
    train(task, Stream(8), SHORT, tmp_path, console=SILENT)
    optimizer = torch.optim.AdamW(plain.model.parameters(), lr=1e-2, betas=ADAMW.betas, weight_decay=0.0)
    for _ in range(SHORT.steps):
        optimizer.zero_grad()
        plain.loss(next(stream), None).value.backward()
        torch.nn.utils.clip_grad_norm_(plain.model.parameters(), 0.1)
        optimizer.step()
    for a, b in zip(task.model.parameters(), plain.model.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-9)


def test_validation_sees_evaluation_mode_and_the_same_draws_every_time(tmp_path):
    config = dataclasses.replace(SHORT, validate_every=2, preview_every=4)
    train(Fit(), Stream(8), config, tmp_path, console=SILENT)
    rows = [line for line in log_lines(tmp_path) if line["kind"] == "validation"]
    assert [row["step"] for row in rows] == [2, 4, 6]
    assert len({row["draw"] for row in rows}) == 1
    assert {row["training"] for row in rows} == {0.0}
    assert sorted(path.name for path in (tmp_path / "previews").iterdir()) == ["4", "6"]


def test_the_best_validated_checkpoint_is_kept(tmp_path):
    class Worsening(Fit):
        losses = (3.0, 1.0, 2.0, float("nan"), 4.0, 5.0)

        def validate(self, generator):
            self.losses, value = self.losses[1:], self.losses[0]
            return {"loss": value}

    config = dataclasses.replace(SHORT, validate_every=1, checkpoint_every=1, keep_last=1)
    result = train(Worsening(), Stream(8), config, tmp_path, console=SILENT)
    assert result.best == (2, 1.0)
    assert sorted(path.name for path in tmp_path.glob("step-*")) == ["step-00000002", "step-00000006"]


class Exploding(Fit):
    """Its loss is not finite in the given calls."""

    def __init__(self, *bad):
        super().__init__()
        self.bad, self.calls = bad, 0

    def loss(self, batch, generator):
        loss = super().loss(batch, generator)
        self.calls += 1
        return dataclasses.replace(loss, value=loss.value * float("inf")) if self.calls in self.bad else loss


def test_a_step_that_is_not_finite_is_skipped_and_counted(tmp_path):
    task = Exploding(1, 3)
    before = [p.detach().clone() for p in task.model.parameters()]
    moved = []

    def on_step(step):
        moved.append(any(not torch.equal(a, b) for a, b in zip(task.model.parameters(), before, strict=True)))
        before[:] = [p.detach().clone() for p in task.model.parameters()]

    result = train(task, Stream(8), SHORT, tmp_path, on_step=on_step, console=SILENT)
    assert moved == [False, True, False, True, True, True]
    assert result.skipped == 2
    assert [line["skipped"] for line in log_lines(tmp_path)] == [1, 1, 2, 2, 2, 2]


def test_ten_steps_in_a_row_that_are_not_finite_end_the_run(tmp_path):
    config = dataclasses.replace(SHORT, steps=40, batch_size=1)
    with pytest.raises(
        ReelflowError, match="10 steps in a row, up to step 14, were left out; of the last, the loss is inf"
    ):
        train(Exploding(1, *range(5, 40)), Stream(1), config, tmp_path, console=SILENT)


def test_bf16_computes_in_bfloat16_and_keeps_float32_weights(tmp_path):
    seen = set()

    class Watching(ToyTask):
        def loss(self, batch, generator):
            seen.add(self.model.conv(batch).dtype)
            return super().loss(batch, generator)

    task = Watching()
    run_toy(tmp_path, task=task, config=replace(steps=2, precision="bf16"))
    assert seen == {torch.bfloat16}
    assert {p.dtype for p in task.model.parameters()} == {torch.float32}


def test_resuming_with_another_configuration_says_what_changed(tmp_path):
    run_toy(tmp_path, config=replace(steps=4))
    changed = replace(steps=5, log_every=1, optimizer=dataclasses.replace(CONFIG.optimizer, lr=0.5))
    with pytest.raises(ConfigError, match=r"steps was 4, now 5; optimizer\.lr was 0\.01, now 0\.5;"):
        run_toy(tmp_path, config=changed)


def test_resuming_another_model_is_refused(tmp_path):
    run_toy(tmp_path, config=replace(steps=4))
    task = ToyTask()
    task.model.hidden = nn.Linear(8, 12)
    with pytest.raises(CheckpointError, match=r"another model.*hidden\.weight"):
        run_toy(tmp_path, task=task, config=replace(steps=4))


def test_a_used_folder_is_not_trained_over_unasked(tmp_path):
    run_toy(tmp_path, config=replace(steps=4))
    with pytest.raises(ConfigError, match="already holds a run"):
        run_toy(tmp_path, config=replace(steps=4), resume=False)


@pytest.mark.parametrize(
    "wrong",
    [{"steps": 0}, {"batch_size": 0}, {"accumulate": 0}, {"log_every": 0}, {"seed": -1}, {"ema_decay": 1.0}],
)
def test_impossible_values_are_refused(wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        replace(**wrong)


def test_gradient_norms_are_logged_by_block_and_make_up_the_whole(tmp_path):
    train(Fit(), Stream(8), SHORT, tmp_path, console=SILENT)
    for line in log_lines(tmp_path):
        blocks = {name: value for name, value in line.items() if name.startswith("grad_norm/")}
        assert blocks.keys() == {"grad_norm/0", "grad_norm/2"}
        assert math.hypot(*blocks.values()) == pytest.approx(line["grad_norm"], rel=1e-9)


@pytest.mark.parametrize(
    ("name", "block"),
    [
        ("blocks.3.attn.weight", "blocks.3"),
        ("embed.weight", "embed"),
        ("vae.decoder.0.layers.1.bias", "vae.decoder.0"),
        ("blocks/3/to_q/down", "blocks.3"),
    ],
)
def test_a_block_is_the_path_up_to_a_number(name, block):
    assert loop._block(name) == block


def test_a_step_is_the_mean_over_samples_whatever_the_sizes_of_its_batches(tmp_path):
    class Uneven(Stream):
        """The same items, six and then two at a time."""

        def __next__(self):
            self.size = 6 if self.position % 8 == 0 else 2
            return super().__next__()

    whole, parts = Fit(), Fit()
    train(whole, Stream(8), SHORT, tmp_path / "whole", console=SILENT)
    uneven = dataclasses.replace(SHORT, batch_size=5, accumulate=2)  # the configured size is not what comes
    train(parts, Uneven(8), uneven, tmp_path / "parts", console=SILENT)
    for a, b in zip(whole.model.parameters(), parts.model.parameters(), strict=True):
        assert torch.allclose(a, b, rtol=0, atol=1e-12)
    for a, b in zip(log_lines(tmp_path / "whole"), log_lines(tmp_path / "parts"), strict=True):
        assert (a["loss"], a["grad_norm"]) == pytest.approx((b["loss"], b["grad_norm"]))


def test_a_resumed_run_says_what_changed_of_code_data_and_libraries(tmp_path, monkeypatch):
    config, said = replace(steps=4), io.StringIO()
    run_toy(tmp_path, config=config, data="one")
    made_by = loop.origin(data="other", world_size=1)
    made_by |= {"torch": "0.4", "code": made_by["code"] | {"nn/rope.py": "0", "new.py": "1"}}
    monkeypatch.setattr(loop, "origin", lambda **_: made_by)
    run_toy(tmp_path, config=config, data="other", console=Console(file=said))
    for line in (
        f"since step-00000004: torch was {torch.__version__}, now 0.4",
        "since step-00000004: data was one, now other",
        "since step-00000004: code differs in new.py, nn/rope.py",
    ):
        assert line in said.getvalue()
    assert "reelflow was" not in said.getvalue()


def test_the_guard_may_change_when_a_run_is_resumed(tmp_path):
    run_toy(tmp_path, config=replace(steps=4))
    assert run_toy(tmp_path, config=replace(steps=4, guard=Guard(spike=None, patience=3))).step == 4
