import pytest
import torch

from reelflow.diffusion.rollout import rollout_given
from reelflow.diffusion.timesteps import inference_times
from reelflow.errors import ConfigError


def test_given_frames_are_data_from_the_start_and_the_others_walk_the_times():
    times = inference_times(2)
    before = times.clone()
    assert rollout_given(times, 3).tolist() == [[0, 0, 0], [0.5, 0.5, 0.5], [1, 1, 1]]
    assert rollout_given(times, 3, num_given=1).tolist() == [[1, 0, 0], [1, 0.5, 0.5], [1, 1, 1]]
    assert torch.equal(times, before)


@pytest.mark.parametrize("num_given", [-1, 3, 4])
def test_something_must_be_left_to_generate(num_given):
    with pytest.raises(ConfigError, match=f"0 to 2 of 3, got {num_given}"):
        rollout_given(inference_times(2), 3, num_given=num_given)
