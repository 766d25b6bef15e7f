"""Compare a family of autoencoders with its reference, and state what all of them promise.

Errors and bounds are those of `parity`, of each output: the posterior's mean, its log-variance, a draw of it, and a decoded
clip. Latents are normalised with the family's statistics on both sides.
"""

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from parity import BOUND32, BOUND64, Errors, error, promoted, randomise, spread, usual_size
from torch import Tensor, nn

from reelflow.families.autoencoders import load_vae, save_vae
from reelflow.families.coder import Coder
from reelflow.interop.checkpoints import gradients_as_theirs
from reelflow.interop.mapping import differences
from reelflow.models.vae import CausalVAE, Posterior

EXAMPLES = int(os.environ.get("REELFLOW_EXAMPLES", "6"))  # configurations drawn in a test


@dataclass(frozen=True, repr=False)
class Case:
    """One random configuration: the reference's arguments, and a clip and latents for it, in float64."""

    family: Coder
    reference: type[nn.Module]
    arguments: Mapping[str, Any]
    clip: Tensor
    latents: Tensor
    seed: int = 0
    around: Callable[[], AbstractContextManager[Any]] = nullcontext  # what the reference's decoding runs in
    encode: Callable[[nn.Module, Tensor], Any] = lambda reference, clip: reference.encode(clip).latent_dist
    decode: Callable[[nn.Module, Tensor], Tensor] = lambda reference, latents: reference.decode(latents).sample
    decode_ours: Callable[[CausalVAE, Tensor], Tensor] = lambda vae, latents: vae.decode(latents)
    scaled: Callable[[CausalVAE, Tensor], Tensor] | None = None  # latents as the reference's pipeline decodes them

    def __repr__(self) -> str:
        return (
            f"{self.family.name}, seed {self.seed}, {dict(self.arguments)}, clip {list(self.clip.shape)}, "
            f"latents {list(self.latents.shape)}"
        )


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def filled(case: Case, state: Mapping[str, Tensor], dtype: torch.dtype) -> CausalVAE:
    """Build our model of a state of theirs, through the family's table of weights."""
    config = case.family.read(dict(case.arguments))
    rows = case.family.weights(config)
    model = CausalVAE(config).to(dtype).eval()
    assert not (wrong := differences(rows, model, {name: value.shape for name, value in state.items()})), wrong
    tensors = model.state_dict()
    for row in rows:
        for name, value in row.to_ours(state).items():
            tensors[name].copy_(value)
    return model


def random_reference(case: Case) -> nn.Module:
    """Build the reference with every parameter drawn at random."""
    torch.manual_seed(case.seed)
    reference = case.reference(**case.arguments).eval()
    randomise(reference, case.seed)
    for name, parameter in reference.named_parameters():
        if name.endswith("gamma"):  # a norm's weight of another shape than `randomise` expects
            parameter.data.mul_(0.2).add_(1)
    return reference


Outputs = dict[str, Tensor]


def _ours(model: CausalVAE, case: Case, clip: Tensor, latents: Tensor) -> Outputs:
    posterior = model.encode(clip)
    drawn = posterior.sample(torch.Generator().manual_seed(case.seed))
    return {
        "mean": posterior.mean,
        "logvar": posterior.logvar,
        "drawn": drawn,
        "decoded": case.decode_ours(model, latents),
    }


def _theirs(reference: nn.Module, case: Case, clip: Tensor, latents: Tensor) -> Outputs:
    config = case.family.read(dict(case.arguments))
    mean, std = (torch.tensor(x).to(clip.dtype).view(1, -1, 1, 1, 1) for x in (config.latent_mean, config.latent_std))
    posterior = case.encode(reference, clip)
    drawn = posterior.sample(torch.Generator().manual_seed(case.seed))
    with case.around():
        decoded = case.decode(reference, latents * std + mean)
    return {
        "mean": (posterior.mean - mean) / std,
        "logvar": posterior.logvar - 2 * std.log(),
        "drawn": (drawn - mean) / std,
        "decoded": decoded,
    }


@contextmanager
def same_draws() -> Iterator[None]:
    """Let float32 and float64 draw the same numbers, so that what a draw loses in float32 is its rounding."""
    draw = torch.randn

    def randn(*shape: Any, dtype: torch.dtype | None = None, **how: Any) -> Tensor:
        return draw(*shape, dtype=torch.double, **how).to(dtype or torch.get_default_dtype())

    def randn_like(x: Tensor, **how: Any) -> Tensor:
        return randn(x.shape, dtype=x.dtype, device=x.device, **how)

    with mock.patch.object(torch, "randn", randn), mock.patch.object(torch, "randn_like", randn_like):
        yield


def _walk(call: Callable[..., Outputs], module: nn.Module, case: Case, dtype: torch.dtype) -> tuple[Outputs, Outputs]:
    clip, latents = (x.to(dtype, copy=True).requires_grad_() for x in (case.clip, case.latents))
    with same_draws():
        outputs = call(module, case, clip, latents)
    total = sum(
        (outputs[name] * normal(*outputs[name].shape, seed=case.seed + i).to(dtype)).sum()
        for i, name in enumerate(outputs)
    )
    total.backward()
    return {name: x.detach() for name, x in outputs.items()}, {"clip": clip.grad, "latents": latents.grad}


@dataclass(frozen=True)
class Measured:
    outputs: Outputs
    gradients: Outputs


def _measure_ours(case: Case, state: Mapping[str, Tensor], dtype: torch.dtype) -> Measured:
    model = filled(case, state, dtype)
    outputs, inputs = _walk(_ours, model, case, dtype)
    return Measured(outputs, inputs | gradients_as_theirs(model, case.family.weights(model.config)))


def _measure_theirs(reference: nn.Module, case: Case, dtype: torch.dtype) -> Measured:
    outputs, inputs = _walk(_theirs, reference, case, dtype)
    own = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in reference.named_parameters()}
    return Measured(outputs, inputs | own)


def _errors(ours: Measured, theirs: Measured) -> tuple[dict[str, float], float, float]:
    """Return the error of each output, and of the gradients the worst and the root mean square.

    A gradient that vanishes (a key's bias moves all scores alike) is measured against a hundredth of the usual one.
    """
    usual = usual_size(theirs.gradients)
    assert ours.gradients.keys() == theirs.gradients.keys(), ours.gradients.keys() ^ theirs.gradients.keys()
    outputs = {name: error(ours.outputs[name], theirs.outputs[name]) for name in theirs.outputs}
    pairs = [(ours.gradients[name].double(), theirs.gradients[name].double()) for name in theirs.gradients]
    worst = max(error(*pair, scale=usual) for pair in pairs)
    return outputs, worst, spread(ours.gradients, theirs.gradients)


MEASURED: dict[str, list[Errors]] = {}
"""All that was measured in this session, by family: what docs/parity.md is made of; gradients in float32 as their rms."""


def check(case: Case) -> None:
    """Hold the bounds."""
    reference = random_reference(case)
    state = {name: value.clone() for name, value in reference.state_dict().items()}
    narrow = _measure_theirs(reference, case, torch.float32)
    with promoted():
        reference = case.reference(**case.arguments).eval().double()
        reference.load_state_dict({name: value.double() for name, value in state.items()})
        wide = _measure_theirs(reference, case, torch.float64)
    outputs64, worst, _ = _errors(_measure_ours(case, state, torch.float64), wide)
    outputs, _, gradients = _errors(_measure_ours(case, state, torch.float32), narrow)
    floors, _, floor = _errors(narrow, wide)
    errors = Errors(max(outputs.values()), max(floors.values()), gradients, floor, max(outputs64.values()), worst)
    MEASURED.setdefault(case.family.name, []).append(errors)
    assert errors.forward64 <= BOUND64, outputs64
    assert errors.gradient64 <= BOUND64, errors
    for name, found in outputs.items():
        assert found <= max(BOUND32, 3 * floors[name]), (name, outputs, floors)
    # Once in a hundred networks this small a norm divides by almost nothing, on one side more than on the other: hence
    # the wider bound.
    assert gradients <= max(5 * BOUND32, 3 * floor), (gradients, floor)


def check_export(case: Case, folder: Path) -> None:
    """A folder of theirs goes through ours and back, bit for bit, and is read by both."""
    reference = random_reference(case)
    reference.save_pretrained(folder / "theirs")
    vae = load_vae(folder / "theirs")
    save_vae(vae, folder / "again", case.family)
    again = case.reference.from_pretrained(folder / "again")
    before, after = reference.state_dict(), again.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    known = {name for name in case.arguments if not name.startswith("_")}
    assert {name: again.config[name] for name in known} == {name: reference.config[name] for name in known}
    clip = case.clip.float()
    with torch.no_grad():
        assert error(load_vae(folder / "again").encode(clip).mean, vae.encode(clip).mean) == 0


def random_model(case: Case) -> CausalVAE:
    """Build our model in float64 with the reference's random weights."""
    return filled(case, random_reference(case).state_dict(), torch.float64).requires_grad_(False)


def cut(total: int, at: set[int]) -> list[int]:
    """Return the lengths of the chunks of `total` frames that are cut at these frames."""
    cuts = [0, *sorted(k for k in at if 0 < k < total), total]
    return [stop - start for start, stop in pairwise(cuts)]


def check_streams(vae: CausalVAE, clip: Tensor, frames: list[int], latents: list[int]) -> None:
    """Chunks of so many frames, and of so many latents, give the whole clip's result, whatever the state went through."""
    whole = vae.encode(clip)
    parts, state = [], None
    for chunk in clip.split(frames, dim=2):
        posterior, state = vae.encode_chunk(chunk, state)
        parts += [] if posterior is None else [posterior]
    assert state is not None
    assert state.pending is None
    streamed = Posterior(*(torch.cat(list(each), dim=2) for each in zip(*parts, strict=True)))
    for name in ("mean", "logvar"):
        assert error(getattr(streamed, name), getattr(whole, name)) <= 1e-12
    decoded = torch.cat(list(vae.stream_decode(whole.mean.split(latents, dim=2))), dim=2)
    assert error(decoded, vae.decode(whole.mean)) <= 1e-12
