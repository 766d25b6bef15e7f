"""Text becomes tokens to attend to and one pooled vector.

`HashedWords` is a frozen text encoder without weights: each word is a fixed random vector drawn from its own hash
(random indexing: Kanerva et al. 2000). Words are nearly orthogonal, any script works, nothing is downloaded, and the
same text gives the same features on every machine. It knows no meaning: two words are as far apart as any others, so a
model learns each word of its captions by itself. It serves worlds and small domains; its interface is that of the
large pretrained encoders.
"""

import hashlib
import re
import unicodedata
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from reelflow.config import configuration
from reelflow.errors import ConfigError
from reelflow.models.condition import Condition
from reelflow.nn.embed import sinusoid

__all__ = ["HashedWords", "TextFeatures", "words_of"]

POSITION_CHANNELS = 16


class TextFeatures(NamedTuple):
    """What an encoder makes of a batch of prompts; `mask` is True at real tokens. Some encoders pool nothing."""

    tokens: Float[Tensor, "B L F"]
    mask: Bool[Tensor, "B L"]
    pooled: Float[Tensor, "B V"] | None

    def condition(self) -> Condition:
        """Open the context and the vector door."""
        return Condition(context=self.tokens, context_mask=self.mask, vector=self.pooled)


def words_of(text: str) -> list[str]:
    """Split text into case-folded words; scripts written without spaces give one word per character."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    spaced = "".join(f" {c} " if unicodedata.east_asian_width(c) in "WF" else c for c in folded)
    return re.findall(r"[^\W_]+", spaced)


@configuration
class HashedWords:
    """A frozen encoder of `dim` channels for prompts of up to `max_words` words (see the module's docstring).

    The first `dim - 16` channels are the word's, the last 16 a sinusoid of its place in the prompt. The empty prompt
    has no tokens and a pooled vector of zeros: it is the unconditional one.
    """

    dim: int = 96
    max_words: int = 12

    def __post_init__(self) -> None:
        if self.dim < 2 * POSITION_CHANNELS:
            raise ConfigError(f"dim must be at least {2 * POSITION_CHANNELS}, got {self.dim}")
        if self.max_words < 1:
            raise ConfigError(f"max_words must be at least 1, got {self.max_words}")

    @property
    def doors(self) -> dict[str, int]:
        """What a transformer must have to be conditioned so."""
        return {"context_dim": self.dim, "vector_dim": self.dim, "num_classes": 0}

    @property
    def context_tokens(self) -> int:
        return self.max_words

    def __call__(self, prompts: Sequence[str]) -> TextFeatures:
        """Encode prompts.

        Raises:
            ConfigError: a prompt has more than `max_words` words.
        """
        tokens = torch.zeros(len(prompts), self.max_words, self.dim)
        mask = torch.zeros(len(prompts), self.max_words, dtype=torch.bool)
        pooled = torch.zeros(len(prompts), self.dim)
        for row, prompt in enumerate(prompts):
            words = words_of(prompt)
            if len(words) > self.max_words:
                raise ConfigError(
                    f"the prompt has {len(words)} words but this encoder reads {self.max_words}; "
                    f"shorten {prompt[:60]!r} or train with text.max_words={len(words)}"
                )
            if words:
                vectors = torch.stack([_word_vector(word, self.dim - POSITION_CHANNELS) for word in words])
                places = sinusoid(torch.arange(len(words), dtype=torch.float32), POSITION_CHANNELS)
                tokens[row, : len(words)] = torch.cat([vectors, places], dim=-1)
                mask[row, : len(words)] = True
                pooled[row] = tokens[row, : len(words)].mean(0)
        return TextFeatures(tokens, mask, pooled)


@lru_cache(maxsize=65_536)
def _word_vector(word: str, dim: int) -> Float[Tensor, " dim"]:
    seed = int.from_bytes(hashlib.sha256(word.encode()).digest()[:8], "big") >> 1
    return torch.randn(dim, generator=torch.Generator().manual_seed(seed))
