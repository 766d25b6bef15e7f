import json
import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from reelflow.config import to_dict
from reelflow.errors import ConfigError, DataError
from reelflow.evaluation.frechet import (
    FeatureStatistics,
    FrechetResult,
    PixelPyramid,
    frechet_between,
    frechet_distance,
)

FRAMES, SIZE = 8, 16
PYRAMID = PixelPyramid(num_frames=FRAMES, size=(SIZE, SIZE))


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def features(n: int, d: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, d, generator=generator(seed), dtype=torch.float64)


def statistics(vectors: torch.Tensor) -> FeatureStatistics:
    result = FeatureStatistics(vectors.shape[1])
    result.update(vectors)
    return result


def gaussian(mean: torch.Tensor, covariance: torch.Tensor) -> FeatureStatistics:
    """Statistics whose mean and covariance are exactly these."""
    values = {"count": 2, "mean": mean.tolist(), "scatter": covariance.tolist()}
    return FeatureStatistics.from_dict(values)


def rotation(d: int, seed: int) -> torch.Tensor:
    return torch.linalg.qr(features(d, d, seed)).Q


def moving_blobs(n: int, seed: int = 0) -> torch.Tensor:
    """Clips in which a soft coloured blob crosses a dark frame at its own speed."""
    draw = generator(seed)
    start, speed, colour = (torch.rand(n, k, generator=draw) for k in (2, 2, 3))
    time = torch.linspace(-0.5, 0.5, FRAMES)
    centre = (0.35 + 0.3 * start)[:, None] + 0.5 * (speed - 0.5)[:, None] * time[:, None]  # n T 2
    grid = torch.linspace(0, 1, SIZE)
    y, x = (torch.exp(-((grid - centre[..., k, None]) ** 2) / 0.01) for k in (0, 1))
    blob = y[..., :, None] * x[..., None, :]
    return blob[:, None] * (0.5 + colour[:, :, None, None, None]) - 0.8


def blurred(clips: torch.Tensor, passes: int) -> torch.Tensor:
    for _ in range(passes):
        clips = torch.nn.functional.avg_pool3d(clips, (1, 3, 3), stride=1, padding=(0, 1, 1), count_include_pad=False)
    return clips


def noisy(clips: torch.Tensor, tenths: int) -> torch.Tensor:
    return (clips + 0.1 * tenths * torch.randn(clips.shape, generator=generator(5))).clamp(-1, 1)


def shuffled(clips: torch.Tensor, swaps: int) -> torch.Tensor:
    order = torch.arange(FRAMES)
    order[: 2 * swaps] = order[: 2 * swaps].view(-1, 2).flip(1).flatten()  # neighbours change places
    return clips[:, :, order]


def test_means_apart_by_a_vector_are_apart_by_its_squared_length():
    cov = features(4, 4) @ features(4, 4).T
    shift = torch.tensor([1.0, -2.0, 0.5, 0.0], dtype=torch.float64)
    distance = frechet_distance(gaussian(torch.zeros_like(shift), cov), gaussian(shift, cov))
    assert distance == pytest.approx(5.25)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 1000), d=st.integers(1, 8))
def test_commuting_covariances_have_a_closed_form(seed, d):
    q, a, b = rotation(d, seed), features(1, d, seed + 1)[0] ** 2, features(1, d, seed + 2)[0] ** 2
    zero = torch.zeros(d, dtype=torch.float64)
    distance = frechet_distance(gaussian(zero, (q * a) @ q.T), gaussian(zero, (q * b) @ q.T))
    assert distance == pytest.approx((a.sqrt() - b.sqrt()).square().sum().item(), abs=1e-9)


def test_covariances_that_do_not_commute_match_the_eigenvalues_of_their_product():
    a, b = (features(9, 5, seed).T @ features(9, 5, seed) for seed in (0, 1))
    zero = torch.zeros(5, dtype=torch.float64)
    roots = torch.linalg.eigvals(a @ b).real.sqrt().sum()
    expected = (a.trace() + b.trace() - 2 * roots).item()
    assert frechet_distance(gaussian(zero, a), gaussian(zero, b)) == pytest.approx(expected, rel=1e-9)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 1000), n=st.integers(2, 30), d=st.integers(1, 12))
def test_it_is_symmetric_zero_for_equal_sets_and_positive_otherwise(seed, n, d):
    a, b = statistics(features(n, d, seed)), statistics(features(n, d, seed + 1))
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), rel=1e-9)
    assert frechet_distance(a, b) > 1e-6
    assert 0 <= frechet_distance(a, a) < 1e-10


def test_equal_sets_are_at_zero_even_where_the_covariance_is_of_low_rank():
    few = statistics(features(5, 100) * 100)
    assert frechet_distance(few, few) < 1e-8


@settings(max_examples=20, deadline=None)
@given(cuts=st.lists(st.integers(0, 20), max_size=3), seed=st.integers(0, 1000))
def test_batches_and_merged_parts_equal_the_whole(cuts, seed):
    vectors = features(20, 3, seed) + 100
    parts = torch.tensor_split(vectors, sorted(cuts))
    streamed, merged = FeatureStatistics(3), FeatureStatistics(3)
    for part in parts:
        streamed.update(part)
        merged.merge(statistics(part))
    for found in (streamed, merged):
        assert found.count == 20
        torch.testing.assert_close(found.mean, vectors.mean(0))
        torch.testing.assert_close(found.covariance, torch.cov(vectors.T))


def test_a_large_offset_costs_no_digits_of_the_covariance():
    vectors = features(64, 3).round(decimals=3) + 2.0**30
    streamed = FeatureStatistics(3)
    for row in vectors:
        streamed.update(row[None])
    expected = torch.cov((vectors - 2.0**30).T)
    torch.testing.assert_close(streamed.covariance, expected, rtol=1e-5, atol=1e-6)


def test_statistics_survive_json_to_the_last_bit():
    before = statistics(features(7, 3))
    after = FeatureStatistics.from_dict(json.loads(json.dumps(before.to_dict())))
    assert after.count == 7
    assert torch.equal(after.mean, before.mean)
    assert torch.equal(after.covariance, before.covariance)


@pytest.mark.parametrize(
    "wrong",
    [
        {},
        {"count": "many", "mean": [0.0], "scatter": [[0.0]]},
        {"count": 2, "mean": [0.0, 1.0], "scatter": [[0.0]]},
        {"count": -1, "mean": [0.0], "scatter": [[0.0]]},
        {"count": 2, "mean": [math.nan], "scatter": [[0.0]]},
        {"count": 2, "mean": [[0.0], [0.0, 1.0]], "scatter": [[0.0]]},
    ],
)
def test_what_are_no_statistics_is_refused(wrong):
    with pytest.raises(DataError, match="feature statistics"):
        FeatureStatistics.from_dict(wrong)


def test_single_vectors_unequal_widths_and_nan_are_refused():
    two, other = statistics(features(2, 3)), statistics(features(2, 4))
    with pytest.raises(ConfigError, match="at least 2 feature vectors, got 1"):
        frechet_distance(two, statistics(features(1, 3)))
    with pytest.raises(ConfigError, match="got 3 and 4"):
        frechet_distance(two, other)
    with pytest.raises(ConfigError, match="of 3 features, got 4"):
        two.merge(other)
    with pytest.raises(ConfigError, match="of 3 features, got 4"):
        two.update(features(2, 4))
    with pytest.raises(ConfigError, match="finite"):
        two.update(torch.full((1, 3), math.nan))
    assert two.count == 2


@pytest.mark.parametrize(
    ("worsen", "levels"), [(blurred, (0, 1, 2, 4, 8)), (noisy, (0, 1, 2, 4)), (shuffled, (0, 1, 2, 3))]
)
def test_the_distance_grows_with_the_damage(worsen, levels):
    clips = moving_blobs(64)
    distances = [frechet_between([clips], [worsen(clips, level)], PYRAMID, frame_stride=1).value for level in levels]
    assert distances[0] < 1e-9
    assert all(less < more for less, more in pairwise(distances)), distances
    fresh = frechet_between([clips], [moving_blobs(64, seed=1)], PYRAMID, frame_stride=1).value
    assert 0 < fresh < distances[1]  # another sample of the same films is nearer than the least damage


def test_the_pyramid_tells_a_film_from_the_same_film_played_backwards():
    clips = moving_blobs(8)
    clips = clips[:1] + 0.02 * torch.randn(8, 3, 1, 1, 1, generator=generator(0)).clamp(
        -1, 1
    )  # one motion, eight tints
    same, reverse = (
        frechet_between([clips], [other], PYRAMID, frame_stride=1).value for other in (clips, clips.flip(2))
    )
    assert reverse > 100 * max(same, 1e-6)


def test_the_pyramid_is_deterministic_and_treats_clips_one_by_one():
    clips = moving_blobs(4)
    whole = PYRAMID(clips)
    assert whole.shape == (4, PYRAMID.num_features)
    torch.testing.assert_close(whole, torch.cat([PYRAMID(clip[None]) for clip in clips]))


def test_the_pyramid_is_finite_on_blank_clips():
    assert PYRAMID(torch.zeros(1, 3, FRAMES, SIZE, SIZE)).isfinite().all()


def test_a_result_says_everything_the_number_depends_on():
    clips = moving_blobs(6)
    result = frechet_between(
        [clips[:4], clips[4:]], [clips[:3]], PixelPyramid(num_frames=3, size=(16, 24)), frame_stride=2
    )
    assert (result.num_a, result.num_b, result.num_frames, result.frame_stride) == (6, 3, 3, 2)
    text = str(result)
    for part in ("Frechet distance over PixelPyramid", "6 against 3 clips", "3 frames at stride 2", "16 x 24 bilinear"):
        assert part in text
    assert "rank-deficient" in text
    assert "FVD" not in text
    assert to_dict(result)["extractor"] == result.extractor


def test_enough_clips_leave_no_note():
    clips = moving_blobs(PYRAMID.num_features + 1)
    assert frechet_between([clips], [clips], PYRAMID, frame_stride=1).note == ""
    assert "rank-deficient" in frechet_between([clips], [clips[1:]], PYRAMID, frame_stride=1).note


def test_the_batching_of_clips_does_not_matter():
    a, b = moving_blobs(9), moving_blobs(9, seed=1)
    whole = frechet_between([a], [b], PYRAMID, frame_stride=1).value
    assert frechet_between(a.split(4), b.split(2), PYRAMID, frame_stride=1).value == pytest.approx(whole, rel=1e-5)


def test_frames_are_taken_at_the_stride_and_resized_to_the_extractor():
    seen = []

    class Spy:
        name, size, num_frames, num_features = "spy", (4, 4), 3, 1

        def __call__(self, clips):
            seen.append(clips)
            return clips.mean(dim=(1, 2, 3, 4))[:, None]

    values = torch.linspace(-1, 1, 12).view(2, 1, 6, 1, 1).expand(2, 3, 6, 8, 12)  # every frame its own grey
    result = frechet_between([values], [values], Spy(), frame_stride=2)
    assert isinstance(result, FrechetResult)
    torch.testing.assert_close(seen[0], values[:, :, (0, 2, 4), :4, :4])


def test_short_clips_bad_strides_and_too_few_clips_are_refused():
    clips = moving_blobs(2)
    with pytest.raises(ConfigError, match="8 frames at stride 2 need clips of 15 frames, got 8"):
        frechet_between([clips], [clips], PYRAMID, frame_stride=2)
    with pytest.raises(ConfigError, match="frame_stride must be at least 1, got 0"):
        frechet_between([clips], [clips], PYRAMID, frame_stride=0)
    with pytest.raises(ConfigError, match="at least 2 feature vectors, got 0"):
        frechet_between([clips], [], PYRAMID, frame_stride=1)
    with pytest.raises(ConfigError, match=r"expected clips of \(8, 16, 16\)"):
        PYRAMID(clips[:, :, :4])
    with pytest.raises(ConfigError, match="3 frames of 16 x 16 or more"):
        PixelPyramid(num_frames=2)
