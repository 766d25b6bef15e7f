"""Every test compares a row of clips with the loop over its clips, in float64: outputs, and gradients of all parameters."""

from dataclasses import dataclass, replace
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from reelflow.errors import ConfigError
from reelflow.models.blocks import Attend, Branches, Cross, Dual, FeedForward, Single
from reelflow.models.condition import Condition, Source
from reelflow.models.context import Layers, Refine, Sources
from reelflow.models.dit import DiTConfig, VideoDiT
from reelflow.models.packing import Clip, pack, shape_numbers
from reelflow.nn import attention
from reelflow.nn.attention import QKNorm
from reelflow.nn.embed import Learned, Number, SinCos
from reelflow.nn.norm import Norm
from reelflow.nn.patchify import Patch, token_grid
from reelflow.nn.patterns import Causal, Full, Gated, Skip, Space, Time
from reelflow.nn.rope import Centred, Steps, Yarn

BASE = DiTConfig(in_channels=2, dim=12, num_heads=2, layers=(), rope=(2, 2, 2), time=Number(channels=6))
SHARED = replace(  # self, cross and feed-forward, one map of the time for all; a picture beside the text
    BASE,
    layers=2
    * (
        Branches(
            (Attend(qk_norm=QKNorm(over="width")), Cross(qk_norm=QKNorm(over="width"), image=True), FeedForward(2.0))
        ),
    ),
    modulation="shared",
    context=Layers(5, hidden=(12,)),
    image=Layers(4, norms=True, positions=3),
    extra_channels=1,
)
JOINT = replace(  # two streams, then one; a refined text, pooled text, and a number that given frames are not told
    BASE,
    layers=(Dual(mlp_ratio=2.0), Dual(mlp_ratio=2.0), Single(mlp_ratio=2.0), Single(mlp_ratio=2.0)),
    numbers=(Number(channels=6, clean=False), Number(channels=6)),
    vector_dim=4,
    context=Refine(5, depth=1, mlp_ratio=2.0),
    out_groups="first",
)
NARROW = replace(  # a narrower text stream, read only at last; positions mixed by learned frequencies
    BASE,
    layers=(
        Dual(shift=False, gate="tanh", norm=Norm("rms"), post=Norm("rms")),
        Dual(shift=False, gate="tanh", context_out=False),
    ),
    coordinates=Centred(area=9.0),
    frequencies="learned",
    activation="swiglu",
    context=Layers(6),
    context_width=8,
    pool=2,
)
SECONDS = replace(  # positions in seconds, frequencies over the width, no patches
    BASE,
    layers=(Branches((Attend(), Cross(norm=None), FeedForward(2.0))),),
    patch=Patch(1, 1, 1),
    rope="width",
    coordinates=Steps(step=(0.1, 0.2, 0.2), start=(-1.0, -1.0, -1.0), time="seconds", first=0.25),
    modulation="shared",
    context=Layers(5),
)
LOCAL = replace(  # every pattern of attention, classes, positions that are added, residuals, a stem
    BASE,
    layers=(
        Branches((Attend(Space()), Attend(Time()), Cross(), FeedForward(2.0))),
        Dual(mlp_ratio=2.0, attend=Gated("token"), again=Full()),
        Single(mlp_ratio=2.0, attend=Gated("head")),
        Branches((Attend(Gated("token")), Attend(Causal(1)), Attend(Skip(1)), FeedForward(2.0))),
    ),
    absolute=(SinCos(), Learned((3, 3, 3), every=True), SinCos(before=1, still=False)),
    stem=2,
    num_classes=3,
    context=Sources((Layers(5), Layers(3))),
)
TIED = replace(  # streams with the same weights; text and clip in one table; an axis beyond the trained length
    BASE,
    layers=(Dual(tied=True), Dual(tied=True)),
    context=Layers(5),
    absolute=(Learned((3, 3, 3), form="grid", context=3),),
    extension=Yarn(slow=0.01, fast=0.2, temperature=0.1),
    trained=(2.0, 2.0, 2.0),
)
BARE = replace(BASE, layers=(Branches((Attend(), FeedForward(2.0))), Single(), Dual()))
CONFIGS = {
    "shared": SHARED,
    "joint": JOINT,
    "narrow": NARROW,
    "seconds": SECONDS,
    "local": LOCAL,
    "tied": TIED,
    "bare": BARE,
}


@dataclass(frozen=True)
class Shape:
    """What a clip of a mix looks like."""

    grid: tuple[int, int, int]  # tokens
    times: int  # one for the clip, each frame or each token
    text: int  # tokens
    hidden: int  # of these, at the end


@st.composite
def shapes(draw: st.DrawFn) -> Shape:
    text = draw(st.integers(1, 4))
    return Shape(
        draw(st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 3))),
        draw(st.sampled_from([0, 0, 1, 2])),
        text,
        draw(st.integers(0, text)),
    )


@cache
def network(config: DiTConfig) -> VideoDiT:
    torch.manual_seed(0)
    model = VideoDiT(config).double()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model


def clip_of(config: DiTConfig, shape: Shape, generator: torch.Generator) -> Clip:
    def normal(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64)

    extents = [n * p for n, p in zip(shape.grid, config.patch, strict=True)]
    grid = token_grid(extents, config.patch)
    length = 3 if config is TIED else shape.text
    mask = torch.arange(length)[None] < length - min(shape.hidden, length)
    further = (Source(normal(1, 2, 3), torch.tensor([[False, True]])),) if isinstance(config.context, Sources) else None
    t = torch.rand(1, (1, grid.t, grid.num_tokens)[shape.times], generator=generator, dtype=torch.float64)
    return Clip(
        normal(1, config.in_channels, *extents),
        t.round() if shape.times == 2 else t[:, 0] if shape.times == 0 else t,
        Condition(
            context=None if config.context is None else normal(1, length, config.context_dim),
            context_mask=mask if config.context is not None and (further or shape.hidden) else None,
            vector=normal(1, config.vector_dim) if config.vector_dim else None,
            numbers=normal(1, len(config.numbers)) if config.numbers else None,
            label=torch.randint(4, (1,), generator=generator) if config.num_classes else None,
            image=normal(1, 3, 4) if config.image else None,
            channels=normal(1, config.extra_channels, *extents) if config.extra_channels else None,
            residual=normal(1, grid.num_tokens, config.dim) if config is LOCAL else None,
            further=further,
        ),
        token_rate=float(torch.rand((), generator=generator)) + 1 if config is SECONDS else None,
    )


def clips_of(config: DiTConfig, mix: list[Shape], seed: int = 0) -> list[Clip]:
    generator = torch.Generator().manual_seed(seed)
    return [clip_of(config, shape, generator) for shape in mix]


def one_by_one(model: VideoDiT, clips: list[Clip], skip: tuple[int, ...] = ()) -> list[torch.Tensor]:
    return [model(clip.latents, clip.t, clip.condition, token_rate=clip.token_rate, skip=skip) for clip in clips]


def gradients(model: VideoDiT, outputs: list[torch.Tensor] | tuple[torch.Tensor, ...]) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    weights = (torch.randn(y.shape, generator=generator, dtype=y.dtype) for y in outputs)
    loss = sum((w * y).sum() + y.square().mean() for w, y in zip(weights, outputs, strict=True))
    given = [p for p in model.parameters() if p.requires_grad]
    return [
        torch.zeros_like(p) if g is None else g
        for p, g in zip(given, torch.autograd.grad(loss, given, allow_unused=True), strict=True)
    ]


def check_equal(model: VideoDiT, clips: list[Clip], skip: tuple[int, ...] = ()) -> None:
    packed, alone = model.forward_packed(pack(clips), skip=skip), one_by_one(model, clips, skip)
    for ours, theirs in zip(packed, alone, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)
    for ours, theirs in zip(gradients(model, packed), gradients(model, alone), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10 * max(1.0, theirs.abs().max().item()))


@pytest.mark.parametrize("name", CONFIGS)
@settings(max_examples=7, deadline=None)
@given(mix=st.lists(shapes(), min_size=1, max_size=4), seed=st.integers(0, 2**16))
def test_a_row_equals_the_loop_over_its_clips(name, mix, seed):
    config = CONFIGS[name]
    check_equal(network(config), clips_of(config, mix, seed))


def test_a_row_of_one_kernel_equals_the_loop(monkeypatch):
    """The kernel for a GPU, behind a stand-in that reads its arguments as torch documents them."""
    shapes = [(3, 4), (1, 0), (5, 2)]
    generator = torch.Generator().manual_seed(0)
    q, k, v = ([torch.randn(1, 2, pair[part], 4, generator=generator) for pair in shapes] for part in (0, 1, 1))

    def stand_in(query, key, value, starts, key_starts, longest, longest_key):
        assert (starts.dtype, longest, longest_key) == (torch.int32, 5, 4)
        cuts = [
            x.tensor_split(s[1:-1].long(), dim=0) for x, s in ((query, starts), (key, key_starts), (value, key_starts))
        ]
        runs = [[part.transpose(0, 1)[None] for part in parts] for parts in cuts]
        found = attention.attend_segments(*runs)
        return torch.cat([part[0].unflatten(-1, (2, 4)) for part in found])

    monkeypatch.setattr(attention, "varlen_attn", stand_in)
    for ours, theirs in zip(attention._attend_varlen(q, k, v), attention.attend_segments(q, k, v), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_a_row_costs_what_its_clips_cost():
    """No token is computed that is no clip's: the products, counted as they run, are those of the loop."""
    config = replace(BARE, context=Layers(5), layers=(Dual(), Single(), Branches((Attend(), Cross(), FeedForward()))))
    mix = [Shape((1, 2, 3), 0, 2, 0), Shape((3, 1, 2), 0, 2, 0), Shape((2, 3, 3), 0, 2, 0)]
    model, clips = network(config), clips_of(config, mix)
    counts = []
    for forward in (lambda: model.forward_packed(pack(clips)), lambda: one_by_one(model, clips)):
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            forward()
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


def test_blocks_are_skipped_in_a_row_too():
    mix = [Shape((1, 2, 3), 0, 2, 1), Shape((3, 1, 2), 1, 1, 0)]
    check_equal(network(LOCAL), clips_of(LOCAL, mix), skip=(1,))
    with pytest.raises(ConfigError, match="skip takes blocks 0 to 3, got 4"):
        network(LOCAL).forward_packed(pack(clips_of(LOCAL, mix)), skip=(4,))


def test_shape_numbers_say_width_to_height_and_latent_frames():
    told = shape_numbers(("frames", "aspect"), torch.zeros(2, 1, 5, 4, 6))
    assert told.tolist() == [[5.0, 1.5]] * 2


def test_clips_that_cannot_share_a_row_are_refused():
    clips = clips_of(SHARED, 2 * [Shape((1, 1, 1), 0, 1, 0)])
    for part in ("channels", "image", "context"):
        lacking = replace(clips[1], condition=replace(clips[1].condition, **{part: None}))
        with pytest.raises(ConfigError, match=f"only some of (the clips|them) have (condition.)?{part}"):
            pack([clips[0], lacking])
    with pytest.raises(ConfigError, match="at least one clip"):
        pack([])
    with pytest.raises(ConfigError, match="a batch of one"):
        pack([Clip(torch.zeros(2, 1, 1, 1, 1), torch.zeros(2), Condition())])
    with pytest.raises(ConfigError, match=r"the model needs condition\.context"):
        network(SHARED).forward_packed(
            pack([replace(clip, condition=replace(clip.condition, context=None)) for clip in clips])
        )
