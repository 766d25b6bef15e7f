"""What a model costs, counted from its configuration on the meta device: nothing is allocated.

FLOPs count a multiply-add as two and matrix products and convolutions only, as is usual. For the transformer, of width
D, over N video and L context tokens:

    attention    4 D pairs            per attention: scores and weighted values, of the pairs of query and key that meet
                                      (`attended_pairs`): (N + L)^2 under full joint attention, N L from video to context
    matrices     2 tokens weights     of every linear map, for the tokens (or vectors) it is applied to

For the blocks these are exactly the operations that a forward of one clip with one t computes.

A training step costs three forwards: one, and two for the gradients of inputs and weights.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from reelflow.errors import ConfigError
from reelflow.models.blocks import (
    BranchesBlock,
    CrossAttention,
    DualBlock,
    ReadStream,
    SelfAttention,
    SingleBlock,
    TiedStream,
)
from reelflow.models.condition import Source
from reelflow.models.context import ContextSources, Sources
from reelflow.models.dit import DiTConfig, VideoDiT
from reelflow.models.vae import CausalVAE, VAEConfig
from reelflow.nn.patchify import Grid, token_grid
from reelflow.nn.patterns import attended_pairs

__all__ = ["DiTCost", "VAECost", "count_flops", "dit_cost", "num_parameters", "training_bytes", "vae_cost"]


@dataclass(frozen=True)
class DiTCost:
    """One forward pass of the transformer over one clip."""

    num_parameters: int
    num_tokens: int  # of the clip, without context
    context_tokens: int
    attention_flops: int
    matrix_flops: int

    @property
    def flops(self) -> int:
        return self.attention_flops + self.matrix_flops


@dataclass(frozen=True)
class VAECost:
    """One clip through the autoencoder."""

    num_parameters: int
    encode_flops: int
    decode_flops: int
    compression: float  # pixel values per latent value


def num_parameters(model: nn.Module) -> int:
    """Count the trained values of a model."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def count_flops(model: nn.Module, *inputs: object) -> int:
    """Count what a forward pass of a model on the meta device would compute."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(*inputs)
    return counter.get_total_flops()


def dit_cost(
    config: DiTConfig,
    latent_shape: tuple[int, int, int],
    context_tokens: int | Sequence[int],
    *,
    image_tokens: int = 0,
) -> DiTCost:
    """Cost of one forward of the transformer over latents of extents (t, h, w), by the formula above.

    A context of several sources has a number of tokens for each.

    Raises:
        ConfigError: the extents do not fit the patch, a pattern of attention does not fit the grid of tokens, or the
            context has another number of sources.
    """
    with torch.device("meta"):
        model = VideoDiT(config)
    lengths = [context_tokens] if isinstance(context_tokens, int) else list(context_tokens)
    context = config.context.sources if isinstance(config.context, Sources) else (config.context,)
    if len(lengths) != len(context):
        raise ConfigError(f"context_tokens takes one number for each of {len(context)} sources, got {context_tokens}")
    grid = token_grid(latent_shape, config.patch)
    matrices = grid.num_tokens * sum(map(_weights, (model.embed, model.extra, model.out)))
    matrices += prod(latent_shape) * _weights(model.stem)
    matrices += sum(map(_weights, (model.time, model.modulation, model.vector, model.numbers, model.shared)))
    matrices += image_tokens * _weights(model.image)
    pairs = 0
    for block in model.blocks:
        matrices += _block_matrices(block, grid.num_tokens, sum(lengths), image_tokens)
        pairs += _block_pairs(block, grid, sum(lengths), image_tokens)
    t = torch.empty(1, 1, device="meta")
    sources = [
        Source(torch.empty(1, length, 0 if source is None else source.in_dim, device="meta"))
        for source, length in zip(context, lengths, strict=True)
    ]
    front = 0
    if isinstance(model.context, ContextSources):
        front += count_flops(model.context, sources, t)
    elif model.context is not None:
        front += count_flops(model.context, *sources[0], t)
    if model.pool is not None:
        front += count_flops(model.pool, *sources[0])
    return DiTCost(
        num_parameters=num_parameters(model),
        num_tokens=grid.num_tokens,
        context_tokens=sum(lengths),
        attention_flops=4 * config.dim * pairs,
        matrix_flops=2 * matrices + front,
    )


def _block_matrices(block: nn.Module, n: int, length: int, image: int) -> int:
    """Multiply-adds of a block's linear maps over n video, `length` context and `image` picture tokens."""
    if isinstance(block, DualBlock):
        video, context, idle = block.video, block.context, getattr(block.context, "idle", None)
        used = video if isinstance(context, TiedStream) else context
        total = n * (_weights(video) - _weights(video.modulation) + _weights(block.again) + _weights(block.gate))
        total += length * (_weights(used) - _weights(used.modulation) - _weights(idle))
        return total + _weights(video.modulation) + _weights(context.modulation)
    if isinstance(block, SingleBlock):
        joint = _weights(block) - _weights(block.modulation) - _weights(block.gate)
        return (n + length) * joint + _weights(block.modulation) + n * _weights(block.gate)
    assert isinstance(block, BranchesBlock)
    crosses = [b.function for b in block.branches if isinstance(b.function, CrossAttention)]
    reads, images = sum(_weights(cross.read) for cross in crosses), sum(_weights(cross.image) for cross in crosses)
    own = _weights(block.branches) - reads - images
    return n * own + length * reads + image * images + _weights(block.modulation)


def _block_pairs(block: nn.Module, grid: Grid, length: int, image: int) -> int:
    """Pairs of query and key that meet in a block."""
    if isinstance(block, DualBlock):
        queries = not isinstance(block.context, ReadStream)
        again = 0 if block.again is None else attended_pairs(block.again.pattern, grid)
        return again + attended_pairs(block.spec.attend, grid, length, context_queries=queries)
    if isinstance(block, SingleBlock):
        return attended_pairs(block.pattern, grid, length)
    assert isinstance(block, BranchesBlock)
    pairs = 0
    for branch in block.branches:
        if isinstance(branch.function, SelfAttention):
            pairs += attended_pairs(branch.function.pattern, grid)
        elif isinstance(branch.function, CrossAttention):
            pairs += grid.num_tokens * (length + (image if branch.function.image is not None else 0))
    return pairs


def vae_cost(config: VAEConfig, num_frames: int, height: int, width: int) -> VAECost:
    """Cost of encoding and decoding one clip, counted by walking the network on the meta device.

    Raises:
        ConfigError: the clip does not fit the autoencoder.
    """
    shape = config.latent_shape(num_frames, height, width)
    with torch.device("meta"):
        vae = CausalVAE(config)
        clip, latents = torch.empty(1, 3, num_frames, height, width), torch.empty(1, *shape)
    return VAECost(
        num_parameters=num_parameters(vae),
        encode_flops=count_flops(_Call(vae.encode), clip),
        decode_flops=count_flops(_Call(vae.decode), latents),
        compression=clip.numel() / latents.numel(),
    )


def training_bytes(parameters: int) -> int:
    """Bytes a training run holds beside activations: weights, gradients, two moments and an average in float32."""
    return 5 * 4 * parameters


class _Call(nn.Module):
    """A method as a module, which is what the counter takes."""

    def __init__(self, method: object) -> None:
        super().__init__()
        self.method = method

    def forward(self, x: torch.Tensor) -> object:
        return self.method(x)  # type: ignore[operator]


def _weights(module: nn.Module | None) -> int:
    """Values in the matrices and kernels of a module."""
    parts = () if module is None else module.modules()
    return sum(part.weight.numel() for part in parts if isinstance(part, (nn.Linear, nn.Conv3d)))
