from dataclasses import replace

import pytest

from reelflow.config import set_values
from reelflow.data.folder import ClipSpec
from reelflow.models.blocks import Dual
from reelflow.models.vae import Stage as Level
from reelflow.models.vae import staged
from reelflow.planning.rates import Rates
from reelflow.recipes.forecast import changes, forecast, machine_bytes, step_of, trained_stage
from reelflow.recipes.recipe import Recipe
from reelflow.recipes.world import world

PROCESS = 300 * 2**20


def tiny() -> Recipe:
    base = world()
    model = staged(
        latent_channels=4,
        patch=4,
        resample_kernel=1,
        encoder=(Level(16, 0, space=2, time=4),),
        decoder=(Level(16, 0, space=2, time=4),),
    )
    dit = replace(base.dit.model, in_channels=4, dim=32, num_heads=2, rope=(4, 6, 6), layers=(Dual(),))
    return replace(
        base,
        clip=ClipSpec(num_frames=9, height=128, width=128, fps=8.0),
        vae=replace(base.vae, model=model),
        dit=replace(base.dit, model=dit, training=replace(base.dit.training, precision="fp32", batch_size=4)),
    )


@pytest.fixture(scope="module")
def rates():
    return Rates(0.0, lambda kernel: 1e-9 * kernel.nbytes)


@pytest.fixture(scope="module")
def found(rates):
    return forecast(tiny(), rates, PROCESS)


def test_every_stage_of_a_run_is_told(found):
    recipe = tiny()
    assert [(stage.name, stage.count) for stage in found.stages] == [
        ("autoencoder", recipe.vae.training.steps),
        ("latents", recipe.data.num_clips + recipe.data.num_validation),
        ("transformer", recipe.dit.training.steps),
        ("samples", 1),
    ]
    assert found.seconds == sum(stage.count * stage.seconds_each for stage in found.stages)
    assert all(stage.peak > PROCESS for stage in found.stages)


def test_a_pretrained_autoencoder_is_not_trained(rates):
    recipe = set_values(tiny(), ["vae.pretrained=elsewhere"])
    assert [stage.name for stage in forecast(recipe, rates, PROCESS).stages] == ["latents", "transformer", "samples"]


def test_muon_remembers_one_copy_of_what_it_moves():
    base = tiny()
    adamw = set_values(base, ["dit.training.optimizer.muon_lr=null"])
    muon, plain = (step_of(recipe, "transformer") for recipe in (base, adamw))
    # The last block's context is read by nobody, so that some weights have no gradient and nothing to remember.
    assert 1.5 * plain.weights < plain.states < 2 * plain.weights
    assert 0.75 * plain.weights < muon.states < 0.9 * plain.states


@pytest.mark.slow
def test_what_does_not_fit_is_told_what_would_the_fastest_first(rates):
    recipe = tiny()
    stage = trained_stage(recipe, "transformer", rates, PROCESS)
    memory = round(PROCESS + 0.9 * (stage.peak - PROCESS))
    found = changes(recipe, "transformer", memory, rates, PROCESS)
    assert len(found) > 2
    assert [change.seconds for change in found] == sorted(change.seconds for change in found)
    assert all(change.peak <= memory for change in found)
    assignments = [change.text.split() for change in found if "torchrun" not in change.text]
    assert assignments
    for each in assignments:
        changed = set_values(recipe, each)
        samples = [r.dit.training.batch_size * r.dit.training.accumulate for r in (recipe, changed)]
        assert samples[0] == samples[1]
        assert trained_stage(changed, "transformer", rates, PROCESS).peak <= memory


def test_nothing_makes_a_run_fit_into_less_than_the_process(rates):
    assert changes(tiny(), "transformer", PROCESS // 2, rates, PROCESS) == []


def test_this_machine_has_memory():
    assert 2**28 < machine_bytes() < 2**50
