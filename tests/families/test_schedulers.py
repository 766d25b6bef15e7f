"""Our walks against the schedulers of diffusers, with a network that tells timesteps, channels and signs apart.

In float64: what the reference rounds to float32 is promoted, but for the sigmas of UniPC and DPM-Solver, whose rounding
we reproduce.
"""

import inspect
import math
from contextlib import ExitStack, contextmanager, nullcontext
from unittest import mock

import diffusers
import numpy as np
import pytest
import torch
from diffusers.pipelines.ltx.pipeline_ltx import calculate_shift
from diffusers.pipelines.mochi.pipeline_mochi import linear_quadratic_schedule
from hypothesis import Phase, assume, given, settings
from hypothesis import strategies as st
from parity import EXAMPLES, error, promoted

from reelflow.diffusion.rollout import rollout_given
from reelflow.diffusion.samplers import draw
from reelflow.diffusion.timesteps import LinearQuadraticSchedule
from reelflow.errors import CheckpointError, ConfigError
from reelflow.families.schedulers import dynamic_guidance, mu_of, read_scheduler, sigmas_of

pytestmark = pytest.mark.filterwarnings(
    "ignore:__array__ implementation:DeprecationWarning"
)  # of diffusers, with numpy 2
BOUND = 1e-10
FLOW_EULER, UNIPC, DPM = (
    "FlowMatchEulerDiscreteScheduler",
    "UniPCMultistepScheduler",
    "DPMSolverMultistepScheduler",
)
DDIM, COG_DDIM, COG_DPM = "DDIMScheduler", "CogVideoXDDIMScheduler", "CogVideoXDPMScheduler"
ANCESTRAL = "EulerAncestralDiscreteScheduler"
ZERO_SNR = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
FLOW_OPTIONS = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
COG = {
    "beta_schedule": "scaled_linear",
    "prediction_type": "v_prediction",
    "timestep_spacing": "trailing",
    "rescale_betas_zero_snr": True,
}
drawn = settings(max_examples=2 * EXAMPLES, deadline=None, phases=[Phase.generate], derandomize=True)

steps = st.integers(1, 12)
shapes = st.tuples(st.integers(1, 2), st.just(3), st.integers(1, 3), st.integers(1, 3), st.integers(1, 3))
shifts = st.sampled_from([1.0, 3.0, 5.0]) | st.floats(0.5, 12.0)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def network(x: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
    """Mix channels, and add a wave in the timestep that one step more or less changes."""
    weights = torch.randn(3, 3, generator=seeded(1), dtype=torch.float64) / 3
    phase = 0.7 * timestep.double().reshape(len(x), 1, -1, 1, 1) + torch.arange(3).view(1, 3, 1, 1, 1)
    return (torch.einsum("oc,bcthw->bothw", weights, x.double()) + 0.3 * phase.sin()).to(x.dtype)


@contextmanager
def exact(numpy: bool):
    """Promote float32 of torch and, if asked, of numpy."""
    with ExitStack() as stack:
        stack.enter_context(promoted())
        if numpy:
            stack.enter_context(mock.patch.object(np, "float32", np.float64))
        yield


def theirs(config, x, generator, num_steps, *, numpy=True, **options):
    """Walk as pipelines do; frames come before channels where CogVideoX's scheduler draws."""
    values = {name: value for name, value in config.items() if name != "_class_name"}
    with exact(numpy) if x.dtype == torch.float64 else nullcontext():
        scheduler = getattr(diffusers, config["_class_name"])(**values)
        scheduler.set_timesteps(**options) if "sigmas" in options else scheduler.set_timesteps(num_steps, **options)
        if not numpy and x.dtype == torch.float64:
            scheduler.sigmas = scheduler.sigmas.double()
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(0)
        old, before = None, None
        for timestep in scheduler.timesteps:
            answer = network(x, timestep.expand(len(x)))
            if config["_class_name"] == COG_DPM:
                answer, sample = answer.transpose(1, 2), x.transpose(1, 2)
                x, old = scheduler.step(answer, old, timestep, before, sample, generator=generator)
                x, before = x.transpose(1, 2), timestep
            else:
                takes = "generator" in inspect.signature(scheduler.step).parameters
                extra = {"generator": generator} if takes else {}
                x = scheduler.step(answer, timestep, x, **extra, return_dict=False)[0]
    return x


def ours(config, x, generator, num_steps, **options):
    walk = read_scheduler(config)
    flow = walk.parameterization.prediction == "velocity" and not walk.inverted

    def predict(x, t):
        fed = walk.fed(t)
        return -network(x, 1000 * (1 - fed)) if flow else network(x, 1000 * (fed if walk.inverted else 1 - fed))

    times = walk.times(num_steps, **options)
    assert len(times) == num_steps + 1
    return walk.sampler(generator)(predict, x, times, parameterization=walk.parameterization)


def compare(config, shape, num_steps, seed, *, numpy=True, sigmas=None, **options):
    x = torch.randn(shape, generator=seeded(seed), dtype=torch.float64)
    given_sigmas = {} if sigmas is None else {"sigmas": sigmas.numpy()}
    expected = theirs(config, x, seeded(7), num_steps, numpy=numpy, **given_sigmas, **options)
    found = ours(config, x, seeded(7), num_steps, sigmas=sigmas, **options)
    assert torch.isfinite(expected).all()
    assert error(found, expected) < BOUND, (config, num_steps, error(found, expected))


# Flows

pipelines = st.sampled_from([None, sigmas_of, lambda n: sigmas_of(n, LinearQuadraticSchedule())])
dynamics = st.none() | st.floats(0.2, 2.5)


@drawn
@given(
    steps,
    shapes,
    shifts,
    dynamics,
    st.sampled_from(["exponential", "linear"]),
    st.sampled_from([None, 0.1]),
    st.booleans(),
    st.booleans(),
    pipelines,
)
def test_euler_over_flows_is_that_of_diffusers(n, shape, shift, mu, kind, terminal, invert, stochastic, grid):
    assume(terminal is None or n > 1)
    config = {
        "_class_name": FLOW_EULER,
        "_diffusers_version": "0.42.1",
        "shift": shift,
        "use_dynamic_shifting": mu is not None,
        "time_shift_type": kind,
        "shift_terminal": terminal,
        "invert_sigmas": invert,
        "stochastic_sampling": stochastic and not invert,
    }
    compare(config, shape, n, 0, mu=mu, sigmas=None if grid is None else grid(n))


@drawn
@given(
    steps,
    shapes,
    shifts,
    dynamics,
    st.sampled_from([None, 0.1]),
    st.sampled_from([1, 2, 3]),
    st.lists(st.integers(0, 3), max_size=2),
    st.sampled_from([None, sigmas_of]),
)
def test_unipc_over_flows_is_that_of_diffusers(n, shape, shift, mu, terminal, order, uncorrected, grid):
    assume(terminal is None or n > 1)
    config = {
        "_class_name": UNIPC,
        **FLOW_OPTIONS,
        "flow_shift": shift,
        "use_dynamic_shifting": mu is not None,
        "shift_terminal": terminal,
        "solver_order": order,
        "disable_corrector": uncorrected,
    }
    compare(config, shape, n, 0, numpy=False, mu=mu, sigmas=None if grid is None else grid(n))


def test_unipc_with_bh1_is_that_of_diffusers_up_to_its_last_step_which_there_is_not_finite():
    config = {"_class_name": UNIPC, **FLOW_OPTIONS, "solver_type": "bh1"}
    x = torch.randn(1, 3, 2, 1, 2, generator=seeded(0), dtype=torch.float64)
    with mock.patch(f"{__name__}.network", side_effect=network) as asked:
        assert theirs(config, x, seeded(7), 5, numpy=False).isnan().all()
        assert ours(config, x, seeded(7), 5).isfinite().all()
    seen = [call.args[0] for call in asked.call_args_list]
    assert len(seen) == 10
    for found, expected in zip(seen[5:], seen[:5], strict=True):
        assert error(found, expected) < BOUND


@drawn
@given(steps, shapes, shifts, dynamics, st.sampled_from([1, 2]), st.booleans(), st.booleans())
def test_dpm_solver_over_flows_is_that_of_diffusers(n, shape, shift, mu, order, stochastic, lower):
    config = {
        "_class_name": DPM,
        **FLOW_OPTIONS,
        "flow_shift": shift,
        "use_dynamic_shifting": mu is not None,
        "solver_order": order,
        "algorithm_type": "sde-dpmsolver++" if stochastic else "dpmsolver++",
        "lower_order_final": lower,
    }
    compare(config, shape, n, 0, numpy=False, mu=mu)


def test_a_shift_is_applied_twice_where_no_sigmas_are_given():
    walk = read_scheduler({"_class_name": FLOW_EULER, "shift": 3.0})
    once = 3e-3 / (1 + 2e-3)
    assert walk.times(4)[3].item() == pytest.approx(1 - 3 * once / (1 + 2 * once), abs=1e-15)
    assert walk.times(4, sigmas=sigmas_of(4))[3].item() == pytest.approx(1 - 0.75 / 1.5, abs=1e-15)


@pytest.mark.parametrize("name", [UNIPC, DPM])
@pytest.mark.parametrize("shift", [1.0, 3.0, 5.0, 12.0])
def test_timesteps_are_cut_to_the_integers_of_diffusers_in_float32_too(name, shift):
    """Where a thousand sigmas are whole, rounding errors decide: 333.99999999999994 is cut to 333."""
    config = {**FLOW_OPTIONS, "flow_shift": shift}
    scheduler, walk = getattr(diffusers, name)(**config), read_scheduler({"_class_name": name, **config})
    for n in (1, 3, 9, 27, 37, 50):
        scheduler.set_timesteps(n)
        asked = []
        walk.sampler(seeded(0))(
            lambda x, t, asked=asked: asked.append(1000 * (1 - walk.fed(t.double()).item())) or x,
            torch.zeros(1, 1, 1, 1, 1),
            walk.times(n),
        )
        assert [round(t, 6) for t in asked] == scheduler.timesteps.tolist()
        assert walk.fed(walk.times(n)[:1]).item() == pytest.approx(1 - scheduler.timesteps[0].item() / 1000, abs=1e-12)


def test_timesteps_of_given_sigmas_are_cut_as_if_sigma_had_not_been_one_minus_t():
    """In float64 a thousand times 1 - (1 - 0.1) is 99.99999999999997."""
    scheduler, walk = (
        diffusers.UniPCMultistepScheduler(**FLOW_OPTIONS),
        read_scheduler({"_class_name": UNIPC, **FLOW_OPTIONS}),
    )
    sigmas = torch.linspace(1, 0.1, 10, dtype=torch.float64)
    scheduler.set_timesteps(sigmas=sigmas.numpy().copy())
    cut = (1000 * (1 - walk.times(10, sigmas=sigmas)[:-1])).long()
    assert cut.tolist() == scheduler.timesteps.tolist()
    assert cut.tolist() != (1000 * (1 - (1 - sigmas))).long().tolist()


# Tables of betas

tables = st.fixed_dictionaries(
    {
        "beta_schedule": st.sampled_from(["linear", "scaled_linear", "squaredcos_cap_v2"]),
        "prediction_type": st.sampled_from(["v_prediction", "sample", "epsilon"]),
        "timestep_spacing": st.sampled_from(["leading", "trailing", "linspace"]),
        "rescale_betas_zero_snr": st.booleans(),
        "steps_offset": st.sampled_from([0, 1]),
    }
)


def defined(table, n):
    """Nothing can be told of the data from a noise prediction at a step without data."""
    first = table["timestep_spacing"] == "leading" or (n == 1 and table["timestep_spacing"] == "linspace")
    cosine = table["beta_schedule"] == "squaredcos_cap_v2"  # its last alpha is 1e-9, which magnifies all rounding
    return first or table["prediction_type"] != "epsilon" or not (table["rescale_betas_zero_snr"] or cosine)


@drawn
@given(steps, shapes, tables, st.booleans(), st.booleans())
def test_ddim_is_that_of_diffusers(n, shape, table, clip, to_one):
    assume(defined(table, n) and (to_one or not clip))
    config = {"_class_name": DDIM, **table, "clip_sample": clip, "clip_sample_range": 0.8, "set_alpha_to_one": to_one}
    compare(config, shape, n, 0)


@drawn
@given(steps, shapes, tables, st.sampled_from([COG_DDIM, COG_DPM]), st.sampled_from([1.0, 3.0]))
def test_the_schedulers_of_cogvideox_are_those_of_diffusers(n, shape, table, name, shift):
    assume(defined(table, n))
    compare({"_class_name": name, **table, "snr_shift_scale": shift}, shape, n, 0)


def test_as_published_cogvideox_and_latte_walk_as_diffusers_does():
    """In 7 steps a step of CogVideoX's ends elsewhere than the next is thought to begin, and the last before the data."""
    for name in (COG_DPM, COG_DDIM):
        for n in (50, 7):
            compare({"_class_name": name, **COG}, (1, 3, 2, 2, 2), n, 0)
    assert read_scheduler({"_class_name": COG_DPM, **COG}).times(7)[-1].item() == pytest.approx(0.999)
    compare({"_class_name": DDIM, "clip_sample": False}, (1, 3, 2, 2, 2), 50, 0)


@pytest.mark.parametrize("prediction", ["v_prediction", "epsilon"])
@pytest.mark.parametrize("n", [1, 7, 50])
def test_euler_ancestral_is_that_of_diffusers(n, prediction):
    """Theirs walks over x / alpha, from noise times 4096."""
    config = {"prediction_type": prediction, **ZERO_SNR}
    noise = torch.randn(2, 3, 2, 2, 2, generator=seeded(0), dtype=torch.float64)
    with exact(numpy=True):
        scheduler = diffusers.EulerAncestralDiscreteScheduler(**config)
        scheduler.set_timesteps(n)
        x, draws = noise * scheduler.init_noise_sigma, seeded(7)
        begun = scheduler.scale_model_input(x, scheduler.timesteps[0])
        for timestep in scheduler.timesteps:
            answer = network(scheduler.scale_model_input(x, timestep), timestep.expand(2))
            x = scheduler.step(answer, timestep, x, generator=draws, return_dict=False)[0]
    found = ours({"_class_name": ANCESTRAL, **config}, begun, seeded(7), n)
    assert error(found, x) < (BOUND if prediction == "v_prediction" else 1e-6)  # which alpha = 1 / 4096 magnifies


@pytest.mark.parametrize(
    "config",
    [
        {"_class_name": FLOW_EULER, "shift": 7.0},
        {"_class_name": UNIPC, **FLOW_OPTIONS, "flow_shift": 5.0},
        {"_class_name": DPM, **FLOW_OPTIONS, "flow_shift": 5.0, "algorithm_type": "sde-dpmsolver++"},
        {"_class_name": DDIM, "clip_sample": False},
        {"_class_name": COG_DPM, **COG},
        {"_class_name": COG_DDIM, **COG},
    ],
    ids=lambda config: config["_class_name"],
)
def test_in_float32_they_agree_to_rounding(config):
    x = torch.randn(1, 3, 2, 2, 2, generator=seeded(0))
    for n in (1, 9, 50):
        found, expected = ours(config, x, seeded(7), n), theirs(config, x, seeded(7), n)
        assert found.dtype == expected.dtype == torch.float32
        assert error(found, expected) < 1e-5


def test_noise_may_be_given_and_each_clip_may_have_its_own_generator():
    config, x = {"_class_name": COG_DPM, "timestep_spacing": "trailing"}, torch.zeros(2, 3, 2, 1, 2).double()
    alone = torch.cat([ours(config, x[:1], seeded(seed), 5) for seed in (3, 4)])
    torch.testing.assert_close(ours(config, x, [seeded(3), seeded(4)], 5), alone, rtol=0, atol=1e-13)
    expected = theirs(config, x, [seeded(3), seeded(4)], 5)
    torch.testing.assert_close(alone, expected, rtol=0, atol=1e-10)

    drawn_first, kept = seeded(3), []
    for index in range(5):
        for _ in range(1 if index == 0 else 2):
            noise = draw(x[:1].transpose(1, 2), drawn_first).transpose(1, 2)
        kept.append(noise)
    given_noise = iter(kept)
    torch.testing.assert_close(ours(config, x[:1], lambda x: next(given_noise), 5), alone[:1], rtol=0, atol=1e-13)


@pytest.mark.parametrize(
    "config",
    [
        {"_class_name": FLOW_EULER, "stochastic_sampling": True},
        {"_class_name": UNIPC, **FLOW_OPTIONS},
        {"_class_name": DPM, **FLOW_OPTIONS},
        {"_class_name": DDIM, "timestep_spacing": "trailing"},
        {"_class_name": COG_DPM},
    ],
    ids=lambda config: config["_class_name"],
)
def test_a_given_frame_keeps_its_bits_and_the_rest_walks_as_without_columns(config):
    walk = read_scheduler(config)
    x, times = torch.randn(1, 3, 3, 2, 2, generator=seeded(0), dtype=torch.float64), walk.times(3)

    def predict(x, t):
        return network(x, 1000 * (1 - walk.fed(t)))

    def run(times):
        return walk.sampler(seeded(2))(predict, x, times, parameterization=walk.parameterization)

    found = run(rollout_given(times, 3, num_given=1))
    assert torch.equal(found[:, :, 0], x[:, :, 0])
    torch.testing.assert_close(found[:, :, 1:], run(times)[:, :, 1:], rtol=0, atol=1e-13)


# What pipelines add


def test_mu_lies_on_the_line_of_the_pipelines():
    line = {"base_image_seq_len": 1024, "max_image_seq_len": 4096, "base_shift": 0.95, "max_shift": 2.05}
    for tokens in (96, 1024, 33_000):
        assert mu_of(line, tokens) == pytest.approx(calculate_shift(tokens, *line.values()), rel=1e-14)
        assert mu_of({}, tokens) == pytest.approx(calculate_shift(tokens), rel=1e-14)
    with pytest.raises(CheckpointError, match=r"usual: 0\.5 at 256"):
        mu_of({"base_shift": None}, 100)


def test_sigmas_are_those_that_pipelines_pass():
    for n in (2, 5, 64):
        assert torch.allclose(sigmas_of(n), torch.from_numpy(np.linspace(1.0, 0.0, n + 1)[:-1]), rtol=0, atol=1e-15)
        assert torch.allclose(sigmas_of(n), torch.from_numpy(np.linspace(1.0, 1 / n, n)), rtol=0, atol=1e-15)
        published = torch.tensor(linear_quadratic_schedule(n, 0.025), dtype=torch.float64)
        assert torch.allclose(sigmas_of(n, LinearQuadraticSchedule()), published, rtol=0, atol=1e-15)


def test_dynamic_guidance_mixes_steps_of_sampling_with_timesteps_of_training():
    walk = read_scheduler({"_class_name": COG_DDIM, "timestep_spacing": "trailing"})
    found = dynamic_guidance(6.0, 50)(walk.fed(walk.times(50)[:-1]))
    published = [1 + 6.0 * (1 - math.cos(math.pi * ((50 - n) / 50) ** 5.0)) / 2 for n in range(999, 0, -20)]
    torch.testing.assert_close(found, torch.tensor(published, dtype=torch.float64), rtol=0, atol=1e-7)
    assert not bool((found.diff() >= 0).all())


# What is refused


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"_class_name": "FlowMatchHeunDiscreteScheduler"}, "did you mean FlowMatchEulerDiscreteScheduler"),
        ({}, "known: CogVideoXDDIMScheduler"),
        ({"_class_name": FLOW_EULER, "shifts": 3.0}, "no value 'shifts'; did you mean shift"),
        ({"_class_name": FLOW_EULER, "use_karras_sigmas": True}, "use_karras_sigmas.*should be False"),
        ({"_class_name": FLOW_EULER, "shift": "3"}, "shift: .*valid number"),
        ({"_class_name": UNIPC}, "prediction_type: Field required"),
        ({"_class_name": UNIPC, **FLOW_OPTIONS, "use_flow_sigmas": False}, "use_flow_sigmas: Input should be True"),
        ({"_class_name": UNIPC, **FLOW_OPTIONS, "solver_order": 4}, "solver_order: Input should be 1, 2 or 3"),
        ({"_class_name": DPM, **FLOW_OPTIONS, "solver_order": 3}, "solver_order: Input should be 1 or 2"),
        ({"_class_name": DDIM, "set_alpha_to_one": False}, "nearest: set_alpha_to_one true"),
        ({"_class_name": DDIM, "thresholding": True}, "thresholding: Input should be False"),
        ({"_class_name": DDIM, "num_train_timesteps": 500}, "num_train_timesteps: Input should be 1000"),
        ({"_class_name": COG_DPM, "set_alpha_to_one": False}, "set_alpha_to_one: Input should be True"),
        ({"_class_name": ANCESTRAL}, "with rescale_betas_zero_snr and timestep_spacing='trailing' only"),
    ],
)
def test_what_we_do_not_reproduce_is_refused(config, message):
    with pytest.raises(CheckpointError, match=message):
        read_scheduler(config)


@pytest.mark.parametrize(
    ("config", "options", "message"),
    [
        ({"_class_name": FLOW_EULER}, {"num_steps": 0}, "num_steps must be at least 1, got 0"),
        ({"_class_name": FLOW_EULER, "use_dynamic_shifting": True}, {"num_steps": 2}, "give mu"),
        ({"_class_name": FLOW_EULER}, {"num_steps": 2, "sigmas": torch.ones(3)}, "each of 2 steps, got 3"),
        ({"_class_name": FLOW_EULER, "shift_terminal": 0.1}, {"num_steps": 1}, "nearest: 2 steps"),
        ({"_class_name": DPM, **FLOW_OPTIONS}, {"num_steps": 1, "sigmas": torch.ones(1)}, "takes no sigmas"),
        ({"_class_name": DDIM}, {"num_steps": 1001}, "at most 1000"),
        ({"_class_name": DDIM, "timestep_spacing": "trailing"}, {"num_steps": 61}, "make no 61 steps.*nearest: 60"),
        ({"_class_name": DDIM, "steps_offset": 999}, {"num_steps": 2}, "offset 999"),
        ({"_class_name": ANCESTRAL, **ZERO_SNR}, {"num_steps": 400}, "begins before the first; nearest: 269"),
    ],
)
def test_times_that_cannot_be_are_refused(config, options, message):
    with pytest.raises(ConfigError, match=message):
        read_scheduler(config).times(**options)
