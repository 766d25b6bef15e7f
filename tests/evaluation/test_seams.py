import pytest
import torch

from reelflow.errors import ConfigError
from reelflow.evaluation.seams import seam_energy


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def test_a_clip_without_seams_has_energy_one():
    assert seam_energy(noise(2, 3, 4, 64, 96), [16, 32], [40]).tolist() == pytest.approx([1, 1], abs=0.05)


def test_a_ramp_with_a_step_has_the_ratio_of_the_squares():
    ramp = torch.arange(8.0).expand(1, 1, 1, 8, 8).clone()
    ramp[..., 4:] += 2  # columns differ by 1, and by 3 before column 4; rows do not differ
    assert seam_energy(ramp, [], [4]).item() == pytest.approx(9 / ((6 * 8) / (6 * 8 + 7 * 8)))


def test_a_step_elsewhere_counts_against_the_seams():
    clip = noise(1, 1, 1, 16, 16)
    clip[..., 5:, :] += 10
    assert seam_energy(clip, [5], []).item() > 10
    assert seam_energy(clip, [9], []).item() < 1


@pytest.mark.parametrize(
    ("rows", "columns", "message"),
    [([], [], "no borders"), ([0], [], "positions 1 to 7"), ([], [8], "positions 1 to 7")],
)
def test_borders_that_are_none_are_refused(rows, columns, message):
    with pytest.raises(ConfigError, match=message):
        seam_energy(noise(1, 1, 1, 8, 8), rows, columns)
    with pytest.raises(ConfigError, match="nothing to compare"):
        seam_energy(torch.zeros(1, 1, 1, 8, 8), [4], [])
