"""`reelflow data shards` and `reelflow data check`."""

import pytest
import torch

from reelflow.data.shards import ShardSet
from reelflow.data.store import write_store


@pytest.fixture
def store(tmp_path):
    samples = ({"mean": torch.full((2, 3), float(row))} for row in range(5))
    meta = [{"caption": f"clip {row}"} for row in range(5)]
    write_store(tmp_path / "store", samples, fingerprint={"vae": "a"}, meta=meta)
    return tmp_path / "store"


def test_shards_hold_what_the_store_held_and_damage_is_listed(reelflow, store, tmp_path):
    target = tmp_path / "set"
    status, out, _ = reelflow("data", "shards", store, "-o", target, "--shard-size", 0.003)
    assert status == 0
    assert "5 samples in 3 shards" in out
    assert [ShardSet.open(target).read(row).meta["caption"] for row in range(5)] == [f"clip {row}" for row in range(5)]
    status, out, _ = reelflow("data", "check", target)
    assert status == 0
    assert "mean float32[2, 3]" in out
    (target / "shard-00001.tar").write_bytes(b"")
    status, out, _ = reelflow("data", "check", target)
    assert status == 1
    assert "00000002 is cut short" in out
    assert "3 of 5 samples can be used" in out


def test_what_is_no_store_or_no_set_is_an_error_in_one_line(reelflow, store, tmp_path):
    for command in (("shards", tmp_path / "none", "-o", tmp_path / "set"), ("check", store)):
        status, _, err = reelflow("data", *command)
        assert status == 2
        assert err.count("\n") == 1
    assert reelflow("data", "shards", store, "-o", tmp_path / "set", "--shard-size", 0)[0] == 2
