import json
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from reelflow.config import from_dict, to_dict
from reelflow.recipes.page import Animation, Reconstruction, Results, Sample, Target, write_page

ASKED = {"colour": "red", "shape": "ring", "motion": "left"}


def sample(name: str, **read: str | None) -> Sample:
    return Sample(f"clips/{name}.mp4", "a red ring moving left", ASKED, {**ASKED, **read})


RESULTS = Results(
    command="reelflow demo",
    machine={"cores": 2, "torch": "2.13"},
    targets=(Target("shape", 91.26, 90.0, 60.0, "%"), Target("time", 70.0, 10.0, 60.0, "min", at_most=True)),
    seconds={"autoencoder": 200.0, "transformer": 61.0},
    measures={"flicker": 0.0123456, "shares": "100%, 90%"},
    samples=(sample("0"), sample("1", shape="disc"), sample("2", motion=None), sample("3")),
    per_prompt=2,
    wall="clips/all.mp4",
    reconstructions=(Reconstruction("clips/r.mp4", "a blue disc staying still", 31.25),),
    animations=(Animation("clips/given.png", sample("4"), 28.5),),
    long=(sample("5"),),
    long_frames=65,
)


class Page(HTMLParser):
    """What a browser would load, and what a reader would see."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.loaded: list[str] = []
        self.videos: list[dict[str, str | None]] = []
        self.tags: set[str] = set()
        self.text = ""
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.loaded += [value for name, value in attrs if name in ("src", "href", "poster", "srcset")]
        if tag == "video":
            self.videos.append(dict(attrs))

    def handle_data(self, data):
        self.text += data


@pytest.fixture
def page(tmp_path) -> Page:
    write_page(tmp_path / "index.html", RESULTS, tmp_path / "run")
    return Page(tmp_path / "index.html")


def test_a_page_asks_nothing_of_the_network(page, tmp_path):
    assert page.loaded
    assert all(not name.startswith("/") and ":" not in name for name in page.loaded)
    assert not page.tags & {"script", "link", "iframe", "base"}
    html = (tmp_path / "index.html").read_text()
    assert "url(" not in html
    assert "@import" not in html


def test_videos_play_silently_by_themselves_also_on_a_phone(page):
    assert [video["src"] for video in page.videos] == [f"clips/{n}.mp4" for n in ("0", "2", "all", "r", "4", "5")]
    assert all(video.keys() >= {"autoplay", "loop", "muted", "playsinline", "aria-label"} for video in page.videos)


def test_marks_say_what_was_read_and_tallies_count_all_clips(page):
    assert "✓ red ✓ ring ✗ motion?" in page.text
    assert page.text.count("1 of 2 as asked") == 2


def test_targets_are_reported_as_met_or_missed(page):
    assert "91.3\xa0%≥\xa090\xa0%✓ met" in page.text
    assert "70.0\xa0min≤\xa010\xa0min✗ missed by far" in page.text


def test_whatever_stands_in_the_results_is_shown_as_text(tmp_path):
    evil = "<script>alert(\"1\")</script>' onload='x"
    bad = Sample(evil, evil, ASKED, {**ASKED, "shape": evil})
    results = replace(
        RESULTS,
        command=evil,
        machine={evil: evil},
        targets=(Target(evil, 1.0, 2.0, 0.0, evil),),
        seconds={evil: 1.0},
        measures={evil: evil},
        samples=(bad,),
        per_prompt=1,
        wall=evil,
        reconstructions=(Reconstruction(evil, evil, 1.0),),
        animations=(Animation(evil, bad, 1.0),),
        long=(bad,),
    )
    write_page(tmp_path / "index.html", results, tmp_path)
    page = Page(tmp_path / "index.html")
    assert "script" not in page.tags
    assert page.loaded == [evil] * len(page.loaded)
    assert all("onload" not in video for video in page.videos)


def test_a_page_can_be_made_again_from_the_results_file(page, tmp_path):
    read = from_dict(Results, json.loads(json.dumps(to_dict(RESULTS))))
    assert read == RESULTS
    write_page(tmp_path / "again.html", read, tmp_path / "run")
    assert (tmp_path / "again.html").read_bytes() == (tmp_path / "index.html").read_bytes()


def test_curves_come_from_the_logs_and_values_that_were_not_finite_are_left_out(tmp_path):
    bins = [
        {"t": [0.0, 0.5], "mean": 0.8, "stderr": 0.1},
        {"t": [0.5, 1.0], "mean": None, "stderr": None},
    ]
    logs = {
        "vae": [{"kind": "train", "l2": 0.1}, {"kind": "train", "l2": None}, {"kind": "validation", "psnr": 20.0}],
        "dit": [{"kind": "train", "loss": 1.5}, {"kind": "train", "loss": None}, {"kind": "validation", "bins": bins}],
    }
    for name, lines in logs.items():
        (tmp_path / name).mkdir()
        text = "".join(json.dumps({"step": 10 + i, **line}) + "\n" for i, line in enumerate(lines))
        (tmp_path / name / "log.jsonl").write_text(text)
    write_page(tmp_path / "index.html", RESULTS, tmp_path)
    html = (tmp_path / "index.html").read_text()
    assert html.count("<circle") == 1 + 1 + 1 + 1
    assert "step 12" in html


@pytest.mark.parametrize(
    ("value", "at_most", "verdict"),
    [
        (30.0, False, "met"),
        (29.9, False, "missed"),
        (26.9, False, "missed by far"),
        (float("nan"), False, "missed by far"),
        (30.1, True, "missed"),
        (30.0, True, "met"),
    ],
)
def test_a_number_is_judged_against_its_target_and_its_floor(value, at_most, verdict):
    floor = None if at_most else 27.0
    assert Target("psnr", value, 30.0, floor, "dB", at_most=at_most).verdict == verdict
