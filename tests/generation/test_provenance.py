import json
from dataclasses import replace

import pytest
import torch

from reelflow.errors import CheckpointError, MediaError
from reelflow.generation.provenance import Provenance, file_sha256
from tiny_model import CARD, tiny_pipeline


@pytest.fixture
def model(tmp_path):
    tiny_pipeline().save(tmp_path / "model")
    return tmp_path / "model"


def described(model, image=None, prompt="a red ring"):
    return Provenance.of(prompt, seed=2**63 - 1, num_frames=9, sampling=CARD.sampling, model=model, image=image)


@pytest.mark.parametrize("prompt", ["", '赤い輪 "quoted" \\ \n 🔴', "красное кольцо"])
def test_what_is_written_is_what_is_read(model, tmp_path, prompt):
    provenance = replace(described(model, prompt=prompt), frames_made=5, frames_sha256="ab", interrupted_after=3)
    provenance.write(tmp_path / "clip.json")
    assert Provenance.read(tmp_path / "clip.json") == provenance
    assert sorted(path.name for path in tmp_path.iterdir()) == ["clip.json", "model"]


def test_it_lies_beside_the_video(tmp_path):
    assert Provenance.path_beside(tmp_path / "my.clip.mp4") == tmp_path / "my.clip.json"


def test_the_same_request_again_is_the_same_with_the_threads_it_had(model, tmp_path):
    (tmp_path / "image.png").write_bytes(b"1")
    told = replace(described(model, tmp_path / "image.png"), num_threads=torch.get_num_threads() + 1)
    assert told.again() == told
    assert told.differences_here() == []


def test_a_moved_model_and_image_are_taken_where_they_are_now(model, tmp_path):
    (tmp_path / "image.png").write_bytes(b"1")
    told = described(model, tmp_path / "image.png")
    (tmp_path / "image.png").rename(tmp_path / "other.png")
    model.rename(tmp_path / "moved")
    with pytest.raises(CheckpointError, match="does not exist"):
        told.again()
    again = told.again(model=tmp_path / "moved", image=tmp_path / "other.png")
    assert again == replace(told, model=str(tmp_path / "moved"), image=str(tmp_path / "other.png"))


def test_another_model_is_refused_naming_both(model, tmp_path):
    tiny_pipeline(seed=1).save(tmp_path / "other")
    told, other = described(model), described(tmp_path / "other")
    with pytest.raises(CheckpointError, match=f"{told.model_sha256[:12]}.*{other.model_sha256[:12]}"):
        told.again(model=tmp_path / "other")


def test_another_image_is_refused_naming_both(model, tmp_path):
    image = tmp_path / "image.png"
    image.write_bytes(b"1")
    told, before = described(model, image), file_sha256(image)
    image.write_bytes(b"2")
    with pytest.raises(MediaError, match=f"{before[:12]}.*{file_sha256(image)[:12]}"):
        told.again()
    with pytest.raises(MediaError, match="no first frame"):
        described(model).again(image=image)


def test_other_versions_are_named(model):
    told = described(model)
    (difference,) = replace(told, versions={**told.versions, "torch": "0.1"}).differences_here()
    assert difference == f"torch was 0.1, now {told.versions['torch']}"


@pytest.mark.parametrize("text", ["", "{}", "[1]", "[" * 100_000, "\x00"])
def test_something_else_is_refused(tmp_path, text):
    (tmp_path / "clip.json").write_text(text)
    with pytest.raises(MediaError, match="not the JSON that reelflow writes"):
        Provenance.read(tmp_path / "clip.json")


@pytest.mark.parametrize("change", [{"sed": 1}, {"seed": -1}, {"num_threads": 0}, {"prompt": 3}, {"format": 2}])
def test_a_field_that_is_unknown_or_out_of_range_is_named(model, tmp_path, change):
    path = tmp_path / "clip.json"
    described(model).write(path)
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(MediaError, match=next(iter(change))):
        Provenance.read(path)
