"""Published autoencoders against diffusers: encode and decode, float32, eager, the same weights and the same results.

Run: python benchmarks/vae.py [FAMILY ...] [--threads N] [--rounds N] [--lengths OUT.svg]. Networks of each family's shape at a
fraction of its width. Ours and theirs run in turn; medians are shown, and the median of each round's ratios. On one
thread seconds are those of the process. Memory is the most that results of operations take at once, beside weights and
inputs; what kernels use inside themselves is not in it. diffusers' windows in time are switched off where they would
change the result. Where a budget keeps the result exact (Wan), ours runs a second time, "tight": in the memory that diffusers
takes, or, where the plan says that this is too little, the least above it. --lengths OUT.svg draws time and memory of
Wan's against a clip's length.
"""

import argparse
import math
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import diffusers
import torch
from torch import Tensor, nn

from reelflow.cli.main import keep_freed_memory
from reelflow.errors import ConfigError
from reelflow.families.coder import Coder
from reelflow.families.cogvideox_vae import COGVIDEOX_VAE
from reelflow.families.hunyuan_vae import HUNYUAN_VAE
from reelflow.families.ltx_vae import LTX_VAE
from reelflow.families.mochi_vae import MOCHI_VAE
from reelflow.families.wan_vae import WAN_VAE
from reelflow.models.vae import CausalVAE
from reelflow.models.weighing import Weighing
from reelflow.recipes.plot import Series, line_plot_svg, svg_file

LENGTHS = (17, 65, 257, 1025)


@dataclass(frozen=True)
class Case:
    """One family at the size of this benchmark."""

    family: Coder
    reference: type[nn.Module]
    arguments: dict[str, Any]
    clip: tuple[int, int, int]  # frames, height, width
    whole: dict[str, bool] | None = None  # attributes of the reference that make it take a clip whole


WINDOWS = {"use_framewise_encoding": False, "use_framewise_decoding": False}
CASES = {
    "wan": Case(WAN_VAE, diffusers.AutoencoderKLWan, {"base_dim": 32}, (81, 64, 64)),
    "hunyuan": Case(
        HUNYUAN_VAE,
        diffusers.AutoencoderKLHunyuanVideo,
        {"block_out_channels": [32, 64, 128, 128]},
        (33, 64, 64),
        WINDOWS,
    ),
    "cogvideox": Case(
        COGVIDEOX_VAE, diffusers.AutoencoderKLCogVideoX, {"block_out_channels": [64, 128, 128, 256]}, (17, 72, 72)
    ),
    "mochi": Case(
        MOCHI_VAE,
        diffusers.AutoencoderKLMochi,
        {"encoder_block_out_channels": [32, 64, 128, 192], "decoder_block_out_channels": [64, 128, 128, 192]},
        (31, 64, 64),
        WINDOWS,
    ),
    "ltx": Case(
        LTX_VAE,
        diffusers.AutoencoderKLLTXVideo,
        {"block_out_channels": [64, 128, 256, 256], "decoder_block_out_channels": [64, 128, 256, 256]},
        (33, 128, 128),
        WINDOWS,
    ),
}


def sides(case: Case) -> tuple[CausalVAE, nn.Module]:
    """Build both, with the same random weights."""
    torch.manual_seed(0)
    reference = case.reference(**case.arguments).eval()
    for name, value in (case.whole or {}).items():
        setattr(reference, name, value)
    vae, state = CausalVAE(case.family.read(case.arguments)).eval(), reference.state_dict()
    ours = vae.state_dict()
    for row in case.family.weights(vae.config):
        for name, value in row.to_ours(state).items():
            ours[name].copy_(value)
    return vae, reference


def clock() -> float:
    """Return seconds: of this process where one thread works, so that others on the machine count for less."""
    return time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()


def memory(run: Callable[[], Tensor]) -> float:
    """Return the MiB that results of operations take at once."""
    with Weighing() as weighing:
        run()
    return weighing.peak / 2**20


Run = Callable[[], Tensor]


class Row(NamedTuple):
    """Seconds and MiB of ours and of theirs, the median of the rounds' ratios, and how far the results are apart."""

    seconds: list[float]
    ratio: float
    peaks: list[float]
    error: float


def run_of(vae: CausalVAE, kind: str, x: Tensor, budget: int | None) -> Run:
    """Return our encoding or decoding, whole or within a budget."""
    if kind == "encode":
        return lambda: vae.encode(x, memory=budget).mean
    return lambda: vae.decode(x, memory=budget).clamp(-1, 1)


def least(vae: CausalVAE, kind: str, x: Tensor, budget: int) -> int:
    """Return the least budget from this one on, to 5 %, within which the result is exact."""
    plan = vae.plan_encode if kind == "encode" else vae.plan_decode
    while True:
        with suppress(ConfigError):  # nothing fits
            if plan(x.shape, budget).exact:
                return budget
        budget = int(1.05 * budget)


def rows_of(case: Case, rounds: int, *, tight: bool) -> Iterator[tuple[str, str, Row]]:
    """Encode and decode, whole, and where asked within the reference's memory."""
    vae, reference = sides(case)
    generator = torch.Generator().manual_seed(1)
    clip = torch.rand(1, 3, *case.clip, generator=generator) * 2 - 1
    latents = torch.randn(1, *vae.config.latent_shape(*case.clip), generator=generator)
    std, mean = (statistic.view(1, -1, 1, 1, 1) for statistic in (vae.latent_std, vae.latent_mean))
    given = latents * std + mean
    theirs: dict[str, Run] = {
        "encode": lambda: (reference.encode(clip).latent_dist.mean - mean) / std,
        "decode": lambda: reference.decode(given).sample.clamp(-1, 1),
    }
    for kind, x in (("encode", clip), ("decode", latents)):
        peak = memory(theirs[kind])
        for budget in (None, least(vae, kind, x, int(peak * 2**20))) if tight else (None,):
            ours = run_of(vae, kind, x, budget)
            error = (ours() - theirs[kind]()).abs().max().item()
            measured = [[seconds(run) for run in (ours, theirs[kind])] for _ in range(rounds)]
            medians = [statistics.median(column) for column in zip(*measured, strict=True)]
            ratio = statistics.median(b / a for a, b in measured)
            yield kind, "whole" if budget is None else "tight", Row(medians, ratio, [memory(ours), peak], error)


def seconds(run: Run) -> float:
    """Return what a run takes."""
    start = clock()
    run()
    return clock() - start


def show(name: str, case: Case, kind: str, way: str, row: Row) -> None:
    """Print a row."""
    shape = " x ".join(map(str, case.clip))
    print(
        f"{name:>10} {kind:>7} {way:>6} {shape:>15} {row.seconds[0]:>8.2f} {row.seconds[1]:>8.2f} {row.ratio:>12.2f} "
        f"{row.peaks[0]:>9.0f} {row.peaks[1]:>9.0f} {row.error:>10.0e}",
        flush=True,
    )


def draw(case: Case, out: Path, rounds: int) -> None:
    """Run clips of rising length, and draw seconds and MiB of encoding and decoding."""
    lines: dict[str, list[tuple[float, float, float]]] = {}
    for length in LENGTHS:
        longer = replace(case, clip=(length, 32, 32))
        for kind, way, row in rows_of(longer, rounds, tight=True):
            show("wan", longer, kind, way, row)
            for who, second, peak in zip((f"reelflow, {way}", "diffusers"), row.seconds, row.peaks, strict=True):
                if who != "diffusers" or way == "tight":
                    lines.setdefault(f"{kind}: {who}", []).append((length, second, peak))
    for place, what in ((1, "seconds"), (2, "MiB")):
        series = [Series(name, [(math.log2(p[0]), p[place]) for p in points]) for name, points in lines.items()]
        svg = line_plot_svg(
            series,
            x_label="log2 of frames (17 to 1,025)",
            y_label=what,
            log_y=True,
            title=f"{what}, Wan 2.1's shape, 32 x 32",
            size=(430, 300),
        )
        out.with_name(f"{out.stem}-{what.lower()}{out.suffix}").write_text(svg_file(svg), encoding="utf-8")


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("families", nargs="*", metavar="FAMILY", help=f"of {', '.join(CASES)}; all unless named")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--lengths", type=Path, metavar="OUT.svg", help=f"clips of {', '.join(map(str, LENGTHS))} frames"
    )
    arguments = parser.parse_args()
    if unknown := set(arguments.families) - CASES.keys():
        parser.error(f"unknown: {', '.join(sorted(unknown))}; known: {', '.join(CASES)}")
    torch.set_num_threads(arguments.threads)
    keep_freed_memory()
    print(f"{arguments.threads} threads, torch {torch.__version__}, diffusers {diffusers.__version__}\n")
    heads = f"{'ours s':>8} {'theirs s':>8} {'theirs/ours':>12} {'ours MiB':>9} {'theirs MiB':>9} {'difference':>10}"
    print(f"{'':>10} {'':>7} {'ours':>6} {'clip':>15} {heads}")
    if arguments.lengths:
        return draw(CASES["wan"], arguments.lengths, arguments.rounds)
    for name in arguments.families or CASES:
        for kind, way, row in rows_of(CASES[name], arguments.rounds, tight=name == "wan"):
            show(name, CASES[name], kind, way, row)
    return None


if __name__ == "__main__":
    main()
