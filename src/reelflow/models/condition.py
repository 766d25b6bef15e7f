"""The four doors by which anything that is not the clip reaches the network.

    context    tokens to attend to             text, reference images, identity; `image` is a second such door
    vector     added to the time embedding     pooled text, class; and as `numbers`, frames per second, guidance
    channels   beside the latents              masks, reference latents, depth
    residual   added to the tokens             pose, trajectory, control branches

Encoders return a `Condition`; conditions add. The network never learns what a door was used for.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from reelflow.errors import ConfigError

__all__ = ["Condition", "Source", "stack_conditions"]


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

    def vectors(self, rows: Int[Tensor, " rows"]) -> "Condition":
        """Return the vector, the numbers and the label of some clips, each as often as it is named."""
        vector, numbers, label = (None if x is None else x[rows] for x in (self.vector, self.numbers, self.label))
        return Condition(vector=vector, numbers=numbers, label=label)

    def trimmed(self) -> "Condition":
        """Drop the context tokens beyond the longest sample's, and masks that hide nothing then; no output changes.

        Nothing attends to such tokens, and attention without a mask has faster kernels.
        """
        if self.context is None:
            return self
        (context, mask), *further = map(_trimmed, self.sources)
        return replace(self, context=context, context_mask=mask, further=tuple(further) or None)

    def map(self, change: Callable[[Tensor], Tensor]) -> "Condition":
        """Change every tensor."""
        return replace(self, **{field.name: _each(change, getattr(self, field.name)) for field in fields(self)})

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> "Condition":
        """Move every part; floating ones also take `dtype`."""
        return self.map(lambda part: part.to(device, dtype if part.is_floating_point() else None))


def stack_conditions(conditions: Sequence[Condition]) -> Condition:
    """Return the rows of several conditions as those of one; shorter contexts are padded to the longest, and masked.

    Raises:
        ConfigError: only some have a part, or what cannot be padded has several shapes.
    """
    parts: dict[str, Any] = {}
    for field in fields(Condition):
        given = [getattr(condition, field.name) for condition in conditions]
        doors = [_doors(part) for part in given]
        if field.name != "context_mask" and any(door != doors[0] for door in doors):
            raise ConfigError(f"cannot stack conditions: only some of them have {field.name}")
        if given[0] is None or field.name in ("context", "context_mask", "further"):
            continue
        shapes = {part.shape[1:] for part in given}
        if len(shapes) > 1:
            raise ConfigError(f"cannot stack conditions: {field.name} has the shapes {sorted(map(tuple, shapes))}")
        parts[field.name] = torch.cat(given)
    joined = [_stacked(sources) for sources in zip(*(condition.sources for condition in conditions), strict=True)]
    if conditions[0].context is not None:
        parts["context"], parts["context_mask"] = joined.pop(0)
    return Condition(**parts, further=tuple(joined) or None)


def _stacked(sources: Sequence[Source]) -> Source:
    lengths = [source.tokens.shape[1] for source in sources]
    if len(set(lengths)) == 1 and all(source.mask is None for source in sources):
        return Source(torch.cat([source.tokens for source in sources]))
    rests = [max(lengths) - length for length in lengths]
    tokens = [F.pad(source.tokens, (0, 0, 0, rest)) for source, rest in zip(sources, rests, strict=True)]
    return Source(
        torch.cat(tokens), torch.cat([F.pad(s.real(), (0, rest)) for s, rest in zip(sources, rests, strict=True)])
    )


def _trimmed(source: Source) -> Source:
    if source.mask is None:
        return source
    used = source.mask.any(dim=0).nonzero()
    length = int(used.max()) + 1 if len(used) else 0
    tokens, mask = source.tokens[:, :length], source.mask[:, :length]
    return Source(tokens, None if length and bool(mask.all()) else mask)


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
