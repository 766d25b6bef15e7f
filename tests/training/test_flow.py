import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from reelflow.diffusion.process import (
    Parameterization,
    RectifiedFlow,
    VarianceExploding,
    VariancePreserving,
    along_frames,
    levels,
    preconditioning,
)
from reelflow.diffusion.timesteps import CosMap, LogitNormal, SquareRootShift, Uniform, shift_times
from reelflow.diffusion.weighting import MinSNR
from reelflow.errors import ConfigError
from reelflow.models.blocks import Attend, Branches, FeedForward, Single, gate_values
from reelflow.models.condition import Condition
from reelflow.models.dit import DiTConfig, VideoDiT
from reelflow.models.vae import Posterior
from reelflow.nn.embed import Number
from reelflow.nn.patchify import Patch
from reelflow.nn.patterns import Gated
from reelflow.training.flow import FlowConfig, FlowTask, LatentBatch, Preserved, inner_matrix

B, C, T, H, W = 4, 2, 4, 4, 2
DIT = DiTConfig(in_channels=C, dim=12, num_heads=1, layers=(Single(),), rope=(4, 4, 4), vector_dim=3)
DATA = torch.randn(B, C, T, H, W, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
OWN = 1 + torch.arange(B * 3).view(B, 3).double()
BATCH = LatentBatch(Posterior(DATA, torch.full_like(DATA, -200.0)), Condition(vector=OWN))
NULL = Condition(vector=torch.zeros(1, 3, dtype=torch.float64))


class Spy(VideoDiT):
    """Answers as it is told, and remembers what it was asked."""

    def __init__(self, answer):
        super().__init__(DIT)
        self.answer, self.asked = answer, []

    def forward(self, latents, t, condition):
        self.asked.append((latents, t, condition))
        return self.answer(latents, t)


def true_velocity(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """data - noise, known from x_t; where t = 1 the noise is not known, and the answer absurd."""
    t = along_frames(t)
    return torch.where(t == 1, 1e6, (DATA[:, :, : x.shape[2]] - x) / (1 - t))


def task(answer=true_velocity, **changes) -> FlowTask:
    return FlowTask(Spy(answer), FlowConfig(**changes), null=NULL, validation=BATCH)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("changes", [{"given_fraction": 0.0}, {"given_fraction": 1.0}, {"image_fraction": 1.0}])
@pytest.mark.parametrize("time", [Uniform(), LogitNormal(), CosMap()], ids=lambda time: time.kind)
def test_the_true_velocity_has_no_loss(time, changes):
    assert task(time=time, **changes).loss(BATCH, seeded()).value < 1e-10


@pytest.mark.parametrize("given_fraction", [0.0, 1.0])
def test_the_loss_is_the_mean_squared_error_of_the_velocity(given_fraction):
    flow = task(lambda x, t: torch.full_like(x, 0.25), given_fraction=given_fraction)
    loss = flow.loss(BATCH, seeded()).value
    x, t, _ = flow.model.asked[0]
    errors = (0.25 - true_velocity(x, t)).square()
    assert loss.item() == pytest.approx(errors[errors < 1e9].mean().item(), rel=1e-5)


def test_given_frames_are_clean_and_come_first_and_carry_no_loss():
    flow, counts = task(given_fraction=1.0, max_given=2), set()
    for seed in range(20):
        assert flow.loss(BATCH, seeded(seed)).value < 1e-10  # the answer there is a million
        x, t, _ = flow.model.asked[-1]
        given = int((t[0] == 1).sum())
        counts.add(given)
        assert (t[:, :given] == 1).all()
        torch.testing.assert_close(x[:, :, :given], DATA[:, :, :given], rtol=0, atol=1e-12)
        assert ((t[:, given:] > 0) & (t[:, given:] < 1)).all()
        assert (t[:, given:] == t[:, -1:]).all()
        assert len(set(t[:, -1].tolist())) == B
    assert counts == {1, 2}


@pytest.mark.parametrize(("num_frames", "counts"), [(1, {0}), (2, {1}), (3, {1, 2})])
def test_something_is_always_left_to_learn(num_frames, counts):
    posterior = Posterior(*(part[:, :, :num_frames] for part in BATCH.posterior))
    flow = task(given_fraction=1.0, max_given=9)
    for seed in range(12):
        flow.loss(LatentBatch(posterior, BATCH.condition), seeded(seed))
    assert {int((t == 1).sum()) // B for _, t, _ in flow.model.asked} == counts


# What the network is asked for

DDPM = VariancePreserving()
COSINE = VariancePreserving(schedule="cosine", zero_terminal_snr=True)
EXPLODING = VarianceExploding()


def true_answer(space: Parameterization, raw: float | None = None):
    """The answer of a network that knows the data; where t = 1 the noise is not known, and the answer absurd."""

    def answer(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        data = DATA[:, :, : x.shape[2]]
        alpha, sigma = levels(space.process, t)
        if isinstance(space.process, VarianceExploding):
            x = x / preconditioning(space.process, t).c_in
        noise = (x - alpha * data) / sigma
        told = torch.where(along_frames(t) == 1, 1e6, space.target(data, noise, t))
        return told if raw is None else torch.cat([told, torch.full_like(told, raw)], dim=1)

    return answer


@pytest.mark.parametrize(
    "space",
    [
        Parameterization(RectifiedFlow(), "data"),
        Parameterization(RectifiedFlow(), "noise"),
        Parameterization(DDPM, "noise"),
        Parameterization(COSINE, "v"),
        Parameterization(VariancePreserving(continuous=True), "velocity"),
        Parameterization(EXPLODING, "v"),
    ],
    ids=lambda space: f"{space.process.kind}-{space.prediction}",
)
def test_the_true_answer_has_no_loss_and_given_frames_are_the_data_itself(space):
    flow, kinds = task(true_answer(space), parameterization=space, given_fraction=0.5, image_fraction=0.2), set()
    for seed in range(12):
        assert flow.loss(BATCH, seeded(seed)).value < 1e-8
        x, t, _ = flow.model.asked[-1]
        given = int((t[0] == 1).sum()) if t.ndim == 2 else 0
        kinds.add((x.shape[2], given))
        torch.testing.assert_close(x[:, :, :given], DATA[:, :, :given], rtol=0, atol=1e-12)
    assert kinds == {(1, 0), (T, 0), (T, 1), (T, 2)}


def test_the_default_is_the_plain_flow_bit_for_bit():
    """Two steps by the shortest way from the draws to the loss."""

    def plainly(model: VideoDiT, generator: torch.Generator) -> torch.Tensor:
        data = BATCH.posterior.sample(generator)
        kind, given = torch.rand((), generator=generator), 0
        if kind < 0.5:
            given = int(torch.randint(1, 3, (), generator=generator))
        keep = torch.rand(B, generator=generator) >= 0.1
        u = ((torch.arange(B) + torch.rand(B, generator=generator)) / B).double()
        t = torch.sigmoid(torch.special.ndtri(u)).float()
        t = (t / (t + 3 * (1 - t)))[:, None].repeat(1, T)
        t[:, :given] = 1
        noise = torch.randn(data.shape, generator=generator, dtype=data.dtype)
        x = torch.lerp(noise, data, t[:, None, :, None, None].double())
        answer = model(x, t if given else t[:, :1], Condition(vector=OWN * keep[:, None]))
        return (answer - (data - noise)).square()[:, :, given:].mean(dim=(1, 2, 3, 4)).mean()

    torch.manual_seed(0)
    ours = VideoDiT(DIT).double()
    theirs = copy.deepcopy(ours)
    flow = FlowTask(ours, FlowConfig(shift=3.0, given_fraction=0.5), null=NULL, validation=BATCH)
    steps = [torch.optim.SGD(model.parameters(), lr=0.1) for model in (ours, theirs)]
    generators = seeded(3), seeded(3)
    for _ in range(2):
        losses = flow.loss(BATCH, generators[0]).value, plainly(theirs, generators[1])
        assert losses[0].item() == losses[1].item()
        for loss, step in zip(losses, steps, strict=True):
            step.zero_grad()
            loss.backward()
            step.step()
    assert all(torch.equal(*pair) for pair in zip(ours.parameters(), theirs.parameters(), strict=True))


def test_a_table_of_steps_is_trained_at_its_steps_alike_and_the_limit_between_them():
    num = 1000
    data = torch.zeros(num, C, 1, 2, 2)
    many = LatentBatch(Posterior(data, data), Condition(vector=torch.zeros(num, 3)))
    for process, wanted in (
        (DDPM, torch.arange(num) / num),
        (VariancePreserving(num_steps=250), (torch.arange(num) // 4) / 250),
    ):
        flow = task(lambda x, t: x, parameterization=Parameterization(process, "v"), time=Uniform())
        flow.loss(many, seeded())
        torch.testing.assert_close(flow.model.asked[0][1].sort().values, wanted)
    flow = task(lambda x, t: x, parameterization=Parameterization(VariancePreserving(continuous=True)), time=Uniform())
    flow.loss(many, seeded())
    steps = flow.model.asked[0][1].double() * num
    assert ((steps - steps.round()).abs() > 0.01).double().mean() > 0.95


def test_the_loss_is_weighted_and_validation_is_not():
    space = Parameterization(DDPM, "v")
    truth = true_answer(space)
    plain, weighted = (
        task(lambda x, t: truth(x, t) + 0.5, parameterization=space, given_fraction=0.0, **changes)
        for changes in ({}, {"weighting": MinSNR(gamma=5.0)})
    )
    assert plain.loss(BATCH, seeded()).value.item() == pytest.approx(0.25, rel=1e-5)
    value = weighted.loss(BATCH, seeded()).value.item()
    snr = (DDPM.alpha(weighted.model.asked[0][1]) / DDPM.sigma(weighted.model.asked[0][1])) ** 2
    assert value == pytest.approx(0.25 * (snr.clamp(max=5) / (snr + 1)).mean().item(), rel=1e-4)
    assert weighted.validate(seeded()) == plain.validate(seeded())


def test_a_shift_may_depend_on_the_tokens_of_the_batch():
    by_tokens = SquareRootShift(tokens=T * (H // 2) * (W // 2))
    for changes, shift in (({"given_fraction": 0.0}, 1.0), ({"image_fraction": 1.0}, T**-0.5)):
        times = []
        for config in ({"shift": 1.0}, {"shift": by_tokens}):
            flow = task(**changes, **config)
            flow.loss(BATCH, seeded())
            times.append(flow.model.asked[0][1])
        torch.testing.assert_close(times[1], shift_times(times[0], shift))


LEARNED = Parameterization(DDPM, "noise", learned_variance=True)


def test_the_bound_of_a_learned_variance_is_the_divergence_of_the_steps():
    """With the true mean, the small variance is the truth; the large one costs (ln r + 1 / r - 1) / 2, r = large / small."""
    exact = task(true_answer(LEARNED, raw=-1.0), parameterization=LEARNED, given_fraction=0.5)
    assert max(abs(exact.loss(BATCH, seeded(seed)).value.item()) for seed in range(8)) < 1e-5
    large = task(true_answer(LEARNED, raw=1.0), parameterization=LEARNED, given_fraction=0.0)
    loss = large.loss(BATCH, seeded())
    abar = torch.cat([torch.ones(1).double(), DDPM.alphas_cumprod])  # of the data, then of each step
    step = DDPM.step_of(large.model.asked[0][1]).round().long() + 1
    ratio = (1 - abar[step]) / (1 - abar[step - 1])  # beta over beta-tilde
    wanted = 1000 * ((ratio.log() + 1 / ratio - 1) / 2).mean().item()
    assert loss.parts["bound"].item() == pytest.approx(wanted, rel=1e-3)
    assert loss.value.item() == pytest.approx(1e-3 * wanted, rel=1e-3)


def test_a_learned_variance_has_finite_gradients_at_the_last_step_and_beside_given_frames():
    raw = torch.full((), -4.0, requires_grad=True)  # far outside the bounds
    few = VariancePreserving(num_steps=2)
    space = Parameterization(few, "noise", learned_variance=True)
    flow = task(
        lambda x, t: torch.cat([x, raw.expand_as(x)], dim=1), parameterization=space, given_fraction=0.5, time=Uniform()
    )
    for seed in range(4):
        flow.loss(BATCH, seeded(seed)).value.backward()
        assert raw.grad.isfinite()
        assert set(flow.model.asked[-1][1].reshape(B, -1)[:, -1].tolist()) == {0.0, 0.5}  # 0.5 is step 0, the last


@pytest.mark.parametrize("granularity", ["scalar", "token"])
def test_a_gates_alpha_is_reported_with_every_loss(granularity):
    block = Branches((Attend(Gated(granularity)), FeedForward()))
    torch.manual_seed(0)
    model = VideoDiT(replace(DIT, layers=(block, block))).double()
    flow = FlowTask(model, FlowConfig(given_fraction=0.0), null=NULL, validation=BATCH)
    for name, weight in model.named_parameters():
        if ".gate." in name:
            torch.nn.init.normal_(weight)
    parts = {name: part.item() for name, part in flow.loss(BATCH, seeded()).parts.items()}
    assert parts == {f"alpha/{name}": pytest.approx(value) for name, value in gate_values(model).items()}
    assert len(set(parts.values())) == 2


def test_muon_moves_the_matrices_of_blocks_alone():
    block = Branches((Attend(Gated("token")), FeedForward()))
    names = {
        name
        for name, weight in VideoDiT(replace(DIT, layers=(block,))).named_parameters()
        if inner_matrix(name, weight)
    }
    assert names == {
        f"blocks.0.branches.{name}.weight"
        for name in ("0.function.project.qkv", "0.function.out", "1.function.up", "1.function.down")
    }


def test_a_network_without_the_channels_of_a_variance_is_refused():
    with pytest.raises(ConfigError, match="must answer 4 channels, got 2"):
        task(lambda x, t: x, parameterization=LEARNED).loss(BATCH, seeded())


def test_the_network_reads_about_unit_variance_from_an_exploding_process():
    flow = task(lambda x, t: x, parameterization=Parameterization(EXPLODING, "v"), time=Uniform())
    flow.loss(BATCH, seeded(1))
    (x, _, _), data = flow.model.asked[0], DATA
    assert 0.5 < x.square().mean() / (data.square().mean() + 1) * 2 < 2


def test_image_batches_hold_frame_zero_alone():
    flow = task(image_fraction=1.0, given_fraction=0.0)
    loss = flow.loss(BATCH, seeded())
    x, t, _ = flow.model.asked[0]
    assert x.shape == (B, C, 1, H, W)
    assert t.shape == (B,)
    assert (loss.num_tokens, loss.num_samples) == (B * (H // 2) * (W // 2), B)
    assert task(given_fraction=0.0).loss(BATCH, seeded()).num_tokens == T * loss.num_tokens


def test_kinds_of_batches_come_in_the_shares_asked_for():
    flow, num = task(image_fraction=0.2, given_fraction=0.3), 400
    for seed in range(num):
        flow.loss(BATCH, seeded(seed))
    shapes = [(x.shape[2], t.ndim) for x, t, _ in flow.model.asked]
    assert shapes.count((1, 1)) / num == pytest.approx(0.2, abs=4 * (0.2 * 0.8 / num) ** 0.5)
    assert shapes.count((T, 2)) / num == pytest.approx(0.3, abs=4 * (0.3 * 0.7 / num) ** 0.5)
    assert shapes.count((T, 1)) / num == pytest.approx(0.5, abs=4 * (0.5 * 0.5 / num) ** 0.5)


def vectors(dropout: float, *, num: int) -> torch.Tensor:
    flow = task(condition_dropout=dropout)
    for seed in range(num):
        flow.loss(BATCH, seeded(seed))
    return torch.stack([condition.vector for _, _, condition in flow.model.asked])


def test_dropout_replaces_a_samples_condition_by_the_null():
    assert torch.equal(vectors(0.0, num=5), OWN.expand(5, -1, -1))
    assert not vectors(1.0, num=5).any()
    some = vectors(0.25, num=100)
    dropped = (some == 0).all(-1)
    assert torch.equal(some[~dropped], OWN.expand(100, -1, -1)[~dropped])
    assert dropped.double().mean().item() == pytest.approx(0.25, abs=4 * (0.25 * 0.75 / 400) ** 0.5)
    assert dropped.any(0).all()


def test_a_seed_fixes_the_loss_and_another_seed_draws_other_latents():
    loud = LatentBatch(Posterior(DATA, torch.zeros_like(DATA)), BATCH.condition)
    values = [task().loss(loud, seeded(seed)).value.item() for seed in (0, 0, 1)]
    assert values[0] == values[1] != values[2]


def test_validation_is_repeatable_and_tells_eight_bins_of_t_apart():
    flow = task(lambda x, t: torch.zeros_like(x))
    first, second = (flow.validate(seeded(5)) for _ in range(2))
    assert first == second
    assert flow.validate(seeded(6)) != first
    assert [row["t"] for row in first["bins"]] == [[k / 8, (k + 1) / 8] for k in range(8)]
    assert [row["count"] for row in first["bins"]] == 8 * [B]
    assert first["loss"] == pytest.approx(sum(row["mean"] for row in first["bins"]) / 8)
    for index, (x, t, condition) in enumerate(flow.model.asked[:8]):
        assert (t * 8).long().tolist() == B * [index]
        assert x.shape == DATA.shape
        assert condition.vector is BATCH.condition.vector


def test_a_real_model_has_a_loss_with_gradients():
    torch.manual_seed(0)
    flow = FlowTask(VideoDiT(DIT).double(), FlowConfig(), null=NULL, validation=BATCH)
    flow.loss(BATCH, seeded()).value.backward()
    assert flow.model.out.weight.grad.any()
    assert flow.validate(seeded())["loss"] == pytest.approx(1 + DATA.square().mean().item(), rel=0.2)


def test_previews_are_left_to_the_previewer():
    calls = []
    flow = FlowTask(Spy(true_velocity), FlowConfig(), null=NULL, validation=BATCH, previewer=lambda *a: calls.append(a))
    flow.preview(Path("somewhere"), 7)
    task().preview(Path("somewhere"), 7)
    assert calls == [(Path("somewhere"), 7)]


@pytest.mark.parametrize(
    "changes", [{"given_fraction": 0.5, "image_fraction": 0.0}, {"given_fraction": 0.0, "image_fraction": 0.5}]
)
def test_a_patch_of_several_frames_has_no_frame_alone(changes):
    spy = Spy(true_velocity)
    spy.config = DiTConfig(in_channels=C, dim=12, num_heads=1, layers=(), rope=(4, 4, 4), patch=Patch(2, 2, 2))
    with pytest.raises(ConfigError, match="a patch of 2 latent frames has no frame alone"):
        FlowTask(spy, FlowConfig(**changes), null=NULL, validation=BATCH)
    FlowTask(spy, FlowConfig(given_fraction=0.0), null=NULL, validation=BATCH)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"condition_dropout": 1.5}, "condition_dropout is a share between 0 and 1, got 1.5"),
        ({"given_fraction": -0.1}, "given_fraction is a share"),
        ({"image_fraction": 2.0}, "image_fraction is a share"),
        ({"shift": -1.0}, "shift must be positive, got -1.0; nearest: 1"),
        ({"max_given": 0}, "max_given must be at least 1, got 0"),
    ],
)
def test_impossible_values_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        FlowConfig(**changes)


# --- clips of several shapes in one row ------------------------------------------------------------------------------


def clips_of_any_shape() -> list[LatentBatch]:
    generator, batches = seeded(7), []
    for shape in ((4, 4, 2), (1, 2, 6), (2, 6, 4), (1, 2, 2)):
        data = torch.randn(1, C, *shape, generator=generator, dtype=torch.float64)
        vector = torch.randn(1, 3, generator=generator, dtype=torch.float64)
        batches.append(LatentBatch(Posterior(data, torch.full_like(data, -4.0)), Condition(vector=vector)))
    return batches


def random_network(**changes) -> VideoDiT:
    torch.manual_seed(0)
    model = VideoDiT(replace(DIT, **changes)).double()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


@pytest.mark.parametrize(
    "changes",
    [
        {"given_fraction": 0.5, "image_fraction": 0.2, "shift": SquareRootShift(4)},
        {"tells": ("aspect", "frames")},
        {"parameterization": Parameterization(VariancePreserving(), "noise", learned_variance=True)},
    ],
    ids=["given", "told", "variance"],
)
def test_the_loss_of_a_row_is_the_mean_of_its_clips_losses_with_the_same_draws(changes):
    space = changes.get("parameterization")
    model = random_network(
        numbers=len(changes.get("tells", ())) * (Number(channels=4, scale=1.0),),
        out_channels=2 * C if space is not None else 0,
    )
    flow = FlowTask(model, FlowConfig(**changes), null=NULL, validation=clips_of_any_shape())
    for seed in range(4):
        packed, one, clips = seeded(seed), seeded(seed), clips_of_any_shape()
        row = flow.loss(clips, packed)
        alone = [flow.loss(clip, one) for clip in clips]
        mean = sum(loss.value for loss in alone) / len(alone)
        assert row.value.item() == pytest.approx(mean.item(), rel=1e-10)
        assert (row.num_tokens, row.num_samples) == (sum(loss.num_tokens for loss in alone), 4)
        parameters = list(model.parameters())
        pairs = (torch.autograd.grad(loss, parameters, allow_unused=True) for loss in (row.value, mean))
        for ours, theirs in zip(*pairs, strict=True):
            assert (ours is None) == (theirs is None)
            if ours is not None:
                torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)
        assert torch.equal(packed.get_state(), one.get_state())


def test_a_row_is_validated_clip_by_clip():
    flow = FlowTask(random_network(), FlowConfig(), null=NULL, validation=clips_of_any_shape())
    found = flow.validate(seeded())
    assert found["loss"] > 0
    assert sum(row["count"] for row in found["bins"]) == 4 * len(found["bins"])


def test_a_network_without_numbers_cannot_be_told_of_shapes():
    with pytest.raises(ConfigError, match="a network of 0 numbers cannot be told aspect, frames; nearest: 2"):
        FlowTask(VideoDiT(DIT), FlowConfig(tells=("aspect", "frames")), null=NULL, validation=BATCH)


# One of two networks


@pytest.mark.parametrize("time", [Uniform(), LogitNormal(), CosMap()], ids=lambda time: time.kind)
def test_times_of_a_range_are_drawn_as_the_distribution_has_them_there(time):
    many = LatentBatch(Posterior(*(part[:1].expand(2000, *part.shape[1:]) for part in BATCH.posterior)), Condition())
    flow = task(lambda x, t: x, time=time, shift=3.0, times=(0.3, 0.6), given_fraction=0.0, condition_dropout=0.0)
    flow.null = Condition()
    flow.loss(many, seeded())
    ((_, t, _),) = flow.model.asked
    assert 0.3 <= t.min() < 0.301
    assert 0.599 < t.max() <= 0.6
    whole = task(lambda x, t: x, time=time, shift=3.0, given_fraction=0.0, condition_dropout=0.0)
    whole.null = Condition()
    whole.loss(many, seeded())
    inside = whole.model.asked[0][1]
    inside = inside[(inside >= 0.3) & (inside <= 0.6)]
    shares = torch.linspace(0.1, 0.9, 5)
    torch.testing.assert_close(t.quantile(shares), inside.quantile(shares), atol=2e-3, rtol=0)


def test_validation_asks_about_the_times_that_are_drawn():
    flow = task(lambda x, t: x, times=(0.5, 0.75))
    rows = flow.validate(seeded())["bins"]
    asked = torch.cat([t for _, t, _ in flow.model.asked])
    assert asked.min() >= 0.5
    assert asked.max() <= 0.75
    assert rows[0]["t"] == [0.5, 0.53125]
    assert rows[-1]["t"] == [0.71875, 0.75]
    assert all(row["count"] == B for row in rows)


@pytest.mark.parametrize("times", [(0.5, 0.5), (0.7, 0.2), (-0.1, 0.5), (0.5, 1.5)])
def test_a_range_of_no_times_is_refused(times):
    with pytest.raises(ConfigError, match="times go from a lower to a higher t"):
        FlowConfig(times=times)


def test_a_range_that_the_distribution_never_draws_is_refused():
    with pytest.raises(ConfigError, match=r"has no times between 0\.0 and 0\.01; nearest: time\.kind=uniform"):
        task(time=LogitNormal(mean=0.0, std=0.01), times=(0.0, 0.01)).loss(BATCH, seeded())


# A subject, and what was there before


def test_the_loss_of_a_subject_is_its_own_and_the_prior_s_in_its_weight():
    flow = task(lambda x, t: 0.3 * x)
    other = LatentBatch(Posterior(2 * DATA[:3], torch.full_like(DATA[:3], -200.0)), Condition(vector=OWN[:3]))
    both = flow.loss(Preserved(BATCH, other, 0.25), seeded(7))
    generator = seeded(7)
    own, prior = flow.loss(BATCH, generator), flow.loss(other, generator)
    assert own.value != prior.value
    assert both.value == own.value + 0.25 * prior.value
    assert (both.parts["own"], both.parts["prior"]) == (own.value, prior.value)
    assert (both.num_samples, both.num_tokens) == (7, own.num_tokens + prior.num_tokens)


def test_clips_of_several_shapes_have_a_prior_too():
    short = LatentBatch(Posterior(*(part[:1, :, :1] for part in BATCH.posterior)), Condition(vector=OWN[:1]))
    model = VideoDiT(DIT).double()
    flow = FlowTask(model, FlowConfig(), null=NULL, validation=BATCH)
    generator = seeded()
    alone = flow.loss([short, short], generator).value + 2 * flow.loss(BATCH, generator).value
    assert flow.loss(Preserved([short, short], BATCH, 2.0), seeded()).value == alone
