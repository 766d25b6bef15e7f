import json
import math
from typing import Annotated, Literal

import pytest
from pydantic import Field

from reelflow.config import configuration, from_dict, set_values, to_dict
from reelflow.errors import ConfigError
from reelflow.models.blocks import Dual, Single
from reelflow.models.dit import DiTConfig
from reelflow.models.vae import Stage, staged
from reelflow.nn.patchify import Patch


@configuration
class Inner:
    rate: float
    name: str = "plain"
    limit: float | None = None


@configuration
class Square:
    side: float
    size: float = 1.0
    kind: Literal["square"] = "square"


@configuration
class Disc:
    radius: float = 2.0
    size: float = 3.0
    inner: Square | Inner | None = None
    kind: Literal["disc"] = "disc"


@configuration
class Picture:
    shape: Annotated[Square | Disc, Field(discriminator="kind")] | float


@configuration
class Outer:
    seed: int
    inner: Inner
    sizes: tuple[int, ...] = (1, 2)

    def __post_init__(self) -> None:
        if self.seed < 0:
            raise ConfigError(f"seed must not be negative, got {self.seed}")


OUTER = Outer(seed=3, inner=Inner(rate=0.1))
DIT = DiTConfig(
    in_channels=4, dim=48, num_heads=2, layers=(Dual(mlp_ratio=3.0), Single()), patch=Patch(1, 2, 1), rope=(8, 8, 8)
)
VAE = staged(latent_channels=4, encoder=(Stage(8, 1, space=2), Stage(16, 0)), decoder=(Stage(16, 1), Stage(8, 1, 2)))


@pytest.mark.parametrize("config", [OUTER, DIT, VAE, Inner(rate=1.0, limit=2.0)], ids=lambda c: type(c).__name__)
def test_a_configuration_survives_json(config):
    text = json.dumps(to_dict(config))
    assert from_dict(type(config), json.loads(text)) == config


def test_a_configuration_cannot_be_changed():
    with pytest.raises(AttributeError):
        OUTER.seed = 4


def test_values_are_set_by_their_path_and_nothing_else_changes():
    changed = set_values(OUTER, ["inner.rate=2e-4", "seed=7", "inner.name=red ring", "sizes=[5]", "inner.limit=1"])
    assert changed == Outer(seed=7, inner=Inner(rate=2e-4, name="red ring", limit=1.0), sizes=(5,))
    assert set_values(changed, ["inner.limit=null"]).inner.limit is None
    assert OUTER.inner == Inner(rate=0.1)
    assert set_values(OUTER, []) == OUTER


def test_the_last_of_two_values_wins_and_text_may_hold_an_equals_sign():
    assert set_values(OUTER, ["seed=1", "seed=2", "inner.name=a=b"]) == Outer(2, Inner(0.1, "a=b"))


def test_another_kind_keeps_what_both_have_and_brings_its_own_defaults():
    square = Picture(Square(side=5.0, size=7.0))
    assert set_values(square, ["shape.kind=disc"]) == Picture(Disc(radius=2.0, size=7.0))
    assert set_values(square, ["shape.kind=disc", "shape.radius=4"]) == Picture(Disc(radius=4.0, size=7.0))
    assert set_values(square, ["shape.kind=square"]) == square
    back = Picture(Disc(size=6.0, inner=Inner(rate=1.0)))
    assert set_values(back, ["shape.kind=square", "shape.side=9"]) == Picture(Square(side=9.0, size=6.0))
    assert set_values(back, ["shape.inner.rate=2"]) == Picture(Disc(size=6.0, inner=Inner(rate=2.0)))


@pytest.mark.parametrize(
    ("assignments", "message"),
    [
        (["shape.kind=disk"], "shape.*disk"),
        (["shape.kind=disc", "shape.side=1"], "^shape has no field 'side'; did you mean size"),
        (["shape.radius=1"], "^shape has no field 'radius'; known: kind, side, size"),
        (["shape=1", "shape.kind=disc"], "^shape has no field 'kind'; shape has no fields"),
    ],
)
def test_fields_are_those_of_the_kind_at_hand(assignments, message):
    with pytest.raises(ConfigError, match=message):
        set_values(Picture(Square(side=5.0)), assignments)


def test_a_kind_that_needs_a_value_asks_for_it():
    with pytest.raises(ConfigError, match=r"side: Field required"):
        set_values(Picture(Disc()), ["shape.kind=square"])


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("sead=1", r"^Outer has no field 'sead'; did you mean seed\?"),
        ("inner.rat=1", r"^inner has no field 'rat'; did you mean rate\?"),
        ("inner.zzz=1", r"^inner has no field 'zzz'; known: limit, name, rate"),
        ("seed.value=1", "^seed has no field 'value'; seed has no fields"),
        ("=1", "^Outer has no field ''"),
        ("seed", "expected path=value, got 'seed'"),
    ],
)
def test_a_path_that_leads_nowhere_is_refused_with_the_nearest_name(assignment, message):
    with pytest.raises(ConfigError, match=message):
        set_values(OUTER, [assignment])


@pytest.mark.parametrize(
    ("assignment", "path"),
    [
        ("seed=red", "seed"),
        ("seed=1.5", "seed"),
        ("seed=null", "seed"),
        ("inner.rate=fast", "inner.rate"),
        ("inner.name=3", "inner.name"),
        ("inner=3", "inner"),
        ("sizes=[1, 2, {}]", "sizes.2"),
        ("sizes=[1, true]", "sizes.1"),
        ("seed=true", "seed"),
        ('seed="7"', "seed"),
    ],
)
def test_a_value_of_the_wrong_type_is_refused_with_its_path(assignment, path):
    with pytest.raises(ConfigError, match=rf"^Outer: {path}: .* \(got "):
        set_values(OUTER, [assignment])


def test_a_value_refused_by_the_class_itself_keeps_its_message():
    with pytest.raises(ConfigError, match=r"^seed must not be negative, got -1$"):
        set_values(OUTER, ["seed=-1"])


def test_unknown_and_missing_fields_are_refused():
    with pytest.raises(ConfigError, match="Outer: colour: Unexpected"):
        from_dict(Outer, {**to_dict(OUTER), "colour": "red"})
    with pytest.raises(ConfigError, match=r"Outer: inner\.rate: Field required"):
        from_dict(Outer, {"seed": 1, "inner": {}})
    with pytest.raises(ConfigError, match="Outer: value: "):
        from_dict(Outer, None)


def test_kinds_of_layers_are_told_apart_and_misspelt_ones_refused():
    values = to_dict(DIT)
    assert [layer["kind"] for layer in values["layers"]] == ["dual", "single"]
    values["layers"][0]["kind"] = "duel"
    with pytest.raises(ConfigError, match="layers"):
        from_dict(DiTConfig, values)


def test_numbers_that_are_not_finite_can_be_set():
    assert set_values(OUTER, ["inner.limit=Infinity"]).inner.limit == math.inf
