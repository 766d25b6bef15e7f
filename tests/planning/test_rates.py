import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from reelflow.planning import rates
from reelflow.planning.rates import Rates, flops, time_kernel
from reelflow.planning.walk import Walk


def kernels_of(run):
    with FakeTensorMode(), Walk() as walk:
        run()
    return walk.kernels


def attention():
    x = torch.ones(1, 2, 64, 8, requires_grad=True)
    F.scaled_dot_product_attention(x, x, x).sum().backward()


def convolution():
    nn.Conv3d(3, 4, 3)(torch.ones(1, 3, 4, 40, 5)).sum().backward()


def moves():
    layer = nn.Linear(64, 8)
    for weight in layer.parameters():
        weight.grad = torch.ones_like(weight)
    torch.optim.AdamW(layer.parameters(), fused=True).step()


RUNS = {
    "products": lambda: nn.Linear(8, 6)(torch.ones(64, 8, requires_grad=True)).sum().backward(),
    "attention": attention,
    "convolution": convolution,
    "moves": moves,
    "norm": lambda: (
        nn.LayerNorm(8)(torch.ones(64, 8, requires_grad=True).expand(3, 64, 8).transpose(0, 1)).sum().backward()
    ),
}


@pytest.mark.parametrize("run", RUNS.values(), ids=RUNS)
def test_every_operation_can_be_timed_alone_and_cut(run, monkeypatch):
    monkeypatch.setattr(rates, "SECONDS", 0.0)
    kernels = kernels_of(run)
    assert kernels
    for kernel in kernels:
        for largest in (2e9, max(flops(kernel), 8 * kernel.nbytes) / 2):
            monkeypatch.setattr(rates, "LARGEST", largest)
            assert time_kernel(kernel) > 0


def test_a_cut_product_is_half_the_work_and_a_cut_attention_a_quarter():
    (product,) = (
        kernels_of(lambda: torch.ones(64, 8) @ torch.ones(8, 6).clone()).keys()
        - kernels_of(lambda: (torch.ones(64, 8), torch.ones(8, 6).clone())).keys()
    )
    assert flops(product) == 2 * 64 * 8 * 6 == 2 * flops(rates._cut(product))
    found = [kernel for kernel in kernels_of(attention) if flops(kernel)]
    assert [flops(kernel) for kernel in found] == [4 * 2 * 64 * 64 * 8, 10 * 2 * 64 * 64 * 8]
    assert [flops(kernel) / flops(rates._cut(kernel)) for kernel in found] == [4, 4]


def test_a_step_is_a_sum_and_each_operation_is_timed_once():
    asked = []

    def one(kernel):
        asked.append(kernel)
        return 2.0

    measured = Rates(0.5, one)
    kernels = kernels_of(RUNS["products"])
    total = sum(kernels.values())
    assert measured.seconds(kernels, num_calls=10) == 2 * total + 5
    assert measured.seconds({kernel: 3 * count for kernel, count in kernels.items()}) == 6 * total
    assert len(asked) == len(kernels)


def test_what_a_call_costs_is_what_a_step_takes_beyond_its_operations(monkeypatch):
    seconds = iter(range(0, 1000, 7))
    monkeypatch.setattr(rates, "clock", lambda: float(next(seconds)))
    monkeypatch.setattr(rates, "time_kernel", lambda kernel: 1.0)
    kernels = dict.fromkeys(kernels_of(RUNS["products"]), 1.0)
    found = Rates.measure(lambda: None, kernels, num_calls=4)
    assert found.call_seconds == pytest.approx(max(0, 7 - len(kernels)) / 4)
