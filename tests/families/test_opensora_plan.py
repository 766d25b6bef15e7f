import pytest
from recorded import Recording, check_case, check_size

from reelflow.families.opensora_plan import OPENSORA_PLAN, OPENSORA_PLAN_GIVEN
from reelflow.models.condition import Condition

STORED = Recording("opensora_plan")


def _call(model, inputs):
    condition = Condition(context=inputs["context"], context_mask=inputs["mask"], channels=inputs.get("given"))
    return model(inputs["latents"], inputs["t"], condition)


@pytest.mark.parametrize(
    ("family", "case"),
    [(OPENSORA_PLAN, 0), (OPENSORA_PLAN, 1), (OPENSORA_PLAN_GIVEN, 2)],
    ids=["skip", "scaled", "given"],
)
def test_outputs_and_gradients_are_those_of_the_original(family, case):
    check_case(family, STORED, case, _call)


@pytest.mark.parametrize(
    ("family", "size"), [(OPENSORA_PLAN, "t2v_v1_3"), (OPENSORA_PLAN_GIVEN, "i2v_v1_3")], ids=["t2v", "i2v"]
)
def test_a_published_size_has_the_tensors_of_the_original(family, size):
    check_size(family, STORED, size)
