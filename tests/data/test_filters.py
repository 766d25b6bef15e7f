import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reelflow.data.filters import HASH_BITS, Filters, Measures, find_bars, judge, measure, near_duplicates
from reelflow.data.shots import scan
from reelflow.data.video import read_clip, write_video
from reelflow.data.worlds import World
from reelflow.errors import ConfigError

FINE = Measures(motion=0.2, flicker=0.5, bars=(0, 0, 0, 0), bars_share=0.0, text=0.0, hash="0" * (HASH_BITS // 4))


def scene(seed: int, *, pan: float | None = None, height: int = 72, width: int = 96) -> np.ndarray:
    """25 frames of a world; with `pan`, a camera of that speed (pixels per frame) and nothing else that moves."""
    world = World(height=height, width=width, num_frames=25, fps=12.0, max_pan=6.0)
    drawn = world.draw_scene(np.random.default_rng(seed), motion=None if pan is None else "still")
    angle = seed * 0.7
    speed = (0.0, 0.0) if pan is None else (pan * math.cos(angle), pan * math.sin(angle))
    return world.render(replace(drawn, pan=speed)).frames


def measured(folder, frames, suffix=".mkv", fps=12.0) -> Measures:
    path = folder / f"a{suffix}"
    write_video(path, frames, fps=fps)
    scanned = scan(path)
    return measure(scanned, path, 0, len(scanned))


# --- one clip --------------------------------------------------------------------------------------------------------


def test_motion_is_nothing_in_a_still_and_grows_with_the_camera(tmp_path):
    speeds = [0.0, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0]
    for seed in range(3):
        found = [measured(tmp_path, scene(seed, pan=speed)).motion for speed in speeds]
        assert found[0] == 0
        assert found == sorted(found)
        assert found[1] > 0.1 * found[2] > 0


def test_motion_is_the_same_at_any_brightness_contrast_rate_and_size(tmp_path):
    frames = scene(1, pan=1.0)
    whole = measured(tmp_path, frames).motion
    assert measured(tmp_path, frames // 2 + 60).motion == pytest.approx(whole, rel=0.4)
    assert measured(tmp_path, frames[::2], fps=6.0).motion == pytest.approx(whole, rel=0.3)
    assert measured(tmp_path, frames.repeat(2, axis=1).repeat(2, axis=2)).motion == pytest.approx(whole, rel=0.1)


def test_flicker_counts_jumps_of_brightness_and_no_steady_change(tmp_path):
    frames = scene(2).astype(int)
    ramp = np.linspace(-40, 40, len(frames))[:, None, None, None]
    assert measured(tmp_path, frames.clip(0, 255).astype(np.uint8)).flicker < 1
    assert measured(tmp_path, (frames + ramp).clip(0, 255).astype(np.uint8)).flicker < 2
    lamp = np.where(np.arange(len(frames)) % 2, 20, 0)[:, None, None, None]
    assert measured(tmp_path, (frames + lamp).clip(0, 255).astype(np.uint8)).flicker == pytest.approx(20, abs=3)


@pytest.mark.parametrize("suffix", [".mkv", ".mp4"])
@pytest.mark.parametrize("bars", [(10, 10, 0, 0), (7, 13, 0, 0), (0, 0, 24, 22), (12, 12, 18, 18), (0, 0, 0, 0)])
def test_bars_are_counted_to_the_row(tmp_path, suffix, bars):
    top, bottom, left, right = bars
    frames = np.maximum(scene(3, height=180, width=240), 60)
    frames[:, :top] = frames[:, 180 - bottom :] = 0
    frames[:, :, :left] = frames[:, :, 240 - right :] = 0
    found = measured(tmp_path, frames, suffix)
    assert found.bars == bars
    assert found.bars_share == round(1 - (180 - top - bottom) * (240 - left - right) / (180 * 240), 4)


def test_the_dark_is_not_a_bar():
    assert find_bars(np.zeros((20, 30))) == (0, 0, 0, 0)
    night = np.zeros((20, 30))
    night[12:] = 100  # a dark sky has no counterpart below
    assert find_bars(night) == (0, 0, 0, 0)


def test_lettering_that_stays_put_is_text_and_worlds_have_none(tmp_path):
    draw = pytest.importorskip("PIL.ImageDraw")
    image = pytest.importorskip("PIL.Image")
    for seed in range(3):
        frames = scene(seed, pan=1.0, height=144, width=256)
        assert measured(tmp_path, frames).text == 0
        title = image.new("L", (256, 144))
        draw.Draw(title).text((30, 116), "this is a subtitle of two", fill=255, font_size=16)
        white = np.asarray(title)[None, :, :, None] / 255
        lettered = np.rint(frames * (1 - white) + 255 * white).astype(np.uint8)
        assert measured(tmp_path, lettered, ".mp4").text > 0.02


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({}, None),
        ({"motion": 0.0}, "too still"),
        ({"motion": 5.0}, "too wild"),
        ({"flicker": 30.0}, "flicker: 30 > 8 levels"),
        ({"bars": (10, 12, 0, 0), "bars_share": 0.122}, "black bars: 10 + 12 rows, 0 + 0 columns, 12.2% > 2.0%"),
        ({"text": 0.2}, "text: 20.0% > 5.0%"),
    ],
)
def test_what_is_refused_is_told_why_unless_nothing_is_asked(change, said):
    measures = replace(FINE, **change)
    reason = judge(measures, Filters())
    assert reason == said or (reason or "").startswith(said or "!")
    assert judge(measures, Filters(None, None, None, None, None)) is None


@pytest.mark.parametrize("change", [{"min_motion": -1.0}, {"max_text": float("inf")}, {"duplicate_bits": 100}])
def test_impossible_thresholds_are_refused(change):
    with pytest.raises(ConfigError, match=f"filters.{next(iter(change))}"):
        Filters(**change)


# --- duplicates ------------------------------------------------------------------------------------------------------


def test_copies_that_were_encoded_again_or_resized_are_found_and_others_are_not(tmp_path):
    hashes, expected = [], {}
    for seed in range(5):
        frames = scene(seed, height=96, width=128)
        original = len(hashes)
        hashes.append(measured(tmp_path, frames).hash)
        write_video(tmp_path / "small.mp4", frames, fps=12.0)
        copies = [
            measured(tmp_path, frames, ".mp4"),
            measured(tmp_path, frames, ".webm"),
            measured(tmp_path, read_clip(tmp_path / "small.mp4", size=(60, 80)).frames.numpy(), ".mp4"),
            measured(tmp_path, (frames * 0.8 + 20).astype(np.uint8)),
        ]
        expected |= {len(hashes) + k: original for k in range(len(copies))}
        hashes += [copy.hash for copy in copies]
    bits = Filters().duplicate_bits
    assert bits is not None
    assert near_duplicates(hashes, bits, range(len(hashes))) == expected


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(0, 48), st.integers(1, 40))
def test_duplicates_are_those_that_comparing_bit_by_bit_finds(seed, bits, count):
    rng = np.random.default_rng(seed)
    base = rng.integers(0, 2, (4, HASH_BITS))
    flips = rng.random((count, HASH_BITS)) < rng.uniform(0, 0.2, (count, 1))
    codes = base[rng.integers(0, 4, count)] ^ flips
    groups = rng.integers(0, 10, count).tolist()
    kept: list[int] = []
    expected = {}
    for item in range(count):
        others = [other for other in kept if groups[other] != groups[item]]
        first = next((other for other in others if (codes[other] != codes[item]).sum() <= bits), None)
        if first is None:
            kept.append(item)
        else:
            expected[item] = first
    assert near_duplicates([np.packbits(code).tobytes().hex() for code in codes], bits, groups) == expected
