"""The founding models: what they hold, what they cost, and that each learns to show what is asked for.

The world they learn is small: a disc of three colours moves fast in one of four directions, in five frames of 32 x 32.
A latent is a 2 x 2 mean, four of them folded into channels: fixed, and good enough to read a clip back from.
"""

import itertools
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor

from reelflow.conditioning.text import HashedWords
from reelflow.data.loader import ShuffledBatches
from reelflow.data.worlds import Combination, World, analyse, prompt
from reelflow.diffusion.guidance import guided
from reelflow.diffusion.samplers import ancestral, euler
from reelflow.diffusion.timesteps import inference_times
from reelflow.errors import ConfigError
from reelflow.families.founding import CLIPS, clip_cost, corrections
from reelflow.families.vdit import (
    FAMILY,
    MEDIUM,
    SIZES,
    FoundingModel,
    Size,
    class_conditional,
    founding_models,
    pixels,
)
from reelflow.generation.pipeline import to_frames
from reelflow.models.condition import Condition
from reelflow.models.context import Layers
from reelflow.models.dit import VideoDiT
from reelflow.models.vae import Posterior
from reelflow.nn.embed import SinCos
from reelflow.nn.patchify import Patch
from reelflow.planning.cost import dit_cost
from reelflow.training.flow import FlowConfig, FlowTask, LatentBatch, inner_matrix
from reelflow.training.loop import TrainingConfig, train
from reelflow.training.optim import OptimizerConfig

WORLD = World(height=32, width=32, num_frames=17, contrast=0.0)
ASKED = [
    Combination(c, "disc", m) for c, m in itertools.product(("red", "green", "blue"), ("left", "right", "up", "down"))
]
WORDS = HashedWords(dim=48, max_words=6)
TINY = Size(dim=128, depth=3, num_heads=2)
EVERY_MODEL = founding_models()


def clips(num: int, seed: int) -> tuple[Tensor, Tensor]:
    """Clips B 3 5 32 32 in [-1, 1] and which of ASKED each shows, in turn; every fourth frame, so that it moves fast."""
    rng, which = np.random.default_rng(seed), torch.arange(num) % len(ASKED)
    frames = [WORLD.render(WORLD.draw_scene(rng, **ASKED[i]._asdict())).frames[::4] for i in which.tolist()]
    return torch.from_numpy(np.stack(frames)).permute(0, 4, 1, 2, 3).float() / 127.5 - 1, which


def folded(clip: Tensor) -> Tensor:
    return F.pixel_unshuffle(F.avg_pool3d(clip, (1, 2, 2)).transpose(1, 2), 2).transpose(1, 2)


def unfolded(latents: Tensor) -> Tensor:
    small = F.pixel_shuffle(latents.transpose(1, 2), 2).transpose(1, 2)
    return F.interpolate(small, scale_factor=(1, 2, 2), mode="trilinear")


def followed(made: Tensor, which: Tensor) -> Tensor:
    """Say of each clip whether it shows the colour and the motion asked for."""
    read = [analyse(to_frames(clip.clamp(-1, 1)).numpy()) for clip in made]
    asked = [ASKED[i] for i in which.tolist()]
    return torch.tensor([(r.colour, r.motion) == (a.colour, a.motion) for r, a in zip(read, asked, strict=True)])


class Learner(NamedTuple):
    """A founding model made small, with the clips as it sees them."""

    network: VideoDiT
    flow: FlowConfig
    data: Tensor
    which: Tensor
    in_pixels: bool
    mean: Tensor
    std: Tensor

    def condition(self, which: Tensor) -> Condition:
        """Of combinations by number; the one after the last is nothing."""
        if self.network.config.num_classes:
            return Condition(label=which)
        texts = WORDS([*(prompt(*combination) for combination in ASKED), ""]).condition()
        return Condition(context=texts.context[which], context_mask=texts.context_mask[which])

    def batch(self, rows: Tensor) -> LatentBatch:
        data = self.data[rows]
        return LatentBatch(Posterior(data, torch.full_like(data, -30)), self.condition(self.which[rows]))

    def sample(self, sampler, num_steps: int, scale: float) -> tuple[Tensor, Tensor]:
        """Make 48 clips, of each combination in turn."""
        which, space = torch.arange(48) % len(ASKED), self.flow.parameterization

        def under(condition: Condition):
            return lambda x, t: self.network(x, t, condition).float()

        nothing = self.condition(torch.full_like(which, len(ASKED)))
        predict = guided(under(self.condition(which)), under(nothing), scale=scale)
        noise = torch.randn(48, *self.data.shape[1:], generator=torch.Generator().manual_seed(1))
        times = inference_times(num_steps, shift=self.flow.shift)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            x = sampler(predict, noise, times, parameterization=space) * self.std + self.mean
        return x if self.in_pixels else unfolded(x), which


def learner(model: FoundingModel) -> Learner:
    """Shrink a model, keeping its blocks, its parameterization and its doors."""
    torch.manual_seed(0)
    (raw, which), in_pixels = clips(960, seed=0), model.vae is None
    data = raw if in_pixels else folded(raw)
    dit = replace(
        model.dit,
        in_channels=data.shape[1],
        patch=Patch(1, 8, 8) if in_pixels else Patch(1, 2, 2),
        absolute=(SinCos(max_period=100.0),),
        theta=100.0,  # grids of four tokens a side
        context=Layers(WORDS.dim) if model.dit.context else None,
        num_classes=len(ASKED) if model.dit.num_classes else 0,
    )
    flow = FlowConfig(parameterization=model.parameterization, time=model.time, shift=model.shift, given_fraction=0.0)
    mean, std = data.mean(), data.std()
    return Learner(VideoDiT(dit), flow, (data - mean) / std, which, in_pixels, mean, std)


def test_the_reader_reads_real_clips_through_the_latents_without_error():
    real, which = clips(48, seed=7)
    assert followed(real, which).all()
    assert followed(unfolded(folded(real)), which).all()
    assert not followed(real, which.roll(1)).any()


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILY)
def test_a_small_one_learns_to_show_the_colour_and_the_motion_asked_for(name, tmp_path):
    small = learner(FAMILY[name](TINY))
    task = FlowTask(
        small.network,
        small.flow,
        null=small.condition(torch.tensor([len(ASKED)])),
        validation=small.batch(torch.arange(24)),
    )
    optimizer = OptimizerConfig(
        lr=3e-3, muon_lr=0.02, muon_iterations=4, warmup_steps=20, decay="linear", final_fraction=0.02
    )
    config = TrainingConfig(
        steps=STEPS[name], batch_size=16, optimizer=optimizer, seed=0, ema_decay=None, precision="bf16", log_every=100
    )
    with ShuffledBatches(len(small.data), 16, lambda rows, _: small.batch(rows), seed=0, prefetch=0) as batches:
        train(
            task,
            batches,
            config,
            tmp_path,
            hidden=inner_matrix,
            console=Console(quiet=True),
        )
    small.network.eval()
    share = followed(*small.sample(euler, 20, 3.0)).float().mean()
    assert share >= 0.8
    if name == "vdit":
        generator = torch.Generator().manual_seed(2)
        noisy = small.sample(lambda *args, **options: ancestral(*args, generator=generator, **options), 50, 3.0)
        assert followed(*noisy).float().mean() >= 0.8


STEPS = {"vdit": 350, "vdit-pixels": 450, "vdit-text": 350, "vdit-gated": 350, "vdit-mm": 500}


@pytest.mark.parametrize("name", FAMILY)
def test_every_weight_of_a_model_is_used(name):
    torch.manual_seed(0)
    model = FAMILY[name](Size(dim=64, depth=2, num_heads=1))
    network, dit = VideoDiT(model.dit), model.dit
    for weight in network.parameters():  # gates and readout begin at zero
        torch.nn.init.normal_(weight, std=0.1)
    condition = (
        Condition(label=torch.tensor([5, 101])) if dit.num_classes else Condition(context=torch.randn(2, 3, 4096))
    )
    extents = tuple(2 * side for side in dit.patch)
    answer = network(torch.randn(2, dit.in_channels, *extents), torch.tensor([0.2, 0.7]), condition)
    assert answer.shape == (2, dit.in_channels, *extents)
    answer.square().mean().backward()
    assert [n for n, weight in network.named_parameters() if weight.grad is None or not weight.grad.any()] == []


def test_sizes_are_hidden_depth_heads_with_heads_of_64():
    assert {name: (s.dim, s.depth, s.num_heads) for name, s in SIZES.items()} == {
        "small": (512, 8, 8),
        "medium": (768, 12, 12),
        "large": (1024, 24, 16),
        "xl": (1536, 28, 24),
    }
    for name, model in EVERY_MODEL.items():
        assert model.dit.dim == 64 * model.dit.num_heads, name
        assert len(model.dit.layers) == SIZES[name.rpartition("-")[2]].depth


@pytest.mark.parametrize("dim", [64, 768])
def test_a_block_of_the_class_conditional_model_has_29_dim_squared_weights(dim):
    """Two attentions of 4, a gated MLP of 12, nine vectors of modulation; and biases and norms of queries and keys."""
    deep, shallow = (
        dit_cost(class_conditional(Size(dim, depth, dim // 64)).dit, (1, 2, 2), 0).num_parameters for depth in (2, 1)
    )
    assert deep - shallow == 29 * dim**2 + 26 * dim + 4 * 64


def test_pixels_are_cut_into_as_many_tokens_of_192_times_the_values():
    model, sibling = pixels(MEDIUM), class_conditional(MEDIUM)
    whole = dit_cost(model.dit, model.extents(*model.clip), 0)
    even = dit_cost(sibling.dit, (4, 32, 32), 0)  # 16 frames / 4, if time divided so
    assert whole.num_tokens == even.num_tokens == 1024
    assert model.dit.in_channels * np.prod(model.dit.patch) == 192 * sibling.dit.in_channels * np.prod(
        sibling.dit.patch
    )


@pytest.mark.parametrize(
    ("clip", "message"),
    [
        ((16, 256, 256), "1 \\+ 4 k, got 16; nearest: 13 or 17"),
        ((17, 1080, 1920), "height must be a multiple of 16 .* got 1080; nearest: 1072 or 1088"),
        ((17, 256, 8), "width must be a multiple of 16 .* got 8; nearest: 16 or 32"),
    ],
)
def test_an_impossible_clip_is_refused_with_its_neighbours(clip, message):
    with pytest.raises(ConfigError, match=message):
        EVERY_MODEL["vdit-xl"].extents(*clip)


@pytest.mark.parametrize("name", CLIPS)
def test_factorised_attention_saves_s_t_over_s_plus_t(name):
    cost = clip_cost(name)
    s, t = cost.grid.h * cost.grid.w, cost.grid.t
    assert cost.full_pairs == (s * t) ** 2
    assert cost.full_pairs / cost.factorised_pairs == pytest.approx(s * t / (s + t), rel=1e-12)


def test_the_founding_clips_have_the_tokens_that_were_counted_and_those_that_are():
    assert [clip_cost(name).counted.num_tokens for name in CLIPS] == [1024, 12 * 45 * 80, 30 * 68 * 120]
    assert [clip_cost(name).clip for name in CLIPS] == [(17, 256, 256), (49, 720, 1280), (121, 1088, 1920)]
    assert [clip_cost(name).grid.num_tokens for name in CLIPS] == [5 * 256, 13 * 45 * 80, 31 * 68 * 120]


def test_corrections_are_the_known_ones():
    truth = {correction.claim: correction.truth for correction in corrections()}
    assert len(truth) == 13
    for claim, words in {
        "stride-2": "three to 32",
        "16,777,216": f"{65_536**2:,}",
        "46 x": "4.7 x",
        "(2, 2, 2)": "8 x 8 x 8",
        "16 or 48": "17 -> 5, 49 -> 13",
        "192 x": f"{17 * 48 / 5:.0f} x for the 17 frames",
        "1080p": "135, odd",
        "8192": "1 : 192 in values",
        "3072 / 768": "2 x (3072 / 1536)",
    }.items():
        (found,) = (value for key, value in truth.items() if claim in key)
        assert words in found
    (about_half,) = (value for key, value in truth.items() if "400 M" in key)
    assert 0.45 < float(about_half.split()[0]) / 400 < 0.55
