from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from reelflow.config import from_dict, to_dict
from reelflow.errors import ConfigError
from reelflow.models.coder import (
    Act,
    Attention,
    Conv,
    Groups,
    Haar,
    Padding,
    Res,
    Shifted,
    Skip,
    Standard,
    Tile,
    Timed,
    Unfold,
)
from reelflow.models.vae import CausalVAE, Posterior, Stage, VAEConfig, staged
from reelflow.nn.conv import START

# 4 x 4 x 4: one stage halves space and time at once, the next time alone, the patch halves space; one changes width.
SHAPE = {
    "latent_channels": 3,
    "encoder": (Stage(8, 1, space=2, time=2), Stage(16, 1, time=2), Stage(16, 0), Stage(12, 0)),
    "decoder": (Stage(12, 0), Stage(16, 0), Stage(16, 1, time=2), Stage(8, 1, space=2, time=2)),
    "patch": 2,
}
CONFIG = staged(**SHAPE)
TIME, SPACE = 4, 4
KINDS = {
    "conv": ["full", "factorised"],
    "resample_kernel": [1, 3],
    "mid_attention": ["none", "frame"],
    "time_padding": ["first", "zeros"],
}


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def clip_of(num_frames: int, *, batch: int = 1) -> torch.Tensor:
    return normal(batch, 3, num_frames, 8, 12).clamp(-1, 1)


def network(config: VAEConfig = CONFIG) -> CausalVAE:
    """A model in which no part is silent: every parameter is drawn at random, and latents have statistics."""
    torch.manual_seed(0)
    vae = CausalVAE(config).double().requires_grad_(False)
    for name, parameter in vae.named_parameters():
        nn.init.normal_(parameter, mean=float(".norm" in name), std=0.5 / max(1, parameter[0].numel()) ** 0.5)
    vae.set_statistics(normal(config.latent_channels), normal(config.latent_channels, seed=1).abs() + 0.5)
    return vae


def close(a, b) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def encode_stream(vae: CausalVAE, clip: torch.Tensor, lengths: list[int]) -> Posterior:
    posteriors, state = [], None
    for chunk in clip.split(lengths, dim=2):
        posterior, state = vae.encode_chunk(chunk, state)
        posteriors += [] if posterior is None else [posterior]
    assert state.pending is None
    return Posterior(*(torch.cat(parts, dim=2) for parts in zip(*posteriors, strict=True)))


@st.composite
def cuttings(draw, total: int):
    """Any way to cut `total` frames into chunks of at least one."""
    cuts = sorted(draw(st.sets(st.integers(1, total - 1), max_size=6))) if total > 1 else []
    return [stop - start for start, stop in zip([0, *cuts], [*cuts, total], strict=True)]


@settings(max_examples=30, deadline=None)
@given(data=st.data(), kinds=st.fixed_dictionaries({name: st.sampled_from(values) for name, values in KINDS.items()}))
def test_streams_equal_the_whole_clip_however_they_are_cut(data, kinds):
    vae = network(staged(**SHAPE, **kinds))
    num_latents = data.draw(st.integers(1, 6), label="latent frames")
    clip = clip_of(1 + TIME * (num_latents - 1))
    whole = vae.encode(clip)
    streamed = encode_stream(vae, clip, data.draw(cuttings(clip.shape[2]), label="frames"))
    close(streamed.mean, whole.mean)
    close(streamed.logvar, whole.logvar)

    latents = normal(*whole.mean.shape, seed=2)
    chunks = latents.split(data.draw(cuttings(num_latents), label="latents"), dim=2)
    decoded = vae.decode(latents)
    assert decoded.shape == clip.shape
    close(torch.cat(list(vae.stream_decode(chunks)), dim=2), decoded)


@pytest.mark.parametrize("name", KINDS)
def test_every_option_changes_the_network(name):
    """Else the test above would compare one network with itself sixteen times."""
    latents = [network(staged(**SHAPE, **{name: value})).encode(clip_of(5)).mean for value in KINDS[name]]
    assert (latents[0] - latents[1]).abs().mean() > 1e-3


@pytest.mark.parametrize("time_padding", KINDS["time_padding"])
def test_no_latent_knows_a_later_frame_and_no_frame_a_later_latent(time_padding):
    vae, clip = network(staged(**SHAPE, mid_attention="frame", time_padding=time_padding)), clip_of(13)
    latents = vae.encode(clip).mean
    clip[:, :, -1] = -clip[:, :, -1]
    changed = vae.encode(clip).mean
    assert torch.equal(changed[:, :, :-1], latents[:, :, :-1])
    assert (changed[:, :, -1] != latents[:, :, -1]).any()

    frames = vae.decode(latents)
    for latent, first in ((3, 9), (1, 1)):
        other = latents.clone()
        other[:, :, latent] += 1
        changed = vae.decode(other)
        assert torch.equal(changed[:, :, :first], frames[:, :, :first])
        assert (changed[:, :, first:] != frames[:, :, first:]).flatten(3).any(-1).any(1).all()


def test_an_image_is_the_first_frame_of_any_clip():
    vae, clip = network(staged(**SHAPE, mid_attention="frame")), clip_of(9)
    image, whole = vae.encode(clip[:, :, :1]), vae.encode(clip)
    close(image.mean, whole.mean[:, :, :1])
    close(image.logvar, whole.logvar[:, :, :1])
    close(vae.decode(image.mean), vae.decode(whole.mean)[:, :, :1])


@pytest.mark.parametrize("time", [1, 2, 4])
@pytest.mark.parametrize("num_frames", range(1, 21))
def test_every_length_has_its_latents_or_is_refused_with_its_neighbours(num_frames, time):
    config = staged(latent_channels=2, encoder=(Stage(4, 0, time=time),), decoder=(Stage(4, 0, time=time),))
    vae = CausalVAE(config)
    clip = torch.zeros(1, 3, num_frames, 2, 2)
    if (num_frames - 1) % time == 0:
        assert vae.encode(clip).mean.shape == (1, *config.latent_shape(num_frames, 2, 2))
        assert config.latent_shape(num_frames, 2, 2) == (2, 1 + (num_frames - 1) // time, 2, 2)
        assert vae.decode(torch.zeros(1, *config.latent_shape(num_frames, 2, 2))).shape == clip.shape
    else:
        below = max(n for n in range(1, num_frames) if (n - 1) % time == 0)
        message = rf"num_frames must be 1 \+ {time} k, got {num_frames}; nearest: {below} or {below + time}$"
        with pytest.raises(ConfigError, match=message):
            vae.encode(clip)


def test_a_stream_gives_latents_as_soon_as_their_frames_are_there():
    vae, clip, state, counts = network(), clip_of(9), None, []
    for frame in clip.split(1, dim=2):
        posterior, state = vae.encode_chunk(frame, state)
        counts.append(0 if posterior is None else posterior.mean.shape[2])
    assert counts == [1, 0, 0, 0, 1, 0, 0, 0, 1]


def test_a_copied_state_continues_the_same_stream_and_leaves_the_original_alone():
    vae, clip = network(staged(**SHAPE, mid_attention="frame")), clip_of(13)
    _, state = vae.encode_chunk(clip[:, :, :7])
    saved = deepcopy(state)
    first, _ = vae.encode_chunk(clip[:, :, 7:], state)
    vae.encode_chunk(-clip[:, :, 7:], state)
    for again in (state, saved):
        assert torch.equal(vae.encode_chunk(clip[:, :, 7:], again)[0].mean, first.mean)

    latents = normal(1, 3, 4, 2, 3)
    _, state = vae.decode_chunk(latents[:, :, :2])
    saved = deepcopy(state)
    first, _ = vae.decode_chunk(latents[:, :, 2:], state)
    vae.decode_chunk(-latents[:, :, 2:], state)
    for again in (state, saved):
        assert torch.equal(vae.decode_chunk(latents[:, :, 2:], again)[0], first)


def test_two_streams_do_not_disturb_each_other():
    vae = network()
    latents, outputs, states = (normal(1, 3, 3, 2, 2), normal(1, 3, 3, 2, 2, seed=1)), ([], []), [START, START]
    for index in range(3):
        for stream in range(2):
            frames, states[stream] = vae.decode_chunk(latents[stream][:, :, index : index + 1], states[stream])
            outputs[stream].append(frames)
    for stream in range(2):
        close(torch.cat(outputs[stream], dim=2), vae.decode(latents[stream]))


def test_what_a_stream_remembers_does_not_grow():
    vae, state, sizes = network(), None, []

    def count(part) -> int:
        return part.untyped_storage().nbytes() if isinstance(part, torch.Tensor) else sum(map(count, part or ()))

    for _ in range(4):
        _, state = vae.encode_chunk(clip_of(8), state)
        sizes.append(count(state))
    assert sizes == 4 * sizes[:1]


def test_rows_of_a_batch_do_not_see_each_other():
    vae, clips = network(staged(**SHAPE, mid_attention="frame")), clip_of(5, batch=3)
    together = vae.encode(clips).mean
    for row in range(3):
        close(vae.encode(clips[row : row + 1]).mean, together[row : row + 1])
        close(vae.decode(together[row : row + 1]), vae.decode(together)[row : row + 1])


def test_statistics_make_unit_variance_and_do_not_change_what_is_decoded():
    vae, clips = network(), clip_of(9, batch=4)
    before, decoded = vae.encode(clips), vae.decode(vae.encode(clips).mean)
    values = before.mean.transpose(0, 1).flatten(1)
    vae.set_statistics(values.mean(1), values.std(1))
    after = vae.encode(clips)
    values = after.mean.transpose(0, 1).flatten(1)
    close(values.mean(1), torch.zeros(3, dtype=torch.float64))
    close(values.std(1), torch.ones(3, dtype=torch.float64))
    close(vae.decode(after.mean), decoded)
    noise = [(p.logvar / 2).exp() / p.mean.std(dim=(0, 2, 3, 4), keepdim=True) for p in (before, after)]
    close(*noise)  # the posterior is scaled as a whole


def test_statistics_travel_with_the_weights():
    vae = network()
    other = CausalVAE(CONFIG).double().requires_grad_(False)
    other.load_state_dict(vae.state_dict())
    assert torch.equal(other.encode(clip_of(5)).mean, vae.encode(clip_of(5)).mean)


def test_a_channel_that_carries_nothing_has_no_statistics():
    with pytest.raises(ConfigError, match=r"every std must be positive, got \[1\.0, 0\.0, 1\.0\]"):
        network().set_statistics(torch.zeros(3), torch.tensor([1.0, 0.0, 1.0]))


def test_a_fresh_posterior_is_quiet():
    torch.manual_seed(0)
    posterior = CausalVAE(CONFIG).double().encode(clip_of(9))
    assert (posterior.logvar + 6).abs().max() < 1
    assert posterior.mean.std() > 0.1


def test_a_posterior_is_sampled_and_measured_as_a_gaussian():
    posterior = Posterior(torch.full((1, 1, 20_000, 1, 1), 0.7), torch.full((1, 1, 20_000, 1, 1), -1.0))
    draws = posterior.sample(torch.Generator().manual_seed(0))
    assert torch.equal(draws, posterior.sample(torch.Generator().manual_seed(0)))
    assert draws.mean().item() == pytest.approx(0.7, abs=0.02)
    assert draws.var().item() == pytest.approx(torch.tensor(-1.0).exp().item(), rel=0.05)
    prior = torch.distributions.Normal(0.0, 1.0)
    expected = torch.distributions.kl_divergence(torch.distributions.Normal(0.7, torch.tensor(-0.5).exp()), prior)
    torch.testing.assert_close(posterior.kl(), expected)
    assert Posterior(torch.zeros(1, 1, 1, 1, 1), torch.zeros(1, 1, 1, 1, 1)).kl() == 0


def test_gradients_reach_every_parameter():
    vae = network(staged(**SHAPE, mid_attention="frame")).requires_grad_(True)
    posterior = vae.encode(clip_of(9))
    (vae.decode(posterior.sample(torch.Generator().manual_seed(0))).square().sum() + posterior.kl()).backward()
    assert [name for name, p in vae.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_bfloat16_autocast_stays_near_float32():
    vae, clip = network(staged(**SHAPE, mid_attention="frame")).float(), clip_of(9).float()
    exact = vae.encode(clip).mean
    with torch.autocast("cpu", torch.bfloat16):
        rough = vae.encode(clip)
        decoded = vae.decode(exact)
    assert (rough.mean - exact).norm() < 0.03 * exact.norm()
    assert (decoded.float() - vae.decode(exact)).norm() < 0.03 * vae.decode(exact).norm()


def test_strides_are_products_of_patch_and_stages():
    assert (CONFIG.spatial_stride, CONFIG.temporal_stride) == (SPACE, TIME)
    assert CONFIG.latent_shape(17, 64, 32) == (3, 5, 16, 8)


@pytest.mark.parametrize(
    ("num_frames", "height", "width", "message"),
    [
        (0, 8, 8, r"num_frames must be 1 \+ 4 k, got 0; nearest: 1 or 5"),
        (-3, 8, 8, "got -3; nearest: 1 or 5"),
        (5, 10, 8, r"height must be a multiple of 4 .* got 10; nearest: 8 or 12"),
        (5, 8, 3, r"width must be a multiple of 4 .* got 3; nearest: 4$"),
    ],
)
def test_extents_that_do_not_fit_are_refused(num_frames, height, width, message):
    with pytest.raises(ConfigError, match=message):
        CONFIG.latent_shape(num_frames, height, width)


def test_chunks_that_do_not_fit_are_refused():
    vae = network()
    with pytest.raises(ConfigError, match="height must be a multiple of 4"):
        vae.encode_chunk(torch.zeros(1, 3, 2, 6, 8, dtype=torch.float64))
    for channels in (1, 4):
        with pytest.raises(ConfigError, match=f"the VAE has 3 latent channels, got {channels}"):
            vae.decode(torch.zeros(1, channels, 2, 2, 2, dtype=torch.float64))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"encoder": (Stage(8, 1, space=2),)}, "encoder divides time by 1 but decoder multiplies it by 4"),
        ({"decoder": (Stage(16, 0, time=4),)}, "encoder divides space by 2 but decoder multiplies it by 1"),
        ({"latent_channels": 0}, "latent_channels >= 1"),
        ({"patch": 0}, "patch >= 1"),
        ({"encoder": ()}, "stages in encoder and decoder"),
    ],
)
def test_an_impossible_shape_is_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        staged(**SHAPE | changes)


@pytest.mark.parametrize(("fine", "coarse"), [(8, 20), (6, 32), (10, 50), (3, 7), (16, 1000)])
def test_widths_that_do_not_divide_are_refused_with_one_that_does(fine, coarse):
    def config(coarse: int) -> VAEConfig:
        return staged(2, (Stage(fine, 0, space=2, time=2), Stage(coarse, 0)), (Stage(coarse, 0), Stage(fine, 0, 2, 2)))

    with pytest.raises(ConfigError, match=rf"resampling {fine} -> {coarse} channels over cells of 8") as refusal:
        config(coarse)
    nearest = int(str(refusal.value).rpartition("nearest: ")[2])
    assert CausalVAE(config(nearest)).encode(torch.zeros(1, 3, 3, 2, 2)).mean.shape == (1, 2, 2, 1, 1)


@pytest.mark.parametrize("changes", [{"channels": 0}, {"num_blocks": -1}, {"space": 0}, {"time": 0}])
def test_an_impossible_stage_is_refused(changes):
    (name, value), *_ = changes.items()
    with pytest.raises(ConfigError, match=f"a stage's {name} must be at least .*, got {value}"):
        replace(Stage(8, 1), **changes)


def test_without_stages_latents_are_the_pixels_folded_and_scaled():
    vae = network(staged(latent_channels=12, encoder=(), decoder=(), patch=2))
    clip = clip_of(4, batch=2)
    posterior = vae.encode(clip)
    assert posterior.mean.shape == (2, 12, 4, 4, 6)
    assert posterior.logvar.exp().max() < 1e-11  # nothing is drawn
    close(vae.decode(posterior.mean), clip)
    close(encode_stream(vae, clip, [1, 2, 1]).mean, posterior.mean)
    close(torch.cat(list(vae.stream_decode(posterior.mean.split(2, dim=2))), dim=2), clip)


def test_pixels_have_as_many_channels_as_the_patch_folds():
    with pytest.raises(ConfigError, match="nearest: 12"):
        staged(latent_channels=8, encoder=(), decoder=(), patch=2)


@pytest.mark.parametrize(
    ("shape", "change", "message"),
    [
        ((1, 3, 2, 2, 2), float("nan"), "latents must be finite"),
        ((1, 3, 2, 2, 2), float("inf"), "latents must be finite"),
        ((1, 3, 0, 2, 2), 0.0, "nothing to decode"),
    ],
)
def test_latents_that_no_clip_has_are_refused(shape, change, message):
    with pytest.raises(ConfigError, match=message):
        network().decode(torch.zeros(shape, dtype=torch.float64) + change)


def test_a_clip_of_other_channels_or_of_no_frames_is_refused():
    with pytest.raises(ConfigError, match="a clip is B 3 T H W"):
        network().encode(normal(1, 4, 5, 8, 8))
    with pytest.raises(ConfigError, match=r"num_frames must be 1 \+ 4 k, got 0"):
        network().encode(normal(1, 3, 0, 8, 8))


def test_a_state_of_another_clip_or_model_is_refused():
    vae = network()
    _, state = vae.encode_chunk(clip_of(7))
    with pytest.raises(ConfigError, match="continue a stream as it began"):
        vae.encode_chunk(normal(1, 3, 4, 8, 8), state)
    _, state = vae.decode_chunk(normal(1, 3, 2, 2, 3))
    with pytest.raises(ConfigError, match="another model, batch, size or precision"):
        vae.decode_chunk(normal(1, 3, 2, 2, 2), state)
    with pytest.raises(ConfigError, match="the state has 2 parts"):
        vae.decode_chunk(normal(1, 3, 2, 2, 3), state[:2])


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (Res(4, Groups(2, "clip")), "its norm sees all frames"),
        (Conv(4, pad=Padding("ends")), "its convolution looks at later frames"),
        (Skip((Act(Groups(2, "clip")),)), "its norm sees all frames"),
        (Res(4, noise=True), "its noise is the same in all frames"),
    ],
)
def test_what_needs_the_whole_clip_says_so_beforehand_and_refuses_chunks(layer, reason):
    config = VAEConfig(2, (Conv(4), layer, Conv(4)), (Conv(4), Conv(3)))
    assert not config.streams
    assert config.obstacles == (f"encoder[1] ({layer.kind}): {reason}",)
    vae = CausalVAE(config)
    assert vae.encode(torch.zeros(1, 3, 3, 2, 2)).mean.shape == (1, 2, 3, 2, 2)
    with pytest.raises(ConfigError, match=reason):
        vae.encode_chunk(torch.zeros(1, 3, 3, 2, 2))
    vae.decode_chunk(torch.zeros(1, 2, 1, 2, 2))


def test_attention_to_the_past_streams_with_a_state_that_grows():
    attention = Attention("past")
    vae = network(VAEConfig(2, (Conv(4), attention, Conv(4)), (Conv(4), attention, Conv(3))))
    clip = clip_of(5)
    whole = vae.encode(clip).mean
    close(encode_stream(vae, clip, [2, 1, 2]).mean, whole)
    close(torch.cat(list(vae.stream_decode(whole.split([1, 3, 1], dim=2))), dim=2), vae.decode(whole))
    clip[:, :, 3:] += 1
    assert torch.equal(vae.encode(clip).mean[:, :, :3], whole[:, :, :3])
    clip[:, :, 0] += 1
    assert (vae.encode(clip).mean != whole).flatten(3).any(-1).all()


def test_one_variance_may_be_shared_by_all_channels():
    shared = VAEConfig(2, (Conv(3),), (Conv(3),), posterior="shared")
    posterior = CausalVAE(shared).encode(torch.zeros(1, 3, 1, 2, 2))
    assert posterior.logvar.shape == posterior.mean.shape
    assert torch.equal(posterior.logvar[:, 0], posterior.logvar[:, 1])
    point = VAEConfig(3, (Conv(3),), (Conv(3),), posterior="point")
    assert CausalVAE(point).encode(torch.zeros(1, 3, 1, 2, 2)).logvar.exp().max() < 1e-11


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"encoder": (Conv(4), Conv(5))}, "the encoder's last layer gives 5 channels; expected 4"),
        ({"encoder": (Conv(4), Act(Groups(3)), Conv(4))}, "layer 1 .act.: 4 channels do not divide into 3 groups"),
        ({"encoder": (Conv(4, stride=(1, 2)),), "decoder": (Conv(6), Unfold(2), Conv(3))}, "cells of 4; nearest: 8"),
        ({"decoder": (Skip((Conv(5),)), Conv(3))}, "a shortcut gives 2 channels beside layers that give 5"),
        ({"decoder": (Conv(4), Tile(6), Conv(3))}, "4 channels do not fill 6 evenly; nearest: 8"),
        ({"decoder": (Haar("up"), Conv(3))}, "2 channels are no cells of 2 x 2 x 2; nearest: 8"),
        ({"decoder": (Standard((0.0,), (1.0,), "up"), Conv(3))}, "1 means and 1 stds are not as many for each of 2"),
        ({"decoder": (Standard(2 * (0.0,), (1.0, 0.0), "up"), Conv(3))}, "every std must be positive, got 0.0"),
        ({"decoder": (Timed((Res(4, Shifted()),)), Conv(3))}, "timed layers keep the width, here 2"),
        ({"latent_mean": (0.0, 0.0, 0.0)}, "latent_mean needs 1 value or 2"),
        ({"latent_std": (0.0,)}, "every latent_std must be positive"),
    ],
)
def test_layers_that_do_not_fit_each_other_are_refused(values, message):
    with pytest.raises(ConfigError, match=message):
        VAEConfig(**{"latent_channels": 2, "encoder": (Conv(4),), "decoder": (Conv(3),)} | values)


def test_statistics_of_a_family_come_with_its_configuration():
    config = VAEConfig(2, (Conv(4),), (Conv(3),), latent_mean=(1.0, -1.0), latent_std=(2.0,))
    torch.manual_seed(0)
    plain = CausalVAE(replace(config, latent_mean=(0.0,), latent_std=(1.0,))).double()
    torch.manual_seed(0)
    vae, clip = CausalVAE(config).double(), clip_of(1)
    expected = plain.encode(clip)
    mean = torch.tensor([1.0, -1.0]).view(1, 2, 1, 1, 1)
    close(vae.encode(clip).mean, (expected.mean - mean) / 2)
    close(vae.encode(clip).logvar, expected.logvar - 2 * torch.tensor(2.0, dtype=torch.float64).log())
    close(vae.decode(vae.encode(clip).mean), plain.decode(expected.mean))


def test_a_configuration_survives_json():
    config = staged(**SHAPE, mid_attention="frame")
    assert from_dict(VAEConfig, to_dict(config)) == config


@pytest.mark.parametrize("layers", [(), (Res(4),), (Res(4, Shifted()), Act(Shifted()))])
def test_timed_layers_are_of_one_kind_with_norms_to_shift(layers):
    with pytest.raises(ConfigError, match="all Res or all Act, with Shifted norms"):
        Timed(layers)


def test_a_decoder_that_is_told_the_time_streams_at_that_time():
    timed = (Timed((Res(4, Shifted()), Res(4, Shifted()))), Timed((Act(Shifted()),)))
    vae = CausalVAE(VAEConfig(2, (Conv(4),), (Conv(4), *timed, Conv(3)))).double().requires_grad_(False)
    for parameter in vae.decoder.parameters():
        nn.init.normal_(parameter, std=0.3)
    latents, parts, state = normal(2, 2, 4, 2, 2), [], START
    t = torch.tensor([0.5, 0.75], dtype=torch.float64)
    for chunk in latents.split([1, 2, 1], dim=2):
        frames, state = vae.decode_chunk(chunk, state, t=t)
        parts.append(frames)
    whole = vae.decode(latents, t=t)
    close(torch.cat(parts, dim=2), whole)
    assert (whole != vae.decode(latents)).flatten(1).any(1).all()


def test_half_of_what_a_block_adds_is_kept_at_the_start():
    x = normal(1, 4, 2, 3, 3)
    torch.manual_seed(0)
    every = Res(4).build(4).double()
    share = Res(4, added="share").build(4).double()
    for parameter in every.parameters():
        nn.init.normal_(parameter)
    share.load_state_dict(every.state_dict(), strict=False)
    close(share(x, None)[0] - x, (every(x, None)[0] - x) / 2)


def test_sums_and_differences_give_cells_back():
    x = normal(1, 16, 2, 3, 3)
    down, _ = Haar("down").build(16)(x, None)
    close(Haar("up").build(16)(down, None)[0], x)
    close(down[:, :2], x.unflatten(1, (8, 2)).mean(1))
    close(
        down[:, 2:4], (x.unflatten(1, (4, 2, 2)) * torch.tensor([1.0, -1.0]).view(1, 2, 1, 1, 1, 1)).sum(2).mean(1) / 2
    )
