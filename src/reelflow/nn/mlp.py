"""The feed-forward half of a block, in its usual kinds."""

from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from reelflow.nn.linear import Linear

__all__ = ["Activation", "Mlp", "activate", "inner_width"]

Activation = Literal["gelu_tanh", "silu", "relu2", "geglu", "swiglu"]


def inner_width(activation: Activation, hidden: int) -> int:
    """Return how many channels `activate` needs to give `hidden`: twice as many for the gated kinds."""
    return 2 * hidden if activation in ("geglu", "swiglu") else hidden


def activate(x: Float[Tensor, "B N inner"], activation: Activation) -> Float[Tensor, "B N hidden"]:
    """Apply the nonlinearity; gated kinds (Shazeer 2020) read [gate, value].

    `relu2` is the squared ReLU (So et al. 2021): no tanh, so on a CPU a seventh of GELU's time (docs/log.md).
    """
    if activation == "gelu_tanh":
        return F.gelu(x, approximate="tanh")
    if activation == "silu":
        return F.silu(x)
    if activation == "relu2":
        return _SquaredReLU.apply(x)
    gate, value = x.chunk(2, dim=-1)
    return (F.gelu(gate, approximate="tanh") if activation == "geglu" else F.silu(gate)) * value


class _SquaredReLU(torch.autograd.Function):
    """relu(x)^2 and its derivative 2 relu(x), which keep one tensor and take one pass each."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        positive = x.clamp_min(0)
        ctx.save_for_backward(positive)
        return positive * positive

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (positive,) = ctx.saved_tensors
        return (grad * positive).mul_(2)


class Mlp(nn.Module):
    """Two linear maps around an activation."""

    def __init__(self, dim: int, hidden: int, *, activation: Activation, bias: bool = True) -> None:
        super().__init__()
        self.activation: Activation = activation
        self.up = Linear(dim, inner_width(activation, hidden), bias=bias)
        self.down = Linear(hidden, dim, bias=bias)

    def forward(self, x: Float[Tensor, "B N D"]) -> Float[Tensor, "B N D"]:
        return self.down(activate(self.up(x), self.activation))
