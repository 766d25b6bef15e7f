import pytest
import torch
from recorded import Recording, check_case, check_size

from reelflow.families.opensora import OPENSORA
from reelflow.models.condition import Condition

STORED = Recording("opensora")


def _call(model, inputs):
    made = inputs["frames"]  # the others are given: their t is 1, and what comes out there is read by nobody
    t = torch.where(made, inputs["t"][:, None], 1.0)
    condition = Condition(context=inputs["context"], context_mask=inputs["mask"], numbers=inputs["fps"][:, None])
    return model(inputs["latents"], t, condition) * made[:, None, :, None, None]


@pytest.mark.parametrize("case", range(3))
def test_outputs_and_gradients_are_those_of_the_original(case):
    check_case(OPENSORA, STORED, case, _call)


@pytest.mark.parametrize("size", ["v1_2", "v1_2_3b"])
def test_a_published_size_has_the_tensors_of_the_original(size):
    check_size(OPENSORA, STORED, size, stored=36)  # the rotary frequencies
