import pytest
from recorded import Recording, check_case, check_size

from reelflow.families.latte_class import LATTE_CLASS
from reelflow.models.condition import Condition

STORED = Recording("latte_class")


def _call(model, inputs):
    return model(inputs["latents"], inputs["t"], Condition(label=inputs.get("label")))


@pytest.mark.parametrize("case", range(3))
def test_outputs_and_gradients_are_those_of_the_original(case):
    check_case(LATTE_CLASS, STORED, case, _call)


@pytest.mark.parametrize("size", LATTE_CLASS.sizes)
def test_a_published_size_has_the_tensors_of_the_original(size):
    check_size(LATTE_CLASS, STORED, size, stored=(16 + 16 * 16) * 1152)  # both tables of positions
