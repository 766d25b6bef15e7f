import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from reelflow.errors import ConfigError
from reelflow.nn.patchify import Grid, Patch, patchify, token_grid, unpatchify

SIZES = st.tuples(*3 * [st.integers(1, 3)])


@settings(max_examples=30, deadline=None)
@given(batch=st.integers(1, 2), channels=st.integers(1, 3), patch=SIZES, extents=SIZES)
def test_patches_and_back_is_the_identity(batch, channels, patch, extents):
    patch, grid = Patch(*patch), Grid(*extents)
    shape = tuple(n * p for n, p in zip(grid, patch, strict=True))
    x = torch.randn(batch, channels, *shape, generator=torch.Generator().manual_seed(0))
    tokens = patchify(x, patch)
    assert token_grid(shape, patch) == grid
    assert tokens.shape == (batch, grid.num_tokens, channels * patch.t * patch.h * patch.w)
    assert torch.equal(unpatchify(tokens, grid, patch), x)


def test_a_token_holds_its_patch_in_channel_time_height_width_order():
    x = torch.arange(2 * 4 * 4 * 6).view(1, 2, 4, 4, 6).double()
    tokens = patchify(x, Patch(2, 2, 3))
    t, h, w = 1, 0, 1  # the token grid is 2 x 2 x 2, scanned t, h, w
    assert torch.equal(tokens[0, 4 * t + 2 * h + w], x[0, :, 2:4, 0:2, 3:6].flatten())


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((3, 4, 6), r"latent frames must be a multiple of the patch \(2\), got 3; nearest: 2 or 4"),
        ((4, 5, 6), "latent height .* got 5; nearest: 4 or 6"),
        ((4, 4, 2), r"latent width .* \(3\), got 2; nearest: 3$"),
        ((0, 4, 6), "latent frames .* got 0; nearest: 2$"),
    ],
)
def test_an_extent_that_does_not_fit_is_refused_with_its_neighbours(shape, message):
    with pytest.raises(ConfigError, match=message):
        token_grid(shape, Patch(2, 2, 3))
