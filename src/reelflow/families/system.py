"""What a published system says of the way from prompts to clips, and the folder it is read from.

A folder of a whole system, as diffusers writes it, has a model_index.json and a folder for each part. A family reads it
into a `System`: networks, autoencoder, the walk from noise to data, and a function from what is asked to conditions.
Only that function is a family's own; `reelflow.generation.published` does the rest, the same for all.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from reelflow.conditioning.pretrained import PretrainedImage, PretrainedText, Reading
from reelflow.conditioning.text import TextFeatures
from reelflow.diffusion.guidance import Scale
from reelflow.diffusion.process import Predict
from reelflow.diffusion.samplers import draw
from reelflow.errors import CheckpointError, ConfigError, nearest
from reelflow.families.schedulers import Walk, read_scheduler
from reelflow.interop.checkpoints import read_configuration
from reelflow.models.condition import Condition
from reelflow.models.dit import VideoDiT
from reelflow.models.vae import CausalVAE
from reelflow.nn.patchify import Grid

__all__ = [
    "Asked",
    "Branches",
    "Conditions",
    "Defaults",
    "Expert",
    "System",
    "SystemFolder",
    "drawn_first",
    "first_frame",
    "first_latents",
    "one_frame",
    "with_variance",
]


@dataclass(frozen=True)
class Asked:
    """What a system is asked for: one clip for each prompt."""

    prompts: Sequence[str]
    negative: Sequence[str]  # what guidance leads away from; "" where nothing is said
    num_frames: int
    height: int
    width: int
    fps: float
    image: Float[Tensor, "B 3 H W"] | None  # the first frame, in [-1, 1]
    embedded_guidance: float | None  # the scale that a distilled network reads
    latent_shape: tuple[int, int, int, int]  # C t h w
    generators: Sequence[torch.Generator]  # one for each clip, of what its condition draws
    guided: bool = True  # something is led away from; without, `negative` need not be read
    picture_guidance: float | None = None  # how far away from a clip that does not begin with the picture; 1 = off


@dataclass(frozen=True)
class Branches:
    """What the network answers in one run, told all and told less, and how far guidance is to lead."""

    cond: Predict
    uncond: Predict | None
    nothing: Predict | None
    scale: Scale
    times: Float[Tensor, " times"] | Float[Tensor, "times T"]  # of the run


@dataclass(frozen=True)
class Conditions:
    """What the network is told in one run.

    `known` are clean latents of the first frames, which stay as they are and whose time is 1.
    """

    cond: Condition
    uncond: Condition | None = None  # what guidance leads away from; None if nothing does
    known: Float[Tensor, "B C t0 h w"] | None = None
    token_rate: float | None = None  # latent frames a second, where positions are in seconds
    nothing: Condition | None = None  # as uncond, and without the picture
    steer: Callable[[Branches], Predict] | None = None  # None: classifier-free guidance
    start: Callable[[Tensor], Tensor] | None = None  # what the run starts from, of its noise; None: the noise
    end: Callable[[Tensor], Tensor] | None = None  # what becomes of the latents that it ends with; None: nothing


@dataclass(frozen=True)
class Expert:
    """A network that works up to a time, where the next takes over."""

    network: VideoDiT
    until: float = 1.0


@dataclass(frozen=True)
class Defaults:
    """What is meant where nothing is said."""

    num_steps: int
    guidance_scale: Scale | tuple[Scale, ...]  # one, or one for each expert; 1 = off
    clip: tuple[int, int, int]  # frames, height, width
    fps: float
    negative: str = ""
    embedded_guidance: float | None = None
    picture_guidance: float | None = None  # of a system that leads away from clips without the picture too


@dataclass(frozen=True)
class System:
    """A published system, its weights at hand.

    `times` gives, for a number of steps and the clip's tokens, our rising times; the first may lie above 0 though the run
    starts from noise alone, as published.
    """

    experts: tuple[Expert, ...]
    vae: CausalVAE
    walk: Walk
    defaults: Defaults
    conditions: Callable[[Asked], Conditions]
    times: Callable[[int, Grid], Float[Tensor, " steps"]]
    picture: Literal["none", "may", "must"] = "none"  # whether a clip may begin with a picture
    frames_before: int = 0  # latent frames that are made before the clip's, and dropped once decoded
    fills_patches: bool = False  # makes latent frames before those too, to fill a patch, and decodes none of them
    next_time: bool = False  # networks are told the time that a step leads to, as their one number
    check: Callable[[Asked], None] = lambda asked: None  # refuses what it cannot make, before anything is computed
    rescale: float = 0.0  # share of the conditional standard deviation that guidance restores
    latents_only: str = ""  # why there are no frames: `vae` has no weights then, and is of the same extents alone


class SystemFolder:
    """A folder of a whole system; its parts are read when they are asked for.

    Raises:
        CheckpointError: there is no readable model_index.json.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        transformer: Callable[..., VideoDiT],
        vae: Callable[..., CausalVAE],
        dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        self.folder, self._transformer, self._vae = Path(folder), transformer, vae
        self.dtype, self.device = dtype, device

    @cached_property
    def index(self) -> dict[str, Any]:
        """What model_index.json says."""
        return self.json("model_index.json")

    def json(self, name: str) -> dict[str, Any]:
        """Return what a file of the folder says.

        Raises:
            CheckpointError: it cannot be read or is no JSON object.
        """
        return read_configuration(self.folder / name, "give the folder of a whole system")

    def has(self, part: str) -> bool:
        """Say whether a part is there; diffusers writes [null, null] for one left out."""
        entry = self.index.get(part)
        return isinstance(entry, list) and entry[0] is not None

    def part(self, name: str) -> Path:
        """Return the folder, or the file, of a part.

        Raises:
            CheckpointError: there is none.
        """
        if not (self.folder / name).exists():
            parts = sorted(path.name for path in self.folder.iterdir() if path.is_dir())
            raise CheckpointError(f"{self.folder} has no part {name!r}; {nearest(name, parts)}")
        return self.folder / name

    def transformer(self, name: str = "transformer") -> VideoDiT:
        return self._transformer(self.part(name), dtype=self.dtype, device=self.device)

    def vae(self, name: str = "vae") -> CausalVAE:
        return self._vae(self.part(name), dtype=self.dtype, device=self.device)

    def text(
        self, reading: Reading, encoder: str = "text_encoder", tokenizer: str = "tokenizer"
    ) -> Callable[[Sequence[str]], TextFeatures]:
        """Return a reader of prompts, whose weights are read when it is first called."""
        folders = self.part(encoder), self.part(tokenizer)
        load = cache(lambda: PretrainedText.load(*folders, reading, dtype=self.dtype, device=self.device))
        return lambda prompts: load()(prompts)

    def image(self, encoder: str, processor: str, *, layer: int) -> Callable[[Tensor], Tensor]:
        """Return a reader of pictures, B 3 H W, whose weights are read when it is first called."""
        folders = self.part(encoder), self.part(processor)
        load = cache(lambda: PretrainedImage.load(*folders, layer=layer, dtype=self.dtype, device=self.device))
        return lambda pictures: load()(pictures)

    def walk(self, name: str = "scheduler") -> Walk:
        return read_scheduler(self.json(f"{name}/scheduler_config.json"))


def first_frame(asked: Asked) -> Float[Tensor, "B 3 1 H W"]:
    """Return the picture that a clip begins with, as a clip of one frame.

    Raises:
        ConfigError: there is none.
    """
    if asked.image is None:
        raise ConfigError("this system makes a picture move: give image=, B 3 H W in [-1, 1]")
    return asked.image[:, :, None]


def first_latents(asked: Asked, vae: CausalVAE) -> Float[Tensor, "B C 1 h w"]:
    """Return the latents of the picture that a clip begins with."""
    return vae.encode(first_frame(asked).to(next(vae.parameters()))).mean


def drawn_first(asked: Asked, vae: CausalVAE) -> Float[Tensor, "B C 1 h w"]:
    """Return latents of the first frame, drawn from what the autoencoder makes of it."""
    posterior = vae.encode(first_frame(asked).to(next(vae.parameters())))
    return torch.addcmul(posterior.mean, (0.5 * posterior.logvar).exp(), draw(posterior.mean, asked.generators))


def one_frame(asked: Asked) -> None:
    """Refuse clips.

    Raises:
        ConfigError: more than a picture is asked for.
    """
    if asked.num_frames != 1:
        raise ConfigError(f"this system makes pictures: num_frames must be 1, got {asked.num_frames}; nearest: 1")


def with_variance(walk: Walk, network: VideoDiT) -> Walk:
    """Return the walk of a network that may answer with the variance of a step too, as twice the channels tell."""
    learned = network.config.out_channels == 2 * network.config.in_channels
    return replace(walk, parameterization=replace(walk.parameterization, learned_variance=learned))
