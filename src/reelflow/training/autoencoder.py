"""The autoencoder's task: give back clips and images through a narrow, smooth bottleneck.

    distance = l1 |e| + l2 e^2 + temporal |e[t] - e[t-1]| + wavelet |Haar(e)| + perceptual d(decoded, clip),   e = decoded - clip
    loss     = distance + kl KL + outlier O(mean) + identity |mean - image's mean| + an adversary's (`discriminator.py`)

With a learned log-variance s, distance becomes distance / exp(s) + s. Every term is a mean over its values, where many
published codes sum (`weight_of_mean`). Training sees crops, mixed with single frames; validation sees whole clips.
"""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from einops import rearrange
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from reelflow.config import configuration
from reelflow.errors import ConfigError
from reelflow.models.coder import SkipBlock
from reelflow.models.vae import CausalVAE, Posterior, VAEConfig
from reelflow.nn.conv import CausalSequence
from reelflow.parallel.device import moved
from reelflow.training.discriminator import Adversarial, PatchDiscriminator, adaptive_weight, fool, judge
from reelflow.training.health import diagnose
from reelflow.training.loop import Loss

__all__ = [
    "AutoencoderConfig",
    "AutoencoderTask",
    "Companions",
    "Crops",
    "Measure",
    "Perceptual",
    "Reference",
    "draw_crops",
    "frame_latents",
    "haar_bands",
    "outlier_penalty",
    "to_float",
    "weight_of_mean",
]

LOG = logging.getLogger(__name__)
MEMORY = 0.95  # of the running means that health is read from

Perceptual = Callable[[Float[Tensor, "B 3 T H W"], Float[Tensor, "B 3 T H W"]], Float[Tensor, ""]]
"""A distance between clips in [-1, 1], such as one over the features of a network handed in."""
Reference = Callable[[Float[Tensor, "B 3 T H W"]], Float[Tensor, "B C t h w"]]
"""Latents that those of a clip should stay near; see `frame_latents`."""
Measure = Callable[[Float[Tensor, "B 3 T H W"], Float[Tensor, "B 3 T H W"]], dict[str, Any]]
"""Numbers about rebuilt clips beside the clips, in [-1, 1], for the log."""


@configuration
class Crops:
    """Lengths and sides of which each batch draws one of each, until a share of the run is done."""

    until: float  # 1: to the end
    frames: tuple[int, ...]
    sizes: tuple[int, ...]

    def __post_init__(self) -> None:
        if not 0 < self.until <= 1:
            raise ConfigError(f"crops hold until a share of the run in (0, 1], got {self.until}")
        if not self.frames or not self.sizes or min(*self.frames, *self.sizes) < 1:
            raise ConfigError(f"crops need frames and sizes of at least 1, got {self.frames} and {self.sizes}")


@configuration
class AutoencoderConfig:
    """Weights of the loss, the crops it is taken on, and what learns."""

    crop_frames: int  # 1 + k x the VAE's temporal stride
    crop_size: int  # pixels, a multiple of the VAE's spatial stride
    l1: float = 1.0
    l2: float = 1.0
    temporal: float = 0.5
    kl: float = 1e-5  # on the mean over latent values, in nats
    perceptual: float = 0.0
    image_fraction: float = 0.1  # share of batches made of single frames
    candidates: int = 2  # crops drawn per clip, of which the one with the most contrast is kept
    wavelet: float = 0.0  # on the eight bands of the error (HaCohen et al. 2024, LTX-Video, sec. 2.1)
    outlier: float = 0.0  # (Polyak et al. 2024, Movie Gen, eq. 1, where it is 1e5 on a sum over pixels)
    identity: float = 0.0  # on the distance of latents from those of single frames (Zheng et al. 2024, Open-Sora 1.2)
    log_variance: float | None = None  # where a learned one begins; None: there is none
    learned: Literal["all", "decoder"] = "all"  # "decoder": latents stay as they are, to the last bit
    schedule: tuple[Crops, ...] = ()  # (): crop_frames and crop_size throughout
    adversarial: Adversarial | None = None

    def __post_init__(self) -> None:
        if self.crop_frames < 1 or self.crop_size < 1 or self.candidates < 1:
            raise ConfigError("crop_frames, crop_size and candidates must be at least 1")
        if not 0 <= self.image_fraction <= 1:
            raise ConfigError(f"image_fraction is a share between 0 and 1, got {self.image_fraction}")
        untils = [crops.until for crops in self.schedule]
        if untils and (untils != sorted(set(untils)) or untils[-1] != 1):
            raise ConfigError(f"the schedule's crops hold until rising shares of the run, the last 1; got {untils}")
        if self.wavelet and any(size % 2 for _, size in self.crops):
            raise ConfigError("wavelets need crops of an even size")

    @property
    def crops(self) -> tuple[tuple[int, int], ...]:
        """All lengths and sizes that may be drawn."""
        planned = tuple((f, s) for crops in self.schedule for f in crops.frames for s in crops.sizes)
        return planned or ((self.crop_frames, self.crop_size),)

    def draw_crop(self, progress: float, generator: torch.Generator) -> tuple[int, int]:
        """Return the frames and the size of a batch's crops when a share `progress` of the run is done."""
        if not self.schedule:
            return self.crop_frames, self.crop_size
        crops = next((crops for crops in self.schedule if progress < crops.until), self.schedule[-1])
        frames, size = (
            options[int(torch.randint(len(options), (), generator=generator))]
            for options in (crops.frames, crops.sizes)
        )
        return frames, size


def weight_of_mean(weight: float, vae: VAEConfig) -> float:
    """Turn a published weight of a term summed over latents, beside an error summed over pixels, into one of means.

    Sums weigh each latent value as much as each pixel value; means need the share that latents are of pixels.
    """
    return weight * vae.latent_channels / (3 * vae.spatial_stride**2 * vae.temporal_stride)


def to_float(frames: UInt8[Tensor, "B T H W 3"]) -> Float[Tensor, "B 3 T H W"]:
    """Turn stored frames into clips in [-1, 1]."""
    return frames.permute(0, 4, 1, 2, 3).float() / 127.5 - 1


def draw_crops(
    clips: UInt8[Tensor, "B T H W 3"], config: AutoencoderConfig, generator: torch.Generator, *, progress: float = 0.0
) -> Float[Tensor, "B2 3 t h w"]:
    """Cut one crop from each clip, where something is; or, for a batch of images, as many frames from each.

    Flat backdrop teaches little: of `candidates` crops the one with the widest range of colours is kept. `progress` is
    the share of the run that is done.
    """
    _, T, H, W, _ = clips.shape
    length, size = config.draw_crop(progress, generator)
    frames = min(length, T)
    images = torch.rand((), generator=generator).item() < config.image_fraction

    def crop(clip: Tensor) -> Tensor:
        t, y, x = (int(torch.randint(n + 1, (), generator=generator)) for n in (T - frames, H - size, W - size))
        return clip[t : t + frames, y : y + size, x : x + size]

    def contrast(candidate: Tensor) -> int:
        return int((candidate.amax((0, 1, 2)).int() - candidate.amin((0, 1, 2)).int()).sum())

    chosen = torch.stack([max((crop(clip) for _ in range(config.candidates)), key=contrast) for clip in clips])
    return to_float(chosen.flatten(0, 1)[:, None] if images else chosen)


def haar_bands(x: Float[Tensor, "B C T H W"]) -> Float[Tensor, "B C 8 t h w"]:
    """Return the orthonormal bands of cells of 2 x 2 x 2, the means first (Haar 1910).

    Of an odd clip, frame 0 fills the first cell with a copy of itself.
    """
    if x.shape[2] % 2:
        x = torch.cat([x[:, :, :1], x], dim=2)
    pair = x.new_tensor([[1, 1], [1, -1]])
    cells = rearrange(x, "B C (T t) (H h) (W w) -> B C T H W (t h w)", t=2, h=2, w=2)
    return 8**-0.5 * (cells @ torch.kron(torch.kron(pair, pair), pair)).movedim(-1, 2)


def outlier_penalty(latents: Float[Tensor, "B C T H W"], r: float = 3.0) -> Float[Tensor, ""]:
    """Return by how much latents lie further than r deviations from the mean of their frame, on average.

    Norms are over channels: mean of max(|x - mean| - r |std|, 0) (Polyak et al. 2024, Movie Gen, eq. 1).
    """
    centred = latents - latents.mean((3, 4), keepdim=True)
    far = torch.linalg.vector_norm(centred, dim=1)
    std = centred.square().mean((3, 4), keepdim=True).sum(1).sqrt()
    return (far - r * std).clamp_min(0).mean()


def frame_latents(image: CausalVAE, stride: int) -> Reference:
    """Return a function to the latents of single frames 0, stride, 2 stride, ..., by an autoencoder that stays as it is."""

    @torch.no_grad()
    def latents(clip: Tensor) -> Tensor:
        frames = clip[:, :, ::stride]
        flat = frames.movedim(2, 1).flatten(0, 1).unsqueeze(2)
        return image.encode(flat).mean.squeeze(2).unflatten(0, (len(clip), -1)).movedim(1, 2)

    return latents


class Companions(nn.Module):
    """An autoencoder, and what accompanies it in training only: they learn, average and are saved together.

    All are on the autoencoder's device, but for the count of batches: whoever asks for it need not wait for the device.
    """

    batches: Tensor
    seen: Tensor

    def __init__(self, vae: CausalVAE, config: AutoencoderConfig) -> None:
        super().__init__()
        device, s = vae.latent_std.device, config.log_variance
        self.vae = vae
        self.discriminator = None if config.adversarial is None else PatchDiscriminator(config.adversarial).to(device)
        self.log_variance = None if s is None else nn.Parameter(torch.tensor(s, device=device))
        self.register_buffer("batches", torch.zeros((), dtype=torch.int64))
        self.register_buffer("seen", torch.zeros(len(SIGNS), device=device))  # running means; 0 before the first


SIGNS = ("real_accuracy", "fake_accuracy", "hinge", "adaptive_weight")


class AutoencoderTask:
    """Training of a `CausalVAE` (see `reelflow.training.loop.Task`); `validation` holds unseen whole clips.

    `model` is what the loop trains: the autoencoder, or `Companions` where an adversary or a log-variance learns with it.
    Batches and `validation` are on the CPU, and so are the draws; networks that are handed in are where the autoencoder is.
    `measure` adds numbers on rebuilt validation clips; what goes wrong is named under "health" (`training/health.py`).

    Raises:
        ConfigError: the crops do not fit the VAE or the clips, or a weight comes without the network it needs.
    """

    def __init__(
        self,
        model: CausalVAE,
        config: AutoencoderConfig,
        *,
        validation: UInt8[Tensor, "B T H W 3"],
        flops_per_sample: float = 0.0,
        perceptual: Perceptual | None = None,
        reference: Reference | None = None,
        measure: Measure | None = None,
        previewer: Callable[[Path, int], None] | None = None,
    ) -> None:
        _, T, H, W, _ = validation.shape
        for frames, size in config.crops:
            model.config.latent_shape(frames, size, size)
            if frames > T or size > min(H, W):
                raise ConfigError(f"crops of {frames} x {size} x {size} do not fit clips of {T} x {H} x {W}")
        if config.perceptual and perceptual is None:
            raise ConfigError("a perceptual weight needs a network: pass perceptual=, or set the weight to 0")
        if config.identity and reference is None:
            raise ConfigError("an identity weight needs latents to stay near: pass reference=, or set the weight to 0")
        if config.learned == "decoder" and config.identity:
            raise ConfigError("with the encoder as it is no latents move; set identity to 0, or learned to all")
        self.vae = model
        accompanied = config.adversarial is not None or config.log_variance is not None
        self.model: nn.Module = Companions(model, config) if accompanied else model
        if config.learned == "decoder":
            model.encoder.requires_grad_(False)
        self.config = config
        self.validation = validation
        self.flops_per_sample = flops_per_sample
        self.perceptual = perceptual
        self.reference = reference
        self.measure = measure
        self.previewer = previewer

    def hidden(self, name: str, weight: nn.Parameter) -> bool:
        """Say whether Muon may move a weight: the autoencoder's kernels, but for its first and last layers."""
        ends = [*_ends(self.vae.encoder, "encoder."), *_ends(self.vae.decoder, "decoder.")]
        return weight.ndim >= 2 and not name.removeprefix("vae.").startswith((*ends, "discriminator."))

    def loss(self, batch: Float[Tensor, "B 3 T H W"], generator: torch.Generator) -> Loss:
        c, companions = self.config, self.model if isinstance(self.model, Companions) else None
        shape = (batch.shape[0], *self.vae.config.latent_shape(*batch.shape[2:]))
        noise = self._here(torch.randn(shape, generator=generator, dtype=batch.dtype))
        batch = self._here(batch)
        posterior = self._encode(batch)
        decoded = self.vae.decode(posterior.at(noise)).float()
        error = decoded - batch
        parts = {"l1": error.abs().mean(), "l2": error.square().mean(), "kl": posterior.kl()}
        distance = c.l1 * parts["l1"] + c.l2 * parts["l2"]
        if batch.shape[2] > 1:
            parts["temporal"] = error.diff(dim=2).abs().mean()
            distance = distance + c.temporal * parts["temporal"]
        if c.wavelet:
            parts["wavelet"] = haar_bands(error).abs().mean()
            distance = distance + c.wavelet * parts["wavelet"]
        if c.perceptual and self.perceptual is not None:
            parts["perceptual"] = self.perceptual(decoded, batch)
            distance = distance + c.perceptual * parts["perceptual"]
        if companions is not None and (s := companions.log_variance) is not None:
            parts["log_variance"] = s
            distance = distance * torch.exp(-s) + s
        value = distance
        if c.learned == "all":
            value = value + c.kl * parts["kl"]
        if c.outlier:
            parts["outlier"] = outlier_penalty(posterior.mean)
            value = value + c.outlier * parts["outlier"]
        if c.identity and self.reference is not None:
            parts["identity"] = (posterior.mean - self.reference(batch)).abs().mean()
            value = value + c.identity * parts["identity"]
        if companions is not None:
            value = value + self._adversary(companions, batch, decoded, distance, parts)
        return Loss(value, parts, num_tokens=posterior.mean[:, 0].numel(), num_samples=batch.shape[0])

    def validate(self, generator: torch.Generator) -> dict[str, Any]:
        """Return the mean PSNR (dB) of unseen whole clips and images; "loss" is minus the clips' PSNR."""
        clips, images, rebuilt, posteriors = [], [], [], []
        for chunk in self.validation.split(4):
            clip = to_float(self._here(chunk))
            posteriors.append(self.vae.encode(clip))
            rebuilt.append(self.vae.decode(posteriors[-1].mean).float().clamp(-1, 1))
            clips.append(_psnr(rebuilt[-1], clip))
            images.append(_psnr(self.vae.decode(self.vae.encode(clip[:, :, :1]).mean), clip[:, :, :1]))
        psnr = torch.cat(clips).mean().item()
        values: dict[str, Any] = {"loss": -psnr, "psnr": psnr, "psnr_image": torch.cat(images).mean().item()}
        if self.measure is not None:
            values |= self.measure(torch.cat(rebuilt), to_float(self._here(self.validation)))
        signs = {**{k: v for k, v in values.items() if isinstance(v, float)}, **_look_at(posteriors), **self._running()}
        if self.vae.config.posterior == "point":
            del signs["posterior_std"]  # which it is meant to be without
        values["health"] = list(diagnose(signs))
        for line in values["health"]:
            LOG.warning("%s", line)
        shown = ("channels_used", "latent_peak", "posterior_std")
        return values | {name: signs[name] for name in shown if name in signs}

    def preview(self, folder: Path, step: int) -> None:
        if self.previewer is not None:
            self.previewer(folder, step)

    def _here(self, x: Tensor) -> Tensor:
        return moved(x, self.vae.latent_std.device)

    def _encode(self, batch: Tensor) -> Posterior:
        if self.config.learned == "all":
            return self.vae.encode(batch)
        with torch.no_grad():
            return self.vae.encode(batch)

    def _adversary(
        self, companions: Companions, batch: Tensor, decoded: Tensor, distance: Tensor, parts: dict[str, Tensor]
    ) -> Tensor | float:
        """Return the losses of both sides, 0 before the adversary begins, and remember how they fare."""
        adversarial, discriminator = self.config.adversarial, companions.discriminator
        companions.batches += 1
        if adversarial is None or discriminator is None or int(companions.batches) <= adversarial.start:
            return 0.0
        last = [weight for weight in self.vae.decoder.parameters() if weight.ndim >= 2][-1]
        fooling, verdict = fool(discriminator, decoded), judge(discriminator, batch, decoded)
        adaptive = adaptive_weight(distance, fooling, last)
        values = (verdict.real, verdict.fake, verdict.loss, adaptive)
        parts |= {"adversarial": fooling, **dict(zip(SIGNS, values, strict=True))}
        now = torch.stack([value.detach() for value in values])
        mean = torch.where(companions.seen.any(), torch.lerp(now, companions.seen, MEMORY), now)
        companions.seen.copy_(torch.where(mean.isfinite(), mean, companions.seen))
        return adversarial.weight * adaptive * fooling + verdict.loss

    def _running(self) -> dict[str, float]:
        if not isinstance(self.model, Companions) or not self.model.seen.any():
            return {}
        return dict(zip(SIGNS, self.model.seen.tolist(), strict=True))


def _ends(coder: CausalSequence, path: str) -> tuple[str, str]:
    """Return where the first and the last layer are; those of a network beside a projection, where there is one."""
    while len(coder) == 1 and isinstance(coder[0], SkipBlock):
        coder, path = coder[0].layers, f"{path}0.layers."
    return f"{path}0.", f"{path}{len(coder) - 1}."


def _psnr(decoded: Tensor, clip: Tensor) -> Float[Tensor, " B"]:
    return 10 * torch.log10(4 / (decoded.float().clamp(-1, 1) - clip).square().mean(dim=(1, 2, 3, 4)))


def _look_at(posteriors: list[Posterior]) -> dict[str, float]:
    """Return the share of channels that say more than 0.01 nats, the furthest latent in deviations, and the noise."""
    mean, logvar = (torch.cat(parts).float() for parts in zip(*posteriors, strict=True))
    kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean((0, 2, 3, 4))
    centred = mean - mean.mean((3, 4), keepdim=True)
    far, std = (
        torch.linalg.vector_norm(x, dim=1) for x in (centred, centred.square().mean((3, 4), keepdim=True).sqrt())
    )
    return {
        "channels_used": (kl > 0.01).float().mean().item(),
        "latent_peak": (far / std.clamp_min(1e-6)).max().item(),
        "posterior_std": torch.exp(0.5 * logvar).mean().item(),
    }
