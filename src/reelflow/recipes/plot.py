"""Line plots as inline SVG, small enough to be drawn by hand.

Colours come from the page: a line is of class s0, s1, ... and is painted in the CSS variable --c that the class sets.
"""

import math
from collections.abc import Sequence
from html import escape
from typing import NamedTuple

__all__ = ["Series", "line_plot_svg"]


class Series(NamedTuple):
    """A line in a plot; `errors` are half the heights of its error bars."""

    name: str
    points: Sequence[tuple[float, float]]
    errors: Sequence[float] = ()


def line_plot_svg(series: Sequence[Series], *, x_label: str, y_label: str, log_y: bool = False) -> str:
    """Draw lines with axes, labels and error bars; a logarithmic axis leaves out what is not positive."""
    width, height, left, right, top, bottom = 290, 210, 42, 14, 24, 40
    scale = math.log10 if log_y else float
    bars = [[*line.errors, *[0.0] * (len(line.points) - len(line.errors))] for line in series]
    kept = [
        [(float(x), float(y), e) for (x, y), e in zip(line.points, errors, strict=True) if not log_y or y > e]
        for line, errors in zip(series, bars, strict=True)
    ]
    ends = [(x, scale(y + side * e)) for points in kept for x, y, e in points for side in (-1, 1)]
    if not ends:
        return "<p>Nothing was logged.</p>"
    across, up = _Axis([x for x, _ in ends]), _Axis([y for _, y in ends], log=log_y)

    def column(x: float) -> float:
        return round(left + across.share(x) * (width - left - right), 1)

    def row(y: float) -> float:
        return round(height - bottom - up.share(scale(y)) * (height - top - bottom), 1)

    parts = []
    for tick in up.ticks:
        parts.append(f"<path class=grid d='M{left} {row(tick)}H{width - right}'/>")
        parts.append(f"<text x={left - 6} y={row(tick) + 4} text-anchor=end>{tick:g}</text>")
    for tick in across.ticks:
        parts.append(f"<text x={column(tick)} y={height - bottom + 16} text-anchor=middle>{tick:g}</text>")
    for number, points in enumerate(kept):
        line = " ".join(f"{column(x)},{row(y)}" for x, y, _ in points)
        parts.append(f"<g class=s{number}><polyline points='{line}'/>")
        parts += [f"<path d='M{column(x)} {row(y - e)}V{row(y + e)}'/>" for x, y, e in points if e]
        if len(points) <= 12:
            parts += [f"<circle cx={column(x)} cy={row(y)} r=2.5 />" for x, y, _ in points]
        parts.append("</g>")
    names = "&emsp;".join(f"<tspan class=s{i}>{escape(line.name)}</tspan>" for i, line in enumerate(series))
    middle = (top + height - bottom) / 2
    parts.append(f"<text x={width - right} y=12 text-anchor=end>{names}</text>")
    parts.append(f"<text x={(left + width - right) / 2} y={height - 6} text-anchor=middle>{escape(x_label)}</text>")
    parts.append(
        f"<text x=10 y={middle} text-anchor=middle transform='rotate(-90 10 {middle})'>{escape(y_label)}</text>"
    )
    label = escape(f"{y_label} over {x_label}: {', '.join(line.name for line in series)}")
    return f'<svg viewBox="0 0 {width} {height}" role=img aria-label="{label}">{"".join(parts)}</svg>'


class _Axis:
    """The range of an axis and the round values marked on it; `log` says that `found` are decimal logarithms."""

    def __init__(self, found: Sequence[float], *, log: bool = False) -> None:
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
            unit = 10.0 ** math.floor(math.log10((high - low) / 4))
            step = next(unit * m for m in (1, 2, 5, 10) if 4.5 * unit * m >= high - low)
            marks = range(math.floor(low / step), math.ceil(high / step) + 1)
            self.ticks = [round(mark * step, 12) for mark in marks]
            self.low, self.high = self.ticks[0], self.ticks[-1]

    def share(self, value: float) -> float:
        """Say where along the axis a value lies, from 0 to 1."""
        return (value - self.low) / (self.high - self.low)
