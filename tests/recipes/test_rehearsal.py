import pytest

from reelflow.config import set_values
from reelflow.errors import DataError
from reelflow.recipes.rehearsal import machine_bytes, measure_media, measured_media
from reelflow.recipes.world import world


def test_rendering_and_decoding_are_measured_on_a_few_clips():
    found = measure_media(set_values(world(), ["data.num_clips=3"]))
    assert found.num_clips == 3
    assert found.render_seconds > 0 < found.decode_seconds
    assert found.render_peak <= found.decode_peak


def folder(path):
    return set_values(world(), [f'data={{"kind": "folder", "folder": "{path}", "num_validation": 2}}'])


def test_a_folder_that_is_not_there_is_not_measured_and_an_empty_one_is_refused(tmp_path):
    assert measured_media(folder(tmp_path / "none")) is None
    with pytest.raises(DataError, match="no videos"):
        measure_media(folder(tmp_path))


def test_this_machine_has_memory():
    assert 2**28 < machine_bytes() < 2**50
