import json
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from reelflow.data.loader import ShuffledBatches
from reelflow.errors import ConfigError
from reelflow.models.vae import CausalVAE, Posterior, Stage, staged
from reelflow.training.autoencoder import (
    AutoencoderConfig,
    AutoencoderTask,
    Crops,
    draw_crops,
    frame_latents,
    haar_bands,
    outlier_penalty,
    to_float,
    weight_of_mean,
)
from reelflow.training.discriminator import Adversarial
from reelflow.training.loop import TrainingConfig, train
from reelflow.training.optim import OptimizerConfig

VAE = staged(2, (Stage(8, 0, space=2, time=2),), (Stage(8, 0, space=2, time=2),))
CONFIG = AutoencoderConfig(crop_frames=3, crop_size=4)
T, H, W = 6, 10, 12
UNIT = torch.tensor([40, 20, 20])  # grey levels per frame, row and column


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def coordinates(num_clips: int) -> torch.Tensor:
    """Clips whose pixels say where they are."""
    grid = torch.stack(torch.meshgrid(torch.arange(T), torch.arange(H), torch.arange(W), indexing="ij"), dim=-1)
    return (grid * UNIT).byte().expand(num_clips, -1, -1, -1, -1)


def autoencoder(seed: int = 0) -> CausalVAE:
    torch.manual_seed(seed)
    return CausalVAE(VAE)


def task(model: CausalVAE | None = None, config: AutoencoderConfig = CONFIG, **options) -> AutoencoderTask:
    return AutoencoderTask(model or autoencoder(), config, **{"validation": coordinates(2), **options})


def test_stored_frames_become_clips_between_minus_one_and_one():
    frames = torch.zeros(1, 2, 1, 3, 3, dtype=torch.uint8)
    frames[0, 1, 0, 2] = torch.tensor([255, 0, 51], dtype=torch.uint8)
    clip = to_float(frames)
    assert clip.shape == (1, 3, 2, 1, 3)
    torch.testing.assert_close(clip[0, :, 1, 0, 2], torch.tensor([1.0, -1.0, -0.6]))
    assert (clip[0, :, 0] == -1).all()


def test_crops_are_windows_of_their_clip_and_every_window_can_be_drawn():
    starts = []
    for seed in range(60):
        crops = (draw_crops(coordinates(4), replace(CONFIG, image_fraction=0.0), seeded(seed)) + 1) * 127.5
        assert crops.shape == (4, 3, 3, 4, 4)
        places = crops.round() / UNIT.view(3, 1, 1, 1)
        first = places[:, :, :1, :1, :1]
        window = torch.stack(torch.meshgrid(torch.arange(3), torch.arange(4), torch.arange(4), indexing="ij"))
        assert torch.equal(places, first + window)
        starts.append(first.flatten(1))
    starts = torch.cat(starts)
    assert starts.amin(0).tolist() == [0, 0, 0]
    assert starts.amax(0).tolist() == [T - 3, H - 4, W - 4]


def test_a_crop_as_large_as_the_clip_is_the_clip():
    clips = torch.randint(256, (2, 3, 4, 4, 3), generator=seeded(), dtype=torch.uint8)
    assert torch.equal(draw_crops(clips, replace(CONFIG, image_fraction=0.0), seeded()), to_float(clips))


def test_a_batch_of_images_is_the_frames_of_the_crops():
    clips, images = (draw_crops(coordinates(2), replace(CONFIG, image_fraction=f), seeded()) for f in (0.0, 1.0))
    assert images.shape == (2 * 3, 3, 1, 4, 4)
    assert torch.equal(images, clips.transpose(1, 2).flatten(0, 1)[:, :, None])


def test_of_many_candidates_the_crop_with_something_in_it_is_kept():
    clips = torch.full((3, T, H, W, 3), 90, dtype=torch.uint8)
    clips[:, :, 0, 0] = 200

    def hits(candidates: int) -> float:
        config = replace(CONFIG, candidates=candidates, image_fraction=0.0)
        crops = torch.cat([draw_crops(clips, config, seeded(seed)) for seed in range(20)])
        return (crops.amax((1, 2, 3, 4)) > 0).double().mean().item()

    assert hits(1) < 0.2  # one window in 63
    assert hits(300) > 0.9


def test_a_seed_fixes_the_crops():
    assert torch.equal(draw_crops(coordinates(3), CONFIG, seeded()), draw_crops(coordinates(3), CONFIG, seeded()))
    assert not torch.equal(draw_crops(coordinates(3), CONFIG, seeded()), draw_crops(coordinates(3), CONFIG, seeded(1)))


def test_the_loss_is_the_written_sum_of_its_parts():
    config = replace(CONFIG, l1=0.7, l2=1.3, temporal=0.4, kl=0.01, perceptual=2.0)
    model, batch, seen = autoencoder(), draw_crops(coordinates(2), replace(CONFIG, image_fraction=0.0), seeded(3)), []

    def perceptual(a, b):
        seen.append((a, b))
        return (a.mean() - b.mean()).abs()

    loss = task(model, config, perceptual=perceptual).loss(batch, seeded(1))
    posterior = model.encode(batch)
    decoded = model.decode(posterior.sample(seeded(1)))
    error = decoded - batch
    expected = {
        "l1": error.abs().mean(),
        "l2": (error**2).mean(),
        "kl": (posterior.mean**2 + posterior.logvar.exp() - 1 - posterior.logvar).mean() / 2,
        "temporal": (error[:, :, 1:] - error[:, :, :-1]).abs().mean(),
        "perceptual": (decoded.mean() - batch.mean()).abs(),
    }
    assert loss.parts.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(loss.parts[name], value)
    total = sum(getattr(config, name) * value for name, value in expected.items())
    torch.testing.assert_close(loss.value, total)
    torch.testing.assert_close(seen[0], (decoded, batch))
    assert (loss.num_samples, loss.num_tokens) == (2, 2 * 2 * 2 * 2)


def test_images_have_no_temporal_loss_and_train_every_weight():
    model, images = autoencoder(), draw_crops(coordinates(2), replace(CONFIG, image_fraction=1.0), seeded())
    loss = task(model).loss(images, seeded())
    assert loss.parts.keys() == {"l1", "l2", "kl"}
    loss.value.backward()
    assert all(p.grad.any() for p in model.parameters())


class Echo(CausalVAE):
    """Gives back what it was shown, wrong by 0.1 for black clips and by 0.2 for others."""

    def encode(self, clip):
        self.shown = clip
        return Posterior(torch.zeros(1, 2, 1, 1, 1), torch.zeros(1, 2, 1, 1, 1))

    def decode(self, latents):
        black = self.shown.amax((1, 2, 3, 4), keepdim=True) == -1
        return self.shown + torch.where(black, 0.1, 0.2)


def test_validation_is_the_mean_psnr_of_all_clips():
    clips = torch.zeros(5, T, H, W, 3, dtype=torch.uint8)
    clips[4, 2:] = 128
    scores = task(Echo(VAE), validation=clips).validate(seeded())
    ten, fifth = (10 * torch.log10(torch.tensor(4 / error**2)).item() for error in (0.1, 0.2))
    assert scores["psnr"] == pytest.approx((4 * ten + fifth) / 5, abs=1e-3)
    assert scores["psnr_image"] == pytest.approx(ten, abs=1e-3)  # its first frame is black
    assert scores["loss"] == -scores["psnr"]


def test_pixels_out_of_range_are_not_counted_as_errors():
    white = torch.full((1, 3, 2, 2, 3), 255, dtype=torch.uint8)
    scores = task(Echo(VAE), AutoencoderConfig(crop_frames=1, crop_size=2), validation=white).validate(seeded())
    assert scores["psnr"] == float("inf")


def test_previews_are_left_to_the_previewer():
    calls = []
    task(previewer=lambda *arguments: calls.append(arguments)).preview(Path("somewhere"), 7)
    task().preview(Path("somewhere"), 7)
    assert calls == [(Path("somewhere"), 7)]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"crop_frames": 4}, r"num_frames must be 1 \+ 2 k, got 4; nearest: 3 or 5"),
        ({"crop_size": 5}, "height must be a multiple of 2"),
        ({"crop_frames": 7}, "crops of 7 x 4 x 4 do not fit clips of 6 x 10 x 12"),
        ({"crop_size": 12}, "crops of 3 x 12 x 12 do not fit clips of 6 x 10 x 12"),
        ({"perceptual": 0.1}, "a perceptual weight needs a network"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_computed(changes, message):
    with pytest.raises(ConfigError, match=message):
        task(config=replace(CONFIG, **changes))


@pytest.mark.parametrize("changes", [{"crop_frames": 0}, {"crop_size": 0}, {"candidates": 0}, {"image_fraction": 1.1}])
def test_impossible_values_are_refused(changes):
    with pytest.raises(ConfigError, match=r"must be at least 1|share between 0 and 1, got 1\.1"):
        replace(CONFIG, **changes)


# Terms of published recipes


def test_wavelet_bands_keep_the_norm_and_a_flat_clip_has_means_only():
    clip = torch.randn(2, 3, 4, 6, 8, generator=seeded())
    bands = haar_bands(clip)
    assert bands.shape == (2, 3, 8, 2, 3, 4)
    torch.testing.assert_close(bands.square().sum(), clip.square().sum())
    flat = haar_bands(torch.full((1, 3, 4, 4, 4), 0.5))
    torch.testing.assert_close(flat[:, :, 0], torch.full((1, 3, 2, 2, 2), 0.5 * 8**0.5))
    assert not flat[:, :, 1:].any()


@pytest.mark.parametrize(("axis", "band"), [(2, 4), (3, 2), (4, 1)])
def test_a_change_along_one_axis_lies_in_one_band(axis, band):
    clip = torch.tensor([1.0, -1.0]).view([2 if i == axis else 1 for i in range(5)]).expand(1, 3, 2, 2, 2)
    assert haar_bands(clip).abs().amax((0, 1, 3, 4, 5)).nonzero().flatten().tolist() == [band]


def test_an_image_and_an_odd_clip_begin_with_a_still_cell():
    clip = torch.randn(1, 3, 3, 4, 4, generator=seeded())
    assert haar_bands(clip)[:, :, 4:, 0].abs().max() < 1e-6
    assert torch.equal(haar_bands(clip[:, :, :1]), haar_bands(clip)[:, :, :, :1])


def test_only_what_lies_beyond_r_deviations_is_an_outlier():
    latents = torch.zeros(1, 2, 1, 10, 10)
    latents[0, :, 0, 3, 4] = torch.tensor([3.0, 4.0])
    mean, far = 0.05, 5 * 0.99
    deviation = (mean * far) ** 0.5  # of the norm: p (1 - p) 5^2
    expected = (far - 3 * deviation) / 100
    assert outlier_penalty(latents).item() == pytest.approx(expected, rel=1e-5)
    assert outlier_penalty(torch.randn(1, 2, 3, 8, 8, generator=seeded()).clamp(-1, 1)) == 0


def test_a_learned_log_variance_rests_where_it_is_the_log_of_the_distance():
    config = replace(CONFIG, log_variance=0.3, kl=0.02)
    own, batch = task(config=config), to_float(coordinates(2))[:, :, :3, :4, :4]
    loss = own.loss(batch, seeded())
    plain = task(own.vae, replace(CONFIG, kl=0.0)).loss(batch, seeded()).value
    torch.testing.assert_close(loss.value, plain * 2.718281828**-0.3 + 0.3 + 0.02 * loss.parts["kl"])
    s = dict(own.model.named_parameters())["log_variance"]
    with torch.no_grad():
        s.copy_(plain.log())
    own.loss(batch, seeded()).value.backward()
    assert abs(s.grad.item()) < 1e-6


def test_wavelet_outlier_and_identity_terms_are_added_by_their_weights():
    vae, batch = autoencoder(), to_float(coordinates(2))[:, :, :3, :4, :4]
    weights = {"wavelet": 0.3, "outlier": 2.0, "identity": 0.7}
    base = task(vae).loss(batch, seeded())
    loss = task(vae, replace(CONFIG, **weights), reference=lambda clip: torch.ones(2, 2, 2, 2, 2)).loss(batch, seeded())
    torch.testing.assert_close(loss.value, base.value + sum(w * loss.parts[name] for name, w in weights.items()))
    torch.testing.assert_close(loss.parts["identity"], (vae.encode(batch).mean - 1).abs().mean())


def test_the_reference_of_a_clip_is_the_latents_of_its_frames_as_images():
    vae, clip = autoencoder(), to_float(coordinates(2))[:, :, :5, :4, :4]
    latents = frame_latents(vae, 2)(clip)
    for index, frame in enumerate((0, 2, 4)):
        torch.testing.assert_close(latents[:, :, index], vae.encode(clip[:, :, frame : frame + 1]).mean[:, :, 0])
    assert not latents.requires_grad


def test_a_weight_of_sums_and_its_weight_of_means_pull_the_same_way():
    pixels, latents = torch.rand(3 * 4 * 8 * 8), torch.rand(2 * 2 * 4 * 4)  # the values of one clip but frame 0
    means = pixels.mean() + weight_of_mean(1e-3, VAE) * latents.mean()
    torch.testing.assert_close(means * len(pixels), pixels.sum() + 1e-3 * latents.sum())


# What learns, and on what


def trained(folder: Path, config: AutoencoderConfig, *, stop: int | None = None, **changes) -> AutoencoderTask:
    """Six steps on clips of noise; with `stop`, the process dies after so many."""
    own = task(config=config, validation=coordinates(2)[:, :5])
    clips = torch.randint(256, (5, 3, 8, 8, 3), generator=seeded(), dtype=torch.uint8)
    optimizer = OptimizerConfig(lr=1e-2, muon_lr=0.02, warmup_steps=0, decay="constant")
    training = TrainingConfig(
        steps=6, batch_size=2, optimizer=optimizer, seed=0, ema_decay=0.9, log_every=1, checkpoint_every=2, **changes
    )

    def die(step: int) -> None:
        if step == stop:
            raise SystemError

    with ShuffledBatches(
        5, 2, lambda rows, g: draw_crops(clips[rows], config, g, progress=batches.consumed / 6), seed=1, prefetch=0
    ) as batches:
        train(own, batches, training, folder, hidden=own.hidden, on_step=die, console=Console(quiet=True))
    return own


def test_training_the_decoder_alone_leaves_latents_as_they_were_to_the_last_bit(tmp_path):
    before, clip = autoencoder(), to_float(coordinates(2))[:, :, :3, :4, :4]
    after = trained(tmp_path, replace(CONFIG, learned="decoder")).vae
    average = load_file(tmp_path / "step-00000006" / "ema.safetensors")
    averaged = deepcopy(before)
    averaged.load_state_dict(average)
    for model in (after, averaged):
        with torch.no_grad():
            for one, two in zip(before.encode(clip), model.encode(clip), strict=True):
                assert torch.equal(one, two)
            latents = before.encode(clip).mean
            assert not torch.equal(before.decode(latents), model.decode(latents))


GAN = replace(CONFIG, log_variance=0.0, adversarial=Adversarial(start=2, channels=8, layers=2))


def test_an_adversarial_run_killed_and_resumed_ends_bit_identical(tmp_path):
    trained(tmp_path / "whole", GAN, validate_every=3)
    with pytest.raises(SystemError):
        trained(tmp_path / "killed", GAN, stop=5, validate_every=3)  # one step past a checkpoint
    trained(tmp_path / "killed", GAN, validate_every=3)
    for name in ("weights", "ema", "optimizer"):
        one, two = (load_file(tmp_path / run / "step-00000006" / f"{name}.safetensors") for run in ("whole", "killed"))
        assert one.keys() == two.keys()
        assert all(torch.equal(value, two[key]) for key, value in one.items())
    lines = [json.loads(line) for line in (tmp_path / "whole" / "log.jsonl").read_text().splitlines()]
    begun = [line["step"] for line in lines if "hinge" in line]
    assert begun == [3, 4, 5, 6]
    assert {"real_accuracy", "fake_accuracy", "adaptive_weight", "adversarial"} <= lines[-2].keys()
    assert isinstance(lines[-1]["health"], list)


def test_both_sides_learn_each_from_its_own_loss():
    own, batch = task(config=replace(GAN, log_variance=None)), to_float(coordinates(2))[:, :, :3, :4, :4]
    for _ in range(3):
        loss = own.loss(batch, seeded())
    c, parts = own.config, loss.parts
    vae, discriminator = (list(part.parameters()) for part in (own.vae, own.model.discriminator))

    def gradients(value: torch.Tensor, weights: list[torch.Tensor]) -> tuple[torch.Tensor | None, ...]:
        return torch.autograd.grad(value, weights, retain_graph=True, allow_unused=True)

    fooled = 0.05 * parts["adaptive_weight"] * parts["adversarial"]
    alone = c.l1 * parts["l1"] + c.l2 * parts["l2"] + c.temporal * parts["temporal"] + c.kl * parts["kl"]
    torch.testing.assert_close(gradients(loss.value, vae), gradients(alone + fooled, vae))
    torch.testing.assert_close(gradients(loss.value, discriminator), gradients(parts["hinge"], discriminator))
    assert set(gradients(fooled, discriminator)) == set(gradients(parts["hinge"], vae)) == {None}


SCHEDULE = (Crops(0.5, frames=(1, 3), sizes=(4,)), Crops(1.0, frames=(5,), sizes=(6, 8)))


def test_the_schedule_says_which_lengths_and_sizes_are_drawn_and_when():
    config = replace(CONFIG, schedule=SCHEDULE, image_fraction=0.0)

    def drawn(progress: float) -> set[tuple[int, int]]:
        shapes = (draw_crops(coordinates(1), config, seeded(s), progress=progress).shape for s in range(20))
        return {(shape[2], shape[3]) for shape in shapes}

    assert drawn(0.0) == drawn(0.49) == {(1, 4), (3, 4)}
    assert drawn(0.5) == drawn(0.99) == {(5, 6), (5, 8)}
    assert config.crops == ((1, 4), (3, 4), (5, 6), (5, 8))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schedule": SCHEDULE[:1]}, r"rising shares of the run, the last 1; got \[0\.5\]"),
        ({"schedule": SCHEDULE[::-1]}, "rising shares"),
        ({"wavelet": 0.1, "schedule": (Crops(1.0, (1,), (4, 5)),)}, "wavelets need crops of an even size"),
    ],
)
def test_an_impossible_schedule_is_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        replace(CONFIG, **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schedule": (Crops(1.0, (3, 4), (4,)),)}, r"num_frames must be 1 \+ 2 k, got 4"),
        ({"schedule": (Crops(1.0, (3,), (4, 12)),)}, "crops of 3 x 12 x 12 do not fit"),
        ({"identity": 0.1}, "pass reference="),
        ({"identity": 0.1, "learned": "decoder"}, "pass reference="),
    ],
)
def test_terms_and_schedules_that_do_not_fit_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        task(config=replace(CONFIG, **changes))


def test_validation_adds_what_is_measured_and_names_what_fails(caplog):
    silent = task(Echo(VAE), measure=lambda rebuilt, clips: {"flicker_ratio": 2.0}).validate(seeded())
    assert silent["flicker_ratio"] == 2.0
    assert silent["channels_used"] == 0
    named = " ".join(silent["health"])
    assert "rebuilt clips flicker (flicker_ratio 2)" in named
    assert "channels are silent" in named
    assert [record.message for record in caplog.records] == silent["health"]
