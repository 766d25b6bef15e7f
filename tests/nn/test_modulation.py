import pytest
import torch

from reelflow.nn.modulation import Modulation, gated, modulate, spread


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_a_fresh_modulation_changes_nothing_and_closes_the_gate():
    shift, scale, gate = Modulation(5, 4, 3).double()(normal(2, 1, 5))
    x = normal(2, 6, 4)
    assert torch.equal(modulate(x, shift, scale), x)
    assert torch.equal(gated(x, gate, normal(2, 6, 4, seed=1)), x)


def test_modulate_scales_then_shifts_and_gated_adds():
    x, a, b = normal(2, 6, 4), normal(2, 1, 4, seed=1), normal(2, 1, 4, seed=2)
    torch.testing.assert_close(modulate(x, a, b), x * (1 + b) + a)
    torch.testing.assert_close(gated(x, a, b.expand(-1, 6, -1)), x + a * b)


@pytest.mark.parametrize("groups", [1, 2, 3, 6])
def test_spread_gives_equal_runs_of_tokens_their_groups_row(groups):
    rows = spread(torch.arange(groups).view(1, -1, 1).double(), 6)[0, :, 0]
    assert rows.expand(6).tolist() == [token * groups // 6 for token in range(6)]


@pytest.mark.parametrize("groups", [2, 6])
def test_equal_groups_do_what_one_group_does(groups):
    x, shift, scale = normal(2, 6, 4), normal(2, 1, 4, seed=1), normal(2, 1, 4, seed=2)
    many = [v.expand(-1, groups, -1) for v in (shift, scale)]
    assert torch.equal(modulate(x, *many), modulate(x, shift, scale))
    assert torch.equal(gated(x, many[0], x), gated(x, shift, x))


def test_a_group_touches_its_own_tokens_only():
    x, shift, scale = normal(1, 6, 4), normal(1, 3, 4, seed=1), normal(1, 3, 4, seed=2)
    before = modulate(x, shift, scale)
    shift[0, 1] += 1
    changed = (modulate(x, shift, scale) != before).any(-1)[0]
    assert changed.tolist() == [False, False, True, True, False, False]
