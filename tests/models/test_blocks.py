from dataclasses import replace

import pytest
import torch
from torch import nn

from reelflow.models.blocks import Dual, Single, Streams, build_block
from reelflow.nn.rope import grid_positions, rope_table

DIM, HEADS, VECTOR, CONTEXT, FRAMES, PER_FRAME = 16, 2, 6, 3, 2, 2
TOKENS = FRAMES * PER_FRAME
SPECS = pytest.mark.parametrize("spec", [Dual(mlp_ratio=2.0), Single(mlp_ratio=2.0)], ids=["dual", "single"])


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def block(spec, *, activation="swiglu") -> nn.Module:
    torch.manual_seed(0)
    module = build_block(spec, DIM, HEADS, VECTOR, activation).double()
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
    )


def close(a, b) -> None:
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=1e-12)


@SPECS
@pytest.mark.parametrize("groups", [1, FRAMES, TOKENS])
def test_a_fresh_block_changes_nothing(spec, groups):
    s = streams(groups=groups)
    video, context = build_block(spec, DIM, HEADS, VECTOR, "gelu_tanh").double()(s)
    assert torch.equal(video, s.video)
    assert torch.equal(context, s.context)


@SPECS
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
    module = build_block(spec, DIM, 1, VECTOR, "silu").double()
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


@SPECS
@pytest.mark.parametrize("groups", [1, FRAMES])
def test_a_block_works_without_context(spec, groups):
    video, context = block(spec)(streams(groups=groups, context=0))
    assert context.shape == (2, 0, DIM)
    assert not torch.equal(video, streams().video)


@SPECS
def test_a_masked_context_token_says_nothing(spec):
    s, mask = streams(groups=FRAMES), torch.ones(2, 1, 1, CONTEXT + TOKENS, dtype=torch.bool)
    mask[..., 1] = False
    other = s.context.clone()
    other[:, 1] = 50.0
    before, after = (block(spec)(replace(s, context=c, mask=mask)) for c in (s.context, other))
    assert torch.equal(before[0], after[0])
    assert torch.equal(before[1][:, [0, 2]], after[1][:, [0, 2]])
