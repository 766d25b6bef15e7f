"""reelflow: train, sample, stream and evaluate video diffusion transformers."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from reelflow.families.autoencoders import load_vae, save_vae
    from reelflow.families.published import load_transformer, save_transformer
    from reelflow.generation.published import load

__all__ = ["__version__", "load", "load_transformer", "load_vae", "save_transformer", "save_vae"]

__version__ = "0.1.0"

_DOORS = {
    "load": "reelflow.generation.published",
    "load_transformer": "reelflow.families.published",
    "load_vae": "reelflow.families.autoencoders",
    "save_transformer": "reelflow.families.published",
    "save_vae": "reelflow.families.autoencoders",
}


def __getattr__(name: str) -> Any:
    """Import the library's doors when they are first used: `import reelflow` alone loads nothing."""
    if name in _DOORS:
        return getattr(import_module(_DOORS[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
