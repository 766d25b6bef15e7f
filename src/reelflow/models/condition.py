"""The four doors by which anything that is not the clip reaches the network.

    context    tokens to attend to             text, reference images, identity; `image` is a second such door
    vector     added to the time embedding     pooled text, class; and as `numbers`, frames per second, guidance
    channels   beside the latents              masks, reference latents, depth
    residual   added to the tokens             pose, trajectory, control branches

Encoders return a `Condition`; conditions add. The network never learns what a door was used for.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from reelflow.errors import ConfigError

__all__ = ["Condition", "Source"]


class Source(NamedTuple):
    """Tokens of one encoder; without a mask all of them are real."""

    tokens: Float[Tensor, "B L F"]
    mask: Bool[Tensor, "B L"] | None = None

    def real(self) -> Bool[Tensor, "B L"]:
        """Return the mask, or one that shows all."""
        if self.mask is not None:
            return self.mask
        return torch.ones(self.tokens.shape[:2], dtype=torch.bool, device=self.tokens.device)


@dataclass(frozen=True)
class Condition:
    """What a batch of clips is conditioned on; every part is optional.

    `label` is a class index for the model's own table (its vector door); `context_mask` is True at real tokens. `further`
    are the contexts of other encoders, of widths of their own, in the model's order.
    """

    context: Float[Tensor, "B L F"] | None = None
    context_mask: Bool[Tensor, "B L"] | None = None
    vector: Float[Tensor, "B V"] | None = None
    numbers: Float[Tensor, "B M"] | None = None
    label: Int[Tensor, " B"] | None = None
    image: Float[Tensor, "B P G"] | None = None
    channels: Float[Tensor, "B C T H W"] | None = None
    residual: Float[Tensor, "B N D"] | None = None
    further: tuple[Source, ...] | None = None

    @property
    def sources(self) -> tuple[Source, ...]:
        """The context, where there is one, and the further ones."""
        first = () if self.context is None else (Source(self.context, self.context_mask),)
        return first + (self.further or ())

    def __add__(self, other: "Condition") -> "Condition":
        """Use both: contexts and channels side by side, further contexts one after the other, vectors and residuals summed.

        Raises:
            ConfigError: both name a class label, or give numbers.
        """
        for name, what in (("label", "name a class label"), ("numbers", "give numbers")):
            if getattr(self, name) is not None and getattr(other, name) is not None:
                raise ConfigError(f"two conditions {what}; keep one")
        masked = self.context_mask is not None or other.context_mask is not None
        return Condition(
            context=_join(self.context, other.context, dim=1),
            context_mask=_join(self._mask(), other._mask(), dim=1) if masked else None,
            vector=_sum(self.vector, other.vector),
            numbers=self.numbers if other.numbers is None else other.numbers,
            label=self.label if other.label is None else other.label,
            image=_join(self.image, other.image, dim=1),
            channels=_join(self.channels, other.channels, dim=1),
            residual=_sum(self.residual, other.residual),
            further=(self.further or ()) + (other.further or ()) or None,
        )

    def _mask(self) -> Tensor | None:
        return None if self.context is None else Source(self.context, self.context_mask).real()

    def where(self, keep: Bool[Tensor, " B"], other: "Condition") -> "Condition":
        """Take each sample from `self` where `keep`, from `other` (a null condition, say) elsewhere.

        Raises:
            ConfigError: one of the two lacks a part that the other has.
        """
        parts = {}
        for field in fields(self):
            mine, theirs = getattr(self, field.name), getattr(other, field.name)
            if _doors(mine) != _doors(theirs):
                raise ConfigError(f"cannot choose between conditions: only one of them has {field.name}")
            parts[field.name] = _each(lambda a, b: torch.where(keep.view(-1, *[1] * (a.ndim - 1)), a, b), mine, theirs)
        return replace(self, **parts)

    def trimmed(self) -> "Condition":
        """Drop the context tokens beyond the longest sample's; nothing attends to them, so no output changes."""
        if self.context is None:
            return self
        (context, mask), *further = map(_trimmed, self.sources)
        return replace(self, context=context, context_mask=mask, further=tuple(further) or None)

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> "Condition":
        """Move every part; floating ones also take `dtype`."""

        def move(part: Tensor) -> Tensor:
            return part.to(device, dtype if part.is_floating_point() else None)

        return replace(self, **{field.name: _each(move, getattr(self, field.name)) for field in fields(self)})


def _trimmed(source: Source) -> Source:
    if source.mask is None:
        return source
    used = source.mask.any(dim=0).nonzero()
    length = int(used.max()) + 1 if len(used) else 0
    return Source(source.tokens[:, :length], source.mask[:, :length])


def _doors(part: Any) -> Any:
    """Say which tensors a part has: none, one, or a tuple of such."""
    return [_doors(each) for each in part] if isinstance(part, tuple) else part is not None


def _each(change: Callable[..., Tensor], part: Any, *others: Any) -> Any:
    """Change every tensor of a part, together with those of others that are alike."""
    if isinstance(part, tuple):
        parts = [_each(change, *group) for group in zip(part, *others, strict=True)]
        return Source(*parts) if isinstance(part, Source) else tuple(parts)
    return None if part is None else change(part, *others)


def _join(a: Tensor | None, b: Tensor | None, *, dim: int) -> Tensor | None:
    return b if a is None else a if b is None else torch.cat([a, b], dim=dim)


def _sum(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return b if a is None else a if b is None else a + b
