from dataclasses import replace
from pathlib import Path

import pytest
import torch

from reelflow.errors import ConfigError
from reelflow.models.vae import CausalVAE, Posterior, Stage, staged
from reelflow.training.autoencoder import AutoencoderConfig, AutoencoderTask, draw_crops, to_float

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
