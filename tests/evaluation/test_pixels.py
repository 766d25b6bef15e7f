import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from reelflow.errors import ConfigError
from reelflow.evaluation.pixels import check_clip, drift, first_frame_agreement, flicker, jitter, psnr, ssim


def noise_clip(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype) * 2 - 1


def alternating(num_frames: int) -> torch.Tensor:
    """Black, white, black, ..."""
    signs = torch.arange(num_frames) % 2 * 2.0 - 1
    return signs.view(1, 1, -1, 1, 1).expand(1, 3, num_frames, 4, 4)


def naive_ssim(a: torch.Tensor, b: torch.Tensor) -> float:
    """The paper's equations, window by window, for one clip, with pixels from 0 to 255 as in the paper."""
    a, b = (a + 1) * 127.5, (b + 1) * 127.5
    weight = [[math.exp(-((y - 5) ** 2 + (x - 5) ** 2) / (2 * 1.5**2)) for x in range(11)] for y in range(11)]
    weight = torch.tensor(weight, dtype=torch.float64)
    weight /= weight.sum()
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    values = []
    for c, t in ((c, t) for c in range(3) for t in range(a.shape[1])):
        for y, x in ((y, x) for y in range(a.shape[2] - 10) for x in range(a.shape[3] - 10)):
            p, q = a[c, t, y : y + 11, x : x + 11], b[c, t, y : y + 11, x : x + 11]
            mp, mq = (weight * p).sum(), (weight * q).sum()
            vp, vq = (weight * (p - mp) ** 2).sum(), (weight * (q - mq) ** 2).sum()
            cov = (weight * (p - mp) * (q - mq)).sum()
            values.append((2 * mp * mq + c1) * (2 * cov + c2) / ((mp**2 + mq**2 + c1) * (vp + vq + c2)))
    return torch.stack(values).mean().item()


def test_psnr_of_a_constant_error_is_known_and_is_taken_clip_by_clip():
    a = torch.zeros(2, 3, 4, 5, 6)
    b = torch.stack([a[0] + 0.2, a[1] + 1.0])
    assert psnr(a, b).tolist() == pytest.approx([20.0, 20 * math.log10(2)], abs=1e-4)


def test_psnr_of_equal_clips_is_infinite():
    clip = noise_clip(2, 3, 2, 4, 4)
    assert psnr(clip, clip).tolist() == [math.inf, math.inf]


def test_psnr_averages_the_error_over_frames_before_the_logarithm():
    a = torch.zeros(1, 3, 2, 4, 4)
    b = a.clone()
    b[:, :, 1] = 0.2  # one frame perfect, one at 20 dB
    assert psnr(a, b).item() == pytest.approx(20 + 10 * math.log10(2), abs=1e-4)


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 1000), finer=st.floats(0.1, 0.9))
def test_psnr_is_symmetric_and_falls_with_the_error(seed, finer):
    a, error = noise_clip(2, 3, 3, 5, 4, seed=seed) / 2, noise_clip(2, 3, 3, 5, 4, seed=seed + 1) / 2
    assert torch.equal(psnr(a, a + error), psnr(a + error, a))
    assert (psnr(a, a + finer * error) > psnr(a, a + error)).all()


def test_ssim_is_the_papers_window_by_window():
    a = noise_clip(2, 3, 2, 13, 14, dtype=torch.float64)
    b = (a + 0.5 * noise_clip(2, 3, 2, 13, 14, seed=1, dtype=torch.float64)).clamp(-1, 1)
    expected = [naive_ssim(a[k], b[k]) for k in range(2)]
    assert ssim(a, b).tolist() == pytest.approx(expected, abs=1e-12)


def test_ssim_is_one_for_equal_clips_negative_for_inverted_ones_and_symmetric():
    a, b = noise_clip(1, 3, 2, 16, 16), noise_clip(1, 3, 2, 16, 16, seed=1)
    assert ssim(a, a).item() == pytest.approx(1)
    assert ssim(a, -a).item() < -0.5
    torch.testing.assert_close(ssim(a, b), ssim(b, a))


def test_ssim_forgives_a_shift_in_brightness_that_psnr_holds_against_a_clip():
    a = noise_clip(1, 3, 2, 16, 16) / 2
    shifted, noisy = a + 0.1, a + 0.1 * noise_clip(1, 3, 2, 16, 16, seed=1).sign()
    torch.testing.assert_close(psnr(a, shifted), psnr(a, noisy), atol=0.01, rtol=0)
    assert ssim(a, shifted) > ssim(a, noisy)


def test_half_precision_clips_are_measured_in_single_precision():
    a, b = noise_clip(1, 3, 2, 16, 16).bfloat16(), noise_clip(1, 3, 2, 16, 16, seed=1).bfloat16()
    for measure in (psnr, ssim):
        torch.testing.assert_close(measure(a, b), measure(a.float(), b.float()))


def test_flicker_and_jitter_run_from_a_still_at_0_to_alternation_at_1():
    still = noise_clip(1, 3, 1, 4, 4).expand(1, 3, 6, 4, 4)
    assert flicker(still).item() == jitter(still).item() == 0
    assert flicker(alternating(6)).item() == jitter(alternating(6)).item() == 1


def test_a_fade_is_flicker_but_not_jitter():
    fade = torch.linspace(-1, 1, 9, dtype=torch.float64).view(1, 1, 9, 1, 1).expand(1, 3, 9, 4, 4)
    assert flicker(fade).item() == pytest.approx(1 / 8)
    assert jitter(fade).item() == pytest.approx(0, abs=1e-12)


def test_a_frame_out_of_line_shows_in_the_jitter_of_a_moving_scene():
    ramp = torch.linspace(-0.5, 0.5, 8).expand(1, 3, 9, 4, 8)
    moving = ramp + torch.linspace(-0.3, 0.3, 9).view(1, 1, 9, 1, 1)
    blinking = moving.clone()
    blinking[:, :, 4] += 0.1
    assert jitter(blinking).item() > 100 * jitter(moving).item()
    assert flicker(blinking).item() < 1.5 * flicker(moving).item()


def test_first_frame_agreement_looks_at_the_first_frame_alone():
    clip = noise_clip(2, 3, 4, 6, 6) / 2
    other = clip.clone()
    other[:, :, 1:] = 0
    assert first_frame_agreement(other, clip[:, :, 0]).tolist() == [math.inf, math.inf]
    assert first_frame_agreement(clip, clip[:, :, 0] + 0.2).tolist() == pytest.approx([20.0, 20.0], abs=1e-4)


def test_drift_is_the_slope_of_colour_and_of_contrast():
    pattern = noise_clip(1, 3, 1, 8, 8, dtype=torch.float64) / 4
    pattern = (pattern - pattern.mean((3, 4), keepdim=True)) / pattern.std((3, 4), correction=0, keepdim=True) / 8
    time = torch.arange(5, dtype=torch.float64).view(1, 1, 5, 1, 1)
    colour = torch.tensor([0.01, -0.02, 0.0], dtype=torch.float64)
    found = drift(colour.view(1, 3, 1, 1, 1) * time + pattern * (1 + 0.16 * time))
    torch.testing.assert_close(found.mean, colour[None])
    torch.testing.assert_close(found.std, torch.full((1, 3), 0.02, dtype=torch.float64))


@pytest.mark.parametrize("measure", [psnr, ssim])
def test_clips_of_unequal_shape_are_refused_by_both_names(measure):
    with pytest.raises(ConfigError, match=r"\[1, 3, 2, 12, 12\] and \[1, 3, 1, 12, 12\]"):
        measure(torch.zeros(1, 3, 2, 12, 12), torch.zeros(1, 3, 1, 12, 12))
    with pytest.raises(ConfigError, match=r"image must be shaped like a frame, \[1, 3, 12, 12\], got \[3, 12, 12\]"):
        first_frame_agreement(torch.zeros(1, 3, 2, 12, 12), torch.zeros(3, 12, 12))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (torch.zeros(3, 2, 4, 4), "B 3 T H W"),
        (torch.zeros(1, 1, 2, 4, 4), "B 3 T H W"),
        (torch.zeros(0, 3, 2, 4, 4), "B 3 T H W"),
        (torch.zeros(1, 3, 2, 4, 4, dtype=torch.uint8), "uint8"),
        (torch.full((1, 3, 2, 4, 4), 255.0), "255"),
        (torch.full((1, 3, 2, 4, 4), -1.02), "clamped"),
        (torch.full((1, 3, 2, 4, 4), math.nan), "nan"),
    ],
)
def test_what_is_no_clip_is_refused(wrong, message):
    with pytest.raises(ConfigError, match=message):
        check_clip(wrong)


def test_the_second_clip_is_checked_too():
    with pytest.raises(ConfigError, match="uint8"):
        psnr(torch.zeros(1, 3, 2, 4, 4), torch.zeros(1, 3, 2, 4, 4, dtype=torch.uint8))


def test_too_small_or_too_short_clips_are_refused():
    with pytest.raises(ConfigError, match="11 x 11, got 10 x 12"):
        ssim(torch.zeros(1, 3, 1, 10, 12), torch.zeros(1, 3, 1, 10, 12))
    for measure, least in ((flicker, 2), (jitter, 3), (drift, 2)):
        with pytest.raises(ConfigError, match=f"at least {least} frames, got {least - 1}"):
            measure(torch.zeros(1, 3, least - 1, 4, 4))
