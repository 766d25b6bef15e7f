"""Open-Sora-Plan 1.3's way from prompts to latents: mT5's features, guidance, ancestral steps over betas of zero SNR.

Its autoencoder, WF-VAE, runs wavelets beside its convolutions and joins them further on, which no chain of layers does,
so that the system gives latents and makes no picture move; ours are the original's latents, decode them there.
The text encoder lies where `huggingface-cli download google/mt5-xxl --local-dir FOLDER/google/mt5-xxl` puts it.
"""

from collections.abc import Callable, Sequence

import torch

from reelflow.conditioning.pretrained import Reading
from reelflow.conditioning.text import TextFeatures
from reelflow.families import hunyuan_vae
from reelflow.families.schedulers import read_scheduler
from reelflow.families.system import Asked, Conditions, Defaults, Expert, System, SystemFolder
from reelflow.models.dit import VideoDiT
from reelflow.models.vae import CausalVAE

__all__ = ["PROMPT", "text_to_latents"]

PROMPT = Reading(length=512)
PRAISE = "\n    high quality, high aesthetic, {}\n    "
BLAME = (
    "\n    nsfw, lowres, bad anatomy, bad hands, text, error, missing fingers, extra digit, fewer digits, cropped, worst "
    "quality, \n    low quality, normal quality, jpeg artifacts, signature, watermark, username, blurry.\n    "
)
DEFAULTS = Defaults(num_steps=100, guidance_scale=7.5, clip=(93, 352, 640), fps=18.0, negative=BLAME)
SCHEDULER = {
    "_class_name": "EulerAncestralDiscreteScheduler",
    "prediction_type": "v_prediction",
    "rescale_betas_zero_snr": True,
    "timestep_spacing": "trailing",
}
NETWORK, MT5 = "any93x640x640", "google/mt5-xxl"


def text_to_latents(network: VideoDiT, text: Callable[[Sequence[str]], TextFeatures]) -> System:
    """Return the system of a network and an encoder that reads as `PROMPT` says."""
    walk = read_scheduler(SCHEDULER)

    def conditions(asked: Asked) -> Conditions:
        praised = [PRAISE.replace("{}", prompt) for prompt in asked.prompts]
        return Conditions(
            text(praised).condition(),
            text(asked.negative).condition() if asked.guided else None,
        )

    with torch.device("meta"):
        extents = CausalVAE(hunyuan_vae.autoencoder(latent=network.config.in_channels))  # of the same strides
    return System(
        experts=(Expert(network),),
        vae=extents,
        walk=walk,
        defaults=DEFAULTS,
        conditions=conditions,
        times=lambda num_steps, grid: walk.times(num_steps),
        latents_only="the autoencoder of Open-Sora-Plan 1.3 (WF-VAE) is not reproduced",
    )


def _published(folder: SystemFolder) -> System:
    """Read LanguageBind/Open-Sora-Plan-v1.3.0."""
    return text_to_latents(folder.transformer(NETWORK), folder.text(PROMPT, MT5, MT5))


FOLDERS = {f"{NETWORK}/config.json": _published}
