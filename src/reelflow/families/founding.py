"""What the founding documents say of cost and structure, beside what is true; every number on the true side is computed.

They count latent frames as frames / 4 and latent sides as pixels / 8. A causal autoencoder keeps frame 0 alone, so T =
1 + 4 k frames become 1 + k, and a side must be a multiple of 16 (8 of the autoencoder, 2 of the patch).
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from reelflow.errors import ConfigError
from reelflow.families.vdit import MEDIUM, SMALL, asymmetric, autoencoder, class_conditional
from reelflow.models.blocks import DualBlock
from reelflow.models.dit import VideoDiT
from reelflow.models.vae import Stage, VAEConfig, staged
from reelflow.nn.patchify import Grid, Patch, token_grid
from reelflow.nn.patterns import Full, Space, Time, attended_pairs
from reelflow.planning.cost import dit_cost, num_parameters

__all__ = ["CLIPS", "ClipCost", "Correction", "clip_cost", "corrections"]

VAE, PATCH = autoencoder(latent_channels=4), Patch(1, 2, 2)


@dataclass(frozen=True)
class Correction:
    """A claim of the founding documents, and the truth."""

    claim: str
    truth: str


@dataclass(frozen=True)
class ClipCost:
    """The tokens of a clip of the founding documents, and of the nearest clip there is; attention is of the latter."""

    name: str
    counted: Grid  # by frames / 4 and pixels / 8
    clip: tuple[int, int, int]  # frames, height, width
    grid: Grid

    @property
    def full_pairs(self) -> int:
        """Pairs of query and key of full attention: (S T)^2."""
        return attended_pairs(Full(), self.grid)

    @property
    def factorised_pairs(self) -> int:
        """Pairs of attention in space and in time: T S^2 + S T^2."""
        return attended_pairs(Space(), self.grid) + attended_pairs(Time(), self.grid)


CLIPS = {  # frames, height, width; seconds at 24 fps
    "256 x 256, 16 frames": (16, 256, 256),
    "720p, 2 s": (48, 720, 1280),
    "1080p, 5 s": (120, 1080, 1920),
}


def clip_cost(name: str) -> ClipCost:
    """Count the tokens of one of `CLIPS`, as given and as it must be: one frame more, sides rounded up to 16."""
    num_frames, height, width = CLIPS[name]
    counted = Grid(num_frames // 4, -(-height // 16), -(-width // 16))
    clip = (num_frames + 1, -(-height // 16) * 16, -(-width // 16) * 16)
    return ClipCost(name, counted, clip, token_grid(VAE.latent_shape(*clip)[1:], PATCH))


def corrections() -> list[Correction]:
    """Return the founding documents' errors, each beside what a count or the published code says."""
    small, medium = (dit_cost(class_conditional(size).dit, (5, 32, 32), 0).num_parameters for size in (SMALL, MEDIUM))
    frame, clip = attended_pairs(Full(), Grid(1, 64, 64)), attended_pairs(Full(), Grid(16, 64, 64))
    twice, thrice = (_strided(space=2, stages=count) for count in (2, 3))
    cube = _strided(space=2, time=2, stages=3)
    short, long = (VAE.latent_shape(frames, 256, 256)[1] for frames in (17, 49))
    whole, of_17 = (
        3 * frames * 64 / (VAE.latent_channels * latents) for frames, latents in ((16, 4), (17, short))
    )  # a latent position is 8 x 8 pixels
    video, text = _stream_parameters()
    return [
        Correction(
            "two stride-2 stages take 256 to 32",
            f"two take it to {twice.latent_shape(1, 256, 256)[2]}, three to {thrice.latent_shape(1, 256, 256)[2]}; "
            f"time / {VAE.temporal_stride} takes {sum(stage.time == 2 for stage in VAE.encoder)}",
        ),
        Correction("(16 x 64 x 64)^2 = 16,777,216", f"{clip:,}; {frame:,} is (64 x 64)^2, one frame"),
        Correction(
            "768 wide, 12 deep, factorised, GEGLU 3072: about 400 M parameters",
            f"{medium / 1e6:.1f} M (512 wide, 8 deep: {small / 1e6:.1f} M)",
        ),
        Correction("2 weeks -> 3 days is 46 x", f"{14 / 3:.1f} x"),
        Correction(
            "three (2, 2, 2) strides are 4 x 8 x 8",
            f"{cube.temporal_stride} x {cube.spatial_stride} x {cube.spatial_stride}",
        ),
        Correction(
            "16 or 48 frames -> 4 or 12 latents",
            f"17 -> {short}, 49 -> {long}; of 16: {_refusal(partial(VAE.latent_shape, 16, 256, 256))}",
        ),
        Correction(
            "a 256 x 256 clip of 16 frames is (4, 4, 32, 32): 192 x fewer values",
            f"{whole:.0f} x if time were divided evenly; {of_17:.0f} x for the 17 frames of {short} latents",
        ),
        Correction(
            "1080p has latents 136 high",
            f"1080 / 8 = {1080 // 8}, odd: {_refusal(partial(class_conditional(SMALL).extents, 121, 1080, 1920))}",
        ),
        Correction(
            "LTX compresses 1 : 8192",
            f"{32 * 32 * 8:,} pixels per latent position of 128 channels: 1 : {3 * 32 * 32 * 8 // 128} in values",
        ),
        Correction(
            "Wan and CogVideoX attend in windows; Wan is an MM-DiT",
            "both attend to the whole clip; Wan reads text by cross-attention",
        ),
        Correction(
            "Mochi's video stream is 4 x as wide as its text's (3072 / 768) and splits space and time",
            f"{3072 // 1536} x (3072 / 1536), which is {(3072 // 1536) ** 2} x the weights of a map within the stream, and one "
            f"attention over all; a block of vdit-mm-medium, with that ratio, has {video / 1e6:.1f} M for video and "
            f"{text / 1e6:.1f} M for text, and the model that splits space and time is vdit-gated",
        ),
        Correction(
            "HunyuanVideo's autoencoder is causal",
            "its convolutions and attention are; its GroupNorm sees all of time",
        ),
        Correction(
            "rotary positions in two halves mirror HunyuanVideo's code",
            "its code interleaves pairs; the two differ by a permutation of channels",
        ),
    ]


def _strided(*, space: int, stages: int, time: int = 1) -> VAEConfig:
    down = stages * (Stage(64, 0, space=space, time=time),)
    return staged(VAE.latent_channels, down, down)


def _stream_parameters() -> tuple[int, int]:
    """Count the two halves of a block of the asymmetric model: its video's and its text's."""
    config = asymmetric(MEDIUM).dit
    with torch.device("meta"):
        block = VideoDiT(config).blocks[0]
    assert isinstance(block, DualBlock)
    return num_parameters(block.video), num_parameters(block.context)


def _refusal(call: Callable[[], object]) -> str:
    """Return what an impossible call is answered."""
    try:
        call()
    except ConfigError as error:
        return str(error)
    raise AssertionError("expected a refusal")
