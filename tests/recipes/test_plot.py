import math
import re
from xml.etree import ElementTree

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reelflow.recipes.plot import Histogram, Series, line_plot_svg, svg_file

POSITIVE = st.floats(1e-4, 1e4)
LINES = st.lists(st.lists(st.tuples(st.floats(-1e4, 1e4), POSITIVE), min_size=1, max_size=20), min_size=1, max_size=3)


def places(svg: str) -> list[list[tuple[float, float]]]:
    """Where the points of each line lie, x to the right and y down."""
    return [
        [tuple(map(float, place.split(","))) for place in line.split()]
        for line in re.findall(r'polyline points="([^"]*)"', svg)
    ]


def plot(*points: list[tuple[float, float]], log_y: bool = False) -> str:
    return line_plot_svg([Series("line", line) for line in points], x_label="x", y_label="y", log_y=log_y)


@settings(max_examples=50, deadline=None)
@given(lines=LINES, log_y=st.booleans())
def test_every_point_lies_inside_the_axes_and_higher_is_higher(lines, log_y):
    drawn = places(plot(*lines, log_y=log_y))
    assert [len(line) for line in drawn] == [len(line) for line in lines]
    pairs = [pair for line, points in zip(drawn, lines, strict=True) for pair in zip(line, points, strict=True)]
    for (x, y), _ in pairs:
        assert 42 <= x <= 276
        assert 24 <= y <= 170
    by_value = sorted(pairs, key=lambda pair: pair[1][1])
    assert [pair[0][1] for pair in by_value] == sorted((pair[0][1] for pair in pairs), reverse=True)


@pytest.mark.parametrize(("low", "high"), [(0.29, 1.95), (1, 1000), (0.4, 0.41), (3e-6, 8e2)])
@pytest.mark.parametrize("log_y", [True, False])
def test_axes_carry_a_readable_number_of_round_values(low, high, log_y):
    svg = plot([(0, low), (1, high)], log_y=log_y)
    ticks = [float(tick) for tick in re.findall(r'text-anchor="end">([^<]+)</text>', svg)]
    assert 2 <= len(set(ticks)) == len(ticks) <= 12
    assert all(len(f"{tick:g}") <= 6 for tick in ticks)
    if log_y:
        assert all(low <= tick <= high for tick in ticks)


def test_a_logarithmic_axis_spaces_ratios_evenly_and_leaves_out_zero():
    ((a, b, c),) = places(plot([(0, 1), (1, 10), (2, 0), (3, 100)], log_y=True))
    assert math.isclose(a[1] - b[1], b[1] - c[1], abs_tol=0.2)


def test_error_bars_reach_as_far_as_the_error():
    svg = line_plot_svg([Series("s", [(0, 1.0), (1, 2.0)], [0.5, 0.0])], x_label="t", y_label="loss")
    ((x, low, high),) = re.findall(r'path d="M([\d.]+) ([\d.]+)V([\d.]+)"', svg)
    (((left, y), (_, above)),) = places(svg)
    assert float(x) == left
    assert float(low) - y == pytest.approx(y - float(high), abs=0.2) == pytest.approx((y - above) / 2, abs=0.2)


def test_nothing_to_draw_is_said_in_words():
    assert "<svg" not in plot([])
    assert "<svg" not in plot([(0, 0.0)], log_y=True)


def test_labels_are_escaped():
    assert "<b>" not in line_plot_svg([Series("<b>", [(0, 1)])], x_label="<b>", y_label="<b>")


def test_bars_of_a_histogram_stand_on_zero_and_meet_the_line_of_their_heights():
    line = Series("s", [(0, 3.0), (1, 3.0), (1, 5.0), (3, 5.0)], histogram=Histogram([0.0, 1.0, 3.0], [3.0, 5.0]))
    svg = line_plot_svg([line], x_label="x", y_label="y")
    ((path),) = re.findall(r'class="s0 fill" d="M([^"]*)"', svg)
    x0, base, *steps = map(float, re.findall(r"[\d.]+", path))
    (((left, low), (middle, _), (_, high), (right, _)),) = places(svg)
    assert (x0, steps) == (left, [low, middle, high, right, base])
    assert base == max(float(y) for y in re.findall(r'class="grid" d="M42 ([\d.]+)H', svg))


def test_a_histogram_alone_stretches_the_axes_over_its_bars():
    bars = Series("s", [(0.5, 1.0)], histogram=Histogram([-2.0, 0.0, 2.0], [9.0, 0.0]))
    svg = line_plot_svg([bars], x_label="x", y_label="y")
    xs, ys = (re.findall(rf'text-anchor="{anchor}">([^<]+)</text>', svg) for anchor in ("middle", "end"))
    assert (float(xs[0]), float(xs[-2])) == (-2, 2)  # the last is the label
    assert (float(ys[0]), float(ys[-1])) == (0, 10)


@pytest.mark.parametrize("title", ["", "a <b> & more"])
def test_a_file_is_well_formed_and_as_large_as_asked(title):
    lines = [Series("a & b", [(0, 1.0), (1, 2.0)], [0.5]), Series("c", [(0, 3.0)])]
    svg = line_plot_svg(lines, x_label="x", y_label="y", title=title, size=(680, 420))
    root = ElementTree.fromstring(svg_file(svg))
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    assert (root.get("width"), root.get("height"), root.get("viewBox")) == ("680", "420", "0 0 680 420")
    words = [element.text for element in root.iter() if element.text]
    assert (title in words) == bool(title)
    assert "a & b" in words
    ElementTree.fromstring(svg)  # inline too, so that a page may be read by a machine
