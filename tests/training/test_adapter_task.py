import json
import logging
import shutil

import pytest
import torch
from rich.console import Console

from reelflow.data.loader import ShuffledBatches
from reelflow.diffusion.samplers import euler
from reelflow.errors import ConfigError
from reelflow.models.adapters import LoRA, merge, new_adapter
from reelflow.models.blocks import Dual
from reelflow.models.condition import Condition
from reelflow.models.context import Layers
from reelflow.models.dit import DiTConfig, VideoDiT
from reelflow.models.vae import Posterior
from reelflow.training.adapter import AdapterTask
from reelflow.training.flow import FlowConfig, FlowTask, LatentBatch
from reelflow.training.loop import TrainingConfig, train
from reelflow.training.optim import OptimizerConfig

COLOURS = {"red": 2.0, "green": -2.0, "blue": 0.0}  # a clip of a colour has latents of this value
WORDS = torch.eye(3)
FLOW = FlowConfig(given_fraction=0.0, condition_dropout=0.0)
QUIET = Console(quiet=True)


def clips(*colours: str) -> LatentBatch:
    numbers = [list(COLOURS).index(colour) for colour in colours]
    mean = torch.tensor([COLOURS[colour] for colour in colours]).view(-1, 1, 1, 1, 1).expand(-1, 1, 2, 2, 2).clone()
    return LatentBatch(Posterior(mean, torch.full_like(mean, -4.0)), Condition(context=WORDS[numbers][:, None]))


def task_of(model: VideoDiT, *unseen: str) -> FlowTask:
    return FlowTask(model, FLOW, null=Condition(context=torch.zeros(1, 1, 3)), validation=clips(*unseen))


def learn(task, colours: tuple[str, ...], folder, *, steps: int, lr: float, stop: int | None = None, **changes):
    batches = ShuffledBatches(
        8, 8, lambda rows, _: clips(*(colours[row % len(colours)] for row in rows.tolist())), seed=0, prefetch=0
    )
    config = {"steps": steps, "batch_size": 8, "seed": 0, "ema_decay": 0.9, "log_every": 1000, "validate_every": steps}
    optimizer = OptimizerConfig(lr=lr, muon_lr=None, warmup_steps=5, decay="linear")
    with batches:
        return train(
            task, batches, TrainingConfig(optimizer=optimizer, **config | changes), folder, console=QUIET,
            hidden=lambda name, weight: False,
        )  # fmt: skip


def network() -> VideoDiT:
    torch.manual_seed(0)
    config = DiTConfig(
        in_channels=1, dim=32, num_heads=2, layers=(Dual(mlp_ratio=2.0),), rope=(4, 6, 6), context=Layers(3)
    )
    return VideoDiT(config)


def drawn(model: VideoDiT, colour: str) -> float:
    """Return the mean value of clips that the model makes of a colour's name."""
    noise = torch.randn(16, 1, 2, 2, 2, generator=torch.Generator().manual_seed(7))
    condition = Condition(context=WORDS[[list(COLOURS).index(colour)]].expand(16, -1)[:, None])
    with torch.no_grad():
        made = euler(lambda x, t: model(x, t, condition), noise, torch.linspace(0, 1, 11))
    return float(made.mean())


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> dict[str, torch.Tensor]:
    """Weights of a model that knows two colours."""
    model = network()
    learn(task_of(model, "red", "green"), ("red", "green"), tmp_path_factory.mktemp("base"), steps=100, lr=5e-3)
    return {name: x.clone() for name, x in model.state_dict().items()}


def based(weights: dict[str, torch.Tensor]) -> VideoDiT:
    model = network()
    model.load_state_dict(weights)
    return model.eval()


def adapter_task(model: VideoDiT) -> AdapterTask:
    lora = LoRA(rank=4, targets=("all",), magnitudes=True)
    return AdapterTask(task_of(model, "blue", "blue"), new_adapter(model, lora, torch.Generator().manual_seed(1)))


def test_an_adapter_teaches_a_new_colour_and_leaves_the_network_alone(base, tmp_path):
    model = based(base)
    assert abs(drawn(model, "red") - 2) < 0.3
    before = abs(drawn(model, "blue"))
    task = adapter_task(model)
    first = task.validate(torch.Generator().manual_seed(0))["loss"]
    learn(task, ("blue",), tmp_path / "run", steps=30, lr=2e-2)
    last = task.validate(torch.Generator().manual_seed(0))
    assert last["loss"] < 0.5 * first
    assert last["change"] > 0.05
    assert all(torch.equal(x, base[name]) for name, x in model.state_dict().items())
    task.applied.undo()
    merge(model, [(task.model.adapter, 1.0)])
    assert before > 0.6
    assert abs(drawn(model, "blue")) < 0.3


def test_an_interrupted_run_ends_with_the_same_adapter_bit_for_bit(base, tmp_path):
    whole, stopped, resumed = (adapter_task(based(base)) for _ in range(3))
    learn(whole, ("blue",), tmp_path / "whole", steps=6, lr=1e-2)
    saves = {"checkpoint_every": 3, "keep_last": 9}

    class Killed(Exception):
        pass

    loss, calls = stopped.loss, []

    def dying(batch, generator):
        calls.append(None)
        if len(calls) == 5:
            raise Killed
        return loss(batch, generator)

    stopped.loss = dying
    with pytest.raises(Killed):
        learn(stopped, ("blue",), tmp_path / "parts", steps=6, lr=1e-2, **saves)
    result = learn(resumed, ("blue",), tmp_path / "parts", steps=6, lr=1e-2, **saves)
    assert result.step == 6
    state = whole.model.state_dict()
    assert all(torch.equal(x, state[name]) for name, x in resumed.model.state_dict().items())


def test_an_adapter_without_effect_is_warned_of(base, caplog):
    task = adapter_task(based(base))
    with caplog.at_level(logging.WARNING):
        assert task.validate(torch.Generator().manual_seed(0))["change"] == 0
    assert "which nobody will see" in caplog.text
    caplog.clear()
    with torch.no_grad():
        for parameter in task.model.parameters():
            parameter.add_(0.1)
    with caplog.at_level(logging.WARNING):
        assert task.validate(torch.Generator().manual_seed(0))["change"] > 0.01
    assert not caplog.text


def anything() -> VideoDiT:
    """A network that has learned nothing, random everywhere."""
    model = network().eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return model


def probed(lora: LoRA, *, after: int) -> AdapterTask:
    model = anything()
    return AdapterTask(
        task_of(model, "blue"), new_adapter(model, lora, torch.Generator().manual_seed(1)), probe_after=after
    )


def test_a_probe_says_early_what_the_adapter_changes(tmp_path, caplog):
    def run(name: str, lr: float) -> dict[int, float]:
        task = probed(LoRA(rank=4, targets=("blocks.*.qkv",)), after=3)
        learn(task, ("blue",), tmp_path / name, steps=4, lr=lr, log_every=1, validate_every=0)
        lines = [json.loads(line) for line in (tmp_path / name / "log.jsonl").read_text().splitlines()]
        return {line["step"]: line["change"] for line in lines if "change" in line}

    with caplog.at_level(logging.WARNING):
        ((step, change),) = run("learning", 1e-2).items()
        assert (step, change > 1e-3) == (4, True)  # by the weights that three batches have made
        assert not caplog.text
        assert run("hardly", 1e-9)[4] < 1e-6
    assert "of its norm after 3 batches, which nobody will see: raise lr" in caplog.text


def test_maps_that_learn_nothing_are_named(caplog):
    task = probed(LoRA(rank=1, targets=("mlp",)), after=1)
    with torch.no_grad():
        task.model.adapter.updates["blocks.0.video.mlp.down"][0].up.add_(1e-9)
    with caplog.at_level(logging.WARNING):
        task.validate(torch.Generator().manual_seed(0))
    assert "(3 of 4 maps have learned nothing, such as blocks.0.video.mlp.up)" in caplog.text


def test_a_probe_is_made_once_also_by_a_run_that_goes_on(tmp_path, monkeypatch):
    asked: list[int] = []
    monkeypatch.setattr(AdapterTask, "change", lambda self: asked.append(int(self.model.batches)) or 1.0)
    brief = {"validate_every": 0, "checkpoint_every": 3, "keep_last": 9}
    learn(probed(LoRA(rank=1), after=2), ("blue",), tmp_path / "run", steps=4, lr=1e-2, **brief)
    shutil.rmtree(tmp_path / "run" / "step-00000004")
    again = probed(LoRA(rank=1), after=2)
    learn(again, ("blue",), tmp_path / "run", steps=4, lr=1e-2, **brief)
    assert (asked, int(again.model.batches)) == ([2], 4)


def test_a_probe_before_the_first_step_is_refused():
    with pytest.raises(ConfigError, match="probe_after is at least 1"):
        probed(LoRA(rank=1), after=0)
