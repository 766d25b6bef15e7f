"""Line plots as SVG, small enough to be drawn by hand: inline in a page, or a file of their own.

Colours come from the page: a line is of class s0, s1, ... and is painted in the CSS variable --c that the class sets.
"""

import math
import re
from collections.abc import Sequence
from html import escape
from typing import NamedTuple

__all__ = ["NUM_COLOURS", "Histogram", "Series", "line_plot_svg", "svg_file"]

NUM_COLOURS = 6  # of a plot that is a file; the page knows the first three

STYLE = """
svg { --ink: #1d1f21; --soft: #6b7076; --line: #e3e3df; --paper: #fbfbf9; --s0: #3567a8; --s1: #c2702d; --s2: #2a7a4b;
  --s3: #7d4fa0; --s4: #b0406e; --s5: #2b8a99; background: var(--paper);
  font: 12px system-ui, sans-serif; font-variant-numeric: tabular-nums }
@media (prefers-color-scheme: dark) { svg { --ink: #e4e3df; --soft: #979a9e; --line: #33363a; --paper: #17191b;
  --s0: #7fa9e0; --s1: #e2a06a; --s2: #6cc08f; --s3: #b794dd; --s4: #e88bb0; --s5: #69c3d1 } }
text { fill: var(--soft) }
.title { fill: var(--ink); font-size: 14px }
path, polyline { fill: none; stroke: var(--c); stroke-width: 1.5 }
circle, tspan { fill: var(--c) }
.fill { fill: var(--c); fill-opacity: .16; stroke: none }
.s0 { --c: var(--s0) } .s1 { --c: var(--s1) } .s2 { --c: var(--s2) } .s3 { --c: var(--s3) } .s4 { --c: var(--s4) }
.s5 { --c: var(--s5) } .grid { --c: var(--line); stroke-width: 1 }
"""


class Histogram(NamedTuple):
    """Bars side by side: one more edge than heights, and no height below 0."""

    edges: Sequence[float]
    heights: Sequence[float]


class Series(NamedTuple):
    """A line in a plot; `errors` are half the heights of its error bars, `histogram`, on a linear axis, is filled behind it."""

    name: str
    points: Sequence[tuple[float, float]]
    errors: Sequence[float] = ()
    histogram: Histogram | None = None


def line_plot_svg(
    series: Sequence[Series],
    *,
    x_label: str,
    y_label: str,
    log_y: bool = False,
    title: str = "",
    size: tuple[int, int] = (290, 210),
) -> str:
    """Draw lines with axes, labels and error bars; a logarithmic axis leaves out what is not positive.

    `size` is width and height; a title takes a line of its own above the names of the series.
    """
    width, height = size
    left, right, top, bottom = (54, 24, 60, 48) if title else (42, 14, 24, 40)
    scale = math.log10 if log_y else float
    bars = [[*line.errors, *[0.0] * (len(line.points) - len(line.errors))] for line in series]
    kept = [
        [(float(x), float(y), e) for (x, y), e in zip(line.points, errors, strict=True) if not log_y or y > e]
        for line, errors in zip(series, bars, strict=True)
    ]
    ends = [(x, scale(y + side * e)) for points in kept for x, y, e in points for side in (-1, 1)]
    histograms = [(number, line.histogram) for number, line in enumerate(series) if line.histogram]
    assert not (log_y and histograms), "bars stand on 0"
    for _, (edges, heights) in histograms:
        ends += [*((x, 0.0) for x in edges), *((edges[0], y) for y in heights)]
    if not ends:
        return "<p>Nothing was logged.</p>"
    across = _Axis([x for x, _ in ends], most=max(4.5, (width - left - right) / 90))
    up = _Axis([y for _, y in ends], most=max(4.5, (height - top - bottom) / 60), log=log_y)

    def column(x: float) -> float:
        return round(left + across.share(x) * (width - left - right), 1)

    def row(y: float) -> float:
        return round(height - bottom - up.share(scale(y)) * (height - top - bottom), 1)

    parts = []
    for tick in up.ticks:
        parts.append(f'<path class="grid" d="M{left} {row(tick)}H{width - right}"/>')
        parts.append(f'<text x="{left - 6}" y="{row(tick) + 4}" text-anchor="end">{tick:g}</text>')
    for tick in across.ticks:
        parts.append(f'<text x="{column(tick)}" y="{height - bottom + 16}" text-anchor="middle">{tick:g}</text>')
    for number, (edges, heights) in histograms:
        outline = "".join(f"V{row(y)}H{column(x)}" for x, y in zip(edges[1:], heights, strict=True))
        parts.append(f'<path class="s{number} fill" d="M{column(edges[0])} {row(0.0)}{outline}V{row(0.0)}Z"/>')
    for number, points in enumerate(kept):
        line_points = " ".join(f"{column(x)},{row(y)}" for x, y, _ in points)
        parts.append(f'<g class="s{number}"><polyline points="{line_points}"/>')
        parts += [f'<path d="M{column(x)} {row(y - e)}V{row(y + e)}"/>' for x, y, e in points if e]
        if len(points) <= 12:
            parts += [f'<circle cx="{column(x)}" cy="{row(y)}" r="2.5"/>' for x, y, _ in points]
        parts.append("</g>")
    names = "\N{EM SPACE}".join(f'<tspan class="s{i}">{escape(line.name)}</tspan>' for i, line in enumerate(series))
    side, middle = left - 32, (top + height - bottom) / 2
    if title:
        parts.append(f'<text class="title" x="{left}" y="28">{escape(title)}</text>')
    parts.append(f'<text x="{width - right}" y="{top - 12}" text-anchor="end">{names}</text>')
    parts.append(
        f'<text x="{(left + width - right) / 2}" y="{height - bottom + 34}" text-anchor="middle">{escape(x_label)}</text>'
    )
    parts.append(
        f'<text x="{side}" y="{middle}" text-anchor="middle" transform="rotate(-90 {side} {middle})">{escape(y_label)}</text>'
    )
    label = escape(f"{y_label} over {x_label}: {', '.join(line.name for line in series)}")
    return f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{label}">{"".join(parts)}</svg>'


def svg_file(svg: str) -> str:
    """Make an inline plot a file of its own, in the page's colours, light and dark."""
    extents = re.sub(r'viewBox="0 0 (\d+) (\d+)"', r'width="\1" height="\2" \g<0>', svg, count=1)
    return extents.replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1).replace(
        ">", f"><style>{STYLE}</style>", 1
    )


class _Axis:
    """The range of an axis and about `most` round values on it; `log` says that `found` are decimal logarithms."""

    def __init__(self, found: Sequence[float], *, most: float, log: bool = False) -> None:
        low, high = min(found), max(found)
        if high - low < 1e-9 * max(1.0, abs(high)):
            low, high = low - 0.5, high + 0.5
        self.low, self.high = low, high
        if log:
            for digits in ((1,), (1, 2, 5), (1, 2, 3, 5, 7), range(10, 100)):
                decades = range(math.floor(low) - 1, math.ceil(high) + 1)
                values = [float(f"{digit}e{decade}") for decade in decades for digit in digits]
                self.ticks = [value for value in values if low <= math.log10(value) <= high]
                if len(self.ticks) >= 3:
                    return
        else:  # the range grows to the ticks around it
            unit = 10.0 ** math.floor(math.log10((high - low) / most))
            step = next(unit * m for m in (1, 2, 5, 10) if most * unit * m >= high - low)
            marks = range(math.floor(low / step), math.ceil(high / step) + 1)
            self.ticks = [round(mark * step, 12) for mark in marks]
            self.low, self.high = self.ticks[0], self.ticks[-1]

    def share(self, value: float) -> float:
        """Say where along the axis a value lies, from 0 to 1."""
        return (value - self.low) / (self.high - self.low)
