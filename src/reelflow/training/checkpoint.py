"""Checkpoints that are whole or not there: everything a run needs to continue as if it had never stopped.

    run/step-00001234/
        weights.safetensors     the model, loadable alone with `load_weights`
        ema.safetensors         the same keys, with averaged parameters (when the run keeps an average)
        optimizer.safetensors   "<optimizer>/<parameter>/<name>": momenta and step counts
        state.json              step, cursor, configuration, origin, and which parameters each optimizer holds
        manifest.json           size and SHA-256 of each file above; written last

A checkpoint is copied to memory, and written by a thread while the training goes on: into a hidden folder, synced, and
renamed, so a run killed at any moment leaves the previous one untouched. Nothing here is ever unpickled.

Several processes write the same files, each the parts it holds at the places where they belong
(`reelflow.training.whole_file`). So a checkpoint of many processes is one of a single process, and the reverse; there
is nothing to put together, and `weights.safetensors` is the export. torch.distributed.checkpoint would leave a file for each
process and a pickle that says what is in them. The price: all processes must see one folder.
"""

import hashlib
import json
import os
import re
import shutil
import threading
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from reelflow.errors import CheckpointError
from reelflow.models.dit import VideoDiT
from reelflow.models.weights import count_names
from reelflow.parallel.mesh import Workers
from reelflow.parallel.shard import Box, boxes
from reelflow.training.ema import Ema
from reelflow.training.peers import Peers
from reelflow.training.whole_file import DTYPES, Layout, Part, read_part

__all__ = ["Latest", "Saver", "latest", "prune", "read_state", "restore", "write_weights"]

WEIGHTS, EMA, OPTIMIZER = "weights.safetensors", "ema.safetensors", "optimizer.safetensors"
STATE, MANIFEST = "state.json", "manifest.json"
STEP_FOLDER = re.compile(r"step-(\d{8,})")


class Latest(NamedTuple):
    """The newest whole checkpoint of a run, if any, and one line for each newer one that is torn."""

    folder: Path | None
    torn: list[str]


class _Held(NamedTuple):
    """A tensor of a file, and the parameter whose layout over processes it shares; None: every process has all of it."""

    tensor: Tensor
    parameter: str | None


class Saver:
    """Writes the checkpoints of one run, one at a time, while the run goes on. All of its processes make the same calls."""

    def __init__(self, run: Path, workers: Workers) -> None:
        self.run, self.workers, self.peers = run, workers, Peers(workers)
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None

    def save(
        self,
        step: int,
        *,
        model: nn.Module,
        ema: Ema | None,
        optimizers: Sequence[torch.optim.Optimizer],
        state: Mapping[str, Any],
        keep_last: int | None = None,
        keep: Collection[int] = (),
    ) -> Path:
        """Begin to write the checkpoint of `step`, and return where it will be; `state` is what else the run must
        remember, as JSON. When it is whole, all others but the `keep_last` newest and those in `keep` are deleted.

        Everything is copied before this returns. The previous checkpoint is waited for.

        Raises:
            CheckpointError: the previous one could not be written.
        """
        self.wait()
        files = _files(model, ema, optimizers)
        layouts = {
            file: Layout({name: held.tensor for name, held in tensors.items()}) for file, tensors in files.items()
        }
        copies = {file: list(_copied(tensors, model, self.workers)) for file, tensors in files.items()}
        described = json.dumps(
            {**state, "step": step, "optimizers": _optimizer_structure(model, optimizers)}, indent=1
        )  # here and now: what is in it goes on changing

        def write() -> None:
            try:
                self._write(step, layouts, copies, described)
                if keep_last is not None and self.workers.is_first:
                    prune(self.run, keep_last=keep_last, keep=keep)
            except BaseException as error:
                self._failure = error

        self._thread = threading.Thread(target=write, name="checkpoint")
        self._thread.start()
        return self.run / f"step-{step:08d}"

    def wait(self) -> None:
        """Return when nothing is being written any more.

        Raises:
            CheckpointError: the last checkpoint could not be written; what was there before is untouched.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._failure is not None:
            failure, self._failure = self._failure, None
            raise failure

    def _write(self, step: int, layouts: Mapping[str, Layout], parts: Mapping[str, Sequence[Part]], state: str) -> None:
        run, together, is_first = self.run, self.peers.together, self.workers.is_first
        folder, partial = run / f"step-{step:08d}", run / f".step-{step:08d}.partial"

        def begin() -> None:
            if is_first:
                run.mkdir(parents=True, exist_ok=True)
                for left_behind in run.glob(".step-*.partial"):
                    shutil.rmtree(left_behind)
                partial.mkdir()
                for file, layout in layouts.items():
                    layout.create(partial / file)

        def fill() -> None:
            for file, layout in layouts.items():
                layout.fill(partial / file, parts[file])

        def finish() -> None:
            if is_first:
                _write_text(partial / STATE, state)
                fingerprints = {path.name: _fingerprint(path) for path in sorted(partial.iterdir())}
                _write_text(partial / MANIFEST, json.dumps(fingerprints, indent=1))
                _sync(partial)
                if folder.exists():  # only a torn one: a run goes on from its newest whole checkpoint
                    shutil.rmtree(folder)
                partial.rename(folder)
                _sync(run)

        try:
            for stage in (begin, fill, finish):
                together(stage)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(
                f"could not write the checkpoint of step {step} to {run}: {error}; earlier checkpoints are intact, "
                f"free some space or choose another folder and resume"
            ) from error
        finally:
            if is_first:
                shutil.rmtree(partial, ignore_errors=True)  # gone already, unless something failed


def write_weights(path: Path, model: nn.Module, workers: Workers, peers: Peers) -> None:
    """Write the weights of a model into one file; all processes of a run call this.

    Raises:
        OSError: it cannot be written.
    """
    tensors = _weights(model)
    layout = Layout({name: held.tensor for name, held in tensors.items()})
    peers.together(lambda: layout.create(path) if workers.is_first else None)
    peers.together(lambda: layout.fill(path, _copied(tensors, model, workers)))


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
    workers: Workers,
) -> None:
    """Put everything back as it was when `folder` was saved, to the last bit; each process reads the parts it holds.

    Raises:
        CheckpointError: the checkpoint is unreadable, or of another model or optimiser.
    """
    state = read_state(folder)
    structure = _optimizer_structure(model, optimizers)
    _read(folder / WEIGHTS, _weights(model), model, workers)
    if state.get("optimizers") != structure:
        raise CheckpointError(
            f"{folder} was written with other optimizers: {_summary(state.get('optimizers'))}; this run has "
            f"{_summary(structure)}; restore the same choice of hidden weights, or start a new run"
        )
    if ema is not None:
        _read(folder / EMA, _averages(model, ema), model, workers)
    _restore_optimizers(folder / OPTIMIZER, model, optimizers, workers)


# What a run holds, by file and name.


def _files(
    model: nn.Module, ema: Ema | None, optimizers: Sequence[torch.optim.Optimizer]
) -> dict[str, dict[str, _Held]]:
    names = _names(model)
    moments = {
        f"{index}/{names[id(parameter)]}/{key}": _Held(value, names[id(parameter)] if value.ndim else None)
        for index, optimizer in enumerate(optimizers)
        for parameter, state in optimizer.state.items()
        for key, value in state.items()
    }
    averages = {} if ema is None else {EMA: _averages(model, ema)}
    return {WEIGHTS: _weights(model), **averages, OPTIMIZER: moments}


def _weights(model: nn.Module) -> dict[str, _Held]:
    return _held(model, {name: value.detach() for name, value in model.state_dict().items()})


def _averages(model: nn.Module, ema: Ema) -> dict[str, _Held]:
    return _held(model, ema.state_dict())


def _held(model: nn.Module, state: Mapping[str, Tensor]) -> dict[str, _Held]:
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    return {name: _Held(value, name if name in parameters else None) for name, value in state.items()}


def _names(model: nn.Module) -> dict[int, str]:
    return {id(parameter): name for name, parameter in model.named_parameters()}


def _optimizer_structure(model: nn.Module, optimizers: Sequence[torch.optim.Optimizer]) -> list[dict[str, Any]]:
    names = _names(model)
    return [
        {
            "kind": type(optimizer).__name__,
            "weights": sorted(names[id(p)] for group in optimizer.param_groups for p in group["params"]),
        }
        for optimizer in optimizers
    ]


def _summary(structure: list[dict[str, Any]] | None) -> str:
    return ", ".join(f"{item['kind']} over {len(item['weights'])} weights" for item in structure or [])


def _copied(tensors: Mapping[str, _Held], model: nn.Module, workers: Workers) -> Iterator[Part]:
    """Copy what this process is to write, to the memory of the CPU."""
    for name, held in tensors.items():
        for box in _boxes(held, model, workers):
            if box.writes:
                copy = torch.empty(box.data.shape, dtype=box.data.dtype)
                yield Part(name, box.offset, copy.copy_(box.data))


def _boxes(held: _Held, model: nn.Module, workers: Workers) -> list[Box]:
    if held.parameter is None or not isinstance(held.tensor, DTensor):
        return [Box((0,) * held.tensor.ndim, held.tensor.detach(), workers.is_first)]
    assert isinstance(model, VideoDiT)  # all that `parallelize` spreads
    return boxes(held.parameter, held.tensor, model, workers)


@torch.no_grad()
def _read(path: Path, tensors: Mapping[str, _Held], model: nn.Module, workers: Workers) -> None:
    """Fill tensors from a file that has exactly these."""
    with _opened(path) as file:
        found = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
        expected = {name: list(held.tensor.shape) for name, held in tensors.items()}
        problems = count_names(
            {
                "missing": [name for name in expected if name not in found],
                "unexpected": [name for name in found if name not in expected],
                "of another shape": [
                    f"{name} is {found[name]}, expected {expected[name]}"
                    for name in expected
                    if name in found and found[name] != expected[name]
                ],
            }
        )
        if problems:
            raise CheckpointError(
                f"{path} is a checkpoint of another model: {problems}; build {type(model).__name__} from the "
                f"configuration stored with the weights"
            )
        for name, held in tensors.items():
            for box in _boxes(held, model, workers):
                read_part(file, Part(name, box.offset, box.data))


def _restore_optimizers(
    path: Path, model: nn.Module, optimizers: Sequence[torch.optim.Optimizer], workers: Workers
) -> None:
    names = _names(model)
    with _opened(path) as file:
        unread = set(file.keys())
        for index, optimizer in enumerate(optimizers):
            state: dict[int, dict[str, Tensor]] = {}
            parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
            for position, parameter in enumerate(parameters):
                prefix = f"{index}/{names[id(parameter)]}/"
                for name in sorted(name for name in unread if name.startswith(prefix)):
                    value = state.setdefault(position, {})[name.removeprefix(prefix)] = _like(
                        parameter, file.get_slice(name), f"{path}: {name}"
                    )
                    held = _Held(value, names[id(parameter)] if value.ndim else None)
                    for box in _boxes(held, model, workers):
                        read_part(file, Part(name, box.offset, box.data))
                    unread.remove(name)
            optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
    if unread:
        raise CheckpointError(f"{path} holds state of unknown weights: {', '.join(sorted(unread)[:3])}")


def _like(parameter: Tensor, stored: Any, what: str) -> Tensor:
    """Return an empty tensor for a stored one: a number, or laid out in memory and over processes as the parameter."""
    dtype, shape = DTYPES[stored.get_dtype()], stored.get_shape()
    if not shape:
        return torch.empty((), dtype=dtype)
    if shape != list(parameter.shape):
        raise CheckpointError(f"{what} is {shape}, expected {list(parameter.shape)}")
    return torch.empty_like(parameter, dtype=dtype, requires_grad=False)


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} is missing or is not a whole safetensors file: {error}") from error


# Files.


def _write_text(path: Path, text: str) -> None:
    path.write_text(text)
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
        if not {WEIGHTS, OPTIMIZER, STATE} <= manifest.keys():
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
