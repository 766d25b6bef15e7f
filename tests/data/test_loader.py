import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from reelflow.data.loader import Buckets, Packed, Plan, ShuffledBatches, Size
from reelflow.errors import ConfigError, DataError


def draw(indices, generator):
    return indices, torch.rand(3, generator=generator)


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@settings(max_examples=30, deadline=None)
@given(num_items=st.integers(1, 12), batch_size=st.integers(1, 15), epochs=st.integers(1, 4))
def test_every_item_comes_once_per_epoch_and_none_is_dropped(num_items, batch_size, epochs):
    batches = ShuffledBatches(num_items, batch_size, draw, seed=3, prefetch=0)
    stream = []
    while len(stream) < epochs * num_items:
        indices, _ = next(batches)
        assert len(indices) == batch_size
        stream += indices.tolist()
    for epoch in range(epochs):
        assert sorted(stream[epoch * num_items : (epoch + 1) * num_items]) == list(range(num_items))


def test_epochs_and_seeds_are_shuffled_differently():
    first = ShuffledBatches(50, 50, draw, seed=0, prefetch=0)
    other = ShuffledBatches(50, 50, draw, seed=1, prefetch=0)
    orders = [first.indices(0).tolist(), first.indices(1).tolist(), other.indices(0).tolist(), list(range(50))]
    assert len({tuple(order) for order in orders}) == 4


@pytest.mark.parametrize("prefetch", [0, 1, 3])
def test_a_batch_is_a_function_of_its_number_alone(prefetch):
    with ShuffledBatches(7, 3, draw, seed=5, prefetch=prefetch) as batches:
        read = [next(batches) for _ in range(6)]
    fresh = ShuffledBatches(7, 3, draw, seed=5)
    for number in (5, 0, 3):
        assert same(read[number], fresh.batch(number))
    assert not torch.equal(read[0][1], read[1][1])


@settings(max_examples=15, deadline=None)
@given(stop=st.integers(0, 9), prefetch=st.integers(0, 2))
def test_reading_continues_exactly_after_a_stop(stop, prefetch):
    with ShuffledBatches(5, 2, draw, seed=1, prefetch=prefetch) as batches:
        for _ in range(stop):
            next(batches)
        state = batches.state_dict()
        following = next(batches)
    with ShuffledBatches(5, 2, draw, seed=1, prefetch=prefetch) as resumed:
        next(resumed)
        resumed.load_state_dict(state)
        assert resumed.state_dict() == state
        assert same(next(resumed), following)


def test_the_cursor_counts_batches_consumed_not_batches_prefetched():
    with ShuffledBatches(9, 2, draw, seed=0, prefetch=4) as batches:
        next(batches)
        assert batches.state_dict()["consumed"] == 1


def test_prefetching_is_bounded():
    built = []
    ready = threading.Event()

    def collate(indices, generator):
        built.append(indices)
        if len(built) == 3:
            ready.set()
        return indices

    with ShuffledBatches(9, 2, collate, seed=0, prefetch=2) as batches:
        next(batches)
        assert ready.wait(5)
    assert len(built) == 3


@pytest.mark.parametrize("prefetch", [0, 2])
def test_what_collate_raises_reaches_the_consumer_and_the_position_stays(prefetch):
    broken = True

    def collate(indices, generator):
        if broken:
            raise DataError("clip 3 is torn")
        return indices

    with ShuffledBatches(4, 2, collate, seed=0, prefetch=prefetch) as batches:
        with pytest.raises(DataError, match="clip 3"):
            next(batches)
        broken = False
        assert torch.equal(next(batches), batches.indices(0))


def test_closing_leaves_no_thread_behind():
    before = set(threading.enumerate())
    batches = ShuffledBatches(4, 2, draw, seed=0)
    next(batches)
    assert set(threading.enumerate()) != before
    batches.close()
    assert set(threading.enumerate()) == before


def test_a_cursor_of_other_data_is_refused():
    state = ShuffledBatches(4, 2, draw, seed=0).state_dict()
    with pytest.raises(DataError, match=r"num_items was 4, now it is 5"):
        ShuffledBatches(5, 2, draw, seed=0).load_state_dict(state)


@pytest.mark.parametrize("wrong", [{"num_items": 0}, {"batch_size": 0}, {"seed": -1}, {"prefetch": -1}])
def test_impossible_values_are_refused(wrong):
    values = {"num_items": 4, "batch_size": 2, "seed": 0, "prefetch": 0} | wrong
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        ShuffledBatches(collate=draw, **values)


# --- items of several sizes ------------------------------------------------------------------------------------------


def sizes_of(frames):
    """Clips of 1 to 8 frames of 10 tokens each, whose attention makes long ones dearer."""
    return [Size((n, 2, 5), 10 * n, 10.0 * n + n**2) for n in frames]


@settings(max_examples=20, deadline=None)
@given(frames=st.lists(st.integers(1, 8), min_size=1, max_size=40), tokens=st.integers(80, 200), packed=st.booleans())
def test_a_plan_has_every_item_once_and_no_batch_too_large(frames, tokens, packed):
    sizes = sizes_of(frames)
    plan = Plan((Packed if packed else Buckets)(tokens), sizes)
    batches = ShuffledBatches(len(frames), plan, draw, seed=1, prefetch=0)
    for _ in range(2):
        epoch = [next(batches)[0].tolist() for _ in range(plan.num_batches)]
        assert sorted(item for batch in epoch for item in batch) == list(range(len(frames)))
        assert all(0 < sum(sizes[item].tokens for item in batch) <= tokens for batch in epoch)
        assert packed or all(len({sizes[item].shape for item in batch}) == 1 for batch in epoch)


def test_packed_batches_are_alike_in_flops_not_in_number():
    frames = torch.randint(1, 9, (400,), generator=torch.Generator().manual_seed(0)).tolist()
    sizes = sizes_of(frames)
    batches = Plan(Packed(400), sizes).epoch(torch.Generator().manual_seed(0))
    loads = [sum(sizes[item].flops for item in batch.tolist()) for batch in batches]
    assert max(loads) < 1.05 * sum(loads) / len(loads)
    assert len({len(batch) for batch in batches}) > 1


def test_epochs_of_a_plan_exchange_items_of_one_size():
    sizes = sizes_of([2, 2, 2, 2, 7, 7, 7, 7])
    plan, generator = Plan(Packed(100), sizes), torch.Generator().manual_seed(0)
    epochs = {tuple(tuple(batch.tolist()) for batch in plan.epoch(generator)) for _ in range(5)}
    assert len(epochs) > 1


def test_a_planned_position_means_nothing_under_another_plan():
    sizes = sizes_of([1, 2, 3, 4])
    state = ShuffledBatches(4, Plan(Packed(50), sizes), draw, seed=0).state_dict()
    with pytest.raises(DataError, match="batch_size was"):
        ShuffledBatches(4, Plan(Packed(60), sizes), draw, seed=0).load_state_dict(state)


@pytest.mark.parametrize("grouping", [Packed, Buckets])
def test_a_plan_refuses_items_larger_than_a_batch_and_none(grouping):
    with pytest.raises(ConfigError, match="nearest: tokens=80"):
        Plan(grouping(79), sizes_of([8, 1]))
    with pytest.raises(ConfigError, match="no items"):
        Plan(grouping(79), [])
    with pytest.raises(ConfigError, match="at least 1 token"):
        grouping(0)
    with pytest.raises(ConfigError, match="the plan is of 1 items, and there are 2"):
        ShuffledBatches(2, Plan(grouping(10), sizes_of([1])), draw, seed=0)


@pytest.mark.parametrize("prefetch", [0, 2])
def test_dealt_batches_are_those_of_one_reader_in_turn(prefetch):
    def read(parts, part, times, consumed=0):
        with ShuffledBatches(7, 2, lambda rows, _: rows.tolist(), seed=1, prefetch=prefetch) as batches:
            batches.deal(part, parts)
            batches.load_state_dict({**batches.state_dict(), "consumed": consumed})
            return [next(batches) for _ in range(times)], batches.state_dict()

    whole, end = read(1, 0, 12)
    dealt = [read(3, part, 4) for part in range(3)]
    assert [batch for batches in zip(*(batches for batches, _ in dealt), strict=True) for batch in batches] == whole
    assert all(state == end for _, state in dealt)
    assert read(2, 1, 3, consumed=6)[0] == whole[7::2]
    with pytest.raises(ConfigError, match=r"parts are 0 \.\.\. 1"):
        read(2, 2, 1)
