import json
import shutil
from pathlib import Path

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from safetensors.torch import load_file, save_file

from reelflow.data import store as store_module
from reelflow.data.folder import ClipSpec
from reelflow.data.store import Store, Stores, build_clip_store, write_store
from reelflow.data.video import read_clip, write_video
from reelflow.errors import DataError, MediaError

SPEC = ClipSpec(num_frames=4, height=8, width=8, fps=8.0)
MADE_BY = {"vae": "a" * 64, "clip": {"fps": 8.0}}


def numbers(count, shape=(2, 3), *, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [{"x": torch.randn(*shape, generator=generator)} for _ in range(count)]


def small_store(folder, count=5, *, samples_per_shard=2):
    samples = numbers(count)
    meta = [{"caption": f"clip {row}"} for row in range(count)]
    write_store(folder, samples, fingerprint=MADE_BY, meta=meta, samples_per_shard=samples_per_shard)
    return torch.stack([sample["x"] for sample in samples])


def video(path, num_frames, *, seed=0, fps=8.0, size=16):
    path.parent.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randint(0, 256, (num_frames, size // 8, size // 8, 3), generator=generator, dtype=torch.uint8)
    write_video(path, coarse.repeat_interleave(8, 1).repeat_interleave(8, 2), fps=fps)


@pytest.fixture
def videos(tmp_path):
    """Three clips in two good files, a file that is too short and one that is broken."""
    folder = tmp_path / "videos"
    video(folder / "a.mp4", 4)
    (folder / "a.txt").write_text("a red kite")
    video(folder / "b.mp4", 9, seed=1)
    video(folder / "brief.mp4", 2)
    (folder / "broken.mp4").write_bytes(b"not a video")
    return folder


# --- any store -------------------------------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(
    shape=st.lists(st.integers(1, 3), max_size=3),
    dtype=st.sampled_from([torch.uint8, torch.float16, torch.float32, torch.bfloat16, torch.bool, torch.int64]),
    count=st.integers(1, 9),
    samples_per_shard=st.integers(1, 10),
    data=st.data(),
)
def test_gathered_rows_equal_the_samples_stacked(tmp_path_factory, shape, dtype, count, samples_per_shard, data):
    generator = torch.Generator().manual_seed(0)
    samples = [
        {name: torch.randint(0, 9, shape, generator=generator).to(dtype) for name in ("one", "two")}
        for _ in range(count)
    ]
    folder = tmp_path_factory.mktemp("store") / "new"
    write_store(
        folder,
        iter(samples),
        fingerprint={},
        meta=({"row": k} for k in range(count)),
        samples_per_shard=samples_per_shard,
    )
    store = Store.open(folder)
    rows = data.draw(st.lists(st.integers(0, count - 1), max_size=12))

    assert len(store) == count
    assert store.keys == ("one", "two")
    for key in store.keys:
        found = store.batch(key, torch.tensor(rows, dtype=torch.int64))
        expected = torch.stack([sample[key] for sample in samples])[rows]
        assert found.dtype == dtype
        assert torch.equal(found, expected)
    assert [store.meta(row) for row in rows] == [{"row": row} for row in rows]


def test_samples_may_share_one_buffer(tmp_path):
    buffer = torch.empty(2)
    write_store(tmp_path / "s", ({"x": buffer.fill_(k)} for k in range(3)), fingerprint={}, samples_per_shard=2)
    assert Store.open(tmp_path / "s").batch("x", torch.arange(3)).tolist() == [[0, 0], [1, 1], [2, 2]]


def test_at_most_one_shard_is_held_while_writing(tmp_path):
    finished = []

    def samples():
        for k in range(7):
            finished.append(len(list((tmp_path / "s").glob("shard-*"))))
            yield {"x": torch.tensor(k)}

    write_store(tmp_path / "s", samples(), fingerprint={}, samples_per_shard=2)
    assert finished == [0, 0, 1, 1, 2, 2, 3]


def test_changing_a_batch_leaves_the_store_alone(tmp_path):
    expected = small_store(tmp_path / "s")
    store, rows = Store.open(tmp_path / "s"), torch.arange(5)
    store.batch("x", rows).zero_()
    assert torch.equal(store.batch("x", rows), expected)
    assert torch.equal(Store.open(tmp_path / "s").batch("x", rows), expected)


def test_a_store_opens_with_the_fingerprint_it_was_made_with_whether_list_or_tuple(tmp_path):
    write_store(tmp_path / "s", numbers(1), fingerprint={"shape": (1, 2)})
    assert Store.open(tmp_path / "s", fingerprint={"shape": (1, 2)}).fingerprint == {"shape": [1, 2]}


@pytest.mark.parametrize(
    ("now", "said"),
    [
        ({**MADE_BY, "vae": "b" * 64}, r"vae was \"aaaaaaaaaaaaaaaaaaa\.\.\., now \"bbbbbbbbbbbbbbbbbbb\.\.\.;"),
        ({**MADE_BY, "clip": {"fps": 4.0}}, r"clip\.fps was 8\.0, now 4\.0"),
        ({"vae": "a" * 64}, r"clip was .*, now null"),
        ({**MADE_BY, "text": 1}, r"text was null, now 1"),
    ],
)
def test_another_fingerprint_is_refused_and_the_difference_named(tmp_path, now, said):
    small_store(tmp_path / "s")
    with pytest.raises(DataError, match=said):
        Store.open(tmp_path / "s", fingerprint=now)


def test_writing_that_stopped_half_way_leaves_no_store_and_may_begin_again(tmp_path):
    def dying():
        yield from numbers(3)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_store(tmp_path / "s", dying(), fingerprint={}, samples_per_shard=1)
    assert list((tmp_path / "s").glob("shard-*"))
    with pytest.raises(DataError, match="never finished"):
        Store.open(tmp_path / "s")
    expected = small_store(tmp_path / "s", 2)
    assert torch.equal(Store.open(tmp_path / "s").batch("x", torch.arange(2)), expected)
    assert len(list((tmp_path / "s").iterdir())) == 2


def test_a_finished_store_is_never_written_over(tmp_path):
    expected = small_store(tmp_path / "s")
    with pytest.raises(DataError, match="holds a finished store"):
        small_store(tmp_path / "s", 1)
    assert torch.equal(Store.open(tmp_path / "s").batch("x", torch.arange(5)), expected)


def test_a_folder_of_other_things_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    (tmp_path / "shard-00000.safetensors").write_text("someone's")
    with pytest.raises(DataError, match=r"thesis\.tex"):
        small_store(tmp_path)
    assert (tmp_path / "thesis.tex").read_text() == "years of work"
    assert (tmp_path / "shard-00000.safetensors").exists()


@pytest.mark.parametrize(
    ("odd", "said"),
    [
        ({"x": torch.zeros(2, 4)}, r"sample 2 is x float32\[2, 4\], those before it are x float32\[2, 3\]"),
        ({"x": torch.zeros(2, 3).half()}, r"sample 2 is x float16"),
        ({"y": torch.zeros(2, 3)}, r"sample 2 is y float32"),
        ({"x": torch.zeros(2, 3), "y": torch.zeros(1)}, r"sample 2 is x float32\[2, 3\], y"),
    ],
)
def test_samples_that_differ_are_refused_by_number(tmp_path, odd, said):
    with pytest.raises(DataError, match=said):
        write_store(tmp_path / "s", [*numbers(2), odd], fingerprint={}, samples_per_shard=2)


@pytest.mark.parametrize(("count", "said"), [(2, "more samples than meta"), (4, "more meta than samples")])
def test_meta_must_be_one_per_sample(tmp_path, count, said):
    with pytest.raises(DataError, match=said):
        write_store(tmp_path / "s", numbers(3), fingerprint={}, meta=[{}] * count)


@pytest.mark.parametrize("samples", [[], [{}]])
def test_an_empty_store_is_refused(tmp_path, samples):
    with pytest.raises(DataError, match=r"no samples|no tensors"):
        write_store(tmp_path / "s", samples, fingerprint={})


def test_keys_and_rows_that_do_not_exist_are_refused(tmp_path):
    small_store(tmp_path / "s")
    store = Store.open(tmp_path / "s")
    with pytest.raises(DataError, match="has no 'xs'; did you mean x"):
        store.batch("xs", torch.tensor([0]))
    for row in (-1, 5):
        with pytest.raises(DataError, match=f"rows 0 to 4, not {row}"):
            store.batch("x", torch.tensor([0, row]))
        with pytest.raises(DataError, match="rows 0 to 4"):
            store.meta(row)


def test_a_missing_store_is_called_missing(tmp_path):
    with pytest.raises(DataError, match="does not exist"):
        Store.open(tmp_path / "nowhere")


def test_truncated_and_lost_shards_are_refused_on_opening(tmp_path):
    small_store(tmp_path / "s")
    shard = tmp_path / "s" / "shard-00001.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(DataError, match=r"shard-00001\.safetensors has \d+ of \d+ bytes"):
        Store.open(tmp_path / "s")
    shard.unlink()
    with pytest.raises(DataError, match=r"shard-00001\.safetensors has 0 of"):
        Store.open(tmp_path / "s")


def _other_header(path):
    content = path.read_bytes()
    path.write_bytes(b"\xff" * 8 + content[8:])


def _other_shapes(path):
    tensors, size = load_file(path), path.stat().st_size
    save_file({"x": tensors["x"].reshape(2, 3, 2).contiguous()}, path, metadata={"meta": "[{}, {}]"})
    _padded(path, size)


def _no_meta(path):
    tensors, size = load_file(path), path.stat().st_size
    save_file(tensors, path)
    _padded(path, size)


def _padded(path, size):
    """Fill the header up with spaces, so that the file has its old size."""
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    spaces = size - len(content)
    assert spaces >= 0
    path.write_bytes(
        (length + spaces).to_bytes(8, "little") + content[8 : 8 + length] + b" " * spaces + content[8 + length :]
    )


@pytest.mark.parametrize("harm", [_other_header, _other_shapes, _no_meta])
def test_a_hostile_shard_of_the_right_size_is_refused_when_read(tmp_path, harm):
    small_store(tmp_path / "s")
    harm(tmp_path / "s" / "shard-00001.safetensors")
    store = Store.open(tmp_path / "s")
    store.batch("x", torch.tensor([0]))
    with pytest.raises(DataError, match=r"shard-00001\.safetensors"):
        store.batch("x", torch.tensor([3]))


@pytest.mark.parametrize(
    "change",
    [
        lambda index: index.pop("keys"),
        lambda index: index.update(num_rows=10**9),
        lambda index: index.update(samples_per_shard=0),
        lambda index: index.update(format=2),
        lambda index: index.update(surprise=1),
    ],
)
def test_a_tampered_index_is_refused(tmp_path, change):
    small_store(tmp_path / "s")
    path = tmp_path / "s" / "store.json"
    index = json.loads(path.read_text())
    change(index)
    path.write_text(json.dumps(index))
    with pytest.raises(DataError, match=r"store\.json cannot be read"):
        Store.open(tmp_path / "s")


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff", b"[" * 100_000])
def test_an_index_that_is_no_index_is_refused(tmp_path, content):
    small_store(tmp_path / "s")
    (tmp_path / "s" / "store.json").write_bytes(content)
    with pytest.raises(DataError, match=r"store\.json cannot be read"):
        Store.open(tmp_path / "s")


# --- clips -----------------------------------------------------------------------------------------------------------


def test_every_clip_is_decoded_once_and_bad_files_are_skipped_and_listed(tmp_path, videos):
    progress = []
    report = build_clip_store(videos, SPEC, tmp_path / "clips", on_file=lambda *step: progress.append(step))
    store = Store.open(tmp_path / "clips")

    assert (report.num_clips, report.num_files, report.reused) == (3, 4, False)
    assert [line.partition(":")[0] for line in report.rejected] == ["brief.mp4", "broken.mp4"]
    assert "too short: has 0.2 s, needs 0.5 s" in report.rejected[0]
    assert str(videos) not in report.rejected[1]
    assert progress == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert [store.meta(row) for row in range(3)] == [
        {"caption": "a red kite", "file": "a.mp4", "start": 0.0},
        {"caption": "", "file": "b.mp4", "start": 0.0},
        {"caption": "", "file": "b.mp4", "start": 0.5},
    ]
    whole = read_clip(videos / "b.mp4", fps=8.0, size=(8, 8)).frames
    assert torch.equal(store.batch("frames", torch.tensor([2, 1])), torch.stack([whole[4:8], whole[:4]]))


def test_long_videos_read_in_pieces_give_the_same_clips(tmp_path, videos, monkeypatch):
    video(videos / "long.mp4", 31, seed=2, fps=10.0)
    build_clip_store(videos, SPEC, tmp_path / "whole")
    monkeypatch.setattr("reelflow.data.folder.PIECE_BYTES", 2 * 4 * 8 * 8 * 3)
    build_clip_store(videos, SPEC, tmp_path / "pieces")
    whole, pieces = Store.open(tmp_path / "whole"), Store.open(tmp_path / "pieces")
    rows = torch.arange(len(whole))
    assert len(pieces) == len(whole) == 9
    assert torch.equal(pieces.batch("frames", rows), whole.batch("frames", rows))
    assert [pieces.meta(row) for row in rows.tolist()] == [whole.meta(row) for row in rows.tolist()]


def test_the_same_videos_are_not_decoded_again_and_the_rejected_are_told_again(tmp_path, videos, monkeypatch):
    first = build_clip_store(videos, SPEC, tmp_path / "clips")
    moved = shutil.move(videos, tmp_path / "elsewhere")
    monkeypatch.delattr(store_module, "read_windows")
    again = build_clip_store(Path(moved), SPEC, tmp_path / "clips")
    assert again.reused
    assert (again.num_clips, again.num_files, again.rejected) == (first.num_clips, first.num_files, first.rejected)


@pytest.mark.parametrize("change", ["caption", "content", "another file", "spec"])
def test_clips_of_other_videos_are_refused(tmp_path, videos, change):
    build_clip_store(videos, SPEC, tmp_path / "clips")
    spec = SPEC
    match change:
        case "caption":
            (videos / "a.txt").write_text("a blue kite")
        case "content":
            (videos / "broken.mp4").write_bytes(b"not a vidEo")
        case "another file":
            video(videos / "c.mp4", 4)
        case "spec":
            spec = ClipSpec(num_frames=4, height=8, width=16, fps=8.0)
    with pytest.raises(DataError, match="clip.width was 8, now 16" if change == "spec" else "videos"):
        build_clip_store(videos, spec, tmp_path / "clips")


def test_clips_before_the_damage_in_a_long_file_are_kept_and_counted(tmp_path, videos, monkeypatch):
    def damaged(path, spec):
        yield 0.0, torch.zeros(4, 8, 8, 3, dtype=torch.uint8)
        raise MediaError(f"{path}: damaged at 0.7 s")

    monkeypatch.setattr(store_module, "read_windows", damaged)
    report = build_clip_store(videos, SPEC, tmp_path / "clips")
    assert report.num_clips == 4
    assert report.rejected[0] == "a.mp4: damaged at 0.7 s (clips before that, 1, are kept)"


def test_a_folder_that_gives_no_clip_says_why(tmp_path):
    for name in "abcd":
        (tmp_path / f"{name}.mp4").write_bytes(b"not a video")
    with pytest.raises(DataError, match=r"no clip in the 4 videos .*a\.mp4: .*b\.mp4: .*c\.mp4: .*and 1 more"):
        build_clip_store(tmp_path, SPEC, tmp_path / "clips")
    assert not (tmp_path / "clips" / "store.json").exists()


def test_names_and_captions_in_any_script_survive(tmp_path):
    video(tmp_path / "видео" / "凧 é.mp4", 4)
    (tmp_path / "видео" / "凧 é.txt").write_text("赤い凧 🪁", encoding="utf-8")
    build_clip_store(tmp_path / "видео", SPEC, tmp_path / "кадры")
    assert Store.open(tmp_path / "кадры").meta(0) == {"caption": "赤い凧 🪁", "file": "凧 é.mp4", "start": 0.0}


def test_stores_of_several_shapes_are_read_as_one(tmp_path):
    written = [numbers(count, shape, seed=count) for count, shape in ((3, (2, 3)), (2, (1, 5)))]
    for place, samples in enumerate(written):
        write_store(tmp_path / str(place), samples, fingerprint=MADE_BY, meta=[{"of": place}] * len(samples))
    stores = Stores([Store.open(tmp_path / str(place)) for place in range(2)])
    assert len(stores) == 5
    for row, sample in enumerate([*written[0], *written[1]]):
        assert torch.equal(stores.batch("x", row), sample["x"][None])
        assert stores.shape("x", row) == tuple(sample["x"].shape)
        assert stores.meta(row) == {"of": int(row > 2)}
    for row in (-1, 5):
        with pytest.raises(DataError, match=f"rows 0 to 4, not {row}"):
            stores.batch("x", row)


def test_stores_of_different_keys_are_not_read_as_one(tmp_path):
    write_store(tmp_path / "a", [{"x": torch.zeros(1)}], fingerprint=MADE_BY)
    write_store(tmp_path / "b", [{"y": torch.zeros(1)}], fingerprint=MADE_BY)
    with pytest.raises(DataError, match="the same keys"):
        Stores([Store.open(tmp_path / "a"), Store.open(tmp_path / "b")])
    with pytest.raises(DataError, match="no stores"):
        Stores([])


def test_a_video_is_for_the_clips_of_its_own_proportions(tmp_path):
    tall, wide = ClipSpec(4, 32, 16, 8.0), ClipSpec(4, 16, 32, 8.0)
    (tmp_path / "videos").mkdir()
    for name, (rows, columns) in {"tall": (48, 24), "wide": (16, 40), "wider": (16, 64)}.items():
        write_video(tmp_path / "videos" / f"{name}.mp4", torch.zeros(4, rows, columns, 3, dtype=torch.uint8), fps=8.0)
    found = {}
    for spec in (tall, wide):
        out = tmp_path / f"{spec.width}"
        build_clip_store(tmp_path / "videos", spec, out, among=(tall, wide))
        store = Store.open(out)
        found[spec] = [store.meta(row)["file"] for row in range(len(store))]
    assert found == {tall: ["tall.mp4"], wide: ["wide.mp4", "wider.mp4"]}
    with pytest.raises(DataError, match="made from something else"):
        build_clip_store(tmp_path / "videos", tall, tmp_path / "16")
