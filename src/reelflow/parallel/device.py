"""Which device a process computes on, and the way there.

No recipe names a device, so a run that was begun on one may go on on another. All that is random is drawn on the CPU, and
then copied: a run learns the same from the same noise wherever it is, but for how a device rounds. Whether it may round
products of float32 to TF32 is the caller's to say (`torch.set_float32_matmul_precision`), and whether it must always round
alike (`torch.use_deterministic_algorithms`); without the latter a run on an accelerator is resumed to rounding, not to the
last bit.
"""

import os

import torch
from torch import Tensor

from reelflow.errors import ConfigError

__all__ = ["moved", "take_device"]


def take_device(asked: str = "auto") -> torch.device:
    """Return a device, which becomes this process's current one: "cpu", "cuda", "cuda:1", or "auto".

    "auto" is the accelerator where there is one, else the CPU. Of several each process that torchrun started takes that of
    its LOCAL_RANK.

    Raises:
        ConfigError: there is no such device, or not one for each process; says which there are.
    """
    found = torch.accelerator.current_accelerator(check_available=True)
    # Times are computed in float64, which Apple's accelerator lacks.
    kind, count = (found.type, torch.accelerator.device_count()) if found and found.type != "mps" else ("", 0)
    there = ["cpu", *(f"{kind}:{index}" for index in range(count))]
    try:
        device = torch.device((kind or "cpu") if asked == "auto" else asked)
    except RuntimeError as error:
        raise ConfigError(f"{asked!r} names no device; there are {', '.join(there)}") from error
    if device.type == "cpu":
        return torch.device("cpu")
    rank, processes = (
        int(os.environ.get(name, default)) for name, default in (("LOCAL_RANK", 0), ("LOCAL_WORLD_SIZE", 1))
    )
    if device.type == kind and device.index is not None and processes > 1:
        raise ConfigError(f"each of {processes} processes needs a device of its own, not {asked}; nearest: {kind}")
    chosen = torch.device(device.type, rank if device.index is None else device.index)
    if str(chosen) not in there:
        near = f"torchrun --nproc-per-node {count}" if device.type == kind and processes > count else there[-1]
        raise ConfigError(f"there is no {chosen} here; there are {', '.join(there)}; nearest: {near}")
    torch.accelerator.set_device_index(chosen.index)
    return chosen


def moved(x: Tensor, device: torch.device) -> Tensor:
    """Return a tensor on a device. Nobody waits for a copy to an accelerator; it leaves from pinned memory."""
    if x.device.type == "cpu" != device.type:
        x = x.contiguous().pin_memory()
    return x.to(device, non_blocking=device.type != "cpu")
