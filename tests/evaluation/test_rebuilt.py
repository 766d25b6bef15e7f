import pytest
import torch

from reelflow.errors import ConfigError
from reelflow.evaluation.pixels import psnr, ssim
from reelflow.evaluation.rebuilt import best_resampled, measure_rebuilt, resampled


def noise(frames: int = 5, size: int = 24) -> torch.Tensor:
    return torch.rand(5, 3, frames, size, size, generator=torch.Generator().manual_seed(0)) * 2 - 1


def smooth(frames: int = 9) -> torch.Tensor:
    """A slope that brightens steadily."""
    t, x = torch.linspace(-0.4, 0.4, frames).view(-1, 1, 1), torch.linspace(-0.5, 0.5, 24)
    return (t + x).expand(1, 3, frames, 24, 24).clone()


def test_clips_rebuilt_perfectly_have_perfect_measures():
    values = measure_rebuilt(noise(), noise())
    assert values["perceptual"] == 0
    assert values["ssim"] == pytest.approx(1)
    assert values["flicker_ratio"] == pytest.approx(1)
    assert values["frechet_pixel_pyramid"] == pytest.approx(0, abs=1e-6)


def test_measures_are_means_over_all_clips():
    clips, rebuilt = noise(), noise().roll(1, 0)
    rebuilt[4] = clips[4]
    values = measure_rebuilt(rebuilt, clips, perceptual=lambda a, b: (a - b).abs().mean())
    assert values["perceptual"] == pytest.approx((rebuilt - clips).abs().mean().item())
    assert values["ssim"] == pytest.approx(ssim(rebuilt, clips).mean().item(), rel=1e-5)


def test_frozen_clips_have_no_flicker_and_small_or_short_ones_fewer_measures():
    clips = noise()
    assert measure_rebuilt(clips[:, :, :1].expand_as(clips), clips)["flicker_ratio"] == 0
    assert measure_rebuilt(clips[..., :8, :8], clips[..., :8, :8]).keys() == {"perceptual", "flicker_ratio"}
    assert measure_rebuilt(clips[:, :, :1], clips[:, :, :1]).keys() == {"perceptual", "ssim"}


@pytest.mark.parametrize("time", [1, 2, 4])
def test_resampling_by_one_in_space_keeps_what_is_steady(time):
    again = resampled(smooth(), float(time), time=time)
    inner = slice(0, 9 - time)  # the last half step has nothing beyond it
    torch.testing.assert_close(again[:, :, inner], smooth()[:, :, inner], atol=0.03, rtol=0)


def test_resampling_loses_what_it_cannot_hold():
    clips = noise(9)
    found = [psnr(resampled(clips, factor), clips).mean().item() for factor in (1.0, 4.0, 16.0)]
    assert found[0] > 60
    assert found == sorted(found, reverse=True)


def test_the_best_resampling_of_a_still_is_in_time_and_of_flat_flashes_in_space():
    still, flashes = noise(1).expand(-1, -1, 9, -1, -1), noise(9)[..., :1, :1].expand(-1, -1, -1, 24, 24)
    assert best_resampled(still, 4.0, times=(1, 2, 4))[0] == 4
    assert best_resampled(flashes, 4.0, times=(1, 2, 4))[0] == 1


def test_a_resampling_that_cannot_be_is_refused():
    with pytest.raises(ConfigError, match=r"1 \+ 4 k frames"):
        resampled(noise(6), 8.0, time=4)
    with pytest.raises(ConfigError, match="a factor of at least 4"):
        resampled(noise(5), 2.0, time=4)
