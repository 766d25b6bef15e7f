"""Heads dealt to ranks: loss, gradients and whole weights are those of one process, in float64."""

from dataclasses import replace

import processes
import pytest
from test_shard import JOINT, SHARED, Case, compare_all

from reelflow.errors import ConfigError
from reelflow.models.blocks import Attend, Branches, Dual, FeedForward, Single
from reelflow.models.dit import DiTConfig, VideoDiT
from reelflow.nn.attention import QKNorm
from reelflow.nn.norm import Norm
from reelflow.nn.patterns import Gated, Space
from reelflow.parallel.mesh import MeshConfig
from reelflow.parallel.shard import ParallelConfig
from reelflow.parallel.tensor import check_tensor, cut_of

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


def over(**extents: int) -> ParallelConfig:
    return ParallelConfig(MeshConfig(**extents))


def test_dealt_heads_change_no_loss_and_no_gradient():
    processes.run(2, compare_all, [Case(SHARED, over(tensor=2), (2,), packed=True, steps=2)])
    processes.run(3, compare_all, [Case(MIXED, over(tensor=3), (2,), packed=True)])
    processes.run(4, compare_all, [Case(SHARED, over(shard=2, tensor=2), (2, 1))])


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
