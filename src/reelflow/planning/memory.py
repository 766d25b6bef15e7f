"""How much memory a transformer's activations take, found by walking it (`reelflow.models.weighing`)."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call

from reelflow.models.blocks import BranchesBlock, DualBlock, Layer, SelfAttention
from reelflow.models.condition import Condition, Source
from reelflow.models.context import Sources
from reelflow.models.dit import DiTConfig, VideoDiT
from reelflow.models.weighing import Weighing
from reelflow.nn.patchify import token_grid

__all__ = ["DiTMemory", "dit_memory", "example", "repeats"]


@dataclass(frozen=True)
class DiTMemory:
    """Bytes, of one clip: the weights, and the most that is alive beside them at once."""

    weights: int
    inference: int  # activations of a forward without gradients
    training: int  # of a forward and a backward, the gradients of the weights among them
    keys_values: int  # of the clip's tokens in all layers: what a cache would hold


def example(
    config: DiTConfig,
    latent_shape: tuple[int, int, int],
    context_tokens: int | Sequence[int],
    *,
    image_tokens: int = 0,
    batch: int = 1,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> tuple[torch.Tensor, torch.Tensor, Condition]:
    """Return latents, times and a condition of ones, through every door that a network has."""
    lengths = [context_tokens] if isinstance(context_tokens, int) else list(context_tokens)
    layers = config.context.sources if isinstance(config.context, Sources) else (config.context,)

    def ones(*shape: int) -> torch.Tensor:
        return torch.ones(batch, *shape, dtype=dtype, device=device)

    sources = [Source(ones(n, each.in_dim)) for n, each in zip(lengths, layers, strict=True) if each is not None]
    condition = Condition(
        context=sources[0].tokens if sources else None,
        vector=ones(config.vector_dim) if config.vector_dim else None,
        numbers=ones(len(config.numbers)) if config.numbers else None,
        label=torch.zeros(batch, dtype=torch.long, device=device) if config.num_classes else None,
        image=ones(image_tokens, config.image.in_dim) if config.image else None,
        channels=ones(config.extra_channels, *latent_shape) if config.extra_channels else None,
        further=tuple(sources[1:]) or None,
    )
    return ones(config.in_channels, *latent_shape), 0.5 * torch.ones(batch, device=device), condition


def dit_memory(
    config: DiTConfig,
    latent_shape: tuple[int, int, int],
    context_tokens: int | Sequence[int],
    *,
    image_tokens: int = 0,
    batch: int = 1,
    dtype: torch.dtype = torch.bfloat16,
) -> DiTMemory:
    """Weigh a transformer and what it computes of `batch` clips with latents of extents (t, h, w), all in one dtype.

    Raises:
        ConfigError: the extents do not fit the patch or a pattern of attention.
    """
    tokens = token_grid(latent_shape, config.patch).num_tokens
    with torch.device("meta"):
        model = VideoDiT(config).to(dtype)

    def peaks(layers: Sequence[Layer]) -> tuple[int, int]:
        inputs = (latent_shape, context_tokens, image_tokens, batch, dtype)
        return _peaks(replace(config, layers=tuple(layers)), *inputs)

    # A block like the two before it adds nothing to a forward, and to a backward what the last one added.
    runs = repeats(config.layers)
    inference, training = peaks([layer for unit, count in runs for layer in min(count, 2) * unit])
    total = training
    for index, (_, count) in enumerate(runs):
        if count > 2:
            lengths = [3 if i == index else min(n, 2) for i, (_, n) in enumerate(runs)]
            longer = peaks([layer for (unit, _), n in zip(runs, lengths, strict=True) for layer in n * unit])
            total += (count - 2) * (longer[1] - training)
    return DiTMemory(
        weights=sum(parameter.nbytes for parameter in model.parameters()),
        inference=inference,
        training=total,
        keys_values=2 * _layers_of_attention(model) * batch * tokens * config.dim * dtype.itemsize,
    )


def repeats(layers: Sequence[Layer]) -> list[tuple[tuple[Layer, ...], int]]:
    """Cut a list of layers into units, each with how often it comes in a row."""
    runs: list[tuple[tuple[Layer, ...], int]] = []
    start = 0
    while start < len(layers):
        best: tuple[tuple[Layer, ...], int] = ((layers[start],), 1)
        for period in range(1, 1 + (len(layers) - start) // 2):
            unit, count = tuple(layers[start : start + period]), 1
            while tuple(layers[start + count * period : start + (count + 1) * period]) == unit:
                count += 1
            if count > 1 and count * period > best[1] * len(best[0]):
                best = (unit, count)
        runs.append(best)
        start += best[1] * len(best[0])
    return runs


def _peaks(
    config: DiTConfig,
    latent_shape: tuple[int, int, int],
    context_tokens: int | Sequence[int],
    image_tokens: int,
    batch: int,
    dtype: torch.dtype,
) -> tuple[int, int]:
    """Return the peaks of a forward, and of a forward and a backward, beside the weights."""
    with torch.device("meta"):
        model = VideoDiT(config).to(dtype)
    with FakeTensorMode():  # unlike the meta device it chooses the kernels of attention that a CPU would
        parts = dict(model.named_buffers()) | dict(model.named_parameters())
        weights = {
            name: torch.empty(part.shape, dtype=part.dtype, requires_grad=part.requires_grad)
            for name, part in parts.items()
        }
        inputs = example(config, latent_shape, context_tokens, image_tokens=image_tokens, batch=batch, dtype=dtype)
        rate = {"token_rate": 1.0}  # for positions in seconds; others take no notice
        with torch.no_grad(), Weighing() as inference:
            functional_call(model, weights, inputs, rate)
        with Weighing() as training:
            functional_call(model, weights, inputs, rate).float().square().mean().backward()
    return inference.peak, training.peak


def _layers_of_attention(model: VideoDiT) -> int:
    return sum(
        sum(isinstance(branch.function, SelfAttention) for branch in block.branches)
        if isinstance(block, BranchesBlock)
        else 1 + (isinstance(block, DualBlock) and block.again is not None)
        for block in model.blocks
    )
