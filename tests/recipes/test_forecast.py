from dataclasses import replace

import pytest

from reelflow.config import set_values
from reelflow.data.folder import ClipSpec
from reelflow.models.blocks import Dual
from reelflow.models.vae import Stage as Level
from reelflow.models.vae import staged
from reelflow.planning.rates import Rates
from reelflow.recipes.forecast import Forecast, Media, Stage, changes, forecast, step_of, trained_stage
from reelflow.recipes.recipe import Recipe
from reelflow.recipes.world import world

PROCESS = 300 * 2**20
MEDIA = Media(664, 0.01, PROCESS, 0.01, PROCESS, kept=2**20)


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
    return forecast(tiny(), rates, PROCESS, MEDIA)


def test_every_stage_of_a_run_is_told(found):
    recipe = tiny()
    clips = recipe.data.num_clips + recipe.data.num_validation
    assert [(stage.name, stage.unit, stage.count) for stage in found.stages] == [
        ("render", "clip", clips),
        ("decode", "clip", clips),
        ("autoencoder", "step", recipe.vae.training.steps),
        ("autoencoder", "validation", 2),
        ("autoencoder", "preview", 1),
        ("latents", "clip", clips),
        ("transformer", "step", recipe.dit.training.steps),
        ("transformer", "validation", 2),
        ("transformer", "preview", 1),
        ("sample", "clip", 1),
    ]
    assert found.seconds == sum(stage.count * stage.seconds_each for stage in found.stages)
    assert all(stage.peak >= PROCESS for stage in found.stages)


def test_clips_are_mapped_from_when_the_autoencoder_reads_them_and_then_latents_too(found):
    clip = 9 * 128 * 128 * 3
    by_name = {stage.name: stage.files // stage_count(tiny()) for stage in found.stages}
    assert by_name["autoencoder"] == by_name["latents"] == clip
    assert by_name["render"] == by_name["decode"] == by_name["sample"] == 0
    latents, words = 4 * 3 * 16 * 16, 12 * 96
    assert by_name["transformer"] == clip + 2 * 2 * latents + 4 * (words + 96)


def stage_count(recipe):
    return recipe.data.num_clips + recipe.data.num_validation


def test_what_a_stage_frees_stays_and_pages_and_files_go():
    stages = (
        Stage("first", "clip", 1, 0.0, peak=100, pages=30),
        Stage("second", "clip", 1, 0.0, peak=60, pages=20, files=7),
        Stage("third", "clip", 1, 0.0, peak=90),
        Stage("fourth", "clip", 1, 0.0, peak=50, apart=True),
    )
    assert Forecast(stages, 0).resident == (100, 70 + 20 + 7, 90, 50)
    assert Forecast(stages, 0).fullest == 0


def stage_of(found, name, unit):
    (stage,) = (stage for stage in found.stages if (stage.name, stage.unit) == (name, unit))
    return stage


def test_what_a_recipe_leaves_out_is_no_stage_and_fewer_clips_are_validated_in_less(rates, found):
    fewer = ["data.num_validation=4", "dit.training.preview_every=0", "vae.pretrained=elsewhere"]
    other = forecast(set_values(tiny(), fewer), rates, PROCESS)
    assert [(stage.name, stage.unit) for stage in other.stages] == [
        ("latents", "clip"),
        ("transformer", "step"),
        ("transformer", "validation"),
        ("sample", "clip"),
    ]
    peaks = [stage_of(each, "transformer", "validation").peak for each in (other, found)]
    assert peaks[0] + 2**20 < peaks[1] - MEDIA.kept


def test_single_frames_leave_more_latents_than_a_clip_of_as_many_pixels(found):
    without = step_of(set_values(tiny(), ["vae.loss.image_fraction=0"]), "autoencoder")
    assert stage_of(found, "autoencoder", "step").step.activations > without.activations


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
