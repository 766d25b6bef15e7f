"""`reelflow compare`: the one comparison at equal compute, carried out or continued."""

import shlex
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from reelflow.cli.terminal import INTERRUPTED, stdout

__all__ = ["compare"]


def compare(
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the runs, results.json and index.html.")] = Path(
        "comparison"
    ),
    *,
    jobs: Annotated[int, typer.Option(help="Processes, each of one thread on one core.", min=1)] = 1,
    assignments: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="PATH=VALUE", help='Change a value, as in teraflops=1 or only=["full","gated"].'),
    ] = None,
    plan: Annotated[bool, typer.Option("--plan", help="Say what would be run, and what it costs, and stop.")] = False,
) -> int:
    """Compare attention, objectives, times, spaces and guidance at equal compute. The same command goes on after a stop."""
    from reelflow.config import set_values
    from reelflow.recipes.compare import compare as run_comparison
    from reelflow.recipes.compare import comparison

    config = set_values(comparison(), assignments or [])
    if plan:
        table = Table("variant", "", "pixels", "tokens", "parameters", "GFLOP a step", "attention", "steps")
        for name, variant in config.chosen.items():
            cost = config.cost(variant)
            step = 3e-9 * config.batch_size * cost.flops
            table.add_row(
                *(name, variant.title, f"{variant.size}", f"{cost.num_tokens}", f"{cost.num_parameters:,}"),
                *(f"{step:.1f}", f"{cost.attention_flops / cost.flops:.0%}", f"{config.steps(variant)}"),
            )
        stdout().print(table)
        seeds, spent = len(config.seeds), sum(variant.budgets * config.teraflops for variant in config.chosen.values())
        print(f"{len(config.chosen) * seeds} runs, {seeds * spent:g} teraflops of training in all")
        return 0
    arguments = [part for assignment in assignments or [] for part in ("--set", assignment)]
    command = shlex.join(["reelflow", "compare", *arguments, "--jobs", str(jobs)])
    return 0 if run_comparison(config, out, jobs=jobs, console=stdout(), command=command) else INTERRUPTED
