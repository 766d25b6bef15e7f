from pathlib import Path

import pytest
import torch

from reelflow.diffusion.process import along_frames
from reelflow.errors import ConfigError
from reelflow.models.blocks import Single
from reelflow.models.condition import Condition
from reelflow.models.dit import DiTConfig, VideoDiT
from reelflow.models.vae import Posterior
from reelflow.nn.patchify import Patch
from reelflow.training.flow import FlowConfig, FlowTask, LatentBatch

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
@pytest.mark.parametrize("time", ["uniform", "logit_normal"])
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
        assert condition is BATCH.condition


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
        ({"std": 0.0}, "std and shift must be positive, got 0.0 and 1.0"),
        ({"shift": -1.0}, "std and shift must be positive"),
        ({"max_given": 0}, "max_given must be at least 1, got 0"),
    ],
)
def test_impossible_values_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        FlowConfig(**changes)
