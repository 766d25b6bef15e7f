"""Open-Sora 1.2's way from prompts to clips: T5's features of a cleaned caption, guidance away from stored features.

There is no pipeline of it in diffusers, so a system is put together from its parts. What stands for no text is hidden as
the prompt is, and no negative prompt is read. Steps are shifted by the root of the clip's tokens: of the pixels of a
frame over 512 x 512, times the latent frames. The original adds words to the prompts, such as "aesthetic score: 6.5.";
here they are the user's to add.
"""

import math
from collections.abc import Callable, Sequence

import torch

from reelflow.conditioning.pretrained import Reading
from reelflow.conditioning.text import TextFeatures
from reelflow.diffusion.timesteps import inference_times
from reelflow.errors import ConfigError
from reelflow.families.schedulers import read_scheduler
from reelflow.families.system import Asked, Conditions, Defaults, Expert, System, with_variance
from reelflow.models.condition import Condition
from reelflow.models.context import ContextLayers
from reelflow.models.dit import VideoDiT
from reelflow.models.vae import CausalVAE

__all__ = ["PROMPT", "text_to_video"]

PROMPT = Reading(length=300, cleaning="caption")
DEFAULTS = Defaults(num_steps=30, guidance_scale=7.0, clip=(51, 240, 432), fps=24.0)  # 240p in whole tokens
STILL = 120.0  # the frames per second of a picture
TOKENS = (512 // 16) ** 2  # of the picture whose steps are not shifted
EULER = {"_class_name": "FlowMatchEulerDiscreteScheduler"}


def text_to_video(network: VideoDiT, vae: CausalVAE, text: Callable[[Sequence[str]], TextFeatures]) -> System:
    """Return the system of a network, an autoencoder and an encoder that reads as `PROMPT` says.

    Raises:
        ConfigError: the network holds no features of no text.
    """
    context = network.context
    if not isinstance(context, ContextLayers) or context.null is None:
        raise ConfigError("guidance needs a network that holds the features of no text, as those of Open-Sora 1.2 do")
    null = context.null

    def conditions(asked: Asked) -> Conditions:
        read = text(asked.prompts)
        count, length = read.mask.shape
        rate = torch.full((count, 1), asked.fps if asked.num_frames > 1 else STILL)
        nothing = null[:length].expand(count, -1, -1)
        return Conditions(
            Condition(context=read.tokens, context_mask=read.mask, numbers=rate),
            Condition(context=nothing, context_mask=read.mask.to(nothing.device), numbers=rate),
        )

    def check(asked: Asked) -> None:
        if any(asked.negative):
            raise ConfigError("guidance leads away from stored features: leave out negative prompts")

    return System(
        experts=(Expert(network),),
        vae=vae,
        walk=with_variance(read_scheduler(EULER), network),
        defaults=DEFAULTS,
        conditions=conditions,
        times=lambda num_steps, grid: inference_times(num_steps, shift=math.sqrt(grid.num_tokens / TOKENS)),
        check=check,
    )
