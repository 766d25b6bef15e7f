"""Fused pieces of a block against the naive chains they replace, eager and compiled, forward and with backward.

Run: python benchmarks/fused.py (OMP_NUM_THREADS=1 for one thread). Sizes are those of a training step of the recipe
`world`, whose whole stream is bfloat16 under autocast. The forms of a piece are timed in turn, medians are shown.
`torch.compile` needs a C++ compiler; where there is none, nothing is compiled and the last line says so. The first run
spends most of its time compiling, and torch keeps the result for the next.
"""

import os
import shutil
import statistics
import time
import warnings
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from reelflow.cli.main import keep_freed_memory
from reelflow.nn.attention import split_heads
from reelflow.nn.mlp import activate
from reelflow.nn.modulation import gated, modulate
from reelflow.nn.norm import RMSNorm
from reelflow.nn.patchify import token_grid
from reelflow.nn.qk import queries_keys_values
from reelflow.nn.rope import apply_rope, grid_positions, rope_table
from reelflow.recipes.world import world

RECIPE = world()
MODEL, BATCH, WORDS = RECIPE.dit.model, RECIPE.dit.training.batch_size, 5
GRID = token_grid(
    RECIPE.vae.model.latent_shape(RECIPE.clip.num_frames, RECIPE.clip.height, RECIPE.clip.width)[1:], MODEL.patch
)
HEAD_DIM = MODEL.dim // MODEL.num_heads
SECONDS = 2.0  # per piece and type

Function = Callable[..., Tensor | tuple[Tensor, ...]]


class Piece(NamedTuple):
    """One piece in two forms; `passes` over tensors of `values` values are the fewest that forward and backward need."""

    name: str
    naive: Function
    ours: Function
    inputs: tuple[Tensor, ...]
    values: int
    passes: int


def layer_norm(x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], eps=1e-6)


def turn(x: Tensor, rope: Tensor) -> Tensor:
    """Rotate by four half-products."""
    wide = x.float()
    even, odd = wide[..., ::2], wide[..., 1::2]
    cos, sin = rope.unbind(-1)
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2).to(x.dtype)


def pieces(dtype: torch.dtype) -> list[Piece]:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype).requires_grad_()

    tokens, hidden = WORDS + GRID.num_tokens, 3 * MODEL.dim
    x, branch = normal(BATCH, tokens, MODEL.dim), normal(BATCH, tokens, MODEL.dim)
    shift, scale = normal(BATCH, 1, MODEL.dim), normal(BATCH, 1, MODEL.dim)
    rope = rope_table(grid_positions(*GRID), MODEL.rope, theta=MODEL.theta).float()
    norm_q, norm_k = (RMSNorm(HEAD_DIM, eps=1e-6) for _ in range(2))
    heads, qkv = normal(BATCH, MODEL.num_heads, GRID.num_tokens, HEAD_DIM), normal(BATCH, tokens, 3 * MODEL.dim)

    def naive_qk(qkv: Tensor, *_: Tensor) -> tuple[Tensor, ...]:
        q, k, v = (split_heads(part, MODEL.num_heads) for part in qkv.chunk(3, dim=-1))
        q, k = (torch.cat([y[:, :, :WORDS], turn(y[:, :, WORDS:], rope)], dim=2) for y in (norm_q(q), norm_k(k)))
        return q, k, v

    def ours_qk(qkv: Tensor, *_: Tensor) -> tuple[Tensor, ...]:
        return queries_keys_values(qkv, norm_q, norm_k, rope, MODEL.num_heads)

    return [
        Piece(
            "layer norm + modulation",
            lambda x, shift, scale: layer_norm(x) * (1 + scale) + shift,
            lambda x, shift, scale: modulate(layer_norm(x), shift, scale),
            (x, shift, scale),
            x.numel(),
            5,
        ),
        Piece("gated residual", lambda x, g, y: x + g * y, gated, (x, scale, branch), x.numel(), 6),
        Piece("rope", lambda x: turn(x, rope), lambda x: apply_rope(x, rope), (heads,), heads.numel(), 4),
        Piece("qk norm + rope", naive_qk, ours_qk, (qkv, norm_q.weight, norm_k.weight), qkv.numel(), 4),
        Piece(
            "squared ReLU",
            lambda x: F.relu(x).square(),
            lambda x: activate(x, "relu2"),
            (normal(BATCH, tokens, hidden),),
            BATCH * tokens * hidden,
            5,
        ),
    ]


def seconds_of(function: Function, inputs: tuple[Tensor, ...], grads: tuple[Tensor, ...]) -> tuple[float, float]:
    """Time one forward, and one forward and backward."""
    start = time.perf_counter()
    out = function(*inputs)
    middle = time.perf_counter()
    torch.autograd.grad(out, inputs, grads)
    return middle - start, time.perf_counter() - start


def compare(piece: Piece, forms: dict[str, Function]) -> dict[str, tuple[float, float]]:
    """Return each form's median seconds: forward, forward and backward."""
    out = piece.naive(*piece.inputs)
    grads = tuple(torch.ones_like(y) for y in (out if isinstance(out, tuple) else (out,)))
    for form in forms.values():  # compiles, and warms up
        for _ in range(3):
            seconds_of(form, piece.inputs, grads)
    turns: list[list[tuple[float, float]]] = []
    deadline = time.perf_counter() + SECONDS
    while len(turns) < 5 or time.perf_counter() < deadline:
        turns.append([seconds_of(form, piece.inputs, grads) for form in forms.values()])
    columns = (zip(*rows, strict=True) for rows in zip(*turns, strict=True))
    return {name: (statistics.median(f), statistics.median(b)) for name, (f, b) in zip(forms, columns, strict=True)}


def has_compiler() -> bool:
    return any(map(shutil.which, (os.environ.get("CXX", "g++"), "clang++")))


def main() -> None:
    keep_freed_memory()
    warnings.filterwarnings("ignore", message="Torchinductor does not support code generation for complex")
    tokens = WORDS + GRID.num_tokens
    print(f"{BATCH} x {tokens} tokens of {MODEL.dim}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    print("No matrix products here, so no FLOPs in planning/cost.py: what these cost is traffic.")
    print("least MB = passes * values * bytes: every tensor that must be read or written, forward and backward, once\n")
    print("milliseconds: forward, forward and backward")
    names = ("naive", "ours", "naive, compiled", "ours, compiled")
    print(f"{'dtype':>8} {'piece':>23} {'least MB':>8}", *(f"{name:>15}" for name in names), "naive/ours")
    for dtype in (torch.bfloat16, torch.float32):
        for piece in pieces(dtype):
            forms = {names[0]: piece.naive, names[1]: piece.ours}
            if has_compiler():
                forms |= {names[2]: torch.compile(piece.naive), names[3]: torch.compile(piece.ours)}
            found = compare(piece, forms)
            cells = [
                f"{1e3 * found[name][0]:>7.3f} {1e3 * found[name][1]:>7.3f}" if name in found else f"{'-':>15}"
                for name in names
            ]
            megabytes = piece.passes * piece.values * dtype.itemsize / 1e6
            ratio = found[names[0]][1] / found[names[1]][1]
            head = f"{str(dtype).removeprefix('torch.'):>8} {piece.name:>23} {megabytes:>8.2f}"
            print(head, *cells, f"{ratio:>10.2f}", flush=True)
    if not has_compiler():
        print("no compiler: torch.compile needs g++ or clang++ (or what CXX names)")


if __name__ == "__main__":
    main()
