"""A linear map. On a CPU, in float32 and without gradients, oneDNN computes it.

PyTorch asks MKL for these products. On an AMD processor with AVX-512 oneDNN's were measured to be 1.2 to 1.3 times as fast
for thousands of tokens, and 1.7 times for a hundred (docs/log.md).
"""

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, float32, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils.flop_counter import flop_registry, register_flop_formula

__all__ = ["Linear", "linear"]

PLAIN = (Tensor, nn.Parameter, FakeTensor)  # not a share of a tensor that is spread over processes


class Linear(nn.Linear):
    """`torch.nn.Linear`, by `linear`."""

    def forward(self, input: Float[Tensor, "*shape I"]) -> Float[Tensor, "*shape O"]:
        return linear(input, self.weight, self.bias)


def linear(
    x: Float[Tensor, "*shape I"], weight: Float[Tensor, "O I"], bias: Float[Tensor, " O"] | None = None
) -> Float[Tensor, "*shape O"]:
    """Return x weight^T + bias."""
    if (
        x.device.type == "cpu"
        and x.dtype == weight.dtype == float32
        and type(x) in PLAIN
        and type(weight) in PLAIN
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
        and x.numel()
        and (product := _onednn()) is not None
    ):
        y: Tensor = product(x, weight, bias, "none", [], "")
        return y
    return F.linear(x, weight, bias)


@cache
def _onednn() -> Any:
    """Return oneDNN's linear map, where PyTorch has it and would ask MKL."""
    if not (torch.backends.mkldnn.is_available() and torch.backends.mkl.is_available()):
        return None
    product = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
    if product is not None and product not in flop_registry:  # so that PyTorch's counter counts it

        @register_flop_formula(product)
        def flops(x: torch.Size, weight: torch.Size, *_: Any, **__: Any) -> int:
            return 2 * x.numel() * weight[0]

    return product
