"""What the demo found, and the page that shows it: one HTML file that asks nothing of the network.

The videos and pictures lie beside the page and are named by relative paths; the curves are drawn from the logs of the
two trainings. `results.json` holds a `Results` and nothing else, so the page can be made again from it.
"""

import json
import math
import os
import shlex
from collections.abc import Iterable
from html import escape
from pathlib import Path
from string import Template
from typing import Any

from reelflow.config import configuration
from reelflow.recipes.files import write_text
from reelflow.recipes.plot import Series, line_plot_svg
from reelflow.training.meters import duration

__all__ = ["Animation", "Reconstruction", "Results", "Sample", "Target", "write_page"]


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
        return self._reaches(self.target)

    @property
    def missed_widely(self) -> bool:
        return self.floor is not None and not self._reaches(self.floor)

    def _reaches(self, bound: float) -> bool:
        return self.value <= bound if self.at_most else self.value >= bound

    @property
    def verdict(self) -> str:
        return "met" if self.met else "missed by far" if self.missed_widely else "missed"

    @property
    def wanted(self) -> str:
        return f"{'≤' if self.at_most else '≥'}\N{NO-BREAK SPACE}{self.target:g}\N{NO-BREAK SPACE}{self.unit}"

    @property
    def shown(self) -> str:
        return f"{self.value:.1f}\N{NO-BREAK SPACE}{self.unit}"


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
    long: tuple[Sample, ...]
    long_frames: int


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
            _card(sample, f"{sum(s.followed for s in tally)} of {len(tally)} as asked")
            for sample, tally in zip(shown, tallies, strict=True)
        ),
        per_prompt=results.per_prompt,
        num_samples=len(results.samples),
        wall=_video(results.wall, "all generated clips", kind="wall"),
        reconstructions=_join(
            f"<figure>{_video(r.file, r.caption, kind='pair')}"
            f"<figcaption>{escape(r.caption)}<small>{r.psnr:.1f} dB</small></figcaption></figure>"
            for r in results.reconstructions
        ),
        animations=_join(
            f"<figure><div class=row><img src='{escape(a.image)}' alt='given frame'>"
            f"{_video(a.sample.file, a.sample.prompt)}</div>"
            f"{_caption(a.sample, f'first frame {a.psnr:.1f} dB')}</figure>"
            for a in results.animations
        ),
        long=_join(_card(sample, f"{results.long_frames} frames") for sample in results.long),
        plots=_join(_plots(run)),
        seconds=_join(_seconds_rows(results.seconds)),
        measures=_join(
            f"<tr><th>{escape(name)}<td>{escape(value) if isinstance(value, str) else f'{value:.4g}'}"
            for name, value in results.measures.items()
        ),
        commands=escape(
            f"{generate} -o out.mp4\n{generate} --image first.png --seed 7 -o out.mp4\n"
            f"{generate} --frames {results.long_frames} -o long.mp4\n\n# this page: {results.command}"
        ),
        machine=escape(" · ".join(f"{name} {value}" for name, value in results.machine.items())),
    )
    write_text(path, html)


def _plots(run: Path) -> list[str]:
    """Draw how the two trainings went."""
    vae, dit = (_read_log(run / name / "log.jsonl") for name in ("vae", "dit"))
    crops = Series(
        "training crops", [(line["step"], 10 * math.log10(4 / line["l2"])) for line in vae if line.get("l2")]
    )
    whole = Series("unseen clips", [(line["step"], line["psnr"]) for line in vae if line.get("psnr")])
    loss = Series("", [(line["step"], line["loss"]) for line in dit if line["kind"] == "train" and line["loss"]])
    binned = [_binned(line) for line in dit if line.get("bins")][-3:]
    plots = {
        "Autoencoder: reconstruction": line_plot_svg([crops, whole], x_label="step", y_label="PSNR, dB"),
        "Transformer: training loss": line_plot_svg([loss], x_label="step", y_label="velocity error", log_y=True),
        "Transformer: loss on unseen clips by t (0 is noise, 1 is data), with standard errors": line_plot_svg(
            binned, x_label="t", y_label="velocity error"
        ),
    }
    return [f"<figure>{svg}<figcaption>{escape(title)}</figcaption></figure>" for title, svg in plots.items()]


def _binned(line: dict[str, Any]) -> Series:
    bins = [row for row in line["bins"] if row["mean"] is not None]
    return Series(
        f"step {line['step']}",
        [(sum(row["t"]) / 2, row["mean"]) for row in bins],
        [row["stderr"] or 0.0 for row in bins],
    )


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
    kind, mark = ("ok", "✓") if target.met else ("no", "✗")
    return (
        f"<tr><th>{escape(target.name)}<td>{escape(target.shown)}<td>{escape(target.wanted)}"
        f"<td class={kind}>{mark} {escape(target.verdict)}"
    )


def _card(sample: Sample, note: str) -> str:
    return f"<figure>{_video(sample.file, sample.prompt)}{_caption(sample, note)}</figure>"


def _caption(sample: Sample, note: str) -> str:
    marks = []
    for name, read in sample.read.items():
        kind, mark = ("ok", "✓") if read == sample.asked[name] else ("no", "✗")
        marks.append(f"<span class={kind}>{mark} {escape(read or f'{name}?')}</span>")
    return (
        f"<figcaption>{escape(sample.prompt)}<small>{' '.join(marks)}</small><small>{escape(note)}</small></figcaption>"
    )


def _video(file: str, label: str, *, kind: str = "clip") -> str:
    return (
        f'<video class={kind} src="{escape(file)}" aria-label="{escape(label)}" '
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
:root { color-scheme: light dark; --ink: #1d1f21; --soft: #6b7076; --line: #e3e3df; --paper: #fbfbf9;
  --ok: #2a7a4b; --no: #b3402e; --s0: #3567a8; --s1: #c2702d; --s2: #2a7a4b }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e3df; --soft: #979a9e; --line: #33363a; --paper: #17191b;
  --ok: #6cc08f; --no: #e98a78; --s0: #7fa9e0; --s1: #e2a06a; --s2: #6cc08f } }
body { margin: 0 auto; max-width: 54rem; padding: 3rem 1rem 5rem; background: var(--paper); color: var(--ink);
  font: 16px/1.55 system-ui, sans-serif; font-variant-numeric: tabular-nums }
h1 { font-size: 1.9rem; line-height: 1.2; font-weight: 600; letter-spacing: -.015em; margin: 0 0 .6rem }
h2 { font-size: 1.1rem; font-weight: 600; margin: 3.2rem 0 .4rem }
p { max-width: 40rem; margin: 0 0 1.2rem }
p, summary, small, footer, thead th { color: var(--soft) }
small, footer, thead th { font-size: .82rem }
table { border-collapse: collapse; width: 100% }
th, td { padding: .38rem 0 .38rem 1rem; border-bottom: 1px solid var(--line); text-align: right; vertical-align: top }
th { font-weight: 400 }
th:first-child { width: 40%; text-align: left; padding-left: 0 }
.ok { color: var(--ok) }
.no { color: var(--no) }
.clips { display: grid; gap: 1.6rem 2rem; grid-template-columns: repeat(auto-fill, 192px) }
.pairs { display: grid; gap: 1.6rem 2rem; grid-template-columns: repeat(auto-fill, 400px) }
.plots { display: grid; gap: 2rem; grid-template-columns: repeat(auto-fit, minmax(250px, 1fr)) }
figure { margin: 0 }
figcaption { font-size: .92rem; line-height: 1.4; margin-top: .4rem }
small { display: block }
small span { margin-right: .3em; white-space: nowrap }
video, img { display: block; width: 192px; background: var(--line); border-radius: 3px; image-rendering: pixelated }
video.pair { width: 390px }
video.wall { width: auto; max-width: 100% }
.row { display: flex; gap: 6px }
summary { cursor: pointer; margin: 1.4rem 0 .8rem }
svg { display: block; width: 100% }
svg text { font-size: 11.5px; fill: var(--soft) }
svg path, svg polyline { fill: none; stroke: var(--c); stroke-width: 1.5 }
svg circle, svg tspan { fill: var(--c) }
.s0 { --c: var(--s0) } .s1 { --c: var(--s1) } .s2 { --c: var(--s2) } .grid { --c: var(--line) }
.bar { width: 50%; vertical-align: middle }
.bar i { display: block; height: .5rem; background: var(--s0); border-radius: 2px }
pre { overflow-x: auto; padding: 1rem; border: 1px solid var(--line); border-radius: 4px; font-size: .85rem }
@media (max-width: 640px) {
  table { font-size: .88rem }
  .clips { grid-template-columns: 1fr 1fr; gap: 1.2rem 1rem }
  .pairs { grid-template-columns: 1fr }
  video, img, video.pair { width: 100% }
  .row > * { width: calc(50% - 3px) }
  .bar { width: 30% }
}
</style>
<h1>Videos from prompts, learned on this CPU</h1>
<p>$summary</p>
<table><thead><tr><th>measured<th>value<th>target<th></thead>
$targets
</table>
<h2>Prompts whose combination training never showed</h2>
<p>The first of $per_prompt clips of each, not the best. Below each prompt: what the analyser read in it, and how many of
the $per_prompt show all that was asked.</p>
<div class="clips">
$samples
</div>
<details><summary>All $num_samples clips, one prompt a row; red frames mark those that were read otherwise</summary>
$wall
</details>
<h2>Through the autoencoder</h2>
<p>Clips it never saw, left; the same, decoded from their latents, right.</p>
<div class="pairs">
$reconstructions
</div>
<h2>From a picture</h2>
<p>The given first frame, and the clip that was asked to begin with it.</p>
<div class="pairs">
$animations
</div>
<h2>Longer than anything it was trained on</h2>
<p>Made chunk after chunk, each beginning with the last frames of the one before, at memory that does not grow.</p>
<div class="clips">
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
