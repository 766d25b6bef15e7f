import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from reelflow.errors import ConfigError
from reelflow.models.adapters import Adapter, LoRA, Update, apply, extract, linear_maps, merge, new_adapter
from reelflow.models.blocks import Attend, Branches, Cross, Dual, FeedForward, Single
from reelflow.models.condition import Condition
from reelflow.models.context import Layers
from reelflow.models.dit import DiTConfig, VideoDiT

LATENTS = torch.randn(2, 2, 2, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
CONTEXT = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
TIMES = torch.tensor([0.2, 0.7], dtype=torch.float64)


def network() -> VideoDiT:
    layers = (Dual(mlp_ratio=1.0), Single(mlp_ratio=1.0), Branches((Attend(), Cross(), FeedForward(ratio=1.0))))
    config = DiTConfig(in_channels=2, dim=16, num_heads=2, layers=layers, rope=(4, 2, 2), context=Layers(5))
    model = VideoDiT(config).double()
    generator = torch.Generator().manual_seed(2)
    for parameter in model.parameters():
        parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return model


def answer(model: VideoDiT) -> torch.Tensor:
    return model(LATENTS, TIMES, Condition(context=CONTEXT))


def grown(model: VideoDiT, config: LoRA, seed: int) -> Adapter:
    """Return an adapter as if it had learned something: nothing in it is zero, or as at the start."""
    generator = torch.Generator().manual_seed(seed)
    return new_adapter(model, config, generator).map(
        lambda x: x + 0.2 * torch.rand(x.shape, generator=generator, dtype=x.dtype)
    )


@pytest.mark.parametrize("magnitudes", [False, True])
def test_a_new_adapter_changes_nothing_at_all(magnitudes):
    model = network()
    before = answer(model)
    adapter = new_adapter(
        model, LoRA(rank=2, targets=("all",), magnitudes=magnitudes), torch.Generator().manual_seed(0)
    )
    with apply(model, [(adapter, 1.0)]):
        assert torch.equal(answer(model), before)


@settings(max_examples=6, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.integers(1, 4),
            st.sampled_from([("attention",), ("mlp",), ("all",), ("embed", "out", "blocks.0.*")]),
            st.booleans(),
            st.sampled_from([-1.0, 0.0, 0.3, 1.0, 2.0]),
        ),
        min_size=1,
        max_size=3,
    )
)
def test_merged_is_applied_and_both_are_undone(drawn):
    model = network().requires_grad_(False)
    before, weights = answer(model), {name: x.clone() for name, x in model.state_dict().items()}
    adapters = [
        (grown(model, LoRA(rank=rank, alpha=3.0, targets=targets, magnitudes=magnitudes), seed), strength)
        for seed, (rank, targets, magnitudes, strength) in enumerate(drawn)
    ]
    with apply(model, adapters):
        applied = answer(model)
    assert torch.equal(answer(model), before)
    with merge(model, adapters):
        torch.testing.assert_close(answer(model), applied, atol=1e-12 * float(applied.abs().max()), rtol=0)
    assert all(torch.equal(x, weights[name]) for name, x in model.state_dict().items())
    if any(strength for *_, strength in drawn):
        assert not torch.allclose(applied, before)


def test_a_merged_map_is_the_papers_formula():
    model = network()
    weight = model.blocks[0].video.out.weight.detach().clone()
    adapter = grown(model, LoRA(rank=2, alpha=6.0, targets=("blocks.0.video.out",), magnitudes=True), 0)
    (update,) = adapter.updates["blocks.0.video.out"]
    moved = weight + 3.0 * update.up @ update.down
    merge(model, [(adapter, 1.0)])
    expected = update.magnitude[:, None] * moved / moved.square().sum(1, keepdim=True).sqrt()
    torch.testing.assert_close(model.blocks[0].video.out.weight.detach(), expected)


def test_parts_of_a_fused_map_are_changed_apart():
    model = network()
    adapter = grown(model, LoRA(rank=2, targets=("blocks.0.video.project.qkv",)), 0)
    _, keys, _ = adapter.updates["blocks.0.video.project.qkv"]
    before = model.blocks[0].video.project.qkv.weight.detach().clone()
    merge(model, [(Adapter({"blocks.0.video.project.qkv": (keys,)}), 1.0)])
    changed = (model.blocks[0].video.project.qkv.weight != before).any(1)
    assert changed.nonzero().flatten().tolist() == list(range(16, 32))


def test_targets_are_kinds_or_patterns():
    model = network()
    names = {
        kind: set(new_adapter(model, LoRA(rank=1, targets=(kind,)), torch.Generator()).updates)
        for kind in ("attention", "mlp", "all", "*.qkv")
    }
    assert {name for name in linear_maps(model) if name.startswith("blocks.")} == names["all"]
    assert {name.rpartition(".")[2] for name in names["attention"]} == {"qkv", "kv", "query", "out"}
    assert {name.rpartition(".")[2] for name in names["mlp"]} == {"up", "down"}
    assert names["*.qkv"] < names["attention"]
    with pytest.raises(ConfigError, match="did you mean attention"):
        new_adapter(model, LoRA(rank=1, targets=("atention",)), torch.Generator())


@pytest.mark.parametrize("magnitudes", [False, True])
def test_gradients_reach_the_adapter_and_not_the_network(magnitudes):
    model = network().requires_grad_(False)
    adapter = grown(model, LoRA(rank=2, magnitudes=magnitudes), 0).map(lambda x: x.requires_grad_())
    with apply(model, [(adapter, 1.0)]):
        answer(model).square().sum().backward()
    assert all(tensor.grad is not None and tensor.grad.any() for _, tensor in adapter.tensors())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_weights_of_fewer_digits_are_rounded_once():
    model = network().bfloat16()
    adapter = grown(model, LoRA(rank=2, targets=("out",)), 0)
    (update,) = adapter.updates["out"]
    exact = model.out.weight.detach().float() + update.up @ update.down
    merge(model, [(adapter, 1.0)])
    assert torch.equal(model.out.weight.detach(), exact.bfloat16())


def test_an_extracted_adapter_is_the_difference_where_its_rank_suffices():
    before, after = network(), network()
    merge(after, [(grown(after, LoRA(rank=2, targets=("all",)), 0), 1.0)])
    found = extract(before.state_dict(), after.state_dict(), 2, maps=linear_maps(before))
    assert found.share == pytest.approx(1.0)
    merge(before, [(found.adapter, 1.0)])
    torch.testing.assert_close(answer(before), answer(after))
    less = extract(network().state_dict(), after.state_dict(), 1, maps=linear_maps(before))
    assert 0 < less.share < 0.99
    with pytest.raises(ConfigError, match="nothing to extract"):
        extract(after.state_dict(), after.state_dict(), 1, maps=linear_maps(before))


def test_what_is_carried_of_a_difference_is_its_largest_singular_values():
    before = {"a.weight": torch.zeros(3, 3), "b": torch.zeros(1)}
    after = {"a.weight": torch.diag(torch.tensor([3.0, 2.0, 1.0])), "b": torch.tensor([2.0])}
    found = extract(before, after, 2, maps=["a"])
    (update,) = found.adapter.updates["a"]
    torch.testing.assert_close(update.up @ update.down, torch.diag(torch.tensor([3.0, 2.0, 0.0])))
    assert found.share == pytest.approx((9 + 4) / (9 + 4 + 1 + 4))


def test_what_cannot_be_an_adapter_is_refused():
    model = network()
    down, up = torch.zeros(2, 16), torch.zeros(16, 2)
    with pytest.raises(ConfigError, match="have no product"):
        Update(0, down, torch.zeros(16, 3))
    with pytest.raises(ConfigError, match="the same rows of a"):
        Adapter({"a": (Update(0, down, up), Update(15, down, up))})
    with pytest.raises(ConfigError, match="no linear map 'ot'; did you mean out"):
        apply(model, [(Adapter({"ot": (Update(0, down, up),)}), 1.0)])
    with pytest.raises(ConfigError, match="of another network"):
        apply(model, [(Adapter({"out": (Update(0, torch.zeros(2, 7), torch.zeros(8, 2)),)}), 1.0)])
    with pytest.raises(ConfigError, match="finite"):
        apply(model, [(grown(model, LoRA(rank=1), 0), float("nan"))])
    with pytest.raises(ConfigError, match="rank is at least 1"):
        LoRA(rank=0)
    with pytest.raises(ConfigError, match="without targets"):
        LoRA(rank=1, targets=())
