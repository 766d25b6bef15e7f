"""Is what `reelflow plan` says true? Memory and time of training steps, predicted and measured, on a grid of networks.

Run: python benchmarks/plan.py [CASE ...] [--only memory|time] [--again]. Every case is predicted in a process of its own and
carried out in another: a few steps of the real training loop on random data, with the loader, the average and the log.
Measured are the most that the process ever held (VmHWM, all of Python among it) and the median step. What is predicted is said
in `reelflow.planning.step` and `reelflow.planning.rates`; what a process takes of its own, and what a call costs, come from a
network that is none of these. Results go to docs/planning.json as they come, so that a run goes on where another stopped, and
to the table in docs/planning.md. Times are to be taken on a quiet machine.
"""

import argparse
import json
import os
import statistics
import tempfile
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from reelflow.cli.main import keep_freed_memory
from reelflow.config import set_values
from reelflow.data.folder import ClipSpec
from reelflow.models.blocks import Attend, Branches, Cross, Dual, FeedForward, Layer, Single
from reelflow.models.vae import Stage, staged
from reelflow.nn.patterns import Space, Time
from reelflow.planning.rates import Rates
from reelflow.recipes import runs
from reelflow.recipes.forecast import Trained, forecast, step_of
from reelflow.recipes.recipe import Recipe
from reelflow.recipes.rehearsal import measured_media, measured_rates, peak_bytes, process_bytes, rehearse
from reelflow.recipes.vdit import vdit_world
from reelflow.recipes.world import world
from reelflow.training.flow import FlowTask

DOCS = Path(__file__).parents[1] / "docs"
RESULTS, PAGE = DOCS / "planning.json", DOCS / "planning.md"
STEPS = 5  # of which three are measured
FACTORISED = (
    Branches((Attend(Space()), Cross(), FeedForward())),
    Branches((Attend(Time()), Cross(), FeedForward())),
)


def dit(
    dim: int,
    layers: tuple[Layer, ...],
    latents: tuple[int, int, int],
    batch: int,
    *,
    accumulate: int = 1,
    precision: str = "fp32",
    muon: bool = False,
    ema: bool = True,
    activation: str = "gelu_tanh",
) -> Recipe:
    base = world()
    t, h, w = latents
    values: Any = {"precision": precision, "ema_decay": 0.99 if ema else None, "accumulate": accumulate}
    optimizer = replace(base.dit.training.optimizer, muon_lr=0.02 if muon else None, muon_every=1)
    training = replace(base.dit.training, batch_size=batch, optimizer=optimizer, checkpoint_every=0, **values)
    heads: Any = {"dim": dim, "num_heads": dim // 64, "rope": (16, 24, 24), "activation": activation}
    model = replace(base.dit.model, layers=layers, **heads)
    clip = ClipSpec(num_frames=4 * (t - 1) + 1, height=8 * h, width=8 * w, fps=8.0)
    return replace(base, clip=clip, dit=replace(base.dit, model=model, training=training))


def vae(
    widths: tuple[int, int, int],
    batch: int,
    frames: int,
    size: int,
    *,
    accumulate: int = 1,
    precision: str = "fp32",
    muon: bool = False,
    ema: bool = True,
    factorised: bool = True,
) -> Recipe:
    base = world()
    a, b, c = widths
    model = staged(
        latent_channels=16,
        patch=4,
        conv="factorised" if factorised else "full",
        resample_kernel=1,
        encoder=(Stage(a, 0, time=2), Stage(b, 1, space=2, time=2), Stage(c, 2)),
        decoder=(Stage(c, 3), Stage(b, 3, space=2, time=2), Stage(a, 1, time=2)),
    )
    values: Any = {"precision": precision, "ema_decay": 0.99 if ema else None, "accumulate": accumulate}
    optimizer = replace(base.vae.training.optimizer, muon_lr=0.02 if muon else None)
    training = replace(base.vae.training, batch_size=batch, optimizer=optimizer, checkpoint_every=0, **values)
    loss = replace(base.vae.loss, crop_frames=frames, crop_size=size, image_fraction=0.0)
    clip = replace(base.clip, num_frames=max(17, frames), height=max(64, size), width=max(64, size))
    return replace(base, clip=clip, vae=replace(base.vae, model=model, loss=loss, training=training))


def joint(single: int) -> tuple[Layer, ...]:
    return Dual(), *single * (Single(),)


CASES: dict[str, tuple[Trained, Recipe]] = {
    "dit 192 x 7, 80 tokens x 16, bf16, Muon": (
        "transformer",
        dit(192, joint(6), (5, 8, 8), 16, precision="bf16", muon=True, activation="relu2"),
    ),
    "dit 192 x 7, 80 tokens x 4": ("transformer", dit(192, joint(6), (5, 8, 8), 4)),
    "dit 384 x 5, 320 tokens x 8": ("transformer", dit(384, joint(4), (5, 16, 16), 8)),
    "dit 384 x 5, 320 tokens x 8, bf16": ("transformer", dit(384, joint(4), (5, 16, 16), 8, precision="bf16")),
    "dit 384 x 5, 320 tokens x 2 x 4 batches, bf16": (
        "transformer",
        dit(384, joint(4), (5, 16, 16), 2, accumulate=4, precision="bf16"),
    ),
    "dit 512 x 4, 64 tokens x 16, Muon": ("transformer", dit(512, joint(3), (1, 16, 16), 16, muon=True)),
    "dit 512 x 8, 80 tokens x 8, bf16, Muon, no average": (
        "transformer",
        dit(512, joint(7), (5, 8, 8), 8, precision="bf16", muon=True, ema=False),
    ),
    "dit 256 x 12, 180 tokens x 4": ("transformer", dit(256, joint(11), (5, 12, 12), 4)),
    "dit 256 x 3, 1280 tokens x 2": ("transformer", dit(256, joint(2), (5, 32, 32), 2)),
    "dit 256 x 3, 1280 tokens x 2, bf16": ("transformer", dit(256, joint(2), (5, 32, 32), 2, precision="bf16")),
    "dit 768 x 4, 80 tokens x 4": ("transformer", dit(768, joint(3), (5, 8, 8), 4)),
    "dit 768 x 4, 320 tokens x 2, bf16, Muon": (
        "transformer",
        dit(768, joint(3), (5, 16, 16), 2, precision="bf16", muon=True),
    ),
    "dit 128 x 3, 720 tokens x 8, no average": ("transformer", dit(128, joint(2), (5, 24, 24), 8, ema=False)),
    "dit 256 x 6 factorised, 320 tokens x 4": ("transformer", dit(256, 3 * FACTORISED, (5, 16, 16), 4)),
    "dit 384 x 8 factorised, 320 tokens x 4, bf16, SwiGLU": (
        "transformer",
        dit(384, 4 * FACTORISED, (5, 16, 16), 4, precision="bf16", activation="swiglu"),
    ),
    "dit 320 x 6 factorised, 720 tokens x 2 x 2 batches": (
        "transformer",
        dit(320, 3 * FACTORISED, (5, 24, 24), 2, accumulate=2),
    ),
    "vae 128, crops of 9 x 32 x 32 x 12, bf16, Muon": (
        "autoencoder",
        vae((128, 128, 256), 12, 9, 32, precision="bf16", muon=True),
    ),
    "vae 128, crops of 9 x 32 x 32 x 4": ("autoencoder", vae((128, 128, 256), 4, 9, 32)),
    "vae 128, crops of 17 x 64 x 64 x 2, bf16": ("autoencoder", vae((128, 128, 256), 2, 17, 64, precision="bf16")),
    "vae 64, crops of 17 x 64 x 64 x 4": ("autoencoder", vae((64, 64, 128), 4, 17, 64)),
    "vae 64 full kernels, crops of 9 x 64 x 64 x 4": (
        "autoencoder",
        vae((64, 64, 128), 4, 9, 64, factorised=False),
    ),
    "vae 96, crops of 9 x 64 x 64 x 2 x 2 batches, Muon, no average": (
        "autoencoder",
        vae((96, 96, 192), 2, 9, 64, accumulate=2, muon=True, ema=False),
    ),
    "vae 256, crops of 5 x 32 x 32 x 8, bf16": ("autoencoder", vae((256, 256, 512), 8, 5, 32, precision="bf16")),
}


BRIEF = [
    f"{network}.training.{value}"
    for network in ("vae", "dit")
    for value in ("steps=4", "validate_every=2", "preview_every=4", "checkpoint_every=2")
]
CLIPS = ["data.num_clips=400", "data.num_validation=32", "vae.loss.image_fraction=0.5"]  # so that a few steps have some
LARGER = ["clip.num_frames=33", "clip.height=96", "clip.width=96"]
RENDERED = ["data.world.num_frames=33", "data.world.height=96", "data.world.width=96"]
RUNS: dict[str, Recipe] = {
    "world, 400 clips": set_values(world(), [*CLIPS, *BRIEF]),
    "world, 400 clips of 33 x 96 x 96, in float32": set_values(
        world(),
        [*CLIPS, *BRIEF, *LARGER, *RENDERED, "vae.training.precision=fp32", "dit.training.precision=fp32"],
    ),
    "vdit-world, 400 clips": set_values(vdit_world(), [*CLIPS, *BRIEF]),
}


def measured(name: str, threads: int) -> int:
    start(threads)
    trained, recipe = CASES[name]
    return rehearse(recipe, trained, steps=3).peak


def start(threads: int) -> None:
    """Do what the command line does first."""
    torch.set_num_threads(threads)
    keep_freed_memory()


def held(name: str, process: dict[str, int], threads: int) -> dict[str, dict[str, float]]:
    """Return the peak of a case, predicted here and measured in a process of its own."""
    trained, recipe = CASES[name]
    training = (recipe.vae if trained == "autoencoder" else recipe.dit).training
    if training.precision not in process:
        process[training.precision] = process_bytes(training.precision)
    step = step_of(recipe, trained)
    peak = process[training.precision] + step.run_peak(checkpoints=bool(training.checkpoint_every))
    return {"predicted": {"peak": peak}, "measured": {"peak": apart(measured, name, threads)}}


def timed(name: str, calls: dict[str, float]) -> dict[str, dict[str, float]]:
    """Return the seconds of a step, every operation of it timed again between any two steps that are measured."""
    trained, recipe = CASES[name]
    precision = (recipe.vae if trained == "autoencoder" else recipe.dit).training.precision
    if precision not in calls:
        calls[precision] = measured_rates(precision).call_seconds
    step, sums = step_of(recipe, trained), []

    def between() -> None:
        rates = Rates(calls[precision])
        sums.append(rates.seconds(step.passes) + rates.seconds(step.moves, step.num_calls))

    found = rehearse(recipe, trained, steps=STEPS, between=between)
    return {
        "predicted": {"seconds": statistics.median(sums), "call": calls[precision]},
        "measured": {"seconds": statistics.median(found.seconds)},
    }


def carried_out(name: str, threads: int) -> dict[str, int]:
    """Carry a run out and return the most that the process had in memory at each stage."""
    start(threads)
    found: dict[str, int] = {}

    def watched(stage: str, function: Callable[..., Any], *arguments: Any, **values: Any) -> Any:
        Path("/proc/self/clear_refs").write_text("5")
        try:
            return function(*arguments, **values)
        finally:
            found[stage] = max(found.get(stage, 0), peak_bytes())

    for stage, name_in_runs in {
        "render": "render_world",
        "decode": "build_clip_store",
        "latents": "write_store",
    }.items():
        setattr(runs, name_in_runs, partial(watched, stage, getattr(runs, name_in_runs)))
    trained = runs.train

    def train(task: Any, *arguments: Any, **values: Any) -> Any:
        stage = "transformer" if isinstance(task, FlowTask) else "autoencoder"
        return watched(stage, trained, task, *arguments, **values)

    vars(runs)["train"] = train
    with tempfile.TemporaryDirectory() as folder:
        runs.run(RUNS[name], Path(folder) / "run", console=Console(quiet=True))
    return found


def foretold(name: str) -> dict[str, int]:
    """Return what `carried_out` should find; times are not asked for."""
    recipe = RUNS[name]
    rates = Rates(0.0, lambda kernel: 0.0)
    told = forecast(recipe, rates, process_bytes(recipe.dit.training.precision), measured_media(recipe))
    found: dict[str, int] = {}
    for stage, resident in zip(told.stages, told.resident, strict=True):
        found[stage.name] = max(found.get(stage.name, 0), resident)
    return found


def apart(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function in a process that has done nothing but import."""
    with get_context("spawn").Pool(1) as pool:
        return pool.apply(function, arguments)


def table_of_runs(results: dict[str, dict[str, dict[str, float]]]) -> str:
    rows = [("run", "stage", "predicted MiB", "measured MiB", "ratio"), 5 * ("---",)]
    for name, found in results.items():
        for stage, measured in found["measured"].items():
            predicted = found["predicted"][stage]
            cells = (
                name,
                stage,
                f"{predicted / 2**20:,.0f}",
                f"{measured / 2**20:,.0f}",
                f"{predicted / measured:.2f}",
            )
            rows.append(cells)
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def table(results: dict[str, dict[str, dict[str, float]]]) -> str:
    heads = ("network and batch", "predicted MiB", "measured MiB", "ratio", "predicted ms", "measured ms", "ratio")
    rows = [heads, ("---",) * len(heads)]
    errors: dict[str, list[float]] = {"peak": [], "seconds": []}
    for name, found in results.items():
        cells = [name]
        for kind, scale in (("peak", 2.0**-20), ("seconds", 1e3)):
            pair = [found.get(side, {}).get(kind) for side in ("predicted", "measured")]
            if pair[0] is None or pair[1] is None:
                cells += ["", "", ""]
                continue
            errors[kind].append(pair[0] / pair[1])
            cells += [f"{scale * pair[0]:,.0f}", f"{scale * pair[1]:,.0f}", f"{pair[0] / pair[1]:.2f}"]
        rows.append(tuple(cells))
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    for kind, title in (("peak", "memory"), ("seconds", "time")):
        if ratios := errors[kind]:
            off = sorted(abs(ratio - 1) for ratio in ratios)
            within = sum(each <= 0.15 for each in off)
            said = (
                f"{within} of {len(off)} within 15 %, median error {statistics.median(off):.1%}, largest {off[-1]:.1%}"
            )
            lines.append(f"\n{title[0].upper()}{title[1:]}: {said}.")
    return "\n".join(lines)


def write(results: dict[str, Any]) -> None:
    partial = RESULTS.with_suffix(".partial")
    partial.write_text(json.dumps(results, indent=1) + "\n")
    os.replace(partial, RESULTS)
    for mark, text in (("table", table(results["steps"])), ("runs", table_of_runs(results["runs"]))):
        before, rest = PAGE.read_text().split(f"<!-- {mark} -->\n")
        _, after = rest.split("<!-- end -->\n", maxsplit=1)
        PAGE.write_text(f"{before}<!-- {mark} -->\n{text}\n<!-- end -->\n{after}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("cases", nargs="*", metavar="CASE", help="words of their names; all unless said")
    parser.add_argument("--only", choices=("memory", "time", "runs"), help="what to predict and measure")
    parser.add_argument("--again", action="store_true", help="do what is done already again")
    parser.add_argument("--threads", type=int, default=1)
    asked = parser.parse_args()
    start(asked.threads)
    results = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {"steps": {}, "runs": {}}
    process: dict[str, int] = {}
    calls: dict[str, float] = {}
    for kind, find in (
        ("peak", lambda name: held(name, process, asked.threads)),
        ("seconds", lambda name: timed(name, calls)),
    ):
        if asked.only not in (None, {"peak": "memory", "seconds": "time"}[kind]):
            continue
        for name in CASES:
            row = results["steps"].setdefault(name, {"predicted": {}, "measured": {}})
            done = not asked.again and all(kind in values for values in row.values())
            if done or (asked.cases and not any(word in name for word in asked.cases)):
                continue
            for side, values in find(name).items():
                row[side] |= values
            write(results)
            print(table({name: row}).splitlines()[2], flush=True)
    for name in RUNS if asked.only in (None, "runs") else ():
        done = not asked.again and name in results["runs"]
        if not done and (not asked.cases or any(word in name for word in asked.cases)):
            results["runs"][name] = {"predicted": foretold(name), "measured": apart(carried_out, name, asked.threads)}
            write(results)
    print(table(results["steps"]))
    print(table_of_runs(results["runs"]))


if __name__ == "__main__":
    main()
