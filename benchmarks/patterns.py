"""What attention patterns cost, forward and backward, against full 3D: measured, beside the count of pairs that meet.

Run: python benchmarks/patterns.py (OMP_NUM_THREADS=1 for one thread). A clip has T frames of S = side x side tokens.
First factorised attention (space, then time) over a range of S and T, then every pattern, through `attend_pattern` on
given queries, keys and values, and through whole blocks (norms, projections, rotation and MLP with it). Patterns are
timed in turn, medians are shown. Each row prints how many times as long full attention takes, and what the count says.
"""

import statistics
import time
from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

from reelflow.cli.main import keep_freed_memory
from reelflow.models.blocks import Attend, Branches, FeedForward, Streams, Widths, build_block
from reelflow.models.dit import DiTConfig
from reelflow.nn.patchify import Grid, Patch
from reelflow.nn.patterns import (
    Causal,
    Full,
    Gated,
    Pattern,
    Skip,
    Space,
    Time,
    Window,
    attend_pattern,
    attended_pairs,
)
from reelflow.nn.rope import grid_positions, rope_table
from reelflow.planning.cost import dit_cost
from reelflow.recipes.world import world

MODEL = world().dit.model
BATCH_TOKENS = 2048
SIDES, FRAMES = (4, 8, 16), (4, 8, 16)
GRIDS = (Grid(5, 4, 4), Grid(8, 8, 8), Grid(16, 16, 16))  # the first is that of `make demo`
SECONDS = 2.0  # per grid, at least

Patterns = tuple[Pattern, ...]  # one attention after another
Run = Callable[[], None]


def batch_of(grid: Grid) -> int:
    return max(1, BATCH_TOKENS // grid.num_tokens)


def all_patterns(grid: Grid) -> dict[str, Patterns]:
    t, h, w = (max(1, n // 2) for n in grid)
    return {
        "full": (Full(),),
        "factorised": (Space(), Time()),
        "gated": (Gated(),),
        "space": (Space(),),
        "time": (Time(),),
        "window, halves": (Window(t, h, w),),
        "the same, shifted": (Window(t, h, w, shift=(t // 2, h // 2, w // 2)),),
        "skip, stride 4": (Skip(4),),
        "causal": (Causal(),),
    }


def attention(patterns: Patterns, grid: Grid, dtype: torch.dtype) -> Run:
    generator = torch.Generator().manual_seed(0)
    shape = (batch_of(grid), MODEL.num_heads, grid.num_tokens, MODEL.dim // MODEL.num_heads)
    q, k, v = (torch.randn(shape, generator=generator).to(dtype).requires_grad_() for _ in range(3))
    alpha = torch.full((1, 1, 1), 0.5)

    def run() -> None:
        out = sum(attend_pattern(pattern, q, k, v, grid, alpha=alpha) for pattern in patterns)
        assert isinstance(out, Tensor)
        torch.autograd.grad(out.sum(), (q, k, v))

    return run


def layer(patterns: Patterns) -> Branches:
    return Branches((*(Attend(pattern) for pattern in patterns), FeedForward(ratio=3.0)))


def block(patterns: Patterns, grid: Grid) -> Run:
    """Run a block of the width of `make demo`, under bfloat16 autocast."""
    generator, batch, dim = torch.Generator().manual_seed(0), batch_of(grid), MODEL.dim
    module = build_block(layer(patterns), Widths(dim, MODEL.num_heads, dim, dim, MODEL.activation))
    video = torch.randn(batch, grid.num_tokens, dim, generator=generator).bfloat16().requires_grad_()
    vector = torch.randn(batch, 1, dim, generator=generator)
    context = torch.zeros(batch, 0, dim)
    rope = rope_table(grid_positions(*grid), MODEL.rope, theta=MODEL.theta).float()
    streams = Streams(video, context, vector, vector, rope, None, grid)

    def run() -> None:
        with torch.autocast("cpu", torch.bfloat16):
            out = module(streams)[0]
        torch.autograd.grad(out.sum(), (video, *module.parameters()), allow_unused=True)

    return run


def block_flops(patterns: Patterns, grid: Grid) -> int:
    """What `planning.cost` counts for one block, forward, one clip."""

    def flops(layers: tuple[Branches, ...]) -> int:
        config = DiTConfig(
            MODEL.in_channels,
            MODEL.dim,
            MODEL.num_heads,
            layers,
            Patch(1, 1, 1),
            MODEL.rope,
            activation=MODEL.activation,
        )
        return dit_cost(config, tuple(grid), 0).flops

    return flops((layer(patterns),)) - flops(())


def pairs_of(patterns: Patterns, grid: Grid) -> int:
    return sum(attended_pairs(pattern, grid) for pattern in patterns)


def seconds_of(runs: dict[str, Run]) -> dict[str, float]:
    """Return each run's median seconds, all taken in turn."""
    turns: list[list[float]] = []
    deadline = time.perf_counter() + SECONDS
    while len(turns) < 4 or time.perf_counter() < deadline:
        marks = [time.perf_counter()]
        for run in runs.values():
            run()
            marks.append(time.perf_counter())
        turns.append([b - a for a, b in pairwise(marks)])
    columns = zip(*turns[1:], strict=True)  # the first turn warms up
    return dict(zip(runs, map(statistics.median, columns), strict=True))


def factorised_against_full() -> None:
    print("\nFull over factorised attention: the count S T / (S + T), and measured\n")
    print(f"{'T':>4} {'S':>5} {'N':>6} {'clips':>6} {'S T / (S + T)':>14} {'bfloat16':>9} {'float32':>9}")
    for frames in FRAMES:
        for side in SIDES:
            grid = Grid(frames, side, side)
            ratios = []
            for dtype in (torch.bfloat16, torch.float32):
                runs = {name: attention(all_patterns(grid)[name], grid, dtype) for name in ("full", "factorised")}
                seconds = seconds_of(runs)
                ratios.append(seconds["full"] / seconds["factorised"])
            space = side * side
            print(
                f"{frames:>4} {space:>5} {grid.num_tokens:>6} {batch_of(grid):>6}"
                f" {space * frames / (space + frames):>14.2f} {ratios[0]:>9.2f} {ratios[1]:>9.2f}",
                flush=True,
            )


def every_pattern(grid: Grid) -> None:
    patterns = all_patterns(grid)
    bf16, fp32 = (
        seconds_of({name: attention(value, grid, dtype) for name, value in patterns.items()})
        for dtype in (torch.bfloat16, torch.float32)
    )
    whole = seconds_of({name: block(value, grid) for name, value in patterns.items()})
    pairs = {name: pairs_of(value, grid) for name, value in patterns.items()}
    flops = {name: block_flops(value, grid) for name, value in patterns.items()}
    clips = batch_of(grid)
    print(
        f"\nT, H, W = {tuple(grid)}, {grid.num_tokens} tokens, batches of {clips}; ms per batch, x = full over this\n"
    )
    print(
        f"{'pattern':>18} {'pairs':>11} {'count x':>8} {'bf16 ms':>9} {'x':>6} {'fp32 ms':>9} {'x':>6}"
        f" {'block count x':>14} {'block ms':>9} {'x':>6} {'GFLOP/s':>8}"
    )
    for name in patterns:
        print(
            f"{name:>18} {pairs[name]:>11,} {pairs['full'] / pairs[name]:>8.2f}"
            f" {1e3 * bf16[name]:>9.2f} {bf16['full'] / bf16[name]:>6.2f}"
            f" {1e3 * fp32[name]:>9.2f} {fp32['full'] / fp32[name]:>6.2f}"
            f" {flops['full'] / flops[name]:>14.2f} {1e3 * whole[name]:>9.2f} {whole['full'] / whole[name]:>6.2f}"
            f" {3 * clips * flops[name] / whole[name] / 1e9:>8.0f}",
            flush=True,
        )


def main() -> None:
    keep_freed_memory()
    torch.manual_seed(0)
    print(
        f"{MODEL.num_heads} heads of {MODEL.dim // MODEL.num_heads}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    )
    print(
        "FLOP = 3 * clips * 4 * D * pairs of query and key that meet: two products of 2 D a pair, three times with the"
    )
    print("gradients; a block adds 3 * clips * 2 * tokens * weights of its linear maps (planning/cost.py)")
    factorised_against_full()
    for grid in GRIDS:
        every_pattern(grid)


if __name__ == "__main__":
    main()
