"""What one training step holds and does, found by walking two of them without data (`reelflow.planning.walk`).

    peak = process + weights + average + states + max(gradients and activations, gradients and update) + holes

Process is what Python, its libraries and their kernels' own buffers take, whatever is trained: it is measured, not walked.
Holes are what an allocator that keeps freed memory cannot fill again. The second step counts, when the optimiser has its states.
Deep networks are walked with two and with three units of each run of like blocks, and continued as a line.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import _disable_current_modes

from reelflow.models.dit import DiTConfig, VideoDiT
from reelflow.planning.memory import example, repeats
from reelflow.planning.walk import Counts, Kernel, Walk

__all__ = [
    "Batch",
    "Build",
    "Once",
    "Precision",
    "Step",
    "Update",
    "run_deep",
    "run_once",
    "shaped",
    "train_step",
    "transformer",
    "transformer_step",
]

Precision = Literal["fp32", "bf16"]


class Batch(NamedTuple):
    """A function to the loss of a batch, whose inputs it makes too, and the share of steps that have such batches."""

    loss: Callable[[], Tensor]
    share: float = 1.0


Build = Callable[[], tuple[nn.Module, Sequence[Batch]]]
"""Makes a model, and each kind of batch that it learns from."""
Update = Callable[[nn.Module], Callable[[], object]]
"""Makes of a model, once, what moves its weights after each backward pass, and all that this needs to remember."""


@dataclass(frozen=True)
class Step:
    """Bytes and operations of a training step; the numbers of operations need not be whole."""

    weights: int
    average: int  # and whatever else the update holds before its first step
    states: int
    gradients: int
    activations: int  # at their peak, beside the gradients that exist by then are counted here too
    update: int  # the most that the update needs for a moment, beside gradients
    holes: int
    pages: int  # of the peak, what goes back to the system: tensors so large that they have pages of their own
    passes: Counts  # forward and backward, of all batches of the step
    moves: Counts  # of the update
    num_calls: int | float  # of operations, those that only look at a tensor anew among them

    @property
    def peak(self) -> int:
        """Bytes beside what the process itself takes."""
        held = self.weights + self.average + self.states
        return held + max(self.activations, self.gradients + self.update) + self.holes

    def run_peak(self, *, checkpoints: bool) -> int:
        """Return a whole run's peak: a checkpoint is copied first, and but for the last one written while the run goes on."""
        held = self.weights + self.average + self.states
        return max(self.peak + (held if checkpoints else 0), 2 * held + self.holes)


class _Walked(NamedTuple):
    """Of a network that is walked as it is."""

    step: Step
    live: int  # the peak, without holes


def train_step(build: Build, update: Update, *, accumulate: int = 1, precision: Precision = "fp32") -> Step:
    """Walk training steps of a whole network."""
    return _walk(build, update, accumulate, precision).step


def transformer_step(
    config: DiTConfig,
    latent_shape: tuple[int, int, int],
    context_tokens: int,
    update: Update,
    *,
    batch: int,
    accumulate: int = 1,
    precision: Precision = "fp32",
    masked: bool = False,
    prepare: Callable[[VideoDiT], object] = lambda model: None,
) -> Step:
    """Walk training steps of a transformer that learns to move from noise to latents of extents (t, h, w).

    `masked` says that contexts are of several lengths. `prepare` does to the network what is done before training, such as
    having it recompute its activations.

    Raises:
        ConfigError: the extents do not fit the patch or a pattern of attention.
    """

    def walked(shallow: DiTConfig) -> _Walked:
        build = transformer(shallow, latent_shape, context_tokens, batch=batch, masked=masked, prepare=prepare)
        return _walk(build, update, accumulate, precision)

    shallow, longer = _depths(config)
    short = walked(shallow)
    step = short.step
    for deeper, times in longer:
        step = _continued(step, short.step, walked(deeper).step, times)
    # What the update needs for a moment depends on all of the weights together: it is walked for all.
    with FakeTensorMode(), Walk() as walk:
        model = VideoDiT(config)
        move = update(model)
        for _ in range(2):
            for parameter in model.parameters():
                parameter.grad = torch.empty_like(parameter) if parameter.requires_grad else None
            with walk.phase() as phase:
                move()
    step = replace(step, update=phase.peak - max(phase.start, phase.end), moves=dict(phase.kernels))
    whole = replace(step, holes=0).peak
    return replace(step, holes=round(whole * short.step.holes / short.live))


def transformer(
    config: DiTConfig,
    latent_shape: tuple[int, int, int],
    context_tokens: int,
    *,
    batch: int,
    masked: bool = False,
    prepare: Callable[[VideoDiT], object] = lambda model: None,
) -> Build:
    """Return a transformer and its loss: the mean squared error of a velocity."""

    def build() -> tuple[nn.Module, Sequence[Batch]]:
        model = VideoDiT(config)
        prepare(model)

        def loss() -> Tensor:
            mean, t, condition = example(config, latent_shape, context_tokens, batch=batch)
            if masked:
                condition = replace(condition, context_mask=torch.ones(batch, context_tokens, dtype=torch.bool))
            latents = mean + torch.ones_like(mean) * torch.ones_like(mean).exp()  # drawn from cached posteriors
            noise = torch.ones_like(latents)
            output = model(torch.lerp(noise, latents, t.view(-1, 1, 1, 1, 1)), t, condition).float()
            target = latents - noise
            if target.shape[1] != output.shape[1]:  # the rest of the output is a variance
                output = output[:, : target.shape[1]]
            return (output - target).square().mean()

        return model, [Batch(loss)]

    return build


def shaped(make: Callable[[], nn.Module]) -> nn.Module:
    """Build a module for a walk that changes its weights while it is built, which tensors without data do not allow."""
    with _disable_current_modes(), torch.device("meta"):
        model = make()
    for module in model.modules():
        for name, weight in module._parameters.items():
            if weight is not None:
                data = torch.empty_strided(weight.shape, weight.stride(), dtype=weight.dtype)
                module._parameters[name] = nn.Parameter(data, requires_grad=weight.requires_grad)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty_strided(buffer.shape, buffer.stride(), dtype=buffer.dtype)
    return model


class Once(NamedTuple):
    """What something takes that needs no gradients."""

    peak: int  # bytes
    pages: int  # of them, as in `Step`
    kernels: Counts
    num_calls: int


def run_once(run: Callable[[], object]) -> Once:
    """Walk something that needs no gradients."""
    with FakeTensorMode(), Walk() as walk, torch.no_grad():
        run()
    return Once(walk.heap.peak, walk.heap.pages, walk.kernels, walk.num_calls)


def run_deep(config: DiTConfig, run: Callable[[DiTConfig], object]) -> Once:
    """Walk something that needs no gradients and makes a transformer, and continue it to the whole depth."""
    shallow, longer = _depths(config)
    short = run_once(partial(run, shallow))
    peak, pages, kernels, num_calls = short
    for deeper, times in longer:
        more = run_once(partial(run, deeper))
        peak += times * (more.peak - short.peak)
        pages += times * (more.pages - short.pages)
        kernels = _more(kernels, short.kernels, more.kernels, times)
        num_calls += times * (more.num_calls - short.num_calls)
    return Once(peak, pages, kernels, num_calls)


def _depths(config: DiTConfig) -> tuple[DiTConfig, list[tuple[DiTConfig, int]]]:
    """Return a transformer of at most two units of each run of like blocks, and those of three, with how many are left."""
    runs = repeats(config.layers)
    shallow = [min(count, 2) for _, count in runs]

    def of(lengths: Sequence[int]) -> DiTConfig:
        layers = [layer for (unit, _), count in zip(runs, lengths, strict=True) for layer in count * unit]
        return replace(config, layers=tuple(layers))

    deeper = [(index, count - 2) for index, (_, count) in enumerate(runs) if count > 2]
    return of(shallow), [(of([*shallow[:index], 3, *shallow[index + 1 :]]), times) for index, times in deeper]


def _more(counts: Counts, short: Counts, longer: Counts, times: int | float) -> dict[Kernel, int | float]:
    """Add to counts, `times` over, what the longer ones have more than the short."""
    found = dict(counts)
    for kernel in {**longer, **short}:
        found[kernel] = found.get(kernel, 0) + times * (longer.get(kernel, 0) - short.get(kernel, 0))
    return {kernel: count for kernel, count in found.items() if count > 0}


def _walk(build: Build, update: Update, accumulate: int, precision: Precision) -> _Walked:
    cast = torch.autocast("cpu", torch.bfloat16) if precision == "bf16" else nullcontext()
    with FakeTensorMode(), Walk() as walk:
        model, batches = build()
        weights = walk.alive
        move = update(model)
        average = walk.alive - weights
        for _ in range(2):  # the optimiser has its states in the second round
            peak, calls, kernels = 0, 0.0, dict[Kernel, int | float]()
            for loss, share in batches:
                for index in range(min(accumulate, 2)):
                    with walk.phase() as passes:
                        with cast:
                            value = loss()
                        value.backward()
                        del value
                    times = share if index == 0 else share * (accumulate - 1)
                    kernels = _more(kernels, {}, passes.kernels, times)
                    calls += times * passes.num_calls
                    if index == 0:
                        held = passes.start
                    peak = max(peak, passes.peak)
                gradients = passes.end - held
                with walk.phase() as moves:
                    move()
                for parameter in model.parameters():
                    parameter.grad = None
    states = held - weights - average
    step = Step(
        weights=weights,
        average=average,
        states=states,
        gradients=gradients,
        activations=peak - held,
        update=moves.peak - max(moves.start, moves.end),
        holes=0,
        pages=walk.heap.pages,
        passes=kernels,
        moves=dict(moves.kernels),
        num_calls=calls + moves.num_calls,
    )
    return _Walked(replace(step, holes=max(0, walk.heap.peak - step.peak)), step.peak)


def _continued(step: Step, short: Step, longer: Step, times: int) -> Step:
    """Add to a step, `times` over, what one more unit adds."""

    def line(name: str) -> int | float:
        return getattr(step, name) + times * (getattr(longer, name) - getattr(short, name))

    return replace(
        step,
        weights=round(line("weights")),
        average=round(line("average")),
        states=round(line("states")),
        gradients=round(line("gradients")),
        activations=round(line("activations")),
        pages=round(line("pages")),
        passes=_more(step.passes, short.passes, longer.passes, times),
        num_calls=line("num_calls"),
    )
