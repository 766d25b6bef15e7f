import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from reelflow.nn.conv import START, CausalConv3d, CausalSequence, DownShuffle, UpShuffle

PADDINGS = ["first", "zeros"]


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def streamed(layer: nn.Module, x: torch.Tensor, lengths: list[int]) -> torch.Tensor:
    state, parts = START, []
    for chunk in x.split(lengths, dim=2):
        y, state = layer(chunk, state)
        parts.append(y)
    return torch.cat(parts, dim=2)


def close(a: torch.Tensor, b: torch.Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("kernel", [(1, 3), (2, 1), (3, 3), (5, 1)])
def test_causal_conv_never_looks_ahead(kernel, padding):
    torch.manual_seed(0)
    conv, x = CausalConv3d(2, 3, kernel, time_padding=padding).double(), normal(2, 2, 7, 4, 4)
    y, state = conv(x, None)
    assert y.shape == (2, 3, 7, 4, 4)
    assert state is None
    for frame in range(7):
        other = x.clone()
        other[:, :, frame] += 1
        changed = (conv(other, None)[0] != y).flatten(3).any(-1).any(1).any(0)
        assert not changed[:frame].any()
        assert changed[frame : frame + kernel[0]].all()


@pytest.mark.parametrize("padding", PADDINGS)
def test_the_past_of_frame_zero_is_frame_zero_or_nothing(padding):
    torch.manual_seed(0)
    conv, x = CausalConv3d(2, 3, (3, 3), time_padding=padding).double(), normal(1, 2, 4, 5, 5)
    past = x[:, :, :1].repeat(1, 1, 2, 1, 1) if padding == "first" else torch.zeros(1, 2, 2, 5, 5, dtype=torch.float64)
    close(
        conv(x, None)[0],
        nn.functional.conv3d(torch.cat([past, x], 2), conv.conv.weight, conv.conv.bias, padding=(0, 1, 1)),
    )


@st.composite
def chunkings(draw, *, unit: int = 1):
    """Lengths of chunks: all are multiples of `unit`, except that the first also holds frame 0."""
    first, *later = draw(st.lists(st.integers(1, 3), min_size=1, max_size=4))
    return [unit * (first - 1) + 1, *(unit * n for n in later)]


@settings(max_examples=25, deadline=None)
@given(lengths=chunkings(), kernel=st.sampled_from([(1, 3), (2, 1), (3, 3), (5, 1)]), padding=st.sampled_from(PADDINGS))
def test_a_streamed_conv_equals_the_whole(lengths, kernel, padding):
    torch.manual_seed(0)
    conv, x = CausalConv3d(2, 3, kernel, time_padding=padding).double(), normal(1, 2, sum(lengths), 3, 3)
    close(streamed(conv, x, lengths), conv(x, None)[0])


@settings(max_examples=25, deadline=None)
@given(
    data=st.data(),
    time=st.integers(1, 3),
    space=st.integers(1, 2),
    kernel=st.sampled_from([1, 3]),
    padding=st.sampled_from(PADDINGS),
)
def test_streamed_shuffles_equal_the_whole_and_have_their_documented_shapes(data, time, space, kernel, padding):
    torch.manual_seed(0)
    cells = time * space**2
    options = {"space": space, "time": time, "kernel": kernel, "time_padding": padding}
    down, up = DownShuffle(2, 2 * cells, **options).double(), UpShuffle(2 * cells, 2, **options).double()
    lengths = data.draw(chunkings(unit=time))
    x = normal(1, 2, sum(lengths), 2 * space, 4 * space)
    coarse, state = down(x, None)
    assert state is None
    assert coarse.shape == (1, 2 * cells, 1 + (sum(lengths) - 1) // time, 2, 4)
    close(streamed(down, x, lengths), coarse)

    fine, state = up(coarse, None)
    assert state is None
    assert fine.shape == x.shape
    close(streamed(up, coarse, [1 + (lengths[0] - 1) // time, *(n // time for n in lengths[1:])]), fine)


def test_the_down_shortcut_is_a_mean_and_the_up_shortcut_a_copy():
    down = DownShuffle(3, 3, space=1, time=3)
    up = UpShuffle(12, 3, space=2, time=1)
    for layer in (down, up):
        nn.init.zeros_(layer.conv.conv.weight)
        nn.init.zeros_(layer.conv.conv.bias)
    x = normal(1, 3, 4, 2, 2)
    close(down.double()(x, None)[0], torch.stack([x[:, :, 0], x[:, :, 1:].mean(2)], dim=2))
    x = normal(1, 12, 1, 1, 1)
    close(up.double()(x, None)[0].flatten(), x.flatten())


@pytest.mark.parametrize("time", [2, 3])
def test_the_first_frame_fills_a_latent_frame_alone(time):
    torch.manual_seed(0)
    down, x = DownShuffle(2, 4 * time, space=2, time=time).double(), normal(1, 2, 1 + 2 * time, 4, 4)
    whole = down(x, None)[0]
    close(down(x[:, :, :1], None)[0], whole[:, :, :1])
    x[:, :, 1:] += 1
    assert torch.equal(down(x, None)[0][:, :, :1], whole[:, :, :1])


def network() -> CausalSequence:
    torch.manual_seed(0)
    layers = [
        CausalConv3d(2, 4, (3, 3)),
        DownShuffle(4, 8, space=1, time=2),
        CausalConv3d(8, 8, (1, 3)),
        UpShuffle(8, 4, space=1, time=2),
    ]
    return CausalSequence(layers).double()


def test_two_streams_do_not_disturb_each_other():
    net, a, b = network(), normal(1, 2, 7, 3, 3), normal(1, 2, 7, 3, 3, seed=1)
    outputs, states = ([], []), [START, START]
    for start, stop in ((0, 1), (1, 3), (3, 7)):
        for stream, x in enumerate((a, b)):
            y, states[stream] = net(x[:, :, start:stop], states[stream])
            outputs[stream].append(y)
    for x, parts in zip((a, b), outputs, strict=True):
        close(torch.cat(parts, dim=2), net(x, None)[0])


def test_a_state_is_a_value_that_can_be_continued_twice():
    net, x = network(), normal(1, 2, 7, 3, 3)
    _, state = net(x[:, :, :3], START)
    once = net(x[:, :, 3:], state)[0]
    net(x[:, :, 3:] + 1, state)
    assert torch.equal(net(x[:, :, 3:], state)[0], once)


def test_a_sequence_over_a_whole_clip_keeps_no_state():
    assert network()(normal(1, 2, 7, 3, 3), None)[1] is None
