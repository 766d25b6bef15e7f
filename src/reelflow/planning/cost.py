"""What a model costs, counted from its configuration on the meta device: nothing is allocated.

FLOPs count a multiply-add as two and matrix products and convolutions only, as is usual. For the transformer, N video
and L context tokens, width D:

    attention    4 (N + L)^2 D        per block: scores, and weighted values
    matrices     2 tokens weights     of every linear map, for the tokens (or vectors) it is applied to

A training step costs three forwards: one, and two for the gradients of inputs and weights.
"""

from dataclasses import dataclass
from math import prod

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from reelflow.models.blocks import DualBlock
from reelflow.models.dit import DiTConfig, VideoDiT
from reelflow.models.vae import CausalVAE, VAEConfig
from reelflow.nn.modulation import Modulation
from reelflow.nn.patchify import token_grid

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
    return sum(parameter.numel() for parameter in model.parameters())


def count_flops(model: nn.Module, *inputs: object) -> int:
    """Count what a forward pass of a model on the meta device would compute."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(*inputs)
    return counter.get_total_flops()


def dit_cost(config: DiTConfig, latent_shape: tuple[int, int, int], context_tokens: int) -> DiTCost:
    """Cost of one forward of the transformer over latents of extents (t, h, w), by the formula above.

    Raises:
        ConfigError: the extents do not fit the patch.
    """
    with torch.device("meta"):
        model = VideoDiT(config)
    num_tokens = token_grid(latent_shape, config.patch).num_tokens
    joint = num_tokens + context_tokens
    matrices = num_tokens * (_weights(model.embed) + _weights(model.out))
    matrices += prod(latent_shape) * _weights(model.stem)
    matrices += _weights(model.time) + _weights(model.modulation)
    matrices += _weights(model.vector) + context_tokens * _weights(model.context)
    for block in model.blocks:
        modulation = sum(_weights(part) for part in block.modules() if isinstance(part, Modulation))
        if isinstance(block, DualBlock):
            for tokens, stream in ((num_tokens, block.video), (context_tokens, block.context)):
                matrices += tokens * (_weights(stream) - _weights(stream.modulation))
        else:
            matrices += joint * (_weights(block) - modulation)
        matrices += modulation
    return DiTCost(
        num_parameters=num_parameters(model),
        num_tokens=num_tokens,
        context_tokens=context_tokens,
        attention_flops=len(config.layers) * 4 * joint**2 * config.dim,
        matrix_flops=2 * matrices,
    )


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
    """Values in the matrices of a module."""
    return 0 if module is None else sum(p.numel() for p in module.parameters() if p.ndim >= 2)
