"""Clips whose tokens are shared among 1 to 4 processes, compared with one process in float64."""

from dataclasses import fields, replace

import pytest
import torch
import torch.distributed as dist
from processes import run

from models.test_packing import BASE, CONFIGS, Shape, clips_of, network
from reelflow.errors import ConfigError
from reelflow.models.blocks import Attend, Branches, Cross, Dual, FeedForward, Single
from reelflow.models.condition import stack_conditions
from reelflow.models.context import Layers
from reelflow.models.dit import DiTConfig
from reelflow.models.packing import Clip, pack
from reelflow.nn.patterns import Full, Gated, Space, Window
from reelflow.parallel.recompute import Recompute, recompute_blocks
from reelflow.parallel.sequence import head_parts, shard_sequence, token_counts

FIVE = replace(  # heads that few numbers of processes divide
    BASE,
    dim=30,
    num_heads=5,
    layers=(
        Dual(mlp_ratio=1.0, context_out=False, attend=Gated("head")),
        Dual(mlp_ratio=1.0),
        Single(mlp_ratio=1.0),
        Branches((Attend(Window(1, 1, 1)), Attend(Gated("scalar")), Cross(), Attend(), FeedForward(1.0))),
    ),
    context=Layers(5),
)
PLAIN = replace(BASE, dim=24, num_heads=4, layers=2 * (Branches((Attend(), FeedForward(2.0))),))
ZOO = CONFIGS | {"five": FIVE}


def shape(seed: int, at_least: int) -> Shape:
    """A clip of a random grid, odd ones among them, with a time for the clip, its frames or its tokens."""
    draw = torch.Generator().manual_seed(seed)

    def whole(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=draw))

    while True:
        grid, text = (whole(1, 3), whole(1, 3), whole(1, 3)), whole(1, 4)
        if grid[0] * grid[1] * grid[2] >= at_least:
            return Shape(grid, whole(0, 2), text, whole(0, text))


def batched(clips: list[Clip]) -> Clip:
    """Clips of one shape and rate as a batch; their texts may have other lengths."""
    return Clip(
        torch.cat([clip.latents for clip in clips]),
        torch.cat([clip.t for clip in clips]),
        stack_conditions([clip.condition for clip in clips]),
        clips[0].token_rate,
    )


def leaves(clips: list[Clip]) -> list[torch.Tensor]:
    """What the prediction may be differentiated by."""
    found = []
    for clip in clips:
        parts = [getattr(clip.condition, field.name) for field in fields(clip.condition)]
        parts += [source.tokens for part in parts if isinstance(part, tuple) for source in part]
        found += [x for x in (clip.latents, clip.t, *parts) if isinstance(x, torch.Tensor) and x.is_floating_point()]
    return [x.requires_grad_() for x in found]


def predict(model, clips, *, row: bool):
    if row:
        return model.forward_packed(pack(clips))
    return [model(clip.latents, clip.t, clip.condition, token_rate=clip.token_rate) for clip in clips]


def loss(outputs, rank: int):
    """Another loss on each process."""
    generator = torch.Generator().manual_seed(rank)
    weights = (torch.randn(y.shape, generator=generator, dtype=y.dtype) for y in outputs)
    return sum((w * y).sum() + (rank + 1) * y.square().mean() for w, y in zip(weights, outputs, strict=True))


def gradients(value, given):
    found = torch.autograd.grad(value, given, allow_unused=True)
    return [torch.zeros_like(x) if g is None else g for x, g in zip(given, found, strict=True)]


def error(ours, theirs) -> float:
    return max(
        float((a - b).detach().abs().max() / b.detach().abs().max().clamp(min=1.0))
        for a, b in zip(ours, theirs, strict=True)
        if b.numel()
    )


def compare(model, clips, *, row: bool, parts: int | None = None) -> float:
    """Return the largest error, on rank 0, of outputs, of the summed losses and of all summed gradients."""
    ranks, group = dist.get_world_size(), dist.group.WORLD
    given = [p for p in model.parameters() if p.requires_grad] + leaves(clips)
    shared = shard_sequence(model, group, parts=parts)
    ours = predict(model, clips, row=row)
    shared.remove()
    value = loss(ours, dist.get_rank())
    flat = torch.cat([x.flatten() for x in (value.detach(), *gradients(value, given))])
    dist.all_reduce(flat)  # one exchange: processes of a test share few cores, and wait for each other long
    everywhere = [torch.empty_like(flat[: sum(y.numel() for y in ours)]) for _ in range(ranks)]
    dist.all_gather(everywhere, torch.cat([y.detach().flatten() for y in ours]))
    assert all(torch.equal(everywhere[0], each) for each in everywhere)
    if dist.get_rank():
        return 0.0
    alone = predict(model, clips, row=row)
    total = sum(loss(alone, rank) for rank in range(ranks))
    right = [total, *gradients(total, given)]
    found = [x.view(y.shape) for x, y in zip(flat.split([y.numel() for y in right]), right, strict=True)]
    return max(error(ours, alone), error(found, right))


def compare_all(name: str, seeds: range) -> dict[str, float]:
    ranks, found = dist.get_world_size(), {}
    for seed in seeds:
        kind = ("one", "two", "row")[seed % 3]
        if kind == "row":
            mix = [shape(1000 * seed + index, 1) for index in range(4)]
            clips = clips_of(ZOO[name], [*mix[: 1 + seed % 4], shape(seed, ranks)], seed)
        else:
            like = shape(seed, ranks)
            clips = clips_of(ZOO[name], [like, replace(like, text=3, hidden=2)][: 1 + (kind == "two")], seed)
            clips = [batched(clips)] if kind == "two" else clips
        possible = [p for p in range(1, ZOO[name].num_heads + 1) if ranks % p == 0]
        parts = [*possible, None][seed // 3 % (len(possible) + 1)]
        found[f"{name} {kind} {seed} {parts}"] = compare(network(ZOO[name]), clips, row=kind == "row", parts=parts)
    return found


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
@pytest.mark.parametrize("name", ZOO)
def test_loss_and_gradients_equal_one_process(name, ranks):
    """All kinds of blocks and patterns; odd grids; batches, rows, padded texts; 2 and 5 heads, in any number of parts."""
    seed = 7 * ranks + list(ZOO).index(name)
    errors = run(ranks, compare_all, name, range(seed, seed + (1 if ranks == 1 else 3)))[0]
    assert {case: e for case, e in errors.items() if not e < 1e-9} == {}


def recomputed(recompute: Recompute, parts: int) -> float:
    """Compare with blocks that are computed again in the backward, exchanges and all."""
    model = network(PLAIN)
    recompute_blocks(model.blocks, recompute)
    try:
        return compare(model, clips_of(PLAIN, [Shape((3, 1, 3), 1, 0, 0)]), row=False, parts=parts)
    finally:
        for block in model.blocks:
            del block.forward


@pytest.mark.parametrize("recompute", ["blocks", "attention-kept"])
def test_recomputed_blocks_give_the_same(recompute):
    """Tokens exchanged for heads, and keys passed round."""
    for parts in (2, 1):
        assert run(2, recomputed, recompute, parts)[0] < 1e-9


def tokens_met(row: bool) -> list[int]:
    """Return how many tokens came to the blocks of this process."""
    met, model = [], network(PLAIN)
    hooks = [
        block.register_forward_pre_hook(lambda _, given: met.append(given[0].video.shape[1])) for block in model.blocks
    ]
    hooks.append(shard_sequence(model, dist.group.WORLD))
    predict(model, clips_of(PLAIN, [Shape((1, 2, 2), 0, 0, 0), Shape((1, 1, 3), 0, 0, 0)][: 1 + row]), row=row)
    for hook in hooks:
        hook.remove()
    return met


def test_no_token_is_dropped_or_padded():
    assert run(3, tokens_met, False) == [[2, 2], [1, 1], [1, 1]]
    assert run(3, tokens_met, True) == [[3, 3], [2, 2], [2, 2]]


def numbers_sent(config: DiTConfig, parts: int, grid: tuple[int, int, int]) -> int:
    """Return how many numbers a prediction and its gradient send to other processes."""
    sent, to_all, to_one = [], dist.all_to_all_single, dist.batch_isend_irecv

    def all_counted(got, given, back, out, group):
        sent.append(sum(out) - out[dist.get_rank()])
        to_all(got, given, back, out, group=group)

    def one_counted(operations):
        sent.extend(each.tensor.numel() for each in operations if each.op is dist.isend)
        return to_one(operations)

    model, (clip,) = network(config), clips_of(config, [Shape(grid, 0, 0, 0)])
    shared = shard_sequence(model, dist.group.WORLD, parts=parts)
    dist.all_to_all_single, dist.batch_isend_irecv = all_counted, one_counted
    try:
        model(clip.latents, clip.t, clip.condition).sum().backward()
    finally:
        dist.all_to_all_single, dist.batch_isend_irecv = to_all, to_one
        shared.remove()
        model.zero_grad()
    return sum(sent)


@pytest.mark.parametrize(("parts", "pattern"), [(4, Full()), (2, Full()), (1, Full()), (2, Space())])
def test_an_attention_sends_what_the_formula_says(parts, pattern):
    n, d, s, p, readout = 12, PLAIN.dim, 4, parts, 2 * 2 * PLAIN.in_channels
    heads, run_of_queries = 4 * n * d * (p - 1) // (s * p), n * d * (s - p) // (s * p)
    attention = 2 * heads + (2 + 4 if pattern == Full() else 3 + 3) * run_of_queries
    config = replace(PLAIN, layers=2 * (Branches((Attend(pattern), FeedForward(2.0))),))
    expected = 2 * attention + 2 * n * readout * (s - 1) // s
    assert run(s, numbers_sent, config, parts, (3, 2, 2)) == s * [expected]


def refusals() -> list[str]:
    model, found = network(PLAIN), []
    with pytest.raises(ConfigError) as caught:
        shard_sequence(model, dist.group.WORLD, parts=4)
    found.append(str(caught.value))
    shared = shard_sequence(model, dist.group.WORLD)
    try:
        with pytest.raises(ConfigError) as caught:
            predict(model, clips_of(PLAIN, [Shape((1, 2, 1), 0, 0, 0)]), row=False)
    finally:
        shared.remove()
    return [*found, str(caught.value)]


def test_what_cannot_be_shared_is_refused_with_the_nearest():
    for parts, tokens in run(3, refusals):
        assert parts == "4 heads on 3 processes are cut into 1 or 3 parts, got 4; nearest: 3"
        assert tokens == "2 tokens cannot be shared among 3 processes, at least one for each; nearest: 2"
    assert token_counts(8, 3) == [3, 3, 2]
    assert [head_parts(heads, 8) for heads in (1, 3, 12)] == [1, 2, 8]
    with pytest.raises(ConfigError, match="1 heads on 8 processes are cut into 1 parts, got 8; nearest: 1"):
        head_parts(1, 8, 8)
