"""What sampling does on an accelerator, by one that is not there (tests/pretended.py)."""

from dataclasses import replace

import torch

from pretended import Pretended
from reelflow.diffusion.process import Parameterization, VariancePreserving
from reelflow.generation.pipeline import Pipeline, to_frames
from reelflow.generation.sampling import Ddim, Guidance, Projection, Sampling
from tiny_model import CARD, tiny_pipeline


def test_clips_are_made_where_the_networks_are(monkeypatch):
    """From a picture and noise of the CPU, with more noise that is drawn there, longer than the model's."""
    autocast = torch.autocast("cpu", enabled=False)
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: autocast)  # which does not know this device
    sampling = Sampling(
        num_steps=1,
        sampler=Ddim(),
        guidance=Guidance(difference=Projection(), first_scale=1.0, rescale=0.5),
    )
    card = replace(CARD, parameterization=Parameterization(VariancePreserving(), "v"), sampling=sampling)
    plain = tiny_pipeline()
    with Pretended() as there:
        vae, dit = (there.take(network) for network in (plain.vae, plain.dit))
        pipeline = Pipeline(card, vae, dit)
        picture, noise = torch.zeros(1, 3, 32, 32), torch.zeros(1, 4, 3, 4, 4)
        clip = pipeline.generate(["a red ring"], num_frames=13, image=picture, noise=noise)
        assert (pipeline.device, clip.device, clip.shape) == (there.device, there.device, (1, 3, 13, 32, 32))
        assert to_frames(clip[0]).device == torch.device("cpu")
