"""A slowly moving average of the weights, which is what one validates, previews and ships."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from reelflow.errors import ConfigError
from reelflow.training.parts import here

__all__ = ["Ema"]


class Ema:
    """An exponential moving average, in float32, of a model's parameters; buffers are taken from the model as it is.

    The decay in force after step s is min(decay, (1 + s) / (10 + s)), the rule of TensorFlow's
    ExponentialMovingAverage, so that the random start is forgotten early; with `warmup=False` it is `decay` throughout.
    Of parameters spread over processes each averages its own part.
    """

    def __init__(self, model: nn.Module, decay: float, *, warmup: bool = True) -> None:
        if not 0 <= decay < 1:
            raise ConfigError(f"the decay of an average must lie in [0, 1), got {decay}")
        self.model, self.decay, self.warmup = model, decay, warmup
        self._params: list[Tensor] = list(model.parameters())
        self._average = [p.detach().to(torch.float32, copy=True) for p in self._params]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Move towards the model's weights after training step `step` (from 0)."""
        decay = min(self.decay, (1 + step) / (10 + step)) if self.warmup else self.decay
        weights = [p if p.dtype == torch.float32 else p.float() for p in here(self._params)]
        torch._foreach_lerp_(here(self._average), weights, 1 - decay)

    @contextmanager
    def swapped_in(self) -> Iterator[None]:
        """Let the model hold the averaged weights inside the block, and exactly its own again after it."""
        own = [p.clone() for p in here(self._params)]
        torch._foreach_copy_(here(self._params), here(self._average))
        try:
            yield
        finally:
            torch._foreach_copy_(here(self._params), own)

    def state_dict(self) -> dict[str, Tensor]:
        """Return a whole state dict of the model, with averages where the parameters were; not a copy."""
        averages = {id(p): average for p, average in zip(self._params, self._average, strict=True)}
        state = self.model.state_dict(keep_vars=True)
        return {name: averages.get(id(value), value.detach()) for name, value in state.items()}
