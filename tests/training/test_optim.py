import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from reelflow.errors import ConfigError
from reelflow.training.optim import (
    Muon,
    OptimizerConfig,
    build_optimizers,
    orthogonalize,
    schedule,
    set_learning_rates,
)


def config(**changes):
    values = {"lr": 1e-3, "muon_lr": 0.02, "warmup_steps": 10, "decay": "cosine"} | changes
    return OptimizerConfig(**values)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(5, 8)
        self.conv = nn.Conv3d(8, 8, 3)
        self.mlp = nn.Linear(8, 8)
        self.out = nn.Linear(8, 2)
        self.frozen = nn.Parameter(torch.zeros(2, 2), requires_grad=False)


def hidden(name, parameter):
    return name in ("conv.weight", "mlp.weight")


@settings(max_examples=40, deadline=None)
@given(
    warmup=st.integers(0, 20),
    total=st.integers(1, 60),
    decay=st.sampled_from(["constant", "linear", "cosine"]),
    final=st.floats(0, 1),
)
def test_the_schedule_rises_to_one_then_never_rises_again(warmup, total, decay, final):
    c = config(warmup_steps=warmup, decay=decay, final_fraction=final)
    values = [schedule(c, step, total) for step in range(total + 1)]
    rising, falling = values[:warmup], values[warmup:]
    assert all(a < b for a, b in pairwise(rising))
    assert all(a >= b for a, b in pairwise(falling))
    assert all(0 <= value <= 1 for value in values)
    if warmup <= total:
        assert values[max(warmup - 1, 0)] == pytest.approx(1)
    if warmup < total and decay != "constant":
        assert values[total] == pytest.approx(final)


def test_a_constant_schedule_stays_at_the_peak():
    c = config(decay="constant", final_fraction=0.1)
    assert {schedule(c, step, 100) for step in range(9, 100)} == {1.0}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(16, 40), (16, 24), (8, 200)])
def test_orthogonalized_matrices_have_singular_values_near_one(shape, dtype):
    matrices = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(orthogonalize(matrices, dtype=dtype).float())
    assert values.min() > 0.6
    assert values.max() < 1.3


def test_orthogonalizing_applies_the_quintic_to_each_singular_value():
    g = torch.Generator().manual_seed(0)
    u, _ = torch.linalg.qr(torch.randn(6, 6, generator=g, dtype=torch.float64))
    v, _ = torch.linalg.qr(torch.randn(30, 6, generator=g, dtype=torch.float64))
    values = torch.logspace(0, -6, 6, dtype=torch.float64)
    matrix = (u * values) @ v.T
    expected = values / values.norm()
    for _ in range(5):
        expected = 3.4445 * expected - 4.7750 * expected**3 + 2.0315 * expected**5
    result = orthogonalize(matrix[None].float())[0].double()
    assert torch.allclose(result, (u * expected) @ v.T, atol=2e-4)


def test_a_zero_matrix_stays_zero():
    for dtype in (torch.float32, torch.bfloat16):
        assert not orthogonalize(torch.zeros(1, 3, 5), dtype=dtype).any()


def moved(weights, **options):
    """The change each weight undergoes in one Muon step with learning rate 1 under a fixed random gradient."""
    g = torch.Generator().manual_seed(1)
    params = [nn.Parameter(weight.clone()) for weight in weights]
    for parameter in params:
        parameter.grad = torch.randn(parameter.shape, generator=g)
    Muon(params, lr=1.0, **options).step()
    return [new.detach() - old for new, old in zip(params, weights, strict=True)]


def test_muon_moves_matrices_by_near_orthogonal_steps_scaled_by_their_shape():
    for rows, columns in ((12, 40), (40, 12)):
        (step,) = moved([torch.zeros(rows, columns)], ns_dtype=torch.float32)
        values = torch.linalg.svdvals(step) / max(1, rows / columns) ** 0.5
        assert 0.6 < values.min() < values.max() < 1.3


def test_muon_treats_a_kernel_as_the_matrix_out_by_rest_in_any_memory_format():
    kernel = torch.zeros(6, 4, 3, 3)
    (flat,) = moved([kernel.flatten(1)], ns_dtype=torch.float32)
    for weight in (kernel, kernel.to(memory_format=torch.channels_last)):
        (step,) = moved([weight], ns_dtype=torch.float32)
        assert torch.allclose(step.flatten(1), flat, atol=1e-6)


def test_muon_moves_many_matrices_as_it_moves_each_alone():
    g = torch.Generator().manual_seed(0)
    shapes = [(6, 10), (10, 6), (6, 10), (4, 4), (10, 6), (6, 5, 2)]
    params = [nn.Parameter(torch.randn(shape, generator=g)) for shape in shapes]
    alone = [nn.Parameter(p.detach().clone()) for p in params]
    together = Muon(params, lr=0.1, weight_decay=0.1, ns_dtype=torch.float32)
    one_by_one = [Muon([p], lr=0.1, weight_decay=0.1, ns_dtype=torch.float32) for p in alone]
    for _ in range(3):
        for p, q in zip(params, alone, strict=True):
            p.grad = torch.randn(p.shape, generator=g)
            q.grad = p.grad.clone()
        together.step()
        for optimizer in one_by_one:
            optimizer.step()
    for p, q in zip(params, alone, strict=True):
        assert torch.allclose(p, q, atol=1e-5)


def test_muon_moving_every_third_step_goes_three_times_as_far_by_the_same_momentum():
    gradients = torch.randn(6, 4, 7, generator=torch.Generator().manual_seed(0))
    each, third = (nn.Parameter(torch.zeros(4, 7)) for _ in range(2))
    optimizers = {
        1: Muon([each], lr=0.1, ns_dtype=torch.float32),
        3: Muon([third], lr=0.1, ns_dtype=torch.float32, every=3),
    }
    for step, gradient in enumerate(gradients, start=1):
        before = each.detach().clone(), third.detach().clone()
        each.grad, third.grad = gradient.clone(), gradient.clone()
        for optimizer in optimizers.values():
            optimizer.step()
        expected = 3 * (each.detach() - before[0]) if step % 3 == 0 else torch.zeros(4, 7)
        torch.testing.assert_close(third.detach() - before[1], expected)


def test_muon_leaves_weights_without_a_gradient_alone_and_refuses_vectors():
    weight = nn.Parameter(torch.ones(3, 3))
    Muon([weight], lr=1.0, weight_decay=0.5).step()
    assert torch.equal(weight.detach(), torch.ones(3, 3))
    with pytest.raises(ConfigError, match="shape"):
        Muon([nn.Parameter(torch.ones(3))], lr=1.0)


def test_hidden_weights_go_to_muon_and_every_other_trainable_weight_to_adamw_once():
    model = Model()
    adamw, muon = build_optimizers(model, config(weight_decay=0.1), hidden=hidden)
    names = {id(p): name for name, p in model.named_parameters()}
    decayed, plain = ({names[id(p)] for p in group["params"]} for group in adamw.param_groups)
    assert {names[id(p)] for p in muon.param_groups[0]["params"]} == {"conv.weight", "mlp.weight"}
    assert decayed == {"embed.weight", "out.weight"}
    assert plain == {"conv.bias", "mlp.bias", "out.bias"}
    assert [group["weight_decay"] for group in adamw.param_groups] == [0.1, 0.0]


def test_without_a_muon_rate_adamw_takes_all():
    (only,) = build_optimizers(Model(), config(muon_lr=None), hidden=hidden)
    assert isinstance(only, torch.optim.AdamW)


def test_learning_rates_follow_the_schedule_from_each_groups_peak():
    optimizers = build_optimizers(Model(), config(), hidden=hidden)
    set_learning_rates(optimizers, 0.25)
    set_learning_rates(optimizers, 0.5)
    assert [group["lr"] for o in optimizers for group in o.param_groups] == [5e-4, 5e-4, 0.01]


def test_a_vector_called_hidden_and_a_model_without_weights_are_refused():
    with pytest.raises(ConfigError, match=r"conv\.bias"):
        build_optimizers(Model(), config(), hidden=lambda name, p: name == "conv.bias")
    with pytest.raises(ConfigError, match="no parameters"):
        build_optimizers(nn.Identity(), config())


@pytest.mark.parametrize(
    "wrong",
    [
        {"lr": 0.0},
        {"muon_lr": -1.0},
        {"lr": math.nan},
        {"betas": (0.9, 1.0)},
        {"final_fraction": 2.0},
        {"warmup_steps": -1},
        {"grad_clip": 0.0},
        {"muon_momentum": 1.0},
    ],
)
def test_impossible_values_are_refused(wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        config(**wrong)
