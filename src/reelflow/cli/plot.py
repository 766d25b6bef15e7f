"""`reelflow plot timesteps`: which times training draws, as a formula and as drawn."""

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.table import Table

from reelflow.cli.terminal import new_file, stdout
from reelflow.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

    from reelflow.diffusion.timesteps import TimeDistribution

__all__ = ["plot"]

NUM_BINS = 50
NUM_POINTS = 400  # of a line
ALLOWED = math.sqrt(math.log(2 / 0.01) / 2)  # 1 % of Kolmogorov-Smirnov distances x sqrt(samples) are larger

plot = typer.Typer(help="Draw what a run depends on.", no_args_is_help=True, rich_markup_mode=None)


@plot.callback()
def _group() -> None:
    """Draw what a run depends on."""


@plot.command()
def timesteps(
    out: Annotated[Path, typer.Option("--out", "-o", help="The picture: .svg.")] = Path("timesteps.svg"),
    *,
    shifts: Annotated[
        list[float] | None,
        typer.Option("--shift", help="More than 1 leans towards noise; give several [default: 1, 3 and 7]."),
    ] = None,
    distribution: Annotated[
        Literal["logit-normal", "uniform", "mode", "cosmap"], typer.Option(help="Of times, before the shift.")
    ] = "logit-normal",
    mean: Annotated[float | None, typer.Option(help="Of the logit of a logit-normal [default: 0].")] = None,
    std: Annotated[float | None, typer.Option(help="Of the logit of a logit-normal [default: 1].")] = None,
    scale: Annotated[float | None, typer.Option(help="Of a mode, from -1 to 1.752 [default: 1.29].")] = None,
    samples: Annotated[int, typer.Option(help="Times drawn for each shift.")] = 20_000,
    seed: Annotated[int, typer.Option(help="Another seed, other draws.", min=0, max=2**63 - 1)] = 0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the file of this name.")] = False,
) -> int:
    """Draw the density of training times over a histogram of draws. Exits with 1 when they disagree."""
    new_file(out, ".svg", overwrite=overwrite)
    if samples < NUM_BINS:
        raise ConfigError(
            f"--samples must be at least {NUM_BINS}, one for each bar, got {samples}; nearest: {NUM_BINS}"
        )

    import torch

    from reelflow.diffusion.timesteps import draw_times, shift_times, shifted_density
    from reelflow.recipes.plot import NUM_COLOURS, Histogram, Series, line_plot_svg, svg_file

    shifts = shifts or [1.0, 3.0, 7.0]
    if len(shifts) > NUM_COLOURS:
        raise ConfigError(f"a picture has room for {NUM_COLOURS} shifts, got {len(shifts)}; draw two pictures")
    times, name = _distribution(distribution, mean=mean, std=std, scale=scale)
    generator = torch.Generator().manual_seed(seed)
    allowed = ALLOWED / math.sqrt(samples)
    edges = torch.linspace(0, 1, NUM_BINS + 1).tolist()
    points = torch.linspace(0, 1, NUM_POINTS + 1, dtype=torch.float64)

    table = Table("shift", "mean t", "half below t =", "distance", "1 % exceed", "draws follow the density")
    lines, agree = [], True
    for shift in shifts:
        draws = draw_times(times, samples, generator, shift=shift, stratified=False)
        median = shift_times(times.quantile(torch.tensor([0.5], dtype=torch.float64)), shift).item()
        distance = _distance(times.cdf(shift_times(draws.double(), 1 / shift)))
        agree &= distance <= allowed
        verdict = "yes" if distance <= allowed else "no"
        table.add_row(
            f"{shift:g}", f"{draws.mean():.3f}", f"{median:.3f}", f"{distance:.4f}", f"{allowed:.4f}", verdict
        )
        heights = (torch.histc(draws, NUM_BINS, 0, 1) * NUM_BINS / samples).tolist()
        density = shifted_density(times, points, shift=shift).clamp(max=1.25 * max(heights))  # it may be infinite
        curve = list(zip(points.tolist(), density.tolist(), strict=True))
        lines.append(Series(f"shift {shift:g}", curve, histogram=Histogram(edges, heights)))
    title = f"Training times, {name}: density (lines) and {samples:,} draws each (bars)"
    svg = line_plot_svg(lines, x_label="t (0 is noise, 1 is data)", y_label="density", title=title, size=(680, 420))
    out.write_text(svg_file(svg), encoding="utf-8")
    stdout().print(table)
    print(
        f"distance: Kolmogorov-Smirnov, between the distribution and {samples:,} independent draws; by chance 1 % exceed "
        f"sqrt(ln(2 / 0.01) / (2 x {samples:,}))\n{out}"
    )
    return 0 if agree else 1


def _distribution(
    kind: str, *, mean: float | None, std: float | None, scale: float | None
) -> "tuple[TimeDistribution, str]":
    """Build the distribution that the options ask for, and say it in words."""
    from reelflow.diffusion.timesteps import CosMap, LogitNormal, Mode, Uniform

    owner = {"--mean": "logit-normal", "--std": "logit-normal", "--scale": "mode"}
    for option, value in (("--mean", mean), ("--std", std), ("--scale", scale)):
        if value is not None and owner[option] != kind:
            raise ConfigError(f"{option} belongs to --distribution {owner[option]}, got {kind}; leave it out")
    if kind == "logit-normal":
        normal = LogitNormal(0.0 if mean is None else mean, 1.0 if std is None else std)
        return normal, f"logit-normal({normal.mean:g}, {normal.std:g})"
    if kind == "mode":
        mode = Mode(1.29 if scale is None else scale)
        return mode, f"mode({mode.scale:g})"
    return (Uniform() if kind == "uniform" else CosMap()), kind


def _distance(u: "Tensor") -> float:
    """Return the Kolmogorov-Smirnov distance of values from the uniform distribution on [0, 1]."""
    import torch

    u = u.sort().values
    steps = torch.arange(len(u) + 1, dtype=u.dtype) / len(u)
    return max((steps[1:] - u).max().item(), (u - steps[:-1]).max().item())
