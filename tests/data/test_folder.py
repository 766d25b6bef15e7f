"""Every file of a user's folder is told what would become of it, and none stops the others."""

import json

import numpy as np
import pytest

from reelflow.data.folder import ClipSpec, digest_folder, inspect_folder, list_videos
from reelflow.data.video import read_clip, write_video
from reelflow.errors import ConfigError, DataError

SPEC = ClipSpec(num_frames=8, height=16, width=16, fps=8.0)


def video(path, num_frames=8, fps=8.0, height=16, width=16):
    path.parent.mkdir(parents=True, exist_ok=True)
    write_video(path, np.full((num_frames, height, width, 3), 90, np.uint8), fps=fps)
    return path


def only(folder, spec=SPEC, **options):
    (report,) = inspect_folder(folder, spec, **options)
    return report


def test_videos_are_listed_in_order_without_hidden_or_foreign_files(tmp_path):
    for name in ("b.mp4", "a/c.MKV", "a.webm", ".trash/d.mp4", ".e.mp4"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "notes.txt").touch()
    assert [p.relative_to(tmp_path).as_posix() for p in list_videos(tmp_path)] == ["a/c.MKV", "a.webm", "b.mp4"]


def test_a_folder_that_is_missing_or_without_videos_is_refused(tmp_path):
    (tmp_path / "videos").mkdir()
    with pytest.raises(DataError, match="vidoes is not a folder; did you mean videos"):
        inspect_folder(tmp_path / "vidoes", SPEC)
    with pytest.raises(DataError, match=r"no videos in .*; looked for \.mp4 \.m4v"):
        inspect_folder(tmp_path / "videos", SPEC)


def test_a_file_that_fits_is_accepted_without_notes(tmp_path):
    video(tmp_path / "a.mp4").with_suffix(".txt").write_text(" a red ring\nmoving left \n")
    report = only(tmp_path, tokens_per_clip=80)
    assert report.accepted
    assert (report.name, report.num_clips, report.tokens) == ("a.mp4", 1, 80)
    assert (report.caption, report.caption_from) == ("a red ring moving left", "sidecar")
    assert (report.notes, report.reason) == ((), "")


def test_notes_say_what_is_done_to_a_file(tmp_path):
    video(tmp_path / "a.mkv", num_frames=60, fps=25.0, height=272, width=640)
    report = only(tmp_path, tokens_per_clip=80)
    assert (report.num_clips, report.tokens) == (2, 160)
    assert report.notes == (
        "resampled 25 -> 8 fps",
        "resized 640x272 -> 16x16, 57% cropped",
        "cut to 2 x 8 frames, the last 0.40 s are not used",
        "no caption",
    )
    slow = ClipSpec(num_frames=8, height=300, width=640, fps=50.0)
    assert only(tmp_path, slow).notes[:2] == (
        "resampled 25 -> 50 fps, repeating frames",
        "enlarged 640x272 -> 640x300, 9% cropped",
    )
    assert only(tmp_path, max_clips_per_file=1).num_clips == 1
    assert only(tmp_path).tokens is None


@pytest.mark.parametrize("fps", [5.0, 8.0, 12.5, 24000 / 1001, 30.0])
@pytest.mark.parametrize("num_frames", [16, 17, 40, 61])
def test_every_clip_promised_can_be_read(tmp_path, fps, num_frames):
    path = video(tmp_path / "a.mp4", num_frames, fps)
    for k in range(only(tmp_path).num_clips):
        read_clip(path, num_frames=8, fps=8, start=SPEC.start_of(k))


def test_broken_files_are_rejected_with_the_reason_and_stop_nothing(tmp_path):
    video(tmp_path / "good.mp4")
    video(tmp_path / "short.mp4", num_frames=4)
    (tmp_path / "empty.mp4").touch()
    (tmp_path / "text.mp4").write_text("not a video" * 100)
    (tmp_path / "folder.mp4").mkdir()
    video(tmp_path / "badtext.mp4").with_suffix(".txt").write_bytes(b"\xff\xfe\xfa")
    reports = {report.name: report for report in inspect_folder(tmp_path, SPEC, tokens_per_clip=80)}
    assert [name for name, report in reports.items() if report.accepted] == ["good.mp4"]
    assert reports["short.mp4"].reason == "too short: 0.50 s hold 4 frames at 8 fps, 8 are needed"
    assert reports["short.mp4"].tokens == 0
    assert "0 bytes" in reports["empty.mp4"].reason
    assert "cannot be read" in reports["text.mp4"].reason
    assert "not a file" in reports["folder.mp4"].reason
    assert "badtext.txt: cannot be read as UTF-8" in reports["badtext.mp4"].reason


def test_captions_come_from_sidecar_then_csv_then_jsonl_then_the_sub_folder(tmp_path):
    for name in ("side", "csv", "json", "twice", "same"):
        video(tmp_path / f"{name}.mp4")
    video(tmp_path / "jumping_jack" / "folder.mp4")
    (tmp_path / "side.txt").write_text("from the sidecar", encoding="utf-8-sig")
    (tmp_path / "same.txt").write_text("agreed")
    (tmp_path / "metadata.csv").write_text(
        'file_name,text\nside.mp4,other\nsame.mp4,agreed\ncsv.mp4,"red, then blue"\ntwice.mp4,first\ngone.mp4,lost\n'
    )
    rows = [{"file": "json.mp4", "caption": "赤い輪"}, {"file": "./twice.mp4", "caption": "second"}]
    (tmp_path / "metadata.jsonl").write_text("\n\n".join(map(json.dumps, rows)))
    reports = {report.name: report for report in inspect_folder(tmp_path, SPEC)}
    told = {name: (report.caption, report.caption_from, report.notes) for name, report in reports.items()}
    assert told == {
        "side.mp4": ("from the sidecar", "sidecar", ("caption from side.txt; metadata.csv says otherwise",)),
        "same.mp4": ("agreed", "sidecar", ()),
        "csv.mp4": ("red, then blue", "metadata", ()),
        "json.mp4": ("赤い輪", "metadata", ()),
        "twice.mp4": ("first", "metadata", ("captioned twice; the first, from metadata.csv, is taken",)),
        "jumping_jack/folder.mp4": ("jumping jack", "folder", ()),
        "gone.mp4": ("lost", "metadata", ()),
    }
    assert reports["gone.mp4"].reason == "named in metadata.csv, but does not exist"


@pytest.mark.parametrize(
    ("name", "content", "fault"),
    [
        ("metadata.csv", b"path,caption\na.mp4,x\n", "line 2 needs text in file_name or file, and caption or text"),
        ("metadata.csv", b"file,caption\na.mp4\n", "line 2 needs text"),
        ("metadata.jsonl", b'{"file": "a.mp4", "caption": 3}\n', "line 1 needs text"),
        ("metadata.jsonl", b'["a.mp4", "x"]\n', "line 1 needs text"),
        ("metadata.jsonl", b"a.mp4: x\n", "cannot be read"),
        ("metadata.jsonl", b"\xff\xfe", "cannot be read"),
    ],
)
def test_unreadable_metadata_is_refused_by_name_and_line(tmp_path, name, content, fault):
    video(tmp_path / "a.mp4")
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=f"{name}.*{fault}"):
        inspect_folder(tmp_path, SPEC)


def test_the_digest_changes_with_videos_and_captions_and_nothing_else(tmp_path):
    video(tmp_path / "a.mp4")
    digests = [digest_folder(tmp_path)]
    (tmp_path / "unrelated.md").write_text("notes")
    assert digest_folder(tmp_path) == digests[0]
    for change in (
        lambda: (tmp_path / "a.txt").write_text("one"),
        lambda: (tmp_path / "a.txt").write_text("two"),
        lambda: (tmp_path / "metadata.csv").write_text("file,text\n"),
        lambda: (tmp_path / "a.mp4").rename(tmp_path / "b.mp4"),
        lambda: video(tmp_path / "c.mp4"),
        lambda: video(tmp_path / "c.mp4", num_frames=9),
    ):
        change()
        digests.append(digest_folder(tmp_path))
    assert len(set(digests)) == len(digests)


@pytest.mark.parametrize(
    "wrong", [{"num_frames": 0}, {"height": 0}, {"width": -8}, {"fps": 0.0}, {"fps": float("nan")}]
)
def test_an_impossible_spec_is_refused(wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        ClipSpec(**({"num_frames": 8, "height": 16, "width": 16, "fps": 8.0} | wrong))


def test_an_impossible_limit_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="max_clips_per_file must be at least 1"):
        inspect_folder(tmp_path, SPEC, max_clips_per_file=0)
