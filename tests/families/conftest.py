"""With REELFLOW_PARITY set to a path, what the tests of the families measured becomes a page there (`make parity`)."""

import math
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import coders
import diffusers
import pipelines
import pytest
import torch
from hypothesis import settings
from parity import BOUND32, BOUND64, MEASURED, Errors

from reelflow.families.autoencoders import AUTOENCODERS
from reelflow.families.published import FAMILIES

# The suite draws the same configurations each time; `make parity` draws others.
settings.register_profile("same draws", derandomize="REELFLOW_EXAMPLES" not in os.environ)
settings.load_profile("same draws")

HEAD = """\
# Parity: published networks and systems against their reference

Made by `make parity`; not written by hand. Errors are max |ours - reference| / rms(reference), the worst over random
configurations with random weights, of the output and of the gradients with respect to inputs and every parameter.
Bounds: {bound64:g} in float64, against the reference with its float32 islands computed in float64; in float32
{bound32:g}, or three times the *floor*, which is what the reference itself loses against float64. In float32 the gradients'
error is the root mean square of all, not the maximum. diffusers {diffusers}, torch {torch}.

## Transformers

| family | reference | drawn | output, float64 | gradients, float64 | output, float32 (floor) | gradients, float32 (floor) |
|---|---|---|---|---|---|---|
{rows}

## Autoencoders

Of the posterior's mean and log-variance, a draw, and a decoded clip. In float32 the bound of the gradients is {bound_coder:g}.

| family | reference | drawn | output, float64 | gradients, float64 | output, float32 (floor) | gradients, float32 (floor) |
|---|---|---|---|---|---|---|
{coders}

## Pipelines

Whole systems on tiny random networks: the same prompts, noise and steps; in float32. The bound is {bound_pipeline:g}, or
three times the floor.

| pipeline | runs | latents | frames |
|---|---|---|---|
{pipelines}

## Parameters

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
    families = (*FAMILIES, *AUTOENCODERS)
    sizes = [(f"{family.name}.{name}", size) for family in families for name, size in family.sizes.items()]
    return HEAD.format(
        bound64=BOUND64,
        bound_coder=5 * BOUND32,
        bound32=BOUND32,
        diffusers=diffusers.__version__,
        torch=torch.__version__.partition("+")[0],
        rows=_rows(FAMILIES, MEASURED),
        coders=_rows(AUTOENCODERS, coders.MEASURED),
        bound_pipeline=pipelines.BOUND,
        pipelines="\n".join(
            f"| {name} | {len(errors)} | {max(e[0] for e in errors):.1e} | {_frames([e[1] for e in errors])} |"
            for name, errors in sorted(pipelines.MEASURED.items())
        ),
        sizes="\n".join(
            f"| {name} | {size.parameters:,} | {f'{size.parameters:,}' if size.repository else 'not public'} |"
            for name, size in sizes
        ),
        notes="\n".join(f"* {family.name}: {note}" for family in families for note in family.notes),
    )


def _frames(errors: list[float]) -> str:
    return "not made" if math.isnan(errors[0]) else f"{max(errors):.1e}"


def _rows(families: Iterable[Any], measured: dict[str, list[Errors]]) -> str:
    return "\n".join(_row(family, measured[family.name]) for family in families if family.name in measured)


def _row(family: Any, errors: list[Errors]) -> str:
    def worst(name: str) -> str:
        return f"{max(getattr(each, name) for each in errors):.1e}"

    cells = (
        *(family.name, family.class_name, str(len(errors)), worst("forward64"), worst("gradient64")),
        *(f"{worst(f'{part}32')} ({worst(f'{part}_floor')})" for part in ("forward", "gradient")),
    )
    return f"| {' | '.join(cells)} |"
