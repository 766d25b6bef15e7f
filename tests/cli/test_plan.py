import pytest

from reelflow.cli.plan import Costs
from reelflow.config import set_values
from reelflow.recipes.world import world
from reelflow.training.meters import duration


@pytest.fixture(autouse=True)
def peak(monkeypatch):
    """This machine does 1 TFLOP/s."""
    monkeypatch.setattr("reelflow.training.meters.measure_peak_flops", lambda dtype, device: 1e12)


def test_time_is_operations_over_a_share_of_the_measured_peak(reelflow):
    costs, steps = Costs.of(world()), world().dit.training.steps
    out = reelflow("plan", "world", "--share", 0.5)[1]
    assert duration(steps * costs.dit_step / 0.5e12) in out
    assert "1,000 GFLOP/s" in out


def test_a_plan_names_parameters_tokens_operations_bytes_and_the_formula(reelflow):
    status, out, _ = reelflow("plan", "world")
    costs = Costs.of(world())
    assert status == 0
    for text in (
        f"{costs.vae.num_parameters:,}",
        f"{costs.dit.num_parameters:,}",
        "80 tokens",
        "4 (N + L)^2 D",
        "GFLOP/s",
        "MiB",
    ):
        assert text in out


def test_the_size_of_a_clip_can_be_asked_for(reelflow):
    assert "320 tokens" in reelflow("plan", "world", "--height", 128, "--width", 128)[1]
    assert "144 tokens" in reelflow("plan", "world", "--frames", 33)[1]


@pytest.mark.parametrize(
    ("assignment", "factor"),
    [("sampling.num_steps=48", 2), ("sampling.sampler=heun", 2), ("sampling.guidance_scale=1", 0.5)],
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
    [(["--frames", "18"], "nearest: 17 or 21"), (["--height", "65"], "nearest: 64"), (["--share", "0"], "--share")],
)
def test_what_cannot_be_is_refused(reelflow, arguments, message):
    status, _, err = reelflow("plan", "world", *arguments)
    assert status == 2
    assert message in err
