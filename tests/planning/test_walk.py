import gc
from itertools import pairwise

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from reelflow.planning.walk import MAPPED, Heap, Walk

SIZES = st.integers(1, 5000)


@given(st.lists(st.tuples(SIZES, st.booleans(), st.integers(0, 10**6)), max_size=60))
def test_what_a_heap_holds_never_overlaps_and_lies_below_what_it_has_reached(requests):
    heap, held = Heap(), []
    for size, frees, which in requests:
        if frees and held:
            heap.give(*held.pop(which % len(held)))
        start, taken = heap.take(size)
        assert taken >= size
        held.append((start, taken))
        places = sorted(held)
        assert all(a + n <= b for (a, n), (b, _) in pairwise(places))
        assert places[-1][0] + places[-1][1] <= heap.reached == heap.peak


@given(st.lists(SIZES, min_size=1, max_size=30), st.randoms())
def test_a_heap_that_was_given_everything_back_is_one_hole(sizes, order):
    heap = Heap()
    held = [heap.take(size) for size in sizes]
    order.shuffle(held)
    for each in held:
        heap.give(*each)
    reached = heap.reached
    assert heap.take(reached - 64) == (0, reached)
    assert heap.reached == reached


def test_a_hole_that_nothing_fits_stays_and_the_smallest_that_fits_is_taken():
    heap = Heap()
    held = [heap.take(size) for size in (1000, 100, 500, 100)]
    reached = heap.reached
    heap.give(*held[0])
    heap.give(*held[2])
    assert heap.take(400)[0] == held[2][0]
    heap.take(2000)
    assert heap.reached > reached


def test_a_hole_between_neighbours_is_too_narrow_for_the_size_that_left_it():
    heap = Heap()
    held = [heap.take(size) for size in (1024, 64, 1024, 64)]
    reached = heap.reached
    heap.give(*held[0])
    assert heap.take(1024)[0] == reached
    assert heap.take(1024 - 64) == (0, 1024)


def test_a_large_tensor_has_pages_of_its_own_and_gives_them_back():
    heap = Heap()
    small, large = heap.take(1000), heap.take(MAPPED)
    heap.give(*large)
    assert heap.mapped == 0
    assert heap.pages == MAPPED
    assert heap.peak == small[1] + MAPPED


def test_operations_are_counted_by_shape_and_views_are_not():
    with FakeTensorMode(), Walk() as walk:
        layer, x = nn.Linear(4, 6), torch.ones(5, 4)
        with walk.phase() as phase:
            y = layer(x) + layer(x)
            y.view(30).add_(1)
    counts = {str(kernel.func): count for kernel, count in phase.kernels.items()}
    assert counts == {"aten.addmm.default": 2, "aten.add.Tensor": 1, "aten.add_.Tensor": 1}
    assert phase.num_calls > 4


def test_a_phase_knows_what_was_alive_before_at_most_and_after_it():
    with FakeTensorMode(), Walk() as walk:
        kept = torch.ones(1000)
        with walk.phase() as phase:
            more = kept + 1
            del more
            gc.collect()
            last = kept[:500] + 1
    assert (phase.start, phase.peak, phase.end) == (4000, 8000, 6000)
    assert last.shape == (500,)


def test_a_value_that_is_asked_for_is_zero_or_past_every_threshold():
    with FakeTensorMode(), Walk():
        assert torch.ones(()).item() == 0
        assert int(torch.ones((), dtype=torch.int64)) > 10**6
