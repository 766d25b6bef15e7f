from pathlib import Path

import pytest
import torch

from reelflow.config import from_dict, to_dict
from reelflow.data.folder import ClipSpec, inspect_folder, list_videos, read_captions, read_windows
from reelflow.data.video import write_video
from reelflow.errors import ConfigError, DataError, MediaError

SPEC = ClipSpec(num_frames=4, height=8, width=8, fps=8.0)


def video(path, num_frames=4, *, fps=8.0, height=8, width=8):
    path.parent.mkdir(parents=True, exist_ok=True)
    shades = torch.linspace(0, 255, num_frames).to(torch.uint8)
    write_video(path, shades.view(-1, 1, 1, 1).repeat(1, height, width, 3), fps=fps)


def caption(folder, name="a.mp4"):
    return read_captions(folder, [folder / name])[folder / name]


def only(reports):
    assert len(reports) == 1
    return reports[0]


# --- files -----------------------------------------------------------------------------------------------------------


def test_videos_are_listed_sorted_and_recursively_without_hidden_files(tmp_path):
    names = ["b.MP4", "a.webm", "sub/deep/c.mkv", ".hidden.mp4", ".cache/d.mp4", "notes.txt", "world.json"]
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "folder.mp4").mkdir()
    assert [path.relative_to(tmp_path).as_posix() for path in list_videos(tmp_path)] == [
        "a.webm",
        "b.MP4",
        "sub/deep/c.mkv",
    ]


def test_a_folder_under_a_hidden_one_is_read(tmp_path):
    video(tmp_path / ".data" / "a.mp4")
    assert list_videos(tmp_path / ".data") == [tmp_path / ".data" / "a.mp4"]


def test_a_misspelt_folder_is_answered_with_its_neighbour(tmp_path):
    (tmp_path / "my_videos").mkdir()
    with pytest.raises(DataError, match=r"is missing.*did you mean .*my_videos\?"):
        list_videos(tmp_path / "my_vidoes")
    with pytest.raises(DataError, match=r"is missing, expected a folder of videos$"):
        list_videos(tmp_path / "nowhere" / "else")


def test_a_file_is_no_folder(tmp_path):
    video(tmp_path / "a.mp4")
    with pytest.raises(DataError, match="is a file"):
        list_videos(tmp_path / "a.mp4")


def test_a_folder_without_videos_names_the_suffixes_looked_for(tmp_path):
    (tmp_path / "a.jpg").touch()
    with pytest.raises(DataError, match=r"no videos; looked for .*\.mp4.*\.webm"):
        list_videos(tmp_path)


# --- captions --------------------------------------------------------------------------------------------------------


def test_a_sidecar_wins_over_metadata_and_metadata_over_the_name_of_the_folder(tmp_path):
    for name in ("kites/one.mp4", "kites/two.mp4", "kites/three.mp4", "four.mp4"):
        video(tmp_path / name)
    (tmp_path / "kites" / "one.txt").write_text("from the sidecar\n")
    (tmp_path / "metadata.csv").write_text('file_name,caption\nkites/one.mp4,listed\nkites/two.mp4,"listed, too"\n')
    found = read_captions(tmp_path, list_videos(tmp_path))
    by_name = {path.name: caption for path, caption in found.items()}
    assert by_name["one.mp4"] == ("from the sidecar", ("caption from one.txt, not from metadata.csv",))
    assert by_name["two.mp4"] == ("listed, too", ())
    assert by_name["three.mp4"] == ("kites", ("caption from the folder's name",))
    assert by_name["four.mp4"] == ("", ("no caption",))


@pytest.mark.parametrize("file_column", ["file_name", "file"])
@pytest.mark.parametrize("column", ["caption", "text", "prompt"])
def test_metadata_columns_go_by_several_names(tmp_path, file_column, column):
    (tmp_path / "metadata.jsonl").write_text(f'\n{{"{file_column}": "a.mp4", "{column}": "a kite", "id": 7}}\n')
    assert caption(tmp_path).text == "a kite"
    (tmp_path / "metadata.jsonl").unlink()
    (tmp_path / "metadata.csv").write_text(f"\ufeff{column},id,{file_column}\r\na kite,7,./a.mp4\r\n", encoding="utf-8")
    assert caption(tmp_path).text == "a kite"


def test_an_empty_sidecar_is_an_empty_caption_and_noted(tmp_path):
    (tmp_path / "a.txt").write_text("\n")
    assert caption(tmp_path) == ("", ("a.txt is empty",))


def test_names_with_accents_match_however_they_are_composed(tmp_path):
    (tmp_path / "metadata.csv").write_text("file,text\ncaf\u00e9.mp4,un café\n", encoding="utf-8")
    assert caption(tmp_path, "cafe\u0301.mp4").text == "un café"


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        (
            "metadata.csv",
            b"file_name,caption\na.mp4,ok\nb.mp4,red, moving\n",
            r"line 3: expected 2 cells.*double quotes",
        ),
        ("metadata.csv", b"file_name,caption\na.mp4\n", r"line 2: expected 2 cells"),
        ("metadata.csv", b"video,caption\na.mp4,ok\n", r"line 2: expected text under file_name or file, found video"),
        ("metadata.csv", b'file,caption\na.mp4,"open\nb.mp4,ok\n', r"line 2: unexpected end of data"),
        ("metadata.csv", b"file,caption\na.mp4,one\na.mp4,two\n", r"line 3: a\.mp4 is named a second time"),
        ("metadata.csv", b"file,caption\na.mp4,caf\xe9\n", r"line 2: not UTF-8"),
        ("metadata.jsonl", b'{"file": "a.mp4", "text": "ok"}\n{"file": ', r"line 2: not JSON"),
        ("metadata.jsonl", b'["a.mp4", "ok"]\n', r"line 1: expected an object"),
        ("metadata.jsonl", b'{"file": "a.mp4", "text": 3}\n', r"line 1: expected text under caption or text or prompt"),
        ("metadata.jsonl", b"[" * 100_000, r"line 1: not JSON"),
        ("a.txt", b"first\ncaf\xe9", r"a\.txt, line 2: not UTF-8"),
    ],
)
def test_a_broken_caption_file_is_refused_with_its_line(tmp_path, name, content, said):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=said):
        caption(tmp_path)


def test_two_metadata_files_are_refused(tmp_path):
    (tmp_path / "metadata.csv").write_text("file,text\n")
    (tmp_path / "metadata.jsonl").write_text("")
    with pytest.raises(DataError, match="keep one"):
        caption(tmp_path)


# --- verdicts --------------------------------------------------------------------------------------------------------


def test_a_file_that_fits_is_accepted_without_a_word(tmp_path):
    video(tmp_path / "a.mp4")
    (tmp_path / "a.txt").write_text("a kite")
    report = only(inspect_folder(tmp_path, SPEC, tokens_per_clip=80))
    assert (report.accepted, report.num_clips, report.tokens, report.reason) == (True, 1, 80, None)
    assert (report.path, report.caption, report.notes) == (Path("a.mp4"), "a kite", ())


def test_every_change_is_noted(tmp_path):
    video(tmp_path / "a.mp4", 51, fps=25.0, height=272, width=640)
    report = only(inspect_folder(tmp_path, SPEC, tokens_per_clip=5))
    assert report.num_clips == 4
    assert report.tokens == 20
    assert report.notes == (
        "resampled 25 -> 8 fps",
        "cut into 4 clips",
        "last 0.1 s left out",
        "resized 640x272 -> 8x8, 57 % cropped",
        "no caption",
    )


def test_broken_and_short_files_are_rejected_with_the_reason_and_stop_nothing(tmp_path):
    (tmp_path / "a.mp4").write_bytes(b"not a video")
    (tmp_path / "b.mp4").touch()
    video(tmp_path / "c.mp4", 2)
    video(tmp_path / "d.mp4", 40)
    content = (tmp_path / "d.mp4").read_bytes()
    (tmp_path / "d.mp4").write_bytes(content[:-60])
    video(tmp_path / "e.mp4")
    reports = inspect_folder(tmp_path, SPEC, tokens_per_clip=80)
    assert [report.accepted for report in reports] == [False, False, False, False, True]
    assert all(report.num_clips == report.tokens == 0 for report in reports[:4])
    assert all(report.reason and str(tmp_path) not in report.reason for report in reports[:4])
    assert reports[2].reason == "too short: has 0.2 s, needs 0.5 s"
    assert not reports[3].reason.startswith("too short")


@pytest.mark.parametrize("suffix", [".mp4", ".webm", ".mkv", ".gif"])
@pytest.mark.parametrize(("num_frames", "fps"), [(3, 8.0), (4, 8.0), (5, 10.0), (9, 8.0), (25, 25.0), (30, 12.5)])
def test_inspection_counts_the_clips_that_decoding_gives(tmp_path, suffix, num_frames, fps):
    video(tmp_path / f"a{suffix}", num_frames, fps=fps, height=16, width=16)
    try:
        decoded = len(list(read_windows(tmp_path / f"a{suffix}", SPEC)))
    except MediaError:
        decoded = 0
    assert only(inspect_folder(tmp_path, SPEC)).num_clips == decoded
    assert decoded in {int(num_frames / fps * 8 / 4), -(-num_frames * 8 // fps) // 4}


# --- the specification -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [{"num_frames": 0}, {"height": 0}, {"width": -8}, {"fps": 0.0}, {"fps": float("nan")}, {"fps": float("inf")}],
)
def test_impossible_clips_are_refused(change):
    with pytest.raises(ConfigError, match=f"clip.{next(iter(change))}"):
        ClipSpec(**{**to_dict(SPEC), **change})


def test_a_spec_survives_json():
    assert from_dict(ClipSpec, to_dict(SPEC)) == SPEC
