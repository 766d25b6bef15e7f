import math
from itertools import pairwise

import pytest
import torch
from pipelines import normal

from reelflow.conditioning.text import TextFeatures
from reelflow.errors import ConfigError
from reelflow.families.kl_vae import autoencoder
from reelflow.families.opensora import transformer
from reelflow.families.opensora_system import text_to_video
from reelflow.generation.published import PublishedPipeline, PublishedSampling
from reelflow.models.condition import Condition
from reelflow.models.dit import VideoDiT
from reelflow.models.vae import CausalVAE

LENGTHS = {"a kite": 2, "two cats run to the sea": 6, "dunes": 1}


def features(prompts) -> TextFeatures:
    tokens = torch.stack([normal(len(prompt), 7, 10) for prompt in prompts])
    mask = torch.arange(7) < torch.tensor([[LENGTHS[prompt]] for prompt in prompts])
    return TextFeatures(tokens, mask, None)


@pytest.fixture
def network() -> VideoDiT:
    torch.manual_seed(0)
    model = VideoDiT(transformer(heads=2, dim=24, depth=1, text=10, text_tokens=7)).eval().requires_grad_(False)
    for index, parameter in enumerate(model.parameters()):
        parameter.copy_(normal(index, *parameter.shape) / (parameter[0].numel() if parameter.ndim > 1 else 25) ** 0.5)
    model.context.null.copy_(normal(0, 7, 10))
    return model


@pytest.fixture
def system(network) -> PublishedPipeline:
    vae = CausalVAE(autoencoder(latent=4, scale=0.18215, widths=(4, 4, 4, 4), blocks=1, groups=2))
    return PublishedPipeline(text_to_video(network, vae.eval().requires_grad_(False), features))


@pytest.mark.parametrize("frames", [1, 5])
def test_latents_are_those_of_the_formulas(network, system, frames):
    prompts, steps, scale = list(LENGTHS)[:2], 4, 7.0
    height, width, told = 32, 48, 120.0 if frames == 1 else 12.0
    z, read = normal(1, 2, 4, frames, height // 8, width // 8), features(prompts)
    ratio = math.sqrt(height * width / 512**2) * math.sqrt(frames)  # latent frames, of which this autoencoder has all
    stamps = [1000 * (1 - k / steps) for k in range(steps)]
    stamps = [1000 * ratio * (s / 1000) / (1 + (ratio - 1) * s / 1000) for s in stamps] + [0.0]
    x, rate = z, torch.full((2, 1), told)
    for now, after in pairwise(stamps):
        t = torch.full((2,), 1 - now / 1000)
        cond, uncond = (
            network(x, t, Condition(context=tokens, context_mask=read.mask, numbers=rate))[:, :4]
            for tokens in (read.tokens, network.context.null.expand(2, -1, -1))
        )
        x = x + (uncond + scale * (cond - uncond)) * (now - after) / 1000
    asked = PublishedSampling(num_steps=steps, height=height, width=width, fps=12.0)
    made = system.generate(prompts, num_frames=frames, noise=z, sampling=asked, output="latents")
    torch.testing.assert_close(made, x, rtol=0, atol=1e-4 * x.square().mean().sqrt().item())


def test_negative_prompts_are_refused(system):
    with pytest.raises(ConfigError, match="leave out negative prompts"):
        system.check(["dunes"], num_frames=1, sampling=PublishedSampling(negative_prompt="dark"))


def test_a_network_without_features_of_no_text_is_refused(system):
    other = VideoDiT(transformer(heads=2, dim=24, depth=1, text=10, text_tokens=0))
    with pytest.raises(ConfigError, match="holds the features of no text"):
        text_to_video(other, system.system.vae, features)
