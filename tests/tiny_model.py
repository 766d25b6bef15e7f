"""A model small enough to run in milliseconds, with random weights everywhere, so that its clips depend on everything."""

import torch

from reelflow.conditioning.text import HashedWords
from reelflow.data.folder import ClipSpec
from reelflow.generation.pipeline import ModelCard, Pipeline
from reelflow.generation.sampling import Sampling
from reelflow.models.blocks import Dual, Single
from reelflow.models.context import Layers
from reelflow.models.dit import DiTConfig, VideoDiT
from reelflow.models.vae import CausalVAE, Stage, staged
from reelflow.nn.patchify import Patch

CARD = ModelCard(
    vae=staged(
        latent_channels=4,
        patch=4,
        resample_kernel=1,
        encoder=(Stage(16, 0, space=2, time=2), Stage(16, 0, time=2)),
        decoder=(Stage(16, 0, time=2), Stage(16, 0, space=2, time=2)),
    ),
    dit=DiTConfig(
        in_channels=4,
        dim=32,
        num_heads=2,
        layers=(Dual(), Single()),
        patch=Patch(1, 2, 2),
        rope=(4, 6, 6),
        context=Layers(32),
        vector_dim=32,
    ),
    text=HashedWords(dim=32, max_words=6),
    clip=ClipSpec(num_frames=9, height=32, width=32, fps=8.0),
    sampling=Sampling(num_steps=4, guidance_scale=2.0),
    words=("a", "left", "moving", "red", "ring"),
)


def tiny_pipeline(seed: int = 0) -> Pipeline:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        pipeline = Pipeline(CARD, CausalVAE(CARD.vae), VideoDiT(CARD.dit))
        for parameter in pipeline.dit.parameters():  # its readout and gates begin at zero
            torch.nn.init.normal_(parameter, std=0.1)
    return pipeline
