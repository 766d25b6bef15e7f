"""Autoencoders within a budget of memory: which parts they choose, and that the result is the whole clip's."""

import gc
import logging
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from reelflow.errors import ConfigError
from reelflow.models.budget import LEAST_TILE, Budgeted, in_bytes, reach
from reelflow.models.coder import (
    Act,
    Attention,
    Conv,
    Fold,
    Groups,
    Nearest,
    Padding,
    Part,
    Res,
    Skip,
    Tile,
    Unfold,
    build_layers,
    factor,
)
from reelflow.models.parts import collect, spans
from reelflow.models.vae import CausalVAE, Stage, VAEConfig, staged
from reelflow.models.weighing import Weighing
from reelflow.nn.norm import Norm

AROUND = Padding("ends")
STREAMS = staged(2, (Stage(8, 1, space=2, time=2), Stage(8, 0)), (Stage(8, 1), Stage(8, 1, space=2, time=2)), patch=2)
CONVS = staged(2, (Stage(8, 0, space=2, time=2),), (Stage(8, 0, space=2, time=2),), resample_kernel=1)
SEES_FRAME = staged(
    2, (Stage(8, 0, space=2, time=2),), (Stage(8, 0, space=2, time=2),), resample_kernel=1, mid_attention="frame"
)
AHEAD = replace(
    STREAMS,
    decoder=(
        Conv(8, pad=AROUND),
        Res(8, Norm("rms"), pad=AROUND),
        Skip((Conv(64, pad=AROUND), Unfold(2, 2)), (Unfold(2, 2), Tile(8))),
        Res(8, Norm("rms"), pad=AROUND),
        Act(Norm("rms")),
        Conv(12, pad=AROUND),
    ),
)


def network(config: VAEConfig) -> CausalVAE:
    torch.manual_seed(0)
    vae = CausalVAE(config).double().requires_grad_(False)
    for name, parameter in vae.named_parameters():
        torch.nn.init.normal_(parameter, mean=float(".norm" in name), std=0.5 / max(1, parameter[0].numel()) ** 0.5)
    return vae


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def close(found: torch.Tensor, wanted: torch.Tensor) -> None:
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)


def least(vae: CausalVAE, latents: torch.Tensor) -> int:
    """Return the smallest memory that will do, as the refusal of less says."""
    with pytest.raises(ConfigError, match="smallest memory that would do is") as refused:
        vae.plan_decode(latents.shape, 1)
    return in_bytes(str(refused.value).rpartition(" is ")[2])


@pytest.mark.parametrize(("text", "size"), [("4GiB", 2**32), ("1.5 kb", 1500), ("2M", 2_000_000), (7, 7)])
def test_memory_is_read_in_decimal_and_binary_units(text, size):
    assert in_bytes(text) == size


@pytest.mark.parametrize("memory", ["four", "-1GB", 0, "4 GiBit"])
def test_other_memory_is_refused(memory):
    with pytest.raises(ConfigError, match="such as 4GiB or 500MB"):
        in_bytes(memory)


@pytest.mark.parametrize("config", [STREAMS, AHEAD], ids=["stream", "windows"])
def test_what_fits_is_decoded_whole_and_less_memory_makes_chunks_with_the_same_result(config, caplog):
    vae, latents = network(config), normal(1, 2, 30, 4, 4)
    whole = vae.plan_decode(latents.shape, "1GiB")
    assert (whole.chunk, whole.tile, whole.exact) == (30, (4, 4), True)
    assert vae.plan_decode(latents.shape, whole.peak) == whole
    plan = vae.plan_decode(latents.shape, whole.peak - 1)
    assert plan.chunk < 30
    assert (plan.tile, plan.exact) == ((4, 4), True)
    assert plan.peak < whole.peak
    with caplog.at_level(logging.INFO):
        close(vae.decode(latents, memory=whole.peak - 1), vae.decode(latents))
    assert f"decoding {plan.chunk} of 30 latents at a time, peak" in caplog.text


PAST = replace(STREAMS, decoder=(STREAMS.decoder[0], Attention("past"), *STREAMS.decoder[1:]))


@pytest.mark.parametrize("config", [STREAMS, AHEAD, PAST], ids=["stream", "windows", "growing"])
def test_a_plan_weighs_what_carrying_it_out_does(config):
    vae, latents = network(config), normal(1, 2, 30, 4, 4)
    memory = vae.plan_decode(latents.shape, "1GiB").peak * 9 // 10
    plan = vae.plan_decode(latents.shape, memory)
    assert plan.chunk < 30
    gc.collect()
    with Weighing() as weighing:
        vae.decode(latents, memory=memory)
    assert weighing.peak == pytest.approx(plan.peak, rel=0.03)


def test_a_budget_cuts_an_encoding_into_chunks_with_the_same_result():
    vae, clip = network(STREAMS), normal(1, 3, 21, 24, 24).clamp(-1, 1)
    plan = vae.plan_encode(clip.shape, vae.plan_encode(clip.shape, "1GiB").peak // 2)
    assert plan.chunk < 11
    found, wanted = vae.encode(clip, memory=plan.peak), vae.encode(clip)
    close(found.mean, wanted.mean)
    close(found.logvar, wanted.logvar)


def test_frames_that_leave_need_no_memory_for_a_result():
    vae, shape = network(STREAMS), (1, 2, 40, 6, 6)
    kept, gone = (vae.plan_decode(shape, 2_200_000, collected=collected) for collected in (True, False))
    assert gone.chunk > kept.chunk
    parts = vae.decode_parts(normal(*shape), gone)
    assert [part.shape[2] for part in parts][:2] == [2 * gone.chunk - 1, 2 * gone.chunk]


@pytest.mark.parametrize("way", ["encode", "decode"])
def test_tiles_that_overlap_by_what_layers_see_give_the_whole_clip(way):
    vae, latents, clip = network(CONVS), normal(1, 2, 3, 20, 26), normal(1, 3, 5, 40, 52).clamp(-1, 1)
    x = latents if way == "decode" else clip
    choose = getattr(vae, f"plan_{way}")
    with pytest.raises(ConfigError, match="smallest") as refused:
        choose(x.shape, 1)
    memory = in_bytes(str(refused.value).rpartition(" is ")[2]) * 5 // 4
    plan = choose(x.shape, memory)
    assert plan.exact
    assert plan.tile != (20, 26)
    if way == "decode":
        close(vae.decode(latents, memory=memory), vae.decode(latents))
    else:
        close(vae.encode(clip, memory=memory).mean, vae.encode(clip).mean)


def test_tiles_of_a_model_that_sees_the_frame_are_said_to_be_an_approximation(caplog):
    vae, latents = network(SEES_FRAME), normal(1, 2, 3, 20, 26)
    memory = 2 * least(vae, latents)
    plan = vae.plan_decode(latents.shape, memory)
    assert not plan.exact
    assert LEAST_TILE <= min(plan.tile) < 20
    decoded = vae.decode(latents, memory=memory)
    assert "an approximation" in caplog.text
    difference = (decoded - vae.decode(latents)).abs()
    assert 1e-6 < difference.max() < 1


def test_a_picture_that_tiles_see_alike_is_blended_to_itself():
    vae = network(replace(CONVS, encoder=(), decoder=(), latent_channels=12, patch=2))
    latents = normal(1, 12, 3, 20, 26)
    plan = Budgeted(3, (8, 10), 2, exact=False, peak=0)
    close(collect(vae.way("decoder"), latents, plan, (1, 3, 3, 40, 52)), vae.decode(latents))


@given(st.integers(1, 40), st.integers(1, 12), st.integers(0, 5), st.integers(0, 5))
def test_tiles_cover_an_axis_once(length, more, before, after):
    tile = before + after + more
    found = spans(length, tile, before + after, before)
    kept = [k for span in found for k in range(span.first, span.last)]
    assert kept == list(range(length))
    for span in found:
        assert span.stop - span.start <= tile
        assert span.start == 0 or span.first - span.start >= before
        assert span.stop == length or span.stop - span.last >= after


BLOCKS: dict[str, Part] = {
    "conv": Conv(4, (3, 3)),
    "strided": Conv(4, (1, 3), (1, 2), Padding(space="after")),
    "odd": Conv(4, (1, 3), (1, 2)),
    "res": Res(4, Norm("rms"), kernels=((1, 3), (1, 1))),
    "fold": Fold(2, channels=4),
    "act": Act(Norm("rms")),
}
UP: dict[str, Part] = {"nearest": Nearest(2), "unfold": Unfold(2, channels=4), "wide": Conv(4, (1, 5))}


@settings(max_examples=12, deadline=None)
@given(st.lists(st.sampled_from(sorted(BLOCKS)), min_size=1, max_size=4), st.data())
def test_the_reach_is_how_far_a_result_depends_on_its_input(names, data):
    decodes = data.draw(st.booleans())
    known = {**BLOCKS, **UP} if not decodes else {k: v for k, v in {**BLOCKS, **UP}.items() if v.space == 1 or k in UP}
    if decodes:
        names = data.draw(st.lists(st.sampled_from(sorted(known)), min_size=1, max_size=4))
    layers = tuple(known[name] for name in names)
    found = reach(layers, "space", "decode" if decodes else "encode")
    assert found is not None
    torch.manual_seed(0)
    module, f = build_layers(layers, 4).double(), factor(layers, "space")
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter)
    n = 40 if decodes else 40 * f
    x = normal(1, 4, 1, n, 16).requires_grad_(True)
    y, _ = module(x, None)
    rows = slice(20 * f, 21 * f) if decodes else slice(20, 21)
    (grad,) = torch.autograd.grad(y[..., rows, :].square().sum(), x)
    seen = grad.abs().sum((0, 1, 2, 4)).nonzero().flatten()
    unit = 1 if decodes else f
    assert (20 - int(seen.min()) // unit, int(seen.max()) // unit - 20) == found


@pytest.mark.parametrize(
    "layer", [Attention("frame"), Attention("past"), Act(Groups(2, "frame")), Res(8, noise=True), Res(8, Groups(2))]
)
def test_what_sees_the_frame_has_no_reach(layer):
    assert reach((Conv(8), layer), "space", "decode") is None


@settings(max_examples=8, deadline=None)
@given(st.lists(st.integers(1, 5), min_size=1, max_size=5))
def test_a_decoder_that_looks_ahead_streams_exactly_but_later(lengths):
    vae, total = network(AHEAD), sum(lengths)
    latents = normal(1, 2, total, 3, 4)
    whole = vae.decode(latents)
    parts = list(vae.stream_decode(iter(latents.split(lengths, dim=2))))
    close(torch.cat(parts, dim=2), whole)


def test_the_window_is_as_wide_as_it_has_to_be():
    before, after = reach(AHEAD.decoder, "time", "decode")
    vae, latents = network(AHEAD), normal(1, 2, 24, 2, 2).requires_grad_(True)
    (grad,) = torch.autograd.grad(vae.decode(latents)[:, :, 23:25].square().sum(), latents)  # of latent 12
    seen = grad.abs().sum((0, 1, 3, 4)).nonzero().flatten()
    assert 12 + after == int(seen.max())
    assert 12 - before <= int(seen.min())
    assert reach((Act(Groups(2, "clip")),), "time", "decode") is None


def test_plans_of_what_needs_the_whole_clip_have_no_chunks():
    config = replace(STREAMS, decoder=(Conv(8), Act(Groups(2, "clip")), Conv(64), Unfold(2, 2), Conv(12)))
    vae, latents = network(config), normal(1, 2, 9, 16, 16)
    memory = least(vae, latents) * 5 // 4
    plan = vae.plan_decode(latents.shape, memory)
    assert (plan.chunk, plan.exact) == (9, False)
    with pytest.raises(ConfigError, match="its norm sees all frames, so a plan of 3 latents"):
        vae.decode_parts(latents, Budgeted(3, (16, 16), 0, exact=True, peak=0))
    with pytest.raises(ConfigError, match="its norm sees all frames"):
        list(vae.stream_decode([latents]))


def test_tensors_of_another_type_or_with_gradients_are_refused():
    vae, latents = network(STREAMS), normal(1, 2, 2, 2, 2)
    with pytest.raises(ConfigError, match=r"of torch.float64 and was given torch.float32; cast"):
        vae.decode(latents.float())
    with pytest.raises(ConfigError, match="is on cpu and was given a tensor on meta"):
        vae.encode(normal(1, 3, 1, 8, 8).to("meta"))
    with pytest.raises(ConfigError, match="leaves no gradients"):
        vae.decode(latents.requires_grad_(True), memory="1GiB")
    with pytest.raises(ConfigError, match="nothing to decode"):
        vae.decode(normal(1, 2, 0, 2, 2))
    with pytest.raises(ConfigError, match="got 0; nearest: 1"):
        vae.encode(normal(1, 3, 0, 8, 8))
