"""Compare a family with its reference implementation, on random weights, forward and gradient, in float32 and float64.

Errors are max |ours - theirs| / rms(theirs); of gradients in float32 the root mean square in place of the maximum, since the
worst of thousands is a matter of luck on both sides. In float32 the bound is 1e-5, or three times what the reference itself loses
against float64 where that is more. In float64 it is 1e-10, against the reference with its float32 islands (rotary
tables, sinusoids, some norms) computed in float64 too: `promoted`.
"""

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from diffusers.models.embeddings import get_1d_rotary_pos_embed
from torch import Tensor, nn

from reelflow.families.family import Family
from reelflow.interop.mapping import Entry, differences
from reelflow.models.dit import DiTConfig, VideoDiT

BOUND32, BOUND64 = 1e-5, 1e-10
EXAMPLES = int(os.environ.get("REELFLOW_EXAMPLES", "8"))  # configurations drawn in a test
Inputs = dict[str, Any]


@dataclass(frozen=True, repr=False)
class Case:
    """One random configuration: the reference's arguments, inputs in float64, and how each side is called with them.

    Both calls return clips B C T H W; `sign` is -1 where the reference predicts what leads away from data.
    """

    family: Family
    reference: type[nn.Module]
    arguments: Mapping[str, Any]
    inputs: Inputs
    theirs: Callable[[nn.Module, Inputs], Tensor]
    ours: Callable[[VideoDiT, Inputs], Tensor]
    learned: tuple[str, ...] = ("latents", "context")  # inputs whose gradient is compared
    sign: int = -1
    seed: int = 0

    def __repr__(self) -> str:
        shapes = {name: list(value.shape) for name, value in self.inputs.items() if isinstance(value, Tensor)}
        return f"{self.family.name}, seed {self.seed}, {dict(self.arguments)}, {shapes}"


@dataclass(frozen=True)
class Errors:
    """Of one case; `floor` is what the reference loses in float32."""

    forward32: float
    forward_floor: float
    gradient32: float
    gradient_floor: float
    forward64: float
    gradient64: float


@contextmanager
def promoted() -> Iterator[None]:
    """Let code that asks for float32 have float64."""
    before = torch.get_default_dtype()
    with ExitStack() as stack:
        for name in ("float32", "float"):
            stack.enter_context(mock.patch.object(torch, name, torch.float64))
        stack.enter_context(mock.patch.object(Tensor, "float", Tensor.double))
        defaults = (*(get_1d_rotary_pos_embed.__defaults__ or ())[:-1], torch.float64)  # bound when it was imported
        stack.enter_context(mock.patch.object(get_1d_rotary_pos_embed, "__defaults__", defaults))
        torch.set_default_dtype(torch.float64)
        try:
            yield
        finally:
            torch.set_default_dtype(before)


def randomise(module: nn.Module, seed: int) -> None:
    """Draw every parameter, those that begin at zero or one too: nothing hides an error."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        if parameter.ndim == 1 and "norm" in name and name.endswith("weight"):
            value = 1 + 0.2 * noise
        elif parameter.ndim < 2 or "table" in name:
            value = 0.2 * noise
        else:
            value = noise / (parameter.numel() / parameter.shape[0]) ** 0.5
        parameter.data.copy_(value)


def as_ours(family: Family, arguments: Mapping[str, Any], state: Mapping[str, Tensor], dtype: torch.dtype) -> VideoDiT:
    """Build our model of a state of theirs, through the family's table of weights."""
    config = family.read(dict(arguments))
    rows = family.weights(config)
    model = VideoDiT(config).to(dtype)
    assert not (wrong := differences(rows, model, {name: value.shape for name, value in state.items()})), wrong
    tensors = model.state_dict()
    for row in rows:
        for name, value in row.to_ours(state).items():
            tensors[name].copy_(value)
    return model


def as_theirs(family: Family, config: DiTConfig, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Give tensors of ours, weights or gradients, the names and layout of theirs: all that are in `state`."""
    rows = (row for row in family.weights(config) if isinstance(row, Entry) and set(row.ours) <= state.keys())
    return {name: value for row in rows for name, value in row.to_theirs(state).items()}


def error(ours: Tensor, theirs: Tensor, *, scale: float = 0.0) -> float:
    """Return max |ours - theirs| / rms(theirs); `scale` is the least rms to divide by."""
    assert ours.shape == theirs.shape, (ours.shape, theirs.shape)
    if not theirs.numel():
        return 0.0
    rms = theirs.double().square().mean().sqrt().item()
    return (ours.double() - theirs.double()).abs().max().item() / max(rms, scale, 1e-300)


Result = tuple[Tensor, dict[str, Tensor]]  # the output, and every gradient by their names


def _walk(call: Callable[..., Tensor], module: nn.Module, case: Case, dtype: torch.dtype, sign: int) -> Result:
    def cast(value: Any) -> Any:
        return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() and value.ndim > 0 else value

    inputs = {name: cast(value) for name, value in case.inputs.items()}
    for name in case.learned:
        inputs[name] = inputs[name].clone().requires_grad_()
    out = sign * call(module, inputs)
    generator = torch.Generator().manual_seed(case.seed + 1)
    projection = torch.randn(out.shape, generator=generator, dtype=torch.float64).to(dtype)
    (out * projection).sum().backward()
    sources = {f"input {name}": inputs[name] for name in case.learned}
    sources |= {name: x for name, x in module.named_parameters() if x.requires_grad}
    gradients = {name: torch.zeros_like(x) if x.grad is None else x.grad for name, x in sources.items()}
    return out.detach(), gradients


def compare(ours: Result, theirs: Result) -> tuple[float, float]:
    """Return the errors of the output and, the worst of all, of the gradients."""
    usual = usual_size(theirs[1])
    assert ours[1].keys() == theirs[1].keys(), ours[1].keys() ^ theirs[1].keys()
    return error(ours[0], theirs[0]), max(error(ours[1][k], theirs[1][k], scale=usual) for k in theirs[1])


def usual_size(gradients: Mapping[str, Tensor]) -> float:
    """Return the size against which a gradient is measured that vanishes (a key's bias moves all scores alike).

    A hundredth of the usual gradient's, or a ten thousandth of the largest where most vanish (attention to one key).
    """
    sizes = sorted(g.double().square().mean().sqrt().item() for g in gradients.values() if g.numel())
    return max(0.01 * sizes[len(sizes) // 2], 1e-4 * sizes[-1])


def spread(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> float:
    """Return the root mean square of the errors of all gradients, each relative to its size."""
    usual, parts = usual_size(theirs), []
    for name, gradient in theirs.items():
        if gradient.numel():
            size = max(gradient.double().square().mean().sqrt().item(), usual)
            parts.append((ours[name].double() - gradient.double()).flatten() / size)
    return torch.cat(parts).square().mean().sqrt().item()


def _ours(case: Case, state: Mapping[str, Tensor], dtype: torch.dtype) -> Result:
    model = as_ours(case.family, case.arguments, state, dtype)
    out, gradients = _walk(case.ours, model, case, dtype, 1)
    inputs = {name: value for name, value in gradients.items() if name.startswith("input ")}
    named = as_theirs(case.family, model.config, {k: v for k, v in gradients.items() if k not in inputs})
    return out, inputs | named


def measure(case: Case) -> Errors:
    """Run both sides."""
    torch.manual_seed(case.seed)
    reference = case.reference(**case.arguments).eval()
    randomise(reference, case.seed)
    state = {name: value.clone() for name, value in reference.state_dict().items()}
    narrow = _walk(case.theirs, reference, case, torch.float32, case.sign)
    with promoted():
        reference = case.reference(**case.arguments).eval().double()
        reference.load_state_dict({name: value.double() for name, value in state.items()})
        wide = _walk(case.theirs, reference, case, torch.float64, case.sign)
    ours = _ours(case, state, torch.float32)
    forward64, gradient64 = compare(_ours(case, state, torch.float64), wide)
    return Errors(
        forward32=error(ours[0], narrow[0]),
        forward_floor=error(narrow[0], wide[0]),
        gradient32=spread(ours[1], narrow[1]),
        gradient_floor=spread(narrow[1], wide[1]),
        forward64=forward64,
        gradient64=gradient64,
    )


MEASURED: dict[str, list[Errors]] = {}
"""All that was measured in this session, by family: what docs/parity.md is made of."""


def check(case: Case) -> Errors:
    """Measure, and hold the bounds."""
    errors = measure(case)
    hold(case.family, errors)
    return errors


def hold(family: Family, errors: Errors) -> None:
    """Hold the bounds, and note the errors for the ledger."""
    MEASURED.setdefault(family.name, []).append(errors)
    assert errors.forward64 <= BOUND64, errors
    assert errors.gradient64 <= BOUND64, errors
    assert errors.forward32 <= max(BOUND32, 3 * errors.forward_floor), errors
    assert errors.gradient32 <= max(BOUND32, 3 * errors.gradient_floor), errors
