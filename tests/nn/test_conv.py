import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from reelflow.errors import ConfigError
from reelflow.nn.conv import START, CausalConv3d, CausalSequence, Fold, Nearest, TimeDown, TimeUp, Unfold

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
    lengths=chunkings(unit=2),
    kernel=st.sampled_from([2, 3, 5]),
    padding=st.sampled_from(PADDINGS),
    edge=st.sampled_from(["zeros", "replicate", "after"]),
)
def test_a_streamed_strided_conv_equals_the_whole(lengths, kernel, padding, edge):
    torch.manual_seed(0)
    conv = CausalConv3d(2, 3, (kernel, 3), stride=(2, 2), time_padding=padding, space_padding=edge).double()
    x = normal(1, 2, sum(lengths), 4, 6)
    whole = conv(x, None)[0]
    assert whole.shape == (1, 3, 1 + sum(lengths) // 2, 2, 3)
    close(streamed(conv, x, lengths), whole)


def test_space_is_padded_around_or_after():
    torch.manual_seed(0)
    x = normal(1, 2, 1, 4, 4)
    for edge, pad, mode in (("replicate", (1, 1, 1, 1), "replicate"), ("after", (0, 1, 0, 1), "constant")):
        conv = CausalConv3d(2, 3, (1, 3), stride=(1, 2), space_padding=edge).double()
        flat = nn.functional.pad(x[:, :, 0], pad, mode=mode)
        expected = nn.functional.conv2d(flat, conv.conv.weight[:, :, 0], conv.conv.bias, stride=2)
        close(conv(x, None)[0][:, :, 0], expected)


@pytest.mark.parametrize("padding", ["zeros_around", "ends"])
def test_a_conv_that_looks_ahead_sees_as_much_on_both_sides_and_refuses_a_stream(padding):
    torch.manual_seed(0)
    conv, x = CausalConv3d(2, 3, (3, 1), time_padding=padding).double(), normal(1, 2, 4, 2, 2)
    first, last = (x[:, :, :1], x[:, :, -1:]) if padding == "ends" else 2 * (torch.zeros_like(x[:, :, :1]),)
    expected = nn.functional.conv3d(torch.cat([first, x, last], dim=2), conv.conv.weight, conv.conv.bias)
    close(conv(x, None)[0], expected)
    with pytest.raises(ConfigError, match="looks at later frames"):
        conv(x, START)


@settings(max_examples=25, deadline=None)
@given(
    data=st.data(),
    time=st.integers(1, 3),
    space=st.integers(1, 2),
    order=st.sampled_from(["channel", "cell"]),
    folded=st.sampled_from(["repeat", "zeros"]),
    copies=st.sampled_from([0, 2]),
)
def test_streamed_folds_equal_the_whole_and_unfold_to_it(data, time, space, order, folded, copies):
    cells = time * space**2
    fold = Fold(space=space, time=time, first=folded, order=order)
    mean = Fold(space=space, time=time, first="alone", order=order, channels=2)
    unfold = Unfold(space=space, time=time, order=order)
    alone = Unfold(space=space, time=time, first="alone", order=order, channels=copies * cells)
    lengths = data.draw(chunkings(unit=time))
    coarse_lengths = [1 + (lengths[0] - 1) // time, *(n // time for n in lengths[1:])]
    x = normal(1, 2, sum(lengths), 2 * space, 4 * space)
    for layer, channels in ((fold, 2 * cells), (mean, 2)):
        coarse, state = layer(x, None)
        assert state is None
        assert coarse.shape == (1, channels, 1 + (sum(lengths) - 1) // time, 2, 4)
        close(streamed(layer, x, lengths), coarse)
    coarse = fold(x, None)[0]
    assert torch.equal(unfold(coarse, None)[0], x)
    close(streamed(unfold, coarse, coarse_lengths), x)
    close(streamed(alone, coarse, coarse_lengths), alone(coarse, None)[0])


def test_means_and_copies_are_of_neighbouring_channels():
    x = normal(1, 3, 4, 2, 2)
    close(
        Fold(space=1, time=3, channels=3)(x, None)[0], torch.stack([x[:, :, 0], x[:, :, 1:].mean(2)], dim=2)
    )  # frame 0 with two copies of itself
    close(Fold(space=1, time=1, channels=1)(x, None)[0], x.mean(1, keepdim=True))
    x = normal(1, 12, 1, 1, 1)
    close(Unfold(space=2, time=1, channels=3)(x, None)[0].flatten(), x.flatten())
    close(Unfold(space=1, time=1, channels=24)(x, None)[0].flatten(), x.flatten().repeat_interleave(2))


@pytest.mark.parametrize("layer", [Nearest(2, 2), TimeUp(2).double()], ids=["nearest", "conv"])
@settings(max_examples=10, deadline=None)
@given(lengths=chunkings())
def test_frames_are_doubled_but_for_the_first_in_any_chunks(layer, lengths):
    x = normal(1, 2, sum(lengths), 2, 3)
    y, state = layer(x, None)
    assert state is None
    assert y.shape[2] == 1 + 2 * (sum(lengths) - 1)
    close(y[:, :, 0], Nearest(2, 1)(x, None)[0][:, :, 0] if isinstance(layer, Nearest) else x[:, :, 0])
    close(streamed(layer, x, lengths), y)


@settings(max_examples=10, deadline=None)
@given(lengths=chunkings(unit=2))
def test_frames_are_halved_but_for_the_first_in_any_chunks(lengths):
    torch.manual_seed(0)
    layer, x = TimeDown(2).double(), normal(1, 2, sum(lengths), 2, 3)
    y = layer(x, None)[0]
    assert y.shape[2] == 1 + sum(lengths) // 2
    assert torch.equal(y[:, :, 0], x[:, :, 0])
    close(streamed(layer, x, lengths), y)


def test_no_convolution_sees_the_frame_that_is_passed():
    torch.manual_seed(0)
    layer, x = TimeUp(2).double(), normal(1, 2, 3, 2, 2)
    y = layer(x, None)[0]
    x[:, :, 0] += 1
    assert torch.equal(layer(x, None)[0][:, :, 1:], y[:, :, 1:])


@pytest.mark.parametrize("time", [2, 3])
def test_the_first_frame_fills_a_latent_frame_alone(time):
    down, x = Fold(space=2, time=time), normal(1, 2, 1 + 2 * time, 4, 4)
    whole = down(x, None)[0]
    assert torch.equal(down(x[:, :, :1], None)[0], whole[:, :, :1])
    x[:, :, 1:] += 1
    assert torch.equal(down(x, None)[0][:, :, :1], whole[:, :, :1])


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ((torch.zeros(1, 2, 2, 3, 4, dtype=torch.float64),), "another model, batch, size or precision"),
        ((torch.zeros(1, 2, 2, 3, 3),), "another model, batch, size or precision"),
        ((None,), "found NoneType"),
    ],
)
def test_a_state_of_something_else_is_refused(state, message):
    conv = CausalConv3d(2, 3, (3, 3)).double()
    with pytest.raises(ConfigError, match=message):
        conv(normal(1, 2, 1, 3, 3), state)
    with pytest.raises(ConfigError, match="the state has 1 parts and the network 2"):
        CausalSequence([conv, conv])(normal(1, 2, 1, 3, 3), (state,))


def network() -> CausalSequence:
    torch.manual_seed(0)
    layers = [
        CausalConv3d(2, 4, (3, 3)),
        Fold(space=1, time=2),
        CausalConv3d(8, 8, (1, 3)),
        Unfold(space=1, time=2),
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
