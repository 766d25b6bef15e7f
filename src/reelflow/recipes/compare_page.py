"""What a comparison found, as one HTML page, as Markdown tables and as plots; `results.json` is a `Report`.

Every number in the tables is mean ± standard deviation over the seeds. Two variants are told apart where their means
differ by more than twice the standard error of the difference; else the page says that they are not. What a number
does not say stands in `reading`.
"""

import base64
import json
import math
import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from html import escape
from pathlib import Path
from string import Template
from typing import Any, NamedTuple

from reelflow.config import configuration, to_dict
from reelflow.recipes.files import write_text
from reelflow.recipes.plot import Series, line_plot_svg, svg_file

__all__ = [
    "Facts",
    "Outcome",
    "Report",
    "Scores",
    "claims",
    "dot_plot_svg",
    "reading",
    "summary",
    "tables",
    "write_report",
]


@configuration
class Scores:
    """Measures of one set of clips, means over them."""

    num_clips: int
    colour: float  # shares of clips that show what was asked
    shape: float
    motion: float
    all: float
    flicker: float
    jitter: float
    chroma: float
    outside: float  # share of pixels that clipping changes
    picture_spread: float
    place_spread: float | None
    frechet: float  # to unseen real clips


@configuration
class Facts:
    """What all runs share; the keys are sizes in pixels."""

    psnr: dict[str, float]  # dB, of unseen clips rebuilt
    vae_teraflops: float  # of training
    vae_parameters: int
    compression: float  # pixel values for each latent value
    seconds: float  # of CPU
    real: dict[str, Scores]  # unseen real clips, beside other real ones
    rebuilt: dict[str, Scores]


@configuration
class Outcome:
    """What became of one run."""

    variant: str
    title: str
    seed: int
    size: int  # pixels
    steps: int
    teraflops: float  # of training
    attention_gigaflops: float  # of one forward of one clip
    other_gigaflops: float
    seconds: float  # of CPU, training
    num_tokens: int
    num_frames: int  # of tokens
    num_parameters: int
    validation: float
    scores: dict[str, Scores]  # by way of sampling
    few_steps_error: dict[str, float]  # mean squared difference from the usual way's result, from the same noise
    gates: dict[str, float]


@configuration
class Report:
    """The whole comparison."""

    command: str
    machine: dict[str, str | int]
    settings: dict[str, Any]
    facts: Facts
    outcomes: tuple[Outcome, ...]

    def of(self, variant: str) -> list[Outcome]:
        return [outcome for outcome in self.outcomes if outcome.variant == variant]

    def sides(self, variants: dict[str, str]) -> dict[str, "Side"]:
        """Return those of `variants` that were run."""
        return {name: Side(label, found) for name, label in variants.items() if (found := self.of(name))}


class Side(NamedTuple):
    """A variant, what it is called, and its outcomes."""

    label: str
    outcomes: list[Outcome]


class Part(NamedTuple):
    """A question, and the variants that answer it: names, and what each is called here."""

    name: str
    title: str
    variants: dict[str, str]
    same_data: bool = True  # so that errors of the velocity compare


OBJECTIVES = {
    "full": "rectified flow, logit-normal",
    "uniform": "rectified flow, uniform",
    "v_prediction": "v-prediction, 1,000 steps",
}
SMALL = {"uniform": "uniform", "full": "logit-normal", "shifted": "logit-normal, shift 3"}
LARGE = {f"large_{name}" if name != "full" else "large": label for name, label in SMALL.items()}
PARTS = (
    Part(
        "attention",
        "Attention",
        {
            "full": "full 3D",
            "factorised": "space, then time",
            "gated": "gated space and time",
            "window": "windows",
            "periodic": "every second block full",
        },
    ),
    Part("objective", "Rectified flow and v-prediction", OBJECTIVES),
    Part("time_small", "Time, small clips", SMALL),
    Part("time_large", "Time, large clips", LARGE),
    Part(
        "space",
        "Latents and pixels",
        {"full": "latents", "pixel": "pixels", "pixel_data": "pixels, data predicted"},
        same_data=False,
    ),
)
USUAL = "usual"
SCALES = (1.0, 3.5, 7.5, 15.0)


class Estimate(NamedTuple):
    """Mean and standard deviation over seeds."""

    mean: float
    std: float
    number: int

    @classmethod
    def of(cls, values: Iterable[float | None]) -> "Estimate":
        found = [value for value in values if value is not None]
        if not found:
            return cls(math.nan, math.nan, 0)
        return cls(statistics.fmean(found), statistics.stdev(found) if len(found) > 1 else math.nan, len(found))

    def differs(self, other: "Estimate") -> bool | None:
        """Say whether the means are more than twice the standard error of their difference apart; None if unknown."""
        error = math.hypot(self.std / math.sqrt(max(self.number, 1)), other.std / math.sqrt(max(other.number, 1)))
        return None if math.isnan(error) else abs(self.mean - other.mean) > 2 * error

    def shown(self, digits: int, *, percent: bool = False) -> str:
        factor = 100 if percent else 1
        if not self.number:
            return "none"
        text = f"{factor * self.mean:.{digits}f}"
        return text if math.isnan(self.std) else f"{text} ± {factor * self.std:.{digits}f}"


class Column(NamedTuple):
    """A measure of a run, or of the clips that it made in one way of sampling."""

    title: str
    value: Callable[[Scores], float | None] | Callable[[Outcome, str], float | None]
    digits: int
    percent: bool = False
    of_run: bool = False

    def of(self, outcome: Outcome, way: str) -> float | None:
        return self.value(outcome, way) if self.of_run else self.value(outcome.scores[way])  # type: ignore[call-arg,arg-type]


COLOUR = Column("colour, %", lambda scores: scores.colour, 0, percent=True)
SHAPE = Column("shape, %", lambda scores: scores.shape, 0, percent=True)
MOTION = Column("motion, %", lambda scores: scores.motion, 0, percent=True)
ALL = Column("all three, %", lambda scores: scores.all, 0, percent=True)
FLICKER = Column("flicker x 1000", lambda scores: 1000 * scores.flicker, 1)
JITTER = Column("jitter x 1000", lambda scores: 1000 * scores.jitter, 1)
FRECHET = Column("Fréchet", lambda scores: scores.frechet, 2)
CHROMA = Column("chroma", lambda scores: scores.chroma, 3)
OUTSIDE = Column("clipped, %", lambda scores: scores.outside, 1, percent=True)
PICTURES = Column("spread of pictures", lambda scores: scores.picture_spread, 3)
PLACES = Column("spread of places", lambda scores: scores.place_spread, 3)
VALIDATION = Column("velocity error", lambda outcome, way: outcome.validation, 4, of_run=True)
STEPS = Column("steps", lambda outcome, way: float(outcome.steps), 0, of_run=True)
SECONDS = Column("CPU s", lambda outcome, way: outcome.seconds, 0, of_run=True)
MOVED = Column("change from all steps", lambda outcome, way: outcome.few_steps_error[way], 3, of_run=True)
QUALITY = (COLOUR, SHAPE, MOTION, ALL, FLICKER, FRECHET)


class TableOf(NamedTuple):
    """Rows of text under a head; the first column names the row."""

    title: str
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def tables(report: Report) -> list[TableOf]:
    """Return a table for each question whose variants were run, and one of what real clips score."""
    columns: tuple[Column, ...] = (STEPS, SECONDS, *QUALITY, VALIDATION)
    made = [
        _table(part.title, report.sides(part.variants).values(), USUAL, columns if part.same_data else columns[:-1])
        for part in PARTS
    ]
    again = [
        Side(f"{side.label}, {_square(side)}", side.outcomes) for side in report.sides({**SMALL, **LARGE}).values()
    ]
    made.append(_table("Time, sampled at shift 3", again, "shift 3", QUALITY))
    made.append(_table("Four steps", report.sides(OBJECTIVES).values(), "4 steps", (*QUALITY, MOVED)))
    base = report.of("full")
    columns = (COLOUR, SHAPE, MOTION, ALL, FLICKER, JITTER, CHROMA, OUTSIDE, PICTURES, PLACES, FRECHET)
    guided = [_row(Side(way.removeprefix("guidance "), base), way, columns) for way in _guidance(base)]
    made.append(TableOf("Guidance", ("", *_titles(columns)), tuple(guided)))
    made = [table for table in made if table.rows]
    shown = (COLOUR, SHAPE, MOTION, ALL, FLICKER, JITTER, CHROMA, PICTURES, PLACES, FRECHET)
    references = [
        (f"{kind}, {size} x {size}", scores[size])
        for kind, scores in (("real", report.facts.real), ("rebuilt", report.facts.rebuilt))
        for size in scores
    ]
    rows = tuple(
        (name, *(Estimate.of([column.value(scores)]).shown(column.digits, percent=column.percent) for column in shown))  # type: ignore[call-arg,arg-type]
        for name, scores in references
    )
    return [*made, TableOf("Real clips, and the same through the autoencoder", ("", *_titles(shown)), rows)]


def _guidance(base: Sequence[Outcome]) -> list[str]:
    return [way for way in base[0].scores if way.startswith("guidance ")] if base else []


def _table(title: str, sides: Iterable[Side], way: str, columns: Sequence[Column]) -> TableOf:
    rows = tuple(_row(side, way, columns) for side in sides if way in side.outcomes[0].scores)
    return TableOf(title, ("", *_titles(columns)), rows)


def _row(side: Side, way: str, columns: Sequence[Column]) -> tuple[str, ...]:
    found = (_over_seeds(column, side.outcomes, way) for column in columns)
    cells = (each.shown(column.digits, percent=column.percent) for each, column in zip(found, columns, strict=True))
    return side.label, *cells


def _titles(columns: Sequence[Column]) -> tuple[str, ...]:
    return tuple(column.title for column in columns)


def _over_seeds(column: Column, outcomes: Sequence[Outcome], way: str = USUAL) -> Estimate:
    return Estimate.of(column.of(outcome, way) for outcome in outcomes)


# --- claims --------------------------------------------------------------------------------------------------------


class Claim(NamedTuple):
    """What the founding documents say, and what was measured here."""

    said: str
    measured: str


def claims(report: Report) -> list[Claim]:
    """Put what was measured beside each claim whose variants were run."""
    return [*_on_attention(report), *_on_learning(report), *_on_guidance(report)]


def _on_attention(report: Report) -> Iterator[Claim]:
    sides = report.sides(PARTS[0].variants)
    if "full" not in sides:
        return
    full = sides.pop("full")
    if factorised := sides.get("factorised"):
        a, num_frames = full.outcomes[0].num_tokens, full.outcomes[0].num_frames
        space = a // num_frames
        yield Claim(
            "Factorised attention costs S T / (S + T) times less than full attention.",
            f"S = {space}, T = {num_frames}: {a / (space + num_frames):.2f} by the formula, twice that here, because two full "
            f"attentions stand against one in space and one in time, so that weights are equal. {_cheaper(full, factorised)}",
        )
    said = {
        "factorised": "Factorised attention gives more for the same compute.",
        "gated": "A learned gate alpha x space + (1 - alpha) x time mixes the two paths.",
        "window": "Local windows in 3D make attention cheap.",
        "periodic": "Mostly factorised attention with full attention now and then keeps what full attention knows.",
    }
    for name, side in sides.items():
        alphas = [alpha for outcome in side.outcomes for alpha in outcome.gates.values()]
        gate = f" alpha, 0.5 at first, ended between {min(alphas):.2f} and {max(alphas):.2f}." if alphas else ""
        cost = "" if name == "factorised" else f" {_cheaper(full, side)}"
        yield Claim(said[name], _versus(full, side, ALL, VALIDATION, FRECHET) + cost + gate)


def _on_learning(report: Report) -> Iterator[Claim]:
    sides = report.sides(OBJECTIVES)
    if v := sides.pop("v_prediction", None):
        for side in sides.values():
            yield Claim(
                "Rectified flow learns better than v-prediction, and its paths are straighter, so that few steps suffice.",
                f"{_versus(side, v, ALL, VALIDATION, FRECHET)} With 4 steps: "
                f"{_versus(side, v, ALL, FRECHET, MOVED, way='4 steps')}",
            )
    for said, first, second in (
        ("Logit-normal times learn better than uniform ones.", "uniform", "full"),
        ("Time should be shifted towards noise as resolution grows.", "full", "shifted"),
    ):
        measured = [
            f"{_square(a)}: {_versus(a, b, ALL, FRECHET, VALIDATION)}"
            + (f" Sampled at shift 3: {_versus(a, b, ALL, FRECHET, way='shift 3')}" if second == "shifted" else "")
            for names in (SMALL, LARGE)
            for pair in [report.sides({n: v for n, v in names.items() if n in _sized(names, first, second)})]
            if len(pair) == 2
            for a, b in [pair.values()]
        ]
        if measured:
            yield Claim(said, " ".join(measured))
    spaces = report.sides(PARTS[-1].variants)
    latent = spaces.pop("full", None)
    if latent and spaces:
        pixel = next(iter(spaces.values()))
        tokens = pixel.outcomes[0].num_tokens / latent.outcomes[0].num_tokens
        values = 3 * report.settings["data"]["num_frames"] * pixel.outcomes[0].size ** 2 // pixel.outcomes[0].num_tokens
        width = report.settings["dim"]
        narrow = (
            f" A token of pixels stands for {values} values but is {width} wide, and a velocity, which holds all the noise, does "
            f"not pass through that; data does, which has fewer dimensions than noise. This is a verdict on such patches and "
            f"this width, not on pixels."
        )
        versus = " ".join(_versus(latent, side, STEPS, ALL, FRECHET) for side in spaces.values())
        yield Claim(
            "Latents hold 192 times fewer values than the clip, so the same compute teaches far more.",
            f"This autoencoder leaves {report.facts.compression:.1f} times fewer values, and {tokens:.1f} times fewer tokens. "
            f"{versus} Not in that compute: the autoencoder's own training, "
            f"{report.facts.vae_teraflops:.1f} teraflops beside {latent.outcomes[0].teraflops:.1f} of a run. Real clips that "
            f"only went through it are at a Fréchet of {report.facts.rebuilt[str(latent.outcomes[0].size)].frechet:.2f}."
            + (narrow if values > width else ""),
        )


def _sized(names: dict[str, str], first: str, second: str) -> tuple[str, ...]:
    """Return the names, among those of one size, of the variants that are called so at the small one."""
    return tuple(own for own, small in zip(names, SMALL, strict=True) if small in (first, second))


def _on_guidance(report: Report) -> Iterator[Claim]:
    full = report.of("full")
    ways = _guidance(full)
    if not ways:
        return
    best = max(ways, key=lambda way: _over_seeds(ALL, full, way).mean)
    near = min(ways, key=lambda way: _over_seeds(FRECHET, full, way).mean)
    scales = ", ".join(_scale(way) for way in ways)
    yield Claim(
        "Guidance of 7.5 is the usual sweet spot.",
        f"At {scales}: all three {_across(full, ways, ALL)} %, most at {_scale(best)}{_equals(full, ways, best, ALL)}; "
        f"Fréchet {_across(full, ways, FRECHET)}, least at {_scale(near)}{_equals(full, ways, near, FRECHET)}.",
    )
    real = report.facts.real[str(full[0].size)]
    yield Claim(
        "More guidance oversaturates, flickers and makes the clips of a prompt alike.",
        f"At {scales} (and real clips): "
        f"chroma {_across(full, ways, CHROMA)} ({real.chroma:.3f}){_ends(full, ways, CHROMA)}; "
        f"clipped pixels {_across(full, ways, OUTSIDE)} % ({100 * real.outside:.1f}){_ends(full, ways, OUTSIDE)}; "
        f"flicker x 1000 {_across(full, ways, FLICKER)} ({1000 * real.flicker:.1f}){_ends(full, ways, FLICKER)}; "
        f"jitter x 1000 {_across(full, ways, JITTER)} ({1000 * real.jitter:.1f}){_ends(full, ways, JITTER)}; "
        f"spread of pictures {_across(full, ways, PICTURES)} ({real.picture_spread:.3f}){_ends(full, ways, PICTURES)}; "
        f"spread of places {_across(full, ways, PLACES)} ({real.place_spread or math.nan:.3f}){_ends(full, ways, PLACES)}.",
    )


def _cheaper(full: Side, side: Side) -> str:
    a, b = full.outcomes[0], side.outcomes[0]
    return (
        f"By count, full 3D takes {a.attention_gigaflops / b.attention_gigaflops:.2f} times the FLOPs in attention and "
        f"{_flops(a) / _flops(b):.2f} times in all; measured, each at its fastest seed, "
        f"{_per_step(full) / _per_step(side):.2f} times the CPU time of a step."
    )


def _versus(first: Side, second: Side, *columns: Column, way: str = USUAL) -> str:
    """Say both sides' values of each measure, and whether they can be told apart."""
    told = []
    for column in columns:
        a, b = (_over_seeds(column, side.outcomes, way) for side in (first, second))
        differs = a.differs(b) if a.std or b.std else None  # counts do not vary
        verdict = "" if differs is None else ", told apart" if differs else ", not told apart"
        values = " against ".join(value.shown(column.digits, percent=column.percent) for value in (a, b))
        told.append(f"{column.title} {values}{verdict}")
    return f"{first.label} against {second.label}: {'; '.join(told)}."


def _scale(way: str) -> str:
    return way.removeprefix("guidance ")


def _across(outcomes: Sequence[Outcome], ways: Sequence[str], column: Column) -> str:
    return ", ".join(_over_seeds(column, outcomes, way).shown(column.digits, percent=column.percent) for way in ways)


def _equals(outcomes: Sequence[Outcome], ways: Sequence[str], best: str, column: Column) -> str:
    """Name the ways that cannot be told apart from the best."""
    top = _over_seeds(column, outcomes, best)
    equal = [_scale(way) for way in ways if way != best and _over_seeds(column, outcomes, way).differs(top) is False]
    return f" (not told apart from {', '.join(equal)})" if equal else ""


def _ends(outcomes: Sequence[Outcome], ways: Sequence[str], column: Column) -> str:
    """Say whether the first way and the last differ."""
    differs = _over_seeds(column, outcomes, ways[0]).differs(_over_seeds(column, outcomes, ways[-1]))
    return "" if differs is None else ", ends told apart" if differs else ", ends not told apart"


def _flops(outcome: Outcome) -> float:
    return outcome.attention_gigaflops + outcome.other_gigaflops


def _square(side: Side) -> str:
    return f"{side.outcomes[0].size} x {side.outcomes[0].size}"


def _per_step(side: Side) -> float:
    """Return the CPU seconds of a step of the run that other work on the machine disturbed least."""
    return min(outcome.seconds / outcome.steps for outcome in side.outcomes)


# --- plots ---------------------------------------------------------------------------------------------------------


def dot_plot_svg(rows: Sequence[tuple[str, Sequence[float]]], *, label: str, width: int = 460) -> str:
    """Draw a row of dots for each name, one for each value, and a bar at their mean."""
    left, right, top, line = 190, 24, 14, 26
    values = [value for _, found in rows for value in found]
    low, high = min(values, default=0.0), max(values, default=1.0)
    unit = 10.0 ** math.floor(math.log10(max(high - low, 1e-6)))
    step = next(unit * m for m in (0.2, 0.5, 1, 2, 5) if (high - low) / (unit * m) <= 5)
    first, last = math.floor(low / step), max(math.ceil(high / step), math.floor(low / step) + 1)
    bottom = top + line * len(rows)

    def column(value: float) -> float:
        return round(left + (value / step - first) / (last - first) * (width - left - right), 1)

    parts = []
    for mark in range(first, last + 1):
        x = column(mark * step)
        parts.append(f'<path class="grid" d="M{x} {top}V{bottom}"/>')
        parts.append(f'<text x="{x}" y="{bottom + 16}" text-anchor="middle">{round(mark * step, 10):g}</text>')
    for number, (name, found) in enumerate(rows):
        y = top + line * (number + 0.5)
        parts.append(f'<text x="{left - 12}" y="{y + 4}" text-anchor="end">{escape(name)}</text>')
        mean = column(statistics.fmean(found))
        parts.append(f'<g class="s0"><path stroke-width="3" d="M{mean} {y - 8}V{y + 8}"/>')
        parts += [f'<circle cx="{column(value)}" cy="{y}" r="3.5" fill-opacity="0.6"/>' for value in found]
        parts.append("</g>")
    parts.append(
        f'<text x="{(left + width - right) / 2}" y="{bottom + 34}" text-anchor="middle">{escape(label)}</text>'
    )
    described = escape(f"{label}: {', '.join(name for name, _ in rows)}")
    return f'<svg viewBox="0 0 {width} {bottom + 44}" role="img" aria-label="{described}">{"".join(parts)}</svg>'


def plots(report: Report) -> dict[str, str]:
    """Return inline SVGs by name."""
    drawn = {}
    for part in PARTS:
        sides = report.sides(part.variants).values()
        if len(sides) < 2:
            continue
        for column, name in ((ALL, "prompt"), (FRECHET, "frechet")):
            factor = 100 if column.percent else 1
            rows = [(s.label, [factor * (column.of(each, USUAL) or 0.0) for each in s.outcomes]) for s in sides]
            drawn[f"{part.name}-{name}"] = dot_plot_svg(rows, label=column.title)
    base = report.of("full")
    if ways := _guidance(base):
        scales = [float(_scale(way)) for way in ways]
        for column, name in ((ALL, "prompt"), (CHROMA, "chroma"), (FLICKER, "flicker"), (PICTURES, "spread")):
            factor = 100 if column.percent else 1
            found = [_over_seeds(column, base, way) for way in ways]
            errors = [0.0 if math.isnan(e.std) else factor * e.std for e in found]
            points = [(scale, factor * e.mean) for scale, e in zip(scales, found, strict=True)]
            drawn[f"guidance-{name}"] = line_plot_svg(
                [Series("", points, errors)], x_label="guidance scale", y_label=column.title
            )
    return drawn


# --- files ---------------------------------------------------------------------------------------------------------


def write_report(out: Path, report: Report) -> None:
    """Write results.json, index.html, tables.md and a file for each plot; pictures come from `out/runs`."""
    drawn, made, said = plots(report), tables(report), claims(report)
    write_text(out / "results.json", json.dumps(to_dict(report), indent=1))
    for name, svg in drawn.items():
        write_text(out / f"{name}.svg", svg_file(svg))
    text = [f"### {table.title}\n\n{_markdown(table.head, table.rows)}" for table in made]
    claimed = _markdown(("the founding documents", "measured here"), [tuple(claim) for claim in said])
    read = "\n".join(f"* {each}" for each in reading(report))
    write_text(out / "tables.md", "\n\n".join([summary(report), read, f"### Claims\n\n{claimed}", *text]) + "\n")
    first = min((outcome.seed for outcome in report.outcomes), default=0)
    pictures = {
        name: (report.of(name)[0].title, path.read_bytes())
        for name in dict.fromkeys(outcome.variant for outcome in report.outcomes)
        if (path := out / "runs" / f"{name}-{first}.png").is_file()
    }
    page = PAGE.substitute(
        summary=escape(summary(report)),
        reading="\n".join(f"<li>{escape(each)}" for each in reading(report)),
        claims="\n".join(f"<tr><td>{escape(claim.said)}<td>{escape(claim.measured)}" for claim in said),
        parts="\n".join(_section(table, drawn) for table in made),
        pictures="\n".join(_picture(title, data) for title, data in pictures.values()),
        command=escape(report.command),
        machine=escape(", ".join(f"{name} {value}" for name, value in report.machine.items())),
    )
    write_text(out / "index.html", page)


def _section(table: TableOf, drawn: dict[str, str]) -> str:
    names = [name for part in PARTS if part.title == table.title for name in drawn if name.startswith(f"{part.name}-")]
    names += [name for name in drawn if table.title == "Guidance" and name.startswith("guidance-")]
    figures = "\n".join(f"<figure>{drawn[name]}</figure>" for name in names)
    head = "".join(f"<th>{escape(cell)}" for cell in table.head)
    rows = "\n".join(f"<tr><th>{escape(row[0])}" + "".join(f"<td>{escape(c)}" for c in row[1:]) for row in table.rows)
    return (
        f"<h2>{escape(table.title)}</h2>\n<div class=plots>{figures}</div>\n"
        f"<div class=wide><table><thead><tr>{head}</thead>\n{rows}\n</table></div>"
    )


def _picture(title: str, data: bytes) -> str:
    source = base64.b64encode(data).decode()
    name = escape(title)
    return f'<figure><img alt="clips of {name}" src="data:image/png;base64,{source}"><figcaption>{name}</figcaption></figure>'


def summary(report: Report) -> str:
    """Say how much was run."""
    seeds = sorted({outcome.seed for outcome in report.outcomes})
    spent: dict[int, float] = {}
    for outcome in report.outcomes:
        spent[outcome.size] = max(spent.get(outcome.size, 0.0), outcome.teraflops)
    budgets = ", ".join(f"{teraflops:.2g} teraflops at {size} x {size}" for size, teraflops in sorted(spent.items()))
    hours = (sum(outcome.seconds for outcome in report.outcomes) + report.facts.seconds) / 3600
    return (
        f"{len({o.variant for o in report.outcomes})} variants, {len(seeds)} seeds each. A run trains for {budgets}, in as "
        f"many whole steps as that pays for: the budget is equal within a size, and sizes are not compared. "
        f"{hours:.2f} hours of one core for all training, the autoencoder's and the clips among them."
    )


def reading(report: Report) -> list[str]:
    """Say what the numbers mean, and what they do not."""
    data = report.settings["data"]
    prompts = math.prod(len(data[name]) for name in ("colours", "shapes", "motions"))
    clips = max((scores.num_clips for outcome in report.outcomes for scores in outcome.scores.values()), default=0)
    return [
        "Values are means ± standard deviations over seeds; dots are seeds. Two means are told apart when they differ by more "
        "than twice the standard error of their difference. With three seeds each, one pair of equals in nine would be, so "
        "some of what is told apart below is chance.",
        "All runs share the clips, the autoencoder, the width, the learning rates and the sampler's steps. These were found by "
        "trying full 3D attention, which may favour it. A seed draws the weights, the batches and the noise. Small models on a "
        "small world: nothing here says what holds at another scale.",
        f"Colour, shape, motion: shares of {clips} clips, for {prompts} prompts, in which a reader of the world finds what was "
        f"asked. Every prompt was trained on. A clip made for any of these prompts, drawn at random, has all three right in one "
        f"of {prompts}.",
        "Fréchet: distance to unseen real clips over untrained features of pixels, biased upwards by the few clips: of use "
        "within this page and one size only. Velocity error: of the averaged weights on unseen clips, at eight levels of noise, "
        "the same for all; of use within one table.",
        "Flicker: mean change of a pixel from frame to frame, motion too. Jitter: of its second difference. Chroma: mean "
        "distance from grey. Clipped: share of pixels that left the range. Spread: how different the clips of a prompt are, "
        "in pixels, and in the object's place. Change from all steps: squared difference of the result, from the same noise.",
        "FLOPs are counted (products of matrices only), not measured. CPU seconds are measured, of one thread of a shared "
        "machine, whose load may make tens of percent; benchmarks/patterns.py times kinds of attention side by side.",
    ]


def _markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


PAGE = Template("""<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>reelflow: one comparison at equal compute</title>
<style>
:root { color-scheme: light dark; --ink: #1d1f21; --soft: #6b7076; --line: #e3e3df; --paper: #fbfbf9; --s0: #3567a8 }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e4e3df; --soft: #979a9e; --line: #33363a; --paper: #17191b; --s0: #7fa9e0 } }
body { margin: 0 auto; max-width: 66rem; padding: 3rem 1rem 5rem; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, sans-serif; font-variant-numeric: tabular-nums }
h1 { font-size: 1.9rem; line-height: 1.2; font-weight: 600; margin: 0 0 .6rem }
h2 { font-size: 1.1rem; font-weight: 600; margin: 3rem 0 .6rem }
p, ul { max-width: 44rem; margin: 0 0 1.2rem }
p, ul, thead th, footer, figcaption { color: var(--soft) }
.wide { overflow-x: auto }
table { border-collapse: collapse; width: 100%; font-size: .88rem }
th, td { padding: .35rem 0 .35rem 1rem; border-bottom: 1px solid var(--line); text-align: right; vertical-align: top;
  font-weight: 400 }
thead th { vertical-align: bottom; font-size: .8rem }
th:first-child { text-align: left; padding-left: 0; white-space: nowrap }
.claims td { text-align: left }
.claims td:first-child { width: 34%; padding-left: 0 }
.plots { display: grid; gap: 1rem 2rem; grid-template-columns: repeat(auto-fit, minmax(240px, 1fr)) }
.pictures { display: grid; gap: 1.5rem 2rem; grid-template-columns: repeat(auto-fill, minmax(250px, 1fr)) }
figure { margin: 0 }
figcaption, footer { font-size: .85rem }
img { width: 250px; image-rendering: pixelated; border-radius: 3px }
svg { display: block; width: 100%; max-width: 460px }
svg text { font-size: 11.5px; fill: var(--soft) }
svg path, svg polyline { fill: none; stroke: var(--c); stroke-width: 1.5 }
svg circle, svg tspan { fill: var(--c) }
.s0 { --c: var(--s0) } .grid { --c: var(--line) }
pre { overflow-x: auto; padding: 1rem; border: 1px solid var(--line); border-radius: 4px; font-size: .85rem }
</style>
<h1>One comparison, at equal compute</h1>
<p>$summary</p>
<ul>
$reading
</ul>
<h2>What the founding documents say, and what was measured</h2>
<table class=claims>
$claims
</table>
$parts
<h2>What the clips look like</h2>
<p>Of the first seed: five frames of a clip of every second prompt, the first made of it.</p>
<div class=pictures>
$pictures
</div>
<h2>Again</h2>
<pre>$command</pre>
<footer>$machine</footer>
</html>
""")
