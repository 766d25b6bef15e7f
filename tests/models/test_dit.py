from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from reelflow.config import from_dict, to_dict
from reelflow.errors import ConfigError
from reelflow.models.blocks import Attend, Branches, Cross, CrossAttention, Dual, FeedForward, Single, gate_values
from reelflow.models.condition import Condition
from reelflow.models.context import Layers, Refine
from reelflow.models.dit import DiTConfig, VideoDiT
from reelflow.nn.embed import Apart, Learned, SinCos
from reelflow.nn.norm import Norm
from reelflow.nn.patchify import Patch
from reelflow.nn.patterns import Causal, Full, Gated, Space, Time, Window

FULL = DiTConfig(
    in_channels=3,
    dim=24,
    num_heads=2,
    layers=(Dual(mlp_ratio=2.0), Single(mlp_ratio=2.0)),
    patch=Patch(1, 2, 2),
    rope=(4, 4, 4),
    context=Layers(5),
    vector_dim=4,
    extra_channels=2,
    num_classes=3,
)
BARE = replace(FULL, context=None, vector_dim=0, extra_channels=0, num_classes=0)
FACTORISED = Branches((Attend(Space()), Attend(Time()), FeedForward(2.0)))
WITH_TEXT = Branches((Attend(Space()), Attend(Time()), Cross(), FeedForward(2.0)))
WITH_PICTURE = Branches((Attend(), Cross(image=True), FeedForward(2.0)))
LAYERS = [(Dual(mlp_ratio=2.0),), (Single(mlp_ratio=2.0),), (Dual(), Single(), Single()), (WITH_TEXT,)]
T, H, W = 3, 4, 6
FRAME_TOKENS = H // 2 * (W // 2)
TOKENS = T * FRAME_TOKENS


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def network(config: DiTConfig) -> VideoDiT:
    """A model in which no part is silent: every parameter is drawn at random."""
    torch.manual_seed(0)
    model = VideoDiT(config).double()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model


def doors(batch: int = 2, *, residual: bool = True) -> Condition:
    mask = torch.ones(batch, 4, dtype=torch.bool)
    mask[0, 2:] = False
    return Condition(
        context=normal(batch, 4, 5, seed=1),
        context_mask=mask,
        vector=normal(batch, 4, seed=2),
        label=torch.arange(batch) % 4,
        channels=normal(batch, 2, T, H, W, seed=3),
        residual=normal(batch, TOKENS, 24, seed=4) if residual else None,
    )


FITTING = doors(residual=False)
X, TIMES = normal(2, 3, T, H, W, seed=5), torch.tensor([0.2, 0.9], dtype=torch.float64)


def close(a: torch.Tensor, b: torch.Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_a_fresh_model_answers_zero():
    torch.manual_seed(0)
    y = VideoDiT(FULL).double()(X, TIMES, doors())
    assert y.shape == X.shape
    assert not y.any()


@pytest.mark.parametrize("layers", LAYERS)
@pytest.mark.parametrize("groups", [1, T, TOKENS])
def test_equal_times_per_clip_per_frame_and_per_token_are_one_thing(layers, groups):
    model = network(replace(FULL, layers=layers))
    close(model(X, TIMES[:, None].expand(-1, groups), doors()), model(X, TIMES, doors()))


@pytest.mark.parametrize("layers", LAYERS)
def test_the_time_of_one_frame_is_felt_by_all_frames_of_its_clip_only(layers):
    model, t = network(replace(FULL, layers=layers)), TIMES[:, None].repeat(1, T)
    before = model(X, t, doors())
    t[0, 1] += 0.1
    after = model(X, t, doors())
    assert (before[0] != after[0]).flatten(2).any(-1).any(0).all()
    assert (before[0] - after[0]).abs().amax((0, 2, 3)).argmax() == 1
    assert torch.equal(before[1], after[1])


def test_a_time_per_frame_is_the_same_time_for_each_of_its_tokens():
    model, t = network(FULL), torch.tensor([[1.0, 0.3, 0.3], [0.0, 0.5, 0.7]], dtype=torch.float64)
    close(model(X, t.repeat_interleave(FRAME_TOKENS, dim=1), doors()), model(X, t, doors()))


def test_the_context_is_told_the_time_of_the_noisiest_frame():
    model, t, seen = network(FULL), torch.tensor([[1.0, 0.3, 0.8], [0.4, 0.5, 0.1]], dtype=torch.float64), []
    model.blocks[0].register_forward_pre_hook(lambda block, arguments: seen.append(*arguments))
    for times in (t, t.amin(1)):
        model(X, times, doors())
    assert torch.equal(seen[0].context_vector, seen[1].context_vector)


@pytest.mark.parametrize("door", ["context", "vector", "label", "channels", "residual"])
@pytest.mark.parametrize("layers", LAYERS)
def test_every_door_reaches_the_output(layers, door):
    model, condition = network(replace(FULL, layers=layers)), doors()
    part = getattr(condition, door)
    other = replace(condition, **{door: part.flip(0) if door == "label" else 1.1 * part})
    change = model(X, TIMES, condition) - model(X, TIMES, other)
    assert (change.abs() > 1e-6).double().mean() > 0.99


@pytest.mark.parametrize("t", [TIMES, TIMES[:, None].expand(-1, T)])
def test_masked_context_tokens_do_not_matter(t):
    model, condition = network(FULL), doors()
    noise = torch.where(condition.context_mask[..., None], condition.context, 30.0)
    y = model(X, t, condition)
    close(model(X, t, replace(condition, context=noise)), y)
    shorter = Condition(**{**vars(condition), "context": condition.context[:, :2], "context_mask": None})
    close(model(X, t, shorter)[0], y[0])
    assert not torch.equal(model(X, t, replace(condition, context_mask=None)), y)


def test_a_context_with_no_real_token_is_no_context():
    """The empty prompt: nothing to attend to, and no NaN."""
    config = replace(BARE, context=Layers(5))
    condition = Condition(context=normal(2, 4, 5), context_mask=torch.zeros(2, 4, dtype=torch.bool))
    without = Condition(context=normal(2, 0, 5))
    close(network(config)(X, TIMES, condition), network(config)(X, TIMES, without))


@pytest.mark.parametrize("layers", LAYERS)
def test_rows_of_a_batch_do_not_see_each_other(layers):
    model, batch = network(replace(FULL, layers=layers)), normal(3, 3, T, H, W)
    t, condition = torch.rand(3, T, generator=torch.Generator().manual_seed(0)).double(), doors(3)
    together = model(batch, t, condition)
    for row in range(3):
        part = slice(row, row + 1)
        alone = Condition(**{name: value[part] for name, value in vars(condition).items() if value is not None})
        close(model(batch[part], t[part], alone), together[part])


@pytest.mark.parametrize("t", [TIMES, TIMES[:, None].expand(-1, T)])
def test_gradients_reach_every_parameter(t):
    model = network(FULL)
    model(X, t, doors()).square().sum().backward()
    untouched = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert untouched == []


def test_only_what_a_last_dual_block_does_to_its_context_is_never_read():
    model = network(replace(FULL, layers=(Single(), Dual())))
    model(X, TIMES, doors()).square().sum().backward()
    untouched = {name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()}
    parts = (
        "project.norm_q.weight",
        "out.weight",
        "out.bias",
        "mlp.up.weight",
        "mlp.up.bias",
        "mlp.down.weight",
        "mlp.down.bias",
    )
    assert untouched == {f"blocks.1.context.{part}" for part in parts}


def expected_parameters(c: DiTConfig) -> int:
    def linear(inputs: int, outputs: int) -> int:
        return inputs * outputs + outputs

    dim, cells, gated = c.dim, c.patch.t * c.patch.h * c.patch.w, c.activation in ("geglu", "swiglu")
    total = linear((c.in_channels + c.extra_channels) * cells, dim)
    total += linear(dim, (c.out_channels or c.in_channels) * cells)
    total += linear(256, dim) + linear(dim, dim) + linear(dim, 2 * dim)
    total += (linear(c.vector_dim, dim) + linear(dim, dim)) * bool(c.vector_dim)
    text, head = c.context_width or dim, dim // c.num_heads
    total += linear(c.context_dim, text) * bool(c.context_dim) + (c.num_classes + 1) * dim * bool(c.num_classes)

    def mlp(width: int, ratio: float) -> int:
        hidden = round(ratio * width)
        return linear(width, hidden * (1 + gated)) + linear(hidden, width)

    def attention(width: int) -> int:
        return linear(width, 3 * dim) + 2 * head + linear(dim, width)

    for layer in c.layers:
        if isinstance(layer, Dual):
            total += linear(dim, 6 * dim) + attention(dim) + mlp(dim, layer.mlp_ratio)
            if layer.context_out:
                total += linear(dim, 6 * text) + attention(text) + mlp(text, layer.mlp_ratio)
            else:
                total += linear(dim, 2 * text) + linear(text, 2 * dim) + head
        elif isinstance(layer, Single):
            hidden = round(layer.mlp_ratio * dim)
            total += linear(dim, 3 * dim) + linear(dim, 3 * dim) + 2 * head
            total += linear(dim, hidden * (1 + gated)) + linear(dim + hidden, dim)
        else:
            for branch in layer.branches:
                total += linear(dim, 3 * dim) - dim if branch.adaptive else 2 * dim
                if isinstance(branch, FeedForward):
                    total += mlp(dim, branch.ratio)
                elif isinstance(branch, Cross):
                    total += 2 * linear(dim, dim) + linear(text, 2 * dim) + 2 * head
                else:
                    total += attention(dim) + (c.num_heads if branch.pattern == Gated("head") else 0)
            total += dim * sum(branch.adaptive for branch in layer.branches)
    return total


@settings(max_examples=15, deadline=None)
@given(
    base=st.sampled_from([FULL, BARE, replace(FULL, layers=(), context_width=10, out_channels=7)]),
    layers=st.lists(
        st.sampled_from(
            [
                Dual(),
                Dual(context_out=False),
                Single(mlp_ratio=2.5),
                FACTORISED,
                Branches((Attend(Gated("head")), FeedForward(norm=Norm(affine=True), adaptive=False))),
                WITH_TEXT,
            ]
        ),
        max_size=3,
    ),
    activation=st.sampled_from(["gelu_tanh", "relu2", "swiglu"]),
    patch=st.tuples(*3 * [st.integers(1, 2)]),
)
def test_parameters_are_counted_by_formula(base, layers, activation, patch):
    if base.context_width:
        layers = [layer for layer in layers if not isinstance(layer, Single)]
    if not base.context:
        layers = [layer for layer in layers if layer != WITH_TEXT]
    config = replace(base, layers=tuple(layers), activation=activation, patch=Patch(*patch))
    with torch.device("meta"):
        model = VideoDiT(config)
    assert sum(p.numel() for p in model.parameters()) == expected_parameters(config)


@settings(max_examples=10, deadline=None)
@given(
    grid=st.tuples(st.integers(1, 4), st.integers(1, 3), st.integers(1, 3)), patch=st.tuples(*3 * [st.integers(1, 2)])
)
def test_one_model_takes_any_number_of_frames_and_any_size(grid, patch):
    model = network(replace(BARE, patch=Patch(*patch)))
    x = normal(1, 3, *(n * p for n, p in zip(grid, patch, strict=True)))
    y = model(x, torch.zeros(1, dtype=torch.float64))
    assert y.shape == x.shape
    assert y.any()


CLASS_ONLY = replace(BARE, num_classes=3, activation="geglu", out_channels=6)
TEXT = replace(BARE, context=Layers(5))
FOUNDING = {
    "factorised": replace(CLASS_ONLY, layers=2 * (FACTORISED,)),
    "pixels": replace(CLASS_ONLY, layers=2 * (FACTORISED,), in_channels=3, patch=Patch(1, 4, 6)),
    "space-time-cross": replace(TEXT, layers=2 * (WITH_TEXT,)),
    "gated": replace(TEXT, layers=2 * (Branches((Attend(Gated("head")), Cross(), FeedForward(2.0))),)),
    "asymmetric": replace(TEXT, layers=(Dual(), Dual(context_out=False)), context_width=10),
    "periodic": replace(CLASS_ONLY, layers=(FACTORISED, Branches((Attend(Full()), FeedForward())))),
    "windows": replace(TEXT, layers=(Dual(attend=Window(2, 2, 2)), Single(attend=Window(2, 2, 2, shift=(1, 1, 1))))),
}


@pytest.mark.parametrize("config", FOUNDING.values(), ids=FOUNDING.keys())
def test_the_founding_designs_are_configurations_all_of_whose_weights_learn(config):
    assert from_dict(DiTConfig, to_dict(config)) == config
    condition = Condition(
        context=FITTING.context if config.context else None,
        context_mask=FITTING.context_mask if config.context else None,
        label=FITTING.label if config.num_classes else None,
    )
    model = network(config)
    y = model(X, TIMES, condition)
    assert y.shape == (2, config.out_channels or 3, T, H, W)
    y.square().sum().backward()
    untouched = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert untouched == []
    assert len(gate_values(model)) == (2 if config is FOUNDING["gated"] else 0)


@pytest.mark.parametrize(
    "layers",
    [2 * (Branches((Attend(Causal()), Cross(), FeedForward())),), (Dual(attend=Causal()), Single(attend=Causal()))],
    ids=["branches", "joint"],
)
def test_a_causal_model_predicts_early_frames_without_the_late_ones(layers):
    model, t = network(replace(TEXT, layers=layers)), torch.tensor([[0.1, 0.5, 0.7]] * 2, dtype=torch.float64)
    condition = Condition(context=FITTING.context, context_mask=FITTING.context_mask)
    changed, later = X.clone(), t.clone()
    changed[:, :, 2:] += 1
    later[:, 2:] += 0.1
    before, after = model(X, t, condition), model(changed, later, condition)
    close(after[:, :, :2], before[:, :, :2])
    assert (after[:, :, 2] != before[:, :, 2]).any()


def test_skipping_blocks_is_the_model_of_the_others():
    layers = (Dual(), WITH_TEXT, Single(), Dual())
    model = network(replace(FULL, layers=layers))
    for skip in ((1,), frozenset({0, 2}), (0, 1, 2, 3)):
        kept = [i for i in range(4) if i not in skip]
        fewer = network(replace(FULL, layers=tuple(layers[i] for i in kept)))
        own = {n: value for n, value in model.state_dict().items() if not n.startswith("blocks.")}
        for new, old in enumerate(kept):
            own |= {f"blocks.{new}.{n}": value for n, value in model.blocks[old].state_dict().items()}
        fewer.load_state_dict(own)
        y = model(X, TIMES, doors(), skip=skip)
        assert torch.equal(y, fewer(X, TIMES, doors()))
        assert not torch.equal(y, model(X, TIMES, doors()))


@pytest.mark.parametrize("skip", [(2,), (-1,)])
def test_a_block_that_is_not_there_cannot_be_skipped(skip):
    with pytest.raises(ConfigError, match=rf"skip takes blocks 0 to 1, got {skip[0]}"):
        network(FULL)(X, TIMES, doors(), skip=skip)


def test_a_window_larger_than_the_clip_is_refused():
    model = network(replace(BARE, layers=(Single(attend=Window(1, 3, 2)),)))
    with pytest.raises(
        ConfigError, match=r"a window of h=3 tokens is larger than the grid of \(3, 2, 3\) tokens; nearest: 2"
    ):
        model(X, TIMES)


def test_frames_have_an_order_and_rows_and_columns_a_place():
    model, y = network(BARE), network(BARE)(X, TIMES)
    for axis in (2, 3, 4):
        assert not torch.allclose(model(X.flip(axis), TIMES).flip(axis), y, atol=1e-3)


def test_times_may_be_told_to_clips_and_not_to_single_frames():
    told, clips, none = (
        network(replace(BARE, absolute=absolute)) for absolute in ((SinCos(),), (SinCos(still=False),), ())
    )
    assert torch.equal(told(X, TIMES), clips(X, TIMES))
    assert torch.equal(clips(X[:, :, :1], TIMES), none(X[:, :, :1], TIMES))
    assert not torch.equal(told(X[:, :, :1], TIMES), none(X[:, :, :1], TIMES))


def test_one_table_of_positions_may_serve_context_and_clip():
    """Swapping two context tokens changes nothing, unless they are told their places."""
    table = Learned((T, H // 2, W // 2), form="grid", context=4)
    plain, placed = (replace(BARE, context=Layers(5), absolute=absolute) for absolute in ((), (table,)))
    context = normal(2, 4, 5, seed=1)
    for config, same in ((plain, True), (placed, False)):
        model = network(config)
        found, swapped = (model(X, TIMES, Condition(context=c)) for c in (context, context.flip(1)))
        assert torch.allclose(found, swapped, rtol=0, atol=1e-12) == same
    with pytest.raises(ConfigError, match="for 4 context tokens, got 3"):
        model(X, TIMES, Condition(context=context[:, :3]))


@pytest.mark.parametrize("t", [TIMES, TIMES[:, None].expand(-1, T)])
def test_bfloat16_autocast_stays_near_float32(t):
    model, x = network(FULL).float(), X.float()
    condition = doors().to("cpu", torch.float32)
    exact = model(x, t.float(), condition)
    with torch.autocast("cpu", torch.bfloat16):
        rough = model(x, t.float(), condition)
    assert (rough.float() - exact).norm() < 0.03 * exact.norm()


@pytest.mark.parametrize("layers", [*LAYERS, (WITH_PICTURE, WITH_TEXT), (Dual(mlp_ratio=2.0), WITH_PICTURE)])
@pytest.mark.parametrize("context", [Layers(5), Refine(5, depth=1)])
def test_a_prepared_condition_predicts_the_same_to_the_last_bit(layers, context):
    picture = Layers(6) if WITH_PICTURE in layers else None
    model = network(replace(FULL, layers=layers, context=context, image=picture, pool=1))
    condition = replace(doors(), image=normal(2, 3, 6, seed=6) if picture else None)
    prepared = model.prepare(X, condition, token_rate=2.0)
    for t in (TIMES, TIMES.flip(0)):
        assert torch.equal(model(2 * X, t, prepared), model(2 * X, t, condition, token_rate=2.0))


def test_a_prepared_condition_is_not_embedded_again_nor_read_by_cross_attention():
    model, again = network(replace(FULL, layers=(WITH_TEXT, WITH_TEXT))), []
    prepared = model.prepare(X, FITTING)
    kept = [model.context, *(m.read for m in model.modules() if isinstance(m, CrossAttention))]
    for module in kept:
        module.register_forward_hook(lambda *_: again.append(1))
    model(X, TIMES, prepared)
    assert not again
    model(X, TIMES, FITTING)
    assert len(again) == len(kept) == 3


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_equal_tokens_that_end_a_context_are_read_as_few_that_count_as_many(dtype):
    model = network(replace(BARE, layers=(WITH_TEXT, WITH_TEXT), context=Layers(5))).to(dtype)
    context = normal(2, 40, 5, seed=1).to(dtype)
    context[0, 11:], context[1, 7:] = context[0, -1:].clone(), context[1, -1:].clone()
    x, t, told = X.to(dtype), TIMES.to(dtype), Condition(context=context)
    with torch.no_grad():
        prepared = model.prepare(x, told)
        (k, _), *_ = next(iter(prepared.reads.values()))
        assert 11 < k.shape[2] <= 13
        found, expected = model(x, t, prepared).double(), model(x, t, told).double()
    error = (found - expected).abs().max() / expected.square().mean().sqrt()
    assert error < {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 0.05}[dtype]
    assert not torch.equal(expected, model(x, t, Condition(context=context[:, :13])).double())


def test_equal_tokens_are_kept_where_each_has_a_place_or_changes():
    context = Condition(context=normal(2, 1, 5, seed=1).expand(2, 8, 5))
    table = Learned((T, H // 2, W // 2), form="grid", context=8)
    for layers, door, absolute, lengths in (
        ((WITH_TEXT,), Layers(5, positions=8), (), {8}),
        ((WITH_TEXT,), Layers(5), (table,), {8}),
        ((WITH_TEXT,), Layers(5), (), {1, 2}),
        ((WITH_TEXT, Dual()), Layers(5), (), {8}),
    ):
        model = network(replace(BARE, layers=layers, context=door, absolute=absolute))
        prepared = model.prepare(X, context)
        assert prepared.context.tokens.shape[1] in lengths
        close(model(X, TIMES, prepared), model(X, TIMES, context))


@pytest.mark.parametrize("asked", [{"latents": X[:, :, :2]}, {"token_rate": 3.0}])
def test_a_prepared_condition_is_refused_for_another_shape_or_rate(asked):
    model = network(replace(FULL, extra_channels=0))
    prepared = model.prepare(X, replace(FITTING, channels=None))
    with pytest.raises(ConfigError, match=r"prepared for \(3, 2, 3\) tokens"):
        model(**{"latents": X, "t": TIMES, "condition": prepared, **asked})


@pytest.mark.parametrize(
    ("x", "t", "condition", "message"),
    [
        (X[..., :3], TIMES, FITTING, r"latent width must be a multiple of the patch \(2\), got 3; nearest: 2 or 4"),
        (X[:, :2], TIMES, FITTING, "the model reads 3 latent channels, got 2"),
        (X, torch.zeros(2, 2), FITTING, r"t takes 1, 3 \(frames\) or 18 \(tokens\) values per clip, got 2"),
        (X, TIMES, replace(FITTING, channels=None), "2 channels beside the latents, got 0"),
        (X, TIMES, replace(FITTING, channels=FITTING.channels[:, :1]), "2 channels beside the latents, got 1"),
        (X, TIMES, replace(FITTING, context=None), r"the model needs condition\.context"),
        (X, TIMES, replace(FITTING, vector=None), r"the model needs condition\.vector"),
        (X, TIMES, replace(FITTING, label=None), r"the model needs condition\.label"),
        (X, TIMES, replace(FITTING, context=normal(2, 4, 6)), r"reads condition\.context of width 5, got 6"),
        (X, TIMES, replace(FITTING, vector=normal(2, 3)), r"reads condition\.vector of width 4, got 3"),
    ],
)
def test_what_does_not_fit_is_refused(x, t, condition, message):
    with pytest.raises(ConfigError, match=message):
        VideoDiT(FULL).double()(x, t, condition)


@pytest.mark.parametrize("door", ["context", "vector", "label"])
def test_a_closed_door_is_refused(door):
    with pytest.raises(ConfigError, match=rf"no door for condition\.{door}"):
        VideoDiT(BARE).double()(X, TIMES, Condition(**{door: getattr(FITTING, door)}))


@pytest.mark.parametrize("twice", [False, True])
def test_maps_of_their_own_for_further_channels_add_what_a_joint_one_would(twice):
    apart = Apart((2, 1), twice=twice)
    joint, own = (network(replace(BARE, extra_channels=3, extra_apart=maps)) for maps in (None, apart))
    latents, extra = normal(2, 3, T, H, W), normal(2, 3, T, H, W, seed=1)
    weights = own.state_dict()
    for part in range(2):
        after = weights.pop(f"extra.then.{part}.weight") if twice else torch.eye(24, dtype=torch.float64)
        weights["embed.bias"] = weights["embed.bias"] + after @ weights.pop(f"extra.maps.{part}.bias")
        cells = after @ weights.pop(f"extra.maps.{part}.weight")
        weights["embed.weight"] = torch.cat([weights["embed.weight"], cells], dim=1)
    joint.load_state_dict(weights)
    t, condition = torch.tensor([0.2, 0.7], dtype=torch.float64), Condition(channels=extra)
    torch.testing.assert_close(own(latents, t, condition), joint(latents, t, condition), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_heads": 5}, r"dim must be a multiple of num_heads \(5\), got 24; nearest: 25"),
        ({"num_heads": 0}, "got 24"),
        ({"dim": 0}, "nearest: 2"),
        ({"rope": (4, 4, 6)}, r"sum to the head dim 12, got \(4, 4, 6\) \(sum 14\); for example \(4, 4, 4\)"),
        ({"patch": Patch(1, 0, 2)}, "patch must be at least 1"),
        ({"in_channels": 0}, "in_channels and patch must be at least 1, got 0"),
        ({"out_channels": -1}, "out_channels must not be negative, got -1; nearest: 0"),
        (
            {"absolute": (Learned((1, 1, 1), form="grid", context=2),), "context": None},
            "need a context as wide as the clip's tokens; got context=None",
        ),
        ({"extra_apart": Apart((2, 3))}, r"are \(2, 3\), of 2 channels; nearest: extra_channels=5"),
        ({"context_width": 10}, r"layers\[1\] is a Single, .* got dim=24 and context_width=10"),
        (
            {"layers": (Dual(), WITH_TEXT), "context": None},
            r"layers\[1\] attends to a context, but there is no context door",
        ),
    ],
)
def test_an_impossible_shape_is_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        replace(FULL, **changes)
