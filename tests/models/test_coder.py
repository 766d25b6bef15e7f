from math import pi

import pytest
import torch
from torch import nn

from reelflow.errors import ConfigError
from reelflow.models.coder import (
    Act,
    Attention,
    Conv,
    Drop,
    Fold,
    Groups,
    Lead,
    Nearest,
    Padding,
    Res,
    Skip,
    Take,
    TimeDown,
    TimeUp,
    Unfold,
    Waves,
    build_layers,
    factor,
    width_after,
)
from reelflow.nn.conv import START, Given
from reelflow.nn.norm import Norm


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def built(*layers, channels: int = 4) -> nn.Module:
    """Build layers in which no part is silent."""
    torch.manual_seed(0)
    network = build_layers(layers, channels).double().requires_grad_(False)
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.5)
    return network


def close(a: torch.Tensor, b: torch.Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def streamed(network: nn.Module, x: torch.Tensor, lengths: list[int]) -> torch.Tensor:
    state, parts = START, []
    for chunk in x.split(lengths, dim=2):
        y, state = network(chunk, state)
        parts.append(y)
    return torch.cat(parts, dim=2)


EVERY_LAYER = [
    Conv(6, stride=(2, 2), pad=Padding("first", "replicate")),
    Conv(4, kernel=(2, 2), stride=(2, 2)),
    Res(6, Groups(2), kernels=((1, 3), (3, 1)), bias=False),
    Res(4, Norm("layer", affine=True)),
    Act(None),
    Attention("frame", Groups(2), heads=2),
    Attention("past", lengths="one"),
    Attention("pixel", heads=2, lengths="one", bias=False),
    Waves(0, 2),
    Take(2, 0.5),
    Lead(3),
    Drop(1),
    TimeDown(),
    TimeUp(),
    Nearest(2, 2),
    Fold(2, 2),
    Unfold(2, 1),
    Skip((Conv(8), TimeDown()), (Fold(1, 2, 8, first="zeros"),)),
]


@pytest.mark.parametrize("layer", EVERY_LAYER, ids=lambda layer: layer.kind)
def test_every_layer_gives_the_channels_and_extents_it_says_and_streams(layer):
    network, x = built(layer), normal(2, 4, 9, 4, 4)
    y, state = network(x, None)
    assert state is None
    assert not layer.obstacle
    assert y.shape[:2] == (2, width_after((layer,), 4))
    assert y.shape[3] in (4 * layer.space, 4 // layer.space)
    close(streamed(network, x, [3, 2, 4]), y)
    close(network(x.flip(0), None)[0], y.flip(0))  # rows of a batch do not see each other


def test_factors_multiply():
    layers = (Conv(8, stride=(2, 2)), Skip((Conv(1), Fold(2, 3)), (Fold(2, 3, 12),)), TimeDown())
    assert (factor(layers, "time"), factor(layers, "space")) == (12, 4)


def test_attention_to_ones_own_pixel_sees_its_past_alone():
    network, x = built(Attention("pixel")), normal(1, 4, 4, 2, 2)
    y = network(x, None)[0]
    other = x.clone()
    other[:, :, 2, 0, 1] += 1
    changed = (network(other, None)[0] != y).any(1)[0]
    expected = torch.zeros(4, 2, 2, dtype=torch.bool)
    expected[2:, 0, 1] = True
    assert torch.equal(changed, expected)


def test_attention_to_the_past_sees_every_position_of_it():
    network, x = built(Attention("past")), normal(1, 4, 3, 2, 2)
    y = network(x, None)[0]
    other = x.clone()
    other[:, :, 1, 0, 1] += 1
    changed = (network(other, None)[0] != y).any(1)[0]
    assert not changed[0].any()
    assert changed[1:].all()


def test_queries_and_keys_of_length_one_do_not_feel_a_scale():
    network, x = built(Attention("past", Norm("rms"), lengths="one", bias=False)), normal(1, 4, 2, 2, 2)
    y = network(x, None)[0]
    network[0].qkv.weight[:8] *= 3
    close(network(x, None)[0], y)


def test_waves_are_sines_then_cosines_of_each_channel():
    x = normal(1, 2, 1, 1, 1)
    y = built(Waves(1, 2), channels=2)(x, None)[0].flatten()
    a, b = x.flatten()
    angles = torch.stack([2 * a, 4 * a, 2 * b, 4 * b]) * 2 * pi
    close(y, torch.cat([x.flatten(), angles.sin(), angles.cos()]))


@pytest.mark.parametrize(("over", "fixed"), [("frame", [True, False]), ("clip", [False, False])])
def test_a_norm_of_groups_sees_its_frame_or_the_clip(over, fixed):
    network, x = built(Act(Groups(2, over))), normal(1, 4, 2, 3, 3)
    y = network(x, None)[0]
    expected = nn.functional.group_norm(
        x if over == "clip" else x[:, :, 0], 2, network[0].norm.weight, network[0].norm.bias, 1e-6
    )
    close(y if over == "clip" else y[:, :, 0], nn.functional.silu(expected))
    x[:, :, 1, 0, 0] += 1
    assert [(network(x, None)[0][:, :, t] == y[:, :, t]).all().item() for t in range(2)] == fixed


@pytest.mark.parametrize(("frames", "of"), [(1, [0]), (4, [0, 0, 1, 1]), (5, [0, 1, 1, 2, 2])])
def test_a_norm_given_latents_spreads_them_over_what_becomes_of_them(frames, of):
    network = built(Act(Groups(2, given=3)))
    x, z = normal(1, 4, frames, 4, 4), normal(1, 3, max(of) + 1, 2, 2, seed=1)
    y = network(x, None, Given(latents=z))[0]
    norm = network[0].norm
    spread = z[:, :, of].repeat_interleave(2, dim=3).repeat_interleave(2, dim=4)
    normed = norm.norm(x)
    close(y, nn.functional.silu(normed * norm.scale(spread) + norm.shift(spread)))


@pytest.mark.parametrize("first", ["alone", "odd"])
def test_frame_0_is_apart_in_an_odd_clip_and_in_an_even_one_if_it_always_is(first):
    up = built(Nearest(1, 2, first=first))
    assert up(normal(1, 4, 3, 1, 1), None)[0].shape[2] == 5
    assert up(normal(1, 4, 4, 1, 1), None)[0].shape[2] == (7 if first == "alone" else 8)
    x = normal(1, 4, 4, 1, 1)
    if first == "odd":
        close(built(Fold(1, 2, 4, first="odd"))(x, None)[0], x.unflatten(2, (2, 2)).mean(3))


def test_a_stride_leaves_frame_0_alone_or_begins_a_cell_with_it():
    x = normal(1, 4, 4, 2, 2)
    alone, cell = (built(Conv(4, (3, 1), (2, 1), Padding("zeros"), first=first)) for first in ("alone", "cell"))
    close(cell(x, None)[0], alone(nn.functional.pad(x, (0, 0, 0, 0, 1, 0)), None)[0][:, :, 1:])
    close(streamed(cell, x, [2, 2]), cell(x, None)[0])


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (Attention(heads=3), "4 channels do not divide into 3 heads; nearest: 3"),
        (Res(6, Groups(4)), "6 channels do not divide into 4 groups; nearest: 8"),
        (Take(5), "cannot keep 5 of 4 channels; nearest: 4"),
        (Fold(2, 1, 5), "16 folded channels cannot be averaged to 5"),
        (Fold(2, 2, first="alone"), "frame 0 folded alone has fewer channels"),
        (Unfold(2, 2), "4 channels cannot be unfolded into cells of 8; nearest: 8"),
        (Unfold(1, 1, 6), "4 channels cannot be copied to 6"),
    ],
)
def test_a_width_that_a_layer_cannot_take_is_refused(layer, message):
    with pytest.raises(ConfigError, match=message):
        width_after((layer,), 4)
