"""A finished model, made to work on a mesh of processes: techniques applied from outside, in one order.

    deal heads       each `tensor` rank its heads and MLP channels
    share tokens     each `sequence` rank its run of every clip's tokens
    recompute        keep less of the forward pass
    compile          each block by itself
    shard weights    each rank its rows of every weight, gathered block by block (FSDP2), replicas summing gradients (HSDP)

Names and shapes of weights stay as they were; on a mesh they are DTensors, of which each rank has a part.

**Gradients are sums.** Where the ranks of one step have different numbers of samples, a mean of their means is not the
mean over samples. So gradients are summed over ranks, and every rank scales its own mean loss by its share of all
samples, `loss_share`: what is minimised is then the mean over the samples of the global batch, as in one process. The
ranks of a sequence each compute the whole loss, and count in the same way.

**Precision.** The optimiser sees float32 weights, and gradients are summed in float32. With "bf16" the weights of blocks
are gathered and used in bfloat16, half the bytes, and no second copy of them outlives a block; that rounds the
weights of norms and the tables of blocks too, which autocast alone would not ("fp32"). All outside of blocks (time,
context, positions, frequencies, readout) stays float32. Either way the forward pass runs under autocast, as in one process.
"""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise, product
from math import prod
from typing import Literal

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor, Replicate

from reelflow.config import configuration
from reelflow.errors import CheckpointError, ConfigError
from reelflow.models.blocks import BranchesBlock
from reelflow.models.dit import DiTConfig, VideoDiT
from reelflow.parallel.mesh import DIMENSIONS, MeshConfig, Workers
from reelflow.parallel.recompute import Recompute, check_recompute, compile_blocks, recompute_blocks
from reelflow.parallel.sequence import shard_sequence
from reelflow.parallel.tensor import check_tensor, cut_of, deal_heads

__all__ = ["Box", "ParallelConfig", "boxes", "load_whole", "loss_share", "norms", "parallelize", "whole_state"]


@configuration
class ParallelConfig:
    """How a model is spread over processes, and what is kept of it between uses.

    Raises:
        ConfigError: `recompute` is an interval below 1.
    """

    mesh: MeshConfig = MeshConfig()
    recompute: Recompute = "none"
    compile: Literal["none", "blocks"] = "none"
    offload: Literal["none", "cpu"] = (
        "none"  # cpu: weights, gradients and optimiser in CPU memory, a block at a time here
    )
    precision: Literal["fp32", "bf16"] = "fp32"  # in which the weights of blocks are gathered and used

    def __post_init__(self) -> None:
        check_recompute(self.recompute)

    def check(self, config: DiTConfig, world_size: int) -> None:
        """Refuse what cannot work, before any process group starts.

        Raises:
            ConfigError: the mesh is not of `world_size` processes, or its tensor ranks cannot share this network.
        """
        self.mesh.check(world_size, [config.num_heads])
        check_tensor(config, self.mesh.tensor)


def parallelize(model: VideoDiT, workers: Workers, config: ParallelConfig) -> VideoDiT:
    """Spread a model over the mesh of `workers`, in place; every process has built the same one, on its device.

    Raises:
        ConfigError: the workers have another mesh, or other weights; the model cannot be dealt; or weights are offloaded
            without a process group.
    """
    if config.mesh != workers.config:
        raise ConfigError(f"the workers were started as {workers.config}, not as {config.mesh}")
    mesh, blocks = workers.mesh, list(model.blocks)
    if mesh is None and config.offload == "cpu":
        raise ConfigError("offloading needs a process group, even of one: torchrun --nproc-per-node 1")
    if mesh is not None:
        _check_alike(model, workers)
    if mesh is not None and config.mesh.tensor > 1:
        deal_heads(model, mesh["tensor"])
    if mesh is not None and config.mesh.sequence > 1:
        shard_sequence(model, mesh.get_group("sequence"))
    recompute_blocks(blocks, config.recompute)
    if config.compile == "blocks":
        compile_blocks(blocks)
    if mesh is not None:
        _shard_weights(model, workers, config)
    return model


def _check_alike(model: VideoDiT, workers: Workers) -> None:
    """Refuse models that were drawn differently: each rank would keep its part of its own."""
    own = torch.stack(torch._foreach_norm([parameter.detach() for parameter in model.parameters()]))
    if own.is_meta:
        return
    first = own.clone()
    dist.broadcast(first, src=0)
    other = ~torch.isclose(own, first, rtol=0, atol=0, equal_nan=True)
    if workers.agree(bool(other.any())):
        names = [name for (name, _), differs in zip(model.named_parameters(), other.tolist(), strict=True) if differs]
        found = f"here in {names[0]} first" if names else "elsewhere, not here"
        raise ConfigError(f"processes built different weights than rank 0 ({found}); give all of them the same seed")


def _shard_weights(model: VideoDiT, workers: Workers, config: ParallelConfig) -> None:
    assert workers.mesh is not None
    mesh = workers.mesh["shard"]
    if config.mesh.sequence > 1:  # the ranks of a sequence have weights in common, and need not each hold all
        mesh = workers.mesh["shard", "sequence"]._flatten("weights")
    if config.mesh.replicate > 1:
        mesh = DeviceMesh._concatenate([workers.mesh["replicate"], mesh])
    offload = CPUOffloadPolicy(pin_memory=workers.device.type == "cuda") if config.offload == "cpu" else OffloadPolicy()
    half = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
    wide = MixedPrecisionPolicy(cast_forward_inputs=False)
    for block in model.blocks:
        fully_shard(block, mesh=mesh, mp_policy=half if config.precision == "bf16" else wide, offload_policy=offload)
    # The root too gives its weights back after each use: those it kept would be old ones when averages are swapped in.
    fully_shard(model, mesh=mesh, mp_policy=wide, offload_policy=offload, reshard_after_forward=True)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # gloo knows no other
    for method in ("forward_packed", "prepare"):
        register_fsdp_forward_method(model, method)
    for block in model.blocks:
        if isinstance(block, BranchesBlock):
            register_fsdp_forward_method(block, "reads")
    # Blocks return views, which FSDP warns not to write to; nothing does.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view", UserWarning)


def loss_share(num_samples: int, workers: Workers) -> float:
    """Return what a rank's mean loss over its `num_samples` counts in the mean over all samples of a step.

    All ranks call it. Ranks of one sequence, or of one tensor group, report the samples that they have in common.

    Raises:
        ConfigError: no rank has a sample.
    """
    if workers.mesh is None:
        return 1.0
    total = workers.sum(torch.tensor(float(num_samples), dtype=torch.float64, device=workers.device))
    if not total:
        raise ConfigError("no process has a sample in this step")
    return num_samples / float(total)


def norms(tensors: Sequence[Tensor], workers: Workers) -> Float[Tensor, " tensors"]:
    """Return the Euclidean norm of each whole tensor, of which every rank gives its part, by one exchange.

    The norm of all together is the norm of this vector.
    """
    own = torch.stack(torch._foreach_norm([_local(tensor) for tensor in tensors]))
    if workers.mesh is None:
        return own
    shares = [1 / _copies(tensor, workers) for tensor in tensors]
    squares = own.square() * own.new_tensor(shares)
    dist.all_reduce(squares)
    return squares.sqrt()


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _copies(tensor: Tensor, workers: Workers) -> int:
    """Count the ranks that have the same part of a tensor."""
    if not isinstance(tensor, DTensor):
        return workers.world_size
    extents = zip(tensor.device_mesh.shape, tensor.placements, strict=True)
    return workers.world_size // prod(extent for extent, placement in extents if placement != Replicate())


@dataclass(frozen=True)
class Box:
    """A part of a whole tensor that this rank holds: its first index, and the values, which may be written to."""

    offset: tuple[int, ...]
    data: Tensor
    writes: bool  # of the ranks that hold the same part, one is to save it

    @property
    def place(self) -> tuple[slice, ...]:
        """Where in the whole tensor it stands."""
        return tuple(slice(a, a + n) for a, n in zip(self.offset, self.data.shape, strict=True))


def boxes(name: str, tensor: Tensor, model: VideoDiT, workers: Workers) -> list[Box]:
    """Return the parts that this rank holds of a weight, or of what is laid out like it (its gradient, average, moments).

    Places are those in the tensor of the model that was not parallelized. Over all ranks the boxes that are to be written
    cover every tensor once.
    """
    data = _local(tensor)
    if workers.mesh is None:
        return [Box((0,) * data.ndim, data, writes=True)]
    config, coordinate = workers.config, dict(zip(DIMENSIONS, _place(workers), strict=True))
    cut = cut_of(model, name, config.tensor)
    places = [torch.arange(n) for n in tensor.shape]
    if cut is not None:
        places[cut.dim] = cut.order.chunk(config.tensor)[coordinate["tensor"]]
    writes = coordinate["replicate"] == 0 and (cut is not None or coordinate["tensor"] == 0)
    if isinstance(tensor, DTensor):
        rows = places[0].chunk(config.shard * config.sequence)
        mine = coordinate["shard"] * config.sequence + coordinate["sequence"]
        places[0] = rows[mine] if mine < len(rows) else places[0][:0]
    else:
        writes = workers.is_first
    found = []
    for runs in product(*map(_runs, places)):
        window = data[tuple(slice(start, stop) for start, stop in runs)]
        offset = tuple(int(place[start]) for (start, _), place in zip(runs, places, strict=True))
        found.append(Box(offset, window, writes))
    return found


def _place(workers: Workers) -> list[int]:
    assert workers.mesh is not None
    found = workers.mesh.get_coordinate()
    assert found is not None
    return list(found)


def _runs(places: Tensor) -> list[tuple[int, int]]:
    """Cut indices into runs of consecutive ones, as (start, stop)."""
    if not len(places):
        return []
    breaks = (places.diff() != 1).nonzero().flatten() + 1
    return list(pairwise([0, *breaks.tolist(), len(places)]))


@torch.no_grad()
def whole_state(model: VideoDiT, workers: Workers) -> dict[str, Tensor]:
    """Return the state dict of the model as if it were not parallelized, in CPU memory of rank 0, and {} elsewhere.

    All ranks call it; one tensor at a time is whole on the others.
    """
    found = {}
    for name, tensor in model.state_dict().items():
        whole = torch.zeros(tensor.shape, dtype=tensor.dtype, device=workers.device)
        for box in boxes(name, tensor, model, workers):
            if box.writes:
                whole[box.place] = box.data
        if workers.mesh is not None:
            dist.reduce(whole.flatten().view(torch.uint8), dst=0)  # of bits, all zero but on one rank
        if workers.is_first:
            found[name] = whole.cpu()
    return found


@torch.no_grad()
def load_whole(model: VideoDiT, state: Mapping[str, Tensor], workers: Workers) -> None:
    """Take each rank's part from a state dict of the model that is not parallelized.

    Raises:
        CheckpointError: a tensor is missing or has another shape.
    """
    for name, tensor in model.state_dict().items():
        found = state.get(name)
        if found is None or found.shape != tensor.shape:
            shape = "nothing" if found is None else list(found.shape)
            raise CheckpointError(f"the weights hold {shape} for {name}, expected {list(tensor.shape)}")
        for box in boxes(name, tensor, model, workers):
            box.data.copy_(found[box.place])
