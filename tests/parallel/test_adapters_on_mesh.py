"""An adapter is learned on a mesh as in one process: in float64 its loss, gradients, run and probe are the same."""

import json
import logging
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import processes
import pytest
import torch
from safetensors.torch import load_file
from test_shard import DATA, JOINT, SHARED, batch, build, mean_loss
from torch.distributed.tensor import DTensor

from reelflow.data.loader import ShuffledBatches
from reelflow.errors import ConfigError
from reelflow.models.adapters import Adapter, LoRA, apply, new_adapter
from reelflow.models.blocks import Single
from reelflow.models.dit import DiTConfig, VideoDiT
from reelflow.parallel.mesh import MeshConfig, Workers, alone, start
from reelflow.parallel.shard import ParallelConfig, loss_share, parallelize, whole_state
from reelflow.training.adapter import AdapterTask, AdapterTensors
from reelflow.training.flow import Preserved
from reelflow.training.loop import TrainingConfig, train
from reelflow.training.optim import OptimizerConfig

sys.path.append(str(Path(__file__).parents[1] / "training"))
from flow_run import NETWORK, QUIET, flow_task, same_shape
from test_distributed import Died, assert_equal, assert_same_log

LORA = LoRA(rank=2, alpha=3.0, targets=("all",))
DORA = LoRA(rank=2, targets=("attention", "embed", "out"), magnitudes=True)
LATE = LoRA(rank=1, targets=("blocks.2.*",), magnitudes=True)  # blocks before it have no backward pass


@dataclass(frozen=True)
class Case:
    network: DiTConfig
    adapter: LoRA
    parallel: ParallelConfig
    samples: tuple[int, ...]  # of each data rank
    packed: bool = False


def grown(model: VideoDiT, config: LoRA) -> Adapter:
    """Return an adapter as if it had learned something."""
    generator = torch.Generator().manual_seed(1)
    return new_adapter(model, config, generator).map(
        lambda x: x + 0.2 * torch.rand(x.shape, generator=generator, dtype=x.dtype)
    )


def reference(case: Case) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Return the loss and gradients of one process on all samples of the step."""
    model = build(case.network).requires_grad_(False)
    tensors, total = AdapterTensors(grown(model, case.adapter)), torch.zeros((), dtype=torch.float64)
    with apply(model, [(tensors.adapter, 1.0)]):
        for rank, samples in enumerate(case.samples):
            clips = batch(case.network, rank, samples, packed=case.packed)
            total = total + mean_loss(model, clips, packed=case.packed) * samples / sum(case.samples)
    total.backward()
    return total.detach(), {name: p.grad for name, p in tensors.named_parameters() if p.grad is not None}


def compare(case: Case) -> None:
    workers = start(case.parallel.mesh, "cpu")
    loss, grads = reference(case)
    whole = build(case.network)
    tensors = AdapterTensors(grown(whole, case.adapter))
    assert len(grads) == len(list(tensors.parameters()))
    model = parallelize(build(case.network), workers, case.parallel).requires_grad_(False)
    with apply(model, [(tensors.adapter, 1.0)]):
        for _ in range(2):  # the second must not be another than the first
            tensors.zero_grad()
            samples = case.samples[workers.data_rank]
            clips = batch(case.network, workers.data_rank, samples, packed=case.packed)
            found = mean_loss(model, clips, packed=case.packed) * loss_share(samples, workers)
            found.backward()
            torch.testing.assert_close(workers.sum(found.detach()), loss, rtol=1e-9, atol=1e-9)
            for name, p in tensors.named_parameters():
                assert p.grad is not None, name
                torch.testing.assert_close(workers.sum(p.grad), grads[name], rtol=1e-9, atol=1e-9)
    held = list(model.parameters())
    assert all(isinstance(p, DTensor) and p.grad is None and not p.requires_grad for p in held)
    shares = case.parallel.mesh.shard * case.parallel.mesh.sequence
    assert sum(p.to_local().numel() for p in held) <= sum(p.numel() for p in held) / shares + sum(
        p[0].numel() for p in held
    )
    state = whole_state(model, workers)
    assert all(torch.equal(x, whole.state_dict()[name]) for name, x in state.items())


def compare_all(cases: Sequence[Case]) -> None:
    for case in cases:
        try:
            compare(case)
        except Exception as error:
            error.add_note(f"{case}")
            raise


@pytest.mark.parametrize(("world_size", "network", "packed"), [(1, JOINT, True), (2, JOINT, False), (3, SHARED, True)])
def test_sharded_weights_change_no_gradient_of_an_adapter(world_size, network, packed):
    parallel = ParallelConfig(MeshConfig(shard=world_size))
    adapters = (LORA, DORA, LATE) if world_size == 2 else (DORA,)
    processes.run(world_size, compare_all, [Case(network, a, parallel, DATA[:world_size], packed) for a in adapters])


def test_replicas_and_shared_tokens_change_no_gradient_of_an_adapter():
    replicas = ParallelConfig(MeshConfig(replicate=2, shard=2))
    tokens = ParallelConfig(MeshConfig(shard=2, sequence=2), recompute="blocks")
    processes.run(4, compare_all, [Case(SHARED, DORA, replicas, DATA), Case(JOINT, LORA, tokens, (3, 2), True)])


def test_recomputation_and_offloading_change_no_gradient_of_an_adapter():
    kinds = [{"recompute": "attention-kept", "offload": "cpu"}, {"recompute": 2}]
    cases = [Case(JOINT, DORA, ParallelConfig(MeshConfig(shard=2), **kind), (2, 1)) for kind in kinds]
    processes.run(2, compare_all, cases)


# Whole runs

TWO = MeshConfig(shard=2)
CONFIG = TrainingConfig(
    steps=6,
    batch_size=2,
    accumulate=4,
    optimizer=OptimizerConfig(lr=1e-2, muon_lr=None, warmup_steps=2, decay="cosine", weight_decay=0.1, eps=1e-4),
    seed=5,
    ema_decay=0.9,
    log_every=1,
    validate_every=3,
    checkpoint_every=2,
)
PROBED = 9  # of batches 8 to 11, which are those of step 2: the second process's, where there are two


def task_of(lora: LoRA, mesh: MeshConfig, workers: Workers) -> AdapterTask:
    whole = flow_task(NETWORK, alone(), ParallelConfig()).model
    adapter = new_adapter(whole, lora, torch.Generator().manual_seed(2))
    return AdapterTask(flow_task(NETWORK, workers, ParallelConfig(mesh)), adapter, probe_after=PROBED, workers=workers)


def learn(folder: Path, mesh: MeshConfig, died_at: int | None = None, lora: LoRA = DORA) -> None:
    """Learn clips, and beside them what the network made before; all processes die after a step, if one is named."""
    workers = alone() if mesh.world_size == 1 else start(mesh, "cpu")

    def on_step(step: int) -> None:
        if step == died_at:
            raise Died

    def collate(rows: torch.Tensor, generator: torch.Generator) -> Preserved:
        drawn = torch.randint(17, (len(rows),), generator=generator)
        return Preserved(same_shape(rows.tolist()), same_shape(drawn.tolist()), 0.5)

    with ShuffledBatches(17, CONFIG.batch_size, collate, seed=3, prefetch=1) as batches:
        options = {"hidden": lambda name, weight: False, "workers": workers, "on_step": on_step, "console": QUIET}
        try:
            train(task_of(lora, mesh, workers), batches, CONFIG, folder, **options)
        except Died:
            return


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    folder = tmp_path_factory.mktemp("one")
    learn(folder, MeshConfig())
    return folder


@pytest.mark.parametrize("mesh", [TWO, MeshConfig(sequence=2)], ids=str)
def test_an_adapter_s_run_on_a_mesh_learns_probes_and_logs_what_one_process_does(one, tmp_path, mesh):
    processes.run(2, learn, tmp_path, mesh)
    assert_equal(tmp_path, one, atol=1e-9)
    assert_same_log(tmp_path, one)
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "change" in line] == [3, 3, 6]  # the probe's, and two validations
    weights = load_file(tmp_path / "step-00000006" / "weights.safetensors")
    assert int(weights["batches"]) == CONFIG.steps * CONFIG.accumulate
    first = load_file(tmp_path / "step-00000004" / "weights.safetensors")
    assert all(not torch.equal(x, first[name]) for name, x in weights.items())


@pytest.mark.parametrize(("before", "after"), [(TWO, MeshConfig()), (MeshConfig(), TWO)], ids=str)
def test_an_adapter_s_run_goes_on_at_any_number_of_processes(one, tmp_path, before, after):
    for mesh, died_at in ((before, 3), (after, None)):
        processes.run(mesh.world_size, learn, tmp_path, mesh, died_at)
    assert_equal(tmp_path, one, atol=1e-9)
    assert_same_log(tmp_path, one)


def warned() -> list[str]:
    """Return what the log says of an adapter that changes nothing yet."""
    found: list[str] = []

    class Kept(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            found.append(record.getMessage())

    logger, handler = logging.getLogger("reelflow.training.adapter"), Kept()
    logger.addHandler(handler)
    try:
        workers = start(TWO, "cpu")
        assert task_of(LORA, TWO, workers).validate(torch.Generator())["change"] == 0
    finally:
        logger.removeHandler(handler)
    return found


def test_the_first_process_alone_warns_of_an_adapter_without_effect():
    first, second = processes.run(2, warned)
    assert "which nobody will see" in first[0]
    assert (len(first), second) == (1, [])


def draw_loss(task: AdapterTask) -> float:
    loss = task.loss(same_shape([1, 2]), torch.Generator().manual_seed(1)).value
    loss.backward()
    return loss.item()


def compiled() -> None:
    network = replace(NETWORK, layers=(Single(mlp_ratio=2.0),))
    found = []
    for kind in ("none", "blocks"):
        adapter = grown(flow_task(network, alone(), ParallelConfig()).model, DORA)
        task = AdapterTask(flow_task(network, alone(), ParallelConfig(compile=kind)), adapter)
        first, change, again = draw_loss(task), task.change(), draw_loss(task)
        assert first == again
        found.append((first, change))
    assert found[1] == pytest.approx(found[0], rel=1e-9)


@pytest.mark.slow
def test_the_probe_of_compiled_blocks_is_that_of_plain_ones_and_leaves_them_as_they_were():
    """In a process of its own, whose signatures are not checked: a compiler would look into that."""
    code = "import sys; sys.path[:0] = sys.argv[1:]; import test_adapters_on_mesh as test; test.compiled()"
    rooms = [str(Path(__file__).parents[1] / room) for room in ("parallel", "training")]
    done = subprocess.run([sys.executable, "-c", code, *rooms], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def dealt() -> str:
    mesh = MeshConfig(tensor=2)
    workers = start(mesh, "cpu")
    flow = flow_task(NETWORK, alone(), ParallelConfig())
    with pytest.raises(ConfigError) as found:
        AdapterTask(flow, grown(flow.model, LORA), workers=workers)
    return str(found.value)


def test_dealt_heads_are_refused_to_an_adapter():
    assert processes.run(2, dealt) == 2 * [
        "an adapter changes whole maps, and tensor=2 cuts them; nearest: tensor=1, with as many more of shard or sequence"
    ]
