from dataclasses import replace
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from einops import rearrange
from hypothesis import given as drawn
from hypothesis import settings
from hypothesis import strategies as st
from torch import nn

from reelflow.errors import CheckpointError, ConfigError
from reelflow.interop.mapping import (
    NEGATED,
    Entry,
    chained,
    derived,
    differences,
    given,
    ignored,
    linear,
    parameter,
    rearranged,
    reordered,
    table,
)
from reelflow.nn.patchify import Patch, patchify
from reelflow.nn.rope import interleaved_from_half

UNIT = 4  # rows of a piece of height 1


def integers(*shape: int, seed: int = 0) -> torch.Tensor:
    """Small whole numbers, whose sums and products are exact."""
    return torch.randint(-9, 10, shape, generator=torch.Generator().manual_seed(seed)).double()


CHANGES = [
    NEGATED,
    reordered(torch.tensor([2, 0, 3, 1])),
    rearranged("(a b) ... -> (b a) ...", a=2),
    rearranged("(a two b) ... -> (b a two) ...", a=2, two=2),
]
Shapes = dict[str, tuple[int, ...]]


@st.composite
def drawings(draw):
    """What an entry is made of, at random: pieces, in any tensors on either side, changed in any way."""
    heights = {f"p{i}": draw(st.integers(1, 3)) for i in range(draw(st.integers(1, 5)))}
    change = st.integers(0, len(CHANGES) - 1)

    def side(prefix: str) -> dict[str, str]:
        pieces = draw(st.permutations(list(heights)))
        cuts = sorted(draw(st.sets(st.integers(1, len(pieces)), max_size=3)) - {len(pieces)})
        return {f"{prefix}{a}": " ".join(pieces[a:b]) for a, b in pairwise([0, *cuts, len(pieces)])}

    common, each = draw(st.lists(change, max_size=3)), draw(st.dictionaries(st.sampled_from(list(heights)), change))
    return side("ours"), side("theirs"), common, each, heights, draw(st.sampled_from([(), (3,), (2, 1, 2)]))


def build(ours, theirs, common, each, heights, rest) -> tuple[Entry, Shapes, Shapes]:
    """Return the entry that was drawn, and the shapes of our tensors and of theirs."""
    changes, single = [CHANGES[i] for i in common], {piece: CHANGES[i] for piece, i in each.items()}
    entry = parameter(ours, theirs, *changes, each=single, heights=heights)
    left, right = (
        {name: (UNIT * sum(heights[p] for p in pieces), *rest) for name, pieces in tensors.items()}
        for tensors in (entry.ours, entry.theirs)
    )
    return entry, left, right


def filled(shapes: Shapes, seed: int) -> dict[str, torch.Tensor]:
    return {name: integers(*shape, seed=seed + i) for i, (name, shape) in enumerate(shapes.items())}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@settings(deadline=None)
@drawn(drawings())
def test_there_and_back_is_where_one_was_from_either_side(drawing):
    entry, ours, theirs = build(*drawing)
    a, b = filled(ours, 1), filled(theirs, 2)
    assert same(entry.to_ours(entry.to_theirs(a)), a)
    assert same(entry.to_theirs(entry.to_ours(b)), b)


@settings(deadline=None)
@drawn(drawings())
def test_gradients_travel_as_weights_do(drawing):
    """A change of weights costs the same on both sides: <gradient, weights> is kept."""
    entry, ours, _ = build(*drawing)
    weights, gradients = filled(ours, 1), filled(ours, 100)
    there, gradients_there = entry.to_theirs(weights), entry.to_theirs(gradients)
    here = sum((weights[name] * gradients[name]).sum() for name in weights)
    assert here == sum((there[name] * gradients_there[name]).sum() for name in there)


@settings(deadline=None, max_examples=30)
@drawn(drawings())
def test_shapes_on_the_meta_device_are_the_real_ones(drawing):
    entry, ours, theirs = build(*drawing)
    there = entry.to_theirs({name: torch.empty(shape, device="meta") for name, shape in ours.items()})
    assert {name: tuple(x.shape) for name, x in there.items()} == theirs
    assert all(x.is_meta for x in there.values())


def test_a_fused_map_is_theirs_stacked_in_their_order():
    theirs = {
        f"{n}.{end}": integers(2, *rest, seed=ord(n)) for n in "qkv" for end, rest in (("weight", (3,)), ("bias", ()))
    }
    for row, end in zip(linear("qkv", ["q", "k", "v"]), ("weight", "bias"), strict=True):
        assert torch.equal(row.to_ours(theirs)[f"qkv.{end}"], torch.cat([theirs[f"{n}.{end}"] for n in "qkv"]))


def test_a_map_without_bias_is_one_row():
    (row,) = linear("a", "b", bias=False)
    assert [*row.ours, *row.theirs] == ["a.weight", "b.weight"]


def test_pieces_of_unequal_height_are_cut_where_they_end():
    entry = parameter({"qkv": "qkv", "up": "mlp"}, "fused", heights={"qkv": 3, "mlp": 4})
    ours = entry.to_ours({"fused": torch.arange(14.0)})
    assert ours["qkv"].tolist() == [0, 1, 2, 3, 4, 5]
    assert ours["up"].tolist() == [6, 7, 8, 9, 10, 11, 12, 13]


def test_halves_swap_by_their_names():
    entry = parameter({"ours": "shift scale"}, {"theirs": "scale shift"})
    assert entry.to_ours({"theirs": torch.arange(4.0)})["ours"].tolist() == [2, 3, 0, 1]


def test_pieces_move_between_tensors():
    entry = parameter({"video": "v1 v2", "text": "t1 t2"}, {"norm1": "v1 t1", "norm2": "v2 t2"})
    ours = entry.to_ours({"norm1": torch.tensor([1.0, 2.0]), "norm2": torch.tensor([3.0, 4.0])})
    assert ours["video"].tolist() == [1, 3]
    assert ours["text"].tolist() == [2, 4]


def test_queries_and_keys_of_the_half_layout_become_interleaved_and_values_stay():
    heads = reordered(interleaved_from_half((4,)))
    entry = parameter("qkv", ["q", "k", "v"], each={"q": heads, "k": heads})
    x = torch.arange(8.0)  # two heads
    turned, kept = [0, 2, 1, 3, 4, 6, 5, 7], list(range(8))
    assert entry.to_ours({"q": x, "k": x, "v": x})["qkv"].tolist() == [*turned, *turned, *kept]


def test_a_patch_convolution_is_a_linear_map_of_patches():
    weight, bias = linear("embed", "proj", weight=rearranged("d c t h w -> d (c t h w)", t=1, h=2, w=2))
    theirs = {"proj.weight": integers(5, 3, 1, 2, 2), "proj.bias": integers(5)}
    latents = integers(1, 3, 2, 4, 4, seed=3)
    conv = F.conv3d(latents, theirs["proj.weight"], theirs["proj.bias"], stride=(1, 2, 2))
    ours = F.linear(
        patchify(latents, Patch(1, 2, 2)), weight.to_ours(theirs)["embed.weight"], bias.to_ours(theirs)["embed.bias"]
    )
    assert torch.equal(ours, rearrange(conv, "B D T H W -> B (T H W) D"))


def test_an_output_of_the_other_sign_and_order_is_turned_round():
    rows = linear("out", "proj_out", rearranged("(h w c) ... -> (c h w) ...", h=2, w=2), NEGATED)
    theirs = {"proj_out.weight": integers(12, 5), "proj_out.bias": integers(12, seed=1)}
    ours = {name: x for row in rows for name, x in row.to_ours(theirs).items()}
    x = integers(7, 5, seed=2)
    expected = -rearrange(
        F.linear(x, theirs["proj_out.weight"], theirs["proj_out.bias"]), "n (h w c) -> n (c h w)", h=2, w=2
    )
    assert torch.equal(F.linear(x, ours["out.weight"], ours["out.bias"]), expected)


def test_a_chain_goes_back_in_reverse():
    change = chained(rearranged("a b -> b a"), reordered(torch.tensor([1, 2, 0])))
    x = integers(2, 3)
    assert torch.equal(change.to_ours(x), x.T[[1, 2, 0]])
    assert torch.equal(change.to_theirs(change.to_ours(x)), x)


def test_copies_are_read_once_and_all_written_but_must_agree():
    entry = parameter({"time": "a"}, {"blocks.0.time": "a", "blocks.1.time": "a"})
    x = integers(3)
    assert torch.equal(entry.to_ours({"blocks.0.time": x, "blocks.1.time": x.clone()})["time"], x)
    assert entry.to_theirs({"time": x}).keys() == {"blocks.0.time", "blocks.1.time"}
    with pytest.raises(CheckpointError, match=r"blocks\.1\.time holds another"):
        entry.to_ours({"blocks.0.time": x, "blocks.1.time": x + 1})


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_what_is_derived_may_be_rounded_but_not_trained(dtype):
    waves = torch.linspace(-3, 3, 50).sin()
    row = derived("pos_embed", lambda: waves)
    assert row.to_ours({"pos_embed": waves.to(dtype)}) == {}
    assert torch.equal(row.to_theirs({})["pos_embed"], waves)
    with pytest.raises(CheckpointError, match="pos_embed is not what the configuration makes"):
        row.to_ours({"pos_embed": (waves + 0.1).to(dtype)})


def test_what_is_given_is_set_and_on_the_way_back_checked():
    row = given("mean", lambda: torch.ones(3))
    assert row.to_ours({})["mean"].tolist() == [1, 1, 1]
    assert row.to_theirs({"mean": torch.ones(3)}) == {}
    with pytest.raises(CheckpointError, match="mean is not what the configuration makes"):
        row.to_theirs({"mean": torch.zeros(3)})


def test_tables_nest_and_prefix_every_kind_of_row():
    block = table(linear("a", "b"), derived("freqs", lambda: torch.ones(1)), given("mean", lambda: torch.ones(1)))
    rows = table(
        (table(block, ignored("old"), ours=f"blocks.{i}.", theirs=f"layers.{i}.") for i in range(2)), theirs="model."
    )
    assert [name for row in rows for name in row.ours] == [
        f"blocks.{i}.{name}" for i in range(2) for name in ("a.weight", "a.bias", "mean")
    ]
    assert [name for row in rows for name in row.theirs] == [
        f"model.layers.{i}.{name}" for i in range(2) for name in ("b.weight", "b.bias", "freqs", "old")
    ]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: parameter({"a": "x y"}, {"b": "x z"}),
            r"same pieces.*\['x', 'y'\] in ours \(a\).*\['x', 'z'\] in theirs",
        ),
        (lambda: parameter({"a": "x x"}, {"b": "x"}), "ours each once"),
        (lambda: parameter("a", ["b", "c"], each={"d": NEGATED}), r"pieces \['d'\], but the pieces are \['b', 'c'\]"),
        (lambda: parameter("a", ["b", "c"], heights={"d": 2}), r"pieces \['d'\]"),
    ],
)
def test_rows_that_cannot_be_are_refused(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


def test_rows_that_do_not_divide_are_refused_by_name():
    with pytest.raises(CheckpointError, match=r"fused has 7 rows, which \('a', 'b'\)"):
        parameter(["a", "b"], "fused").to_ours({"fused": torch.zeros(7)})


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(2, 6), nn.Linear(2, 2, bias=False)
        self.again = self.out


FITS = table(linear("qkv", ["q", "k", "v"]), linear("out", "o", bias=False), ignored("rubbish"))
SHAPES = {f"{n}.{end}": shape for n in "qkv" for end, shape in (("weight", [2, 2]), ("bias", [2]))} | {
    "o.weight": [2, 2]
}


@pytest.mark.parametrize("found", [SHAPES, SHAPES | {"rubbish": [1]}, dict.fromkeys(SHAPES)])
def test_nothing_differs_between_a_model_and_its_checkpoint(found):
    with torch.device("meta"):
        assert differences(FITS, Pair(), found) == ""


def test_tied_tensors_are_one_under_any_name():
    rows = table(linear("qkv", ["q", "k", "v"]), linear("again", "o", bias=False))
    assert differences(rows, Pair(), SHAPES) == ""
    assert "1 of ours that several rows fill (out.weight)" in differences(
        (*FITS, *linear("again", "o2", bias=False)), Pair(), SHAPES | {"o2.weight": None}
    )


@pytest.mark.parametrize(
    ("rows", "found", "said"),
    [
        (FITS, {k: v for k, v in SHAPES.items() if k != "q.bias"}, "1 missing (q.bias)"),
        (FITS, SHAPES | {"new": [1]}, "1 unexpected (new)"),
        (FITS, SHAPES | {"k.bias": [3]}, "1 of another shape (k.bias is [3], expected [2])"),
        (FITS[1:], SHAPES, "3 unexpected (q.weight, k.weight, v.weight)"),
        (FITS[1:], {}, "1 of ours that no row fills (qkv.weight)"),
        ((*FITS, *linear("mlp", "m")), SHAPES, "2 of ours that the model lacks (mlp.weight, mlp.bias)"),
        ((*FITS, ignored("q.bias")), SHAPES, "1 of theirs that several rows hold (q.bias)"),
        ((*FITS, given("extra", lambda: torch.ones(1))), SHAPES, "1 of ours that the model lacks (extra)"),
        ((*FITS, derived("freqs", lambda: torch.ones(2))), SHAPES | {"freqs": [3]}, "freqs is [3], expected [2]"),
    ],
)
def test_all_that_differs_is_listed(rows, found, said):
    assert said in differences(rows, Pair(), found)


def test_heights_that_do_not_suit_the_model_are_found():
    rows = table(parameter(["qkv.weight", "out.weight"], "fused"), parameter("qkv.bias", "b"))
    said = differences(rows, Pair(), {"fused": [8, 2], "b": [6]})
    assert "of ours that a row gives another shape (qkv.weight is [4, 2], expected [6, 2], " in said
    heights = {"qkv.weight": 3, "out.weight": 1}
    assert differences([replace(rows[0], heights=heights), rows[1]], Pair(), {"fused": [8, 2], "b": [6]}) == ""
