"""Heads and MLP channels of every block, dealt to the ranks of a group; tokens are on every rank.

    tokens --> [ rows of q, k, v of my heads ] --> attention of my heads --> [ my columns of out ] --+
           --> [ rows of up, my channels     ] --> activation            --> [ my columns of down ] -+--> sum over ranks

(Shoeybi et al. 2019, Megatron-LM, sec. 3.) A matrix whose rows, or columns, are several parts side by side ([q | k | v],
[gate | value], [attention | MLP]) has each part dealt, so its rows are reordered first: a rank's are then one run, which
DTensor's own styles cut. Row orders commute with every elementwise optimiser and with Muon. `cut_of` says which row is
which, and is a function of the model and the number of ranks alone, so checkpoints are written as if nothing were cut.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from reelflow.errors import ConfigError
from reelflow.models.blocks import (
    Branches,
    CrossAttention,
    Dual,
    DualStream,
    Projection,
    Read,
    SelfAttention,
    SingleBlock,
)
from reelflow.models.dit import DiTConfig, VideoDiT
from reelflow.nn.mlp import Mlp, inner_width
from reelflow.nn.norm import RMSNorm
from reelflow.nn.patterns import Gated

__all__ = ["Cut", "check_tensor", "cut_of", "deal_heads"]


@dataclass(frozen=True)
class Cut:
    """How one weight is dealt: along `dim`, rank r of T has the r-th of T equal runs of `order`."""

    dim: int
    order: Int[Tensor, " rows"]  # of the whole weight


@dataclass(frozen=True)
class _Linear:
    """A linear map that is dealt, by its rows or its columns, which are parts of these widths."""

    name: str
    by: str  # rows, columns
    parts: tuple[int, ...]


def check_tensor(config: DiTConfig, size: int) -> None:
    """Refuse networks that `deal_heads` cannot deal to `size` ranks.

    Raises:
        ConfigError: heads or MLP channels do not divide, or heads differ in what they are given: a gated pattern of
            attention, learned frequencies, or frequencies over the width.
    """
    if size == 1:
        return
    if config.num_heads % size:
        near = max(n for n in range(1, size + 1) if config.num_heads % n == 0)
        raise ConfigError(f"tensor={size} does not divide {config.num_heads} heads; nearest: tensor={near}")
    if config.rope == "width" or config.frequencies == "learned":
        raise ConfigError(
            f"rope={config.rope!r} with {config.frequencies} frequencies differs from head to head, which tensor={size} "
            "does not deal; nearest: tensor=1"
        )
    for index, layer in enumerate(config.layers):
        attends = [getattr(branch, "pattern", None) for branch in layer.branches] if isinstance(layer, Branches) else []
        attends += [] if isinstance(layer, Branches) else [layer.attend]
        attends += [layer.again] if isinstance(layer, Dual) else []
        if any(isinstance(pattern, Gated) for pattern in attends):
            raise ConfigError(
                f"layers[{index}] mixes patterns by a gate, which tensor={size} does not deal; nearest: 1"
            )
    with torch.device("meta"):
        model = VideoDiT(config)
    for module_name, module in model.blocks.named_modules():
        for linear in _linears(module):
            for width in linear.parts:
                if width % size:
                    raise ConfigError(
                        f"blocks.{module_name}.{linear.name} has {width} channels, which tensor={size} does not divide"
                    )


def cut_of(model: VideoDiT, name: str, size: int) -> Cut | None:
    """Return how a weight of a model, whole or dealt already, is dealt to `size` ranks; none: each has all of it."""
    if size == 1 or not name.startswith("blocks."):
        return None
    path, kind = name.rsplit(".", 1)
    prefix, own = path.rsplit(".", 1)
    module = model.get_submodule(prefix)
    for linear in _linears(module):
        if linear.name == own and (linear.by == "rows" or kind == "weight"):
            return Cut(0 if linear.by == "rows" else 1, _order(linear.parts, size))
    if own in _norms(module) and _over_width(getattr(module, own), _head_width(model.config)):
        return Cut(0, torch.arange(model.config.dim))
    return None


@torch.no_grad()
def deal_heads(model: VideoDiT, mesh: DeviceMesh) -> None:
    """Leave each rank of a mesh of one dimension its heads and channels of every block, in place; rank 0's weights count.

    Raises:
        ConfigError: as `check_tensor`.
    """
    size = mesh.size()
    check_tensor(model.config, size)
    for name, weight in model.named_parameters():
        if (cut := cut_of(model, name, size)) is not None:
            weight.copy_(weight.index_select(cut.dim, cut.order.to(weight.device)))
    width = _head_width(model.config)
    for module in list(model.blocks.modules()):
        for linear in _linears(module):
            style: Any = ColwiseParallel() if linear.by == "rows" else RowwiseParallel()
            parallelize_module(getattr(module, linear.name), mesh, style)
        for name in _norms(module):
            norm = getattr(module, name)
            dealt = _WidthNorm if _over_width(norm, width) else _HeadNorm
            setattr(module, name, dealt(norm, mesh))
        if isinstance(module, Projection | Read | CrossAttention):
            module.num_heads //= size


def _head_width(config: DiTConfig) -> int:
    return config.dim // config.num_heads


def _linears(module: nn.Module) -> Iterator[_Linear]:
    """Yield the maps of one module, without those of modules in it, that are dealt."""
    if isinstance(module, Projection):
        yield _Linear("qkv", "rows", 3 * (module.qkv.out_features // 3,))
    elif isinstance(module, Read):
        yield _Linear("kv", "rows", 2 * (module.kv.out_features // 2,))
    elif isinstance(module, Mlp):
        gates = inner_width(module.activation, 1)
        yield _Linear("up", "rows", gates * (module.up.out_features // gates,))
        yield _Linear("down", "columns", (module.down.in_features,))
    elif isinstance(module, SingleBlock):
        gates = inner_width(module.activation, 1)
        yield _Linear("up", "rows", gates * (module.up.out_features // gates,))
        width = module.project.qkv.in_features
        yield _Linear("out", "columns", (width, module.out.in_features - width))
    elif isinstance(module, DualStream | SelfAttention | CrossAttention):
        yield _Linear("out", "columns", (module.out.in_features,))
    if isinstance(module, CrossAttention):
        yield _Linear("query", "rows", (module.query.out_features,))


def _norms(module: nn.Module) -> list[str]:
    """Name the norms of queries and keys of one module."""
    if not isinstance(module, Projection | Read | CrossAttention):
        return []
    found = [name for name in ("norm_q", "norm_k") if hasattr(module, name)]
    return [name for name in found if not isinstance(getattr(module, name), nn.Identity)]


def _over_width(norm: Any, head_width: int) -> bool:
    if isinstance(norm, _WidthNorm | _HeadNorm):
        return isinstance(norm, _WidthNorm)
    return norm.normalized_shape != (head_width,)


def _order(parts: Sequence[int], size: int) -> Int[Tensor, " rows"]:
    """Return the rows of [a | b | ...] as [a0 b0 ... | a1 b1 ... | ...], a0 being what rank 0 has of a."""
    places = torch.arange(sum(parts)).split(list(parts))
    return torch.cat([run for runs in zip(*(part.chunk(size) for part in places), strict=True) for run in runs])


class _Shared(torch.autograd.Function):
    """What all ranks have, used by each in its own part of the work: its gradient is the sum of theirs."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        grad = grad.contiguous().clone()
        dist.all_reduce(grad, group=ctx.group)
        return grad, None


class _Sum(torch.autograd.Function):
    """The sum over ranks, used by each in its own part of the work."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        x = x.contiguous().clone()
        dist.all_reduce(x, group=group)
        return x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        grad = grad.contiguous().clone()
        dist.all_reduce(grad, group=ctx.group)
        return grad, None


class _HeadNorm(nn.Module):
    """A norm over each head, with weights that all heads of all ranks share."""

    def __init__(self, norm: RMSNorm | nn.LayerNorm, mesh: DeviceMesh) -> None:
        super().__init__()
        assert norm.eps is not None
        self.normalized_shape, self.eps, self.group = norm.normalized_shape, norm.eps, mesh.get_group()
        self.rms = isinstance(norm, RMSNorm)
        self.weight, self.bias = norm.weight, getattr(norm, "bias", None)

    def forward(self, x: Float[Tensor, "*shape d"]) -> Float[Tensor, "*shape d"]:
        weight, bias = (
            None if p is None else _Shared.apply(p, self.group).to(x.dtype) for p in (self.weight, self.bias)
        )
        if self.rms:
            return nn.functional.rms_norm(x, self.normalized_shape, weight, self.eps)
        return nn.functional.layer_norm(x, self.normalized_shape, weight, bias, self.eps)


class _WidthNorm(nn.Module):
    """A norm over all heads of all ranks; each rank has the weights of its own channels."""

    def __init__(self, norm: RMSNorm | nn.LayerNorm, mesh: DeviceMesh) -> None:
        super().__init__()
        assert norm.eps is not None
        (width,) = norm.normalized_shape
        self.width, self.normalized_shape = width, (width // mesh.size(),)
        self.eps, self.group, self.rms = norm.eps, mesh.get_group(), isinstance(norm, RMSNorm)
        bias = getattr(norm, "bias", None)
        self.weight, self.bias = (
            None if p is None else nn.Parameter(distribute_tensor(p.detach(), mesh, [Shard(0)]), p.requires_grad)
            for p in (norm.weight, bias)
        )

    def forward(self, x: Float[Tensor, "*shape D"]) -> Float[Tensor, "*shape D"]:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        if not self.rms:
            wide = wide - self._mean(wide)
        wide = wide * (self._mean(wide.square()) + self.eps).rsqrt()
        if self.weight is not None:
            wide = wide * _local(self.weight)
        if self.bias is not None:
            wide = wide + _local(self.bias)
        return wide.to(x.dtype)

    def _mean(self, x: Tensor) -> Tensor:
        return _Sum.apply(x.sum(-1, keepdim=True), self.group) / self.width


def _local(weight: Tensor) -> Tensor:
    return weight.to_local() if isinstance(weight, DTensor) else weight
