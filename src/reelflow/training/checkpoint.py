"""Checkpoints that are whole or not there: everything a run needs to continue as if it had never stopped.

    run/step-00001234/
        weights.safetensors     the model, loadable alone with `load_weights`
        ema.safetensors         the same keys, with averaged parameters (when the run keeps an average)
        optimizer.safetensors   "<optimizer>/<parameter>/<name>": momenta and step counts
        rng.safetensors         states of the run's generators and of torch's own
        state.json              step, cursor, configuration, versions, and which parameters each optimizer holds
        manifest.json           size and SHA-256 of each file above; written last

A checkpoint is written into a hidden folder, synced, and renamed, so a run killed at any moment leaves the previous
one untouched. Nothing here is ever unpickled.
"""

import hashlib
import json
import os
import platform
import re
import shutil
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from reelflow.errors import CheckpointError
from reelflow.models.weights import load_weights, read_tensors, write_tensors
from reelflow.training.ema import Ema

__all__ = ["Latest", "latest", "prune", "read_state", "restore", "save"]

WEIGHTS, EMA, OPTIMIZER, RNG = ("weights.safetensors", "ema.safetensors", "optimizer.safetensors", "rng.safetensors")
STATE, MANIFEST = "state.json", "manifest.json"
STEP_FOLDER = re.compile(r"step-(\d{8,})")


class Latest(NamedTuple):
    """The newest whole checkpoint of a run, if any, and one line for each newer one that is torn."""

    folder: Path | None
    torn: list[str]


def save(
    run: Path,
    step: int,
    *,
    model: nn.Module,
    ema: Ema | None,
    optimizers: Sequence[torch.optim.Optimizer],
    generators: Mapping[str, torch.Generator],
    state: Mapping[str, Any],
) -> Path:
    """Write the checkpoint of `step` and return its folder; `state` is what else the run must remember, as JSON.

    Raises:
        CheckpointError: a file could not be written (the disk is full, say); what was there before is untouched.
    """
    folder, partial = run / f"step-{step:08d}", run / f".step-{step:08d}.partial"
    try:
        run.mkdir(parents=True, exist_ok=True)
        for left_behind in run.glob(".step-*.partial"):
            shutil.rmtree(left_behind)
        partial.mkdir()
        _write_tensors(partial / WEIGHTS, model.state_dict())
        if ema is not None:
            _write_tensors(partial / EMA, ema.state_dict())
        _write_tensors(partial / OPTIMIZER, _optimizer_tensors(model, optimizers))
        _write_tensors(partial / RNG, _generator_states(generators))
        described = {
            "step": step,
            "optimizers": _optimizer_structure(model, optimizers),
            "versions": {"torch": torch.__version__, "python": platform.python_version()},
        }
        _write_json(partial / STATE, {**state, **described})
        _write_json(partial / MANIFEST, {path.name: _fingerprint(path) for path in sorted(partial.iterdir())})
        _sync(partial)
        if folder.exists():  # only a torn one: a run goes on from its newest whole checkpoint
            shutil.rmtree(folder)
        partial.rename(folder)
        _sync(run)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise CheckpointError(
            f"could not write the checkpoint of step {step} to {run}: {error}; earlier checkpoints are intact, "
            f"free some space or choose another folder and resume"
        ) from error
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return folder


def latest(run: Path) -> Latest:
    """Find the newest checkpoint in `run` whose every byte agrees with its manifest."""
    torn = []
    for folder in reversed(_step_folders(run)):
        if damage := _damage(folder):
            torn.append(f"{folder.name} is torn ({damage})")
        else:
            return Latest(folder, torn)
    return Latest(None, torn)


def prune(run: Path, *, keep_last: int, keep: Collection[int] = ()) -> None:
    """Delete all checkpoints but the `keep_last` newest and those of the steps in `keep`."""
    for folder in _step_folders(run)[:-keep_last]:
        if _step_of(folder) not in keep:
            doomed = folder.with_name(f".{folder.name}.partial")  # so that a half-deleted one is never mistaken
            folder.rename(doomed)
            shutil.rmtree(doomed)


def read_state(folder: Path) -> dict[str, Any]:
    """Return what `save` was given as `state`, with the step, the versions and the optimizers' structure.

    Raises:
        CheckpointError: it is missing or is not JSON.
    """
    try:
        return json.loads((folder / STATE).read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder} holds no readable {STATE}: {error}") from error


def restore(
    folder: Path,
    *,
    model: nn.Module,
    ema: Ema | None,
    optimizers: Sequence[torch.optim.Optimizer],
    generators: Mapping[str, torch.Generator],
) -> None:
    """Put everything back as it was when `folder` was saved, to the last bit, torch's global generators included.

    Raises:
        CheckpointError: the checkpoint is unreadable, or of another model, optimiser or set of generators.
    """
    load_weights(folder / WEIGHTS, model)
    state = read_state(folder)
    structure = _optimizer_structure(model, optimizers)
    if state.get("optimizers") != structure:
        raise CheckpointError(
            f"{folder} was written with other optimizers: {_summary(state.get('optimizers'))}; this run has "
            f"{_summary(structure)}; restore the same choice of hidden weights, or start a new run"
        )
    if ema is not None:
        ema.load_state_dict(read_tensors(folder / EMA))
    _load_optimizers(read_tensors(folder / OPTIMIZER), model, optimizers, folder)
    _load_generators(read_tensors(folder / RNG), generators, folder)


@torch.no_grad()
# What a run holds, as flat dictionaries of tensors.


def _names(model: nn.Module) -> dict[int, str]:
    return {id(parameter): name for name, parameter in model.named_parameters()}


def _optimizer_structure(model: nn.Module, optimizers: Sequence[torch.optim.Optimizer]) -> list[dict[str, Any]]:
    names = _names(model)
    return [
        {
            "kind": type(optimizer).__name__,
            "groups": [[names[id(p)] for p in group["params"]] for group in optimizer.param_groups],
        }
        for optimizer in optimizers
    ]


def _summary(structure: list[dict[str, Any]] | None) -> str:
    return ", ".join(f"{item['kind']} over {sum(map(len, item['groups']))} weights" for item in structure or [])


def _optimizer_tensors(model: nn.Module, optimizers: Sequence[torch.optim.Optimizer]) -> dict[str, Tensor]:
    names = _names(model)
    return {
        f"{index}/{names[id(parameter)]}/{key}": value
        for index, optimizer in enumerate(optimizers)
        for parameter, state in optimizer.state.items()
        for key, value in state.items()
    }


def _load_optimizers(
    tensors: dict[str, Tensor], model: nn.Module, optimizers: Sequence[torch.optim.Optimizer], folder: Path
) -> None:
    names = _names(model)
    for index, optimizer in enumerate(optimizers):
        state: dict[int, dict[str, Tensor]] = {}
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        for position, parameter in enumerate(parameters):
            prefix = f"{index}/{names[id(parameter)]}/"
            for name in [name for name in tensors if name.startswith(prefix)]:
                value = tensors.pop(name)
                if value.ndim and value.shape != parameter.shape:
                    raise CheckpointError(
                        f"{folder / OPTIMIZER}: {name} is {list(value.shape)}, expected {list(parameter.shape)}"
                    )
                like = parameter if value.ndim else value  # in the memory layout the optimiser made it with
                exact = torch.empty_like(like, dtype=value.dtype).copy_(value)
                state.setdefault(position, {})[name.removeprefix(prefix)] = exact
        optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
    if tensors:
        raise CheckpointError(f"{folder / OPTIMIZER} holds state of unknown weights: {', '.join(list(tensors)[:3])}")


def _generator_states(generators: Mapping[str, torch.Generator]) -> dict[str, Tensor]:
    states = {name: generator.get_state() for name, generator in generators.items()}
    states["torch.cpu"] = torch.get_rng_state()
    if torch.cuda.is_available():
        states |= {f"torch.cuda.{index}": state for index, state in enumerate(torch.cuda.get_rng_state_all())}
    return states


def _load_generators(states: dict[str, Tensor], generators: Mapping[str, torch.Generator], folder: Path) -> None:
    expected = _generator_states(generators)
    if states.keys() != expected.keys() or any(states[name].shape != expected[name].shape for name in expected):
        raise CheckpointError(
            f"{folder / RNG} holds the generators {', '.join(sorted(states))}, this run needs "
            f"{', '.join(sorted(expected))}; resume on the kind of machine the run was started on"
        )
    for name, generator in generators.items():
        generator.set_state(states[name])
    torch.set_rng_state(states["torch.cpu"])
    if torch.cuda.is_available():
        torch.cuda.set_rng_state_all([states[f"torch.cuda.{index}"] for index in range(torch.cuda.device_count())])


# Files.


def _write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    plain, seen = {}, set()
    for name, tensor in tensors.items():
        value = tensor.detach().cpu().contiguous()
        storage = value.untyped_storage().data_ptr()
        plain[name] = value.clone() if storage in seen else value  # safetensors refuses tensors that share memory
        seen.add(storage)
    write_tensors(plain, path)
    _sync(path)


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=1))
    _sync(path)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _fingerprint(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _damage(folder: Path) -> str:
    """Say what is wrong with a checkpoint, or nothing when it is whole."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        if not {WEIGHTS, OPTIMIZER, RNG, STATE} <= manifest.keys():
            return f"{MANIFEST} does not list every file"
        for name, expected in manifest.items():
            if Path(name).name != name or _fingerprint(folder / name) != expected:
                return f"{name} is not what {MANIFEST} says"
    except (OSError, ValueError, AttributeError) as error:
        return str(error)
    return ""


def _step_folders(run: Path) -> list[Path]:
    folders = run.iterdir() if run.is_dir() else []
    return sorted((path for path in folders if STEP_FOLDER.fullmatch(path.name) and path.is_dir()), key=_step_of)


def _step_of(folder: Path) -> int:
    return int(folder.name.removeprefix("step-"))
