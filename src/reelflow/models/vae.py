"""The causal video autoencoder: everything between pixels and unit-variance latents.

    clip B 3 T H W --patch--> encoder --> mean, log-variance --> latents B C t h w --> decoder --patch--> clip

Encoder and decoder are tuples of layers (`reelflow.models.coder`). Causal in time with frame 0 alone: T = 1 + f k frames
become t = 1 + k latents, and T = 1 is an image in the same latent space. `encode` and `decode` take a whole clip;
`encode_chunk` and `decode_chunk` take it as it comes, with the same result whatever the chunks (the state is a value, see
`nn/conv.py`), where no layer stands in the way (`VAEConfig.obstacles`). Given a budget of memory, `encode` and `decode`
choose chunks and tiles themselves (`budget.py`). Per-channel mean and standard deviation live here, so no other file
knows a scale factor.
"""

import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from functools import lru_cache
from itertools import count
from math import prod
from typing import Literal, NamedTuple

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from reelflow.config import configuration
from reelflow.errors import ConfigError
from reelflow.models.budget import Budgeted, choose, grows, in_bytes, reach, readable
from reelflow.models.coder import (
    Act,
    Attention,
    Conv,
    Fold,
    Layer,
    Padding,
    Res,
    Skip,
    Timed,
    Unfold,
    build_layers,
    factor,
    obstacles,
    width_after,
)
from reelflow.models.parts import Way, chunks, collect, window
from reelflow.models.weighing import peak_bytes
from reelflow.nn.conv import START, CausalConv3d, CausalSequence, Given, State, TimePadding, owned

__all__ = ["CausalVAE", "EncoderState", "Pieces", "Posterior", "Stage", "VAEConfig", "staged"]

LOG = logging.getLogger(__name__)
Coder = Literal["encoder", "decoder"]


@configuration
class Pieces:
    """A clip is encoded so many frames at a time, and decoded so many latents at a time.

    Each piece knows what came `before`, and what is left over goes with the first; or it knows nothing, and what is left
    over is a last, shorter one. Norms with statistics of a piece make this part of what was trained.
    """

    frames: int
    latents: int
    knows: Literal["before", "nothing"] = "before"


@configuration
class VAEConfig:
    """Shape of a `CausalVAE`; the compression is the product of the patch and the layers' factors.

    Without layers, encoder=() and decoder=(), latents are the pixels: folded by the patch and scaled to unit variance.
    The posterior is Gaussian, with a variance per channel or one that the channels share, or a point.

    Raises:
        ConfigError: encoder and decoder disagree about the compression, or widths do not fit.
    """

    latent_channels: int
    encoder: tuple[Layer, ...]
    decoder: tuple[Layer, ...]
    patch: int = 1  # side of the pixel square folded into channels before the first layer
    posterior: Literal["gaussian", "shared", "point"] = "gaussian"
    latent_mean: tuple[float, ...] = (0.0,)  # of what the encoder gives; one for each channel, or for all
    latent_std: tuple[float, ...] = (1.0,)
    pieces: Pieces | None = None

    def __post_init__(self) -> None:
        if self.latent_channels < 1 or self.patch < 1 or bool(self.encoder) != bool(self.decoder):
            raise ConfigError("a VAE needs latent_channels >= 1, patch >= 1, and stages in encoder and decoder")
        for name in ("latent_mean", "latent_std"):
            if len(getattr(self, name)) not in (1, self.latent_channels):
                found = len(getattr(self, name))
                raise ConfigError(f"{name} needs 1 value or {self.latent_channels}, one for each channel; got {found}")
        if not all(std > 0 for std in self.latent_std):
            raise ConfigError(f"every latent_std must be positive, got {self.latent_std}")
        pixels = 3 * self.patch**2
        if not self.encoder and self.latent_channels != pixels:
            raise ConfigError(
                f"without stages latents are pixels, {pixels} channels of a patch of {self.patch}, "
                f"got latent_channels={self.latent_channels}; nearest: {pixels}"
            )
        for axis in ("space", "time"):
            _check_strides(axis, factor(self.encoder, axis), factor(self.decoder, axis))
        if self.encoder:
            self._check_width("encoder", pixels, self.moments)
            self._check_width("decoder", self.latent_channels, pixels)

    def _check_width(self, name: Literal["encoder", "decoder"], first: int, last: int) -> None:
        try:
            found = width_after(getattr(self, name), first)
        except ConfigError as error:
            raise ConfigError(f"{name}: {error}") from error
        if found != last:
            raise ConfigError(f"the {name}'s last layer gives {found} channels; expected {last}")

    @property
    def moments(self) -> int:
        """Channels that the encoder gives."""
        means = self.latent_channels
        return {"gaussian": 2 * means, "shared": means + 1, "point": means}[self.posterior]

    @property
    def spatial_stride(self) -> int:
        return self.patch * factor(self.encoder, "space")

    @property
    def temporal_stride(self) -> int:
        return factor(self.encoder, "time")

    @property
    def timed(self) -> bool:
        """Whether the decoder is told how clean latents are."""
        return any(isinstance(layer, Timed) for layer in self.decoder)

    @property
    def obstacles(self) -> tuple[str, ...]:
        """Layers that chunks cannot pass exactly, and why; ("encoder[4] (res): its norm sees all frames", ...)."""
        return obstacles(self.encoder, "encoder") + obstacles(self.decoder, "decoder")

    @property
    def streams(self) -> bool:
        """Whether any cutting into chunks gives the whole clip's result, both ways."""
        return not self.obstacles

    def latent_shape(self, num_frames: int, height: int, width: int) -> tuple[int, int, int, int]:
        """Return (C, t, h, w) of the latents of a clip.

        Raises:
            ConfigError: an extent does not fit; names the nearest that do.
        """
        stride = self.spatial_stride
        if not self._latent_frames(num_frames):
            fits = (n for n in count(max(1, num_frames)) if self._latent_frames(n))
            below = next((n for n in range(num_frames, 0, -1) if self._latent_frames(n)), None)
            near = f"{next(fits) if below is None else below} or {next(fits)}"
            raise ConfigError(f"num_frames must be {self.lengths}, got {num_frames}; nearest: {near}")
        for name, extent in (("height", height), ("width", width)):
            if extent < 1 or extent % stride:
                below = extent // stride * stride
                options = f"{below} or {below + stride}" if below > 0 else f"{stride}"
                raise ConfigError(
                    f"{name} must be a multiple of {stride} (the VAE's stride), got {extent}; nearest: {options}"
                )
        return self.latent_channels, self._latent_frames(num_frames), height // stride, width // stride

    def clip_shape(self, length: int, height: int, width: int) -> tuple[int, int, int]:
        """Return (T, H, W) of the clip that latents of these extents are decoded to."""
        time, pieces = self.temporal_stride, self.pieces
        frames = 1 + time * (length - 1)
        if pieces is not None and length > 1:
            whole, rest = divmod(length, pieces.latents)
            frames = whole * pieces.frames
            if rest:
                frames += rest if pieces.knows == "before" else 1 + time * (rest - 1)
        return frames, height * self.spatial_stride, width * self.spatial_stride

    @property
    def lengths(self) -> str:
        """The numbers of frames that it takes, in words."""
        time, pieces = self.temporal_stride, self.pieces
        if pieces is None:
            return f"1 + {time} k"
        n = pieces.frames
        if pieces.knows == "before":
            return f"1, {n} k or {n} k + 1"
        return f"{n} k, or {' or '.join(str(k) for k in range(1, n, time))} more"

    def _latent_frames(self, num_frames: int) -> int:
        """Return how many latents a clip of so many frames has, or 0 if it does not fit."""
        time, pieces = self.temporal_stride, self.pieces
        if num_frames < 1:
            return 0
        if pieces is None or num_frames == 1:
            return 0 if (num_frames - 1) % time else 1 + (num_frames - 1) // time
        whole, rest = divmod(num_frames, pieces.frames)
        if pieces.knows == "before":
            return whole * pieces.latents + rest if whole and rest <= 1 else 0
        return 0 if rest and (rest - 1) % time else whole * pieces.latents + (1 + (rest - 1) // time if rest else 0)


class Posterior(NamedTuple):
    """The Gaussian a clip is encoded to, in normalised latent units."""

    mean: Float[Tensor, "B C T H W"]
    logvar: Float[Tensor, "B C T H W"]

    def sample(self, generator: torch.Generator | None = None) -> Float[Tensor, "B C T H W"]:
        """Draw latents."""
        noise = torch.randn(self.mean.shape, generator=generator, dtype=self.mean.dtype, device=self.mean.device)
        return self.at(noise)

    def at(self, noise: Float[Tensor, "B C T H W"]) -> Float[Tensor, "B C T H W"]:
        """Return the latents that standard noise stands for."""
        return torch.addcmul(self.mean, torch.exp(0.5 * self.logvar), noise)

    def kl(self) -> Float[Tensor, ""]:
        """Return the mean over all values of KL(N(mean, var) || N(0, 1)) in nats (Kingma & Welling 2014, app. B)."""
        return 0.5 * (self.mean.square() + self.logvar.exp() - 1 - self.logvar).mean()


class EncoderState(NamedTuple):
    """What a streaming encoder remembers: its layers' states and the frames that do not fill a latent yet."""

    layers: State
    pending: Float[Tensor, "B 3 T H W"] | None


class CausalVAE(nn.Module):
    """A causal 3D autoencoder (see the module's docstring)."""

    latent_mean: Tensor
    latent_std: Tensor

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = build_layers(config.encoder, 3 * config.patch**2)
        self.decoder = build_layers(config.decoder, config.latent_channels)
        for name in ("latent_mean", "latent_std"):
            values = torch.tensor(getattr(config, name), dtype=torch.get_default_dtype())
            self.register_buffer(name, values.expand(config.latent_channels).clone())
        self.time_scale = nn.Parameter(torch.tensor(1000.0)) if config.timed else None
        head = self.encoder[-1] if config.encoder else None
        if isinstance(head, CausalConv3d) and head.conv.bias is not None and config.posterior != "point":
            with torch.no_grad():  # log-variance starts at -6: louder posterior noise would drown the signal early on
                head.conv.weight[config.latent_channels :] *= 0.1
                head.conv.bias[config.latent_channels :] = -6.0
        self.to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]

    def encode(self, clip: Float[Tensor, "B C T H W"], *, memory: int | str | None = None) -> Posterior:
        """Encode a whole clip of colours in [-1, 1], at once or within a budget, as `decode` does.

        Raises:
            ConfigError: T is not 1 + f k, a side is not a multiple of the stride, the type or the device are not the
                network's, or nothing fits in the memory.
        """
        self._check_clip(clip)
        channels, *extent = self.config.latent_shape(*clip.shape[2:])
        if memory is None:
            return self._encode(clip, None)[0]
        plan = self.plan_encode(clip.shape, memory)
        _tell(plan, extent, "encoding", clip)
        moments = collect(self.way("encoder"), clip, plan, (len(clip), 2 * channels, *extent))
        return Posterior(*moments.split(channels, dim=1))

    def decode(
        self,
        latents: Float[Tensor, "B c t h w"],
        *,
        t: float | Float[Tensor, " _"] | None = None,
        generator: torch.Generator | None = None,
        memory: int | str | None = None,
    ) -> Float[Tensor, "B 3 T H W"]:
        """Decode latents to pixels (about [-1, 1], not clamped), with T = 1 + f (t - 1).

        A decoder that is told the time (`VAEConfig.timed`) also takes latents that are noisy a little: as noisy as at `t`,
        which is 1, clean, unless said. The generator is of the noise that some decoders add.

        Within a budget of `memory`, in bytes or such as "4GiB", beside the weights and the latents, it goes by
        `plan_decode`, without gradients, and logs how; a warning if the result is an approximation.

        Raises:
            ConfigError: the latents have another number of channels, are empty or are not finite, or of a type or on a
                device that are not the network's; the decoder is told no time, or `t` is not one for each clip; or nothing
                fits in the memory.
        """
        self._check_latents(latents)
        given = Given(self._decoder_time(latents, t), generator=generator)
        if memory is None:
            return self._decode(latents, None, given)[0]
        plan = self.plan_decode(latents.shape, memory)
        _tell(plan, latents.shape[2:], "decoding", latents)
        return collect(self.way("decoder", given), latents, plan, self._clip_shape(latents.shape))

    def plan_encode(self, shape: Sequence[int], memory: int | str) -> Budgeted:
        """Choose how to encode a clip of a shape, B 3 T H W, within a memory; see `plan_decode`."""
        extent = self.config.latent_shape(*shape[2:])[1:]
        return self._plan("encoder", shape, extent, memory, collected=True)

    def plan_decode(self, shape: Sequence[int], memory: int | str, *, collected: bool = True) -> Budgeted:
        """Choose how to decode latents of a shape, B C t h w, within a memory, beside the weights and the latents.

        The whole clip if it fits, else as many latents at a time as do, else tiles too. Not `collected`, frames are gone
        when the next ones are made (`decode_parts`), but for those of tiles. Peaks are a CPU's, without gradients.

        Raises:
            ConfigError: nothing fits; says what would.
        """
        return self._plan("decoder", shape, (shape[2], shape[3], shape[4]), memory, collected=collected)

    def decode_parts(
        self, latents: Float[Tensor, "B c t h w"], plan: Budgeted, *, t: float | None = None
    ) -> Iterator[Float[Tensor, "B 3 _ H W"]]:
        """Decode latents by a plan, without gradients: each chunk's frames as soon as they exist, those of tiles at the end.

        Raises:
            ConfigError: as `decode`, or the plan is for latents of another size or another autoencoder.
        """
        self._check_latents(latents)
        way = self.way("decoder", Given(self._decoder_time(latents, t)))
        length, *sides = latents.shape[2:]
        if plan.chunk < length and not way.streams and way.window is None:
            raise ConfigError(f"{self.config.obstacles[-1]}, so a plan of {plan.chunk} latents at a time is not for it")
        if plan.tile == tuple(sides):
            return chunks(way, latents, [*range(0, length, plan.chunk), length])
        return iter([collect(way, latents, plan, self._clip_shape(latents.shape))])

    def encode_chunk(
        self, frames: Float[Tensor, "B C T H W"], state: EncoderState | None = None
    ) -> tuple[Posterior | None, EncoderState]:
        """Encode the next frames of a stream, any number of them; `state` None begins one.

        Returns the posterior of the latents that became complete (None when none did) and the state to pass with the
        next frames. A stream of 1 + f k frames ends with nothing pending.

        Raises:
            ConfigError: a side is not a multiple of the stride, the state is of another stream, or a layer needs the
                whole clip (`VAEConfig.obstacles`).
        """
        self._check_streams("encoder")
        self._check_clip(frames)
        self.config.latent_shape(1, *frames.shape[3:])
        layers, pending = state if state is not None else (START, None)
        if pending is not None:
            if pending.shape[:2] + pending.shape[3:] != frames.shape[:2] + frames.shape[3:]:
                raise ConfigError(
                    f"the state is of frames {tuple(pending.shape)}, B C T H W, and these are {tuple(frames.shape)}; "
                    f"continue a stream as it began"
                )
            frames = torch.cat([pending, frames], dim=2)
        time = self.config.temporal_stride
        head = 0 if layers else 1
        ready = head + (frames.shape[2] - head) // time * time if frames.shape[2] >= head else 0
        now, later = frames[:, :, :ready], frames[:, :, ready:].clone()
        if ready == 0:
            return None, EncoderState(layers, later)
        posterior, layers = self._encode(now, layers)
        return posterior, EncoderState(layers, later if later.shape[2] else None)

    def decode_chunk(
        self, latents: Float[Tensor, "B c t h w"], state: State = START, *, t: float | Float[Tensor, " _"] | None = None
    ) -> tuple[Float[Tensor, "B 3 T H W"], State]:
        """Decode the next latents of a stream; returns their frames and the state to pass with the next ones.

        Raises:
            ConfigError: as `decode`, or the state is of another stream, or a layer needs the whole clip.
        """
        self._check_latents(latents)
        if state is not None:
            self._check_streams("decoder")
        return self._decode(latents, state, Given(self._decoder_time(latents, t)))

    def stream_decode(self, chunks: Iterable[Float[Tensor, "B c _ h w"]]) -> Iterator[Float[Tensor, "B 3 T H W"]]:
        """Decode latents as they come, at memory that does not grow with the clip.

        A decoder that looks ahead a finite way gives its frames as many latents later, and does some work twice.

        Raises:
            ConfigError: as `decode`, or a layer needs the whole clip.
        """
        way = self.way("decoder")
        if way.streams or way.window is None:
            state: State = START
            for latents in chunks:
                state = owned(state)  # no name holds what is used up
                frames, state = self.decode_chunk(latents, state)
                yield frames
            return
        (before, after), kept, start, done = way.window, None, 0, 0
        for latents in chunks:
            self._check_latents(latents)
            kept = latents if kept is None else torch.cat([kept, latents], dim=2)
            if (ready := start + kept.shape[2] - after) > done:
                yield window(way, kept, done, ready, start)
                done = ready
                gone = max(0, done - before - start)
                kept, start = kept[:, :, gone:], start + gone
        if kept is not None:
            yield window(way, kept, done, start + kept.shape[2], start)

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

    def _clip_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        return shape[0], 3, *self.config.clip_shape(*shape[2:])

    def way(self, name: Coder, given: Given = Given()) -> Way:
        """Return a way through that `reelflow.models.parts` goes."""
        config, decodes = self.config, name == "decoder"
        layers = config.decoder if decodes else config.encoder

        def step(x: Tensor, state: State) -> tuple[Tensor, State]:
            if decodes:
                return self._decode(x, state, given)
            moments, state = self._encode(x, state)
            return torch.cat(moments, dim=1), state

        return Way(
            step,
            to="pixels" if decodes else "latents",
            time=config.temporal_stride,
            space=config.spatial_stride,
            streams=not obstacles(layers, name),
            window=reach(layers, "time", "decode") if decodes and config.pieces is None else None,
            sees=reach(layers, "space", "decode" if decodes else "encode"),
        )

    def _plan(
        self, name: Coder, shape: Sequence[int], extent: tuple[int, int, int], memory: int | str, *, collected: bool
    ) -> Budgeted:
        way = self.way(name)

        def peak(chunk: int, tile: tuple[int, int]) -> int:
            return _peak(self.config, self.latent_std.dtype, name, tuple(shape), extent, chunk, tile, collected)

        return choose(peak, extent, in_bytes(memory), chunks=way.streams or way.window is not None, sees=way.sees)

    def _encode(self, clip: Tensor, state: State) -> tuple[Posterior, State]:
        p = self.config.patch
        x = rearrange(clip, "B C T (H h) (W w) -> B (C h w) T H W", h=p, w=p)
        x, state = self._through(self.encoder, x, state)
        mean, logvar = x[:, : self.config.latent_channels], x[:, self.config.latent_channels :]
        if self.config.posterior == "point" or not self.encoder:
            logvar = torch.full_like(mean, -30)
        logvar = logvar.expand_as(mean)
        std = self._per_channel(self.latent_std)
        mean = (mean - self._per_channel(self.latent_mean)) / std
        return Posterior(mean, logvar.clamp(-30, 20) - 2 * std.log()), state

    def _decoder_time(self, latents: Tensor, t: float | Tensor | None) -> Tensor | None:
        if self.time_scale is None:
            if t is not None:
                raise ConfigError("this decoder is told no time; leave t out")
            return None
        wide = torch.promote_types(latents.dtype, torch.float32)
        noisy = torch.as_tensor(0.0 if t is None else 1 - t, dtype=wide, device=latents.device)
        if noisy.ndim and noisy.shape != latents.shape[:1]:
            raise ConfigError(f"t is a number or one for each of {latents.shape[0]} clips, got {tuple(noisy.shape)}")
        return noisy.expand(latents.shape[0]) * self.time_scale.to(wide)

    def _decode(self, latents: Tensor, state: State, given: Given) -> tuple[Tensor, State]:
        x = latents * self._per_channel(self.latent_std) + self._per_channel(self.latent_mean)
        x, state = self._through(self.decoder, x, state, given)
        p = self.config.patch
        return rearrange(x, "B (C h w) T H W -> B C T (H h) (W w)", h=p, w=p), state

    def _through(self, layers: CausalSequence, x: Tensor, state: State, given: Given = Given()) -> tuple[Tensor, State]:
        """Pass x through the layers, in pieces if it is a whole clip and they were trained so."""
        x = x.contiguous(memory_format=torch.channels_last_3d)
        pieces = self.config.pieces
        if pieces is None or state is not None:
            return layers(x, state, given._replace(latents=x))
        size = pieces.frames if layers is self.encoder else pieces.latents
        if pieces.knows == "nothing":
            parts = [layers(part, None, given._replace(latents=part))[0] for part in x.split(size, dim=2)]
            return torch.cat(parts, dim=2), None
        lengths = [size + x.shape[2] % size, *(x.shape[2] // size - 1) * [size]] if x.shape[2] > size else [x.shape[2]]
        parts, state = [], START
        for part in x.split(lengths, dim=2):
            y, state = layers(part, state, given._replace(latents=part))
            parts.append(y)
        return torch.cat(parts, dim=2), None

    def _check_clip(self, clip: Tensor) -> None:
        if clip.shape[1] != 3 or not clip.shape[0]:
            raise ConfigError(f"a clip is B 3 T H W with B >= 1, got {tuple(clip.shape)}")
        self._check_type(clip)

    def _check_latents(self, latents: Tensor) -> None:
        channels = self.config.latent_channels
        if latents.shape[1] != channels:
            raise ConfigError(f"the VAE has {channels} latent channels, got {latents.shape[1]}")
        if not latents.numel():
            raise ConfigError(f"there is nothing to decode in latents of shape {tuple(latents.shape)}, B C T H W")
        self._check_type(latents)
        looked_at = not (latents.requires_grad or latents.is_meta or torch.compiler.is_compiling())
        if looked_at and not bool(latents.isfinite().all()):
            raise ConfigError("latents must be finite, got NaN or infinity; the denoiser that made them overflowed")

    def _check_type(self, x: Tensor) -> None:
        own = self.latent_std
        if x.device != own.device:
            raise ConfigError(
                f"the autoencoder is on {own.device} and was given a tensor on {x.device}; move one of them"
            )
        if x.dtype != own.dtype and not torch.is_autocast_enabled(x.device.type):
            raise ConfigError(f"the autoencoder is of {own.dtype} and was given {x.dtype}; cast one of them")

    def _check_streams(self, name: Coder) -> None:
        if found := obstacles(getattr(self.config, name), name):
            whole = {"encoder": "encode", "decoder": "decode"}[name]
            raise ConfigError(f"{found[0]}, so chunks would not give the whole clip's result; use {whole}()")

    def _per_channel(self, statistic: Tensor) -> Tensor:
        return statistic.view(1, -1, 1, 1, 1)


def _tell(plan: Budgeted, extent: Sequence[int], doing: str, x: Tensor) -> None:
    """Log a plan, after refusing inputs that want gradients."""
    if x.requires_grad:
        raise ConfigError(f"{doing} within a budget of memory leaves no gradients; pass detached tensors, or no memory")
    parts = [] if plan.chunk == extent[0] else [f"{plan.chunk} of {extent[0]} latents at a time"]
    if plan.tile != tuple(extent[1:]):
        parts.append(f"tiles of {plan.tile[0]} x {plan.tile[1]} latents that overlap by {plan.overlap}")
    said = f"{doing} {' in '.join(parts) or 'the whole clip'}, peak {readable(plan.peak)}"
    if plan.exact:
        LOG.info("%s", said)
    else:
        LOG.warning("%s; blended where they overlap, an approximation: the whole clip does not fit", said)


@lru_cache(maxsize=4)
def _twin(config: VAEConfig, dtype: torch.dtype) -> "CausalVAE":
    with torch.device("meta"):
        return CausalVAE(config).to(dtype)


@lru_cache(maxsize=1024)
def _peak(
    config: VAEConfig,
    dtype: torch.dtype,
    name: Coder,
    shape: tuple[int, ...],
    extent: tuple[int, int, int],
    chunk: int,
    tile: tuple[int, int],
    collected: bool,
) -> int:
    """Return the peak of a plan's parts, and of its result, beside the weights and what is given."""
    twin, decodes = _twin(config, dtype), name == "decoder"
    B, t, pixels = shape[0], extent[0], config.spatial_stride

    def weigh(cuts: Sequence[int], length: int) -> int:
        clip = (
            shape[2] if length == t else 1 + config.temporal_stride * (length - 1),
            tile[0] * pixels,
            tile[1] * pixels,
        )
        size = (B, config.latent_channels, length, *tile) if decodes else (B, 3, *clip)

        def run() -> None:
            x = torch.empty(size, dtype=dtype)
            way = twin.way(name, Given(twin._decoder_time(x, None)) if decodes else Given())
            for part in chunks(way, x, cuts):
                del part

        return peak_bytes(twin, run) - prod(size) * dtype.itemsize

    way = twin.way(name)
    if chunk >= t:
        found = weigh([0, t], t)
    elif way.streams:
        n = min(chunk, t - 1)
        found = weigh([0, 1, 1 + n], 1 + n)
        if grows(config.decoder if decodes else config.encoder) and t > n + 1:
            found += (weigh([0, 2, 2 + n], 2 + n) - found) * (t - 1 - n)
    else:
        assert way.window is not None
        length = min(t, chunk + sum(way.window))
        found = weigh([0, length], length)
    whole = chunk >= t and tile == extent[1:]
    if whole or not (collected or tile != extent[1:]):
        return found
    result = twin._clip_shape((B, 0, *extent)) if decodes else (B, 2 * config.latent_channels, *extent)
    return found + prod(result) * dtype.itemsize


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


def staged(
    latent_channels: int,
    encoder: tuple[Stage, ...],
    decoder: tuple[Stage, ...],
    *,
    patch: int = 1,
    conv: Literal["full", "factorised"] = "full",
    resample_kernel: Literal[1, 3] = 3,
    mid_attention: Literal["none", "frame"] = "none",
    time_padding: TimePadding = "first",
) -> VAEConfig:
    """Return the default design: stages of residual blocks, and shuffles with shortcuts between them.

    Going down, a convolution is folded by cells into channels, beside the means of the folded input (Chen et al. 2024,
    DC-AE, sec. 3.2); going up, unfolded, beside copies of the input. Blocks convolve 3 x 3 x 3 twice, or ("factorised")
    1 x 3 x 3, then 3 x 1 x 1.

    Raises:
        ConfigError: encoder and decoder disagree about the compression, or widths do not divide.
    """
    if latent_channels < 1 or patch < 1 or bool(encoder) != bool(decoder):
        raise ConfigError("a VAE needs latent_channels >= 1, patch >= 1, and stages in encoder and decoder")
    if not encoder:
        return VAEConfig(latent_channels, (), (), patch=patch)
    for axis in ("space", "time"):
        _check_strides(axis, *(prod(getattr(stage, axis) for stage in stages) for stages in (encoder, decoder)))
    pad = Padding(time_padding)
    kernels = ((3, 3), (3, 3)) if conv == "full" else ((1, 3), (3, 1))
    resample = (resample_kernel, resample_kernel)
    middle: tuple[Layer, ...] = (Attention(),) if mid_attention == "frame" else ()

    def blocks(channels: int, count: int) -> list[Layer]:
        return [Res(channels, kernels=kernels, pad=pad) for _ in range(count)]

    down: list[Layer] = [Conv(encoder[0].channels, pad=pad)]
    for stage, after in zip(encoder, encoder[1:] + encoder[-1:], strict=True):
        down += blocks(stage.channels, stage.num_blocks)
        if (cells := stage.space**2 * stage.time) > 1:
            _check_resampler(stage.channels, after.channels, cells)
            fold = Fold(stage.space, stage.time)
            layers = (Conv(after.channels // cells, resample, pad=pad), fold)
            down.append(Skip(layers, (replace(fold, channels=after.channels),)))
        elif after.channels != stage.channels:
            down += blocks(after.channels, 1)
    down += [*middle, Act(), Conv(2 * latent_channels, pad=pad)]

    up: list[Layer] = [Conv(decoder[0].channels, pad=pad), *middle]
    for before, stage in zip(decoder[:1] + decoder[:-1], decoder, strict=True):
        if (cells := stage.space**2 * stage.time) > 1:
            _check_resampler(stage.channels, before.channels, cells)
            unfold = Unfold(stage.space, stage.time)
            through = (Conv(stage.channels * cells, resample, pad=pad), unfold)
            up.append(Skip(through, (replace(unfold, channels=stage.channels),)))
        elif before.channels != stage.channels:
            up += blocks(stage.channels, 1)
        up += blocks(stage.channels, stage.num_blocks)
    up += [Act(), Conv(3 * patch**2, pad=pad)]
    return VAEConfig(latent_channels, tuple(down), tuple(up), patch=patch)


def _check_strides(axis: str, down: int, up: int) -> None:
    if down != up:
        raise ConfigError(f"encoder divides {axis} by {down} but decoder multiplies it by {up}; make them equal")


def _check_resampler(fine: int, coarse: int, cells: int) -> None:
    fits = [cells * divisor for divisor in range(1, fine + 1) if fine % divisor == 0]
    if coarse not in fits:
        raise ConfigError(
            f"resampling {fine} -> {coarse} channels over cells of {cells}: the wide side ({coarse}) must be a multiple of "
            f"{cells} and divide {fine * cells}; nearest: {min(fits, key=lambda width: abs(width - coarse))}"
        )
