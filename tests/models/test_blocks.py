from dataclasses import replace

import pytest
import torch
from torch import nn

from reelflow.config import from_dict, to_dict
from reelflow.errors import ConfigError
from reelflow.models.blocks import (
    Attend,
    Branches,
    Cross,
    Dual,
    FeedForward,
    Single,
    Streams,
    Widths,
    build_block,
    gate_values,
)
from reelflow.nn.attention import QKNorm
from reelflow.nn.norm import Norm
from reelflow.nn.patchify import Grid
from reelflow.nn.patterns import Causal, Gated, Skip, Space, Time, Window, dense_mask
from reelflow.nn.rope import grid_positions, rope_table

DIM, HEADS, VECTOR, CONTEXT, FRAMES, PER_FRAME = 16, 2, 6, 3, 2, 2
TOKENS = FRAMES * PER_FRAME
PLAIN = Norm(affine=True)
JOINT = [Dual(mlp_ratio=2.0), Single(mlp_ratio=2.0)]
SPECS = pytest.mark.parametrize("spec", JOINT, ids=["dual", "single"])
READ = Dual(mlp_ratio=2.0, context_out=False)
LIST = Branches(
    (
        Attend(),
        Cross(),
        FeedForward(2.0),
        Attend(norm=PLAIN, adaptive=False),
        Cross(norm=Norm(), adaptive=True),
        FeedForward(2.0, PLAIN, adaptive=False),
    )
)
MORE = {
    "tied": Dual(mlp_ratio=2.0, tied=True, norm=PLAIN, qk_norm=QKNorm("layer")),
    "gated": Dual(mlp_ratio=2.0, shift=False, gate="tanh", post=Norm("rms"), qkv_bias=False, mlp_bias=False),
    "again": Dual(mlp_ratio=2.0, again=Space(), qk_norm=QKNorm(over="width")),
    "idle": Dual(mlp_ratio=2.0, context_out=False, idle_query=True, qk_norm=None),
}
ALL_SPECS = pytest.mark.parametrize(
    "spec", [*JOINT, READ, LIST, *MORE.values()], ids=["dual", "single", "read", "branches", *MORE]
)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def block(spec, *, activation="swiglu", context_width: int | None = None) -> nn.Module:
    torch.manual_seed(0)
    module = build_block(spec, Widths(DIM, HEADS, VECTOR, context_width or DIM, activation)).double()
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3)
    return module


def streams(*, groups: int = 1, context: int = CONTEXT) -> Streams:
    return Streams(
        video=normal(2, TOKENS, DIM),
        context=normal(2, context, DIM, seed=1),
        vector=normal(2, groups, VECTOR, seed=2),
        context_vector=normal(2, 1, VECTOR, seed=3) if groups > 1 else normal(2, 1, VECTOR, seed=2),
        rope=rope_table(grid_positions(FRAMES, PER_FRAME, 1), (4, 4, 0)),
        mask=None,
        grid=Grid(FRAMES, PER_FRAME, 1),
    )


def close(a, b) -> None:
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=1e-12)


@ALL_SPECS
@pytest.mark.parametrize("groups", [1, FRAMES, TOKENS])
def test_a_fresh_block_changes_nothing(spec, groups):
    s = streams(groups=groups)
    video, context = build_block(spec, Widths(DIM, HEADS, VECTOR, DIM, "gelu_tanh")).double()(s)
    assert torch.equal(video, s.video)
    assert torch.equal(context, s.context)


@ALL_SPECS
@pytest.mark.parametrize("groups", [FRAMES, TOKENS])
def test_equal_groups_do_what_one_group_does(spec, groups):
    s = streams()
    close(block(spec)(replace(s, vector=s.vector.expand(-1, groups, -1))), block(spec)(s))


@SPECS
def test_a_frames_vector_changes_what_its_tokens_say_to_all_others(spec):
    s = streams(groups=FRAMES)
    changed = s.vector.clone()
    changed[:, 1] += 1
    for before, after in zip(block(spec)(s), block(spec)(replace(s, vector=changed)), strict=True):
        assert (before != after).any(-1).all()


@SPECS
def test_context_tokens_follow_their_own_vector_when_frames_differ(spec):
    s = streams(groups=FRAMES)
    for before, after in zip(block(spec)(s), block(spec)(replace(s, context_vector=-s.context_vector)), strict=True):
        assert (before != after).any(-1).all()


@SPECS
def test_a_block_is_its_written_sum_of_branches(spec):
    """One head without rotation, one clip, one group: computed again from the parts, by the paper's formula."""
    torch.manual_seed(0)
    module = build_block(spec, Widths(DIM, 1, VECTOR, DIM, "silu")).double()
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3)
    s = replace(streams(), rope=torch.tensor([1.0, 0.0], dtype=torch.float64).expand(TOKENS, DIM // 2, 2))

    def norm(x):
        return (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, correction=0) + 1e-6).sqrt()

    def rms(x, weight):
        return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight

    def qkv(project, x):
        q, k, v = project.qkv(x).chunk(3, dim=-1)
        return rms(q, project.norm_q.weight), rms(k, project.norm_k.weight), v

    def attention(q, k, v):
        return (q @ k.mT / DIM**0.5).softmax(-1) @ v

    if isinstance(spec, Single):
        x = torch.cat([s.context, s.video], dim=1)
        shift, scale, gate = module.modulation(s.vector)
        y = norm(x) * (1 + scale) + shift
        heads = attention(*qkv(module.project, y))
        x = x + gate * module.out(torch.cat([heads, nn.functional.silu(module.up(y))], dim=-1))
        expected = x[:, CONTEXT:], x[:, :CONTEXT]
    else:
        parts = [(module.context, s.context, s.context_vector), (module.video, s.video, s.vector)]
        mods = [stream.modulation(vector) for stream, _, vector in parts]
        each = [
            qkv(stream.project, norm(x) * (1 + mod[1]) + mod[0])
            for (stream, x, _), mod in zip(parts, mods, strict=True)
        ]
        joint = attention(*(torch.cat(pair, dim=1) for pair in zip(*each, strict=True)))
        out = []
        for (stream, x, _), mod, heads in zip(parts, mods, joint.split([CONTEXT, TOKENS], dim=1), strict=True):
            x = x + mod[2] * stream.out(heads)
            out.append(x + mod[5] * stream.mlp(norm(x) * (1 + mod[4]) + mod[3]))
        expected = out[1], out[0]
    close(module(s), expected)


@SPECS
def test_among_video_tokens_only_relative_positions_count(spec):
    s = streams(context=0)
    moved = rope_table(grid_positions(FRAMES, PER_FRAME, 1) + torch.tensor([5.0, -2.0, 0.0]), (4, 4, 0))
    apart = rope_table(grid_positions(FRAMES, PER_FRAME, 1) * 2, (4, 4, 0))
    close(block(spec)(replace(s, rope=moved)), block(spec)(s))
    assert (block(spec)(replace(s, rope=apart))[0] != block(spec)(s)[0]).any()


@ALL_SPECS
@pytest.mark.parametrize("groups", [1, FRAMES])
def test_a_block_works_without_context(spec, groups):
    video, context = block(spec)(streams(groups=groups, context=0))
    assert context.shape == (2, 0, DIM)
    assert not torch.equal(video, streams().video)


@ALL_SPECS
def test_a_masked_context_token_says_nothing(spec):
    s, mask = streams(groups=FRAMES), torch.ones(2, 1, 1, CONTEXT + TOKENS, dtype=torch.bool)
    mask[..., 1] = False
    other = s.context.clone()
    other[:, 1] = 50.0
    before, after = (block(spec)(replace(s, context=c, mask=mask)) for c in (s.context, other))
    assert torch.equal(before[0], after[0])
    assert torch.equal(before[1][:, [0, 2]], after[1][:, [0, 2]])


@ALL_SPECS
def test_a_context_of_padding_alone_is_no_context(spec):
    """The empty prompt. Causal attention is the hard case: there the padding has nothing at all to look at."""
    specs = [spec] if isinstance(spec, Branches) else [spec, replace(spec, attend=Causal())]
    mask = torch.ones(2, 1, 1, CONTEXT + TOKENS, dtype=torch.bool)
    mask[..., :CONTEXT] = False
    for each in specs:
        s = replace(streams(), mask=mask, video=streams().video.requires_grad_())
        video, _ = block(each)(s)
        torch.testing.assert_close(video, block(each)(streams(context=0))[0], rtol=0, atol=1e-12)
        assert torch.autograd.grad(video.sum(), s.video)[0].isfinite().all()


PATTERNS = [Space(), Time(), Window(2, 1, 1), Skip(2), Causal()]


@pytest.mark.parametrize("pattern", PATTERNS, ids=lambda pattern: pattern.kind)
@pytest.mark.parametrize("kind", ["dual", "read", "single", "branches"])
def test_tokens_meet_in_a_block_as_its_pattern_says(kind, pattern):
    spec = {
        "dual": Dual(attend=pattern),
        "read": Dual(attend=pattern, context_out=False),
        "single": Single(attend=pattern),
        "branches": Branches((Attend(pattern), FeedForward())),
    }[kind]
    s = streams(context=0)
    module = block(spec)
    jacobian = torch.autograd.functional.jacobian(lambda x: module(replace(s, video=x))[0], s.video)
    met = (jacobian[0, :, :, 0] != 0).any(-1).any(1)  # out token, in token
    assert torch.equal(met, dense_mask(pattern, s.grid))


@pytest.mark.parametrize("kind", ["dual", "single"])
def test_a_gate_fully_open_is_space_and_fully_shut_is_time(kind):
    make = {"dual": Dual, "single": Single}[kind]
    for granularity in ("scalar", "head", "token"):
        module = block(make(attend=Gated(granularity)))
        for logit, pattern in ((40.0, Space()), (-40.0, Time())):
            for parameter in module.gate.parameters():
                nn.init.zeros_(parameter)
            nn.init.constant_(module.gate.logit if granularity != "token" else module.gate.linear.bias, logit)
            plain = block(make(attend=pattern))
            plain.load_state_dict(module.state_dict(), strict=False)
            close(module(streams()), plain(streams()))


@pytest.mark.parametrize("make", [Dual, Single])
def test_a_tokens_gate_reads_that_video_token_as_its_query_does(make):
    module, s, seen = block(make(attend=Gated("token"))), streams(groups=FRAMES), []
    module.gate.register_forward_pre_hook(lambda gate, inputs: seen.append(inputs[0]))
    module(s)
    modulation = module.video.modulation if make is Dual else module.modulation
    shift, scale, *_ = (chunk.repeat_interleave(PER_FRAME, dim=1) for chunk in modulation(s.vector))
    close(seen, [norm(s.video) * (1 + scale) + shift])


@pytest.mark.parametrize("granularity", ["scalar", "head", "token"])
def test_a_gate_begins_halfway_learns_and_can_be_read_at_any_time(granularity):
    torch.manual_seed(0)
    spec = Branches((Attend(Gated(granularity)), FeedForward()))
    model = nn.ModuleDict({"block": build_block(spec, Widths(DIM, HEADS, VECTOR, DIM, "silu")).double()})
    name, s = "block.branches.0.function", streams()
    assert gate_values(model) == {name: 0.5}
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    gate = model.get_submodule(name).gate
    seen = []
    gate.register_forward_hook(lambda module, inputs, alpha: seen.append(alpha))
    model["block"](s)[0].square().sum().backward()
    assert all(parameter.grad.any() for parameter in gate.parameters())
    assert 0 < seen[0].min() < seen[0].max() < 1 or granularity == "scalar"
    assert gate_values(model)[name] == pytest.approx(seen[0].mean().item(), abs=1e-6)
    assert not any("last" in key for key in model.state_dict())


def test_a_block_without_a_gate_has_no_alpha_to_read():
    assert gate_values(block(Dual())) == {}


def norm(x):
    return (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, correction=0) + 1e-6).sqrt()


def test_a_list_of_branches_is_its_written_sum():
    """Adaptive and plain, self-attention, cross-attention and MLP; attention itself has its own tests."""
    module, s = block(LIST, activation="silu", context_width=10), streams(groups=FRAMES)
    s = replace(s, context=normal(2, CONTEXT, 10))
    chunks = [c.repeat_interleave(PER_FRAME, dim=1) for c in module.modulation(s.vector)]
    assert len(chunks) == 9

    def heads(x):
        return x.unflatten(-1, (HEADS, -1)).transpose(1, 2)

    def function(f, kind, y):
        if kind == "feed_forward":
            return f.down(nn.functional.silu(f.up(y)))
        if kind == "attend":
            q, k, v = (heads(part) for part in f.project.qkv(y).chunk(3, dim=-1))
            q, k = (turned(rms(x)) for rms, x in ((f.project.norm_q, q), (f.project.norm_k, k)))
        else:
            q = f.norm_q(heads(f.query(y)))
            k, v = (heads(part) for part in f.read.kv(s.context).chunk(2, dim=-1))
            k = f.read.norm_k(k)
        weights = (q @ k.mT / (DIM // HEADS) ** 0.5).softmax(-1)
        return f.out((weights @ v).transpose(1, 2).flatten(2))

    def turned(x):
        pairs, (cos, sin) = x.unflatten(-1, (-1, 2)), s.rope.unbind(-1)
        first, second = pairs.unbind(-1)
        return torch.stack([first * cos - second * sin, first * sin + second * cos], dim=-1).flatten(-2)

    x = s.video
    for spec, branch in zip(LIST.branches, module.branches, strict=True):
        if not spec.adaptive:
            y = norm(x) * branch.norm.weight + branch.norm.bias
            x = x + function(branch.function, spec.kind, y)
        else:
            shift, scale, gate = chunks[:3]
            del chunks[:3]
            x = x + gate * function(branch.function, spec.kind, norm(x) * (1 + scale) + shift)
    video, context = module(s)
    close([video], [x])
    assert context is s.context


def test_a_narrow_context_stream_is_projected_up_to_the_attention_and_down_again():
    module, s = block(Dual(mlp_ratio=2.0), activation="silu", context_width=10), streams(groups=FRAMES)
    s = replace(s, context=normal(2, CONTEXT, 10))
    assert module.context.project.qkv.weight.shape == (3 * DIM, 10)
    assert module.context.out.weight.shape == (10, DIM)
    assert module.context.mlp.up.weight.shape == (20, 10)
    seen = []
    module.context.out.register_forward_pre_hook(lambda part, inputs: seen.append(inputs[0]))
    _, context = module(s)
    mod = module.context.modulation(s.context_vector)
    x = s.context + mod[2] * module.context.out(seen[0])
    close([context], [x + mod[5] * module.context.mlp(norm(x) * (1 + mod[4]) + mod[3])])


def test_a_context_that_is_only_read_gives_the_video_what_a_whole_stream_gives_it():
    whole, read = block(Dual(mlp_ratio=2.0), context_width=10), block(READ, context_width=10)
    state = whole.state_dict()
    for name in ("weight", "bias"):
        state[f"context.modulation.linear.{name}"] = state[f"context.modulation.linear.{name}"][: 2 * 10]
        state[f"context.project.kv.{name}"] = state.pop(f"context.project.qkv.{name}")[DIM:]
    read.load_state_dict({name: value for name, value in state.items() if name in read.state_dict()})
    s = replace(streams(groups=FRAMES), context=normal(2, CONTEXT, 10))
    video, context = read(s)
    close([video], [whole(s)[0]])
    assert context is s.context


def test_a_context_that_is_only_read_carries_no_weight_in_vain():
    module = block(READ)
    module(streams(groups=FRAMES))[0].square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in module.parameters())


@pytest.mark.parametrize("pattern", [*PATTERNS, Gated("head")], ids=lambda pattern: pattern.kind)
def test_blocks_are_values_that_survive_json(pattern):
    for spec in (Dual(attend=pattern), Single(attend=pattern), Branches((Attend(pattern), Cross(), FeedForward(3.0)))):
        assert from_dict(type(spec), to_dict(spec)) == spec


@pytest.mark.parametrize(
    "make", [lambda: Dual(mlp_ratio=0.0), lambda: Single(mlp_ratio=-1.0), lambda: FeedForward(0.0)]
)
def test_a_width_of_nothing_is_refused(make):
    with pytest.raises(ConfigError, match="ratio must be above 0, got"):
        make()


def test_a_block_without_branches_is_refused():
    with pytest.raises(ConfigError, match="a block without branches does nothing"):
        Branches(())
