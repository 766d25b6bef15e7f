from dataclasses import replace

import pytest
import torch
from torch import nn

from reelflow.models.blocks import Single
from reelflow.models.context import Layers
from reelflow.models.dit import DiTConfig, VideoDiT
from reelflow.parallel.recompute import recompute_blocks
from reelflow.planning.cost import dit_cost, num_parameters
from reelflow.planning.memory import example
from reelflow.planning.rates import flops
from reelflow.planning.step import Batch, run_deep, run_once, shaped, train_step, transformer, transformer_step

DIT = DiTConfig(in_channels=4, dim=48, num_heads=2, layers=4 * (Single(),), rope=(8, 8, 8), context=Layers(12))
SHAPE, WORDS = (3, 8, 4), 7


def adamw(model):
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    average = [p.detach().clone() for p in model.parameters()]

    def move():
        optimizer.step()
        torch._foreach_lerp_(average, list(model.parameters()), 0.1)

    return move


def of(config=DIT, **arguments):
    return transformer_step(config, SHAPE, WORDS, adamw, **{"batch": 2, **arguments})


@pytest.fixture(scope="module")
def step():
    return of()


def test_adamw_holds_five_copies_of_the_weights(step):
    weights = 4 * num_parameters(VideoDiT(DIT))
    assert step.weights == step.average == step.gradients == weights
    assert step.states == pytest.approx(2 * weights, rel=0.01)
    assert step.activations > step.gradients


def test_a_deep_network_takes_what_walking_all_of_it_says(step):
    whole = train_step(transformer(DIT, SHAPE, WORDS, batch=2), adamw)
    for name in ("weights", "average", "states", "gradients", "activations", "num_calls"):
        assert getattr(step, name) == pytest.approx(getattr(whole, name), rel=0.01)
    assert step.peak == pytest.approx(whole.peak, rel=0.05)
    assert step.passes == pytest.approx(whole.passes)
    assert step.moves == whole.moves


def test_operations_have_the_flops_of_the_formula(step):
    found = sum(count * flops(kernel) for kernel, count in step.passes.items())
    cost = dit_cost(DIT, SHAPE, WORDS)
    # Attention on a CPU computes its scores a second time; inputs of the network need no gradients.
    expected = 2 * (3 * cost.matrix_flops + 3.5 * cost.attention_flops)
    assert found == pytest.approx(expected, rel=0.03)


def work(step):
    return sum(count * flops(kernel) for kernel, count in step.passes.items())


def test_what_is_computed_again_is_not_held(step):
    again = of(prepare=lambda model: recompute_blocks(model.blocks, "blocks"))
    assert again.activations - again.gradients < 0.5 * (step.activations - step.gradients)
    assert 1.2 < work(again) / work(step) < 4 / 3


def test_batches_one_after_the_other_do_as_much_and_hold_gradients_beside_one(step):
    one, parts = of(batch=1), of(batch=1, accumulate=2)
    assert one.activations < parts.activations <= one.activations + one.gradients
    assert work(parts) == pytest.approx(work(step), rel=0.01)


def test_bfloat16_holds_less_and_moves_float32(step):
    half = of(precision="bf16")
    assert half.activations < step.activations
    assert half.weights == step.weights
    assert half.moves == step.moves


def test_a_checkpoint_is_a_copy_beside_what_is_held(step):
    held = step.weights + step.average + step.states
    assert step.run_peak(checkpoints=True) == step.peak + held
    large = replace(step, states=10 * step.peak)
    assert large.run_peak(checkpoints=False) == 2 * (step.weights + step.average + large.states) + step.holes


def test_batches_of_two_kinds_hold_what_the_larger_does_and_take_the_mean_of_their_times():
    def of_rows(*rows):
        def build():
            model = nn.Linear(16, 16)
            return model, [Batch(lambda n=n: model(torch.ones(n, 16)).relu().mean(), share) for n, share in rows]

        return train_step(build, adamw)

    few, many, both = of_rows((8, 1.0)), of_rows((800, 1.0)), of_rows((8, 0.75), (800, 0.25))
    assert few.activations < both.activations == many.activations
    assert work(both) == pytest.approx(0.75 * work(few) + 0.25 * work(many))


def test_what_needs_no_gradients_is_continued_to_the_whole_depth():
    def run(config):
        VideoDiT(config)(*example(config, SHAPE, WORDS))

    deep, whole = run_deep(DIT, run), run_once(lambda: run(DIT))
    assert deep.kernels == whole.kernels
    assert deep.num_calls == whole.num_calls
    assert deep.peak == pytest.approx(whole.peak, rel=0.03)


def test_a_module_that_changes_its_weights_while_it_is_built_can_be_walked():
    def build():
        model = shaped(lambda: nn.Conv3d(4, 4, 3).to(memory_format=torch.channels_last_3d))
        return model, [Batch(lambda: model(torch.ones(1, 4, 5, 5, 5)).mean())]

    step = train_step(build, adamw)
    assert step.weights == 4 * (4 * 4 * 27 + 4)
