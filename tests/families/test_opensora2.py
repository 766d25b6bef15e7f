import pytest
from recorded import Recording, check_case, check_size

from reelflow.families.opensora2 import OPENSORA2
from reelflow.models.condition import Condition

STORED = Recording("opensora2")


def _call(model, inputs):
    guidance = inputs.get("guidance")
    condition = Condition(
        context=inputs["context"],
        vector=inputs["vector"],
        channels=inputs.get("given"),
        numbers=None if guidance is None else guidance[:, None],
    )
    return model(inputs["latents"], inputs["t"], condition)


@pytest.mark.parametrize("case", range(2))
def test_outputs_and_gradients_are_those_of_the_original(case):
    check_case(OPENSORA2, STORED, case, _call, sign=-1)


@pytest.mark.parametrize("size", OPENSORA2.sizes)
def test_a_published_size_has_the_tensors_of_the_original(size):
    check_size(OPENSORA2, STORED, size)
