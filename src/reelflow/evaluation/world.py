"""Did the clip do what the prompt said? Read off by the world's own analyser, no network involved."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import UInt8

from reelflow.data.worlds import Combination, score_clip
from reelflow.errors import ConfigError

__all__ = ["PromptScores", "score_prompts"]


class PromptScores(NamedTuple):
    """Shares of clips, between 0 and 1, that show what was asked."""

    num_clips: int
    colour: float
    shape: float
    motion: float
    all: float


def score_prompts(clips: Sequence[UInt8[np.ndarray, "T H W 3"]], asked: Sequence[Combination]) -> PromptScores:
    """Compare what each clip shows with what was asked of it.

    Raises:
        ConfigError: the two are empty or of different lengths.
    """
    if len(clips) != len(asked) or not clips:
        raise ConfigError(
            f"need one request per clip, and at least one; got {len(clips)} clips and {len(asked)} requests"
        )
    rows = [score_clip(clip, c.colour, c.shape, c.motion) for clip, c in zip(clips, asked, strict=True)]
    means = {name: float(np.mean([row[name] for row in rows])) for name in ("colour", "shape", "motion", "all")}
    return PromptScores(len(rows), **means)
