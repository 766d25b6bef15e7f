"""What the demo found, and the page that shows it: one HTML file that asks nothing of the network.

The videos and pictures lie beside the page and are named by relative paths. The curves are drawn here, as inline SVG,
from the logs of the two trainings. Everything shown is in `results.json` too, from which the page can be made again.
"""

import json
import math
import os
import shlex
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from string import Template
from typing import Any, NamedTuple

from reelflow.config import configuration
from reelflow.training.meters import duration

__all__ = ["Animation", "Reconstruction", "Results", "Sample", "Series", "Target", "line_plot_svg", "write_page"]


@configuration
class Target:
    """A number, what it should be, and what it must not fall short of; `floor` None asks nothing."""

    name: str
    value: float
    target: float
    floor: float | None
    unit: str
    at_most: bool = False  # less is better

    @property
    def met(self) -> bool:
        return self.value <= self.target if self.at_most else self.value >= self.target

    @property
    def missed_widely(self) -> bool:
        if self.floor is None:
            return False
        return not (self.value <= self.floor if self.at_most else self.value >= self.floor)  # so written, it catches NaN

    @property
    def verdict(self) -> str:
        return "met" if self.met else "missed by far" if self.missed_widely else "missed"

    @property
    def wanted(self) -> str:
        return f"{'≤' if self.at_most else '≥'} {self.target:g} {self.unit}"


@configuration
class Sample:
    """A generated clip, what was asked of it and what the analyser read (None: it could not tell)."""

    file: str
    prompt: str
    asked: dict[str, str]  # colour, shape, motion
    read: dict[str, str | None]

    @property
    def followed(self) -> bool:
        return self.asked == self.read


@configuration
class Reconstruction:
    """A clip that training never saw, beside what the autoencoder gives back."""

    file: str
    caption: str
    psnr: float  # dB


@configuration
class Animation:
    """A clip that was to begin with a given picture."""

    image: str
    sample: Sample
    psnr: float  # dB, of the first frame


@configuration
class Results:
    """All that the demo measured; paths are relative to its folder."""

    command: str
    machine: dict[str, str | int]
    targets: tuple[Target, ...]
    seconds: dict[str, float]  # by stage
    measures: dict[str, float | str]  # numbers without a target
    samples: tuple[Sample, ...]  # the same number of each combination, one combination after the other
    per_prompt: int
    wall: str  # a video of all samples
    reconstructions: tuple[Reconstruction, ...]
    animations: tuple[Animation, ...]
    long: Sample
    long_frames: int


class Series(NamedTuple):
    """A line in a plot; `errors` are half the heights of its error bars."""

    name: str
    points: Sequence[tuple[float, float]]
    errors: Sequence[float] = ()


def write_page(path: Path, results: Results, run: Path) -> None:
    """Write the page, whole or not at all; the curves come from the logs in `run`, where there are any."""
    shown = results.samples[:: results.per_prompt]
    tallies = [results.samples[i : i + results.per_prompt] for i in range(0, len(results.samples), results.per_prompt)]
    model = shlex.quote(os.path.relpath(run))
    generate = f"reelflow generate {shlex.quote(shown[0].prompt)} --model {model}"
    html = PAGE.substitute(
        summary=escape(_summary(results)),
        targets=_join(_target_row(target) for target in results.targets),
        samples=_join(
            _card(sample, f"{sum(s.followed for s in tally)} of {len(tally)}")
            for sample, tally in zip(shown, tallies, strict=True)
        ),
        per_prompt=results.per_prompt,
        num_samples=len(results.samples),
        wall=_video(results.wall, "all generated clips", kind="wide"),
        reconstructions=_join(
            f"<figure>{_video(r.file, r.caption, kind='pair')}"
            f"<figcaption>{escape(r.caption)}<br><small>{r.psnr:.1f} dB</small></figcaption></figure>"
            for r in results.reconstructions
        ),
        animations=_join(
            f"<figure><div class=row><img src='{escape(a.image)}' alt='given frame'>"
            f"{_video(a.sample.file, a.sample.prompt)}</div>"
            f"{_caption(a.sample, f'first frame {a.psnr:.1f} dB')}</figure>"
            for a in results.animations
        ),
        long=_card(results.long, f"{results.long_frames} frames"),
        plots=_join(_plots(run)),
        seconds=_join(_seconds_rows(results.seconds)),
        measures=_join(
            f"<tr><th>{escape(name)}<td>{escape(value) if isinstance(value, str) else f'{value:.4g}'}"
            for name, value in results.measures.items()
        ),
        commands=escape(
            f"{generate} -o out.mp4\n{generate} --image first.png --seed 7 -o out.mp4\n"
            f"{generate} --frames {results.long_frames} -o long.mp4\n{results.command}"
        ),
        machine=escape(" · ".join(f"{name} {value}" for name, value in results.machine.items())),
    )
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(html, encoding="utf-8")
    os.replace(partial, path)


def line_plot_svg(series: Sequence[Series], *, x_label: str, y_label: str, log_y: bool = False) -> str:
    """Draw lines with axes, labels and error bars; a logarithmic axis leaves out what is not positive."""
    width, height, left, right, top, bottom = 420, 250, 52, 12, 12, 44
    bars = [[*s.errors, *[0.0] * (len(s.points) - len(s.errors))] for s in series]
    kept = [
        [(x, y, e) for (x, y), e in zip(s.points, b, strict=True) if not log_y or y - e > 0]
        for s, b in zip(series, bars, strict=True)
    ]
    ends = [(x, y) for points in kept for x, middle, e in points for y in (middle - e, middle + e)]
    if not ends:
        return "<p>Nothing was logged.</p>"
    scale = math.log10 if log_y else float
    xs, ys = _Axis(x for x, _ in ends), _Axis(scale(y) for _, y in ends)

    def at(x: float, y: float) -> tuple[float, float]:
        across, up = xs.share(x), ys.share(scale(y))
        return round(left + across * (width - left - right), 1), round(height - bottom - up * (height - top - bottom), 1)

    parts = []
    for value in _log_ticks(ys) if log_y else ys.ticks():
        _, y = at(xs.low, value)
        parts.append(f"<path class=grid d='M{left} {y}H{width - right}'/>")
        parts.append(f"<text x={left - 8} y={y + 4} text-anchor=end>{value:g}</text>")
    for value in xs.ticks():
        x, _ = at(value, ends[0][1])
        parts.append(f"<text x={x} y={height - bottom + 18} text-anchor=middle>{value:g}</text>")
    for number, (line, points) in enumerate(zip(series, kept, strict=True)):
        places = [at(x, y) for x, y, _ in points]
        parts.append(f"<g class=s{number}><polyline points='{' '.join(f'{x},{y}' for x, y in places)}'/>")
        for (x, y, error), (px, py) in zip(points, places, strict=True):
            if error:
                parts.append(f"<path d='M{px} {at(x, y - error)[1]}V{at(x, y + error)[1]}'/>")
            if len(points) <= 16:
                parts.append(f"<circle cx={px} cy={py} r=2.5 />")
        parts.append(f"<text x={width - right} y={top + 12 + 16 * number} text-anchor=end>{escape(line.name)}</text></g>")
    parts.append(f"<text x={(left + width - right) / 2} y={height - 6} text-anchor=middle>{escape(x_label)}</text>")
    middle = (top + height - bottom) / 2
    parts.append(f"<text x=12 y={middle} text-anchor=middle transform='rotate(-90 12 {middle})'>{escape(y_label)}</text>")
    label = escape(f"{y_label} over {x_label}: {', '.join(s.name for s in series)}", quote=True)
    return f'<svg viewBox="0 0 {width} {height}" role=img aria-label="{label}">{"".join(parts)}</svg>'


class _Axis:
    """A range of values, widened a little where they are all the same."""

    def __init__(self, values: Iterable[float]) -> None:
        found = list(values)
        self.low, self.high = min(found), max(found)
        if self.low == self.high:
            self.low, self.high = self.low - 0.5, self.high + 0.5

    def share(self, value: float) -> float:
        return (value - self.low) / (self.high - self.low)

    def ticks(self) -> list[float]:
        """Return three to seven round values within the range."""
        rough = (self.high - self.low) / 4
        unit = 10.0 ** math.floor(math.log10(rough))
        step = next(unit * m for m in (1, 2, 5, 10) if unit * m >= 0.75 * rough)
        return [round(k * step, 12) for k in range(math.ceil(self.low / step), math.floor(self.high / step) + 1)]


def _log_ticks(axis: _Axis) -> list[float]:
    decades = range(math.floor(axis.low), math.ceil(axis.high) + 1)
    for digits in ((1,), (1, 2, 5), range(1, 10)):
        ticks = [d * 10.0**e for e in decades for d in digits if axis.low <= math.log10(d * 10.0**e) <= axis.high]
        if len(ticks) >= 3:
            break
    return ticks


def _plots(run: Path) -> list[str]:
    """Draw how the two trainings went."""
    vae, dit = (_read_log(run / name / "log.jsonl") for name in ("vae", "dit"))
    crops = [(r["step"], 10 * math.log10(4 / r["l2"])) for r in vae if r.get("l2")]
    whole = [(r["step"], r["psnr"]) for r in vae if r.get("psnr")]
    loss = [(r["step"], r["loss"]) for r in dit if r["kind"] == "train" and r["loss"]]
    binned = [
        Series(f"step {r['step']}", [(sum(b["t"]) / 2, b["mean"]) for b in r["bins"]], [b["stderr"] or 0 for b in r["bins"]])
        for r in [r for r in dit if r.get("bins")][-3:]
    ]
    learning = [Series("training crops", crops), Series("unseen clips", whole)]
    return [
        f"<figure>{svg}<figcaption>{escape(title)}</figcaption></figure>"
        for title, svg in (
            ("Autoencoder: reconstruction", line_plot_svg(learning, x_label="step", y_label="PSNR, dB")),
            (
                "Transformer: training loss",
                line_plot_svg([Series("", loss)], x_label="step", y_label="velocity error", log_y=True),
            ),
            (
                "Transformer: loss on unseen clips, by t (0 is noise, 1 is data), with standard errors",
                line_plot_svg(binned, x_label="t", y_label="velocity error"),
            ),
        )
    ]


def _read_log(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def _summary(results: Results) -> str:
    total = duration(sum(results.seconds.values()))
    return (
        f"In {total} on this machine's CPU, a video autoencoder and a text-to-video transformer were trained from nothing "
        f"on rendered clips. Below is what they make of {len(results.samples) // results.per_prompt} combinations of colour, "
        f"shape and motion that training never showed, as read by an analyser that involves no network."
    )


def _target_row(target: Target) -> str:
    mark = "✓" if target.met else "✗"
    kind = "ok" if target.met else "no"
    return (
        f"<tr><th>{escape(target.name)}<td>{target.value:.1f} {escape(target.unit)}"
        f"<td>{escape(target.wanted)}<td class={kind}>{mark} {escape(target.verdict)}"
    )


def _card(sample: Sample, note: str) -> str:
    return f"<figure>{_video(sample.file, sample.prompt)}{_caption(sample, note)}</figure>"


def _caption(sample: Sample, note: str) -> str:
    marks = _join(
        f"<span class={'ok' if read == sample.asked[name] else 'no'}>"
        f"{'✓' if read == sample.asked[name] else '✗'} {escape(read or f'{name}?')}</span>"
        for name, read in sample.read.items()
    )
    return f"<figcaption>{escape(sample.prompt)}<br><small>{marks}<span>{escape(note)}</span></small></figcaption>"


def _video(file: str, label: str, *, kind: str = "clip") -> str:
    return (
        f'<video class={kind} src="{escape(file, quote=True)}" aria-label="{escape(label, quote=True)}" '
        f"autoplay loop muted playsinline></video>"
    )


def _seconds_rows(seconds: dict[str, float]) -> Iterable[str]:
    total = sum(seconds.values())
    for name, value in seconds.items():
        bar = f"<i style='width:{100 * value / total:.1f}%'></i>"
        yield f"<tr><th>{escape(name)}<td>{duration(value)}<td class=bar>{bar}"
    yield f"<tr><th>together<td>{duration(total)}<td>"


def _join(parts: Iterable[str]) -> str:
    return "\n".join(parts)


PAGE = Template("""<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>reelflow: videos from prompts</title>
<style>
:root { color-scheme: light dark; --ink: #1d1f21; --soft: #6b7076; --line: #e3e3df; --paper: #fbfbf9; --ok: #2a7a4b;
  --no: #b3402e; --s0: #3567a8; --s1: #c2702d; --s2: #2a7a4b }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e3df; --soft: #979a9e; --line: #33363a; --paper: #17191b;
  --ok: #6cc08f; --no: #e98a78; --s0: #7fa9e0; --s1: #e2a06a; --s2: #6cc08f } }
body { margin: 0 auto; max-width: 54rem; padding: 3rem 1rem 5rem; background: var(--paper); color: var(--ink);
  font: 16px/1.55 system-ui, sans-serif; font-variant-numeric: tabular-nums }
h1 { font-size: 1.9rem; line-height: 1.2; font-weight: 600; letter-spacing: -.015em; margin: 0 0 .6rem }
h2 { font-size: 1.1rem; font-weight: 600; margin: 3.2rem 0 .4rem }
p { max-width: 40rem; margin: 0 0 1.2rem } p, summary, small, footer { color: var(--soft) }
table { border-collapse: collapse; width: 100% } small, footer { font-size: .82rem }
th { text-align: left; font-weight: 400 } td { text-align: right; white-space: nowrap }
th, td { padding: .38rem 0 .38rem 1rem; border-bottom: 1px solid var(--line); vertical-align: top }
th { padding-left: 0 } thead th { color: var(--soft); font-size: .82rem; text-align: right } thead th:first-child { text-align: left }
.ok { color: var(--ok) } .no { color: var(--no) }
.grid-of { display: grid; gap: 1.6rem 2rem; grid-template-columns: repeat(auto-fill, 192px) }
.grid-of.pairs { grid-template-columns: repeat(auto-fill, 396px) } .plots { display: grid; gap: 2rem; grid-template-columns: 1fr 1fr }
figure { margin: 0 } figcaption { font-size: .92rem; line-height: 1.4; margin-top: .4rem } small span { margin-right: .7em; white-space: nowrap }
video, img { display: block; background: var(--line); image-rendering: pixelated; border-radius: 3px; width: 192px; aspect-ratio: 1 }
video.pair { width: 396px; aspect-ratio: auto } video.wide { width: 100%; aspect-ratio: auto } .row { display: flex; gap: 12px }
svg { width: 100% } svg text { font-size: 12px; fill: var(--soft) } svg polyline, svg path { fill: none; stroke-width: 1.6 }
.grid { stroke: var(--line); stroke-width: 1 } .bar { width: 50%; vertical-align: middle } .bar i { display: block; height: .5rem; background: var(--s0); border-radius: 2px }
.s0 * { stroke: var(--s0) } .s1 * { stroke: var(--s1) } .s2 * { stroke: var(--s2) } svg circle { stroke: none }
.s0 text, .s0 circle { fill: var(--s0) } .s1 text, .s1 circle { fill: var(--s1) } .s2 text, .s2 circle { fill: var(--s2) } svg g text { stroke: none }
pre { overflow-x: auto; padding: 1rem; border: 1px solid var(--line); border-radius: 4px; font-size: .85rem } summary { cursor: pointer; margin: 1.4rem 0 .8rem }
@media (max-width: 640px) { .grid-of { grid-template-columns: repeat(auto-fill, 128px); gap: 1.2rem; justify-content: center }
  video, img { width: 128px } .plots, .grid-of.pairs { grid-template-columns: 1fr } video.pair { width: 264px } th, td { padding-left: .5rem } }
</style>
<h1>Videos from prompts, learned on this CPU</h1>
<p>$summary</p>
<table><thead><tr><th>measured<th>value<th>target<th></thead>
$targets
</table>
<h2>Prompts whose combination training never showed</h2>
<p>The first of $per_prompt clips of each, not the best. Below each prompt: what the analyser read, and how many of the
$per_prompt show everything that was asked.</p>
<div class="grid-of">
$samples
</div>
<details><summary>All $num_samples clips, one prompt a row; red frames mark those that were read otherwise</summary>
$wall
</details>
<h2>Through the autoencoder</h2>
<p>Clips it never saw, left, and what 16 numbers for each 4 × 8 × 8 block of pixels gave back, right.</p>
<div class="grid-of pairs">
$reconstructions
</div>
<h2>From a picture</h2>
<p>The given first frame, and the clip that was asked to begin with it.</p>
<div class="grid-of pairs">
$animations
</div>
<h2>Longer than anything it was trained on</h2>
<p>Made chunk after chunk, each beginning with the last frames of the one before, at memory that does not grow.</p>
<div class="grid-of">
$long
</div>
<h2>Learning</h2>
<div class="plots">
$plots
</div>
<h2>Time</h2>
<table>
$seconds
</table>
<h2>Also measured</h2>
<table>
$measures
</table>
<h2>Make more</h2>
<pre>$commands</pre>
<footer>$machine</footer>
</html>
""")
