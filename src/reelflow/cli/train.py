"""`reelflow train`: carry out a recipe, or go on with it."""

import json
import os
from pathlib import Path
from typing import Annotated

import typer

from reelflow.cli.recipes import find_recipe, known_recipes
from reelflow.cli.terminal import INTERRUPTED, Device, stdout
from reelflow.errors import ConfigError

__all__ = ["train"]


def train(
    recipe: Annotated[
        str | None,
        typer.Argument(
            metavar="[RECIPE|SYSTEM]",
            help="What to train, such as world or folder (see --list); or the folder of a published system, "
            "for an adapter of it.",
        ),
    ] = None,
    *,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Folder of the run [default: runs/RECIPE].")] = None,
    assignments: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="PATH=VALUE", help="Change a value, as in dit.training.steps=900."),
    ] = None,
    data: Annotated[Path | None, typer.Option(help="Your folder of videos, for the recipe folder or a system.")] = None,
    device: Device = "auto",
    list_recipes: Annotated[bool, typer.Option("--list", help="Say which recipes there are.")] = False,
) -> int:
    """Train a model from a recipe, or an adapter of a published system.

    The same command goes on with a run that was stopped or killed.
    """
    if list_recipes:
        for name, function in known_recipes().items():
            print(f"{name:18} {(function.__doc__ or '').splitlines()[0]}")
        return 0
    if recipe is None:
        raise ConfigError("give a recipe, such as: reelflow train world; --list says which there are")

    if (Path(recipe) / "model_index.json").is_file():
        return _tune(Path(recipe), data, out, assignments or [], device)
    from reelflow.cli.plan import Costs, summary
    from reelflow.data.folder import list_videos
    from reelflow.recipes.recipe import FolderData
    from reelflow.recipes.runs import run

    assignments = list(assignments or [])
    if data is not None:
        assignments.append(f"data.folder={json.dumps(str(data.resolve()))}")
    chosen = find_recipe(recipe, assignments)
    if isinstance(chosen.data, FolderData):
        list_videos(Path(chosen.data.folder))  # a missing folder is refused before the run claims one
    first = os.environ.get("RANK", "0") == "0"  # of the processes that torchrun started: the one that speaks
    if first:
        print(summary(chosen, Costs.of(chosen)))
    folder = out or Path("runs") / recipe
    try:
        model = run(chosen, folder, device=device, console=stdout()).model
    except KeyboardInterrupt:
        model = None
    if model is None:
        if first:
            print(f"stopped; the same command goes on with {folder}")
        return INTERRUPTED
    if first:
        print(f'{model} is ready; try: reelflow generate "..." --model {folder} -o out.mp4')
    return 0


def _tune(system: Path, data: Path | None, out: Path | None, assignments: list[str], device: str) -> int:
    """Learn an adapter of a published system."""
    from reelflow.config import set_values
    from reelflow.data.folder import list_videos
    from reelflow.recipes.published import tune, tuning

    if data is None:
        raise ConfigError(f"an adapter of {system} is learned from videos: give their folder with --data")
    list_videos(data)
    config = set_values(tuning(str(system.resolve()), str(data.resolve())), assignments)
    folder = out or Path("runs") / f"{system.resolve().name}-adapter"
    try:
        adapter = tune(config, folder, device=device, console=stdout())
    except KeyboardInterrupt:
        adapter = None
    if adapter is None:
        print(f"stopped; the same command goes on with {folder}")
        return INTERRUPTED
    print(f'{adapter} is ready; try: reelflow generate "..." --model {system} --adapter {adapter} -o out.mp4')
    return 0
