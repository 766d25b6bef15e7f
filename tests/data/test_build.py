"""From a folder of videos to shards: `reelflow.data.build`, `reelflow.recipes.build` and `reelflow data build`."""

import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections import namedtuple
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch

from reelflow.cli.main import run
from reelflow.conditioning.chat import Describer
from reelflow.data.build import Analysis, Candidate, Journal, Source, in_process, on_ray, select
from reelflow.data.captioning import Captioning
from reelflow.data.filters import Filters, Measures
from reelflow.data.folder import ClipSpec
from reelflow.data.shards import ShardSet
from reelflow.data.video import read_clip, write_video
from reelflow.data.worlds import World
from reelflow.errors import ConfigError, DataError
from reelflow.recipes.build import BuildConfig, build
from tiny_model import tiny_pipeline

SPEC = ClipSpec(num_frames=9, height=32, width=32, fps=8.0)
CONFIG = BuildConfig(SPEC, shard_bytes=2000)
KEPT = {("film.mp4", 0), ("film.mp4", 1), ("film.mp4", 2), ("second.mp4", 0), ("third.mp4", 0)}  # file, shot


def scene(seed: int, num_frames: int = 14) -> np.ndarray:
    world = World(height=48, width=64, num_frames=num_frames, fps=12.0, max_pan=1.0)
    return world.render(world.draw_scene(np.random.default_rng(seed))).frames


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    """Five good clips in three files, and one file for each way to give none."""
    folder = tmp_path_factory.mktemp("data") / "videos"
    folder.mkdir()
    write_video(folder / "film.mp4", np.concatenate([scene(k) for k in range(3)]), fps=12)
    (folder / "film.txt").write_text("a red ring moving")
    write_video(folder / "second.mp4", scene(3), fps=12)
    write_video(folder / "third.mp4", scene(4), fps=12)
    shutil.copy(folder / "second.mp4", folder / "twin.mp4")
    write_video(folder / "tiny.webm", read_clip(folder / "third.mp4", size=(36, 48)).frames, fps=12)
    write_video(folder / "still.mp4", scene(5)[:1].repeat(14, axis=0), fps=12)
    write_video(folder / "short.mp4", scene(6, 8), fps=12)
    boxed = np.maximum(scene(7), 60)
    boxed[:, :6] = boxed[:, -6:] = 0
    write_video(folder / "boxed.mkv", boxed, fps=12)
    (folder / "broken.mp4").write_bytes(b"no video at all" * 100)
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "model"
    tiny_pipeline().save(folder)
    return folder


class Counting:
    """An engine that works here, counts, and falls over after so many items: interrupted, or `killed` with its process."""

    def __init__(self, most: int = 1000, *, killed: bool = False) -> None:
        self.most, self.killed, self.done = most, killed, []

    def __call__(self, make, items, *, gpu=False):
        for item in items:
            if len(self.done) == self.most:
                if self.killed:
                    os.kill(os.getpid(), signal.SIGKILL)
                raise KeyboardInterrupt
            (result,) = in_process(make, [item])
            self.done.append(("encode" if gpu else "scan", json.loads(item)["path"], json.loads(item).get("start")))
            yield result


def content(out: Path) -> dict[tuple[str, float], dict]:
    """Return the samples of a set by file and start; each is there once."""
    found = ShardSet.open(out / "shards")
    samples = [found.read(number) for number in range(len(found))]
    by_place = {(sample.meta["file"], sample.meta["start"]): sample for sample in samples}
    assert len(by_place) == len({sample.key for sample in samples}) == len(samples)
    return by_place


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(
        a[place].key == b[place].key
        and a[place].meta == b[place].meta
        and all(torch.equal(a[place].tensors[name], value) for name, value in b[place].tensors.items())
        for place in a
    )


@pytest.fixture(scope="module")
def built(videos, model, tmp_path_factory):
    out = tmp_path_factory.mktemp("built")
    return out, build(videos, out, CONFIG, model=model)


# --- what comes out --------------------------------------------------------------------------------------------------


def test_every_clip_and_every_file_has_its_fate(built, videos):
    out, report = built
    assert report.finished
    assert (report.num_files, report.num_clips, report.num_kept, report.num_ready) == (9, 8, 5, 5)
    reasons = {one.file: one.reason for one in report.rejected}
    expected = {
        "twin.mp4": "duplicate: the same file as second.mp4",
        "tiny.webm": "duplicate: of third.mp4 at 0.02 s",
        "still.mp4": "too still: motion",
        "short.mp4": "too short: the longest of its shots (1) has 0.67 s, needs 1.12 s",
        "boxed.mkv": "black bars: 6 + 6 rows, 0 + 0 columns, 25.0% > 2.0%",
        "broken.mp4": "unreadable: cannot be read",
    }
    assert reasons.keys() == expected.keys()
    for file, reason in expected.items():
        assert reasons[file].startswith(reason), file
    assert report.reasons["duplicate"] == 2
    lines = [json.loads(line) for line in (out / "clips.jsonl").read_text().splitlines()]
    assert {(line["file"], line["shot"]) for line in lines if line["fate"] == "kept"} == KEPT
    assert {line["file"]: line["reason"] for line in lines if line["fate"] == "rejected"} == reasons
    assert len(ShardSet.open(out / "shards").rejected) == 6


def test_samples_are_the_latents_and_text_of_their_clips(built, videos):
    out, _ = built
    pipeline = tiny_pipeline()
    for (file, start), sample in content(out).items():
        clip = read_clip(videos / file, num_frames=9, fps=8.0, start=start, size=(32, 32)).to_float()
        with torch.no_grad():
            posterior = pipeline.vae.encode(clip[None])
        assert torch.equal(sample.tensors["mean"], posterior.mean[0].half())
        assert torch.equal(sample.tensors["logvar"], posterior.logvar[0].half())
        caption = "a red ring moving" if file == "film.mp4" else ""
        assert sample.meta == {"caption": caption, "file": file, "start": start, "seconds": 1.125, "fps": 8.0}
        text = pipeline.card.text([caption]).condition()
        for name in ("context", "context_mask", "vector"):
            assert torch.equal(sample.tensors[name], getattr(text, name)[0])


def test_a_clip_lies_within_its_shot(built, videos):
    starts = sorted(start for file, start in content(built[0]) if file == "film.mp4")
    assert len(starts) == 3
    for shot, start in enumerate(starts):
        frames = read_clip(videos / "film.mp4", num_frames=9, fps=8.0, start=start).frames.numpy().astype(int)
        truth = scene(shot).astype(int)
        for frame in frames:
            assert min(np.abs(frame - one).mean() for one in truth) < 4


def test_the_page_asks_for_nothing(built):
    page = (built[0] / "report.html").read_text()
    assert not re.search(r"(src|href)=['\"](?!data:)", page)
    assert page.count("data:image/jpeg;base64,") == 4 * (
        5 + 3
    )  # two of the rejected are files without clips, one a twin
    assert page.count("<svg") == 4
    for text in ("5 clips of 9 x 32 x 32 at 8 fps", "a red ring moving", "still.mp4", "broken.mp4", "too still"):
        assert text in page


def test_ids_follow_the_contents_not_the_name(built, videos, tmp_path):
    shutil.copy(videos / "second.mp4", tmp_path / "other.mp4")
    build(tmp_path, tmp_path / "out", CONFIG)
    (sample,) = content(tmp_path / "out").values()
    assert sample.key in {known.key for known in content(built[0]).values()}
    frames = read_clip(tmp_path / "other.mp4", num_frames=9, fps=8.0, start=sample.meta["start"], size=(32, 32)).frames
    assert torch.equal(sample.tensors["frames"], frames)


# --- going on --------------------------------------------------------------------------------------------------------


def test_a_finished_build_does_nothing_again(built, videos, model):
    out, report = built
    before = content(out)
    engine = Counting()
    assert replace(build(videos, out, CONFIG, model=model, engine=engine), page=None) == replace(report, page=None)
    assert engine.done == []
    assert same(content(out), before)


@pytest.mark.parametrize("how", ["falls over", "is stopped"])
def test_a_build_that_stops_anywhere_goes_on_without_redoing(built, videos, model, tmp_path, how):
    done = []
    for place in itertools.count(1):
        engine = Counting(place % 3 + 1 if how == "falls over" else 1000)
        try:
            stopped = (
                (lambda engine=engine, most=place % 3 + 1: len(engine.done) >= most) if how == "is stopped" else bool
            )
            report = build(videos, tmp_path, CONFIG, model=model, engine=engine, stopped=stopped)
        except KeyboardInterrupt:
            report = None
        done += engine.done
        if report is not None and report.finished:
            break
        assert place < 20
    assert place > 4
    assert len(done) == len(set(done)) == 8 + 5
    assert same(content(tmp_path), content(built[0]))
    assert not (tmp_path / "encoded").exists()


def test_videos_that_are_added_are_added_to_the_set(videos, model, tmp_path):
    folder, out = tmp_path / "videos", tmp_path / "out"
    shutil.copytree(videos, folder, ignore=shutil.ignore_patterns("film*", "tiny*"))
    build(folder, out, CONFIG, model=model)
    first = content(out)
    shutil.copy(videos / "film.mp4", folder)
    shutil.copy(videos / "tiny.webm", folder / "another.webm")
    engine = Counting()
    report = build(folder, out, CONFIG, model=model, engine=engine)
    after = content(out)
    assert len(first) == 2
    assert same({place: after[place] for place in first}, first)
    assert {file for file, _ in after} == {"second.mp4", "third.mp4", "film.mp4"}
    # of two that are alike, the one that is in the set already stays, whatever its name
    assert {one.file: one.reason for one in report.rejected}["another.webm"].startswith("duplicate: of third.mp4")
    assert sorted(Path(path).name for _, path, _ in engine.done) == ["another.webm", *4 * ["film.mp4"]]


def test_another_way_to_make_it_is_refused_before_any_work(built, videos, model):
    engine = Counting()
    changed = replace(CONFIG, filters=Filters(max_motion=1.0))
    with pytest.raises(DataError, match=r"filters.max_motion was 2.0, now 1.0"):
        build(videos, built[0], changed, model=model, engine=engine)
    with pytest.raises(DataError, match="vae was"):
        build(videos, built[0], CONFIG, engine=engine)
    assert engine.done == []


def test_a_plan_makes_no_set_and_thresholds_may_change_after_it(videos, tmp_path):
    engine = Counting()
    report = build(videos, tmp_path, CONFIG, engine=engine, plan=True)
    assert (report.num_kept, report.num_ready, report.finished) == (5, 0, False)
    assert (tmp_path / "report.html").is_file()
    assert not (tmp_path / "shards").exists()
    lenient = replace(CONFIG, filters=Filters(None, None, None, None, None, duplicate_bits=None))
    assert build(videos, tmp_path, lenient, engine=engine, plan=True).num_kept == 8
    assert len(engine.done) == 8  # files; each was scanned once
    assert build(videos, tmp_path, CONFIG, engine=engine).num_ready == 5


def test_a_torn_line_and_a_torn_file_are_made_anew(built, videos, model, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        build(videos, tmp_path, CONFIG, model=model, engine=Counting(10))
    torn = (tmp_path / "analysis.jsonl").read_bytes()
    (tmp_path / "analysis.jsonl").write_bytes(torn[:-20])
    engine = Counting()
    build(videos, tmp_path, CONFIG, model=model, engine=engine)
    assert [stage for stage, *_ in engine.done].count("scan") == 1
    assert same(content(tmp_path), content(built[0]))


def test_a_journal_has_one_writer_and_whole_lines(tmp_path):
    with Journal(tmp_path / "a.jsonl") as journal:
        journal.add(b"1")
        journal.add(b"2\n")
        assert list(journal.lines()) == [b"1\n", b"2\n"]
        journal.add(b"3")
        with pytest.raises(DataError, match="another build"):
            Journal(tmp_path / "a.jsonl")
    with (tmp_path / "a.jsonl").open("ab") as file:
        file.write(b"to")
    with Journal(tmp_path / "a.jsonl") as journal:
        assert list(journal.lines()) == [b"1\n", b"2\n", b"3\n"]
        journal.add(b"4")
    assert (tmp_path / "a.jsonl").read_bytes() == b"1\n2\n3\n4\n"


def progress(out: Path) -> int:
    """Count the steps that left something on the disk."""
    log = out / "analysis.jsonl"
    return (log.read_bytes().count(b"\n") if log.is_file() else 0) + sum(
        1
        for name in ("encoded", "shards")
        for _ in (out / name).glob("*.safetensors" if name == "encoded" else "*.tar")
    )


def in_child(work) -> int:
    """Do it in a process of its own, without waiting for it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forking beside threads, which the child leaves alone
        child = os.fork()
    if child:
        return child
    status = 1
    try:
        work()
        status = 0
    finally:
        os._exit(status)


def test_a_build_that_is_killed_at_any_moment_goes_on(built, videos, model, tmp_path):
    kills = 0
    for _ in range(40):
        before, deadline = progress(tmp_path), time.monotonic() + 60
        child = in_child(lambda: build(videos, tmp_path, CONFIG, model=model))
        ended = 0
        while not ended and progress(tmp_path) <= before and time.monotonic() < deadline:
            time.sleep(0.001)
            ended, _ = os.waitpid(child, os.WNOHANG)
        if ended:
            break
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        kills += 1
    assert kills >= 8
    keys = [json.loads(line)["key"] for line in (tmp_path / "analysis.jsonl").read_bytes().splitlines()]
    assert len(keys) == len(set(keys)) == 8
    engine = Counting()
    assert build(videos, tmp_path, CONFIG, model=model, engine=engine).finished
    assert engine.done == []
    assert same(content(tmp_path), content(built[0]))


def test_clips_that_were_encoded_when_it_was_killed_are_only_packed(built, videos, model, tmp_path):
    config = replace(CONFIG, shard_bytes=1 << 20)
    child = in_child(lambda: build(videos, tmp_path, config, model=model, engine=Counting(8 + 3, killed=True)))
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    assert len(list((tmp_path / "encoded").iterdir())) == 3
    engine = Counting()
    assert build(videos, tmp_path, config, model=model, engine=engine).finished
    assert [stage for stage, *_ in engine.done] == 2 * ["encode"]
    assert same(content(tmp_path), content(built[0]))


# --- Ray -------------------------------------------------------------------------------------------------------------


def test_ray_builds_the_same_set(built, videos, model, tmp_path):
    pytest.importorskip("ray")
    with on_ray(workers=1) as engine:
        report = build(videos, tmp_path, CONFIG, model=model, engine=engine)
    assert report.reasons == built[1].reasons
    assert same(content(tmp_path), content(built[0]))


@pytest.mark.slow
@pytest.mark.parametrize(("sent", "status"), [(signal.SIGKILL, -signal.SIGKILL), (signal.SIGINT, 130)])
def test_the_command_on_ray_goes_on_after_a_signal(built, videos, model, tmp_path, sent, status):
    pytest.importorskip("ray")
    program = "import sys; from reelflow.cli.main import run; sys.exit(run(sys.argv[1:]))"
    options = ["--out", tmp_path, "--model", model, "--set", "shard_bytes=2000", "--workers", 2]
    arguments = [sys.executable, "-c", program, "data", "build", videos, *options]
    start = {
        "env": {**os.environ, "OMP_NUM_THREADS": "1"},
        "text": True,
        "stdout": subprocess.PIPE,
        "stderr": subprocess.PIPE,
    }
    process = subprocess.Popen(list(map(str, arguments)), start_new_session=True, **start)
    while process.poll() is None and progress(tmp_path) < 2:
        time.sleep(0.002)
    assert process.poll() is None, process.communicate()  # it had not begun
    known = (tmp_path / "analysis.jsonl").read_bytes()
    (os.killpg if sent == signal.SIGINT else os.kill)(process.pid, sent)  # Ctrl-C reaches all that was started
    out, err = process.communicate(timeout=300)
    assert process.returncode == status, err
    assert sent == signal.SIGKILL or "the same command goes on" in out
    finished = subprocess.run(list(map(str, arguments)), timeout=900, check=True, **start)
    assert "5 clips" in finished.stdout
    assert (tmp_path / "analysis.jsonl").read_bytes().startswith(known[: known.rfind(b"\n") + 1])
    assert same(content(tmp_path), content(built[0]))


@pytest.mark.parametrize(
    ("address", "said"),
    [("127.0.0.1:1", "no Ray cluster at 127.0.0.1:1"), ("head", "is host:port"), (None, "workers must")],
)
def test_a_cluster_that_is_not_there_is_refused(address, said):
    pytest.importorskip("ray")
    with pytest.raises(ConfigError, match=said), on_ray(workers=None if address else 0, address=address):
        pass


# --- captions from an endpoint ---------------------------------------------------------------------------------------


class Server(ThreadingHTTPServer):
    """Says how bright the pictures are that it is shown; `refused` is the status for clips it refuses."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.asked, self.refuse, self.key = 0, 0, None


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        self.answer(
            401 if self.server.key and self.server.key not in self.headers.get("Authorization", "") else 404, {}
        )

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        pictures = [part for part in body["messages"][0]["content"] if part["type"] == "image_url"]
        self.server.asked += 1
        if self.server.refuse:
            self.server.refuse -= 1
            self.answer(400, {})
            return
        assert all(part["image_url"]["url"].startswith("data:image/jpeg;base64,") for part in pictures)
        self.answer(200, {"choices": [{"message": {"content": f"{len(pictures)} pictures"}}]})

    def answer(self, status: int, content: dict) -> None:
        text = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    server = Server()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def describer(server: Server) -> Describer:
    return Describer(f"http://127.0.0.1:{server.server_port}/v1", "sees", retries=0, timeout=5.0)


ASKING = replace(CONFIG, captioning=Captioning(num_pictures=3, per_minute=1e6, parallel=1, give_up=3))


def test_captions_come_from_the_endpoint_once_and_failures_are_tried_again(server, videos, tmp_path):
    server.refuse = 2
    report = build(videos, tmp_path, ASKING, describer=describer(server))
    assert (report.num_kept, report.num_ready, report.reasons["no caption"]) == (5, 3, 2)
    assert all("status 400" in one.reason for one in report.rejected if one.kind == "no caption")
    assert server.asked == 5
    assert build(videos, tmp_path, ASKING, describer=describer(server)).num_ready == 5
    assert server.asked == 7
    assert {sample.meta["caption"] for sample in content(tmp_path).values()} == {"3 pictures"}


def test_an_endpoint_that_refuses_all_is_given_up_and_gone_on_with(server, videos, tmp_path):
    server.refuse = 3
    with pytest.raises(DataError, match=r"3 captions in a row failed"):
        build(videos, tmp_path, ASKING, describer=describer(server))
    assert build(videos, tmp_path, ASKING, describer=describer(server)).num_ready == 5


def test_an_endpoint_that_is_not_there_is_refused_before_any_work(server, videos, tmp_path, monkeypatch):
    engine = Counting()
    asking = describer(server)
    with pytest.raises(ConfigError, match="does not answer"):
        build(videos, tmp_path, CONFIG, describer=replace(asking, url="http://127.0.0.1:1/v1"), engine=engine)
    with pytest.raises(ConfigError, match="NO_SUCH_KEY"):
        build(videos, tmp_path, CONFIG, describer=replace(asking, key_variable="NO_SUCH_KEY"), engine=engine)
    server.key = "right"
    monkeypatch.setenv("SOME_KEY", "wrong")
    with pytest.raises(ConfigError, match="refuses the key: status 401"):
        build(videos, tmp_path, CONFIG, describer=replace(asking, key_variable="SOME_KEY"), engine=engine)
    assert engine.done == []
    assert server.asked == 0
    assert list(tmp_path.iterdir()) == []


# --- what is refused -------------------------------------------------------------------------------------------------


def test_a_set_of_nothing_is_refused_with_the_reasons(videos, tmp_path):
    only = tmp_path / "videos"
    only.mkdir()
    for name in ("still.mp4", "broken.mp4"):
        shutil.copy(videos / name, only / name)
    with pytest.raises(DataError, match=r"no clip of .* is kept; rejected: unreadable 1, too still 1"):
        build(only, tmp_path / "out", CONFIG)
    assert (tmp_path / "out" / "report.html").is_file()


def test_a_full_disk_is_seen_before_work(videos, tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    engine = Counting()
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10, 10, 1 << 20))
    with pytest.raises(DataError, match="1 MiB free, and 64 MiB are needed"):
        build(videos, tmp_path, CONFIG, engine=engine)
    monkeypatch.setattr("reelflow.recipes.build.SPARE_BYTES", 0)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10, 10, 50_000))
    with pytest.raises(DataError, match="for 5 more clips"):
        build(videos, tmp_path, CONFIG, engine=engine)
    assert {stage for stage, *_ in engine.done} == {"scan"}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nowhere"], "nowhere is missing"),
        (["videos", "--frames", "0"], "clip.num_frames must be at least 1"),
        (["videos", "--set", "filters.max_flicke=3"], "did you mean max_flicker"),
        (["videos", "--caption-url", "http://localhost:1/v1"], "--caption-url and --caption-model"),
        (["videos", "--address", "auto"], "leave one of them out"),
        (["videos", "--model", "nothing"], "nothing does not exist"),
    ],
)
def test_the_command_refuses_in_one_line(videos, tmp_path, monkeypatch, capsys, arguments, said):
    monkeypatch.chdir(tmp_path)
    Path("videos").symlink_to(videos)
    assert run(["data", "build", *arguments, "-o", "out", "--workers", "0"]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
    assert not Path("out").exists()


def test_the_command_says_what_became_of_everything(videos, model, tmp_path, capsys):
    arguments = ["data", "build", str(videos), "-o", str(tmp_path), "--model", str(model), "--workers", "0"]
    assert run([*arguments, "--plan"]) == 0
    assert "9 videos gave 8 clips; 5 are kept, 2 duplicate, 1 " in capsys.readouterr().out
    assert run(arguments) == 0
    assert "shards: 5 clips" in capsys.readouterr().out


# --- choosing --------------------------------------------------------------------------------------------------------


def test_the_first_of_two_alike_is_kept_unless_the_other_is_in_the_set_already(tmp_path):
    measures = Measures(motion=0.2, flicker=0.0, bars=(0, 0, 0, 0), bars_share=0.0, text=0.0, hash="ab" * 24)
    sources = [Source(tmp_path / name, name, name) for name in ("a", "b", "c")]
    analyses = {
        source.digest: Analysis("", None, 2.0, ((0.0, 2.0),), (Candidate(f"{source.name}0", 0, 0.0, measures),))
        for source in sources
    }
    for taken, kept in ((set(), "a"), ({"c0"}, "c"), ({"b0", "c0"}, "b")):
        chosen = select(sources, analyses, SPEC, Filters(), taken=taken)
        assert [source.name for source, _ in chosen.kept] == [kept]
        assert len(chosen.rejected) == 2
    assert len(select(sources, analyses, SPEC, Filters(duplicate_bits=None)).kept) == 3
