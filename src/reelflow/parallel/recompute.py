"""Blocks whose activations are computed again in the backward pass, and blocks that are compiled.

    none             everything is kept
    blocks           of each block only its input is kept: about 4/3 of the work
    an integer n     every n-th block so
    attention-kept   as "blocks", but what attention gives is kept: its work, quadratic in tokens, is done once

A block's `forward` is what is wrapped, not the block: names of weights stay, and hooks of others run around it.
"""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, Literal

import torch
from torch import nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    SelectiveCheckpointContext,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from reelflow.errors import ConfigError

__all__ = ["Recompute", "check_recompute", "compile_blocks", "recompute_blocks"]

Recompute = Literal["none", "blocks", "attention-kept"] | int

_ATTENTION = (
    "aten::_scaled_dot_product_flash_attention_for_cpu",
    "aten::_scaled_dot_product_flash_attention",
    "aten::_scaled_dot_product_efficient_attention",
    "aten::_scaled_dot_product_cudnn_attention",
    "aten::_scaled_dot_product_attention_math",
    "torch_attn::_varlen_attn",
)


def check_recompute(recompute: Recompute) -> None:
    """Refuse what names no blocks.

    Raises:
        ConfigError: an interval below 1.
    """
    if isinstance(recompute, int) and recompute < 1:
        raise ConfigError(f'recompute takes every n-th block, n at least 1, got {recompute}; for none, "none"')


def recompute_blocks(blocks: Iterable[nn.Module], recompute: Recompute) -> None:
    """Keep less of the forward pass of blocks; results and gradients stay the same, bit for bit.

    Raises:
        ConfigError: as `check_recompute`.
    """
    check_recompute(recompute)
    if recompute == "none":
        return
    # Blocks draw nothing, so there is no state of a generator to keep.
    again = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)
    if recompute == "attention-kept":
        again = partial(again, context_fn=partial(create_selective_checkpoint_contexts, _keep_attention))
    every = recompute if isinstance(recompute, int) else 1
    for index, block in enumerate(blocks):
        if index % every == 0:
            _wrap(block, lambda forward: partial(again, forward))


def compile_blocks(blocks: Iterable[nn.Module]) -> None:
    """Compile every block by itself, after `recompute_blocks`; blocks that are alike share what was compiled.

    The second shape compiles once more, for any grid and number of clips; then new grids do not. These compile again:
    patterns of attention that cut the grid, for every grid; times that differ within a clip, for each number of them; a
    single clip; and rows of clips (`forward_packed`), for every mix, so do not compile those.
    """
    for block in blocks:
        _wrap(block, lambda forward: torch.compile(forward, dynamic=True))


def _wrap(block: nn.Module, by: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    block.forward = by(block.forward)


def _keep_attention(context: SelectiveCheckpointContext, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    kept = getattr(op, "name", str)().split(".")[0] in _ATTENTION
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE
