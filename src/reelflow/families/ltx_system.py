"""LTX-Video's way from prompts to clips: T5's features, classifier-free guidance, a shift that grows with the clip.

A first frame takes the place of the first latent, at t = 1. From 0.9.5 on the first token lasts one frame; steps are even
up to t = 0.025, whatever the clip, and grow from there on; and a first frame is never quite still: each step shows it
with fresh noise.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from reelflow.conditioning.pretrained import Reading
from reelflow.diffusion.process import Parameterization, Predict
from reelflow.diffusion.samplers import Draws, OnStep, Sampler, draw, euler
from reelflow.diffusion.timesteps import LinearQuadraticSchedule
from reelflow.errors import CheckpointError
from reelflow.families.ltx import FRAMES
from reelflow.families.schedulers import Walk, mu_of, sigmas_of
from reelflow.families.system import Asked, Conditions, Defaults, Expert, System, SystemFolder, drawn_first
from reelflow.models.dit import VideoDiT
from reelflow.nn.patchify import Grid
from reelflow.nn.rope import Steps

__all__ = ["LATER_PROMPT", "PROMPT", "image_to_video", "text_or_image_to_video", "text_to_video"]

PROMPT = Reading(length=128, mask_encoder=False)
LATER_PROMPT = Reading(length=256)
DEFAULTS = Defaults(num_steps=50, guidance_scale=3.0, clip=(161, 512, 704), fps=25.0)
SCHEDULE = LinearQuadraticSchedule(threshold=0.025)
SAME_TIME = 1e-6
RESTLESS = 0.15  # standard deviation of the noise on a first frame, at t = 0


def text_to_video(folder: SystemFolder) -> System:
    """Read an LTXPipeline."""
    walk, scheduler = folder.walk(), folder.json("scheduler/scheduler_config.json")

    def times(num_steps: int, grid: Grid) -> Float[Tensor, " times"]:
        return walk.times(num_steps, mu=mu_of(scheduler, grid.num_tokens), sigmas=sigmas_of(num_steps).float())

    return _system(folder, folder.transformer(), walk, PROMPT, times=times)


def image_to_video(folder: SystemFolder) -> System:
    """Read an LTXImageToVideoPipeline."""
    return _begun(text_to_video(folder))


def text_or_image_to_video(folder: SystemFolder) -> System:
    """Read an LTXConditionPipeline, which is that of 0.9.5 and later.

    Raises:
        CheckpointError: its scheduler wants a shift by the size of the clip, of which the pipeline tells nothing.
    """
    if folder.json("scheduler/scheduler_config.json").get("use_dynamic_shifting"):
        raise CheckpointError(
            "scheduler_config.json has use_dynamic_shifting=true, without which this pipeline works; nearest: false"
        )
    published = folder.walk()

    def times(num_steps: int, grid: Grid) -> Float[Tensor, " times"]:
        return torch.cat([1 - sigmas_of(num_steps, SCHEDULE).float().double(), torch.ones(1, dtype=torch.float64)])

    walk = replace(published, sampler=lambda draws: _restless(published, draws))
    return replace(
        _begun(_system(folder, causal(folder.transformer()), walk, LATER_PROMPT, times=times)), picture="may"
    )


def causal(network: VideoDiT) -> VideoDiT:
    """Return the same network, whose first token lasts one frame."""
    coordinates = network.config.coordinates
    assert isinstance(coordinates, Steps)
    with torch.device("meta"):
        made = VideoDiT(replace(network.config, coordinates=replace(coordinates, first=1 / FRAMES)))
    made.load_state_dict(network.state_dict(), assign=True)
    return made.eval()


def _system(
    folder: SystemFolder,
    network: VideoDiT,
    walk: Walk,
    prompt: Reading,
    *,
    times: Callable[[int, Grid], Float[Tensor, " times"]],
) -> System:
    text, vae = folder.text(prompt), folder.vae()

    def conditions(asked: Asked) -> Conditions:
        return Conditions(
            text(asked.prompts).condition(),
            text(asked.negative).condition() if asked.guided else None,
            token_rate=asked.fps / vae.config.temporal_stride,
        )

    return System((Expert(network),), vae, walk, DEFAULTS, conditions, times)


def _begun(system: System) -> System:
    """Return a system whose clips may begin with a picture."""

    def conditions(asked: Asked) -> Conditions:
        told = system.conditions(asked)
        return told if asked.image is None else replace(told, known=drawn_first(asked, system.vae))

    return replace(system, conditions=conditions, picture="must")


def _restless(published: Walk, draws: Draws) -> Sampler:
    """Renew the noise on given frames at each step, and land where the published times are.

    Those may be shifted where the times that the network is told are not; a step ends at the next of them.
    """

    def walk(
        predict: Predict,
        x: Float[Tensor, "B C T H W"],
        times: Float[Tensor, " steps"] | Float[Tensor, "steps T"],
        *,
        parameterization: Parameterization = Parameterization(),
        on_step: OnStep | None = None,
    ) -> Float[Tensor, "B C T H W"]:
        begun, times = x, times.to(x.device)
        given, told = (times == 1).all(0), times if times.ndim == 1 else times[:, -1]
        there = published.times(len(told) - 1, sigmas=1 - told[:-1]).to(told)
        landings = there[torch.searchsorted(there, told[:-1] + SAME_TIME, right=True)]
        for index, t in enumerate(told[:-1]):
            if bool(given.any()):
                noise = draw(x.flatten(2).mT[..., None, None], draws)[..., 0, 0].mT.unflatten(2, x.shape[2:])
                x = torch.where(given[:, None, None], begun + (RESTLESS * (1 - t) ** 2).to(x) * noise, x)
            x = euler(
                predict,
                x,
                times[index : index + 2],
                landings=torch.where(given, 1.0, landings[index])[None],
                parameterization=parameterization,
                on_step=None if on_step is None else partial(_at, on_step, index),
            )
        return x

    return walk


def _at(on_step: OnStep, index: int, _: int, estimate: Tensor) -> None:
    on_step(index, estimate)


SYSTEMS = {
    "LTXPipeline": text_to_video,
    "LTXImageToVideoPipeline": image_to_video,
    "LTXConditionPipeline": text_or_image_to_video,
}
