"""Open-Sora 2.0's way from prompts to clips: T5's features and CLIP's vector, guidance by the text and by the picture.

The repository is read as it is published: one file of the network, one of HunyuanVideo's autoencoder, and the folders of
two encoders. A first frame enters beside the noisy latents, and takes its place again in the end. Steps are shifted by the
tokens of a frame and by the root of the latent frames. After ten steps both guidances pause at every second one; that by
the picture grows from the first latent frame to the last, and falls from step to step.

Prompts end as those of its training do, in frames per second and a motion score, here 4 unless the prompt has its own.
The original can also draw a first frame by FLUX.1, and makes 768 pixels too: --height 576 --width 1024.
"""

import math
import re
from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from reelflow.conditioning.pretrained import Reading
from reelflow.conditioning.text import TextFeatures
from reelflow.diffusion.guidance import ScaleFunction, guided, nested, over_frames, stepwise
from reelflow.diffusion.process import Predict
from reelflow.diffusion.timesteps import inference_times
from reelflow.errors import CheckpointError
from reelflow.families.schedulers import mu_of, read_scheduler
from reelflow.families.system import Asked, Branches, Conditions, Defaults, Expert, System, SystemFolder, drawn_first
from reelflow.models.condition import Condition
from reelflow.models.dit import VideoDiT
from reelflow.models.vae import CausalVAE
from reelflow.nn.patchify import Grid

__all__ = ["POOLED", "PROMPT", "text_or_image_to_video"]

PROMPT = Reading(length=512, mask_encoder=False, padding="encoded")
POOLED = Reading(length=77, mask_encoder=False, pooled="output")
DEFAULTS = Defaults(num_steps=50, guidance_scale=7.5, picture_guidance=3.0, clip=(129, 192, 336), fps=24.0)
LINE = {"base_shift": 1.0, "max_shift": 3.0}  # of the shift, at 256 and 4096 tokens a frame
SAME_TIME = 1e-6  # t comes rounded to float32
STEADY = 10  # steps before guidance pauses
MOTION = " 4 motion score."
T5, CLIP = "google/t5-v1_1-xxl", "openai/clip-vit-large-patch14"
NETWORK, VAE = "Open_Sora_v2.safetensors", "hunyuan_vae.safetensors"

Read = Callable[[Sequence[str]], TextFeatures]


def text_or_image_to_video(network: VideoDiT, vae: CausalVAE, text: Read, pooled: Read) -> System:
    """Return the system of a network, an autoencoder and encoders that read as `PROMPT` and `POOLED` say.

    Raises:
        CheckpointError: the network reads no mask and picture beside the latents, or is told of guidance.
    """
    if network.config.extra_channels != vae.config.latent_channels + 1 or network.config.numbers:
        raise CheckpointError(
            "this system needs a network with cond_in and without guidance_in, as Open_Sora_v2.safetensors has them"
        )

    def told(prompts: Sequence[str]) -> Condition:
        return Condition(context=text(prompts).tokens, vector=pooled(prompts).pooled)

    def conditions(asked: Asked) -> Conditions:
        blank = torch.zeros(len(asked.prompts), network.config.extra_channels, *asked.latent_shape[1:])
        nothing = beside = Condition(channels=blank)
        first = None if asked.image is None else drawn_first(asked, vae)
        if first is not None:
            beside = Condition(channels=_beside(first, asked.latent_shape[1]))
        cond = told([ended(prompt, asked.fps) for prompt in asked.prompts]) + beside
        if not asked.guided:
            return Conditions(cond, end=partial(_begun, first))
        less = told(asked.negative)
        return Conditions(
            cond,
            less + beside,
            nothing=None if first is None else less + nothing,
            steer=partial(steer, picture=asked.picture_guidance or 1.0, num_frames=asked.latent_shape[1]),
            end=partial(_begun, first),
        )

    def times(num_steps: int, grid: Grid) -> Float[Tensor, " times"]:
        return inference_times(num_steps, shift=mu_of(LINE, grid.h * grid.w) * math.sqrt(grid.t))

    return System(
        experts=(Expert(network),),
        vae=vae,
        walk=read_scheduler({"_class_name": "FlowMatchEulerDiscreteScheduler"}),
        defaults=DEFAULTS,
        conditions=conditions,
        times=times,
        picture="may",
    )


def steer(branches: Branches, *, picture: float, num_frames: int) -> Predict:
    """Return the prediction led away from other texts and, where there is a picture, from clips without it.

    nothing + picture (uncond - nothing) + scale (cond - uncond), in which `picture` rises over the frames.
    """
    starts, scale = branches.times[:-1] - SAME_TIME, branches.scale
    on = [step < STEADY or step % 2 == 0 for step in range(len(starts))]
    if isinstance(scale, float | int):
        scale = stepwise(starts, [scale if now else 1.0 for now in on])
    if branches.nothing is None or branches.uncond is None:
        return guided(branches.cond, branches.uncond, scale=scale)
    falling = torch.linspace(picture, 1.0, len(starts) + 1).tolist()
    rows = [
        over_frames(1.0 if picture > 1 else picture, most if picture > 1 else picture, num_frames)
        if now
        else torch.ones(num_frames, dtype=torch.float64)
        for now, most in zip(on, falling, strict=False)
    ]
    return nested(
        (branches.nothing, branches.uncond, branches.cond), scales=(_by_step(starts, torch.stack(rows)), scale)
    )


def _by_step(starts: Float[Tensor, " steps"], rows: Float[Tensor, "steps T"]) -> ScaleFunction:
    step = stepwise(starts, [float(index) for index in range(len(rows))])
    return lambda t: rows.to(t.device)[torch.as_tensor(step(t))[:, 0].long()]


def ended(prompt: str, fps: float) -> str:
    """Return a prompt with frames per second and a motion score at its end; one that has a score is whole."""
    prompt = prompt.strip()
    if re.search(r"\d+ motion score\.$", prompt):
        return prompt
    prompt = prompt if prompt.endswith(".") else f"{prompt}."
    return (prompt if re.search(r"\d+ FPS\.$", prompt) else f"{prompt} {fps:g} FPS.") + MOTION


def _beside(first: Float[Tensor, "B C 1 h w"], num_frames: int) -> Float[Tensor, "B extra {num_frames} h w"]:
    """Return 1 where there is a picture, then its latents; 0 elsewhere."""
    return F.pad(torch.cat([torch.ones_like(first[:, :1]), first], dim=1), (0, 0, 0, 0, 0, num_frames - 1))


def _begun(first: Tensor | None, latents: Tensor) -> Tensor:
    return latents if first is None else torch.cat([first.to(latents), latents[:, :, 1:]], dim=2)


def _published(folder: SystemFolder) -> System:
    """Read hpcai-tech/Open-Sora-v2."""
    text, pooled = folder.text(PROMPT, T5, T5), folder.text(POOLED, CLIP, CLIP)
    return text_or_image_to_video(folder.transformer(NETWORK), folder.vae(VAE), text, pooled)


def _deep(folder: SystemFolder) -> System:
    """Refuse hpcai-tech/Open-Sora-v2-Video-DC-AE.

    Raises:
        CheckpointError: always.
    """
    raise CheckpointError(
        f"{folder.folder} has an autoencoder of another kind (Video DC-AE), which is not reproduced; its network alone is: "
        f"reelflow.load_transformer. nearest: hpcai-tech/Open-Sora-v2"
    )


FOLDERS = {NETWORK: _published, "Open_Sora_v2_Video_DC_AE.safetensors": _deep}
