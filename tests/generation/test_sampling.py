from dataclasses import replace
from itertools import combinations

import pytest
import torch

from reelflow.config import from_dict, to_dict
from reelflow.diffusion import guidance as g
from reelflow.diffusion import samplers as s
from reelflow.diffusion.process import Parameterization, VariancePreserving, along_frames
from reelflow.diffusion.samplers import Restart
from reelflow.diffusion.timesteps import (
    ExponentialShift,
    KarrasSchedule,
    LinearQuadraticSchedule,
    SquareRootShift,
    TableShift,
    inference_times,
)
from reelflow.errors import ConfigError
from reelflow.generation.sampling import (
    AdamsBashforth,
    Ancestral,
    Ddim,
    Dpm2m,
    Dpm2mSde,
    Dpm2s,
    Euler,
    EulerMaruyama,
    Guidance,
    Heun,
    Midpoint,
    Projection,
    Restarted,
    Sampling,
    UniPC,
    count_evaluations,
    guided_by,
    sampler_of,
)

FLOW, DDPM = Parameterization(), Parameterization(VariancePreserving(), "v")
X = torch.randn(2, 3, 4, 2, 2, generator=torch.Generator().manual_seed(0))
TIMES = inference_times(6)
ROWS = (Restart(1, 4, 2), Restart(2, 5))


def cond(x, t):
    return torch.sin(x + along_frames(t)) - 0.3


def uncond(x, t):
    return torch.cos(2 * x) * along_frames(t) + 0.2


def seeded():
    return torch.Generator().manual_seed(7)


def test_each_method_is_the_sampler_of_its_name_with_its_options():
    direct = {
        Euler(): s.euler(cond, X, TIMES),
        Heun(): s.heun(cond, X, TIMES),
        Midpoint(): s.midpoint(cond, X, TIMES),
        Dpm2s(): s.dpm2s(cond, X, TIMES),
        Dpm2m(): s.dpm2m(cond, X, TIMES),
        UniPC(order=3, scale="bh1"): s.unipc(cond, X, TIMES, order=3, scale="bh1"),
        AdamsBashforth(order=3): s.adams_bashforth(cond, X, TIMES, order=3),
        Ddim(eta=0.4): s.ddim(cond, X, TIMES, generator=seeded(), eta=0.4),
        Ancestral("large"): s.ancestral(cond, X, TIMES, generator=seeded(), variance="large"),
        EulerMaruyama(level=0.3): s.euler_maruyama(cond, X, TIMES, generator=seeded(), level=0.3),
        Dpm2mSde(eta=0.6): s.dpm2m_sde(cond, X, TIMES, generator=seeded(), eta=0.6),
        Restarted(ROWS, Dpm2m()): s.restart(cond, X, TIMES, generator=seeded(), restarts=ROWS, sampler=s.dpm2m),
    }
    for method, wanted in direct.items():
        assert torch.equal(sampler_of(method, seeded())(cond, X, TIMES), wanted)
        sampling = Sampling(num_steps=6, sampler=method)
        assert from_dict(Sampling, to_dict(sampling)) == sampling
        assert method.kind == s.__dict__[method.kind].__name__
    assert not any(torch.equal(a, b) for a, b in combinations(direct.values(), 2))


def test_each_option_of_guidance_is_the_wrapper_of_its_name():
    away = g.away_from(uncond, scale=4.0)
    direct = {
        Guidance(): g.guided(cond, uncond, scale=4.0),
        Guidance(interval=(0.2, 0.6)): g.steered(cond, g.within(away, 0.2, 0.6)),
        Guidance(rescale=0.7): g.steered(cond, away, g.rescale(phi=0.7)),
        Guidance(first_scale=1.5): g.guided(cond, uncond, scale=g.over_frames(1.5, 4.0, 4)),
        Guidance(difference="fitted", zero_until=0.3): g.zero_start(
            g.steered(cond, g.away_from_fitted(uncond, scale=4.0)), until=0.3
        ),
        Guidance(difference=Projection(eta=0.2, threshold=2.0, momentum=-0.5)): g.steered(
            cond,
            g.AdaptiveProjection(uncond, scale=4.0, eta=0.2, threshold=2.0, momentum=-0.5, parameterization=DDPM),
        ),
    }
    answers = []
    for guidance, wanted in direct.items():
        ours = guided_by(guidance, cond, uncond, scale=4.0, num_frames=4, parameterization=DDPM)
        answers.append([])
        for t in ([0.1, 0.1], [0.4, 0.4], [0.8, 0.7]):
            answers[-1].append(ours(X, torch.tensor(t)))
            torch.testing.assert_close(answers[-1][-1], wanted(X, torch.tensor(t)))
        sampling = Sampling(guidance=guidance)
        assert from_dict(Sampling, to_dict(sampling)) == sampling
    assert not any(torch.equal(torch.stack(a), torch.stack(b)) for a, b in combinations(answers, 2))


def test_times_follow_the_schedule_and_a_shift_that_may_depend_on_the_tokens():
    karras = Sampling(num_steps=5, schedule=KarrasSchedule(), shift=2.0)
    assert torch.equal(karras.times(FLOW, 80), inference_times(5, shift=2.0, schedule=KarrasSchedule()))
    by_tokens = Sampling(num_steps=5, schedule=LinearQuadraticSchedule(), shift=SquareRootShift(tokens=20))
    wanted = inference_times(5, shift=2.0, schedule=LinearQuadraticSchedule())
    torch.testing.assert_close(by_tokens.times(FLOW, 80), wanted)
    for sampling in (karras, by_tokens, Sampling(shift=ExponentialShift((256, 4096), (0.5, 1.15)))):
        assert from_dict(Sampling, to_dict(sampling)) == sampling


@pytest.mark.parametrize(
    ("changes", "evaluations"),
    [
        ({}, 16),
        ({"guidance_scale": 1.0}, 8),
        ({"sampler": UniPC()}, 16),
        ({"sampler": Heun()}, 30),  # none at t = 1
        ({"sampler": Midpoint()}, 32),
        ({"guidance": Guidance(interval=(0.25, 0.75))}, 12),
        ({"guidance": Guidance(first_scale=1.0)}, 16),
        ({"guidance": Guidance(zero_until=0.2)}, 12),
        ({"sampler": Restarted((Restart(2, 6, 2),), Euler())}, 32),
    ],
)
def test_evaluations_are_counted_before_anything_is_loaded(changes, evaluations):
    sampling = Sampling(num_steps=8, **changes)
    assert count_evaluations(sampling, FLOW, 80) == evaluations


def test_evaluations_of_a_learned_variance_and_another_process_are_counted():
    learned = replace(DDPM, learned_variance=True)
    assert count_evaluations(Sampling(num_steps=8, sampler=Ancestral()), learned, 80) == 16


def test_what_a_network_cannot_do_is_refused():
    with pytest.raises(ConfigError, match=r"noise prediction .* at t = 0.*; nearest: prediction v"):
        Sampling().times(Parameterization(prediction="noise"), 80)
    assert len(Sampling().times(Parameterization(VariancePreserving(), "noise"), 80)) == 25
    with pytest.raises(ConfigError, match="zero_until makes velocities 0, but the network predicts v"):
        Sampling(guidance=Guidance(zero_until=0.04)).times(DDPM, 80)
    with pytest.raises(ConfigError, match="reaches from 100 to 200 tokens, got 80; nearest: 100"):
        Sampling(shift=TableShift(rows=((100, 1.0), (200, 2.0)))).times(FLOW, 80)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"num_steps": 0}, "num_steps must be at least 1, got 0; nearest: 1"),
        ({"guidance_scale": -1}, "guidance_scale must be at least 0"),
        ({"shift": -2}, "shift must be positive, got -2"),
        ({"guidance": {"interval": [0.5, 0.2]}}, r"got 0\.5 to 0\.2; nearest: 0\.2 to 0\.5"),
        ({"guidance": {"rescale": 2}}, "at most 1, got 2; nearest: 1"),
        ({"guidance": {"zero_until": 1}}, "until must be at least 0 and below 1"),
        ({"guidance": {"difference": {"eta": 3}}}, "eta must be between 0 and 1, got 3"),
        ({"sampler": {"kind": "hen"}}, "'euler', 'heun'"),
        ({"sampler": {"kind": "ddim", "eta": 2}}, "eta must be between 0 and 1, got 2.0; nearest: 1"),
        ({"sampler": {"kind": "dpm2m_sde", "eta": -1}}, "eta must be between 0 and 1, got -1.0; nearest: 0"),
        ({"sampler": {"kind": "euler_maruyama", "level": -1}}, "level must be at least 0"),
        ({"sampler": {"kind": "unipc", "order": 4}}, "1, 2 or 3"),
        ({"sampler": {"kind": "heun", "eta": 1}}, "eta"),
        ({"sampler": {"kind": "restart", "restarts": [[2, 25, 1]]}}, "within rows 0 to 24"),
        ({"sampler": {"kind": "restart", "restarts": [[2, 9, 1], [2, 8, 1]]}}, "in rising order"),
        ({"sampler": {"kind": "restart", "restarts": [], "sampler": {"kind": "ddim"}}}, "ddim"),
    ],
)
def test_impossible_values_are_refused_at_construction(values, message):
    with pytest.raises(ConfigError, match=message):
        from_dict(Sampling, values)
