"""Heads dealt to ranks: loss, gradients and whole weights are those of one process, in float64."""

from collections.abc import Sequence
from dataclasses import replace

import processes
import pytest
import torch
from test_shard import JOINT, SHARED, Case, build, compare_all, reference, step
from torch.distributed.tensor import DTensor, Shard

from reelflow.errors import ConfigError
from reelflow.models.blocks import Attend, Branches, Dual, FeedForward, Single
from reelflow.models.dit import DiTConfig, VideoDiT
from reelflow.nn.attention import QKNorm
from reelflow.nn.norm import Norm
from reelflow.nn.patterns import Gated, Space
from reelflow.parallel.mesh import MeshConfig, start
from reelflow.parallel.sequence import shard_sequence
from reelflow.parallel.shard import ParallelConfig
from reelflow.parallel.tensor import check_tensor, cut_of, deal_heads

MIXED = replace(  # gated MLPs, layer norms of heads and of the width, a context that is only read, no norm at all
    JOINT,
    dim=24,
    num_heads=6,
    rope=(0, 2, 2),
    activation="swiglu",
    layers=(
        Dual(mlp_ratio=2.0, qk_norm=QKNorm("layer"), again=Space(), post=Norm("rms")),
        Single(mlp_ratio=1.5, qk_norm=QKNorm("layer", over="width")),
        Branches((Attend(qk_norm=None), FeedForward(2.0))),
        Dual(mlp_ratio=2.0, context_out=False, idle_query=True),
    ),
)


PAIR = replace(JOINT, layers=(Dual(mlp_ratio=2.0), Single(mlp_ratio=2.0)))


def over(**extents: int) -> ParallelConfig:
    return ParallelConfig(MeshConfig(**extents))


def test_dealt_heads_change_no_loss_and_no_gradient():
    processes.run(2, compare_all, [Case(SHARED, over(tensor=2), (2,), packed=True, steps=2)])
    processes.run(3, compare_all, [Case(MIXED, over(tensor=3), (2,), packed=True)])
    processes.run(4, compare_all, [Case(SHARED, over(shard=2, tensor=2), (2, 1))])
    processes.run(4, compare_all, [Case(PAIR, over(sequence=2, tensor=2), (2,), packed=True)])


def dealt_twice(config: DiTConfig, *, packed: bool) -> None:
    """Compare one process with two runs of tokens of two deals of heads each."""
    case = Case(config, ParallelConfig(), (2,), packed)
    loss, right = reference(case)
    workers, model = start(MeshConfig(sequence=2, tensor=2), "cpu"), build(config)
    assert workers.mesh is not None
    deal_heads(model, workers.mesh["tensor"])
    shard_sequence(model, workers.mesh.get_group("sequence"))
    torch.testing.assert_close(step(model, case, workers), loss, rtol=1e-9, atol=1e-9)
    for name, parameter in model.named_parameters():
        if parameter.grad is None:
            assert not right[name].any(), name
            continue
        local = workers.sum(parameter.grad.to_local() if isinstance(parameter, DTensor) else parameter.grad)
        found, cut = local, cut_of(model, name, 2)
        if cut is not None:
            whole = DTensor.from_local(local, workers.mesh["tensor"], [Shard(cut.dim)]).full_tensor()
            found = torch.empty_like(whole).index_copy_(cut.dim, cut.order, whole)
        torch.testing.assert_close(found, right[name], rtol=1e-9, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")


def dealt_twice_all(cases: Sequence[tuple[DiTConfig, bool]]) -> None:
    for config, packed in cases:
        dealt_twice(config, packed=packed)


def test_heads_and_tokens_dealt_on_one_mesh_change_no_loss_and_no_gradient():
    """Of 6 heads each deal has 3, exchanged for tokens; of 2 heads it has 1, so keys pass round."""
    processes.run(4, dealt_twice_all, [(MIXED, False), (SHARED, True), (PAIR, True)])


def test_each_part_of_a_fused_matrix_is_dealt():
    model = VideoDiT(replace(MIXED, layers=(Single(mlp_ratio=1.0),)))
    rows = cut_of(model, "blocks.0.project.qkv.weight", 2)
    assert rows.dim == 0
    assert rows.order.chunk(2)[1].tolist() == [*range(12, 24), *range(36, 48), *range(60, 72)]
    columns = cut_of(model, "blocks.0.out.weight", 3)  # attention, then MLP
    assert columns.dim == 1
    assert columns.order.chunk(3)[0].tolist() == [*range(8), *range(24, 32)]
    assert cut_of(model, "blocks.0.out.bias", 3) is None
    assert cut_of(model, "blocks.0.norm.weight", 3) is None
    assert cut_of(model, "embed.weight", 3) is None


@pytest.mark.parametrize(
    ("config", "size", "message"),
    [
        (SHARED, 4, "tensor=4 does not divide 2 heads; nearest: tensor=2"),
        (JOINT, 2, r"layers\[0\] mixes patterns by a gate"),
        (replace(SHARED, frequencies="learned"), 2, "learned frequencies differs from head to head"),
        (replace(MIXED, layers=(Single(mlp_ratio=1.25),)), 4, "tensor=4 does not divide 6 heads; nearest: tensor=3"),
        (replace(MIXED, activation="relu2", layers=(Single(mlp_ratio=1.125),)), 2, r"blocks\.0\.up has 27 channels"),
        (replace(MIXED, layers=(Branches((Attend(Gated()),)),)), 2, r"layers\[0\] mixes patterns by a gate"),
    ],
)
def test_networks_that_cannot_be_dealt_are_refused(config: DiTConfig, size: int, message: str):
    with pytest.raises(ConfigError, match=message):
        check_tensor(config, size)
    check_tensor(config, 1)
