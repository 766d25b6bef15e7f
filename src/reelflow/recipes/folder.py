"""Your own videos: a folder of files with captions."""

from dataclasses import replace

from reelflow.conditioning.text import HashedWords
from reelflow.recipes.recipe import FolderData, Recipe
from reelflow.recipes.world import world

__all__ = ["folder"]


def folder() -> Recipe:
    """Your own folder of videos: the networks of `world`, trained longer; captions of up to 32 words.

    Real pictures hold more than the world's, so both networks take more steps: about four times its hours. It knows
    the words and scenes of the folder and nothing else.
    """
    base = world()
    assert isinstance(base.text, HashedWords)
    return replace(
        base,
        data=FolderData(folder="videos", num_validation=8),
        vae=replace(base.vae, training=replace(base.vae.training, steps=2000)),
        text=replace(base.text, max_words=32),
        dit=replace(base.dit, training=replace(base.dit.training, steps=3000)),
    )
