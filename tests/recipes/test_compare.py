import json
import shutil
from dataclasses import replace
from html.parser import HTMLParser
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from rich.console import Console

from reelflow.config import from_dict, set_values, to_dict
from reelflow.data.worlds import Reading
from reelflow.diffusion.process import Parameterization, RectifiedFlow, VariancePreserving
from reelflow.errors import ConfigError, ReelflowError
from reelflow.models.vae import Stage, staged
from reelflow.nn.patterns import Space, Time
from reelflow.recipes import compare as module
from reelflow.recipes.compare import (
    chroma,
    compare,
    comparison,
    outside,
    picture_spread,
    place_spread,
    variants,
    velocity_error,
)
from reelflow.recipes.compare_page import (
    Estimate,
    Outcome,
    Report,
    claims,
    dot_plot_svg,
    reading,
    summary,
    tables,
    write_report,
)

SILENT = Console(quiet=True)
FULL = comparison()
TINY = replace(
    FULL,
    data=replace(
        FULL.data,
        colours=("red",),
        shapes=("disc",),
        motions=("left", "right"),
        num_frames=5,
        small=32,
        large=40,
        num_clips=8,
        num_validation=4,
    ),
    vae=staged(
        latent_channels=4,
        patch=4,
        conv="factorised",
        resample_kernel=1,
        encoder=(Stage(16, 0, time=2),),
        decoder=(Stage(16, 0, time=2),),
    ),
    vae_loss=replace(FULL.vae_loss, crop_frames=5),
    vae_training=replace(FULL.vae_training, steps=2, batch_size=4),
    teraflops=1e-4,
    dim=16,
    num_heads=1,
    rope=(4, 6, 6),
    depth=2,
    batch_size=4,
    sampling=replace(FULL.sampling, num_steps=2),
    seeds=(0, 1),
    only=("gated", "pixel"),
)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A whole comparison, carried out in this process."""
    out = tmp_path_factory.mktemp("comparison")
    assert compare(TINY, out, console=SILENT)
    return out


def results(out):
    """Everything measured but the seconds."""
    found = {path.name: json.loads(path.read_text()) for path in sorted((out / "results").iterdir())}
    return {name: {key: value for key, value in each.items() if key != "seconds"} for name, each in found.items()}


# The configuration


def test_every_variant_differs_from_the_base_in_one_thing():
    known = variants(FULL)
    base = known["full"]
    assert [known[name] for name in ("uniform", "shifted")] != [base, base]
    for name, variant in known.items():
        reference = known[name.split("_")[0]] if name.startswith(("large_", "pixel_")) else base
        differing = {
            field
            for field in ("attention", "flow", "size", "space")
            if getattr(variant, field) != getattr(reference, field)
        }
        assert len(differing) == (name != "full" and name != reference), name
    assert known["factorised"].attention == FULL.depth * ((Space(), Time()),)


def test_all_patterns_have_the_same_weights_but_for_the_gates():
    counts = {name: FULL.cost(variant).num_parameters for name, variant in variants(FULL).items()}
    gates = 2 * FULL.depth
    assert {counts[n] for n in ("full", "factorised", "window", "periodic")} == {counts["gated"] - gates}


def test_every_run_takes_as_many_steps_as_the_budget_pays_for():
    for variant in FULL.chosen.values():
        step = 3e-12 * FULL.batch_size * FULL.cost(variant).flops
        assert 0 <= variant.budgets * FULL.teraflops - FULL.steps(variant) * step < step


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ('only=["fulll"]', "full"),
        ("seeds=[1, 1]", "different numbers"),
        ("teraflops=0.001", "do not pay for one step"),
        ("teraflops=0", "must be positive"),
        ("depth=3", "nearest: 4"),
        ("clips_per_prompt=1", "nearest: 2"),
        ('data.shapes=["rings"]', "ring"),
        ("data.num_clips=1", "two clips of each combination"),
        ("data.large=50", "nearest: 48 or 52"),
    ],
)
def test_what_cannot_be_compared_is_refused(assignment, message):
    with pytest.raises(ConfigError, match=message):
        set_values(FULL, [assignment])


def test_a_configuration_survives_json():
    assert from_dict(type(TINY), json.loads(json.dumps(to_dict(TINY)))) == TINY


# The runs


@pytest.fixture(scope="module")
def apart(finished, tmp_path_factory):
    """Half of the same comparison by two processes, beside runs that must fail; the folder, and what was said."""
    out = tmp_path_factory.mktemp("apart")
    shutil.copytree(finished / "shared", out / "shared")
    shutil.copy(finished / "comparison.json", out)
    (out / "shared" / f"clips-{TINY.data.large}.safetensors").unlink()
    with pytest.raises(ReelflowError) as failure:
        compare(replace(TINY, only=("gated", "large")), out, jobs=2, console=SILENT)
    return out, str(failure.value)


@pytest.mark.slow
def test_results_do_not_depend_on_the_number_of_processes(finished, apart):
    mine = results(apart[0])
    assert set(mine) == {"gated-0.json", "gated-1.json"}
    assert mine.items() <= results(finished).items()


@pytest.mark.slow
def test_a_run_that_fails_in_its_process_is_named(apart):
    assert "large, seed 0: FileNotFoundError" in apart[1]
    assert "large, seed 1: FileNotFoundError" in apart[1]


def test_a_comparison_goes_on_where_it_was_killed(finished, tmp_path, monkeypatch):
    out = tmp_path / "out"
    shutil.copytree(finished, out)
    lost = out / "results" / "gated-1.json"
    lost.unlink()
    honest, worked = module._run, []
    monkeypatch.setattr(module, "_run", lambda config, out, *run: worked.append(run[:2]) or honest(config, out, *run))
    assert compare(TINY, out, console=SILENT)
    assert worked == [("gated", 1)]
    assert results(out) == results(finished)


def test_more_seeds_and_variants_may_be_added_but_nothing_else_changed(finished, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(finished, out)
    assert compare(replace(TINY, seeds=(0,)), out, console=SILENT)
    assert {outcome["seed"] for outcome in json.loads((out / "results.json").read_text())["outcomes"]} == {0}
    with pytest.raises(ConfigError, match="another teraflops"):
        compare(replace(TINY, teraflops=2e-4), out, console=SILENT)


def test_a_folder_of_something_else_is_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="no comparison"):
        compare(TINY, tmp_path, console=SILENT)


# Measures


def test_chroma_is_0_for_grey_and_1_for_a_pure_colour():
    grey = torch.rand(2, 1, 3, 4, 4).mul(2).sub(1).expand(-1, 3, -1, -1, -1)
    red = torch.tensor([1.0, -1.0, -1.0]).view(1, 3, 1, 1, 1).expand(2, -1, 3, 4, 4)
    assert chroma(grey) == 0
    assert chroma(red) == 1
    assert chroma(torch.cat([grey, red])) == 0.5


def test_outside_counts_pixels_that_clipping_changes():
    raw = torch.zeros(1, 3, 2, 2, 2)
    raw[0, 0, 0, 0, 0], raw[0, 1, 0, 0, 0], raw[0, 2, 1, 1, 1] = 1.5, -2.0, 1.0
    assert outside(raw) == 1 / 8


def test_picture_spread_is_the_rms_difference_within_groups():
    clips = torch.zeros(4, 3, 2, 4, 4)
    clips[1], clips[2:] = 1.0, -1.0
    assert picture_spread(clips, [[0, 1], [2, 3]]) == pytest.approx(0.25)  # 1 / 2 and 0
    assert picture_spread(clips, [[0, 1, 2]]) == pytest.approx((0.5 + 0.5 + 1) / 3)


def test_place_spread_is_the_distance_of_mean_places_where_both_were_found():
    def reading(x: float, y: float) -> Reading:
        path = np.array([[x - 1, y], [x + 1, y], [np.nan, np.nan]], np.float32)
        return Reading("red", "disc", "left", path, np.zeros((3, 2), np.float32), 1.0)

    lost = replace(reading(0, 0), trajectory=np.full((3, 2), np.nan, np.float32))
    read = [reading(0, 0), reading(3, 4), lost]
    assert place_spread(read, [[0, 1]], size=10) == pytest.approx(0.5)
    assert place_spread(read, [[0, 1, 2]], size=10) == pytest.approx(0.5)
    assert place_spread(read, [[0, 2]], size=10) is None


@pytest.mark.parametrize("process", [RectifiedFlow(), VariancePreserving()])
@pytest.mark.parametrize("prediction", ["velocity", "v"])
def test_velocity_error_is_the_same_for_the_same_knowledge_of_the_data(process, prediction):
    """A network that takes all data for 0 errs by data / sigma' in velocity, sigma' = 1 - tau, whatever its process."""
    generator = torch.Generator().manual_seed(0)
    data = torch.randn(20, 1, 2, 4, 4, generator=generator)
    parameterization = Parameterization(process, prediction)

    def ignorant(x, t, rows):
        sigma = process.sigma(t).view(-1, 1, 1, 1, 1).float()
        return parameterization.target(torch.zeros_like(x), x / sigma, t)

    expected = np.mean([1 / (1 - (k + 0.5) / 8) ** 2 for k in range(8)]) * data.square().mean().item()
    assert velocity_error(ignorant, data, parameterization) == pytest.approx(expected, rel=1e-3)


def test_velocity_error_asks_about_each_clip_once_a_level():
    asked = []
    data = torch.zeros(20, 1, 2, 4, 4)
    velocity_error(lambda x, t, rows: asked.append(rows) or torch.zeros_like(x), data, Parameterization())
    assert torch.cat(asked).tolist() == 8 * list(range(20))


# The page


class Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.loaded: list[str] = []
        self.text = ""

    def handle_starttag(self, tag, attrs):
        self.loaded += [value for name, value in attrs if name in ("src", "href")]

    def handle_data(self, data):
        self.text += data


def report(finished) -> Report:
    return from_dict(Report, json.loads((finished / "results.json").read_text()))


def many(found: Report, *names: str) -> Report:
    """The report as if these variants had been run too."""
    known = variants(TINY)
    more = [
        replace(
            o,
            variant=name,
            title=known[name].title,
            scores=dict.fromkeys(known[name].ways(TINY.sampling), o.scores["usual"]),
        )
        for name in names
        for o in found.of("gated")
    ]
    more = [replace(o, few_steps_error={"4 steps": 0.5}) for o in more]
    return replace(found, outcomes=(*found.outcomes, *more))


def test_the_page_needs_nothing_else_and_is_made_from_stored_results(finished, tmp_path):
    whole = many(report(finished), *(set(variants(TINY)) - {"gated", "pixel"}))
    write_report(tmp_path, whole)
    page = Page()
    page.feed((tmp_path / "index.html").read_text())
    assert all(address.startswith("data:") for address in page.loaded)
    for title in ("Attention", "Guidance", "Latents and pixels", "Four steps", "v-prediction"):
        assert title in page.text
    assert "nan" not in page.text
    assert from_dict(Report, json.loads((tmp_path / "results.json").read_text())) == whole
    names = {path.name for path in tmp_path.glob("*.svg")}
    assert {"attention-prompt.svg", "guidance-chroma.svg", "space-frechet.svg"} <= names
    for name in names:
        ElementTree.parse(tmp_path / name)


def test_the_first_page_shows_the_clips(finished):
    page = Page()
    page.feed((finished / "index.html").read_text())
    assert len(page.loaded) == 2
    assert page.loaded[0].startswith("data:image/png;base64,")


def test_claims_are_made_for_what_was_run_only(finished):
    alone = report(finished)
    assert claims(replace(alone, outcomes=tuple(alone.of("gated")))) == []
    said = [claim.said for claim in claims(many(alone, "full"))]
    assert any("192 times" in each for each in said)
    assert not any("v-prediction" in each for each in said)


def test_tables_give_mean_and_deviation_over_seeds(finished):
    found = report(finished)
    ours = found.of("gated")
    few = [
        replace(o, scores={"usual": replace(o.scores["usual"], colour=c)})
        for o, c in zip(ours, (0.5, 0.7), strict=True)
    ]
    table = next(t for t in tables(replace(found, outcomes=tuple(few))) if t.title == "Attention")
    assert dict(zip(table.head, table.rows[0], strict=True))["colour, %"] == "60 ± 14"  # 0.1 sqrt 2


def test_the_summary_names_the_budget_of_each_size(finished):
    found = report(finished)
    large = [replace(o, size=40, teraflops=2e-4) for o in found.of("gated")]
    text = summary(replace(found, outcomes=(*found.of("gated"), *large)))
    spent = max(o.teraflops for o in found.of("gated"))
    assert (
        f"1 variants, 2 seeds each. A run trains for {spent:.2g} teraflops at 32 x 32, 0.0002 teraflops at 40 x 40"
        in text
    )


def test_what_a_number_does_not_say_is_written_beside_it(finished):
    text = " ".join(reading(report(finished)))
    assert "shares of 6 clips, for 2 prompts" in text  # three of each
    assert "right in one of 2." in text
    assert "Every prompt was trained on" in text


def test_errors_of_the_velocity_are_compared_on_the_same_data_only(finished):
    heads = {table.title: table.head for table in tables(many(report(finished), "full"))}
    assert "velocity error" in heads["Attention"]
    assert "velocity error" not in heads["Latents and pixels"]


def test_patches_of_more_values_than_the_width_are_no_verdict_on_pixels(finished):
    found = many(report(finished), "full")
    for width, told in ((16, True), (192, False)):  # patches of 3 x 8 x 8
        (claim,) = (
            c for c in claims(replace(found, settings={**found.settings, "dim": width})) if "192 times" in c.said
        )
        assert ("not on pixels" in claim.measured) is told


def test_the_best_guidance_is_named_with_those_that_equal_it(finished):
    found = many(report(finished), "full")

    def scored(values):
        outcomes = [
            replace(o, scores={w: replace(o.scores["usual"], all=v + d) for w, v in values.items()})
            for o, d in zip(found.of("full"), (0.0, 0.1), strict=True)
        ]
        (claim,) = (c for c in claims(replace(found, outcomes=tuple(outcomes))) if "sweet spot" in c.said)
        return claim.measured

    near = scored({"guidance 1": 0.1, "guidance 3.5": 0.52, "guidance 7.5": 0.5})
    assert "most at 3.5 (not told apart from 7.5);" in near
    far = scored({"guidance 1": 0.1, "guidance 3.5": 0.52, "guidance 7.5": 0.9})
    assert "most at 7.5;" in far


def test_estimates_are_told_apart_beyond_twice_the_standard_error():
    a = Estimate.of([1.0, 2.0, 3.0])  # standard error 1 / sqrt 3, of a difference sqrt(2 / 3) = 0.816
    assert a.differs(Estimate.of([2.6, 3.6, 4.6])) is False
    assert a.differs(Estimate.of([2.7, 3.7, 4.7])) is True
    assert a.differs(Estimate.of([9.0])) is None
    assert Estimate.of([None, None]).shown(1) == "none"


def test_dots_stand_where_their_values_are():
    svg = ElementTree.fromstring(dot_plot_svg([("a", [0.0, 100.0]), ("b", [50.0])], label="share"))
    x = [float(circle.get("cx")) for circle in svg.iter("circle")]
    assert x[0] + x[1] == pytest.approx(2 * x[2])
    ticks = [text.text for text in svg.iter("text")]
    assert {"0", "100", "a", "b", "share"} <= set(ticks)


def test_an_outcome_reads_back(finished):
    path = next((finished / "results").iterdir())
    outcome = from_dict(Outcome, json.loads(path.read_text()))
    assert outcome.teraflops <= TINY.teraflops < outcome.teraflops * (1 + 1 / outcome.steps) * 1.001
