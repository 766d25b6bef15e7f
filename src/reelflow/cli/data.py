"""`reelflow data inspect`: what would become of a folder of videos."""

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table
from rich.text import Text

from reelflow.cli.terminal import parse_size, stdout

__all__ = ["data"]

data = typer.Typer(help="Look at data before training on it.", no_args_is_help=True, rich_markup_mode=None)


@data.callback()
def _group() -> None:
    """Look at data before training on it."""


@data.command()
def inspect(
    folder: Annotated[Path, typer.Argument(help="A folder of videos, with captions beside them or in metadata.csv.")],
    *,
    frames: Annotated[int, typer.Option(help="Frames per clip.")] = 17,
    size: Annotated[str, typer.Option(metavar="HxW", help="Height x width of a clip, in pixels.")] = "64x64",
    fps: Annotated[float, typer.Option(help="Frames per second of a clip.")] = 8.0,
) -> int:
    """Say what becomes of each video. Accepted or not and why, how it is cut and resized, its caption, its tokens."""
    from reelflow.data.folder import ClipSpec, inspect_folder
    from reelflow.nn.patchify import token_grid
    from reelflow.recipes.folder import folder as recipe

    height, width = parse_size(size)
    networks = recipe()
    _, *latents = networks.vae.model.latent_shape(frames, height, width)
    tokens = token_grid((latents[0], latents[1], latents[2]), networks.dit.model.patch).num_tokens
    reports = inspect_folder(folder, ClipSpec(frames, height, width, fps), tokens_per_clip=tokens)
    table = Table("file", "clips", "tokens", "caption", "what becomes of it")
    for report in reports:
        fate = "; ".join(report.notes) if report.accepted else f"rejected: {report.reason}"
        cells = (str(report.path), f"{report.num_clips}", f"{report.tokens or 0:,}", report.caption, fate)
        table.add_row(*(Text(cell) for cell in cells), style=None if report.accepted else "red")
    stdout().print(table)
    accepted = [report for report in reports if report.accepted]
    print(
        f"{len(accepted)} of {len(reports)} videos give {sum(r.num_clips for r in accepted):,} clips of "
        f"{frames} x {height} x {width} at {fps:g} fps: {sum(r.tokens or 0 for r in accepted):,} tokens ({tokens:,} a clip, by "
        f"the networks of the recipe folder)"
    )
    return 0 if accepted else 1
