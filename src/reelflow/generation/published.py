"""A published system, ready to make clips: one walk from noise to a clip for all of them.

system = reelflow.load("Wan2.1-T2V-1.3B-Diffusers")
clip = system.generate(["a cat walks on the grass"], num_frames=81)         # B 3 T H W in [-1, 1]
styled = reelflow.load("Wan2.1-T2V-1.3B-Diffusers", adapters=[("style.safetensors", 0.8)])
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from reelflow.config import configuration
from reelflow.diffusion.guidance import Scale, away_from, guided, rescale, steered
from reelflow.diffusion.process import Predict
from reelflow.diffusion.rollout import rollout_given
from reelflow.errors import ConfigError
from reelflow.families.adapters import AdapterUse, apply_files
from reelflow.families.system import Asked, Branches, Conditions, Expert, System
from reelflow.families.systems import is_system, load_system
from reelflow.generation.pipeline import Output, Pipeline, Progress, Stopped
from reelflow.models.condition import Condition
from reelflow.models.dit import Prepared, VideoDiT
from reelflow.nn.patchify import token_grid

__all__ = ["PublishedPipeline", "PublishedSampling", "load"]

SAME_TIME = 1e-9


def load(
    folder: str | Path,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    adapters: Sequence[AdapterUse | tuple[str, float]] = (),
) -> "Pipeline | PublishedPipeline":
    """Return what makes clips of a folder: a run or model of ours, or a published system as diffusers writes it.

    `adapters` are files or folders of LoRA or DoRA, each with its strength; they are applied, not merged.

    Raises:
        CheckpointError: the folder holds neither, its parts do not fit each other, or an adapter is of another network.
        ConfigError: another type is asked of a model of ours, whose precision is its `sampling`'s; or it is not said
            which of two networks an adapter is for.
    """
    folder = Path(folder)
    uses = [use if isinstance(use, AdapterUse) else AdapterUse(*use) for use in adapters]
    if is_system(folder):
        system = load_system(folder, dtype=dtype, device=device)
        apply_files(system.experts, uses)
        return PublishedPipeline(system)
    if dtype is not None:
        raise ConfigError(f"{folder} is no published system: leave out dtype, and set sampling.precision")
    pipeline = Pipeline.load(folder, device=device)
    apply_files([Expert(pipeline.dit)], uses)
    return pipeline


@configuration
class PublishedSampling:
    """How a published system is asked to make a clip; None is as published.

    Raises:
        ConfigError: a number is out of range.
    """

    num_steps: int | None = None
    guidance_scale: tuple[float, ...] | None = None  # one for all networks, or one for each; 1 = off
    embedded_guidance: float | None = None  # that a distilled network reads
    picture_guidance: float | None = None  # away from clips that do not begin with the picture; 1 = off
    negative_prompt: str | None = None
    height: int | None = None
    width: int | None = None
    fps: float | None = None
    precision: Literal["stored", "fp32", "bf16"] = "stored"  # of the weights
    kind: Literal["published"] = "published"

    def __post_init__(self) -> None:
        for name in ("num_steps", "height", "width", "fps"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ConfigError(f"{name} must be positive, got {value}")
        numbers = (*(self.guidance_scale or ()), self.embedded_guidance or 0.0, self.picture_guidance or 0.0)
        if not all(map(math.isfinite, numbers)):
            raise ConfigError(f"guidance must be finite, got {numbers}; 1 turns it off")


class PublishedPipeline:
    """Text (and a first frame) to clips, by a published system."""

    def __init__(self, system: System) -> None:
        self.system = system

    @torch.no_grad()
    def generate(
        self,
        prompts: Sequence[str],
        *,
        num_frames: int | None = None,
        image: Float[Tensor, "B 3 H W"] | None = None,
        seed: int = 0,
        noise: Float[Tensor, "B C t h w"] | None = None,
        sampling: PublishedSampling = PublishedSampling(),
        negative_prompts: Sequence[str] | None = None,
        guidance: Scale | None = None,
        output: Output = "clip",
        progress: Progress | None = None,
    ) -> Float[Tensor, "B channels frames rows columns"]:
        """Make one clip per prompt, in [-1, 1], or its latents; what is not said is as published.

        Clip i draws all its noise from seed + i, or begins with `noise` and draws what else there is from seed + i.
        `negative_prompts` are one for each prompt, in place of the sampling's; `guidance` a scale that depends on time
        or differs between clips or frames, in place of the sampling's.

        Raises:
            ConfigError: see `check`.
        """
        self._refuse(output)
        asked = self._asked(prompts, num_frames, image, seed, sampling, negative_prompts)
        shape = (len(prompts), *asked.latent_shape)
        if noise is not None and noise.shape != shape:
            raise ConfigError(f"the noise must be shaped {list(shape)}, got {list(noise.shape)}")
        scales = self._scales(sampling) if guidance is None else len(self.system.experts) * (guidance,)
        led = not all(isinstance(scale, float | int) and scale == 1 for scale in scales)
        led = led or (image is not None and asked.picture_guidance not in (None, 1))
        conditions = self.system.conditions(replace(asked, guided=led))
        if noise is None:
            noise = torch.stack([torch.randn(shape[1:], generator=each) for each in asked.generators])
        steps = sampling.num_steps or self.system.defaults.num_steps
        filling, told = self._filling(asked.num_frames), progress or Progress()
        latents = self._walk(noise, conditions, scales, steps, asked.generators, told, filling)[:, :, filling:]
        if output == "latents":
            return latents[:, :, self.system.frames_before :]
        return self._decode(latents).clamp(-1, 1)

    def check(
        self,
        prompts: Sequence[str],
        *,
        num_frames: int | None = None,
        image: Float[Tensor, "B 3 H W"] | None = None,
        sampling: PublishedSampling = PublishedSampling(),
        output: Output = "clip",
    ) -> None:
        """Refuse what cannot be generated, before anything is computed; a sketch of the system is enough.

        Raises:
            ConfigError: the clip is of no size that the system makes, or what is given does not fit the prompts.
        """
        self._refuse(output)
        self._asked(prompts, num_frames, image, 0, sampling, None)
        self._scales(sampling)

    def _refuse(self, output: Output) -> None:
        if output == "clip" and self.system.latents_only:
            raise ConfigError(f"{self.system.latents_only}; nearest: generate(output='latents')")

    def clip(self, num_frames: int | None, sampling: PublishedSampling) -> tuple[int, int, int]:
        """Return frames, height and width of what is asked."""
        said, usual = (num_frames, sampling.height, sampling.width), self.system.defaults.clip
        frames, height, width = (own if given is None else given for given, own in zip(said, usual, strict=True))
        return frames, height, width

    def _asked(
        self,
        prompts: Sequence[str],
        num_frames: int | None,
        image: Float[Tensor, "B 3 H W"] | None,
        seed: int,
        sampling: PublishedSampling,
        negative_prompts: Sequence[str] | None,
    ) -> Asked:
        defaults, clip = self.system.defaults, self.clip(num_frames, sampling)
        if isinstance(prompts, str) or not prompts:
            raise ConfigError(f"prompts must be a list of at least one prompt, got {prompts!r}")
        negative = defaults.negative if sampling.negative_prompt is None else sampling.negative_prompt
        if negative_prompts is not None and len(negative_prompts) != len(prompts):
            raise ConfigError(f"give a negative prompt for each of {len(prompts)} prompts, got {len(negative_prompts)}")
        shape = self.latent_shape(*clip)
        self._check_image(image, (len(prompts), 3, *clip[1:]))
        embedded = sampling.embedded_guidance
        if embedded is not None and defaults.embedded_guidance is None:
            raise ConfigError("the network reads no guidance: leave out embedded_guidance, and set guidance_scale")
        pictured = sampling.picture_guidance
        if pictured is not None and (image is None or defaults.picture_guidance is None):
            reason = "there is no picture" if image is None else "guidance does not tell the picture from the prompt"
            raise ConfigError(f"{reason}: leave out picture_guidance")
        asked = Asked(
            prompts=prompts,
            negative=negative_prompts or len(prompts) * [negative],
            num_frames=clip[0],
            height=clip[1],
            width=clip[2],
            fps=sampling.fps or defaults.fps,
            image=image,
            embedded_guidance=defaults.embedded_guidance if embedded is None else embedded,
            latent_shape=shape,
            generators=[torch.Generator().manual_seed(seed + index) for index in range(len(prompts))],
            picture_guidance=defaults.picture_guidance if pictured is None else pictured,
        )
        if image is not None and shape[1] == 1:
            near = 1 + self.system.vae.config.temporal_stride
            raise ConfigError(
                f"a first frame leaves nothing to generate in a clip of {clip[0]} frames; nearest: {near}"
            )
        self.system.check(asked)
        return asked

    def latent_shape(self, num_frames: int, height: int, width: int) -> tuple[int, int, int, int]:
        """Return (C, t, h, w) of the noise that a clip is made of.

        Raises:
            ConfigError: an extent does not fit the autoencoder, or its latents the network's patches; names the nearest.
        """
        vae, patch = self.system.vae.config, self.system.experts[0].network.config.patch
        for name, extent, cells in (("height", height, patch.h), ("width", width, patch.w)):
            step = vae.spatial_stride * cells
            if extent < 1 or extent % step:
                near = [n for n in (extent // step * step, (extent // step + 1) * step) if n > 0]
                raise ConfigError(
                    f"{name} must be a multiple of {step} (the autoencoder's stride times the network's patch), got "
                    f"{extent}; nearest: {' or '.join(map(str, near))}"
                )
        channels, frames, rows, columns = vae.latent_shape(num_frames, height, width)
        frames += self.system.frames_before + self._filling(num_frames)
        token_grid((frames, rows, columns), patch)
        return channels, frames, rows, columns

    def _filling(self, num_frames: int) -> int:
        """Return how many latent frames are made before all others so that patches are full."""
        frames = 1 + (num_frames - 1) // self.system.vae.config.temporal_stride + self.system.frames_before
        return -frames % self.system.experts[0].network.config.patch.t if self.system.fills_patches else 0

    def _walk(
        self,
        noise: Float[Tensor, "B C t h w"],
        conditions: Conditions,
        scales: Sequence[Scale],
        num_steps: int,
        generators: Sequence[torch.Generator],
        progress: Progress,
        filling: int,
    ) -> Float[Tensor, "B C t h w"]:
        walk, patch = self.system.walk, self.system.experts[0].network.config.patch
        weights = next(self.system.experts[0].network.parameters())
        x = noise.to(weights.device, torch.promote_types(weights.dtype, torch.float32))
        if conditions.start is not None:
            x = conditions.start(x)
        times = self.system.times(num_steps, token_grid(x.shape[2:], patch))
        if conditions.known is not None:
            known = conditions.known.to(x)
            x = torch.cat([known, x[:, :, known.shape[2] :]], dim=2)
            times = rollout_given(times, x.shape[2], num_given=known.shape[2])
        on_step = progress.after(lambda latents: self._decode(latents[:, :, filling:]), before=0, total=num_steps)
        sampler, predict = walk.sampler(generators), self._predict(conditions, scales, times)
        try:
            x = sampler(predict, x, times, parameterization=walk.parameterization, on_step=on_step)
        except Stopped as early:
            x = early.estimate
        return x if conditions.end is None else conditions.end(x)

    def _decode(self, latents: Float[Tensor, "B C t h w"]) -> Float[Tensor, "B 3 T H W"]:
        weights = next(self.system.vae.parameters())
        frames = self.system.vae.decode(latents.to(weights.device, weights.dtype)).to(latents.dtype)
        return frames[:, :, self.system.frames_before * self.system.vae.config.temporal_stride :]

    def _predict(self, conditions: Conditions, scales: Sequence[Scale], times: Tensor) -> Predict:
        """Return the guided prediction, of whichever expert works at the time asked for."""
        guided_experts, share = [], self.system.rescale
        for expert, scale in zip(self.system.experts, scales, strict=True):
            cond, uncond, nothing = (
                None if each is None else self._under(expert.network, each, conditions.token_rate, times)
                for each in (conditions.cond, conditions.uncond, conditions.nothing)
            )
            assert cond is not None
            if conditions.steer is not None:
                whole = conditions.steer(Branches(cond, uncond, nothing, scale, times))
            elif share:
                whole = steered(cond, away_from(uncond, scale=scale), rescale(phi=share))
            else:
                whole = guided(cond, uncond, scale=scale)
            guided_experts.append((expert.until, whole))

        def predict(x: Tensor, t: Tensor) -> Tensor:
            t = self.system.walk.fed(t.double())
            noisiest = float(t.min())
            for until, ask in guided_experts:
                if noisiest <= until + SAME_TIME:
                    return ask(x, t)
            raise AssertionError("the last expert works until t = 1")

        return predict

    def _under(self, network: VideoDiT, condition: Condition, token_rate: float | None, times: Tensor) -> Predict:
        weights = next(network.parameters())
        told = condition.trimmed().to(weights.device, weights.dtype)  # hidden tokens cost time and change nothing
        fed_times = self.system.walk.fed(times).to(weights.device)

        prepared: Prepared | None = None

        def ask(x: Tensor, t: Tensor) -> Tensor:
            nonlocal prepared
            fed, here, latents = t.to(torch.promote_types(weights.dtype, torch.float32)), told, x.to(weights.dtype)
            if self.system.next_time:
                here = replace(told, numbers=_after(fed_times, fed)[:, None])
            prepared = prepared or network.prepare(latents, here, token_rate=token_rate)
            return network(latents, fed, replace(prepared, condition=here)).to(x.dtype)

        return ask

    def _scales(self, sampling: PublishedSampling) -> tuple[Scale, ...]:
        said, usual = sampling.guidance_scale, self.system.defaults.guidance_scale
        scales, count = said or (usual if isinstance(usual, tuple) else (usual,)), len(self.system.experts)
        if len(scales) not in (1, count):
            raise ConfigError(f"guidance_scale takes one number, or one for each of {count} networks, got {scales}")
        return count // len(scales) * tuple(scales)

    def _check_image(self, image: Tensor | None, shape: tuple[int, ...]) -> None:
        if image is None:
            if self.system.picture == "must":
                raise ConfigError("this system makes a picture move: give image")
            return
        if self.system.picture == "none":
            raise ConfigError("this system reads no image")
        if image.shape != shape:
            raise ConfigError(f"the images must be shaped {list(shape)}, got {list(image.shape)}")
        if not image.is_floating_point() or not bool((image.abs() <= 1 + 1e-3).all()):  # so written, it catches NaN
            raise ConfigError("the first frame must be floats in [-1, 1]; from 8 bits: frame / 127.5 - 1")


def _after(times: Float[Tensor, " times"], t: Float[Tensor, " B"]) -> Float[Tensor, " B"]:
    """Return, for times of a walk, those that its steps lead to."""
    return times[1:][(t[:, None] - times[:-1]).abs().argmin(1)].to(t.dtype)
