from dataclasses import replace

import pytest
import torch
from torch import nn

from reelflow.config import from_dict, to_dict
from reelflow.errors import ConfigError
from reelflow.models.blocks import Dual
from reelflow.models.condition import Condition, Source
from reelflow.models.context import ContextLayers, Layers, Refine, Sources
from reelflow.models.dit import DiTConfig, VideoDiT

THREE = DiTConfig(
    in_channels=2,
    dim=12,
    num_heads=1,
    layers=(Dual(mlp_ratio=1.0),),
    rope=(4, 4, 4),
    context=Sources((Refine(5, depth=1), Layers(4, (6,), norms="in"), Layers(3, norms=True))),
)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


X, T = normal(2, 2, 2, 4, 2), torch.tensor([0.2, 0.9], dtype=torch.float64)
FIRST = Source(normal(2, 3, 5, seed=1), torch.tensor([[True, True, False], [True, True, True]]))
SECOND, THIRD = Source(normal(2, 2, 4, seed=2)), Source(normal(2, 1, 3, seed=3))


@pytest.fixture
def network() -> VideoDiT:
    torch.manual_seed(0)
    model = VideoDiT(THREE).double()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model


def condition(first: Source = FIRST, second: Source = SECOND, third: Source = THIRD) -> Condition:
    return Condition(context=first.tokens, context_mask=first.mask, further=(second, third))


def close(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.allclose(a, b, rtol=0, atol=1e-12)


def test_a_hidden_source_is_one_of_no_tokens_and_tokens_of_a_source_have_no_order(network):
    hidden = Source(SECOND.tokens, torch.zeros(2, 2, dtype=torch.bool))
    absent = Source(SECOND.tokens[:, :0])
    whole = network(X, T, condition())
    assert close(network(X, T, condition(second=hidden)), network(X, T, condition(second=absent)))
    assert not close(network(X, T, condition(second=absent)), whole)
    assert close(network(X, T, condition(second=Source(SECOND.tokens.flip(1)))), whole)
    assert close(network(X, T, condition().trimmed()), whole)


def test_a_source_is_known_by_its_vector(network):
    absent = Source(SECOND.tokens[:, :0])
    for second, same in ((SECOND, False), (absent, True)):
        before = network(X, T, condition(second=second))
        with torch.no_grad():
            network.context.kinds[1, 0] += 1
        assert close(before, network(X, T, condition(second=second))) == same


def test_gradients_reach_every_parameter_of_every_source(network):
    network(X, T, condition()).square().sum().backward()
    assert not [name for name, p in network.context.named_parameters() if not p.grad.any()]


def test_conditions_add_up_to_all_sources(network):
    parts = (
        Condition(context=FIRST.tokens, context_mask=FIRST.mask),
        *(Condition(further=(s,)) for s in (SECOND, THIRD)),
    )
    assert torch.equal(network(X, T, parts[0] + parts[1] + parts[2]), network(X, T, condition()))


@pytest.mark.parametrize("further", [None, (SECOND,), (THIRD, SECOND), (SECOND, THIRD, THIRD)])
def test_other_sources_than_the_models_are_refused(network, further):
    with pytest.raises(ConfigError, match=r"condition.further of widths \[4, 3\], got"):
        network(X, T, replace(condition(), further=further))


def test_a_context_has_a_source():
    with pytest.raises(ConfigError, match="at least one source"):
        Sources(())


def test_sources_survive_json():
    assert from_dict(DiTConfig, to_dict(THREE)) == THREE


def test_norms_stand_before_the_maps_after_them_or_on_both_sides():
    x, t = normal(1, 3, 5).float(), torch.zeros(1, 1)
    for norms, scales in ((False, True), ("in", False), ("out", True), (True, False)):
        door = ContextLayers(Layers(5, (4,), norms=norms), 6)
        assert torch.allclose(door(x, None, t), door(3 * x, None, t), atol=1e-3) != scales
        assert (door.norm_out is not None) == (norms in (True, "out"))


def test_features_of_no_condition_are_kept_beside_the_maps_and_not_learned():
    door = ContextLayers(Layers(5, null=3), 6)
    assert door.state_dict()["null"].shape == (3, 5)
    assert all(parameter is not door.null for parameter in door.parameters())
    with pytest.raises(ConfigError, match="null at least 0"):
        Layers(5, null=-1)
