"""A trained model, ready to make clips: text encoder, transformer and autoencoder in one folder.

    model/model.json           every configuration, and the words the model has read
    model/vae.safetensors      the causal autoencoder
    model/dit.safetensors      the transformer (averaged weights)

A clip longer than the model's is made chunk after chunk: the last frames of one chunk are encoded again and given to
the next (t = 1 there), and each chunk is decoded and handed out before the next begins, so memory does not grow.
"""

import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from reelflow.conditioning.labels import ClassWords
from reelflow.conditioning.sentences import Sentences
from reelflow.conditioning.text import HashedWords, words_of
from reelflow.config import configuration, from_dict, to_dict
from reelflow.data.folder import ClipSpec
from reelflow.diffusion.process import Parameterization, Predict, as_read, combine, levels
from reelflow.diffusion.rollout import rollout_given
from reelflow.diffusion.samplers import OnStep, Times
from reelflow.errors import CheckpointError, ConfigError
from reelflow.families.systems import is_system
from reelflow.generation.sampling import Sampling, guided_by, sampler_of
from reelflow.models.condition import Condition
from reelflow.models.dit import DiTConfig, VideoDiT
from reelflow.models.packing import ShapeNumber, told_shape
from reelflow.models.vae import CausalVAE, VAEConfig
from reelflow.models.weights import files_sha256, load_weights, write_tensors
from reelflow.nn.patchify import token_grid

__all__ = [
    "ModelCard",
    "Output",
    "Pipeline",
    "Progress",
    "Stopped",
    "fingerprint",
    "model_folder",
    "read_card",
    "to_frames",
]

Output = Literal["clip", "latents"]


@configuration
class ModelCard:
    """Everything about a model but its weights.

    Raises:
        ConfigError: the network cannot answer in its parameterization, or cannot be sampled as the card says.
    """

    vae: VAEConfig
    dit: DiTConfig
    text: HashedWords | ClassWords | Sentences
    clip: ClipSpec  # what it was trained on
    sampling: Sampling
    words: tuple[str, ...] = ()  # of its captions; without Sentences, it knows no others
    parameterization: Parameterization = Parameterization()  # what the transformer was taught to answer
    tells: tuple[ShapeNumber, ...] = ()  # of a clip's shape, which the transformer is told as its numbers

    def __post_init__(self) -> None:
        if len(self.tells) != len(self.dit.numbers):
            raise ConfigError(
                f"a transformer of {len(self.dit.numbers)} numbers is told as many of a clip's shape, not "
                f"{', '.join(self.tells) or 'nothing'}; nearest: {len(self.tells)} in dit.numbers"
            )
        answered = self.dit.out_channels or self.dit.in_channels
        wanted = self.vae.latent_channels * (2 if self.parameterization.learned_variance else 1)
        if answered != wanted:
            raise ConfigError(
                f"with learned_variance={self.parameterization.learned_variance} the transformer must answer {wanted} "
                f"channels, got {answered}; set dit.out_channels={wanted}"
            )
        self.sampling.times(self.parameterization, self.num_tokens(self.clip.num_frames))

    def num_tokens(self, num_frames: int) -> int:
        """Return how many tokens the transformer makes of a clip, or of each chunk of a longer one.

        Raises:
            ConfigError: an impossible length (names the nearest).
        """
        num_frames = min(num_frames, self.clip.num_frames)
        extents = self.vae.latent_shape(num_frames, self.clip.height, self.clip.width)[1:]
        return token_grid(extents, self.dit.patch).num_tokens

    def check(self, *, num_frames: int, image: Tensor | None = None, sampling: Sampling | None = None) -> None:
        """Refuse what cannot be generated, before anything is loaded or computed.

        Raises:
            ConfigError: an impossible length (names the nearest), a sampling that does not fit, or a first frame of
                another size or out of range.
        """
        height, width = self.clip.height, self.clip.width
        self.vae.latent_shape(num_frames, height, width)
        (sampling or self.sampling).times(self.parameterization, self.num_tokens(num_frames))
        if image is None:
            return
        if num_frames == 1:
            raise ConfigError(
                f"a first frame leaves nothing to generate in a clip of 1 frame; nearest: {1 + self.vae.temporal_stride}"
            )
        if image.shape[-2:] != (height, width):
            raise ConfigError(
                f"the first frame must be {height} x {width}, got {image.shape[-2]} x {image.shape[-1]}; "
                f"resize and crop it first (the command line does)"
            )
        if not image.is_floating_point() or not bool((image.abs() <= 1 + 1e-3).all()):  # so written, it catches NaN
            raise ConfigError("the first frame must be floats in [-1, 1]; from 8 bits: frame / 127.5 - 1")

    def unknown_words(self, prompt: str) -> list[str]:
        """Return the words of a prompt that the model has never read, and therefore cannot follow."""
        if not self.words or isinstance(self.text, Sentences):  # which brings words near to those that were read
            return []
        return [word for word in words_of(prompt) if word not in self.words]


@dataclass
class Progress:
    """What a running generation tells and is told, at each step and in this order."""

    on_step: Callable[[int, int], None] | None = None  # (evaluated steps, all steps of the clip)
    on_preview: Callable[[Tensor], None] | None = None  # the chunk as it is known by now, B 3 T H W
    preview_every: int = 4  # steps; a preview costs one decoding
    should_stop: Callable[[], bool] | None = None

    def after(self, decode: Callable[[Tensor], Tensor], *, before: int, total: int) -> OnStep:
        """Return what a sampler calls at each step, after `before` of `total` steps; it raises `Stopped` when told to."""

        def on_step(index: int, estimate: Tensor) -> None:
            if self.on_step is not None:
                self.on_step(before + index + 1, total)
            if self.on_preview is not None and (index + 1) % self.preview_every == 0:
                self.on_preview(decode(estimate).float().clamp(-1, 1))
            if self.should_stop is not None and self.should_stop():
                raise Stopped(estimate)

        return on_step


class Stopped(Exception):
    """Carries the data estimated so far out of a sampler."""

    def __init__(self, estimate: Tensor) -> None:
        self.estimate = estimate


class Pipeline:
    """Text (and a first frame) to clips, on the device where the networks are. Noise is drawn on the CPU.

    >>> pipeline = Pipeline.load(Path("runs/demo"))
    >>> clip = pipeline.generate(["a red ring moving left"], seed=1)        # B 3 T H W in [-1, 1]
    """

    def __init__(self, card: ModelCard, vae: CausalVAE, dit: VideoDiT) -> None:
        self.card, self.vae, self.dit = card, vae.eval(), dit.eval()

    @classmethod
    def load(cls, folder: Path, *, device: torch.device | str = "cpu") -> "Pipeline":
        """Read a model folder, or a run folder that holds one as `model/`.

        Raises:
            CheckpointError: there is no model, or its files are torn or do not fit each other.
        """
        folder = model_folder(folder)
        card = read_card(folder)
        vae, dit = CausalVAE(card.vae), VideoDiT(card.dit)
        load_weights(folder / "vae.safetensors", vae)
        load_weights(folder / "dit.safetensors", dit)
        return cls(card, vae.to(device), dit.to(device))

    @property
    def device(self) -> torch.device:
        return self.vae.latent_std.device

    def save(self, folder: Path) -> None:
        """Write the model folder, whole or not at all.

        Raises:
            CheckpointError: `folder` exists already.
        """
        if folder.exists():
            raise CheckpointError(f"{folder} exists already; choose another folder or remove it first")
        partial = folder.with_name(f".{folder.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        for name, model in (("vae", self.vae), ("dit", self.dit)):
            tensors = {key: value.detach().contiguous() for key, value in model.state_dict().items()}
            write_tensors(tensors, partial / f"{name}.safetensors")
        (partial / "model.json").write_text(json.dumps(to_dict(self.card), indent=1))
        os.replace(partial, folder)

    def unknown_words(self, prompt: str) -> list[str]:
        """Return the words of a prompt that the model has never read, and therefore cannot follow."""
        return self.card.unknown_words(prompt)

    def check(self, *, num_frames: int, image: Tensor | None = None, sampling: Sampling | None = None) -> None:
        """Refuse what cannot be generated, before anything is computed; see `ModelCard.check`."""
        self.card.check(num_frames=num_frames, image=image, sampling=sampling)

    def generate(
        self,
        prompts: Sequence[str],
        *,
        num_frames: int | None = None,
        image: Float[Tensor, "B 3 H W"] | None = None,
        seed: int = 0,
        noise: Float[Tensor, "B C t h w"] | None = None,
        sampling: Sampling | None = None,
        output: Output = "clip",
        progress: Progress | None = None,
    ) -> Float[Tensor, "B channels frames rows columns"]:
        """Make one clip per prompt, in [-1, 1], or its latents; clip i draws its noise from seed + i, or begins with `noise`.

        Raises:
            ConfigError: see `check`.
        """
        stream = self.stream(
            prompts,
            num_frames=num_frames,
            image=image,
            seed=seed,
            noise=noise,
            sampling=sampling,
            output=output,
            progress=progress,
        )
        return torch.cat(list(stream), dim=2)

    def stream(
        self,
        prompts: Sequence[str],
        *,
        num_frames: int | None = None,
        image: Float[Tensor, "B 3 H W"] | None = None,
        seed: int = 0,
        noise: Float[Tensor, "B C t h w"] | None = None,
        sampling: Sampling | None = None,
        output: Output = "clip",
        progress: Progress | None = None,
        overlap: int = 2,
    ) -> Iterator[Float[Tensor, "B channels frames rows columns"]]:
        """Make clips of any length, frames handed out as soon as they exist, at memory that does not grow.

        `overlap` latent frames of each chunk are given to the next; as latents, each is handed out once. When
        `progress.should_stop` says so, what is known of the chunk at hand is handed out, and the stream ends. `noise`
        is the first chunk's.

        Raises:
            ConfigError: see `check`; the overlap leaves nothing to generate; or pictures or noise do not fit the prompts.
        """
        sampling, progress, clip = sampling or self.card.sampling, progress or Progress(), self.card.clip
        num_frames = clip.num_frames if num_frames is None else num_frames
        self.check(num_frames=num_frames, image=image, sampling=sampling)
        if not prompts or (image is not None and len(image) != len(prompts)):
            raise ConfigError(
                f"need a prompt, and a first frame for each or none: got {len(prompts)} prompts"
                + (f" and {len(image)} first frames" if image is not None else "")
            )
        window, stride = clip.num_frames, self.card.vae.temporal_stride
        kept = 1 + (overlap - 1) * stride  # frames of the overlap
        if num_frames > window and not 1 <= overlap <= (window - 1) // stride:
            raise ConfigError(f"overlap must be 1 to {(window - 1) // stride} latent frames, got {overlap}")
        num_chunks = 1 + (-(-(num_frames - window) // (window - kept)) if num_frames > window else 0)
        shape = (len(prompts), *self.card.vae.latent_shape(min(num_frames, window), clip.height, clip.width))
        if noise is not None and noise.shape != shape:
            raise ConfigError(f"the noise must be shaped {list(shape)}, got {list(noise.shape)}")
        condition = self.text_condition(prompts).to(self.device)
        generators = [torch.Generator().manual_seed(seed + index) for index in range(len(prompts))]

        past, made = (None if image is None else image[:, :, None].to(self.device)), 0
        total = num_frames if output == "clip" else self.card.vae.latent_shape(num_frames, clip.height, clip.width)[1]
        for chunk in range(num_chunks):
            x = (noise if chunk == 0 and noise is not None else _noise(shape, generators)).to(self.device)
            latents, stopped = self._chunk(x, past, condition, generators, sampling, progress, (chunk, num_chunks))
            last = stopped or chunk == num_chunks - 1
            frames = latents.new_zeros(0) if last and output == "latents" else self._decode(latents, sampling)
            made_now, given = (frames, kept) if output == "clip" else (latents, overlap)
            fresh = made_now if chunk == 0 else made_now[:, :, given:]
            yield fresh[:, :, : total - made]
            made += fresh.shape[2]
            if last:
                return
            past = frames[:, :, -kept:]

    def _decode(self, latents: Float[Tensor, "B C t h w"], sampling: Sampling) -> Float[Tensor, "B 3 T H W"]:
        with torch.no_grad(), self._autocast(sampling):
            return self.vae.decode(latents).float().clamp(-1, 1)

    def text_condition(self, prompts: Sequence[str]) -> Condition:
        """Encode prompts.

        Raises:
            ConfigError: a prompt is longer than the encoder reads.
        """
        return self.card.text(prompts).condition().trimmed()

    def _chunk(
        self,
        noise: Float[Tensor, "B C t h w"],
        past: Float[Tensor, "B 3 T0 H W"] | None,
        condition: Condition,
        generators: Sequence[torch.Generator],
        sampling: Sampling,
        progress: Progress,
        place: tuple[int, int],
    ) -> tuple[Float[Tensor, "B C t h w"], bool]:
        """Sample one window whose first frames are `past`; also say whether it was stopped midway."""
        space = self.card.parameterization
        predict = self._predict(condition, noise, sampling)
        walk = sampler_of(sampling.sampler, generators)
        times: Times = sampling.times(space, token_grid(noise.shape[2:], self.card.dit.patch).num_tokens)
        with torch.no_grad(), self._autocast(sampling):
            x = combine((levels(space.process, times[:1].to(noise.device)).sigma, noise))
            if past is not None:
                given = self.vae.encode(past).mean.float()
                x = torch.cat([given, x[:, :, given.shape[2] :]], dim=2)
                times = rollout_given(times, noise.shape[2], num_given=given.shape[2])
            chunk, num_chunks = place
            steps = sampling.steps_walked
            on_step = progress.after(self.vae.decode, before=chunk * steps, total=num_chunks * steps)
            stopped = False
            try:
                x = walk(predict, x, times, parameterization=space, on_step=on_step)
            except Stopped as early:
                x, stopped = early.estimate, True
            return x, stopped

    def _predict(self, condition: Condition, noise: Float[Tensor, "B C t h w"], sampling: Sampling) -> Predict:
        space, null = self.card.parameterization, self.text_condition(len(noise) * [""]).to(noise.device)

        def under(c: Condition) -> Predict:
            told = told_shape(c, self.card.tells, noise)
            prepared = cache(lambda: self.dit.prepare(noise, told))  # when first asked, in the precision of that
            return lambda x, t: self.dit(as_read(space.process, x, t), t, prepared()).float()

        return guided_by(
            sampling.guidance,
            under(condition),
            under(null),
            scale=sampling.guidance_scale,
            num_frames=noise.shape[2],
            parameterization=space,
        )

    def _autocast(self, sampling: Sampling) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=sampling.precision == "bf16")


def model_folder(folder: Path) -> Path:
    """Return `folder` or its `model/`, whichever holds a model card.

    Raises:
        CheckpointError: neither does.
    """
    for candidate in (folder, folder / "model"):
        if (candidate / "model.json").is_file():
            return candidate
    state = "is a run that has not finished training" if (folder / "recipe.json").is_file() else "holds no model.json"
    raise CheckpointError(
        f"{folder} {state if folder.is_dir() else 'does not exist'}; make a model with: reelflow train, or give the folder "
        f"of a whole published system, which has a model_index.json or is laid out as its repository"
    )


def read_card(folder: Path) -> ModelCard:
    """Read what a model folder (or a run that holds one) says about its model, without the weights.

    Raises:
        CheckpointError: there is no model, or its card cannot be read.
    """
    path = model_folder(folder) / "model.json"
    try:
        return from_dict(ModelCard, json.loads(path.read_text()))
    except (OSError, ValueError, RecursionError, ConfigError) as error:
        raise CheckpointError(f"{path} is not a model card this version reads: {error}") from error


def fingerprint(folder: Path) -> str:
    """Return the SHA-256 of a model's files, to tell one model from another.

    Raises:
        CheckpointError: a file is missing.
    """
    if is_system(folder):
        files = sorted(path for path in folder.rglob("*") if path.suffix in (".json", ".safetensors", ".txt", ".model"))
    else:
        files = [model_folder(folder) / name for name in ("model.json", "vae.safetensors", "dit.safetensors")]
    return files_sha256(files)


def to_frames(clip: Float[Tensor, "3 T H W"]) -> UInt8[Tensor, "T H W 3"]:
    """Turn a clip in [-1, 1] into 8-bit frames, in the memory of the CPU."""
    return ((clip.clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 3, 0).cpu()


def _noise(shape: tuple[int, ...], generators: Sequence[torch.Generator]) -> Tensor:
    return torch.stack([torch.randn(shape[1:], generator=generator) for generator in generators])
