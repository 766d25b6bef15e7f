"""The recipes that can be named on the command line."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from reelflow.errors import ConfigError, nearest

if TYPE_CHECKING:
    from reelflow.recipes.recipe import Recipe

__all__ = ["find_recipe", "known_recipes"]


def known_recipes() -> dict[str, Callable[[], "Recipe"]]:
    """Return every recipe by the name of its function, with hyphens."""
    from reelflow.recipes import vdit
    from reelflow.recipes.fine import fine_world, real_clips
    from reelflow.recipes.folder import folder
    from reelflow.recipes.subject import small_world, subject_world
    from reelflow.recipes.world import world

    founding = (
        *(vdit.vdit_world, vdit.vdit_pixels_world),
        *(vdit.vdit_text_world, vdit.vdit_gated_world, vdit.vdit_mm_world),
    )
    others = (world, folder, fine_world, real_clips, small_world, subject_world)
    return {recipe.__name__.replace("_", "-"): recipe for recipe in (*others, *founding)}


def find_recipe(name: str, assignments: Sequence[str]) -> "Recipe":
    """Return the recipe of this name with each `path=value` applied.

    Raises:
        ConfigError: there is no such recipe (offers the nearest), or a value is refused.
    """
    from reelflow.config import set_values

    known = known_recipes()
    if name not in known:
        raise ConfigError(f"no recipe is called {name!r}; {nearest(name, known)}")
    return set_values(known[name](), assignments)
