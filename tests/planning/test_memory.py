import gc
from dataclasses import replace

import pytest
import torch

from reelflow.models.blocks import Attend, Branches, Cross, Dual, FeedForward, Single
from reelflow.models.context import Layers
from reelflow.models.dit import DiTConfig, VideoDiT
from reelflow.models.weighing import Weighing
from reelflow.nn.patterns import Space, Time
from reelflow.planning.memory import _peaks, dit_memory, example, repeats

PAIR = (
    Branches((Attend(Space()), Cross(), FeedForward())),
    Branches((Attend(Time()), FeedForward())),
)
DIT = DiTConfig(
    in_channels=4, dim=48, num_heads=2, layers=(), rope=(8, 8, 8), context=Layers(12), vector_dim=6, context_width=48
)
SHAPE = (3, 8, 4)
STACKS = {
    "dual and single": 3 * (Dual(),) + 4 * (Single(),),
    "alternating": 4 * PAIR,
    "one": (Dual(),),
}


@pytest.mark.parametrize("stack", STACKS)
def test_a_deep_stack_weighs_what_walking_all_of_it_says(stack):
    config = replace(DIT, layers=STACKS[stack])
    memory = dit_memory(config, SHAPE, 7, dtype=torch.float32)
    whole = _peaks(config, SHAPE, 7, 0, 1, torch.float32)
    assert memory.inference == whole[0]
    assert memory.training == pytest.approx(whole[1], rel=0.01)


def test_shapes_without_data_weigh_what_tensors_weigh():
    config = replace(DIT, layers=STACKS["dual and single"])
    model, inputs = VideoDiT(config), example(config, SHAPE, 7)
    gc.collect()
    with torch.no_grad(), Weighing() as weighing:
        model(*inputs)
    assert dit_memory(config, SHAPE, 7, dtype=torch.float32).inference == weighing.peak


def test_weights_and_caches_follow_from_the_configuration():
    config = replace(DIT, layers=STACKS["alternating"])
    memory = dit_memory(config, SHAPE, 7, batch=2)
    assert memory.weights == 2 * sum(p.numel() for p in VideoDiT(config).parameters())
    assert (
        memory.keys_values == 2 * 8 * 2 * (3 * 4 * 2) * 48 * 2
    )  # keys and values, layers, clips, tokens, width, bytes


@pytest.mark.parametrize(
    ("layers", "runs"), [("aaab", ["a3", "b1"]), ("ababab", ["ab3"]), ("abc", ["a1", "b1", "c1"]), ("", [])]
)
def test_a_list_is_cut_into_what_repeats(layers, runs):
    known = {"a": Dual(), "b": Single(), "c": PAIR[0]}
    names = {layer: letter for letter, layer in known.items()}
    found = repeats([known[letter] for letter in layers])
    assert ["".join(names[layer] for layer in unit) + str(count) for unit, count in found] == runs
