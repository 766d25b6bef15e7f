"""Everything reelflow raises on purpose.

    ReelflowError
    ├── ConfigError        a value, shape, name or combination that cannot work
    ├── CheckpointError    weights or a run folder that is missing, torn, or of another model
    ├── MediaError         a video or image file that cannot be read or written
    └── DataError          a data set or a cache that is missing, empty, stale or mixed up

A message says what was asked, what was found, and the nearest thing that works.
"""

from collections.abc import Iterable
from difflib import get_close_matches

__all__ = ["CheckpointError", "ConfigError", "DataError", "MediaError", "ReelflowError", "nearest"]


class ReelflowError(Exception):
    """A mistake the user can mend; the command line prints it on one line and exits with status 2."""


class ConfigError(ReelflowError):
    """A value, a shape, a name or a combination of them that cannot work."""


class CheckpointError(ReelflowError):
    """Weights or a run folder that is missing, torn, or belongs to another model."""


class MediaError(ReelflowError):
    """A video or an image that cannot be read or written."""


class DataError(ReelflowError):
    """A data set or a cache that is missing, empty, stale or mixed up."""


def nearest(name: str, known: Iterable[str]) -> str:
    """Phrase the way out of a misspelt `name`: the closest known names, or all of them."""
    known = list(known)
    close = get_close_matches(name, known, n=3, cutoff=0.5)
    return f"did you mean {' or '.join(close)}?" if close else f"known: {', '.join(sorted(known))}"
