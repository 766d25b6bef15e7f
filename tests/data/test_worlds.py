import dataclasses
import itertools
import json

import av
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reelflow.config import from_dict, to_dict
from reelflow.data.worlds import (
    COLOURS,
    COMBINATIONS,
    MOTIONS,
    SHAPES,
    Scene,
    World,
    analyse,
    caption,
    prompt,
    render_world,
    score_clip,
    split_combinations,
)
from reelflow.errors import ConfigError, DataError

WORLD = World()
SIZES = [WORLD, World(height=32, width=48), World(height=96, width=128), World(num_frames=9), World(num_frames=33)]
SAID = {
    "left": "left",
    "right": "right",
    "up": "up",
    "down": "down",
    "still": "staying still|not moving|stays still",
    "circling": "in circles|going around",
}


def rng(seed=0):
    return np.random.default_rng(seed)


def scenes(world, count, seed=0):
    """One scene after the other, in shuffled order of combination."""
    draw = rng(seed)
    for index in draw.permutation(len(COMBINATIONS) * (count // len(COMBINATIONS) + 1))[:count]:
        yield world.draw_scene(draw, **COMBINATIONS[index % len(COMBINATIONS)]._asdict())


def accuracy(world, count, damage=lambda frames: frames):
    """Share of clips whose (colour, shape, motion) is read right."""
    right = np.zeros(3)
    for scene in scenes(world, count):
        read = analyse(damage(world.render(scene).frames))
        right += (read.colour == scene.colour, read.shape == scene.shape, read.motion == scene.motion)
    return right / count


def blurred(frames, sigma):
    kernel = np.exp(-0.5 * (np.arange(-4, 5) / sigma) ** 2)
    kernel /= kernel.sum()
    for axis in (1, 2):
        padded = np.pad(frames, [(4, 4) if a == axis else (0, 0) for a in range(4)], mode="edge").astype(np.float32)
        length = frames.shape[axis]
        frames = sum(k * padded.take(range(i, i + length), axis) for i, k in enumerate(kernel))
    return frames


def decoded(path):
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def test_a_seed_gives_the_same_scene_and_the_same_clip():
    one, two = (WORLD.render(WORLD.draw_scene(rng(3))) for _ in range(2))
    other = WORLD.render(WORLD.draw_scene(rng(4)))
    assert one.caption == two.caption
    assert np.array_equal(one.frames, two.frames)
    assert not np.array_equal(one.frames, other.frames)


def test_a_scene_survives_json():
    scene = WORLD.draw_scene(rng())
    assert from_dict(Scene, json.loads(json.dumps(to_dict(scene)))) == scene


@pytest.mark.parametrize("world", SIZES, ids=str)
def test_the_object_stays_wholly_inside_the_view(world):
    for scene in scenes(world, 40):
        mask = world.render(scene).mask
        area = mask.sum((1, 2))
        assert np.ptp(area) < 0.02 * area.mean()  # nothing is cut off
        assert not mask[:, [0, -1]].any()
        assert not mask[:, :, [0, -1]].any()


@pytest.mark.parametrize("world", SIZES, ids=str)
def test_shapes_sizes_and_trajectory_describe_the_mask(world):
    for scene in scenes(world, 24):
        clip = world.render(scene)
        y, x = np.mgrid[: world.height, : world.width]
        area = clip.mask.sum((1, 2))
        centroid = np.stack([(clip.mask * x).sum((1, 2)) / area, (clip.mask * y).sum((1, 2)) / area], 1)
        assert np.allclose(centroid, clip.trajectory, atol=0.1)
        assert clip.frames.shape == (world.num_frames, world.height, world.width, 3)
        assert 0.05 < area.mean() / world.size**2 < 0.17


def test_the_mask_says_where_the_frames_differ_from_the_backdrop():
    scene = WORLD.draw_scene(rng(1), motion="left")
    clip, recoloured = WORLD.render(scene), WORLD.render(dataclasses.replace(scene, colour="cyan", shade=0.9))
    differs = (clip.frames != recoloured.frames).any(-1)
    assert np.array_equal(differs | (clip.mask < 0.02), np.ones_like(differs))
    assert not differs[clip.mask == 0].any()
    assert np.ptp(clip.frames[clip.mask == 1], axis=0).max() == 0  # flat paint
    assert ((clip.mask > 0) & (clip.mask < 1)).any()  # anti-aliased


@pytest.mark.parametrize(("motion", "x", "y"), [("left", -1, 0), ("right", 1, 0), ("up", 0, -1), ("down", 0, 1)])
def test_directions_mean_what_they_say(motion, x, y):
    path = WORLD.render(WORLD.draw_scene(rng(), motion=motion)).trajectory
    steps = np.diff(path, axis=0)
    assert np.allclose(steps, steps[0], atol=1e-4)
    assert np.array_equal(np.sign(steps[0].round(4)), [x, y])
    assert 1.1 < np.hypot(*steps[0]) <= 2


def test_circles_go_from_the_top_clockwise_nearly_once():
    for seed in range(8):
        scene = WORLD.draw_scene(rng(seed), motion="circling")
        path = WORLD.trajectory(scene) - scene.origin
        assert np.allclose(np.hypot(*path.T), scene.orbit)
        assert np.allclose(path[0], (0, -scene.orbit))
        sweep = np.diff(np.unwrap(np.arctan2(path[:, 1], path[:, 0]))).sum() / (2 * np.pi)
        assert 0.74 < sweep < 1.01  # y points down, so rising angles are clockwise


def test_the_backdrop_moves_exactly_as_the_camera_pans():
    world = World(max_pan=1.0)
    scene = dataclasses.replace(world.draw_scene(rng(), motion="still"), pan=(1.0, 0.0))
    clip = world.render(scene)
    assert np.allclose(clip.pan[:, 0], np.arange(17))
    clear = (clip.mask[0, :, 3:] == 0) & (clip.mask[3, :, :-3] == 0)
    assert np.array_equal(clip.frames[0, :, 3:][clear], clip.frames[3, :, :-3][clear])


def test_the_camera_is_read_back():
    world, errors = World(max_pan=1.5), []
    for scene in scenes(world, 40):
        clip = world.render(scene)
        errors.append(abs(analyse(clip.frames).pan - clip.pan).max())
    assert np.quantile(errors, 0.9) < 1.0  # of up to 24 pixels; rarely the object hides much of the texture
    assert np.median(errors) < 0.4
    still = WORLD.render(WORLD.draw_scene(rng())).frames
    assert abs(analyse(still).pan).max() < 0.01


def test_captions_name_the_truth_in_several_phrasings():
    scene = WORLD.draw_scene(rng())
    for names in COMBINATIONS:
        said = {caption(dataclasses.replace(scene, **names._asdict(), phrasing=k)) for k in range(6)}
        assert len(said) == 6
        for text in said:
            assert len(text.split()) <= 10
            assert names.colour in text.split()
            assert names.shape in text.split()
            assert any(phrase in text for phrase in SAID[names.motion].split("|"))
            assert not any(
                phrase in text for other in set(MOTIONS) - {names.motion} for phrase in SAID[other].split("|")
            )


def test_the_prompt_is_the_canonical_phrasing():
    assert prompt("red", "ring", "left") == "a red ring moving left"
    assert prompt("cyan", "disc", "still") == "a cyan disc staying still"
    assert prompt("blue", "square", "circling") == "a blue square moving in circles"


def test_labels_count_the_combinations():
    labels = {WORLD.render(WORLD.draw_scene(rng(), **names._asdict())).label for names in COMBINATIONS}
    assert labels == set(range(144))


@settings(max_examples=12, deadline=None)
@given(fraction=st.floats(0, 0.25), seed=st.integers(0, 2**32))
def test_every_pair_of_names_occurs_in_train_whatever_is_held_out(fraction, seed):
    train, held_out = split_combinations(held_out_fraction=fraction, seed=seed)
    assert set(train) | set(held_out) == set(COMBINATIONS)
    assert len(held_out) == round(fraction * 144) == 144 - len(train)
    for i, j in itertools.combinations(range(3), 2):
        assert {(c[i], c[j]) for c in train} == {(c[i], c[j]) for c in COMBINATIONS}


@settings(max_examples=12, deadline=None)
@given(fraction=st.floats(0, 0.25), seed=st.integers(0, 2**32))
def test_every_name_is_held_out_about_equally_often(fraction, seed):
    _, held_out = split_combinations(held_out_fraction=fraction, seed=seed)
    for names, kind in ((COLOURS, 0), (SHAPES, 1), (MOTIONS, 2)):
        counts = [sum(c[kind] == name for c in held_out) for name in names]
        assert max(counts) - min(counts) <= 1


def test_what_is_held_out_is_decided_by_the_seed():
    assert split_combinations(seed=1) == split_combinations(seed=1) != split_combinations(seed=2)
    assert len(split_combinations(seed=1)[1]) == 16


def test_the_analyser_reads_real_clips():
    assert (accuracy(WORLD, 150) >= 0.99).all()


def test_the_analyser_reads_clips_after_blur_and_noise():
    noise = rng(9)

    def damage(frames):
        return np.clip(blurred(frames, 1.0) + noise.normal(0, 6, frames.shape), 0, 255).astype(np.uint8)

    assert (accuracy(WORLD, 60, damage) >= 0.99).all()


def test_the_analyser_reads_clips_under_a_panning_camera():
    assert (accuracy(World(max_pan=1.5), 60) >= 0.99).all()


@pytest.mark.parametrize("world", SIZES[1:], ids=str)
def test_the_analyser_reads_other_sizes(world):
    assert (accuracy(world, 24) >= 0.99).all()


def test_the_analyser_follows_the_object_within_a_pixel():
    for scene in scenes(WORLD, 40):
        clip = WORLD.render(scene)
        read = analyse(clip.frames)
        assert abs(read.trajectory - clip.trajectory).max() < 0.5
        assert 0.9 < read.confidence <= 1


@pytest.mark.parametrize(
    "frames",
    [
        np.full((17, 64, 64, 3), 128, np.uint8),
        np.full((17, 64, 64, 3), (255, 0, 0), np.uint8),
        rng().integers(0, 256, (17, 64, 64, 3), dtype=np.uint8),
        np.broadcast_to(np.linspace(0, 255, 64)[:, None, None], (17, 64, 64, 3)).astype(np.uint8),
    ],
    ids=["grey", "red all over", "noise", "gradient"],
)
def test_a_clip_without_an_object_reads_as_nothing(frames):
    read = analyse(frames)
    assert (read.colour, read.shape, read.motion) == (None, None, None)
    assert read.confidence < 0.1
    assert np.isnan(read.trajectory).all()
    assert not any(score_clip(frames, "red", "ring", "left").values())


def test_a_backdrop_alone_reads_as_nothing():
    for scene in scenes(WORLD, 20):
        still = dataclasses.replace(scene, velocity=(0.0, 0.0), orbit=0.0)
        one, two = (WORLD.render(dataclasses.replace(still, origin=(x, x))) for x in (16.0, 47.0))
        behind = np.where(one.mask[..., None] > 0, two.frames, one.frames)
        assert analyse(behind).colour is None


def test_a_path_that_is_no_named_motion_has_no_name():
    scene = WORLD.draw_scene(rng(), colour="red", shape="disc", motion="left")
    there = WORLD.render(dataclasses.replace(scene, velocity=(-1.5, 0.0), origin=(45.0, 32.0))).frames
    diagonal = WORLD.render(dataclasses.replace(scene, velocity=(1.2, 1.2), origin=(20.0, 20.0))).frames
    back_and_forth = np.concatenate([there[::2], there[::-2]])
    for frames in (diagonal, back_and_forth):
        read = analyse(frames)
        assert (read.colour, read.shape, read.motion) == ("red", "disc", None)


def test_frames_without_the_object_have_no_position():
    clip = WORLD.render(WORLD.draw_scene(rng(), motion="left"))
    frames = clip.frames.copy()
    frames[:3] = 128
    read = analyse(frames)
    assert np.isnan(read.trajectory[:3]).all()
    assert abs(read.trajectory[3:] - clip.trajectory[3:]).max() < 0.5
    assert read.motion == "left"
    assert read.confidence < 0.85


def test_a_single_frame_shows_colour_and_shape_but_no_motion():
    scene = WORLD.draw_scene(rng())
    read = analyse(WORLD.render(scene).frames[:1])
    assert (read.colour, read.shape, read.motion) == (scene.colour, scene.shape, None)


def test_a_score_is_right_only_where_the_clip_is():
    frames = WORLD.render(WORLD.draw_scene(rng(), colour="red", shape="ring", motion="up")).frames
    assert score_clip(frames, "red", "ring", "up") == {"colour": True, "shape": True, "motion": True, "all": True}
    assert score_clip(frames, "red", "disc", "up") == {"colour": True, "shape": False, "motion": True, "all": False}


def test_a_rendered_folder_holds_clips_captions_and_truth(tmp_path):
    train, _ = split_combinations(seed=0)
    folder, seen = tmp_path / "clips", []
    render_world(folder, WORLD, num_clips=12, combinations=train, seed=5, on_clip=lambda *done: seen.append(done))
    truth = json.loads((folder / "world.json").read_text())
    assert seen == [(k, 12) for k in range(1, 13)]
    assert from_dict(World, truth["world"]) == WORLD
    assert len(list(folder.glob("*.mp4"))) == len(truth["clips"]) == 12
    assert len({clip["label"] for clip in truth["clips"]}) == 12  # combinations take turns
    for clip in truth["clips"]:
        scene = from_dict(Scene, clip["scene"])
        assert scene.combination in train
        assert (folder / clip["file"]).with_suffix(".txt").read_text() == clip["caption"] + "\n"
        assert np.allclose(clip["trajectory"], WORLD.trajectory(scene), atol=1e-3)
        difference = decoded(folder / clip["file"]).astype(float) - WORLD.render(scene).frames
        assert np.sqrt((difference**2).mean()) < 12


def test_a_rendered_folder_starts_the_same_however_long_it_is(tmp_path):
    for name, count in (("short", 2), ("long", 4)):
        render_world(tmp_path / name, WORLD, num_clips=count, seed=1)
    short, long = (json.loads((tmp_path / n / "world.json").read_text())["clips"] for n in ("short", "long"))
    assert short == long[:2]


def test_the_analyser_reads_clips_back_from_mp4(tmp_path):
    render_world(tmp_path / "clips", WORLD, num_clips=36, seed=2)
    for clip in json.loads((tmp_path / "clips" / "world.json").read_text())["clips"]:
        names = [clip["scene"][kind] for kind in ("colour", "shape", "motion")]
        assert score_clip(decoded(tmp_path / "clips" / clip["file"]), *names)["all"], names


def test_a_folder_that_holds_something_is_refused_and_left_alone(tmp_path):
    (tmp_path / "holiday.mp4").write_text("mine")
    with pytest.raises(DataError, match="not an empty folder"):
        render_world(tmp_path, WORLD, num_clips=1, seed=0)
    with pytest.raises(DataError, match="not an empty folder"):
        render_world(tmp_path / "holiday.mp4", WORLD, num_clips=1, seed=0)
    assert [path.name for path in tmp_path.iterdir()] == ["holiday.mp4"]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"height": 16}, "at least 24 x 24 pixels .* got 16 x 64"),
        ({"num_frames": 1}, "at least 5 frames .* got 1"),
        ({"fps": 0.0}, "fps must be positive, got 0"),
        ({"contrast": 1.5}, "contrast must be between 0 and 1, got 1.5"),
        ({"max_pan": -1.0}, "max_pan must be between 0 and 8 "),
        ({"max_pan": float("nan")}, "max_pan must be between 0 and 8 .* got nan"),
    ],
)
def test_an_impossible_world_is_refused(values, message):
    with pytest.raises(ConfigError, match=message):
        World(**values)


def test_unknown_names_are_refused_with_the_nearest(tmp_path):
    with pytest.raises(ConfigError, match="unknown colour 'gren'; did you mean green"):
        prompt("gren", "disc", "left")
    with pytest.raises(ConfigError, match="unknown shape 'rings'; did you mean ring"):
        WORLD.draw_scene(rng(), shape="rings")
    with pytest.raises(ConfigError, match="unknown motion ''"):
        WORLD.draw_scene(rng(), motion="")
    with pytest.raises(ConfigError, match="held_out_fraction"):
        split_combinations(held_out_fraction=0.9, seed=0)
    with pytest.raises(ConfigError, match="nothing to render"):
        render_world(tmp_path, WORLD, num_clips=0, seed=0)
