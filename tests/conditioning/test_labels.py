from dataclasses import replace

import numpy as np
import pytest

from reelflow.conditioning.labels import ClassWords
from reelflow.config import from_dict, to_dict
from reelflow.data.worlds import COLOURS, COMBINATIONS, MOTIONS, PHRASINGS, World, caption
from reelflow.errors import ConfigError
from reelflow.models.condition import Condition
from reelflow.recipes.vdit import CLASSES

SIMPLE = ClassWords(((("red",), ("blue",)), (("left",), ("still", "not"), ("up",))))


def test_a_class_is_one_value_of_each_attribute_the_last_running_fastest():
    prompts = ["a red disc moving left", "red, NOT moving", "the disc is red: up!", "left goes blue", "still blue"]
    assert SIMPLE.num_classes == 6
    assert SIMPLE(prompts).condition().label.tolist() == [0, 1, 2, 3, 4]


def test_the_empty_prompt_is_the_row_after_the_last_class():
    condition = SIMPLE(["", "blue up"]).condition()
    assert condition.label.tolist() == [6, 5]
    assert condition == Condition(label=condition.label)


def test_classes_survive_json():
    assert from_dict(ClassWords, to_dict(SIMPLE)) == SIMPLE


def test_every_caption_of_the_world_names_its_colour_and_motion():
    scene = World().draw_scene(np.random.default_rng(0))
    for names in COMBINATIONS:
        captions = [caption(replace(scene, **names._asdict(), phrasing=k)) for k in range(len(PHRASINGS))]
        expected = COLOURS.index(names.colour) * len(MOTIONS) + MOTIONS.index(names.motion)
        assert CLASSES(captions).label.tolist() == [expected] * len(captions)


@pytest.mark.parametrize("prompt", ["left", "a red and blue disc, left", "red left up"])
def test_a_prompt_of_no_class_or_two_is_refused_with_the_values(prompt):
    with pytest.raises(ConfigError, match="must name one of"):
        SIMPLE([prompt])


@pytest.mark.parametrize(
    ("attributes", "message"),
    [
        ((), "needs an attribute"),
        (((("red",),),), "two values"),
        (((("red",), ()),), "a word or more"),
        (((("red",), ("blue",)), (("red",), ("left",))), "one meaning, got 'red'"),
        (((("dark red",), ("Blue",)),), "lower-case word"),
    ],
)
def test_impossible_classes_are_refused(attributes, message):
    with pytest.raises(ConfigError, match=message):
        ClassWords(attributes)
