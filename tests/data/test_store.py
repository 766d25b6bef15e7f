"""What goes into a store comes out, in any order, and a store that is torn, hostile or of another making is refused."""

import json
import resource
import shutil

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from reelflow.data.folder import ClipSpec
from reelflow.data.store import Sample, Skipped, Store, build_clip_store, write_store
from reelflow.data.video import read_clip, write_video
from reelflow.errors import ConfigError, DataError

MADE_BY = {"vae": {"hash": "abc", "channels": 16}, "sizes": (1, 2)}


def samples(count, shape=(2, 3)):
    generator = torch.Generator().manual_seed(0)
    for k in range(count):
        yield Sample({"mean": torch.randn(shape, generator=generator), "k": torch.tensor(k)}, {"caption": f"n° {k}"})


@pytest.fixture
def store(tmp_path):
    return write_store(tmp_path / "store", samples(7), fingerprint=MADE_BY, num_samples_per_shard=3)


@settings(max_examples=25, deadline=None)
@given(
    count=st.integers(1, 9),
    per_shard=st.integers(1, 5),
    shape=st.lists(st.integers(1, 4), max_size=4),
    dtype=st.sampled_from([torch.uint8, torch.float32, torch.bfloat16, torch.int64, torch.bool]),
    data=st.data(),
)
def test_gathering_equals_stacking(tmp_path_factory, count, per_shard, shape, dtype, data):
    rows = torch.randint(0, 2, (count, *shape)).to(dtype)
    folder = tmp_path_factory.mktemp("store") / "store"
    write_store(
        folder, (Sample({"x": row}, k) for k, row in enumerate(rows)), fingerprint={}, num_samples_per_shard=per_shard
    )
    store = Store.open(folder)
    indices = data.draw(st.lists(st.integers(0, count - 1), max_size=12))
    drawn = store.batch("x", torch.tensor(indices, dtype=torch.int64))
    assert drawn.dtype == dtype
    assert torch.equal(drawn, rows[indices])
    assert torch.equal(store.batch("x", indices), rows[indices])
    assert [store.meta(k) for k in indices] == indices
    assert (len(store), store.keys, store.shape("x")) == (count, ["x"], tuple(shape))


def test_a_batch_is_a_copy(store):
    store.batch("mean", [0]).zero_()
    assert store.batch("mean", [0]).abs().sum() > 0


@pytest.mark.parametrize("index", [-1, 7])
def test_an_index_out_of_range_is_refused(store, index):
    with pytest.raises(IndexError, match="holds samples 0 to 6"):
        store.batch("k", [0, index])
    with pytest.raises(IndexError, match="holds samples 0 to 6"):
        store.meta(index)


def test_what_was_skipped_is_listed(tmp_path):
    mixed = [Skipped("a.mp4", "broken"), *samples(2), Skipped("b.mp4", "short")]
    store = write_store(tmp_path / "store", mixed, fingerprint={})
    assert len(store) == 2
    assert Store.open(store.folder).skipped == [Skipped("a.mp4", "broken"), Skipped("b.mp4", "short")]


def test_samples_that_differ_are_refused_by_number(tmp_path):
    wrong = {
        "shape": {"mean": torch.zeros(3, 2), "k": torch.tensor(0)},
        "dtype": {"mean": torch.zeros(2, 3).half(), "k": torch.tensor(0)},
        "keys": {"mean": torch.zeros(2, 3)},
    }
    for name, tensors in wrong.items():
        with pytest.raises(DataError, match=r"sample 4 holds .*, the first holds k int64 \(\), mean float32 \(2, 3\)"):
            write_store(tmp_path / name, [*samples(4), Sample(tensors)], fingerprint={}, num_samples_per_shard=3)
        with pytest.raises(DataError, match="holds no finished store"):
            Store.open(tmp_path / name)


def test_nothing_to_store_is_an_error_that_says_why(tmp_path):
    with pytest.raises(DataError, match=r"no samples to store; 1 were skipped, the first: a\.mp4: broken"):
        write_store(tmp_path / "store", [Skipped("a.mp4", "broken")], fingerprint={})
    with pytest.raises(DataError, match="holds nothing"):
        write_store(tmp_path / "store", [Sample({})], fingerprint={})
    with pytest.raises(ConfigError, match="num_samples_per_shard"):
        write_store(tmp_path / "store", samples(1), fingerprint={}, num_samples_per_shard=0)


def test_a_store_made_by_something_else_is_refused_naming_what_differs(store):
    assert len(Store.open(store.folder, MADE_BY)) == 7
    other = MADE_BY | {"vae": {"hash": "xyz", "channels": 16}}
    with pytest.raises(DataError, match=r'its vae\.hash is "abc", asked for "xyz"'):
        Store.open(store.folder, other)
    with pytest.raises(DataError, match=r'its vae is {"hash".*asked for null'):
        Store.open(store.folder, {"sizes": [1, 2]})


def test_nothing_but_an_unfinished_store_is_written_over(tmp_path, store):
    with pytest.raises(DataError, match="already holds a finished store"):
        write_store(store.folder, samples(2), fingerprint=MADE_BY)
    assert len(Store.open(store.folder)) == 7
    (store.folder / "store.json").unlink()
    assert len(write_store(store.folder, samples(2), fingerprint=MADE_BY)) == 2
    assert sorted(p.name for p in store.folder.iterdir()) == [
        "shard-00000.jsonl",
        "shard-00000.safetensors",
        "store.json",
    ]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "shard-00000.jsonl").touch()
    (tmp_path / "mine" / "thesis.tex").touch()
    with pytest.raises(DataError, match=r"holds thesis\.tex"):
        write_store(tmp_path / "mine", samples(2), fingerprint={})
    assert len(list((tmp_path / "mine").iterdir())) == 2


def test_an_interrupted_store_is_never_read(tmp_path):
    def interrupted():
        yield from samples(5)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_store(tmp_path / "store", interrupted(), fingerprint={}, num_samples_per_shard=2)
    with pytest.raises(DataError, match="holds no finished store"):
        Store.open(tmp_path / "store")
    assert len(write_store(tmp_path / "store", samples(5), fingerprint={})) == 5


def test_a_full_disk_is_an_error_and_leaves_no_finished_store(tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    for room in (0, 100, 400):
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))
        try:
            with pytest.raises(DataError, match="cannot write"):
                write_store(tmp_path / "store", samples(40), fingerprint={})
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert not list((tmp_path / "store").glob("*.part"))
        assert not (tmp_path / "store" / "store.json").exists()


def test_damaged_and_hostile_files_are_named(tmp_path, store):
    first = "shard-00000.safetensors"
    size = (store.folder / first).stat().st_size

    def rows_of_other_shape(path):
        save_file({"mean": torch.zeros(3, 6), "k": torch.zeros(3, dtype=torch.int64)}, path)
        assert path.stat().st_size <= size
        index = json.loads((path.parent / "store.json").read_text())
        index["shards"][0]["num_bytes"] = path.stat().st_size
        (path.parent / "store.json").write_text(json.dumps(index))

    damages = {
        "gone": (first, lambda path: path.unlink()),
        "cut": (first, lambda path: path.write_bytes(path.read_bytes()[:-1])),
        "huge header": (first, lambda path: path.write_bytes(b"\xff" * 8 + path.read_bytes()[8:])),
        "noise": (first, lambda path: path.write_bytes(bytes(size))),
        "shape": (first, rows_of_other_shape),
        "no json": ("store.json", lambda path: path.write_text("{")),
        "not text": ("store.json", lambda path: path.write_bytes(b"\xff\xfe")),
        "deep": ("store.json", lambda path: path.write_text("[" * 100_000)),
        "list": ("store.json", lambda path: path.write_text("[]")),
        "old": ("store.json", lambda path: path.write_text('{"format": 0}')),
        "missing entries": ("store.json", lambda path: path.write_text('{"format": 1}')),
    }
    for damage, (name, strike) in damages.items():
        folder = tmp_path / damage
        shutil.copytree(store.folder, folder)
        strike(folder / name)
        with pytest.raises(DataError, match=name):
            Store.open(folder)
    (store.folder / "shard-00001.jsonl").write_text('{"caption": 3}\n')
    with pytest.raises(DataError, match=r"shard-00001\.jsonl: damaged: 3 lines expected, found 1"):
        Store.open(store.folder).meta(4)


# ---- clips ---------------------------------------------------------------------------------------------------------

SPEC = ClipSpec(num_frames=4, height=16, width=16, fps=8.0)


@pytest.fixture
def videos(tmp_path):
    folder = tmp_path / "videos"
    folder.mkdir()
    generator = np.random.default_rng(0)
    for name, num_frames in (("a", 4), ("b", 9), ("short", 2)):
        write_video(folder / f"{name}.mp4", generator.integers(0, 256, (num_frames, 16, 16, 3), np.uint8), fps=8)
    (folder / "a.txt").write_text("a red ring")
    (folder / "empty.mp4").touch()
    return folder


def test_a_folder_becomes_a_store_of_its_clips_with_captions(tmp_path, videos):
    seen = []
    report = build_clip_store(videos, SPEC, tmp_path / "store", on_file=lambda k, file: seen.append((k, file.name)))
    assert (report.num_clips, report.reused) == (3, False)
    assert seen == list(enumerate(["a.mp4", "b.mp4", "empty.mp4", "short.mp4"]))
    assert [name for name, _ in report.skipped] == ["empty.mp4", "short.mp4"]
    expected = [
        read_clip(videos / name, num_frames=4, fps=8, start=start).frames
        for name, start in (("a.mp4", 0), ("b.mp4", 0), ("b.mp4", 0.5))
    ]
    assert torch.equal(report.store.batch("clips", [0, 1, 2]), torch.stack(expected))
    assert report.store.meta(0) == {"file": "a.mp4", "start": 0.0, "caption": "a red ring", "caption_from": "sidecar"}
    assert report.store.meta(2)["start"] == 0.5


def test_a_clip_that_breaks_in_the_middle_is_skipped_and_the_others_kept(tmp_path, videos):
    path = videos / "long.mkv"
    write_video(path, np.random.default_rng(0).integers(0, 256, (40, 16, 16, 3), np.uint8), fps=8)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    report = build_clip_store(videos, SPEC, tmp_path / "store")
    kept = [
        report.store.meta(k)["start"] for k in range(report.num_clips) if report.store.meta(k)["file"] == "long.mkv"
    ]
    lost = [skipped for skipped in report.skipped if skipped.source == "long.mkv"]
    assert kept == [0.5 * k for k in range(len(kept))]
    assert len(kept) > 2
    assert len(kept) + len(lost) == 10
    assert "truncated" in lost[0].reason


def test_a_store_is_reused_for_the_same_files_and_refused_for_others(tmp_path, videos, monkeypatch):
    first = build_clip_store(videos, SPEC, tmp_path / "store")
    monkeypatch.setattr("reelflow.data.store.read_clip", None)
    again = build_clip_store(videos, SPEC, tmp_path / "store")
    assert again.reused
    assert again.skipped == first.skipped
    wider = ClipSpec(num_frames=4, height=16, width=32, fps=8.0)
    with pytest.raises(DataError, match=r"its clips\.width is 16, asked for 32"):
        build_clip_store(videos, wider, tmp_path / "store")
    (videos / "a.txt").write_text("a blue ring")
    with pytest.raises(DataError, match="its files is"):
        build_clip_store(videos, SPEC, tmp_path / "store")


def test_a_folder_without_a_usable_clip_is_an_error(tmp_path, videos):
    endless = ClipSpec(num_frames=100, height=16, width=16, fps=8.0)
    with pytest.raises(DataError, match=r"no samples to store; 4 were skipped, the first: a\.mp4: too short"):
        build_clip_store(videos, endless, tmp_path / "store")
