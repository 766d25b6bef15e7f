"""With REELFLOW_PARITY set to a path, what the tests of the families measured becomes a page there (`make parity`)."""

import os
from collections.abc import Iterator
from pathlib import Path

import diffusers
import pytest
import torch
from parity import BOUND32, BOUND64, MEASURED, Errors

from reelflow.families.family import Family
from reelflow.families.published import FAMILIES

HEAD = """\
# Parity: published transformers against their reference

Made by `make parity`; not written by hand. Errors are max |ours - reference| / rms(reference), the worst over random
configurations with random weights, of the output and of the gradients with respect to inputs and every parameter.
Bounds: {bound64:g} in float64, against the reference with its float32 islands computed in float64; in float32
{bound32:g}, or three times the *floor*, which is what the reference itself loses against float64. diffusers {diffusers},
torch {torch}.

| family | reference | drawn | output, float64 | gradients, float64 | output, float32 (floor) | gradients, float32 (floor) |
|---|---|---|---|---|---|---|
{rows}

Parameters, and names and shapes of every tensor, are those of the published checkpoints (a test of each size on the meta device):

| size | parameters | published |
|---|---|---|
{sizes}

## Where references disagree, and what we chose

{notes}
"""


@pytest.fixture(scope="session", autouse=True)
def ledger() -> Iterator[None]:
    yield
    if path := os.environ.get("REELFLOW_PARITY"):
        Path(path).write_text(page())


def page() -> str:
    measured = [(family, MEASURED[family.name]) for family in FAMILIES if family.name in MEASURED]
    sizes = [(f"{family.name}.{name}", size) for family in FAMILIES for name, size in family.sizes.items()]
    return HEAD.format(
        bound64=BOUND64,
        bound32=BOUND32,
        diffusers=diffusers.__version__,
        torch=torch.__version__.partition("+")[0],
        rows="\n".join(_row(family, errors) for family, errors in measured),
        sizes="\n".join(
            f"| {name} | {size.parameters:,} | {f'{size.parameters:,}' if size.repository else 'not public'} |"
            for name, size in sizes
        ),
        notes="\n".join(f"* {family.name}: {note}" for family in FAMILIES for note in family.notes),
    )


def _row(family: Family, errors: list[Errors]) -> str:
    def worst(name: str) -> str:
        return f"{max(getattr(each, name) for each in errors):.1e}"

    cells = (
        *(family.name, family.class_name, str(len(errors)), worst("forward64"), worst("gradient64")),
        *(f"{worst(f'{part}32')} ({worst(f'{part}_floor')})" for part in ("forward", "gradient")),
    )
    return f"| {' | '.join(cells)} |"
