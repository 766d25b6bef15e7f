import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from reelflow.nn import quick_conv
from reelflow.nn.conv import START, CausalConv3d, CausalSequence, Conv3d, Nearest, owned


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def close(a: torch.Tensor, b: torch.Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def both(layer: torch.nn.Module, *inputs: object) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what a layer gives with gradients, by the definition, and without."""
    slow = layer(*inputs)
    with torch.no_grad():
        quick = layer(*inputs)
    return tuple(y[0] if isinstance(y, tuple) else y for y in (slow, quick))  # type: ignore[return-value]


@settings(max_examples=30, deadline=None)
@given(
    batch=st.integers(1, 2),
    frames=st.integers(3, 8),
    channels=st.sampled_from([2, 90]),  # more of them than positions, and fewer
    stride=st.integers(1, 2),
    around=st.integers(0, 1),
    bias=st.booleans(),
)
def test_fewer_products_give_the_same_convolution(batch, frames, channels, stride, around, bias):
    torch.manual_seed(0)
    kernel = {"stride": (1, stride, stride), "padding": (0, around, around), "bias": bias}
    close(*both(Conv3d(3, channels, 3, **kernel).double(), normal(batch, 3, frames, 5, 4)))


@settings(max_examples=40, deadline=None)
@given(
    batch=st.integers(1, 2),
    frames=st.integers(1, 5),
    nearest=st.builds(Nearest, st.just(2), st.integers(1, 2), first=st.sampled_from(["alone", "odd"])),
    time=st.sampled_from([1, 3]),
    padding=st.tuples(st.sampled_from(["first", "zeros"]), st.sampled_from(["zeros", "replicate", "after"])),
    state=st.sampled_from([None, START]),
)
def test_repeated_positions_are_convolved_without_repeating_them(batch, frames, nearest, time, padding, state):
    torch.manual_seed(0)
    conv = CausalConv3d(2, 3, (time, 3), time_padding=padding[0], space_padding=padding[1]).double()
    layers, x = CausalSequence([nearest, conv]), normal(batch, 2, frames, 3, 4)
    close(*both(layers, x, state))
    if state is not None:  # a second chunk has no frame 0
        close(*both(layers, x, layers(x, state)[1]))


def test_positions_are_not_repeated_where_that_can_be_helped(monkeypatch):
    done = []
    monkeypatch.setattr(quick_conv, "doubled", lambda *given: done.append(given) or torch.zeros(1, 3, 1, 6, 8))
    layers = CausalSequence([Nearest(2, 1), CausalConv3d(2, 3, (1, 3))]).requires_grad_(False)
    layers(torch.zeros(1, 2, 1, 3, 4), START)
    assert len(done) == 1


@pytest.mark.parametrize("space", ["zeros", "replicate", "after"])
@pytest.mark.parametrize("time", ["first", "zeros", "zeros_around", "ends"])
@pytest.mark.parametrize("frames", [1, 3])
def test_a_padded_clip_is_the_same_with_gradients_and_without(time, space, frames):
    torch.manual_seed(0)
    conv = CausalConv3d(2, 3, (3, 3), time_padding=time, space_padding=space).double()
    close(*both(conv, normal(2, 2, frames, 3, 4), None))


def test_a_state_that_is_owned_is_used_up_and_another_is_kept():
    torch.manual_seed(0)
    conv = CausalConv3d(2, 3, (3, 3)).double().requires_grad_(False)
    _, kept = conv(normal(1, 2, 2, 3, 3), START)
    later = normal(1, 2, 2, 3, 3, seed=1)
    expected, _ = conv(later, kept)
    given = owned((kept,))[0]
    close(conv(later, given)[0], expected)
    assert given == []
    assert len(kept) == 1
