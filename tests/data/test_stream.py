import json
import threading
from collections import Counter
from itertools import chain, pairwise

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from reelflow.data import stream
from reelflow.data.loader import Buckets, Packed, Size
from reelflow.data.shards import Sample, ShardSet, ShardWriter, StoreSamples
from reelflow.data.store import Store, write_store
from reelflow.data.stream import Grouped, ShardedBatches, Sizes, rounds
from reelflow.errors import ConfigError, DataError
from reelflow.training.loop import Batches


class Numbers:
    """Samples that are their own numbers, of which some cannot be read."""

    def __init__(self, *groups, name="numbers", bad=()):
        self.groups, self.name, self.bad = groups, name, set(bad)
        self.identity = f"{name} {groups}"

    def read(self, number):
        if number in self.bad:
            raise DataError(f"{self.name}: {number} is torn")
        return Sample(f"{number}", {"x": torch.tensor(number)}, {"of": self.name})


def collate(samples, generators):
    drawn = [torch.rand((), generator=generator).item() for generator in generators]
    return [(each.meta.get("of"), int(each.tensors["x"]), draw) for each, draw in zip(samples, drawn, strict=True)]


def reader(*sources, batch_size=4, seed=3, prefetch=0, **options):
    return ShardedBatches(sources or [Numbers(5, 3, 4)], batch_size, collate, seed=seed, prefetch=prefetch, **options)


def read(batches, count):
    with batches:
        return [next(batches) for _ in range(count)]


def joined(parts):
    return list(chain.from_iterable(parts))


def items(batches, count):
    return [item for _, item, _ in joined(read(batches, count))]


# --- order -----------------------------------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(
    groups=st.lists(st.integers(1, 5), min_size=1, max_size=6), window=st.integers(1, 7), batch_size=st.integers(1, 9)
)
def test_every_sample_comes_once_per_epoch_from_a_window_of_shards_at_a_time(groups, window, batch_size):
    size, shard_of = sum(groups), [shard for shard, count in enumerate(groups) for _ in range(count)]
    stream = items(reader(Numbers(*groups), batch_size=batch_size, window=window), -(-3 * size // batch_size))
    for start in range(0, 3 * size, size):
        epoch = stream[start : start + size]
        assert sorted(epoch) == list(range(size))
        shards = [shard_of[item] for item in epoch]
        visits = {shard: (shards.index(shard), size - shards[::-1].index(shard)) for shard in shards}
        for first, last in visits.values():
            assert len(set(shards[first:last])) <= window


def test_epochs_seeds_and_windows_are_shuffled_differently():
    orders = [
        items(reader(Numbers(30, 30), batch_size=60, seed=seed, window=window), 2)
        for seed, window in ((0, 2), (1, 2), (0, 1))
    ]
    epochs = {tuple(order[start : start + 60]) for order in orders for start in (0, 60)}
    assert len(epochs) == 6
    assert all(list(epoch) != sorted(epoch) for epoch in epochs)
    alone = items(reader(Numbers(60), batch_size=60), 2)
    assert alone[:60] != alone[60:]


@pytest.mark.parametrize("prefetch", [0, 1, 3])
def test_a_batch_is_a_function_of_its_number_alone(prefetch):
    fresh, numbers = reader(), range(7)
    assert read(reader(prefetch=prefetch), 7) == [fresh.batch(number) for number in reversed(numbers)][::-1]
    assert [[item for _, item in fresh.draws(n)] for n in numbers] == [
        [item for _, item, _ in fresh.batch(n)] for n in numbers
    ]
    assert len({draw for number in numbers for _, _, draw in fresh.batch(number)}) == 28


@settings(max_examples=15, deadline=None)
@given(stop=st.integers(0, 9), prefetch=st.integers(0, 3), before=st.integers(1, 4), after=st.integers(1, 4))
def test_reading_continues_exactly_after_a_stop_also_with_other_ranks(stop, prefetch, before, after):
    uninterrupted = read(reader(Numbers(5, 3), Numbers(4), weights=(3, 1), window=1), stop + 2)
    with reader(Numbers(5, 3), Numbers(4), weights=(3, 1), window=1, world_size=before, prefetch=prefetch) as batches:
        for _ in range(stop):
            next(batches)
        state = batches.state_dict()
    parts = []
    for rank in range(after):
        own = reader(
            Numbers(5, 3), Numbers(4), weights=(3, 1), window=1, rank=rank, world_size=after, prefetch=prefetch
        )
        own.load_state_dict(state)
        assert own.state_dict() == state
        parts.append(read(own, 2))
    assert [joined(part) for part in zip(*parts, strict=True)] == uninterrupted[stop:]


@settings(max_examples=15, deadline=None)
@given(stop=st.integers(0, 5), prefetch=st.integers(0, 3), before=st.integers(1, 4), after=st.integers(1, 4))
def test_dealt_batches_are_the_stream_whatever_the_number_of_parts(stop, prefetch, before, after):
    whole = read(reader(), before * stop + 2 * after)
    with reader(prefetch=prefetch) as batches:
        batches.deal(before - 1, before)
        assert [next(batches) for _ in range(stop)] == whole[before - 1 : before * stop : before]
        state = batches.state_dict()
    parts = []
    for part in range(after):
        own = reader(prefetch=prefetch)
        own.deal(part, after)
        own.load_state_dict(state)
        parts.append(read(own, 2))
    assert joined(zip(*parts, strict=True)) == whole[before * stop :]


def test_the_first_reader_alone_goes_on_counting_what_was_skipped():
    state = reader().state_dict() | {"skipped": {"numbers: 1 is torn": 7}}
    counts = []
    for part in range(3):
        own = reader()
        own.deal(part, 3)
        own.load_state_dict(state)
        counts.append(own.num_skipped)
    assert counts == [7, 0, 0]


def test_the_cursor_counts_batches_handed_out_not_batches_made_ahead():
    with reader(prefetch=4) as batches:
        assert isinstance(batches, Batches)
        next(batches)
        assert batches.state_dict()["consumed"] == 1


# --- mixtures --------------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(weights=st.lists(st.integers(1, 40), min_size=1, max_size=6))
def test_shares_are_exact_over_a_round_and_never_off_by_a_whole_sample(weights):
    places = rounds(weights)
    had = [0] * len(weights)
    for done, place in enumerate(places, start=1):
        had[place] += 1
        assert all(
            abs(count * sum(weights) - done * weight) < sum(weights) for count, weight in zip(had, weights, strict=True)
        )
    assert [count * sum(weights) for count in had] == [len(places) * weight for weight in weights]


def test_each_set_of_a_mixture_has_epochs_of_its_own():
    stream = joined(read(reader(Numbers(6, name="a"), Numbers(4, name="b"), weights=(6, 2)), 9))
    drawn = {name: [item for of, item, _ in stream if of == name] for name in "ab"}
    assert {name: len(each) for name, each in drawn.items()} == {"a": 27, "b": 9}
    for name, size in (("a", 6), ("b", 4)):
        starts = range(0, len(drawn[name]) + 1, size)
        assert all(sorted(drawn[name][start:stop]) == list(range(size)) for start, stop in pairwise(starts))


def test_shards_and_stores_mix(tmp_path):
    with ShardWriter(tmp_path / "shards", fingerprint={}, shard_bytes=3000) as writer:
        for number in range(5):
            writer.add(Sample(f"k{number}", {"x": torch.tensor(number)}, {"of": "shards"}))
        writer.finish()
    write_store(
        tmp_path / "store", ({"x": torch.tensor(k)} for k in range(3)), fingerprint={}, meta=3 * [{"of": "store"}]
    )
    sources = ShardSet.open(tmp_path / "shards"), StoreSamples(Store.open(tmp_path / "store"))
    stream = joined(read(reader(*sources, weights=(5, 3), batch_size=8, prefetch=2), 2))
    whole = Counter((of, item) for of, item, _ in stream)
    assert whole == Counter(2 * [*(("shards", k) for k in range(5)), *(("store", k) for k in range(3))])


# --- damage ----------------------------------------------------------------------------------------------------------


@settings(max_examples=20, deadline=None)
@given(
    bad=st.sets(st.integers(0, 11), min_size=1, max_size=11), prefetch=st.integers(0, 2), world_size=st.integers(1, 4)
)
def test_a_bad_sample_is_replaced_where_it_stood_counted_and_named(bad, prefetch, world_size):
    whole, said, found, skipped = read(reader(), 6), [], [[] for _ in range(6)], Counter()
    for rank in range(world_size):
        batches = reader(
            Numbers(5, 3, 4, bad=bad), prefetch=prefetch, rank=rank, world_size=world_size, on_skip=said.append
        )
        for number, part in enumerate(read(batches, 6)):
            found[number] += part
        skipped += Counter(batches.skipped)
        assert batches.num_skipped == sum(batches.state_dict()["skipped"].values())
    for before, after in zip(joined(whole), joined(found), strict=True):
        assert after == before if before[1] not in bad else after[1] not in bad
    assert set(skipped) == {f"numbers: {item} is torn" for item in bad}  # two epochs meet every one
    assert all(count >= 2 for count in skipped.values())
    assert set(said) == {f"skipped: {what}" for what in skipped}
    assert len(said) <= world_size * len(skipped)


def test_what_goes_bad_between_stop_and_resume_moves_nothing_else():
    whole = joined(read(reader(), 9))
    with reader() as batches:
        for _ in range(3):
            next(batches)
        state = batches.state_dict()
    resumed = reader(Numbers(5, 3, 4, bad=range(5, 8)), on_skip=lambda _: None)
    resumed.load_state_dict(state)
    after = joined(read(resumed, 6))
    changed = [before[1] for before, now in zip(whole[12:], after, strict=True) if before != now]
    assert sorted(changed) == sorted(item for _, item, _ in whole[12:] if item in range(5, 8))
    again = reader()
    again.load_state_dict(resumed.state_dict())
    assert again.num_skipped == resumed.num_skipped > 0


def test_what_is_skipped_is_a_warning_unless_it_is_heard():
    with pytest.warns(UserWarning, match="skipped: numbers: 1 is torn"):
        read(reader(Numbers(2, bad=[1])), 2)


@pytest.mark.parametrize("prefetch", [0, 2])
def test_a_set_without_one_good_sample_is_an_error_and_the_position_stays(prefetch):
    source = Numbers(5, 3, bad=range(8))
    with reader(source, prefetch=prefetch) as batches:
        with pytest.raises(
            DataError, match=r"numbers: 8 samples in a row could not be used; the first: numbers: . is torn"
        ):
            next(batches)
        source.bad = set()
        assert next(batches) == reader(Numbers(5, 3)).batch(0)


def test_a_stand_in_comes_from_the_shards_at_hand_while_they_have_one():
    bad = reader(Numbers(*12 * [10], bad=range(0, 120, 2)), window=1, batch_size=10, on_skip=lambda _: None)
    assert all(len({item // 10 for _, item, _ in batch}) == 1 for batch in read(bad, 12))


def test_a_million_names_of_bad_samples_are_not_kept(monkeypatch):
    monkeypatch.setattr("reelflow.data.stream.NAMES_KEPT", 2)
    batches = reader(Numbers(12, bad=range(6)), on_skip=lambda _: None)
    read(batches, 3)
    assert len(batches.skipped) == 3
    assert batches.skipped["more"] >= 4


# --- samples of several sizes ----------------------------------------------------------------------------------------


def sizes_of(frames):
    """Clips of so many frames of 10 tokens each, whose attention makes long ones dearer."""
    found = sorted(set(frames))
    sizes = [Size((n, 2, 5), 10 * n, 10.0 * n + n**2) for n in found]
    return Sizes(sizes, torch.tensor([found.index(n) for n in frames]))


def drawn_frames(count, seed=0, most=8):
    return torch.randint(1, most + 1, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


FRAMES = {"a": drawn_frames(8), "b": drawn_frames(4, 1)}
GROUPINGS = st.builds(lambda kind, tokens: kind(tokens), st.sampled_from([Packed, Buckets]), st.integers(80, 200))
PACKED = Packed(150)


def grouped(grouping=PACKED, reservoir=15, *, bad=((), ()), **options):
    sources = [Numbers(5, 3, name="a", bad=bad[0]), Numbers(4, name="b", bad=bad[1])]
    sizes = [sizes_of(FRAMES[name]) for name in "ab"]
    return reader(*sources, batch_size=Grouped(grouping, sizes, reservoir), weights=(3, 1), window=1, **options)


def frames_of(batch):
    return [FRAMES[of][item] for of, item, _ in batch]


@settings(max_examples=40, deadline=None)
@given(grouping=GROUPINGS, reservoir=st.integers(1, 40))
def test_each_sample_of_the_stream_is_in_one_batch_of_its_reservoir_and_no_batch_is_too_large(grouping, reservoir):
    batches, number = grouped(grouping, reservoir), 0
    plain = reader(Numbers(5, 3, name="a"), Numbers(4, name="b"), batch_size=reservoir, weights=(3, 1), window=1)
    for want in read(plain, 3):
        found = []
        while len(found) < reservoir:
            batch = batches.batch(number)
            found += batch
            number += 1
            assert 0 < sum(10 * n for n in frames_of(batch)) <= grouping.tokens
            assert isinstance(grouping, Packed) or len(set(frames_of(batch))) == 1
        assert sorted(found) == sorted(want)  # with the same draws too


def test_packed_batches_of_a_reservoir_are_alike_in_flops_and_full():
    frames = drawn_frames(3000)
    sizes = sizes_of(frames)
    batches = reader(Numbers(*30 * [100]), batch_size=Grouped(Packed(400), [sizes], 600))
    loads, tokens = [], []
    for batch in read(batches, 60):
        counts = [frames[item] for _, item, _ in batch]
        loads.append(sum(10.0 * n + n**2 for n in counts))
        tokens.append(sum(10 * n for n in counts))
    assert max(loads) < 1.1 * sum(loads) / len(loads)
    assert sum(tokens) > 0.97 * 400 * len(tokens)


@settings(max_examples=25, deadline=None)
@given(
    grouping=GROUPINGS,
    reservoir=st.integers(1, 20),
    stop=st.integers(0, 5),
    prefetch=st.integers(0, 3),
    before=st.integers(1, 4),
    after=st.integers(1, 4),
)
def test_grouped_batches_go_on_exactly_whatever_the_number_of_parts(grouping, reservoir, stop, prefetch, before, after):
    whole = read(grouped(grouping, reservoir), before * stop + 2 * after)
    with grouped(grouping, reservoir, prefetch=prefetch) as batches:
        batches.deal(before - 1, before)
        assert [next(batches) for _ in range(stop)] == whole[before - 1 : before * stop : before]
        state = json.loads(json.dumps(batches.state_dict()))
    parts = []
    for part in range(after):
        own = grouped(grouping, reservoir, prefetch=prefetch)
        own.deal(part, after)
        own.load_state_dict(state)
        assert own.state_dict() == state
        parts.append(read(own, 2))
    assert joined(zip(*parts, strict=True)) == whole[before * stop :]


def test_going_on_far_down_the_stream_plans_no_more_than_what_is_at_hand(monkeypatch):
    batches, planned = grouped(), []
    read(batches, 300)
    state, following = batches.state_dict(), read(batches, 1)
    assert state["reservoir"][0] > 50
    monkeypatch.setattr(stream, "Plan", lambda *a, plan=stream.Plan: planned.append(a) or plan(*a))
    own = grouped()
    own.load_state_dict(state)
    assert read(own, 1) == following
    assert len(planned) <= 3  # the first one, as `own` was new


@settings(max_examples=25, deadline=None)
@given(bad=st.sets(st.integers(0, 7), min_size=1, max_size=7), grouping=GROUPINGS)
def test_a_bad_sample_in_a_group_is_replaced_by_one_of_its_size_or_left_out(bad, grouping):
    said = []
    whole, found = read(grouped(grouping), 30), read(grouped(grouping, bad=(bad, ()), on_skip=said.append), 30)
    good = {FRAMES["a"][item] for item in range(8) if item not in bad}
    for before, after in zip(whole, found, strict=True):
        kept = [each for each in before if each[0] == "b" or FRAMES["a"][each[1]] in good]
        if not kept:  # a batch is never empty
            assert len(after) == 1
            continue
        assert frames_of(after) == frames_of(kept)
        for own, other in zip(kept, after, strict=True):
            assert own == other if own[0] == "b" or own[1] not in bad else (own[2] == other[2] and other[1] not in bad)
    assert len(said) == len({each[1] for batch in whole for each in batch if each[0] == "a"} & bad)


def test_a_group_without_one_good_sample_is_an_error():
    with pytest.raises(DataError, match="in a row could not be used"):
        read(grouped(bad=(range(8), range(4)), on_skip=lambda _: None), 1)


@pytest.mark.parametrize(
    "other",
    [{"grouping": Packed(160)}, {"grouping": Buckets(150)}, {"reservoir": 16}],
    ids=["tokens", "kind", "reservoir"],
)
def test_a_cursor_of_batches_grouped_otherwise_is_refused(other):
    with pytest.raises(DataError, match="batch_size was"):
        grouped(**other).load_state_dict(grouped().state_dict())


def test_a_cursor_of_samples_of_other_sizes_is_refused(monkeypatch):
    state = grouped().state_dict()
    monkeypatch.setitem(FRAMES, "b", [1, 2, 3, 9])
    with pytest.raises(DataError, match="batch_size was"):
        grouped().load_state_dict(state)


@pytest.mark.parametrize(
    ("wrong", "why"),
    [
        ({"grouping": Packed(70)}, "cannot hold an item of 80; nearest: tokens=80"),
        ({"reservoir": 0}, "reservoir must be at least 1, got 0"),
        ({"world_size": 2}, "nearest: world_size=1, and deal"),
    ],
)
def test_impossible_groups_are_refused(wrong, why):
    with pytest.raises(ConfigError, match=why):
        grouped(**wrong)


def test_samples_without_a_size_cannot_be_grouped():
    with pytest.raises(ConfigError, match="every sample of every source needs a size"):
        reader(Numbers(5), batch_size=Grouped(PACKED, [sizes_of([1, 2])]))


# --- the rest --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefetch", [0, 2])
def test_what_collate_raises_reaches_the_consumer_and_the_position_stays(prefetch):
    broken = True

    def brittle(samples, generators):
        if broken:
            raise ValueError("no such crop")
        return collate(samples, generators)

    with ShardedBatches([Numbers(5, 3, 4)], 4, brittle, seed=3, prefetch=prefetch) as batches:
        with pytest.raises(ValueError, match="crop"):
            next(batches)
        broken = False
        assert next(batches) == reader().batch(0)


def test_closing_leaves_no_thread_behind():
    before = set(threading.enumerate())
    batches = reader(prefetch=2)
    next(batches)
    assert set(threading.enumerate()) != before
    batches.close()
    assert set(threading.enumerate()) == before


@pytest.mark.parametrize(
    ("other", "name"),
    [
        ({"seed": 4}, "seed"),
        ({"batch_size": 5}, "batch_size"),
        ({"window": 2}, "window"),
        ({"weights": (2,)}, "weights"),
        ({"sources": [Numbers(5, 3)]}, "sources"),
    ],
)
def test_a_cursor_of_other_data_is_refused(other, name):
    state = reader().state_dict()
    with pytest.raises(DataError, match=f"{name} was"):
        reader(*other.pop("sources", []), **other).load_state_dict(state)


@pytest.mark.parametrize(
    ("wrong", "why"),
    [
        ({"batch_size": 0}, "batch_size must be"),
        ({"seed": -1}, "seed must be"),
        ({"window": 0}, "window must be"),
        ({"prefetch": -1}, "prefetch must be"),
        ({"rank": 2, "world_size": 2}, "rank must lie in 0 to 1, got 2"),
        ({"world_size": 5}, "nearest: batch_size=5"),
        ({"weights": (1, 2)}, "1 sources need as many weights"),
        ({"weights": (0,)}, "weights must be at least 1"),
    ],
)
def test_impossible_values_are_refused(wrong, why):
    with pytest.raises(ConfigError, match=why):
        reader(**wrong)


def test_a_part_that_there_is_not_is_refused():
    with pytest.raises(ConfigError, match=r"the parts are 0 \.\.\. 1, got 2"):
        reader().deal(2, 2)


def test_a_round_that_never_repeats_is_refused_with_the_nearest_that_does():
    with pytest.raises(ConfigError, match=r"nearest: \[999, 1\]"):
        rounds([1_000_003, 7])
