"""Compare a family with what its original repository computed in float64, as recorded by `make_fixtures`.

Errors and bounds are as in `parity`, but in float32 ours are against theirs in float64 too.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from parity import Errors, Result, as_ours, compare, hold
from safetensors import safe_open
from torch import Tensor

from reelflow.families.family import Family
from reelflow.interop.checkpoints import gradients_as_theirs, state_as_theirs
from reelflow.interop.mapping import differences
from reelflow.models.dit import VideoDiT

FIXTURES = Path(__file__).parent / "fixtures"
Call = Callable[[VideoDiT, Mapping[str, Tensor]], Tensor]


class Recording:
    """A fixture; `cases` are the arguments of its networks."""

    def __init__(self, name: str) -> None:
        with safe_open(FIXTURES / f"{name}.safetensors", framework="pt") as file:
            notes = {key: json.loads(value) for key, value in file.metadata().items()}
            self.tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        self.cases: list[dict[str, Any]] = notes["cases"]
        self.floors: list[tuple[float, float]] = notes["floors"]  # of output and gradients, in float32
        self.published: dict[str, dict[str, Any]] = notes["published"]

    def part(self, case: int, kind: str) -> dict[str, Tensor]:
        prefix = f"{case}.{kind} "
        return {key.removeprefix(prefix): x for key, x in self.tensors.items() if key.startswith(prefix)}


def check_case(family: Family, recording: Recording, case: int, call: Call, *, sign: int = 1) -> Errors:
    """Hold the bounds for the output and for every gradient; `sign` is -1 where theirs leads away from data.

    Weights must survive the way back.
    """
    gradients = recording.part(case, "gradient")
    theirs = sign * recording.tensors[f"{case}.output"], {name: sign * x for name, x in gradients.items()}
    narrow, wide = (_walk(family, recording, case, call, dtype) for dtype in (torch.float32, torch.float64))
    (forward32, gradient32), (forward64, gradient64) = compare(narrow, theirs), compare(wide, theirs)
    floor, gradient_floor = recording.floors[case]
    errors = Errors(forward32, floor, gradient32, gradient_floor, forward64, gradient64)
    hold(family, errors)
    return errors


def _walk(family: Family, recording: Recording, case: int, call: Call, dtype: torch.dtype) -> Result:
    stored = recording.part(case, "weight")
    model = as_ours(family, recording.cases[case], stored, dtype)
    rows = family.weights(model.config)
    exported = state_as_theirs(model, rows)
    for name, value in stored.items():
        assert torch.allclose(exported[name].double(), value.double(), rtol=0, atol=1e-6), name
    inputs = {name: x.to(dtype) if x.is_floating_point() else x for name, x in recording.part(case, "input").items()}
    learned = [name.removeprefix("input ") for name in recording.part(case, "gradient") if name.startswith("input ")]
    for name in learned:
        inputs[name].requires_grad_()
    out = call(model, inputs)
    (out * recording.tensors[f"{case}.projection"].to(dtype)).sum().backward()
    return out.detach(), gradients_as_theirs(model, rows) | {f"input {name}": inputs[name].grad for name in learned}


def check_size(family: Family, recording: Recording, size: str, *, stored: int = 0) -> None:
    """Hold a size to the published tensors, and to its count, which has no values that are `stored` but not learned."""
    config, published = family.sizes[size].config, recording.published[size]
    assert family.read(published["arguments"]) == config
    with torch.device("meta"):
        model = VideoDiT(config)
    shapes = {
        name.replace("*", str(i)): shape for name, (shape, count) in published["shapes"].items() for i in range(count)
    }
    assert differences(family.weights(config), model, shapes) == ""
    assert sum(p.numel() for p in model.parameters()) == family.sizes[size].parameters
    assert family.sizes[size].parameters == published["parameters"] - stored
