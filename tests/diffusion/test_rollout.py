from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from reelflow.diffusion.rollout import (
    rollout_chunks,
    rollout_delayed,
    rollout_given,
    rollout_plain,
    rollout_pyramid,
    with_given,
)
from reelflow.diffusion.timesteps import inference_times
from reelflow.errors import ConfigError

HALVES = inference_times(2)


def test_given_frames_are_data_from_the_start_and_the_others_walk_the_times():
    times = inference_times(2)
    before = times.clone()
    assert rollout_given(times, 3).tolist() == [[0, 0, 0], [0.5, 0.5, 0.5], [1, 1, 1]]
    assert rollout_given(times, 3, num_given=1).tolist() == [[1, 0, 0], [1, 0.5, 0.5], [1, 1, 1]]
    assert torch.equal(times, before)


def test_chunks_follow_one_another_and_each_later_one_is_shorter_by_the_overlap():
    matrix = rollout_chunks(HALVES, 6, window=3, overlap=1)
    assert matrix.tolist() == [
        [0, 0, 0, 0, 0, 0],
        [0.5, 0.5, 0.5, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],
        [1, 1, 1, 0.5, 0.5, 0],
        [1, 1, 1, 1, 1, 0],
        [1, 1, 1, 1, 1, 0.5],
        [1, 1, 1, 1, 1, 1],
    ]


def test_a_pyramid_keeps_each_frame_clearer_than_the_next():
    matrix = rollout_pyramid(HALVES, 3, lag=1)
    assert matrix.tolist() == [[0, 0, 0], [0.5, 0, 0], [1, 0.5, 0], [1, 1, 0.5], [1, 1, 1]]
    assert torch.equal(rollout_pyramid(HALVES, 3, lag=0), rollout_plain(HALVES, 3))
    assert torch.equal(rollout_pyramid(HALVES, 3, lag=2), rollout_chunks(HALVES, 3, window=1))


def test_any_frames_of_any_rollout_may_be_given_and_what_waits_for_them_does_not():
    assert with_given(rollout_plain(HALVES, 3), [2]).tolist() == [[0, 0, 1], [0.5, 0.5, 1], [1, 1, 1]]
    assert with_given(rollout_pyramid(HALVES, 3, lag=2), [0, 1]).tolist() == [[1, 1, 0], [1, 1, 0.5], [1, 1, 1]]
    matrix = rollout_plain(HALVES, 2)
    assert torch.equal(with_given(matrix, []), matrix)
    assert with_given(matrix, [0]) is not matrix
    assert matrix[0].tolist() == [0, 0]


@settings(max_examples=60, deadline=None)
@given(
    delays=st.lists(st.integers(0, 12), min_size=1, max_size=6),
    held=st.sets(st.integers(0, 5)),
    num_steps=st.integers(1, 5),
    shift=st.floats(0.2, 8),
)
def test_every_rollout_rises_from_its_first_row_to_ones_and_never_idles(delays, held, num_steps, shift):
    times = inference_times(num_steps, shift=shift)
    held = {f for f in held if f < len(delays) - 1}
    matrix = with_given(rollout_delayed(times, delays), held)
    assert matrix.shape[1] == len(delays)
    assert ((matrix >= 0) & (matrix <= 1)).all()
    assert (matrix.diff(dim=0) >= 0).all()
    assert (matrix.diff(dim=0) > 0).any(dim=1).all()  # each step moves some frame
    assert (matrix[-1] == 1).all()
    assert (matrix[:, sorted(held)] == 1).all()
    walks = [matrix[:, f].unique() for f in range(len(delays)) if f not in held]
    for walk in walks:  # each generated frame visits all times, and no other
        assert torch.equal(walk, times)


@settings(max_examples=40, deadline=None)
@given(window=st.integers(1, 5), data=st.data(), num_frames=st.integers(1, 14))
def test_chunks_never_move_two_chunks_at_once_nor_more_frames_than_are_new(window, data, num_frames):
    overlap = data.draw(st.integers(0, window - 1))
    matrix = rollout_chunks(inference_times(3), num_frames, window=window, overlap=overlap)
    for row, after in pairwise(matrix):
        moving = (after > row).nonzero().flatten()
        assert len(row[moving].unique()) == 1
        first, last = moving[0].item(), moving[-1].item()
        assert last - first + 1 == len(moving) <= (window if first == 0 else window - overlap)
        assert (row[:first] == 1).all()
        assert (row[last + 1 :] == 0).all()


@pytest.mark.parametrize("num_given", [-1, 3, 4])
def test_something_must_be_left_to_generate(num_given):
    with pytest.raises(ConfigError, match=f"0 to 2 of 3, got {num_given}"):
        rollout_given(inference_times(2), 3, num_given=num_given)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: with_given(rollout_plain(HALVES, 3), [3]), r"lie in 0 to 2, got \[3\]"),
        (lambda: with_given(rollout_plain(HALVES, 3), [-1]), r"lie in 0 to 2, got \[-1\]"),
        (lambda: with_given(rollout_plain(HALVES, 2), [0, 1]), "0 to 1 of 2, got 2"),
        (lambda: rollout_chunks(HALVES, 4, window=2, overlap=2), "0 to 1 of a window"),
        (lambda: rollout_chunks(HALVES, 4, window=0), "at least 1 frame, got 0 of 0"),
        (lambda: rollout_pyramid(HALVES, 3, lag=-1), "at least 0, one per latent frame"),
        (lambda: rollout_plain(HALVES, 0), r"one per latent frame, got \[\]"),
        (lambda: rollout_plain(HALVES[:2], 3), "to 1, got 0 to 0.5"),
        (lambda: rollout_plain(HALVES.flip(0), 3), "to 1, got 1 to 0"),
        (lambda: rollout_plain(torch.tensor([0.0, torch.nan, 1.0]), 3), "must rise"),
        (lambda: rollout_plain(torch.ones(3), 3), "got 1 to 1"),
    ],
)
def test_impossible_rollouts_are_refused(make, message):
    with pytest.raises(ConfigError, match=message):
        make()
