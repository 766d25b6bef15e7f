import threading

import pytest
import torch
from safetensors.torch import load_file, save_file

from families import tiny
from reelflow.conditioning.cached import Cached
from reelflow.conditioning.pretrained import PretrainedText, Reading


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    return tiny.t5(tmp_path_factory.mktemp("t5"))


class Counting:
    """A pretrained encoder that says what it was asked for."""

    def __init__(self, encoder: PretrainedText) -> None:
        self.encoder, self.asked = encoder, []
        self.identity = encoder.identity

    def __call__(self, prompts):
        self.asked += prompts
        return self.encoder(prompts)


@pytest.fixture
def encoder(parts):
    return Counting(PretrainedText(*parts, Reading(length=8, pooled="mean")))


def equal(a, b) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_features_from_disk_are_those_of_the_encoder_bit_for_bit(encoder, tmp_path):
    cached = Cached(encoder, tmp_path)
    prompts = ["a red kite", "", "a dog", "a red kite"]
    first, again = cached(prompts), cached(prompts[::-1])
    assert encoder.asked == ["a red kite", "", "a dog"]
    plain = encoder.encoder(prompts)
    assert equal(first, plain)
    assert equal(again, encoder.encoder(prompts[::-1]))
    Cached(encoder, tmp_path)(["a dog", "a cat"])
    assert encoder.asked[3:] == ["a cat"]


def test_without_a_pooled_vector_there_is_none_on_disk_either(parts, tmp_path):
    cached = Cached(PretrainedText(*parts, Reading(length=4)), tmp_path)
    assert cached(["a"]).pooled is None
    assert cached(["a"]).pooled is None


def test_another_reading_has_entries_of_its_own(parts, tmp_path):
    ways = [Cached(PretrainedText(*parts, Reading(length=length)), tmp_path) for length in (6, 7)]
    assert [way(["a kite"]).tokens.shape[1] for way in ways] == [6, 7]
    assert len(list(tmp_path.glob("*/*.safetensors"))) == 2


def spoil_header(path):
    path.write_bytes(b"torn")


def spoil_a_bit(path):
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)


def spoil_by_another(path):
    save_file(load_file(path), path)  # without a digest


@pytest.mark.parametrize(
    ("spoil", "reason"), [(spoil_header, "cannot be read"), (spoil_a_bit, "not those"), (spoil_by_another, "not those")]
)
def test_an_entry_that_is_spoilt_is_made_anew_and_the_log_says_so(encoder, tmp_path, caplog, spoil, reason):
    cached = Cached(encoder, tmp_path)
    features = cached(["a kite"])
    spoil(cached.path("a kite"))
    assert equal(cached(["a kite"]), features)
    assert [reason in message for message in caplog.messages] == [True]
    assert equal(cached(["a kite"]), features)
    assert encoder.asked == ["a kite"] * 2
    assert len(caplog.messages) == 1


def test_threads_that_write_the_same_entry_leave_a_whole_one(encoder, tmp_path):
    threads = [threading.Thread(target=lambda: Cached(encoder, tmp_path)(["a kite"])) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [path.suffix for path in tmp_path.rglob("*") if path.is_file()] == [".safetensors"]
    asked = len(encoder.asked)
    assert equal(Cached(encoder, tmp_path)(["a kite"]), encoder.encoder(["a kite"]))
    assert len(encoder.asked) == asked
