"""reelflow: train, sample, stream and evaluate video diffusion transformers."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from reelflow.families.published import load_transformer, save_transformer

__all__ = ["__version__", "load_transformer", "save_transformer"]

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """Import the library's doors when they are first used: `import reelflow` alone loads nothing."""
    if name in ("load_transformer", "save_transformer"):
        from reelflow.families import published

        return getattr(published, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
