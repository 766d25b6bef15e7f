"""The autoencoder's task: give back clips and images through a narrow, smooth bottleneck.

    loss = l1 |e| + l2 e^2 + temporal |e[t] - e[t-1]| + kl KL + perceptual d(decoded, clip),    e = decoded - clip

Training sees crops, mixed with single frames; validation sees whole clips.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from reelflow.config import configuration
from reelflow.errors import ConfigError
from reelflow.models.vae import CausalVAE
from reelflow.training.loop import Loss

__all__ = ["AutoencoderConfig", "AutoencoderTask", "Perceptual", "draw_crops", "to_float"]

Perceptual = Callable[[Float[Tensor, "B 3 T H W"], Float[Tensor, "B 3 T H W"]], Float[Tensor, ""]]
"""A distance between clips in [-1, 1], such as one over the features of a network handed in."""


@configuration
class AutoencoderConfig:
    """Weights of the loss, and the crops it is taken on."""

    crop_frames: int  # 1 + k x the VAE's temporal stride
    crop_size: int  # pixels, a multiple of the VAE's spatial stride
    l1: float = 1.0
    l2: float = 1.0
    temporal: float = 0.5
    kl: float = 1e-5  # on the mean over latent values, in nats
    perceptual: float = 0.0
    image_fraction: float = 0.1  # share of batches made of single frames
    candidates: int = 2  # crops drawn per clip, of which the one with the most contrast is kept

    def __post_init__(self) -> None:
        if self.crop_frames < 1 or self.crop_size < 1 or self.candidates < 1:
            raise ConfigError("crop_frames, crop_size and candidates must be at least 1")
        if not 0 <= self.image_fraction <= 1:
            raise ConfigError(f"image_fraction is a share between 0 and 1, got {self.image_fraction}")


def to_float(frames: UInt8[Tensor, "B T H W 3"]) -> Float[Tensor, "B 3 T H W"]:
    """Turn stored frames into clips in [-1, 1]."""
    return frames.permute(0, 4, 1, 2, 3).float() / 127.5 - 1


def draw_crops(
    clips: UInt8[Tensor, "B T H W 3"], config: AutoencoderConfig, generator: torch.Generator
) -> Float[Tensor, "B2 3 t h w"]:
    """Cut one crop from each clip, where something is; or, for a batch of images, `crop_frames` frames from each.

    Flat backdrop teaches little: of `candidates` crops the one with the widest range of colours is kept.
    """
    _, T, H, W, _ = clips.shape
    frames, size = min(config.crop_frames, T), config.crop_size
    images = torch.rand((), generator=generator).item() < config.image_fraction

    def crop(clip: Tensor) -> Tensor:
        t, y, x = (int(torch.randint(n + 1, (), generator=generator)) for n in (T - frames, H - size, W - size))
        return clip[t : t + frames, y : y + size, x : x + size]

    def contrast(candidate: Tensor) -> int:
        return int((candidate.amax((0, 1, 2)).int() - candidate.amin((0, 1, 2)).int()).sum())

    chosen = torch.stack([max((crop(clip) for _ in range(config.candidates)), key=contrast) for clip in clips])
    return to_float(chosen.flatten(0, 1)[:, None] if images else chosen)


class AutoencoderTask:
    """Training of a `CausalVAE` (see `reelflow.training.loop.Task`); `validation` holds unseen whole clips.

    Raises:
        ConfigError: the crops do not fit the VAE or the clips, or a perceptual weight comes without its network.
    """

    def __init__(
        self,
        model: CausalVAE,
        config: AutoencoderConfig,
        *,
        validation: UInt8[Tensor, "B T H W 3"],
        flops_per_sample: float = 0.0,
        perceptual: Perceptual | None = None,
        previewer: Callable[[Path, int], None] | None = None,
    ) -> None:
        model.config.latent_shape(config.crop_frames, config.crop_size, config.crop_size)
        _, T, H, W, _ = validation.shape
        if config.crop_frames > T or config.crop_size > min(H, W):
            raise ConfigError(
                f"crops of {config.crop_frames} x {config.crop_size} x {config.crop_size} do not fit clips of {T} x {H} x {W}"
            )
        if config.perceptual and perceptual is None:
            raise ConfigError("a perceptual weight needs a network: pass perceptual=, or set the weight to 0")
        self.model = model
        self.config = config
        self.validation = validation
        self.flops_per_sample = flops_per_sample
        self.perceptual = perceptual
        self.previewer = previewer

    def loss(self, batch: Float[Tensor, "B 3 T H W"], generator: torch.Generator) -> Loss:
        c = self.config
        posterior = self.model.encode(batch)
        decoded = self.model.decode(posterior.sample(generator)).float()
        error = decoded - batch
        parts = {"l1": error.abs().mean(), "l2": error.square().mean(), "kl": posterior.kl()}
        value = c.l1 * parts["l1"] + c.l2 * parts["l2"] + c.kl * parts["kl"]
        if batch.shape[2] > 1:
            parts["temporal"] = error.diff(dim=2).abs().mean()
            value = value + c.temporal * parts["temporal"]
        if c.perceptual and self.perceptual is not None:
            parts["perceptual"] = self.perceptual(decoded, batch)
            value = value + c.perceptual * parts["perceptual"]
        return Loss(value, parts, num_tokens=posterior.mean[:, 0].numel(), num_samples=batch.shape[0])

    def validate(self, generator: torch.Generator) -> dict[str, Any]:
        """Return the mean PSNR (dB) of unseen whole clips and images; "loss" is minus the clips' PSNR."""
        clips, images = [], []
        for chunk in self.validation.split(4):
            clip = to_float(chunk)
            clips.append(_psnr(self.model.decode(self.model.encode(clip).mean), clip))
            images.append(_psnr(self.model.decode(self.model.encode(clip[:, :, :1]).mean), clip[:, :, :1]))
        psnr = torch.cat(clips).mean().item()
        return {"loss": -psnr, "psnr": psnr, "psnr_image": torch.cat(images).mean().item()}

    def preview(self, folder: Path, step: int) -> None:
        if self.previewer is not None:
            self.previewer(folder, step)


def _psnr(decoded: Tensor, clip: Tensor) -> Float[Tensor, " B"]:
    return 10 * torch.log10(4 / (decoded.float().clamp(-1, 1) - clip).square().mean(dim=(1, 2, 3, 4)))
