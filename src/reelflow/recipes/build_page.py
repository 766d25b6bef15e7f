"""What became of a folder of videos, as one HTML file that asks nothing of anybody: its pictures are inside.

Histograms show every clip that was measured, with the thresholds; frames show some of those kept, and some for each reason.
"""

import base64
from collections.abc import Callable, Iterable, Sequence
from html import escape
from pathlib import Path
from string import Template
from typing import NamedTuple

import numpy as np

from reelflow.data.build import Candidate, Rejection
from reelflow.data.captioning import Span, pictures
from reelflow.data.filters import Filters, Measures
from reelflow.data.folder import ClipSpec
from reelflow.errors import DataError, MediaError
from reelflow.recipes import files
from reelflow.recipes.plot import Histogram, Series, line_plot_svg

__all__ = ["Shown", "write_build_page", "write_text"]

KEPT, REJECTED = 12, 4  # clips shown of those kept, and for each reason
FRAMES, SIDE = 4, 72  # of each clip
LISTED = 500  # rejections named one by one; clips.jsonl has them all


class Shown(NamedTuple):
    """A clip, and what is said below its frames."""

    path: Path
    file: str
    clip: Candidate
    text: str


def write_build_page(
    path: Path, kept: Sequence[Shown], rejected: Sequence[Rejection], filters: Filters, spec: ClipSpec
) -> None:
    """Write the page, whole or not at all; a few frames of the clips it shows are decoded.

    Raises:
        DataError: it cannot be written.
    """
    clips = [one.clip for one in kept] + [one.clip for one in rejected if one.clip]
    reasons: dict[str, list[Rejection]] = {}
    for one in rejected:
        reasons.setdefault(one.kind, []).append(one)
    ordered = sorted(reasons.items(), key=lambda item: -len(item[1]))
    html = PAGE.substitute(
        summary=(
            f"{len(kept):,} clips of {spec.num_frames} x {spec.height} x {spec.width} at {spec.fps:g} fps are kept of "
            f"{len(clips):,} that were measured."
        ),
        reasons=_join(f"<tr><th>{escape(kind)}<td>{len(found):,}" for kind, found in ordered),
        plots=_join(_plots([clip.measures for clip in clips], filters)),
        kept=_join(_figures(_spread(kept, KEPT), spec)),
        rejected=_join(
            f"<h3>{escape(kind)}</h3><div class=clips>{_join(_figures(_spread(_clips_of(found), REJECTED), spec))}</div>"
            for kind, found in ordered
            if any(one.clip for one in found)
        ),
        listed=_join(
            f"<tr><th>{escape(one.file)}<td>{f'{one.clip.start:.2f}' if one.clip else ''}<td>{escape(one.reason)}"
            for one in rejected[:LISTED]
        ),
        more=f"and {len(rejected) - LISTED:,} more in clips.jsonl" if len(rejected) > LISTED else "",
        count=f"{len(rejected):,}",
    )
    write_text(path, html)


def write_text(path: Path, text: str) -> None:
    """Write a file, whole or not at all.

    Raises:
        DataError: it cannot be written.
    """
    try:
        files.write_text(path, text)
    except OSError as error:
        raise DataError(f"cannot write {path}: {error.strerror}") from error


def _clips_of(found: Iterable[Rejection]) -> list[Shown]:
    return [Shown(one.path, one.file, one.clip, one.reason) for one in found if one.clip]


def _spread(items: Sequence[Shown], most: int) -> list[Shown]:
    """Return at most so many items, evenly spaced."""
    places = np.unique(np.linspace(0, len(items) - 1, min(most, len(items))).round().astype(int))
    return [items[place] for place in places]


def _plots(measures: Sequence[Measures], filters: Filters) -> list[str]:
    """Draw how each measure is distributed, with its thresholds as upright lines."""
    shown: dict[str, tuple[Callable[[Measures], float], str, dict[str, float | None]]] = {
        "Motion": (
            lambda m: m.motion,
            "picture sides per second",
            {"at least": filters.min_motion, "at most": filters.max_motion},
        ),
        "Flicker": (lambda m: m.flicker, "levels of 255", {"at most": filters.max_flicker}),
        "Black bars": (lambda m: 100 * m.bars_share, "% of the picture", {"at most": _percent(filters.max_bars)}),
        "Text": (lambda m: 100 * m.text, "% of the picture, a guess", {"at most": _percent(filters.max_text)}),
    }
    figures = []
    for title, (value, unit, bounds) in shown.items() if measures else ():
        values = np.array([value(one) for one in measures])
        limits = {name: bound for name, bound in bounds.items() if bound is not None and bound <= 4 * values.max()}
        top = max(float(np.quantile(values, 0.99)), *(1.25 * bound for bound in limits.values()), 1e-3)
        heights, edges = np.histogram(values.clip(max=top), bins=24, range=(0.0, top))
        bars = Series("clips", [], histogram=Histogram(edges.tolist(), heights.astype(float).tolist()))
        lines = [Series(name, [(bound, 0.0), (bound, float(heights.max()))]) for name, bound in limits.items()]
        svg = line_plot_svg([bars, *lines], x_label=unit, y_label="clips")
        figures.append(f"<figure>{svg}<figcaption>{escape(title)}</figcaption></figure>")
    return figures


def _percent(share: float | None) -> float | None:
    return None if share is None else 100 * share


def _figures(shown: Sequence[Shown], spec: ClipSpec) -> list[str]:
    figures = []
    for one in shown:
        try:
            span = Span(one.clip.id, one.path, one.clip.start, spec.seconds)
            frames = [base64.b64encode(frame).decode() for frame in pictures(span, FRAMES, SIDE)]
        except MediaError:  # gone since it was measured
            frames = []
        row = "".join(f"<img src='data:image/jpeg;base64,{frame}' alt=''>" for frame in frames)
        where = f"{escape(one.file)} at {one.clip.start:.2f} s"
        figures.append(
            f"<figure><div class=row>{row}</div><figcaption>{escape(one.text)}<small>{where}</small></figcaption></figure>"
        )
    return figures


def _join(parts: Iterable[str]) -> str:
    return "\n".join(parts)


PAGE = Template("""<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>reelflow: clips of a folder</title>
<style>
:root { color-scheme: light dark; --ink: #1d1f21; --soft: #6b7076; --line: #e3e3df; --paper: #fbfbf9;
  --s0: #3567a8; --s1: #c2702d; --s2: #c2702d }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e3df; --soft: #979a9e; --line: #33363a; --paper: #17191b;
  --s0: #7fa9e0; --s1: #e2a06a; --s2: #e2a06a } }
body { margin: 0 auto; max-width: 66rem; padding: 3rem 1rem 5rem; background: var(--paper); color: var(--ink);
  font: 16px/1.55 system-ui, sans-serif; font-variant-numeric: tabular-nums }
h1 { font-size: 1.9rem; line-height: 1.2; font-weight: 600; margin: 0 0 .6rem }
h2 { font-size: 1.1rem; font-weight: 600; margin: 3rem 0 .6rem }
h3 { font-size: 1rem; font-weight: 600; margin: 1.6rem 0 .4rem }
table { border-collapse: collapse; width: 100% }
th, td { padding: .3rem 1rem .3rem 0; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top }
th { font-weight: 400 }
p, small, summary { color: var(--soft) }
small { display: block; font-size: .82rem }
figure { margin: 0 }
figcaption { font-size: .88rem; line-height: 1.4; margin-top: .3rem; overflow-wrap: anywhere }
.clips { display: grid; gap: 1.4rem 1.6rem; grid-template-columns: repeat(auto-fill, minmax(300px, 1fr)) }
.plots { display: grid; gap: 1.6rem; grid-template-columns: repeat(auto-fit, minmax(250px, 1fr)) }
.row { display: flex; gap: 3px }
.row img { width: calc(25% - 3px); border-radius: 2px; background: var(--line) }
svg { display: block; width: 100% }
svg text { font-size: 11.5px; fill: var(--soft) }
svg path, svg polyline { fill: none; stroke: var(--c); stroke-width: 1.5 }
svg .fill { fill: var(--c); fill-opacity: .3; stroke: none }
svg circle, svg tspan { fill: var(--c) }
.s0 { --c: var(--s0) } .s1 { --c: var(--s1) } .s2 { --c: var(--s2) } .grid { --c: var(--line) }
</style>
<h1>Clips of a folder</h1>
<p>$summary</p>
<table>
$reasons
</table>
<h2>Measures</h2>
<p>Of every clip, whatever became of it; the upright lines are the thresholds, the last bar holds all that is beyond.</p>
<div class="plots">
$plots
</div>
<h2>Kept</h2>
<div class="clips">
$kept
</div>
<h2>Rejected</h2>
$rejected
<details><summary>All $count, one by one</summary>
<table>
$listed
</table>
<p>$more</p>
</details>
</html>
""")
