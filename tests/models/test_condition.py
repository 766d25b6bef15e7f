from dataclasses import fields

import pytest
import torch

from reelflow.errors import ConfigError
from reelflow.models.condition import Condition, Source


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def tensors(condition: Condition) -> list[torch.Tensor | None]:
    """Of every door, the further contexts' last."""
    plain = [getattr(condition, field.name) for field in fields(Condition) if field.name != "further"]
    return plain + [part for source in condition.further or () for part in source]


def same(a: Condition, b: Condition) -> bool:
    pairs = zip(tensors(a), tensors(b), strict=True)
    return all(x is y if x is None or y is None else torch.equal(x, y) for x, y in pairs)


def full(seed: int = 0) -> Condition:
    """Every door open."""
    return Condition(
        context=normal(2, 3, 5, seed=seed),
        context_mask=normal(2, 3, seed=seed) > 0,
        vector=normal(2, 4, seed=seed),
        numbers=normal(2, 2, seed=seed),
        label=torch.tensor([1, 2]) + seed,
        image=normal(2, 2, 7, seed=seed),
        channels=normal(2, 1, 2, 2, 2, seed=seed),
        residual=normal(2, 8, 6, seed=seed),
        further=(Source(normal(2, 4, 3, seed=seed), normal(2, 4, seed=seed) > 0), Source(normal(2, 1, 2, seed=seed))),
    )


def test_contexts_and_channels_stand_side_by_side_vectors_and_residuals_add_and_further_contexts_follow():
    a, b = full(), full(1)
    b = Condition(**{f.name: getattr(b, f.name) for f in fields(b) if f.name not in ("label", "numbers")})
    both = a + b
    assert torch.equal(both.context, torch.cat([a.context, b.context], dim=1))
    assert torch.equal(both.context_mask, torch.cat([a.context_mask, b.context_mask], dim=1))
    assert torch.equal(both.channels, torch.cat([a.channels, b.channels], dim=1))
    assert torch.equal(both.vector, a.vector + b.vector)
    assert torch.equal(both.residual, a.residual + b.residual)
    assert torch.equal(both.image, torch.cat([a.image, b.image], dim=1))
    assert torch.equal(both.label, a.label)
    assert torch.equal(both.numbers, a.numbers)
    assert both.further == (*a.further, *b.further)


def test_adding_nothing_changes_nothing():
    unmasked = Condition(context=normal(2, 3, 5))
    for condition in (full(), unmasked, Condition()):
        assert same(condition + Condition(), condition)
        assert same(Condition() + condition, condition)


def test_a_context_without_a_mask_is_real_from_end_to_end():
    masked, plain = (
        Condition(context=normal(2, 3, 5), context_mask=torch.zeros(2, 3).bool()),
        Condition(context=normal(2, 2, 5)),
    )
    assert (masked + plain).context_mask.tolist() == 2 * [[False, False, False, True, True]]
    assert (plain + masked).context_mask.tolist() == 2 * [[True, True, False, False, False]]
    assert (plain + plain).context_mask is None


def test_two_labels_cannot_be_added():
    with pytest.raises(ConfigError, match="two conditions name a class label"):
        full() + full()


def test_where_takes_each_sample_from_one_of_two():
    a, b = full(), full(1)
    mixed = a.where(torch.tensor([True, False]), b)
    for ours, mine, theirs in zip(*map(tensors, (mixed, a, b)), strict=True):
        if mine is None:
            assert ours is None
            continue
        assert torch.equal(ours[0], mine[0])
        assert torch.equal(ours[1], theirs[1])


def test_one_null_row_serves_every_sample():
    null = Condition(vector=torch.zeros(1, 4), label=torch.tensor([9]))
    mixed = Condition(vector=normal(2, 4), label=torch.tensor([1, 2])).where(torch.tensor([False, True]), null)
    assert mixed.label.tolist() == [9, 2]
    assert not mixed.vector[0].any()
    assert mixed.vector[1].all()
    assert mixed.context is None


def test_where_refuses_conditions_with_different_doors():
    with pytest.raises(ConfigError, match="only one of them has vector"):
        Condition(vector=normal(2, 4)).where(torch.tensor([True, False]), Condition())
    masked = Condition(further=(Source(normal(2, 3, 5), torch.ones(2, 3).bool()),))
    for other in ((Source(normal(2, 3, 5)),), 2 * masked.further, None):
        with pytest.raises(ConfigError, match="only one of them has further"):
            masked.where(torch.tensor([True, False]), Condition(further=other))


def test_only_floating_parts_take_a_dtype():
    moved = full().to("cpu", torch.float64)
    assert moved.context.dtype == moved.vector.dtype == moved.channels.dtype == moved.residual.dtype == torch.float64
    assert (moved.context_mask.dtype, moved.label.dtype) == (torch.bool, torch.int64)
    assert [part if part is None else part.dtype for source in moved.further for part in source] == [
        torch.float64,
        torch.bool,
        torch.float64,
        None,
    ]
    assert same(full().to("cpu"), full())


def test_trimming_drops_only_what_no_sample_uses():
    mask = torch.tensor([[True, False, False, False], [True, True, False, False]])
    context = torch.arange(8.0).view(2, 4, 1)
    trimmed = Condition(context=context, context_mask=mask).trimmed()
    assert trimmed.context_mask is not None
    assert torch.equal(trimmed.context_mask, mask[:, :2])
    assert torch.equal(trimmed.context, context[:, :2])
    nothing = Condition(context=context, context_mask=torch.zeros_like(mask)).trimmed()
    assert nothing.context is not None
    assert nothing.context.shape == (2, 0, 1)
    assert Condition(context=context).trimmed().context is context
    assert Condition(context=context, context_mask=mask[:1].expand(2, -1)).trimmed().context_mask is None  # of no use
    others = Condition(context=context, further=(Source(context, mask), Source(context))).trimmed()
    assert [source.tokens.shape[1] for source in others.sources] == [4, 2, 4]
