import numpy as np
import pytest

from reelflow.data.shots import Shot, ShotDetection, find_shots, scan
from reelflow.data.video import write_video
from reelflow.data.worlds import World
from reelflow.errors import ConfigError, MediaError

FPS = 12.0


def scene(seed: int, num_frames: int = 14) -> np.ndarray:
    world = World(height=48, width=64, num_frames=num_frames, fps=FPS, max_pan=1.0)
    return world.render(world.draw_scene(np.random.default_rng(seed))).frames


def shots(path, frames, *, fps=FPS, suffix=".mkv", **settings) -> list[Shot]:
    write_video(path / f"a{suffix}", frames, fps=fps)
    return find_shots(scan(path / f"a{suffix}"), ShotDetection(**settings))


@pytest.mark.parametrize("suffix", [".mkv", ".mp4"])
def test_every_hard_cut_between_worlds_is_found_and_nothing_else(tmp_path, suffix):
    lengths = np.random.default_rng(5).integers(6, 30, 16)
    film = np.concatenate([scene(100 + k, int(length)) for k, length in enumerate(lengths)])
    ends = np.cumsum(lengths)
    expected = [Shot(int(end - length), int(end)) for end, length in zip(ends, lengths, strict=True)]
    assert shots(tmp_path, film, suffix=suffix) == expected


def test_a_moving_camera_is_one_shot(tmp_path):
    world = World(height=48, width=64, num_frames=60, fps=FPS, max_pan=6.0)
    for seed in range(5):
        drawn = world.draw_scene(np.random.default_rng(seed))
        assert len(shots(tmp_path, world.render(drawn).frames)) == 1


def test_a_dissolve_belongs_to_neither_shot(tmp_path):
    share = np.clip((np.arange(68) - 29) / 8, 0, 1)[:, None, None, None]  # frames 30 to 36 are mixtures
    for seed in range(5):
        before, after = scene(2 * seed, 68), scene(2 * seed + 1, 68)
        film = np.rint((1 - share) * before + share * after).astype(np.uint8)
        first, second = shots(tmp_path, film)
        assert (first.first, second.end) == (0, len(film))
        assert 25 <= first.end <= 31  # a few good frames may be lost, no mixed one may be kept
        assert 36 <= second.first <= 43
        assert shots(tmp_path, film, fade=0.0) == [Shot(0, 68)]


def test_a_fade_through_black_belongs_to_no_shot(tmp_path):
    before, after = scene(3, 30), scene(4, 30)
    down = np.linspace(1, 0, 10)[:, None, None, None]
    film = np.concatenate([before, before[-1:] * down, np.zeros((6, *before.shape[1:])), after[:1] * down[::-1], after])
    found = shots(tmp_path, film.astype(np.uint8))
    assert found[0].first == 0
    assert 29 <= found[0].end <= 33
    assert 53 <= found[-1].first <= 57
    assert all(shot.end - shot.first < 10 for shot in found[1:-1])  # black


def test_a_flash_splits_nothing(tmp_path):
    film = scene(6, 40)
    for length in (1, 2, 3):
        lit = film.copy()
        lit[20 : 20 + length] = 255
        assert shots(tmp_path, lit) == [Shot(0, 40)]


def test_a_video_without_change_is_one_shot(tmp_path):
    assert shots(tmp_path, np.repeat(scene(1, 14)[:1], 20, axis=0)) == [Shot(0, 20)]
    assert shots(tmp_path, scene(1, 14)[:1]) == [Shot(0, 1)]


def test_a_video_is_scanned_piece_by_piece_as_in_one(tmp_path, monkeypatch):
    film = np.concatenate([scene(k, 20) for k in range(6)])
    write_video(tmp_path / "a.mp4", film, fps=30)
    whole = scan(tmp_path / "a.mp4")
    monkeypatch.setattr("reelflow.data.shots.PIECE", 32)
    parts = scan(tmp_path / "a.mp4")
    assert len(whole) == 120
    for name in ("grey", "colours", "edges", "lines"):
        np.testing.assert_array_equal(getattr(whole, name), getattr(parts, name))


def test_a_truncated_file_is_refused(tmp_path):
    write_video(tmp_path / "a.mp4", scene(1, 60), fps=FPS)
    content = (tmp_path / "a.mp4").read_bytes()
    (tmp_path / "a.mp4").write_bytes(content[:-400])
    with pytest.raises(MediaError):
        scan(tmp_path / "a.mp4")


@pytest.mark.parametrize("change", [{"least": 0.0}, {"ratio": 0.5}, {"nearby": -1.0}, {"fade": 2.0}])
def test_impossible_settings_are_refused(change):
    with pytest.raises(ConfigError, match=f"shots.{next(iter(change))}"):
        ShotDetection(**change)
