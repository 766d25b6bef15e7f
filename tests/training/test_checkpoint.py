import errno
import json
import os
import struct
import threading

import pytest
import torch
from torch import nn

from reelflow.errors import CheckpointError
from reelflow.models.weights import load_weights
from reelflow.parallel.mesh import alone
from reelflow.training import checkpoint
from reelflow.training.checkpoint import Saver
from reelflow.training.ema import Ema
from reelflow.training.optim import OptimizerConfig, build_optimizers
from reelflow.training.whole_file import Layout

OPTIMIZER = OptimizerConfig(lr=1e-2, muon_lr=0.02, warmup_steps=0, decay="constant")


def hidden(name, parameter):
    return name == "0.weight"


class Setup:
    """All that a run holds, after `steps` steps."""

    def __init__(self, *, seed=0, steps=0):
        g = torch.Generator().manual_seed(seed)
        self.model = nn.Sequential(
            nn.Conv2d(2, 4, 3).to(memory_format=torch.channels_last), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1)
        )
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=g))
        self.ema = Ema(self.model, 0.9)
        self.optimizers = build_optimizers(self.model, OPTIMIZER, hidden=hidden)
        self.generator = g
        for step in range(steps):
            self.train_step(step)

    def train_step(self, step):
        x = torch.randn(2, 2, 5, 5, generator=self.generator)
        self.model.zero_grad()
        self.model(x).square().mean().backward()
        for optimizer in self.optimizers:
            optimizer.step()
        self.ema.update(step)

    def parts(self):
        return {
            "model": self.model,
            "ema": self.ema,
            "optimizers": self.optimizers,
        }

    def save(self, run, step=3, **state):
        saver = Saver(run, alone())
        folder = saver.save(step, state=state, **self.parts())
        saver.wait()
        return folder

    def tensors(self):
        states = [state[key] for o in self.optimizers for state in o.state.values() for key in sorted(state)]
        return [*self.model.state_dict().values(), *self.ema.state_dict().values(), *states]


def same(one, other):
    return len(one) == len(other) and all(
        torch.equal(a, b) and a.dtype == b.dtype and a.stride() == b.stride() for a, b in zip(one, other, strict=True)
    )


def test_everything_comes_back_to_the_last_bit_and_continues_alike(tmp_path):
    before = Setup(steps=3)
    folder = before.save(tmp_path, note="hello")
    after = Setup(seed=1, steps=1)
    checkpoint.restore(folder, workers=alone(), **after.parts())
    assert checkpoint.read_state(folder)["note"] == "hello"
    assert same(after.tensors(), before.tensors())
    for step in (3, 4):
        after.generator.set_state(before.generator.get_state())
        before.train_step(step)
        after.train_step(step)
    assert same(after.tensors(), before.tensors())


def test_tied_weights_and_frozen_weights_are_saved(tmp_path):
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False), nn.Linear(2, 2))
    model[1].weight = model[0].weight
    model[2].requires_grad_(False)
    optimizers = build_optimizers(model, OPTIMIZER, hidden=hidden)
    saver = Saver(tmp_path, alone())
    folder = saver.save(1, model=model, ema=None, optimizers=optimizers, state={})
    saver.wait()
    expected = {name: value.clone() for name, value in model.state_dict().items()}
    nn.init.zeros_(model[0].weight)
    load_weights(folder / "weights.safetensors", model)
    assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())


def test_the_newest_whole_checkpoint_is_found(tmp_path):
    assert checkpoint.latest(tmp_path / "nowhere") == (None, [])
    setup = Setup()
    for step in (5, 40, 100_000_000):
        newest = setup.save(tmp_path, step)
    (tmp_path / ".step-99999999.partial").mkdir()
    (tmp_path / "previews").mkdir()
    assert checkpoint.latest(tmp_path) == (newest, [])


FILES = ["weights.safetensors", "ema.safetensors", "optimizer.safetensors", "state.json"]


@pytest.mark.parametrize("name", [*FILES, "manifest.json"])
@pytest.mark.parametrize("damage", ["truncated", "flipped", "missing"])
def test_a_torn_checkpoint_is_recognised_and_the_one_before_is_used(tmp_path, name, damage):
    setup = Setup(steps=1)
    whole, torn = setup.save(tmp_path, 1), setup.save(tmp_path, 2)
    path, content = torn / name, (torn / name).read_bytes()
    if damage == "truncated":
        path.write_bytes(content[: len(content) // 2])
    elif damage == "flipped":
        path.write_bytes(content[:-3] + bytes([content[-3] ^ 1]) + content[-2:])
    else:
        path.unlink()
    found = checkpoint.latest(tmp_path)
    assert found.folder == whole
    assert len(found.torn) == 1
    assert "step-00000002 is torn" in found.torn[0]
    assert setup.save(tmp_path, 2) == torn  # the run reaches the step again and replaces it
    assert checkpoint.latest(tmp_path) == (torn, [])


def test_a_manifest_cannot_point_outside_its_folder(tmp_path):
    folder = Setup().save(tmp_path)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["../../etc/passwd"] = {"bytes": 0, "sha256": ""}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    assert checkpoint.latest(tmp_path).folder is None


@pytest.mark.parametrize("fails_at", [0, 2, 4, 6])
def test_a_full_disk_leaves_the_old_checkpoint_and_no_rubbish(tmp_path, monkeypatch, fails_at):
    setup = Setup(steps=1)
    old = setup.save(tmp_path, 1)
    calls = 0
    fsync = os.fsync

    def full(descriptor):
        nonlocal calls
        calls += 1
        if calls > fails_at:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CheckpointError, match="No space left"):
        setup.save(tmp_path, 2)
    monkeypatch.undo()
    found = checkpoint.latest(tmp_path)
    if fails_at < 6:  # the last fsync comes after the rename: by then the new one is whole
        assert found == (old, [])
    assert not list(tmp_path.glob(".*"))


def test_training_goes_on_while_a_checkpoint_is_written_and_does_not_change_it(tmp_path, monkeypatch):
    setup, may_write, fill = Setup(steps=1), threading.Event(), Layout.fill

    def waiting(*arguments):
        assert may_write.wait(timeout=60)
        fill(*arguments)

    monkeypatch.setattr(Layout, "fill", waiting)
    expected = [tensor.clone() for tensor in setup.tensors()]
    saver = Saver(tmp_path, alone())
    state = {"seen": [1]}
    folder = saver.save(1, state=state, **setup.parts())
    setup.train_step(1)
    state["seen"].append(2)
    assert not folder.exists()
    may_write.set()
    saver.save(2, state={}, **setup.parts())  # waits for the first
    assert checkpoint.latest(tmp_path).folder in (folder, tmp_path / "step-00000002")
    saver.wait()
    other = Setup(seed=1, steps=1)
    checkpoint.restore(folder, workers=alone(), **other.parts())
    assert same(other.tensors(), expected)
    assert checkpoint.read_state(folder)["seen"] == [1]


def test_a_failure_is_told_by_the_next_save(tmp_path, monkeypatch):
    setup, saver = Setup(steps=1), Saver(tmp_path, alone())
    monkeypatch.setattr(os, "pwrite", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left")))
    saver.save(1, state={}, **setup.parts())
    with pytest.raises(CheckpointError, match=r"step 1 .* No space left"):
        saver.save(2, state={}, **setup.parts())
    monkeypatch.undo()
    saver.save(2, state={}, **setup.parts())
    saver.wait()
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000002"]


def test_an_unwritable_safetensors_file_is_a_checkpoint_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="could not write"):
        Setup().save(tmp_path / "file" / "run")


def test_pruning_keeps_the_last_ones_and_the_best(tmp_path):
    setup = Setup()
    for step in (1, 2, 3, 4):
        setup.save(tmp_path, step)
    checkpoint.prune(tmp_path, keep_last=2, keep={1})
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"step-0000000{step}" for step in (1, 3, 4)]


def test_weights_of_another_model_are_refused_by_name(tmp_path):
    folder = Setup().save(tmp_path)
    other = nn.ModuleDict({"0": nn.Conv2d(2, 4, 5), "1": nn.BatchNorm2d(4), "head": nn.Linear(2, 2)})
    with pytest.raises(CheckpointError) as error:
        load_weights(folder / "weights.safetensors", other)
    for part in (
        "another model",
        "2 missing (head.weight, head.bias)",
        "2 unexpected (2.bias, 2.weight)",
        "1 of another shape (0.weight is [4, 2, 3, 3], expected [4, 2, 5, 5])",
    ):
        assert part in str(error.value)


def header(text):
    return struct.pack("<Q", len(text)) + text.encode()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x00",
        b"\xff" * 64,
        struct.pack("<Q", 2**62) + b"{}",
        header("not json"),
        header('{"a": {"dtype": "F32", "shape": [1000000], "data_offsets": [0, 4000000]}}') + b"\x00" * 16,
        header('{"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}') + b"\x00" * 4,
        header('{"a": {"dtype": "EVIL", "shape": [1], "data_offsets": [0, 4]}}') + b"\x00" * 4,
        b"\x80\x04\x95\x1a\x00\x00\x00\x00\x00\x00\x00\x8c\x05posix\x94\x8c\x06system\x94\x93\x94.",
    ],
)
def test_a_truncated_or_hostile_file_is_a_checkpoint_error(tmp_path, content):
    path = tmp_path / "weights.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"weights\.safetensors"):
        load_weights(path, nn.Linear(2, 2))


def test_a_missing_file_is_a_checkpoint_error(tmp_path):
    with pytest.raises(CheckpointError, match="missing"):
        load_weights(tmp_path / "weights.safetensors", nn.Linear(2, 2))
    with pytest.raises(CheckpointError, match="state"):
        checkpoint.read_state(tmp_path)


def test_state_of_other_optimizers_is_refused(tmp_path):
    setup = Setup(steps=1)
    folder = setup.save(tmp_path)
    parts = Setup().parts()
    with pytest.raises(CheckpointError, match="AdamW over 5 weights, Muon over 1 weights"):
        checkpoint.restore(folder, workers=alone(), **parts | {"optimizers": parts["optimizers"][:1]})
