import math
import re
from xml.etree import ElementTree

import pytest
import torch
import typer

import reelflow.diffusion.timesteps as timesteps
from reelflow.cli.plot import plot

SVG = "{http://www.w3.org/2000/svg}"


def rows(out: str) -> list[list[str]]:
    """The table's rows: shift, mean, median, distance, critical value, verdict."""
    return [[cell.strip() for cell in line.split("│")[1:-1]] for line in out.splitlines() if line.startswith("│")]


def picture(path) -> tuple[list[str], list[str]]:
    """The names of the series and the fills of the histograms."""
    root = ElementTree.parse(path).getroot()
    names = [span.text for span in root.iter(f"{SVG}tspan")]
    return names, [p.get("d") for p in root.iter(f"{SVG}path") if "fill" in p.get("class", "")]


def test_shifts_1_3_and_7_are_drawn_and_pass_the_test(reelflow, tmp_path):
    status, out, _ = reelflow("plot", "timesteps", "-o", "t.svg")
    assert status == 0
    names, fills = picture(tmp_path / "t.svg")
    assert names == ["shift 1", "shift 3", "shift 7"]
    assert len(fills) == 3
    table = rows(out)
    assert [row[0] for row in table] == ["1", "3", "7"]
    assert [float(row[2]) for row in table] == [0.5, 0.25, 0.125]  # logit t = -ln shift
    for row in table:
        assert float(row[3]) < float(row[4]) == pytest.approx(1.6276 / math.sqrt(20_000), abs=1e-4)
        assert row[5] == "yes"


def test_draws_that_do_not_follow_the_density_are_found_out(reelflow, monkeypatch):
    honest = timesteps.draw_times
    monkeypatch.setattr(timesteps, "draw_times", lambda *a, shift, **k: honest(*a, shift=1.05 * shift, **k))
    status, out, _ = reelflow("plot", "timesteps", "--shift", 2)
    assert status == 1
    assert [row[5] for row in rows(out)] == ["no"]


def test_a_seed_fixes_the_picture(reelflow, tmp_path):
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        reelflow("plot", "timesteps", "-o", f"{name}.svg", "--seed", seed, "--samples", 100, "--shift", 1)
    a, b, c = ((tmp_path / f"{name}.svg").read_bytes() for name in "abc")
    assert a == b != c


@pytest.mark.parametrize(
    ("options", "title", "medians"),
    [
        (["--mean", -1, "--std", 0.5], "logit-normal(-1, 0.5)", [1 / (1 + math.e)]),
        (["--distribution", "mode"], "mode(1.29)", [0.5]),
        (["--distribution", "mode", "--scale", 2 / (math.pi - 2)], "mode(1.75194)", [0.5]),  # an infinite density
        (["--distribution", "cosmap", "--shift", 4], "cosmap", [0.5, 0.2]),
        (["--distribution", "uniform", "--shift", 9], "uniform", [0.5, 0.1]),
    ],
)
def test_every_distribution_can_be_drawn(reelflow, tmp_path, options, title, medians):
    status, out, _ = reelflow("plot", "timesteps", "--samples", 2000, "--shift", 1, *options)
    assert status == 0
    assert [float(row[2]) for row in rows(out)] == pytest.approx(medians, abs=6e-4)
    svg = (tmp_path / "timesteps.svg").read_text()
    assert title in svg
    heights = [float(y) for line in re.findall(r'points="([^"]*)"', svg) for y in re.findall(r",(\S+)", line)]
    assert 60 <= min(heights) <= max(heights) <= 372


def test_every_option_has_a_help_text(reelflow):
    assert reelflow("plot", "timesteps", "--help")[0] == 0
    command = typer.main.get_command(plot).commands["timesteps"]
    assert all(param.help for param in command.params if param.name != "help")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--shift", "-1"], "shift must be positive, got -1.0; nearest: 1"),
        (["--samples", 49], "nearest: 50"),
        (["--distribution", "uniform", "--std", 2], "--std belongs to --distribution logit-normal"),
        (["--scale", 1], "--scale belongs to --distribution mode"),
        (["--std", 0], "std must be positive, got 0.0"),
        (["-o", "t.png"], "must end in .svg"),
        (7 * ["--shift", 2], "room for 6 shifts, got 7"),
    ],
)
def test_what_cannot_be_drawn_is_refused_and_nothing_written(reelflow, tmp_path, options, message):
    status, _, err = reelflow("plot", "timesteps", *options)
    assert (status, err.count("\n")) == (2, 1)
    assert message in err
    assert list(tmp_path.iterdir()) == []


def test_a_picture_is_not_replaced_unasked(reelflow):
    line = ("plot", "timesteps", "--samples", 50)
    assert reelflow(*line)[0] != 2
    assert reelflow(*line)[0] == 2
    assert reelflow(*line, "--overwrite")[0] != 2


def test_the_distance_is_the_largest_gap_between_the_two_distributions():
    from reelflow.cli.plot import _distance

    assert _distance(torch.tensor([0.5])) == 0.5
    assert _distance((torch.arange(10) + 0.5) / 10) == pytest.approx(0.05)
    assert _distance(torch.tensor([0.9, 0.95])) == pytest.approx(0.9)
    assert _distance(torch.tensor([0.1, 0.05])) == pytest.approx(0.9)
