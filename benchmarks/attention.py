"""Attention as a score matrix against torch's fused kernel, forward and backward: where should `attend` switch?

Run: python benchmarks/attention.py (OMP_NUM_THREADS=1 for one thread). The two are timed in turn, medians are shown.
"""

import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from reelflow.nn import attention

HEADS, HEAD_DIM, BATCH_TOKENS = 4, 64, 3000  # as in the transformer of `make demo`
TOKENS = (90, 330, 770, 1300)
SECONDS = 3.0  # per row


def batch_of(num_tokens: int) -> int:
    return BATCH_TOKENS // num_tokens


def seconds_of(attend: Callable[[Tensor, Tensor, Tensor], Tensor], q: Tensor, k: Tensor, v: Tensor) -> float:
    """Time one forward and backward."""
    start = time.perf_counter()
    torch.autograd.grad(attend(q, k, v).sum(), (q, k, v))
    return time.perf_counter() - start


def compare(num_tokens: int, dtype: torch.dtype) -> tuple[float, float, int]:
    """Return the median seconds of the score matrix and of the fused kernel, and over how many turns."""
    generator = torch.Generator().manual_seed(0)
    shape = (batch_of(num_tokens), HEADS, num_tokens, HEAD_DIM)
    q, k, v = (torch.randn(shape, generator=generator).to(dtype).requires_grad_() for _ in range(3))

    def short(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention._attend_short(q, k, v, None)

    rows: list[tuple[float, float]] = []
    deadline = time.perf_counter() + SECONDS
    while len(rows) < 4 or time.perf_counter() < deadline:
        rows.append((seconds_of(short, q, k, v), seconds_of(F.scaled_dot_product_attention, q, k, v)))
    ours, fused = (statistics.median(column) for column in zip(*rows[1:], strict=True))  # the first turn warms up
    return ours, fused, len(rows) - 1


def main() -> None:
    print(
        f"{BATCH_TOKENS} tokens a batch, {HEADS} heads of {HEAD_DIM}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    )
    print("FLOP = 3 * 4 * batch * heads * tokens^2 * head_dim: two products of 2 N^2 d, three times with the gradients")
    print(f"attend() takes the score matrix in bfloat16 up to {attention.SHORT} x {attention.SHORT} tokens on a CPU\n")
    print(
        f"{'dtype':>8} {'tokens':>6} {'matrix ms':>10} {'fused ms':>10} {'fused/matrix':>12} {'GFLOP/s':>8} {'turns':>6}"
    )
    for dtype in (torch.bfloat16, torch.float32):
        for num_tokens in TOKENS:
            ours, fused, turns = compare(num_tokens, dtype)
            flops = 3 * 4 * batch_of(num_tokens) * HEADS * num_tokens**2 * HEAD_DIM
            name = str(dtype).removeprefix("torch.")
            print(
                f"{name:>8} {num_tokens:>6} {1e3 * ours:>10.2f} {1e3 * fused:>10.2f} {fused / ours:>12.2f}"
                f" {flops / ours / 1e9:>8.1f} {turns:>6}"
            )


if __name__ == "__main__":
    main()
