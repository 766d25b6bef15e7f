from functools import lru_cache
from pathlib import Path

import pytest

from reelflow.cli.plan import Costs, founding_tables, model_table
from reelflow.config import set_values
from reelflow.families.vdit import founding_models
from reelflow.planning.cost import dit_cost
from reelflow.planning.step import Step
from reelflow.recipes import forecast, rehearsal
from reelflow.recipes.forecast import Change, Forecast, Stage
from reelflow.recipes.world import world
from reelflow.training.meters import duration

ONCE = lru_cache(dit_cost)  # building twenty networks without weights takes a second


@pytest.fixture(autouse=True)
def peak(monkeypatch):
    """This machine does 1 TFLOP/s, and counts a network once."""
    monkeypatch.setattr("reelflow.training.meters.measure_peak_flops", lambda dtype, device: 1e12)
    for module in ("reelflow.planning.cost", "reelflow.training.flow"):
        monkeypatch.setattr(f"{module}.dit_cost", ONCE)


def test_time_is_operations_over_a_share_of_the_measured_peak(reelflow):
    costs, steps = Costs.of(world()), world().dit.training.steps
    out = reelflow("plan", "world", "--share", 0.5)[1]
    assert duration(steps * costs.dit_step / 0.5e12) in out
    assert "1,000 GFLOP/s" in out


def test_a_plan_names_parameters_tokens_operations_bytes_and_the_formula(reelflow):
    status, out, _ = reelflow("plan", "world", "--share", 0.3)
    costs = Costs.of(world())
    assert status == 0
    for text in (
        f"{costs.vae.num_parameters:,}",
        f"{costs.dit.num_parameters:,}",
        "80 tokens",
        "4 D per pair",
        "GFLOP/s",
        "MiB",
    ):
        assert text in out


def test_the_size_of_a_clip_can_be_asked_for(reelflow):
    assert "320 tokens" in reelflow("plan", "world", "--share", 1, "--height", 128, "--width", 128)[1]
    assert "144 tokens" in reelflow("plan", "world", "--share", 1, "--frames", 33)[1]


@pytest.mark.parametrize(
    ("assignment", "factor"),
    [("sampling.num_steps=32", 2), ('sampling.sampler={"kind": "heun"}', 31 / 16), ("sampling.guidance_scale=1", 0.5)],
)
def test_the_cost_of_a_clip_counts_every_evaluation(assignment, factor):
    base, other = Costs.of(world()), Costs.of(set_values(world(), [assignment]))
    decode = base.vae.decode_flops
    assert other.clip - decode == pytest.approx(factor * (base.clip - decode))


def test_a_step_costs_three_forwards_of_every_sample():
    recipe = set_values(world(), ["dit.training.accumulate=2"])
    assert Costs.of(recipe).dit_step == 3 * Costs.of(recipe).dit.flops * 2 * recipe.dit.training.batch_size


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--frames", "18"], "nearest: 17 or 21"),
        (["--height", "65"], "nearest: 64"),
        (["--share", "0"], "--share"),
        (["--price", "-1"], "--price"),
        (["--memory", "lots"], "lots"),
    ],
)
def test_what_cannot_be_is_refused(reelflow, arguments, message):
    status, _, err = reelflow("plan", "world", *arguments)
    assert status == 2
    assert message in err


@pytest.fixture
def told(monkeypatch):
    """What is measured and walked for long in a plan, made up: a step of an hour that takes 3 GiB."""
    step = Step(*(2**28,) * 8, passes={}, moves={}, num_calls=0)
    stages = (
        Stage("latents", "clip", 1000, 0.36, 2**30, files=5 * 2**29),
        Stage("transformer", "step", 10, 3600.0, 3 * 2**30, step=step),
        Stage("transformer", "validation", 1, 0.0, 2 * 2**30, files=2**30),
        Stage("sample", "clip", 1, 2.0, 2**30, apart=True),
    )
    changes = [Change("transformer", "dit.training.batch_size=8", 2**31, 36_360.0)]
    for module, name, value in (
        (rehearsal, "measured_rates", lambda precision: None),
        (rehearsal, "process_bytes", lambda precision: 2**28),
        (rehearsal, "measured_media", lambda recipe: None),
        (forecast, "forecast", lambda recipe, rates, process, media: Forecast(stages, process)),
        (forecast, "changes", lambda *_: changes),
    ):
        monkeypatch.setattr(module, name, value)


def test_a_plan_tells_time_money_and_memory_stage_by_stage(reelflow, told):
    status, out, _ = reelflow("plan", "world", "--price", 2, "--memory", "4GiB")
    assert status == 0
    assert (
        "in all 10:06:02, 20.20 at 2 an hour; at most 4 GiB, in transformer's validation: 256 MiB the process, 1.75 GiB its "
        "tensors, 1 GiB kept of earlier stages, 1 GiB mapped files" in out
    )
    (row,) = (line for line in out.splitlines() if "10 steps" in line)
    cells = ["3,600,000 ms", "0", "10:00:00", "20.00", "3,072 MiB", "3,072 MiB"]
    assert [cell.strip() for cell in row.split("│")[3:9]] == cells
    assert "does not fit" not in out


def test_a_folder_that_is_not_there_is_told_how_many_clips_it_is_taken_to_have(reelflow, told):
    assert "videos is not there, so 1,000 clips are assumed" in reelflow("plan", "folder", "--memory", "4GiB")[1]


def test_a_plan_that_does_not_fit_says_what_would(reelflow, told):
    out = reelflow("plan", "world", "--memory", "2.5GiB")[1]
    assert "transformer does not fit into 2.5 GiB: it takes 3 GiB" in out
    assert "fits with dit.training.batch_size=8: 2 GiB, 10:06:00 (+1%)" in out


def test_only_a_recipe_has_a_price(reelflow):
    status, _, err = reelflow("plan", "vdit", "--price", 1)
    assert status == 2
    assert "--price is about a recipe" in err


def test_vdit_lists_every_founding_model_and_a_size_is_one_of_its_rows(reelflow):
    listed, one = reelflow("plan", "vdit")[1], reelflow("plan", "vdit-mm-xl")[1]
    rows = [line for line in listed.splitlines() if line.startswith("| vdit")]
    assert [row.split()[1] for row in rows] == list(founding_models())
    assert [line for line in one.splitlines() if line.startswith("| vdit")] == rows[-1:]


def test_a_founding_model_is_planned_for_any_clip_and_with_values_set(reelflow):
    assert "46,800 + 0" in reelflow("plan", "vdit-small", "--frames", 49, "--height", 720, "--width", 1280)[1]
    assert "1,280 + 512" in reelflow("plan", "vdit-text-small", "--set", "context_tokens=512")[1]


def test_a_listing_says_which_models_a_clip_does_not_fit(reelflow):
    status, out, _ = reelflow("plan", "vdit", "--frames", 21)
    assert status == 0
    assert out.count("patch (4), got 21; nearest: 20 or 24") == 4
    assert out.count("GiB") == 16


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["vdit-xll"], "did you mean vdit-xl"),
        (["vdit-xl", "--frames", "16"], "nearest: 13 or 17"),
        (["vdit-xl", "--height", "1080"], "multiple of 16 (autoencoder 8 x patch 2), got 1080; nearest: 1072 or 1088"),
        (["vdit", "--height", "0"], "got 0; nearest: 16"),
        (["vdit-small", "--set", "dit.dims=3"], "did you mean dim"),
        ([], "reelflow plan vdit"),
        (["vdit", "--founding"], "nothing beside it"),
    ],
)
def test_what_no_founding_model_can_be_is_refused(reelflow, arguments, message):
    status, _, err = reelflow("plan", *arguments)
    assert status == 2
    assert message in err


def test_the_page_shows_the_tables_that_the_commands_print(reelflow):
    page = (Path(__file__).parents[2] / "docs" / "founding-models.md").read_text()
    assert model_table(founding_models()) in page
    assert founding_tables() in page
    assert founding_tables() in reelflow("plan", "--founding")[1]
