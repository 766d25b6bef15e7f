from dataclasses import replace
from functools import cache

import pytest
import torch

from reelflow.errors import ConfigError
from reelflow.models.blocks import Attend, Branches, Cross, Dual, FeedForward, Single
from reelflow.models.condition import Condition, Source
from reelflow.models.context import Layers, Refine, Sources
from reelflow.models.dit import DiTConfig, VideoDiT
from reelflow.models.vae import CausalVAE, Stage, staged
from reelflow.nn.embed import Apart, Number
from reelflow.nn.norm import Norm
from reelflow.nn.patterns import Causal, Full, Gated, Skip, Space, Time, Window
from reelflow.planning.cost import count_flops, dit_cost, num_parameters, training_bytes, vae_cost

VAE = staged(
    latent_channels=4,
    encoder=(Stage(16, 1, space=2, time=2), Stage(32, 1)),
    decoder=(Stage(32, 1), Stage(16, 1, space=2, time=2)),
)
DIT = DiTConfig(
    in_channels=4,
    dim=48,
    num_heads=2,
    layers=(),
    rope=(8, 8, 8),
    context=Layers(12),
    vector_dim=6,
    stem=5,
    out_channels=3,
)
PATTERNS = [Full(), Space(), Time(), Window(2, 3, 2, shift=(1, 0, 0)), Skip(5, run=2), Causal(1), Gated("token")]
SOME = [Causal(), Gated("token")]
CASES = [("branches", p) for p in PATTERNS] + [(kind, p) for kind in ("dual", "read", "single") for p in SOME]


@cache
def counted(config: DiTConfig, context_tokens: int) -> int:
    """Count by walking the model."""
    with torch.device("meta"):
        condition = Condition(vector=torch.empty(1, 6))
        if config.context:
            condition = replace(condition, context=torch.empty(1, context_tokens, 12))
        return count_flops(VideoDiT(config), torch.empty(1, 4, 3, 8, 4), torch.empty(1), condition)


@pytest.mark.parametrize(("kind", "pattern"), CASES)
def test_the_formula_counts_every_operation_of_every_kind_and_pattern(kind, pattern):
    layer = {
        "dual": Dual(mlp_ratio=3.0, attend=pattern),
        "read": Dual(attend=pattern, context_out=False),
        "single": Single(mlp_ratio=2.0, attend=pattern),
        "branches": Branches(
            (
                Attend(pattern),
                Cross(),
                FeedForward(2.5),
                Cross(norm=Norm(), adaptive=True),
                Attend(pattern, adaptive=False),
            )
        ),
    }[kind]
    config = replace(DIT, layers=(layer,), context_width=0 if kind == "single" else 24)
    shell = replace(config, layers=())
    cost, outside = (dit_cost(c, (3, 8, 4), context_tokens=7) for c in (config, shell))
    assert cost.flops - outside.flops == counted(config, 7) - counted(shell, 7)
    assert cost.num_tokens == 3 * 4 * 2


@pytest.mark.parametrize("activation", ["gelu_tanh", "swiglu"])
@pytest.mark.parametrize("context", [0, 7])
def test_the_formula_counts_a_mixed_stack_with_and_without_context(activation, context):
    layers = (Dual(), Single(), Branches((Attend(Space()), FeedForward())), Single(mlp_ratio=2.0))
    config = replace(DIT, layers=layers, activation=activation, context=Layers(12) if context else None)
    cost = dit_cost(config, (3, 8, 4), context_tokens=context)
    assert cost.flops == pytest.approx(counted(config, context), rel=0.001)
    assert cost.num_parameters == num_parameters(VideoDiT(config))


def test_the_formula_counts_the_sources_of_a_context_each_at_its_length():
    sources = Sources((Refine(12), Layers(6, (7,))))
    config = replace(DIT, layers=(Dual(),), rope="none", vector_dim=0, context=sources)
    with torch.device("meta"):
        condition = Condition(context=torch.empty(1, 5, 12), further=(Source(torch.empty(1, 3, 6)),))
        found = count_flops(VideoDiT(config), torch.empty(1, 4, 3, 8, 4), torch.empty(1), condition)
    assert dit_cost(config, (3, 8, 4), context_tokens=(5, 3)).flops == found
    with pytest.raises(ConfigError, match="one number for each of 2 sources"):
        dit_cost(config, (3, 8, 4), context_tokens=5)


WIDER = {
    "tied": {"layers": (Dual(tied=True), Dual()), "vector_width": 16, "last_norm": Norm()},
    "again": {"layers": (Dual(again=Space()),)},
    "idle": {"layers": (Dual(context_out=False, idle_query=True, shift=False),), "context_width": 24, "pool": 3},
    "shared": {
        "layers": 2 * (Branches((Attend(), Cross(image=True), FeedForward(2.5))),),
        "modulation": "shared",
        "image": Layers(5, (9,), norms=True),
        "numbers": (Number(), Number(16)),
        "extra_channels": 3,
        "extra_apart": Apart((1, 2), twice=True),
    },
}


@pytest.mark.parametrize("changes", WIDER.values(), ids=WIDER)
def test_the_formula_counts_every_operation_of_published_designs(changes):
    config = replace(DIT, rope="none", stem=0, **changes)
    with torch.device("meta"):
        condition = Condition(
            context=torch.empty(1, 7, 12),
            vector=torch.empty(1, 6),
            numbers=torch.empty(1, 2) if config.numbers else None,
            image=torch.empty(1, 4, 5) if config.image else None,
            channels=torch.empty(1, 3, 3, 8, 4) if config.extra_channels else None,
        )
        found = count_flops(VideoDiT(config), torch.empty(1, 4, 3, 8, 4), torch.empty(1), condition)
    assert dit_cost(config, (3, 8, 4), 7, image_tokens=4 if config.image else 0).flops == found


def test_a_window_larger_than_the_clip_is_refused_before_anything_runs():
    with pytest.raises(ConfigError, match="larger than the grid"):
        dit_cost(replace(DIT, layers=(Single(attend=Window(4, 2, 2)),)), (3, 8, 4), context_tokens=0)


def test_autoencoder_costs_grow_with_the_clip_and_nothing_is_allocated():
    short, long = vae_cost(VAE, 5, 32, 32), vae_cost(VAE, 9, 32, 32)
    assert long.decode_flops > 1.5 * short.decode_flops
    assert short.num_parameters == num_parameters(CausalVAE(VAE))
    assert short.compression == 5 * 3 * 32 * 32 / (4 * 3 * 16 * 16)


def test_training_holds_five_copies_in_float32():
    assert training_bytes(10) == 200
