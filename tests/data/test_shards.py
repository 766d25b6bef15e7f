import errno
import itertools
import json
import os
import signal
import tarfile
from concurrent.futures import ThreadPoolExecutor

import fsspec
import hypothesis.strategies as st
import pytest
import safetensors.torch
import torch
from fsspec.implementations.memory import MemoryFileSystem
from hypothesis import given, settings

from reelflow.data import shards as shards_module
from reelflow.data.remote import Cache
from reelflow.data.shards import (
    Sample,
    ShardSet,
    ShardWriter,
    StoreSamples,
    inspect_shards,
    shards_from_store,
)
from reelflow.data.store import Store, write_store
from reelflow.errors import ConfigError, DataError

MADE_BY = {"vae": "a" * 64, "clip": {"fps": 8.0}}
SMALL = 3000  # bytes of a shard: two samples


def sample(number, *, shape=(2, 3)):
    generator = torch.Generator().manual_seed(number)
    return Sample(f"clip-{number}", {"x": torch.randn(shape, generator=generator)}, {"caption": f"clip {number}"})


def written(folder, count=7, *, shard_bytes=SMALL):
    with ShardWriter(folder, fingerprint=MADE_BY, shard_bytes=shard_bytes) as writer:
        for number in range(count):
            if f"clip-{number}" not in writer:
                writer.add(sample(number))
        writer.finish(rejected=("brief.mp4: too short",))
    return ShardSet.open(folder)


def same(one, other):
    assert (one.key, one.meta, one.files) == (other.key, other.meta, other.files)
    assert list(one.tensors) == sorted(other.tensors)
    assert all(
        torch.equal(one.tensors[name], x) and one.tensors[name].dtype == x.dtype for name, x in other.tensors.items()
    )


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != ".lock"}


@pytest.fixture
def remote(tmp_path):
    """Seven samples in four shards, far away, and their bytes."""
    written(tmp_path / "origin")
    fs = fsspec.filesystem("memory")
    fs.put(f"{tmp_path / 'origin'}/", "/set/", recursive=True)
    yield fs
    fs.rm("/set", recursive=True)


# --- what is written -------------------------------------------------------------------------------------------------


@settings(max_examples=15, deadline=None)
@given(
    shape=st.lists(st.integers(0, 3), max_size=3),
    dtype=st.sampled_from([torch.uint8, torch.float16, torch.float32, torch.bfloat16, torch.bool, torch.int64]),
    caption=st.text(max_size=8),
    video=st.binary(max_size=1100),
    count=st.integers(1, 5),
    shard_bytes=st.integers(1, 9000),
)
def test_samples_come_back_as_they_were(tmp_path_factory, shape, dtype, caption, video, count, shard_bytes):
    both = torch.randint(0, 2, (2, *shape), generator=torch.Generator().manual_seed(0)).to(dtype)  # views of one buffer
    samples = [
        Sample(f"k{n}", {"mean": both[0], "logvar": both[1]}, {"caption": caption}, {"mp4": video})
        for n in range(count)
    ]
    folder = tmp_path_factory.mktemp("set")
    with ShardWriter(folder, fingerprint={}, shard_bytes=shard_bytes) as writer:
        for each in samples:
            writer.add(each)
        writer.finish()
    found = ShardSet.open(folder)
    assert list(found.keys()) == [each.key for each in samples]
    for number in reversed(range(count)):
        same(found.read(number), samples[number])


@settings(max_examples=20, deadline=None)
@given(lengths=st.lists(st.integers(0, 3), min_size=1, max_size=9), flush=st.integers(1, 5))
def test_the_index_knows_the_shapes_of_every_sample(tmp_path_factory, lengths, flush):
    folder = tmp_path_factory.mktemp("set")
    with ShardWriter(folder, fingerprint={}) as writer:
        for number, length in enumerate(lengths):
            writer.add(Sample(f"k{number}", {"x": torch.zeros(2, length), "y": torch.zeros(number % 2)}))
            if number % flush == 0:
                writer.flush()
        writer.finish()
    for path in folder.glob("shard-*"):
        path.unlink()
    shapes = ShardSet.open(folder).shapes("x")
    assert list(shapes.found) == sorted(set(shapes.found))
    assert [shapes.found[which] for which in shapes.which] == [(2, length) for length in lengths]


def test_the_shapes_of_a_tensor_that_samples_lack_are_refused(tmp_path):
    with ShardWriter(tmp_path, fingerprint={}) as writer:
        writer.add(Sample("a", {"x": torch.zeros(1), "y": torch.zeros(1)}))
        writer.add(Sample("b", {"x": torch.zeros(1)}))
        writer.finish()
    with pytest.raises(DataError, match=r"shard-00000\.tar has samples without 'y', of x"):
        ShardSet.open(tmp_path).shapes("y")


@pytest.mark.parametrize("kinds", ["", "0", "0*3", "0 1", "1*2", "0*-2", "0**2", "x", "0*1000000000000"])
def test_an_index_with_impossible_kinds_is_refused(tmp_path, kinds):
    written(tmp_path)
    index = json.loads((tmp_path / "index.json").read_text())
    assert index["shards"][0]["kinds"] == "0*2"
    index["shards"][0]["kinds"] = kinds
    (tmp_path / "index.json").write_text(json.dumps(index))
    with pytest.raises(DataError, match=r"index\.json is damaged: shard-00000 has 2 samples of kinds"):
        ShardSet.open(tmp_path).shapes("x")


@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")  # its files
def test_webdataset_reads_the_shards(tmp_path):
    webdataset = pytest.importorskip("webdataset")
    written(tmp_path / "set")
    urls = [str(path) for path in sorted((tmp_path / "set").glob("*.tar"))]
    read = list(webdataset.WebDataset(urls, shardshuffle=False))
    assert [each["__key__"] for each in read] == [f"clip-{number}" for number in range(7)]
    for number, each in enumerate(read):
        assert torch.equal(safetensors.torch.load(each["safetensors"])["x"], sample(number).tensors["x"])
        assert json.loads(each["json"]) == {"caption": f"clip {number}"}


def test_a_shard_is_a_whole_tar_and_ends_when_it_has_its_bytes(tmp_path):
    found = written(tmp_path / "set")
    assert found.groups == (2, 2, 2, 1)
    for path in (tmp_path / "set").glob("*.tar"):
        with tarfile.open(path) as tar:
            names = [member.name for member in tar]
            assert tar.offset + 1024 == path.stat().st_size  # two empty blocks end it
        assert len(names) in (2, 4)


def test_the_same_samples_make_the_same_bytes(tmp_path):
    written(tmp_path / "one")
    written(tmp_path / "two")
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


@pytest.mark.parametrize(
    ("wrong", "why"),
    [
        (Sample("clip-0", {"x": torch.zeros(1)}), "already"),
        (Sample("a.b", {"x": torch.zeros(1)}), "letters, digits"),
        (Sample("k" * 81, {"x": torch.zeros(1)}), "1 to 80"),
        (Sample("k", {}), "no tensors"),
        (Sample("k", {"x": torch.tensor([0.0, float("nan")])}), "x has values that are not finite"),
        (Sample("k", {"x": torch.zeros(1)}, {"score": float("inf")}), "cannot be written"),
        (Sample("k", {"x": torch.zeros(1)}, {"score": torch.zeros(1)}), "cannot be written"),
        (Sample("k", {"x": torch.zeros(1)}, {}, {"json": b""}), "suffix"),
    ],
)
def test_what_no_sample_can_be_is_refused_and_the_rest_is_kept(tmp_path, wrong, why):
    with ShardWriter(tmp_path / "set", fingerprint=MADE_BY) as writer:
        writer.add(sample(0))
        with pytest.raises(DataError, match=why):
            writer.add(wrong)
        writer.add(sample(1))
        writer.finish()
    same(ShardSet.open(tmp_path / "set").read(1), sample(1))


# --- stopped and continued -------------------------------------------------------------------------------------------


def test_a_writer_killed_at_any_step_goes_on_without_loss_or_repetition(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda _: None)  # a killed process loses nothing that it wrote
    written(tmp_path / "whole", 3)
    whole = contents(tmp_path / "whole")

    def killed_at(step, folder):
        """Write in a child process that ends itself before its file-system call number `step`."""
        if (child := os.fork()) == 0:
            steps = itertools.count()

            def counted(call):
                def counting(*args, **kwargs):
                    if next(steps) == step:
                        os.kill(os.getpid(), signal.SIGKILL)
                    return call(*args, **kwargs)

                return counting

            for module, name in ((os, "replace"), (os, "fsync"), (shards_module, "_write")):
                setattr(module, name, counted(getattr(module, name)))
            written(folder, 3)
            os._exit(0)
        return os.waitpid(child, 0)[1]

    for step in itertools.count():
        folder = tmp_path / f"killed-{step}"
        if killed_at(step, folder) == 0:
            break
        ShardWriter(folder, fingerprint=MADE_BY).close()
        known = {shard["name"] for shard in json.loads((folder / "index.json").read_text())["shards"]}
        assert {path.stem for path in folder.glob("*.tar")} == known
        assert not list(folder.glob(".*.partial"))
        written(folder, 3)
        assert contents(folder) == whole
    assert step > 25


def test_an_exception_keeps_every_whole_sample_and_the_set_waits(tmp_path):
    def interrupted():
        with ShardWriter(tmp_path / "set", fingerprint=MADE_BY) as writer:
            writer.add(sample(0))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    with pytest.raises(DataError, match="never finished"):
        ShardSet.open(tmp_path / "set")
    assert list(written(tmp_path / "set", 3).keys()) == ["clip-0", "clip-1", "clip-2"]


def test_a_finished_set_is_appended_to(tmp_path):
    written(tmp_path / "set", 3)
    assert len(written(tmp_path / "set", 3)) == 3
    found = written(tmp_path / "set", 5)
    assert [found.read(number).key for number in range(5)] == [f"clip-{number}" for number in range(5)]
    assert found.rejected == ("brief.mp4: too short",)


def test_a_full_disk_is_an_error_and_what_was_whole_stays(tmp_path, monkeypatch):
    write, calls = shards_module._write, itertools.count()

    def full(file, start, data):
        if next(calls) == 4:  # the second sample of the second shard
            write(file, start, data[:-1])
            raise OSError(errno.ENOSPC, "No space left on device")
        write(file, start, data)

    monkeypatch.setattr(shards_module, "_write", full)
    with pytest.raises(DataError, match=r"shard-00001\.tar: No space left"):
        written(tmp_path / "set")
    monkeypatch.undo()
    with ShardWriter(tmp_path / "set", fingerprint=MADE_BY) as writer:
        assert writer.keys == {"clip-0", "clip-1", "clip-2"}
    assert len(written(tmp_path / "set")) == 7


def test_two_writers_at_once_are_refused(tmp_path):
    first = ShardWriter(tmp_path / "set", fingerprint=MADE_BY)
    with pytest.raises(DataError, match="by another process"):
        ShardWriter(tmp_path / "set", fingerprint=MADE_BY)
    first.close()
    ShardWriter(tmp_path / "set", fingerprint=MADE_BY).close()


def test_other_folders_are_left_alone(tmp_path):
    written(tmp_path / "set")
    with pytest.raises(DataError, match=r"clip\.fps was 8.0, now 9.0"):
        ShardWriter(tmp_path / "set", fingerprint={**MADE_BY, "clip": {"fps": 9.0}})
    with pytest.raises(DataError, match=r"clip\.fps was 8.0, now 9.0"):
        ShardSet.open(tmp_path / "set", fingerprint={**MADE_BY, "clip": {"fps": 9.0}})
    (tmp_path / "set" / "index.json").unlink()
    with pytest.raises(DataError, match=r"holds shard-.* but no index\.json"):
        ShardWriter(tmp_path / "set", fingerprint=MADE_BY)
    with pytest.raises(DataError, match=r"index\.json does not exist"):
        ShardSet.open(tmp_path / "set")
    with pytest.raises(DataError, match="cannot write shards"):
        ShardWriter(tmp_path / "set" / "shard-00000.tar", fingerprint={})
    with ShardWriter(tmp_path / "none", fingerprint={}) as writer, pytest.raises(DataError, match="no samples"):
        writer.finish()
    with pytest.raises(ConfigError, match="shard_bytes"):
        ShardWriter(tmp_path / "none", fingerprint={}, shard_bytes=0)


def test_a_set_that_lost_a_shard_is_not_continued(tmp_path):
    written(tmp_path / "set")
    (tmp_path / "set" / "shard-00001.tar").write_bytes(b"")
    with pytest.raises(DataError, match=r"shard-00001\.tar has 0 of"):
        written(tmp_path / "set")


# --- damage ----------------------------------------------------------------------------------------------------------


def damaged(folder, how, monkeypatch):
    """A set of seven samples, of which some are spoilt, and how many of those there are."""
    if how == "nan":
        monkeypatch.setattr(shards_module, "_check_finite", lambda *_: None)
        with ShardWriter(folder, fingerprint=MADE_BY, shard_bytes=SMALL) as writer:
            for number in range(7):
                writer.add(sample(number) if number != 2 else Sample("clip-2", {"x": torch.full((2,), torch.nan)}))
            writer.finish()
        monkeypatch.undo()
        return 1
    written(folder)
    tar, listing = folder / "shard-00001.tar", folder / "shard-00001.json"
    data = bytearray(tar.read_bytes())
    if how == "bits":
        data[700] ^= 1
        tar.write_bytes(data)
    elif how == "cut":
        tar.write_bytes(data[: len(data) // 2 + 100])
    elif how == "missing":
        tar.unlink()
    elif how == "listing":
        listing.write_text(listing.read_text().replace("clip-2", "clip-9"))
    return {"bits": 1, "cut": 1, "missing": 2, "listing": 2}[how]


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("bits", r"shard-00001\.tar: clip-2 has other bytes"),
        ("cut", r"shard-00001\.tar: clip-3 is cut short"),
        ("missing", r"shard-00001\.tar does not exist"),
        ("listing", r"shard-00001\.json has other bytes"),
        ("nan", r"shard-00001\.tar: clip-2: x has values that are not finite"),
    ],
)
@pytest.mark.parametrize("cached", [False, True])
def test_damage_is_named_and_what_is_whole_is_read(tmp_path, monkeypatch, how, said, cached):
    number_bad = damaged(tmp_path / "set", how, monkeypatch)
    assert len((report := inspect_shards(tmp_path / "set")).bad) == number_bad
    assert sum(report.kinds.values()) == 7 - number_bad
    cache = Cache(str(tmp_path / "cache"), 10**6) if cached else None
    found, said_of = ShardSet.open(tmp_path / "set", cache=cache), []
    for number in range(7):
        try:
            found.read(number)
        except DataError as error:
            said_of.append(str(error))
    assert tuple(said_of) == report.bad
    with pytest.raises(DataError, match=said):
        found.read(3 if how == "cut" else 2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_one_value_that_is_not_finite_is_found_wherever_it_is(dtype, value):
    for place in range(0, 70, 3):  # past the width of any vector unit
        x = torch.linspace(-1, 1, 70).to(dtype)
        shards_module._check_finite({"x": x}, "")
        x[place] = value
        with pytest.raises(DataError, match="not finite"):
            shards_module._check_finite({"x": x}, "")


def test_a_report_says_what_is_there(tmp_path):
    written(tmp_path / "set")
    report = inspect_shards(tmp_path / "set")
    assert (report.num_samples, report.num_shards, report.bad) == (7, 4, ())
    assert report.kinds == {"x float32[2, 3]": 7}
    assert report.num_bytes == sum(path.stat().st_size for path in (tmp_path / "set").glob("*.tar"))


# --- far away --------------------------------------------------------------------------------------------------------


def test_a_sample_far_away_is_fetched_alone(remote, monkeypatch):
    found, asked = ShardSet.open("memory://set"), []
    cat = MemoryFileSystem.cat_file

    def counted(self, path, start=None, end=None, **kwargs):
        data = cat(self, path, start=start, end=end, **kwargs)
        asked.append((path.rpartition("/")[2], len(data)))
        return data

    monkeypatch.setattr(MemoryFileSystem, "cat_file", counted)
    same(found.read(5), sample(5))
    (listing, _), (tar, num_bytes) = asked
    assert (listing, tar) == ("shard-00002.json", "shard-00002.tar")
    assert num_bytes < remote.size("/set/shard-00002.tar") / 2


def test_what_fails_far_away_is_asked_for_again(remote, monkeypatch):
    cat, failures = MemoryFileSystem.cat_file, itertools.count()

    def failing(self, path, start=None, end=None, **kwargs):
        if next(failures) < 2:
            raise RuntimeError("connection reset")
        return cat(self, path, start=start, end=end, **kwargs)

    monkeypatch.setattr("reelflow.data.remote.PAUSES", (0.0, 0.0))
    monkeypatch.setattr(MemoryFileSystem, "cat_file", failing)
    assert len(ShardSet.open("memory://set")) == 7
    failures = itertools.count(-1)
    with pytest.raises(DataError, match=r"index\.json cannot be read: connection reset"):
        ShardSet.open("memory://set")


def test_a_cache_fetches_a_shard_once_and_keeps_to_its_size(remote, tmp_path, monkeypatch):
    fetched, largest, folder = [], remote.size("/set/shard-00000.tar"), tmp_path / "cache"
    get = MemoryFileSystem.get_file

    def counted(self, path, to, **kwargs):
        fetched.append(path[-6:-4])
        return get(self, path, to, **kwargs)

    monkeypatch.setattr(MemoryFileSystem, "get_file", counted)
    folder.mkdir()
    (folder / "mine.tar").write_bytes(bytes(10**5))
    found = ShardSet.open("memory://set", cache=Cache(str(folder), 2 * largest))

    def read(*numbers):
        for number in numbers:
            same(found.read(number), sample(number))
            assert sum(path.stat().st_size for path in folder.iterdir() if path.name != "mine.tar") <= 2 * largest
        return fetched[:]

    assert read(0, 1, 2, 3, 1, 0, 3) == ["00", "01"]
    for path in folder.iterdir():
        os.utime(path, ns=(0, 0))
    assert read(0, 4, 1) == ["00", "01", "02"]  # 01 was read longest ago
    assert (folder / "mine.tar").exists()
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda number: same(found.read(number), sample(number)), 3 * list(range(7))))


def test_a_shard_damaged_in_the_cache_is_read_at_its_origin(remote, tmp_path):
    found = ShardSet.open("memory://set", cache=Cache(str(tmp_path / "cache"), 10**6))
    found.read(0)
    (kept,) = (tmp_path / "cache").iterdir()
    kept.write_bytes(bytes(kept.stat().st_size))
    same(found.read(1), sample(1))
    assert not kept.exists()


def test_a_cache_on_a_full_disk_stops_the_run_and_skips_nothing(remote, tmp_path, monkeypatch):
    def full(self, path, to, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(MemoryFileSystem, "get_file", full)
    with pytest.raises(ConfigError, match="No space left on device; lower max_bytes"):
        ShardSet.open("memory://set", cache=Cache(str(tmp_path / "cache"), 10**6)).read(0)


def test_a_shard_that_arrives_damaged_is_not_fetched_again_and_again(remote, tmp_path, monkeypatch):
    data = bytearray(remote.cat_file("/set/shard-00001.tar"))
    data[700] ^= 1
    remote.pipe_file("/set/shard-00001.tar", bytes(data))
    get, fetched = MemoryFileSystem.get_file, []

    def counted(self, path, to, **kwargs):
        fetched.append(path)
        return get(self, path, to, **kwargs)

    monkeypatch.setattr(MemoryFileSystem, "get_file", counted)
    found = ShardSet.open("memory://set", cache=Cache(str(tmp_path / "cache"), 10**6))
    for _ in range(2):
        same(found.read(3), sample(3))
        with pytest.raises(DataError, match="clip-2 has other bytes"):
            found.read(2)
    assert len(fetched) == 1


def test_impossible_places_are_refused(remote, tmp_path):
    with pytest.raises(ConfigError, match="nearest: max_bytes="):
        ShardSet.open("memory://set", cache=Cache(str(tmp_path), 100))
    with pytest.raises(ConfigError, match="nowhere"):
        ShardSet.open("nowhere://set")
    with pytest.raises(DataError, match="samples 0 to 6, not 7"):
        ShardSet.open("memory://set").read(7)


# --- stores ----------------------------------------------------------------------------------------------------------


def test_a_store_becomes_shards(tmp_path):
    samples = [{"mean": torch.full((2,), float(row)), "context": torch.full((3,), row)} for row in range(5)]
    meta = [{"caption": f"clip {row}"} for row in range(5)]
    write_store(tmp_path / "store", samples, fingerprint=MADE_BY, meta=meta, samples_per_shard=2)
    store = Store.open(tmp_path / "store")
    found = shards_from_store(store, tmp_path / "set", shard_bytes=SMALL)
    assert found.fingerprint == store.fingerprint
    assert len(found) == 5
    for row in range(5):
        same(found.read(row), StoreSamples(store).read(row))
        same(found.read(row), Sample(f"{row:08d}", samples[row], meta[row]))
    before = contents(tmp_path / "set")
    shards_from_store(store, tmp_path / "set", shard_bytes=SMALL)
    assert contents(tmp_path / "set") == before
