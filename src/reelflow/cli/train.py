"""`reelflow train`: carry out a recipe, or go on with it."""

import json
from pathlib import Path
from typing import Annotated

import typer

from reelflow.cli.recipes import find_recipe, known_recipes
from reelflow.cli.terminal import INTERRUPTED, stdout
from reelflow.errors import ConfigError

__all__ = ["train"]


def train(
    recipe: Annotated[str | None, typer.Argument(help="What to train, such as world or folder (see --list).")] = None,
    *,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Folder of the run [default: runs/RECIPE].")] = None,
    assignments: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="PATH=VALUE", help="Change a value, as in dit.training.steps=900."),
    ] = None,
    data: Annotated[Path | None, typer.Option(help="Your folder of videos, for the recipe folder.")] = None,
    list_recipes: Annotated[bool, typer.Option("--list", help="Say which recipes there are.")] = False,
) -> int:
    """Train a model from a recipe. The same command goes on with a run that was stopped or killed."""
    if list_recipes:
        for name, function in known_recipes().items():
            print(f"{name:18} {(function.__doc__ or '').splitlines()[0]}")
        return 0
    if recipe is None:
        raise ConfigError("give a recipe, such as: reelflow train world; --list says which there are")

    from reelflow.cli.plan import Costs, summary
    from reelflow.data.folder import list_videos
    from reelflow.recipes.recipe import FolderData, run

    assignments = list(assignments or [])
    if data is not None:
        assignments.append(f"data.folder={json.dumps(str(data.resolve()))}")
    chosen = find_recipe(recipe, assignments)
    if isinstance(chosen.data, FolderData):
        list_videos(Path(chosen.data.folder))  # a missing folder is refused before the run claims one
    print(summary(chosen, Costs.of(chosen)))
    folder = out or Path("runs") / recipe
    try:
        model = run(chosen, folder, console=stdout()).model
    except KeyboardInterrupt:
        model = None
    if model is None:
        print(f"stopped; the same command goes on with {folder}")
        return INTERRUPTED
    print(f'{model} is ready; try: reelflow generate "..." --model {folder} -o out.mp4')
    return 0
