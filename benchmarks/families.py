"""Published transformers against diffusers, and against the floor: one denoiser, forward and with backward, float32, eager.

Run: python benchmarks/families.py [FAMILY ...] [--threads N] [--rounds N]. Networks of each family's shape, of width 768 and
a few blocks, over 2,000 tokens of video and a prompt padded as its system pads it, 60 tokens of which are real. Both
sides have the same random weights. The floor is the matrix products and attention calls of our forward alone, on other
tensors of the same shapes. Floor, ours and theirs are timed in turn; medians are shown, and the median of each round's
ratios. On one thread seconds are those of the process, not of the clock.

What diffusers makes once per clip outside of the network (the rotary table of CogVideoX) is made outside of the clock.
"""

import argparse
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import diffusers
import torch
import torch.nn.functional as F
from diffusers.models.embeddings import get_3d_rotary_pos_embed
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from reelflow.cli.main import keep_freed_memory
from reelflow.families.cogvideox import COGVIDEOX
from reelflow.families.family import Family
from reelflow.families.hunyuan import HUNYUAN
from reelflow.families.ltx import LTX
from reelflow.families.mochi import MOCHI
from reelflow.families.wan import WAN
from reelflow.models.blocks import CrossAttention
from reelflow.models.condition import Condition
from reelflow.models.context import ContextLayers
from reelflow.models.dit import DiTConfig, VideoDiT
from reelflow.nn.linear import linear

HEADS, HEAD_DIM = 12, 64
GRID, WORDS, TEXT = (5, 20, 20), 60, 1024  # tokens of video, real tokens of text, width of its features
T, GUIDANCE, FPS = 0.3, 6.0, 24

FORMULA = """GFLOP: a product of m x k by k x n costs 2 m k n, attention of n queries and m keys 4 n m width; backward costs
twice the forward. Only what our forward computes is counted."""

Run = Callable[[], Tensor]


@dataclass(frozen=True)
class Case:
    """One family at the size of this benchmark; `call` is given latents, a timestep and padded text features."""

    family: Family
    reference: type[nn.Module]
    arguments: dict[str, Any]
    prompt: int  # tokens, padded
    padding: Literal["hidden", "zeros", "encoded"]  # of the prompt, as the family's encoder leaves it
    call: Callable[..., Tensor]  # of the reference, told 1000 (1 - t)
    sign: int = -1  # of its prediction against ours
    channels: int = 16
    patch: int = 2
    token_rate: float | None = None


def hunyuan(model: nn.Module, x: Tensor, t: Tensor, text: Tensor, mask: Tensor, vector: Tensor) -> Tensor:
    guidance = torch.tensor([1000 * GUIDANCE])
    return model(x, t, text, mask, vector, guidance, return_dict=False)[0]


def wan(model: nn.Module, x: Tensor, t: Tensor, text: Tensor, *_: Tensor) -> Tensor:
    return model(x, t, text, return_dict=False)[0]


def mochi(model: nn.Module, x: Tensor, t: Tensor, text: Tensor, mask: Tensor, *_: Tensor) -> Tensor:
    return model(x, text, 1000 - t, mask, return_dict=False)[0]


def ltx(model: nn.Module, x: Tensor, t: Tensor, text: Tensor, mask: Tensor, *_: Tensor) -> Tensor:
    out = model(
        x.flatten(2).mT,
        text,
        t,
        encoder_attention_mask=mask,
        num_frames=GRID[0],
        height=GRID[1],
        width=GRID[2],
        rope_interpolation_scale=(8 / FPS, 32, 32),
        return_dict=False,
    )[0]
    return out.mT.unflatten(2, GRID)


ROTARY = get_3d_rotary_pos_embed(HEAD_DIM, ((0, 0), GRID[1:]), grid_size=GRID[1:], temporal_size=GRID[0])


def cogvideox(model: nn.Module, x: Tensor, t: Tensor, text: Tensor, *_: Tensor) -> Tensor:
    return model(x.transpose(1, 2), text, t, image_rotary_emb=ROTARY, return_dict=False)[0].transpose(1, 2)


HEADED = {"num_attention_heads": HEADS, "attention_head_dim": HEAD_DIM}
CASES = {
    "hunyuan": Case(
        HUNYUAN,
        diffusers.HunyuanVideoTransformer3DModel,
        HEADED
        | {"num_layers": 1, "num_single_layers": 1, "num_refiner_layers": 1, "text_embed_dim": TEXT}
        | {"rope_axes_dim": [16, 24, 24]},
        prompt=256,
        padding="hidden",
        call=hunyuan,
    ),
    "wan": Case(
        WAN,
        diffusers.WanTransformer3DModel,
        HEADED | {"num_layers": 2, "ffn_dim": 4480, "text_dim": TEXT},
        prompt=512,
        padding="zeros",
        call=wan,
    ),
    "mochi": Case(
        MOCHI,
        diffusers.MochiTransformer3DModel,
        HEADED | {"num_layers": 2, "pooled_projection_dim": 384, "text_embed_dim": TEXT},
        prompt=256,
        padding="hidden",
        call=mochi,
        sign=1,
        channels=12,
    ),
    "cogvideox": Case(
        COGVIDEOX,
        diffusers.CogVideoXTransformer3DModel,
        HEADED
        | {"num_layers": 2, "text_embed_dim": TEXT, "use_rotary_positional_embeddings": True}
        | {"sample_height": 2 * GRID[1], "sample_width": 2 * GRID[2]},
        prompt=226,
        padding="encoded",
        call=cogvideox,
        sign=1,
    ),
    "ltx": Case(
        LTX,
        diffusers.LTXVideoTransformer3DModel,
        HEADED | {"num_layers": 2, "cross_attention_dim": HEADS * HEAD_DIM, "caption_channels": TEXT},
        prompt=256,
        padding="hidden",
        call=ltx,
        channels=128,
        patch=1,
        token_rate=FPS / 8,
    ),
}


def told(case: Case, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Draw a prompt's features, say which of them are real, and draw one vector of it."""
    text, vector = (torch.randn(1, *shape, generator=generator) for shape in ((case.prompt, TEXT), (768,)))
    mask = torch.arange(case.prompt)[None] < WORDS
    return text.where(mask[..., None], 0.0) if case.padding == "zeros" else text, mask, vector


def condition_of(case: Case, config: DiTConfig, text: Tensor, mask: Tensor, vector: Tensor) -> Condition:
    """Return what our network is told."""
    return Condition(
        context=text,
        context_mask=mask if case.padding == "hidden" else None,
        vector=vector if config.vector_dim else None,
        numbers=torch.tensor([[GUIDANCE]]) if config.numbers else None,
    ).trimmed()


class Sides(NamedTuple):
    """The two networks, and how each is called."""

    model: VideoDiT
    reference: nn.Module
    ours: Run
    theirs: Run


def sides(case: Case) -> Sides:
    """Build both, with the same random weights."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    reference = case.reference(**case.arguments).eval()
    for parameter in reference.parameters():
        spread = 0.02 if parameter.ndim < 2 else (parameter.numel() / parameter.shape[0]) ** -0.5
        parameter.data.copy_(spread * normal(*parameter.shape) + (parameter.ndim < 2))
    config = case.family.read(case.arguments)
    model, state = VideoDiT(config), reference.state_dict()
    with torch.no_grad():
        for row in case.family.weights(config):
            for name, value in row.to_ours(state).items():
                model.get_parameter(name).copy_(value)
    latents = normal(1, case.channels, GRID[0], case.patch * GRID[1], case.patch * GRID[2])
    text, mask, vector = told(case, generator)
    condition, t = condition_of(case, config, text, mask, vector), torch.tensor([T])
    return Sides(
        model,
        reference,
        lambda: model(latents, t, condition, token_rate=case.token_rate),
        lambda: case.sign * case.call(reference, latents, 1000 * (1 - t), text, mask, vector),
    )


class Products(TorchFunctionMode):
    """Notes the linear maps and attention calls of what runs within, by the shapes of their tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[Callable[..., Tensor], list[torch.Size]]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (F.linear, torch.ops.mkldnn._linear_pointwise):  # and again, whichever is faster where it is run
            self.found.append((linear, [x.shape for x in args if isinstance(x, Tensor)]))
        elif func is F.scaled_dot_product_attention:
            self.found.append((func, [x.shape for x in args if isinstance(x, Tensor)]))
        return func(*args, **(kwargs or {}))

    def flops(self) -> int:
        total = 0
        for func, (first, second, *_) in self.found:
            if func is linear:
                total += 2 * second.numel() * first[:-1].numel()
            else:
                total += 4 * first.numel() * second[-2]
        return total


class Floor:
    """The products alone, on tensors of their own."""

    def __init__(self, products: Products) -> None:
        self.calls = [
            (func, [torch.randn(shape).requires_grad_() for shape in shapes]) for func, shapes in products.found
        ]
        self.inputs = [x for _, inputs in self.calls for x in inputs]
        self.grads = [torch.ones_like(y) for y in self.forward()]

    def forward(self) -> list[Tensor]:
        return [func(*inputs) for func, inputs in self.calls]

    def both(self) -> None:
        torch.autograd.grad(self.forward(), self.inputs, self.grads)


def without_grad(run: Callable[[], Any]) -> Callable[[], Any]:
    return torch.no_grad()(run)


def with_backward(run: Run, model: nn.Module) -> Callable[[], None]:
    learned = [parameter for parameter in model.parameters() if parameter.requires_grad]

    def both() -> None:
        out = run()
        torch.autograd.grad(out, learned, torch.ones_like(out), allow_unused=True)

    return both


def clock() -> float:
    """Return seconds: of this process where one thread works, so that others on the machine count for less."""
    return time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()


def rounds_of(runs: Sequence[Callable[[], Any]], rounds: int) -> list[list[float]]:
    """Run all in turn, `rounds` times after once for warmth, and return the seconds of each in each round."""
    found = []
    for _ in range(rounds + 1):
        row = []
        for run in runs:
            start = clock()
            run()
            row.append(clock() - start)
        found.append(row)
    return found[1:]


def once_per_clip(s: Sides) -> float:
    """Return the share of our forward that depends neither on the latents nor on the time.

    That is keys and values of the text in cross-attention, and the text's maps. Where these are told the time, and where
    text and video attend jointly, each step has its own.
    """
    parts: list[nn.Module] = [part.read for part in s.model.modules() if isinstance(part, CrossAttention)]
    if isinstance(s.model.context, ContextLayers):
        parts.append(s.model.context)
    spent = 0.0

    def begin(*_: Any) -> None:
        nonlocal spent
        spent -= clock()

    def end(*_: Any) -> None:
        nonlocal spent
        spent += clock()

    hooks = [part.register_forward_pre_hook(begin) for part in parts]
    hooks += [part.register_forward_hook(end) for part in parts]
    start = clock()
    with torch.no_grad():
        for _ in range(3):
            s.ours()
    total = clock() - start
    for hook in hooks:
        hook.remove()
    return spent / total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("families", nargs="*", metavar="FAMILY", help=f"of {', '.join(CASES)}; all unless named")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    if unknown := set(arguments.families) - CASES.keys():
        parser.error(f"unknown: {', '.join(sorted(unknown))}; known: {', '.join(CASES)}")
    torch.set_num_threads(arguments.threads)
    keep_freed_memory()
    warnings.filterwarnings("ignore", message="In CPU autocast")
    print(f"{arguments.threads} threads, torch {torch.__version__}, diffusers {diffusers.__version__}")
    print(FORMULA)
    print(f"\n{'':>18} {'GFLOP':>6} {'floor':>7} {'ours':>7} {'theirs':>7} ms {'ours/floor':>11} {'theirs/ours':>12}")
    for name in arguments.families or CASES:
        s = sides(CASES[name])
        with torch.no_grad():
            with Products() as products:
                ours = s.ours()
            theirs = s.theirs()
        error = (ours - theirs).abs().max().item() / theirs.square().mean().sqrt().item()
        floor = Floor(products)
        forward = [without_grad(run) for run in (floor.forward, s.ours, s.theirs)]
        both = [floor.both, with_backward(s.ours, s.model), with_backward(s.theirs, s.reference)]
        for kind, runs, passes in (("forward", forward, 1), ("both", both, 3)):
            rows = rounds_of(runs, arguments.rounds)
            cells = "".join(f"{1e3 * statistics.median(column):>8.0f}" for column in zip(*rows, strict=True))
            to_floor, to_ours = (statistics.median(row[i] / row[i - 1] for row in rows) for i in (1, 2))
            gflop = passes * products.flops() / 1e9
            print(f"{name:>9} {kind:>8} {gflop:>6.0f}{cells} {to_floor:>14.3f} {to_ours:>12.3f}", flush=True)
        print(f"{'':>9} same numbers within {error:.0e}; {once_per_clip(s):.1%} of a forward is the same at each step")


if __name__ == "__main__":
    main()
