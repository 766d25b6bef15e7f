"""Text becomes the number of a class, for a model with a table of classes instead of a door for text."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import torch
from jaxtyping import Int
from torch import Tensor

from reelflow.conditioning.text import words_of
from reelflow.config import configuration
from reelflow.errors import ConfigError
from reelflow.models.condition import Condition

__all__ = ["ClassWords", "Labels"]


@dataclass(frozen=True)
class Labels:
    """Which class each prompt names; the number after the last is no class."""

    label: Int[Tensor, " B"]

    def condition(self) -> Condition:
        """Open the class door."""
        return Condition(label=self.label)


@configuration
class ClassWords:
    """Find the class of a prompt by its words: one value of each attribute, the last attribute running fastest.

    An attribute is a tuple of values, a value a tuple of words any of which means it:
    ((("red",), ("blue",)), (("left",), ("still", "not"))) has four classes. The empty prompt is no class.

    Raises:
        ConfigError: an attribute has fewer than two values, a value no word, or a word two meanings.
    """

    attributes: tuple[tuple[tuple[str, ...], ...], ...]

    def __post_init__(self) -> None:
        words = [word for values in self.attributes for value in values for word in value]
        if not self.attributes or not all(len(values) > 1 and all(values) for values in self.attributes):
            raise ConfigError("a class needs an attribute, each of two values or more, each of a word or more")
        twice = sorted({word for word in words if words.count(word) > 1 or words_of(word) != [word]})
        if twice:
            raise ConfigError(f"each is to be one lower-case word with one meaning, got {', '.join(map(repr, twice))}")

    @property
    def num_classes(self) -> int:
        return prod(len(values) for values in self.attributes)

    @property
    def doors(self) -> dict[str, int]:
        """What a transformer must have to be conditioned so."""
        return {"context_dim": 0, "vector_dim": 0, "num_classes": self.num_classes}

    @property
    def context_tokens(self) -> int:
        return 0

    def __call__(self, prompts: Sequence[str]) -> Labels:
        """Number the classes of prompts.

        Raises:
            ConfigError: a prompt names no value of an attribute, or two.
        """
        return Labels(torch.tensor([self._label(prompt) for prompt in prompts]))

    def _label(self, prompt: str) -> int:
        words, label = set(words_of(prompt)), 0
        if not words:
            return self.num_classes
        for values in self.attributes:
            named = [index for index, value in enumerate(values) if words.intersection(value)]
            if len(named) != 1:
                known = ", ".join("/".join(value) for value in values)
                raise ConfigError(f"the prompt must name one of {known}; {prompt[:60]!r} names {len(named)}")
            label = label * len(values) + named[0]
        return label
