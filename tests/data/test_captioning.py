import io
import threading
import time

import av
import numpy as np
import pytest

from reelflow.data.captioning import Captioning, Described, Span, describe, jpeg, pictures
from reelflow.data.video import write_video
from reelflow.errors import ConfigError, DataError

FAST = Captioning(num_pictures=3, per_minute=1e6, parallel=2, give_up=4)


class Refused(DataError):
    """What a client raises when there is no answer."""


@pytest.fixture(scope="module")
def spans(tmp_path_factory):
    """Eight seconds of a picture that brightens, as eight spans of a second."""
    path = tmp_path_factory.mktemp("videos") / "a.mp4"
    shades = np.linspace(20, 235, 64).astype(np.uint8)
    write_video(path, np.broadcast_to(shades[:, None, None, None], (64, 48, 64, 3)), fps=8)
    return [Span(f"clip{k}", path, float(k), 1.0) for k in range(8)]


def decoded(picture: bytes) -> np.ndarray:
    with av.open(io.BytesIO(picture), format="mjpeg") as container:
        return next(container.decode(video=0)).to_ndarray(format="rgb24")


def brightness(shown) -> str:
    return " ".join(f"{decoded(picture).mean():.0f}" for picture in shown)


def test_a_picture_survives_jpeg():
    y, x = np.mgrid[:40, :50]
    frame = np.stack([4 * x, 5 * y, 255 - 4 * x], axis=-1).astype(np.uint8)
    assert np.abs(decoded(jpeg(frame)).astype(int) - frame).mean() < 4


def test_pictures_are_spread_over_the_span_and_no_larger_than_asked(spans):
    shown = pictures(spans[2], 4, 24)
    assert {decoded(picture).shape for picture in shown} == {(24, 32, 3)}
    shades = [decoded(picture).mean() for picture in shown]
    np.testing.assert_allclose(shades, np.linspace(20, 235, 64)[16:24:2], atol=3)
    assert decoded(pictures(spans[2], 1, 384)[0]).shape == (48, 64, 3)


def test_every_span_is_asked_for_once_and_answered_by_its_own_frames(spans):
    answers = list(describe(spans, brightness, FAST))
    assert sorted(answer.key for answer in answers) == [span.key for span in spans]
    for answer in answers:
        assert answer.reason is None
        assert answer.caption == brightness(pictures(spans[int(answer.key[4:])], 3, 384))


def test_a_failure_is_named_and_stops_nobody_else(spans, tmp_path):
    broken = Span("broken", tmp_path / "none.mp4", 0.0, 1.0)
    answers = {answer.key: answer for answer in describe([*spans[:3], broken], lambda shown: "seen", FAST)}
    assert answers["clip0"] == Described("clip0", "seen", None)
    assert answers["broken"].caption == ""
    assert "no such file" in answers["broken"].reason
    assert len(answers) == 4


def test_a_server_that_answers_nobody_is_given_up(spans):
    asked = []

    def ask(shown):
        asked.append(shown)
        raise Refused("status 500")

    answers = []
    with pytest.raises(DataError, match=r"4 captions in a row failed.*status 500"):
        answers.extend(describe(spans * 3, ask, FAST))
    assert len(asked) <= 4 + FAST.parallel


def test_questions_keep_their_pace(spans):
    begun = []
    list(describe(spans[:6], lambda shown: str(begun.append(time.monotonic())), Captioning(per_minute=60 / 0.06)))
    assert begun[5] - begun[0] >= 5 * 0.06 - 0.01


def test_so_many_questions_are_under_way_and_no_more(spans):
    together, under_way, most, lock = threading.Barrier(2), 0, 0, threading.Lock()

    def ask(shown):
        nonlocal under_way, most
        with lock:
            under_way += 1
            most = max(most, under_way)
        together.wait(30)  # for the other one
        with lock:
            under_way -= 1
        return "seen"

    assert len(list(describe(spans, ask, FAST))) == 8
    assert most == 2


def test_stopping_finishes_what_is_under_way(spans):
    seen = []
    for answer in describe(spans, lambda shown: "seen", FAST, stopped=lambda: bool(seen)):
        seen.append(answer)
    assert 1 <= len(seen) <= FAST.parallel + 1


@pytest.mark.parametrize("change", [{"num_pictures": 0}, {"per_minute": 0.0}, {"parallel": 0}, {"give_up": 0}])
def test_impossible_ways_to_ask_are_refused(change):
    with pytest.raises(ConfigError, match=f"captioning.{next(iter(change))}"):
        Captioning(**change)
