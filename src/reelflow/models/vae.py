"""The causal video autoencoder: everything between pixels and unit-variance latents.

    clip B 3 T H W --patch--> stages down --> mean, log-variance --> latents B C t h w --> stages up --patch--> clip

Causal in time with frame 0 alone: T = 1 + f k frames become t = 1 + k latents, and T = 1 is an image in the same
latent space. `encode` and `decode` take a whole clip; `encode_chunk` and `decode_chunk` take it as it comes, with the
same result whatever the chunks (the state is a value, see `nn/conv.py`). Per-channel mean and standard deviation live
here, so no other file knows a scale factor.
"""

from collections.abc import Iterable, Iterator
from math import prod
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from reelflow.config import configuration
from reelflow.errors import ConfigError
from reelflow.nn.attention import attend
from reelflow.nn.conv import START, CausalConv3d, CausalSequence, DownShuffle, State, TimePadding, UpShuffle
from reelflow.nn.norm import ChannelRMSNorm

__all__ = ["CausalVAE", "EncoderState", "Posterior", "Stage", "VAEConfig"]


@configuration
class Stage:
    """A run of residual blocks at one resolution, then (in the encoder) a division of space and time.

    The decoder reads the stages of its own list from the latents up, multiplying *before* its blocks.
    """

    channels: int
    num_blocks: int
    space: int = 1
    time: int = 1

    def __post_init__(self) -> None:
        for name in ("channels", "space", "time"):
            if getattr(self, name) < 1:
                raise ConfigError(f"a stage's {name} must be at least 1, got {getattr(self, name)}")
        if self.num_blocks < 0:
            raise ConfigError(f"a stage's num_blocks must be at least 0, got {self.num_blocks}")


@configuration
class VAEConfig:
    """Shape of a `CausalVAE`; the compression is the product of the patch and the stages' factors.

    Without stages, encoder=() and decoder=(), latents are the pixels: folded by the patch and scaled to unit variance.

    Raises:
        ConfigError: encoder and decoder disagree about the compression, or widths do not divide.
    """

    latent_channels: int
    encoder: tuple[Stage, ...]
    decoder: tuple[Stage, ...]
    patch: int = 1  # side of the pixel square folded into channels before the first stage
    conv: Literal["full", "factorised"] = "full"  # 3 x 3 x 3 twice a block, or 1 x 3 x 3 then 3 x 1 x 1
    resample_kernel: Literal[1, 3] = 3
    mid_attention: Literal["none", "frame"] = "none"
    time_padding: TimePadding = "first"

    def __post_init__(self) -> None:
        if self.latent_channels < 1 or self.patch < 1 or bool(self.encoder) != bool(self.decoder):
            raise ConfigError("a VAE needs latent_channels >= 1, patch >= 1, and stages in encoder and decoder")
        if not self.encoder and self.latent_channels != 3 * self.patch**2:
            raise ConfigError(
                f"without stages latents are pixels, {3 * self.patch**2} channels of a patch of {self.patch}, "
                f"got latent_channels={self.latent_channels}; nearest: {3 * self.patch**2}"
            )
        for axis in ("space", "time"):
            down, up = (prod(getattr(s, axis) for s in stages) for stages in (self.encoder, self.decoder))
            if down != up:
                raise ConfigError(
                    f"encoder divides {axis} by {down} but decoder multiplies it by {up}; make them equal"
                )
        for a, b, stage in self._resamplers():
            cells = stage.space**2 * stage.time
            fits = [cells * divisor for divisor in range(1, a + 1) if a % divisor == 0]
            if b not in fits:
                raise ConfigError(
                    f"resampling {a} -> {b} channels over cells of {cells}: the wide side ({b}) must be a multiple of "
                    f"{cells} and divide {a * cells}; nearest: {min(fits, key=lambda width: abs(width - b))}"
                )

    def _resamplers(self) -> list[tuple[int, int, Stage]]:
        """(channels on the fine side, channels on the coarse side, stage) of each resampling layer."""
        widths = [s.channels for s in self.encoder]
        down = list(zip(widths, widths[1:] + widths[-1:], self.encoder, strict=True))
        widths = [s.channels for s in self.decoder]
        up = list(zip(widths, widths[:1] + widths[:-1], self.decoder, strict=True))
        return [(fine, coarse, s) for fine, coarse, s in down + up if s.space * s.time > 1]

    @property
    def spatial_stride(self) -> int:
        return self.patch * prod(s.space for s in self.encoder)

    @property
    def temporal_stride(self) -> int:
        return prod(s.time for s in self.encoder)

    def latent_shape(self, num_frames: int, height: int, width: int) -> tuple[int, int, int, int]:
        """Return (C, t, h, w) of the latents of a clip.

        Raises:
            ConfigError: an extent does not fit; names the nearest that do.
        """
        stride, time = self.spatial_stride, self.temporal_stride
        if num_frames < 1 or (num_frames - 1) % time:
            below = max(0, num_frames - 1) // time * time + 1
            raise ConfigError(f"num_frames must be 1 + {time} k, got {num_frames}; nearest: {below} or {below + time}")
        for name, extent in (("height", height), ("width", width)):
            if extent < 1 or extent % stride:
                below = extent // stride * stride
                options = f"{below} or {below + stride}" if below > 0 else f"{stride}"
                raise ConfigError(
                    f"{name} must be a multiple of {stride} (the VAE's stride), got {extent}; nearest: {options}"
                )
        return self.latent_channels, 1 + (num_frames - 1) // time, height // stride, width // stride


class Posterior(NamedTuple):
    """The Gaussian a clip is encoded to, in normalised latent units."""

    mean: Float[Tensor, "B C T H W"]
    logvar: Float[Tensor, "B C T H W"]

    def sample(self, generator: torch.Generator | None = None) -> Float[Tensor, "B C T H W"]:
        """Draw latents."""
        noise = torch.randn(self.mean.shape, generator=generator, dtype=self.mean.dtype, device=self.mean.device)
        return torch.addcmul(self.mean, torch.exp(0.5 * self.logvar), noise)

    def kl(self) -> Float[Tensor, ""]:
        """Return the mean over all values of KL(N(mean, var) || N(0, 1)) in nats (Kingma & Welling 2014, app. B)."""
        return 0.5 * (self.mean.square() + self.logvar.exp() - 1 - self.logvar).mean()


class EncoderState(NamedTuple):
    """What a streaming encoder remembers: its layers' states and the frames that do not fill a latent yet."""

    layers: State
    pending: Float[Tensor, "B 3 T H W"] | None


class ResBlock(nn.Module):
    """norm, SiLU, conv, twice, on top of the input (or its 1 x 1 projection when the width changes)."""

    def __init__(self, in_channels: int, channels: int, config: VAEConfig) -> None:
        super().__init__()
        first, second = ((3, 3), (3, 3)) if config.conv == "full" else ((1, 3), (3, 1))
        self.norm1 = ChannelRMSNorm(in_channels, eps=1e-6)
        self.conv1 = CausalConv3d(in_channels, channels, first, time_padding=config.time_padding)
        self.norm2 = ChannelRMSNorm(channels, eps=1e-6)
        self.conv2 = CausalConv3d(channels, channels, second, time_padding=config.time_padding)
        nn.init.zeros_(self.conv2.conv.weight)
        self.shortcut = nn.Conv3d(in_channels, channels, 1) if in_channels != channels else nn.Identity()

    def forward(self, x: Float[Tensor, "B C T H W"], state: State) -> tuple[Float[Tensor, "B D T H W"], State]:
        first, second = state or (state, state)
        y, first = self.conv1(F.silu(self.norm1(x)), first)
        y, second = self.conv2(F.silu(self.norm2(y)), second)
        return self.shortcut(x) + y, None if state is None else (first, second)


class FrameAttention(nn.Module):
    """Single-head attention among the positions of each frame; needs no state."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = ChannelRMSNorm(channels, eps=1e-6)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.out = nn.Linear(channels, channels)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, x: Float[Tensor, "B C T H W"], state: State) -> tuple[Float[Tensor, "B C T H W"], State]:
        B, _, T, H, W = x.shape
        q, k, v = self.qkv(rearrange(self.norm(x), "B C T H W -> (B T) 1 (H W) C")).chunk(3, dim=-1)
        y = self.out(attend(q, k, v))
        return x + rearrange(y, "(B T) (H W) C -> B C T H W", B=B, T=T, H=H, W=W), state


class CausalVAE(nn.Module):
    """A causal 3D autoencoder with a Gaussian bottleneck (see the module's docstring)."""

    latent_mean: Tensor
    latent_std: Tensor

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = CausalSequence(_encoder_layers(config) if config.encoder else ())
        self.decoder = CausalSequence(_decoder_layers(config) if config.decoder else ())
        self.register_buffer("latent_mean", torch.zeros(config.latent_channels))
        self.register_buffer("latent_std", torch.ones(config.latent_channels))
        if not config.encoder:
            return
        head = self.encoder[-1]
        assert isinstance(head, CausalConv3d)
        assert head.conv.bias is not None
        with torch.no_grad():  # log-variance starts at -6: louder posterior noise would drown the signal early on
            head.conv.weight[config.latent_channels :] *= 0.1
            head.conv.bias[config.latent_channels :] = -6.0
        self.to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]

    def encode(self, clip: Float[Tensor, "B 3 T H W"]) -> Posterior:
        """Encode a whole clip in [-1, 1] at once.

        Raises:
            ConfigError: T is not 1 + f k, or a side is not a multiple of the stride.
        """
        self.config.latent_shape(*clip.shape[2:])
        return self._encode(clip, None)[0]

    def decode(self, latents: Float[Tensor, "B c t h w"]) -> Float[Tensor, "B 3 T H W"]:
        """Decode latents to pixels (about [-1, 1], not clamped), with T = 1 + f (t - 1).

        Raises:
            ConfigError: the latents have another number of channels.
        """
        return self.decode_chunk(latents, None)[0]

    def encode_chunk(
        self, frames: Float[Tensor, "B 3 T H W"], state: EncoderState | None = None
    ) -> tuple[Posterior | None, EncoderState]:
        """Encode the next frames of a stream, any number of them; `state` None begins one.

        Returns the posterior of the latents that became complete (None when none did) and the state to pass with the
        next frames. A stream of 1 + f k frames ends with nothing pending.

        Raises:
            ConfigError: a side is not a multiple of the stride.
        """
        self.config.latent_shape(1, *frames.shape[3:])
        layers, pending = state if state is not None else (START, None)
        frames = frames if pending is None else torch.cat([pending, frames], dim=2)
        time = self.config.temporal_stride
        head = 0 if layers else 1
        ready = head + (frames.shape[2] - head) // time * time if frames.shape[2] >= head else 0
        now, later = frames[:, :, :ready], frames[:, :, ready:].clone()
        if ready == 0:
            return None, EncoderState(layers, later)
        posterior, layers = self._encode(now, layers)
        return posterior, EncoderState(layers, later if later.shape[2] else None)

    def decode_chunk(
        self, latents: Float[Tensor, "B c t h w"], state: State = START
    ) -> tuple[Float[Tensor, "B 3 T H W"], State]:
        """Decode the next latents of a stream; returns their frames and the state to pass with the next ones.

        Raises:
            ConfigError: the latents have another number of channels.
        """
        if latents.shape[1] != self.config.latent_channels:
            raise ConfigError(f"the VAE has {self.config.latent_channels} latent channels, got {latents.shape[1]}")
        x = latents * self._per_channel(self.latent_std) + self._per_channel(self.latent_mean)
        x, state = self.decoder(x.contiguous(memory_format=torch.channels_last_3d), state)
        p = self.config.patch
        return rearrange(x, "B (C h w) T H W -> B C T (H h) (W w)", h=p, w=p), state

    def stream_decode(self, chunks: Iterable[Float[Tensor, "B c _ h w"]]) -> Iterator[Float[Tensor, "B 3 T H W"]]:
        """Decode latents as they come, at memory that does not grow with the clip."""
        state: State = START
        for latents in chunks:
            frames, state = self.decode_chunk(latents, state)
            yield frames

    @torch.no_grad()
    def set_statistics(self, mean: Float[Tensor, " C"], std: Float[Tensor, " C"]) -> None:
        """Fix the per-channel mean and std (in the units latents have now) that make latents unit-variance.

        Raises:
            ConfigError: a std is not positive, so its channel carries nothing.
        """
        if not bool((std > 0).all()):
            raise ConfigError(f"every std must be positive, got {std.tolist()}; train the VAE longer, or drop channels")
        self.latent_mean += mean.to(self.latent_mean) * self.latent_std
        self.latent_std *= std.to(self.latent_std)

    def _encode(self, clip: Float[Tensor, "B 3 T H W"], state: State) -> tuple[Posterior, State]:
        p = self.config.patch
        x = rearrange(clip, "B C T (H h) (W w) -> B (C h w) T H W", h=p, w=p)
        x, state = self.encoder(x.contiguous(memory_format=torch.channels_last_3d), state)
        mean, logvar = x.chunk(2, dim=1) if self.encoder else (x, torch.full_like(x, -30))
        std = self._per_channel(self.latent_std)
        mean = (mean - self._per_channel(self.latent_mean)) / std
        return Posterior(mean, logvar.clamp(-30, 20) - 2 * std.log()), state

    def _per_channel(self, statistic: Tensor) -> Tensor:
        return statistic.view(1, -1, 1, 1, 1)


class Pointwise(nn.Module):
    """norm, SiLU: the end of a stack, before its last convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = ChannelRMSNorm(channels, eps=1e-6)

    def forward(self, x: Float[Tensor, "B C T H W"], state: State) -> tuple[Float[Tensor, "B C T H W"], State]:
        return F.silu(self.norm(x)), state


def _encoder_layers(config: VAEConfig) -> Iterator[nn.Module]:
    pad, kernel, stages = config.time_padding, config.resample_kernel, config.encoder
    yield CausalConv3d(3 * config.patch**2, stages[0].channels, (3, 3), time_padding=pad)
    for stage, after in zip(stages, stages[1:] + stages[-1:], strict=True):
        for _ in range(stage.num_blocks):
            yield ResBlock(stage.channels, stage.channels, config)
        if stage.space * stage.time > 1:
            factors = {"space": stage.space, "time": stage.time}
            yield DownShuffle(stage.channels, after.channels, **factors, kernel=kernel, time_padding=pad)
        elif after.channels != stage.channels:
            yield ResBlock(stage.channels, after.channels, config)
    if config.mid_attention == "frame":
        yield FrameAttention(stages[-1].channels)
    yield Pointwise(stages[-1].channels)
    yield CausalConv3d(stages[-1].channels, 2 * config.latent_channels, (3, 3), time_padding=pad)


def _decoder_layers(config: VAEConfig) -> Iterator[nn.Module]:
    pad, kernel, stages = config.time_padding, config.resample_kernel, config.decoder
    yield CausalConv3d(config.latent_channels, stages[0].channels, (3, 3), time_padding=pad)
    if config.mid_attention == "frame":
        yield FrameAttention(stages[0].channels)
    for before, stage in zip(stages[:1] + stages[:-1], stages, strict=True):
        if stage.space * stage.time > 1:
            factors = {"space": stage.space, "time": stage.time}
            yield UpShuffle(before.channels, stage.channels, **factors, kernel=kernel, time_padding=pad)
        elif before.channels != stage.channels:
            yield ResBlock(before.channels, stage.channels, config)
        for _ in range(stage.num_blocks):
            yield ResBlock(stage.channels, stage.channels, config)
    yield Pointwise(stages[-1].channels)
    yield CausalConv3d(stages[-1].channels, 3 * config.patch**2, (3, 3), time_padding=pad)
