"""Factors of theirs and ours are of the same change, whatever a table does to rows and columns."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from reelflow.errors import CheckpointError
from reelflow.interop.adapters import Factors, adapter_as_ours, adapter_as_theirs, write_adapter
from reelflow.interop.mapping import NEGATED, Row, linear, rearranged, reordered, table
from reelflow.models.adapters import Adapter, Update, merge

SHAPES = {"p": (10, 2, 2), "q": (4, 2, 2)}  # theirs are convolutions


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 6, bias=False), nn.Linear(4, 8, bias=False)
        self.requires_grad_(False).double()


def rows(order: list[int]) -> tuple[Row, ...]:
    turned = {"z": reordered(torch.tensor(order)), "y": NEGATED}
    return table(
        linear(
            {"a": "x y", "b": "z"},
            {"p": "z x", "q": "y"},
            weight=rearranged("d h w -> d (w h)", h=2, w=2),
            bias=False,
            each=turned,
            heights={"x": 1, "y": 2, "z": 4},
        )
    )


def drawn(shape: tuple[int, ...], rank: int, seed: int, scale: float) -> Factors:
    generator = torch.Generator().manual_seed(seed)
    down = torch.randn(rank, *shape[1:], generator=generator, dtype=torch.float64)
    up = torch.randn(shape[0], rank, 1, 1, generator=generator, dtype=torch.float64)
    return Factors(down, up, scale)


def product(found: Factors) -> Tensor:
    flat = found.up.flatten(1) @ found.down.flatten(1)
    return found.scale * flat.view(len(found.up), *found.down.shape[1:])


@settings(max_examples=15, deadline=None)
@given(st.permutations(range(4)), st.integers(1, 3), st.sampled_from([0.5, 1.0, 2.0]), st.booleans())
def test_factors_and_weights_take_the_same_way(order, rank, scale, both):
    model, relation = Two(), rows(order)
    factors = {"p": drawn(SHAPES["p"], rank, 0, 1.0)} | ({"q": drawn(SHAPES["q"], 2, 1, scale)} if both else {})
    adapter = adapter_as_ours(factors, [relation], model, "a file")
    theirs = {f"{name}.weight": product(factors[name]) if name in factors else torch.zeros(shape, dtype=torch.float64)
              for name, shape in SHAPES.items()}  # fmt: skip
    (row,) = relation
    expected, before = row.to_ours(theirs), {name: x.clone() for name, x in model.state_dict().items()}
    with merge(model, [(adapter, 1.0)]):
        for name, x in model.state_dict().items():
            torch.testing.assert_close(x - before[name], expected[name], atol=1e-12, rtol=0)
    back = adapter_as_theirs(adapter, relation, model)
    assert {name: found.down.shape[0] for name, found in back.items()} == {
        name: found.down.shape[0] for name, found in factors.items()
    }
    for name, found in back.items():
        torch.testing.assert_close(product(found), product(factors[name]), atol=1e-12, rtol=0)


def test_a_change_that_spans_their_modules_is_shared_out():
    model, relation = Two(), rows([0, 1, 2, 3])
    generator = torch.Generator().manual_seed(0)
    down, up = (torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((2, 4), (6, 2)))
    adapter = Adapter({"a": (Update(0, down, up, 3.0),)})
    again = adapter_as_ours(adapter_as_theirs(adapter, relation, model), [relation], model, "a file")
    with merge(model, [(adapter, 1.0)]):
        expected = model.a.weight.clone()
    with merge(model, [(again, 1.0)]):
        torch.testing.assert_close(model.a.weight, expected, atol=1e-12, rtol=0)


def test_what_a_layout_has_no_place_for_is_refused(tmp_path):
    model, relation = Two(), rows([0, 1, 2, 3])
    whole = Update(0, torch.ones(1, 4), torch.ones(6, 1), magnitude=torch.ones(6))
    with pytest.raises(CheckpointError, match="p would have 2 magnitudes for 10 rows"):
        adapter_as_theirs(Adapter({"a": (whole,)}), relation, model)
    only = table(linear("a", "p", bias=False))
    with pytest.raises(CheckpointError, match="no linear maps for b"):
        adapter_as_theirs(Adapter({"b": (Update(0, torch.ones(1, 4), torch.ones(8, 1)),)}), only, model)
    copies = table(linear({"a": "x"}, {"p": "x", "q": "x"}, bias=False))
    with pytest.raises(CheckpointError, match="one of several copies"):
        adapter_as_theirs(Adapter({"a": (Update(0, torch.ones(1, 4), torch.ones(6, 1)),)}), copies, model)
    with pytest.raises(CheckpointError, match="one of several copies"):
        adapter_as_ours({"q": Factors(torch.ones(1, 4), torch.ones(6, 1), 1.0)}, [copies], model, "a file")
    mixed = linear("a", "p", rearranged("(x y) c -> (y x) c", x=2), bias=False)
    torn = linear("b", "p", weight=rearranged("(d e) c -> (d c) e", e=4, c=4), bias=False)
    adapter_as_ours({"p": Factors(torch.ones(1, 4), torch.ones(6, 1), 1.0)}, [mixed], model, "a file")
    with pytest.raises(CheckpointError, match="spread over columns"):
        adapter_as_ours({"p": Factors(torch.ones(1, 4), torch.ones(8, 1), 1.0)}, [torn], model, "a file")
    some = {
        "p": Factors(torch.ones(1, 4), torch.ones(6, 1), 1.0),
        "q": Factors(torch.ones(1, 4), torch.ones(6, 1), 1.0, torch.ones(6)),
    }
    with pytest.raises(CheckpointError, match="have magnitudes, or none"):
        write_adapter(some, tmp_path / "a", layout="peft")
