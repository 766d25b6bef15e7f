"""In float64 the loss, every gradient and every weight of a mesh of processes are those of one process."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import processes
import pytest
import torch
from torch import nn

from reelflow.config import set_values
from reelflow.errors import CheckpointError, ConfigError
from reelflow.models.blocks import Attend, Branches, Cross, Dual, FeedForward, Single
from reelflow.models.condition import Condition
from reelflow.models.context import Layers, Refine
from reelflow.models.dit import DiTConfig, VideoDiT
from reelflow.models.packing import Clip, pack
from reelflow.nn.attention import QKNorm
from reelflow.nn.embed import Number
from reelflow.nn.patterns import Gated
from reelflow.parallel.mesh import MeshConfig, Workers, alone, start
from reelflow.parallel.shard import ParallelConfig, boxes, load_whole, loss_share, norms, parallelize, whole_state

JOINT = DiTConfig(  # two streams, then one; a number and a gate
    in_channels=2,
    dim=12,
    num_heads=2,
    layers=(Dual(mlp_ratio=2.0, attend=Gated("token")), Dual(mlp_ratio=2.0), Single(mlp_ratio=2.0)),
    rope=(2, 2, 2),
    time=Number(channels=6),
    context=Refine(5, depth=1, mlp_ratio=2.0),
)
SHARED = replace(  # self, cross and feed-forward; tables of a few rows, which no number of processes divides
    JOINT,
    layers=2
    * (Branches((Attend(qk_norm=QKNorm(over="width")), Cross(qk_norm=QKNorm(over="width")), FeedForward(2.0))),),
    modulation="shared",
    context=Layers(5),
)
GRIDS = ((1, 2, 3), (3, 1, 2), (2, 2, 2), (1, 1, 1), (2, 3, 1))  # tokens; a patch is 1 x 2 x 2


@dataclass(frozen=True)
class Case:
    network: DiTConfig
    parallel: ParallelConfig
    samples: tuple[int, ...]  # of each data rank
    packed: bool = False
    steps: int = 1  # the second must not be another than the first


def build(config: DiTConfig) -> VideoDiT:
    torch.manual_seed(0)
    model = VideoDiT(config).double()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model


def batch(config: DiTConfig, data_rank: int, samples: int, *, packed: bool) -> list[Clip]:
    """Clips for one row, of grids of their own, or one clip that is a batch; every data rank's are of another grid."""
    generator = torch.Generator().manual_seed(data_rank)

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64)

    def clip(grid: tuple[int, int, int], count: int) -> Clip:
        t = torch.rand(count, grid[0], generator=generator, dtype=torch.float64)
        silent = packed and data_rank == 0  # a rank whose clips have no text must not leave the others waiting
        mask = torch.arange(3)[None] < (0 if silent else torch.randint(1, 4, (count, 1), generator=generator))
        context = Condition(context=normal(count, 3, 5), context_mask=mask)
        return Clip(normal(count, 2, grid[0], 2 * grid[1], 2 * grid[2]), t, context)

    if not packed:
        return [clip(GRIDS[data_rank], samples)]
    return [clip(GRIDS[(data_rank + index) % len(GRIDS)], 1) for index in range(samples)]


def mean_loss(model: VideoDiT, clips: Sequence[Clip], *, packed: bool) -> torch.Tensor:
    """Return the mean over samples of a loss of each."""
    found = model.forward_packed(pack(clips)) if packed else [model(clips[0].latents, clips[0].t, clips[0].condition)]
    errors = [(y - clip.latents).square().mean((1, 2, 3, 4)) for y, clip in zip(found, clips, strict=True)]
    return torch.cat(errors).mean()


def reference(case: Case) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Return the loss and gradients of one process on all samples of the step."""
    model = build(case.network)
    total = 0.0
    for rank, samples in enumerate(case.samples):
        clips = batch(case.network, rank, samples, packed=case.packed)
        total = total + mean_loss(model, clips, packed=case.packed) * samples / sum(case.samples)
    total.backward()
    return total.detach(), {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in model.named_parameters()}


def step(model: VideoDiT, case: Case, workers: Workers) -> torch.Tensor:
    samples = case.samples[workers.data_rank]
    clips = batch(case.network, workers.data_rank, samples, packed=case.packed)
    share = loss_share(samples, workers)
    loss = mean_loss(model, clips, packed=case.packed) * share
    loss.backward()
    return workers.sum(loss.detach())


def gradients(model: VideoDiT, workers: Workers) -> dict[str, torch.Tensor]:
    """Return whole gradients of all ranks' boxes, put together as a checkpoint would."""
    found = {}
    for name, parameter in model.named_parameters():
        whole = torch.zeros(parameter.shape, dtype=torch.float64)
        if parameter.grad is not None:
            for box in boxes(name, parameter.grad, model, workers):
                if box.writes:
                    whole[box.place] += box.data
        torch.distributed.all_reduce(whole)
        found[name] = whole
    return found


def compare(case: Case) -> None:
    workers = start(case.parallel.mesh, "cpu")
    loss, grads = reference(case)
    model = parallelize(build(case.network), workers, case.parallel)
    for _ in range(case.steps):
        model.zero_grad()
        torch.testing.assert_close(step(model, case, workers), loss, rtol=1e-9, atol=1e-9)
        found = gradients(model, workers)
        assert found.keys() == grads.keys()
        for name, grad in grads.items():
            torch.testing.assert_close(found[name], grad, rtol=1e-9, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")
    used = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    expected = torch.stack([grads[name].norm() for name in used])
    torch.testing.assert_close(norms(list(used.values()), workers), expected, rtol=1e-9, atol=1e-9)
    check_state(model, build(case.network), workers)


def check_state(model: VideoDiT, plain: VideoDiT, workers: Workers) -> None:
    """The whole state is the plain one, by its names; and what is loaded is what is had."""
    state = whole_state(model, workers)
    wanted = plain.state_dict()
    if workers.is_first:
        assert list(state) == list(wanted)
        assert all(torch.equal(state[name], wanted[name]) for name in wanted)
    other = {name: tensor + 1 for name, tensor in wanted.items()}
    load_whole(model, other, workers)
    state = whole_state(model, workers)
    assert all(torch.equal(state[name], other[name]) for name in state)


def compare_all(cases: Sequence[Case]) -> None:
    for case in cases:
        try:
            compare(case)
        except Exception as error:
            error.add_note(f"{case}")
            raise


DATA = (2, 1, 3, 1)  # samples of each data rank


@pytest.mark.parametrize(
    ("world_size", "network", "packed"), [(1, JOINT, True), (2, JOINT, False), (3, SHARED, True), (4, JOINT, True)]
)
def test_sharded_weights_change_no_loss_and_no_gradient(world_size, network, packed):
    config = ParallelConfig(MeshConfig(shard=world_size))
    processes.run(world_size, compare_all, [Case(network, config, DATA[:world_size], packed, steps=2)])


def test_replicas_and_shared_tokens_change_no_loss_and_no_gradient():
    replicas = ParallelConfig(MeshConfig(replicate=2, shard=2))
    tokens = ParallelConfig(MeshConfig(shard=2, sequence=2), recompute="blocks")
    all_of_it = ParallelConfig(MeshConfig(replicate=2, sequence=2))
    cases = [Case(SHARED, replicas, DATA), Case(JOINT, tokens, (3, 2), True), Case(SHARED, all_of_it, (2, 1))]
    processes.run(4, compare_all, cases)


def test_recomputation_and_offloading_change_no_loss_and_no_gradient():
    mesh = MeshConfig(shard=2)
    kinds = [
        ParallelConfig(mesh, recompute="attention-kept", offload="cpu"),
        ParallelConfig(mesh, recompute=2),
    ]
    processes.run(2, compare_all, [Case(JOINT, config, (2, 1)) for config in kinds])


def half_precision() -> None:
    seen = {}
    workers = start(MeshConfig(shard=2), "cpu")
    losses = {}
    for precision in ("fp32", "bf16"):
        case = Case(SHARED, ParallelConfig(MeshConfig(shard=2), precision=precision), (2, 1))
        model = parallelize(build(SHARED).float(), workers, case.parallel)

        def see(module: nn.Module, *_: object) -> None:
            seen[precision, type(module).__name__] = next(module.parameters()).dtype  # noqa: B023

        for module in (model.blocks[0].branches[0].function.project, model.time):
            module.register_forward_pre_hook(see)
        with torch.autocast("cpu", torch.bfloat16):
            clips = [
                replace(
                    clip,
                    latents=clip.latents.float(),
                    t=clip.t.float(),
                    condition=clip.condition.to("cpu", torch.float),
                )
                for clip in batch(SHARED, workers.data_rank, case.samples[workers.data_rank], packed=False)
            ]
            loss = mean_loss(model, clips, packed=False)
        loss.backward()
        losses[precision] = float(loss.detach())
        assert {p.dtype for p in model.parameters()} == {torch.float32}
        assert {p.grad.dtype for p in model.parameters() if p.grad is not None} == {torch.float32}
    assert seen == {
        ("fp32", "Projection"): torch.float32,
        ("fp32", "NumberEmbedding"): torch.float32,
        ("bf16", "Projection"): torch.bfloat16,
        ("bf16", "NumberEmbedding"): torch.float32,
    }
    assert losses["bf16"] == pytest.approx(losses["fp32"], rel=2e-2)


def test_weights_travel_in_half_precision_and_are_kept_and_summed_in_float32():
    processes.run(2, half_precision)


def changed_weights() -> None:
    """Other weights, put in place without a step, are those of the next pass: none was kept from the last."""
    workers = start(MeshConfig(shard=2), "cpu")
    model, plain = parallelize(build(JOINT), workers, ParallelConfig(MeshConfig(shard=2))), build(JOINT)
    clips, held = batch(JOINT, 0, 2, packed=True), [*model.parameters(), *plain.parameters()]
    for _ in range(2):
        with torch.no_grad():
            ours, theirs = model.forward_packed(pack(clips)), plain.forward_packed(pack(clips))
            for parameter in held:
                parameter.mul_(1.5)
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_weights_changed_between_passes_are_used():
    processes.run(2, changed_weights)


def differently_built() -> str:
    workers = start(MeshConfig(shard=2), "cpu")
    model = build(JOINT)
    with torch.no_grad():
        model.time.mlp.up.weight.add_(workers.rank)
    with pytest.raises(ConfigError) as found:
        parallelize(model, workers, ParallelConfig(MeshConfig(shard=2)))
    return str(found.value)


def test_weights_that_differ_between_processes_are_refused_by_all():
    told = processes.run(2, differently_built)
    assert "different weights than rank 0 (elsewhere, not here)" in told[0]
    assert "different weights than rank 0 (here in time.mlp.up.weight first)" in told[1]


def test_one_process_alone_goes_the_same_way():
    case = Case(JOINT, ParallelConfig(recompute="blocks"), (2,))
    workers, model = alone(), build(JOINT)
    assert parallelize(model, workers, case.parallel) is model
    loss, grads = reference(case)
    assert torch.equal(step(model, case, workers), loss)
    assert all(torch.equal(p.grad, grads[n]) for n, p in model.named_parameters() if p.grad is not None)
    torch.testing.assert_close(norms(list(grads.values()), workers), torch.stack([g.norm() for g in grads.values()]))
    check_state(model, build(JOINT), workers)


def test_what_cannot_be_is_refused():
    with pytest.raises(ConfigError, match="offloading needs a process group"):
        parallelize(build(JOINT), alone(), ParallelConfig(offload="cpu"))
    with pytest.raises(ConfigError, match="the workers were started as"):
        parallelize(build(JOINT), alone(), ParallelConfig(MeshConfig(shard=2)))
    with pytest.raises(ConfigError, match="tensor=4 does not divide 2 heads; nearest: shard=2, tensor=2"):
        ParallelConfig(MeshConfig(tensor=4)).check(JOINT, 4)
    for value, recompute in (("2", 2), ("attention-kept", "attention-kept")):
        assert set_values(ParallelConfig(), [f"recompute={value}", "mesh.shard=4"]).recompute == recompute
    with pytest.raises(ConfigError, match="recompute takes every n-th block, n at least 1, got 0"):
        set_values(ParallelConfig(), ["recompute=0"])
    state = build(JOINT).state_dict()
    with pytest.raises(CheckpointError, match=r"the weights hold nothing for blocks\.2\.out\.bias, expected \[12\]"):
        load_whole(build(JOINT), {name: t for name, t in state.items() if name != "blocks.2.out.bias"}, alone())
