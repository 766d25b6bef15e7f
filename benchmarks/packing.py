"""A training step on clips of many shapes: rows of packed clips against buckets of equal tokens.

Run: python benchmarks/packing.py. The mix: 35 % images; videos of 2 to 16 latent frames, their number
log-normal with median 5; 40 to 120 tokens a frame, log-uniform; width / height 16:9 45 %, 9:16 18 %, 4:3 15 %, 1:1 12 %,
3:4 5 %, 21:9 5 %; 16 tokens of text each. Its histogram is printed.

Nothing is cropped or resized, so a clip that is no bucket's shape is padded to the smallest bucket that holds it. Buckets
are tuned: of 12 ways to round shapes up (among them none at all), the one with the highest predicted throughput is
measured. To their favour they attend without the mask that padding needs. The fewer the clips, the more buckets end in a
small batch: what is expected of a larger set is printed too. Processes draw their batches independently; if all took the
same bucket at each step none would wait, and no step would see more than one shape.

    useful tokens       tokens of the clips, without padding and text
    one process         useful tokens / seconds, over all batches
    R processes         useful tokens / sum over steps of the slowest process's seconds: gradients are summed when all are
                        there. The batches of a step are timed one after the other on this machine
    seconds             of the processor, on one thread: other work on the machine disturbs them less than the clock's
    padding             1 - useful tokens / video tokens computed
"""

import math
import statistics
import time
from functools import cache

import torch
from torch import Tensor

from reelflow.data.loader import Buckets, Packed, Plan, Size
from reelflow.models.blocks import Dual, Single
from reelflow.models.condition import Condition
from reelflow.models.context import Layers
from reelflow.models.dit import DiTConfig, VideoDiT
from reelflow.models.packing import Clip, pack
from reelflow.planning.cost import dit_cost

ITEMS, MANY = 4_000, 20_000
PROCESSES, STEPS, TURNS = 8, 2, 3
TOKENS = 3072  # of a batch, text among them
TEXT, TEXT_DIM, CHANNELS = 16, 64, 8
ASPECTS = {16 / 9: 0.45, 9 / 16: 0.18, 4 / 3: 0.15, 1.0: 0.12, 3 / 4: 0.05, 21 / 9: 0.05}
TIME_EDGES = {"1 2 4 8 16": (1, 2, 4, 8, 16), "1 2 3 4 6 8 12 16": (1, 2, 3, 4, 6, 8, 12, 16), "every": range(1, 17)}
CONFIG = DiTConfig(
    in_channels=CHANNELS,
    dim=192,
    num_heads=3,
    layers=(Dual(), Single(), Single()),
    context=Layers(TEXT_DIM),
)
Shape = tuple[int, int, int]  # tokens


def draw_mix(count: int) -> list[Shape]:
    generator = torch.Generator().manual_seed(0)
    still = torch.rand(count, generator=generator) < 0.35
    frames = (5 * torch.exp(0.6 * torch.randn(count, generator=generator))).round().clamp(2, 16)
    areas = 40 * 3 ** torch.rand(count, generator=generator)
    picks = torch.multinomial(torch.tensor(list(ASPECTS.values())), count, replacement=True, generator=generator)
    aspects = torch.tensor(list(ASPECTS))[picks]
    heights = (areas / aspects).sqrt().round()
    widths = (areas / heights).round()
    rows = torch.stack([torch.where(still, 1, frames), heights, widths], dim=1).int().tolist()
    return [(row[0], row[1], row[2]) for row in rows]


@cache
def flops(shape: Shape) -> float:
    """Predict one training step on one clip."""
    t, h, w = shape
    return 3.0 * dit_cost(CONFIG, (t, 2 * h, 2 * w), TEXT).flops


def bucket_of(shape: Shape, edges: tuple[int, ...] | range, step: int) -> Shape:
    t, h, w = shape
    return next(edge for edge in edges if edge >= t), -(-h // step) * step, -(-w // step) * step


def plan_of(grouping: Packed | Buckets, shapes: list[Shape]) -> list[list[int]]:
    plan = Plan(grouping, [Size(shape, math.prod(shape) + TEXT, flops(shape)) for shape in shapes])
    return [batch.tolist() for batch in plan.epoch(torch.Generator().manual_seed(1))]


def predicted(batches: list[list[int]], useful: list[Shape], computed: list[Shape]) -> float:
    """Useful tokens over the slowest process's FLOPs, step by step."""
    steps = [batches[k : k + PROCESSES] for k in range(0, len(batches) - PROCESSES + 1, PROCESSES)]
    slowest = sum(max(sum(flops(computed[i]) for i in batch) for batch in step) for step in steps)
    return sum(math.prod(useful[i]) for step in steps for batch in step for i in batch) / slowest


def plans_of(shapes: list[Shape]) -> tuple[dict[bool, list[list[int]]], dict[bool, list[Shape]]]:
    """Return the batches, packed and not, of an epoch, and the shapes that are computed; and say what is expected."""
    ways = {
        (name, step): [bucket_of(shape, edges, step) for shape in shapes]
        for name, edges in TIME_EDGES.items()
        for step in (1, 2, 3, 4)
    }
    ways = {way: padded for way, padded in ways.items() if max(map(math.prod, padded)) + TEXT <= TOKENS}
    plans = {way: plan_of(Buckets(TOKENS), padded) for way, padded in ways.items()}
    best = max(plans, key=lambda way: predicted(plans[way], shapes, ways[way]))
    rows, computed = {True: plan_of(Packed(TOKENS), shapes), False: plans[best]}, {True: shapes, False: ways[best]}
    told = [predicted(rows[packed], shapes, computed[packed]) for packed in (True, False)]
    print(
        f"{len(shapes):,} clips: frames up to {best[0]}, sides up to multiples of {best[1]}, {len(set(ways[best]))} buckets; "
        f"predicted packed / buckets for {PROCESSES} processes: {told[0] / told[1]:.2f}"
    )
    return rows, computed


def normal(*size: int) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(0))


class Trainer:
    """A network and its optimiser."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.model = VideoDiT(CONFIG)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, foreach=True)

    def step(self, shapes: list[Shape], *, packed: bool) -> float:
        """Return the seconds of one step."""
        extents = [(t, 2 * h, 2 * w) for t, h, w in shapes]
        if packed:
            clips = [(normal(1, CHANNELS, *extent), torch.rand(1), normal(1, TEXT, TEXT_DIM)) for extent in extents]
        else:
            count = len(shapes)
            clips = [(normal(count, CHANNELS, *extents[0]), torch.rand(count), normal(count, TEXT, TEXT_DIM))]
        asked = [Clip(x, t, Condition(context=text)) for x, t, text in clips] if packed else []
        start = time.process_time()
        if packed:
            outputs = self.model.forward_packed(pack(asked))
        else:
            outputs = (self.model(clips[0][0], clips[0][1], Condition(context=clips[0][2])),)
        pairs = zip(outputs, clips, strict=True)
        loss = torch.stack([(y - x).square().mean() for y, (x, _, _) in pairs]).mean()
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return time.process_time() - start


def main() -> None:
    torch.set_num_threads(1)
    shapes = draw_mix(ITEMS)
    tokens = sorted(math.prod(shape) for shape in shapes)
    print(f"{ITEMS} clips of {len(set(shapes))} shapes; tokens of a clip:")
    for low in range(0, tokens[-1], 200):
        share = sum(low < n <= low + 200 for n in tokens) / ITEMS
        print(f"  {low + 1:5} to {low + 200:5}  {share:6.1%}  {'#' * round(80 * share)}")
    rows, computed = plans_of(shapes)
    trainer, count = Trainer(), PROCESSES * STEPS
    told = [predicted(rows[packed][:count], shapes, computed[packed]) for packed in (True, False)]
    print(f"of the batches that are timed: {told[0] / told[1]:.2f}")
    seconds: dict[tuple[bool, int], list[float]] = {}
    for turn in range(TURNS + 1):  # the first warms up
        for number in range(count if turn else 2):
            for packed in (True, False):
                batch = [computed[packed][i] for i in rows[packed][number]]
                seconds.setdefault((packed, number), []).append(trainer.step(batch, packed=packed))
    print(f"{count} batches each, {TURNS} turns, medians; torch {torch.__version__}\n")
    print(
        f"{'':>8} {'tokens a batch':>14} {'padding':>8} {'1 process':>10} {PROCESSES:>3} processes  (useful tokens/s)"
    )
    rates = {}
    for packed in (True, False):
        useful = sum(math.prod(shapes[i]) for batch in rows[packed][:count] for i in batch)
        spent = sum(math.prod(computed[packed][i]) for batch in rows[packed][:count] for i in batch)
        took = [statistics.median(seconds[packed, number][-TURNS:]) for number in range(count)]
        slowest = sum(max(took[k : k + PROCESSES]) for k in range(0, count, PROCESSES))
        rates[packed] = useful / sum(took), useful / slowest
        name = "packed" if packed else "buckets"
        print(
            f"{name:>8} {useful / count:14,.0f} {1 - useful / spent:8.1%} {rates[packed][0]:10,.0f} {rates[packed][1]:13,.0f}"
        )
    ratios = [a / b for a, b in zip(rates[True], rates[False], strict=True)]
    print(f"{'ratio':>8} {'':14} {'':8} {ratios[0]:10.2f} {ratios[1]:13.2f}\n")
    plans_of(draw_mix(MANY))


if __name__ == "__main__":
    main()
