"""What turns gradients into steps: Muon for hidden matrices, AdamW for the rest, and the schedule both follow.

Hidden weights (matrices and convolution kernels between the first and the last layer) move by an orthogonalised
momentum; embeddings, norms, biases, gains, first and last layers by AdamW. Which weight is hidden, the caller says.
"""

import math
from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from reelflow.config import configuration
from reelflow.errors import ConfigError
from reelflow.training.parts import here, part_of, whole

__all__ = [
    "Hidden",
    "Muon",
    "OptimizerConfig",
    "build_optimizers",
    "is_matrix",
    "orthogonalize",
    "schedule",
    "set_learning_rates",
]

Hidden = Callable[[str, nn.Parameter], bool]  # is the parameter of this name a hidden weight?


@configuration
class OptimizerConfig:
    """How a model learns. Weight decay is decoupled and spares vectors."""

    lr: float  # AdamW
    muon_lr: float | None  # None: every weight goes to AdamW
    warmup_steps: int
    decay: Literal["constant", "linear", "cosine"]
    final_fraction: float = 0.0  # of the peak learning rate, reached at the end unless decay is constant
    weight_decay: float = 0.0  # a step shrinks weights by lr * weight_decay
    grad_clip: float | None = 1.0  # largest global norm of the gradient
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    muon_momentum: float = 0.95
    muon_iterations: int = 5  # of `orthogonalize`; each is a few percent of a small model's step
    muon_every: int = 1  # steps between moves by Muon, each as many times as long

    def __post_init__(self) -> None:
        for name in ("lr", "muon_lr", "eps", "grad_clip"):
            value = getattr(self, name)
            if value is not None and not (0 < value < math.inf):
                raise ConfigError(f"{name} must be a positive number, got {value}")
        if not all(0 <= value < 1 for value in (*self.betas, self.muon_momentum)):
            raise ConfigError(f"betas and muon_momentum must lie in [0, 1), got {self.betas} and {self.muon_momentum}")
        if self.muon_iterations < 1 or self.muon_every < 1:
            raise ConfigError(
                f"muon_iterations and muon_every must be at least 1, got {self.muon_iterations} and {self.muon_every}"
            )
        if not 0 <= self.final_fraction <= 1:
            raise ConfigError(f"final_fraction must lie in [0, 1], got {self.final_fraction}")
        if self.weight_decay < 0 or self.warmup_steps < 0:
            raise ConfigError(
                f"weight_decay and warmup_steps must not be negative, got {self.weight_decay} and {self.warmup_steps}"
            )


def schedule(config: OptimizerConfig, step: int, total_steps: int) -> float:
    """Return the fraction of the peak learning rate to use at `step` (0 ... total_steps - 1).

    Rises linearly over the warmup, reaching 1 with its last step, then decays to `final_fraction` at `total_steps`.
    A pure function of the step: a resumed run needs nothing else.
    """
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / max(1, total_steps - config.warmup_steps)
    if config.decay == "constant":
        return 1.0
    falling = 1 - progress if config.decay == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
    return config.final_fraction + (1 - config.final_fraction) * falling


def is_matrix(name: str, parameter: nn.Parameter) -> bool:
    """Call every weight of two or more dimensions hidden; right only for a model without embeddings or a readout."""
    return parameter.ndim >= 2


def build_optimizers(
    model: nn.Module, config: OptimizerConfig, *, hidden: Hidden = is_matrix
) -> list[torch.optim.Optimizer]:
    """Share the trainable parameters of `model` between AdamW and, for the hidden ones, Muon.

    Raises:
        ConfigError: `hidden` claims a vector, or nothing in the model can be trained.
    """
    muon: list[nn.Parameter] = []
    rest: dict[tuple[bool, Any], list[nn.Parameter]] = {}  # by decay, and by mesh: a fused step is of one
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if config.muon_lr is not None and hidden(name, parameter):
            if parameter.ndim < 2:
                raise ConfigError(
                    f"{name} has shape {tuple(parameter.shape)}, but Muon moves matrices and kernels only"
                )
            muon.append(parameter)
        else:
            mesh = parameter.device_mesh if isinstance(parameter, DTensor) else None
            rest.setdefault((parameter.ndim < 2, mesh), []).append(parameter)
    optimizers: list[torch.optim.Optimizer] = []
    groups = [
        {"params": rest[kind], "weight_decay": 0.0 if kind[0] else config.weight_decay}
        for kind in sorted(rest, key=lambda kind: kind[0])
    ]
    if groups:  # fused: one pass over memory; on a CPU four to six times faster than foreach
        optimizers.append(torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=True))
    if muon:
        assert config.muon_lr is not None
        optimizers.append(
            Muon(
                muon,
                lr=config.muon_lr,
                momentum=config.muon_momentum,
                weight_decay=config.weight_decay,
                ns_steps=config.muon_iterations,
                every=config.muon_every,
            )
        )
    if not optimizers:
        raise ConfigError(f"{type(model).__name__} has no parameters that require a gradient")
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak_lr"] = group["lr"]
    return optimizers


def set_learning_rates(optimizers: Iterable[torch.optim.Optimizer], fraction: float) -> None:
    """Set every group of optimisers from `build_optimizers` to `fraction` of its peak learning rate."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = fraction * group["peak_lr"]


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised (Jordan 2024, "Muon: an optimizer for hidden layers in neural networks").

    A weight of more than two dimensions is treated as the matrix out x rest. The update is the nearest semi-orthogonal
    matrix to the Nesterov momentum, times sqrt(max(1, rows / columns)), so that a step of size lr changes the output
    of a layer by about lr whatever its shape (Jordan's scale; typical lr 0.02). To reuse an AdamW learning rate as in
    Liu et al. 2025 ("Muon is scalable for LLM training", eq. 4), multiply it by 0.2 * sqrt(max(rows, columns)) instead.

    `torch.optim.Muon` takes two-dimensional weights only and orthogonalises them one at a time; here all matrices of
    one shape (or its transpose) go through a single chain of batched products with the small side as the Gram matrix.

    The momentum hardly turns within a few steps, so weights may move at every `every`-th step only, `every` times as far:
    the momentum takes up every gradient, and the products, which dominate for a small batch, are saved.

    Of weights spread over processes each keeps its part of the momentum; matrices are gathered and orthogonalised one at a
    time, all by every process.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter],
        *,
        lr: float,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
        ns_steps: int = 5,
        ns_dtype: torch.dtype | None = None,  # float32 or bfloat16; None: whichever is faster here
        every: int = 1,
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "ns_steps": ns_steps,
            "ns_dtype": ns_dtype,
            "every": every,
        }
        super().__init__(params, defaults)
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.ndim < 2:
                    raise ConfigError(f"Muon moves matrices and kernels only, got shape {tuple(parameter.shape)}")

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Move every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            params: list[Tensor] = [parameter for parameter in group["params"] if parameter.grad is not None]
            if params:
                self._step_group(params, group)
        return loss

    def _step_group(self, params: list[Tensor], group: dict[str, Any]) -> None:
        grads = here(parameter.grad for parameter in params if parameter.grad is not None)
        for parameter in params:
            if not self.state[parameter]:
                self.state[parameter]["momentum"] = torch.zeros_like(parameter)
                self.state[parameter]["step"] = torch.zeros(())
        averages = here(self.state[parameter]["momentum"] for parameter in params)
        torch._foreach_lerp_(averages, grads, 1 - group["momentum"])
        steps = [self.state[parameter]["step"] for parameter in params]
        torch._foreach_add_(steps, 1)
        if steps[0] % group["every"]:
            return
        lr, weights = group["lr"] * group["every"], here(params)
        directions = torch._foreach_lerp(grads, averages, group["momentum"])  # Nesterov: look one step ahead
        if group["weight_decay"]:
            torch._foreach_mul_(weights, 1 - lr * group["weight_decay"])
        alike: dict[tuple[int, int, int], list[int]] = {}
        for index, parameter in enumerate(params):
            rows, columns = parameter.shape[0], parameter.shape[1:].numel()
            alone = index if isinstance(parameter, DTensor) else -1
            alike.setdefault((min(rows, columns), max(rows, columns), alone), []).append(index)
        for indices in alike.values():
            flat = [whole(directions[index], params[index]).flatten(1) for index in indices]
            wide = torch.stack([matrix if matrix.shape[0] <= matrix.shape[1] else matrix.mT for matrix in flat])
            dtype = group["ns_dtype"] or _fast_dtype(wide)
            updates = orthogonalize(wide, steps=group["ns_steps"], dtype=dtype).to(params[indices[0]].dtype)
            for index, matrix, update in zip(indices, flat, updates, strict=True):
                rows, columns = matrix.shape
                update = update if rows <= columns else update.mT
                scale = max(1, rows / columns) ** 0.5
                moved = part_of(update.reshape(params[index].shape), params[index])
                weights[index].add_(moved, alpha=-lr * scale)


def orthogonalize(
    matrices: Float[Tensor, "batch rows columns"], *, steps: int = 5, dtype: torch.dtype = torch.float32
) -> Float[Tensor, "batch rows columns"]:
    """Replace the singular values of each matrix (rows <= columns) by values near 1, between about 0.7 and 1.2.

    Newton-Schulz iteration of the odd quintic x -> 3.4445 x - 4.7750 x^3 + 2.0315 x^5 (Jordan 2024), whose slope at
    zero is steep enough to lift small singular values within five steps. Computed and returned in `dtype`.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    norm = torch.linalg.matrix_norm(matrices, keepdim=True)
    x = matrices.to(dtype) / norm.clamp_min(1e-7).to(dtype)  # the spectral norm is now at most 1
    if dtype == torch.bfloat16:
        for _ in range(steps):
            gram = x @ x.mT
            x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
        return x
    # Each step multiplies x from the left by a polynomial of its Gram matrix, so the steps can be multiplied together
    # first: only two products touch the long side. Needs the digits of float32 (in bfloat16 the errors grow).
    gram = x @ x.mT
    product = torch.eye(gram.shape[-1], dtype=dtype, device=x.device).expand_as(gram)
    for _ in range(steps):
        factor = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        factor.diagonal(dim1=-2, dim2=-1).add_(a)
        product = factor @ product
        gram = factor @ gram @ factor
    return product @ x


def _fast_dtype(matrices: Tensor) -> torch.dtype:
    """The dtype in which `orthogonalize` is fastest: on a CPU, float32 for wide matrices or where bfloat16 is slow.

    On a CPU with bfloat16 units (2.4 x the float32 rate) the two ways break even at columns = 6 rows.
    """
    if matrices.device.type != "cpu":
        return torch.bfloat16
    features = torch.cpu.get_capabilities()
    native = features.get("amx_bf16") or features.get("avx512_bf16") or features.get("bf16")
    return torch.bfloat16 if native and matrices.shape[-1] < 6 * matrices.shape[-2] else torch.float32
