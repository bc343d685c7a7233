"""The oracle: right on held-out renders, clean and degraded; deaf to wrong captions; blind to what is no picture."""

import json
import subprocess
import sys

import numpy as np
import pytest

from flux_jax.nano.captions import parse
from flux_jax.nano.oracle import Found, Reading, contradiction, read, score
from flux_jax.nano.oracle_calibration import measure, word_changes
from flux_jax.nano.relations import relations
from flux_jax.nano.scenes import BACKGROUNDS, COLORS, SHAPES, Object, Scene, render, sample_scene


def verdict(text: str, *things: Object, background: int = 0):
    caption = parse(text)
    assert caption is not None
    return score(render(Scene(things, background)), caption)


@pytest.mark.slow
def test_its_own_error_is_small():
    errors = measure(count=100, seed=1)
    assert errors["wrong"] <= 0.005
    assert errors["wrong_degraded"] <= 0.01
    assert errors["false_accept"] <= 0.01
    assert errors["word_changes"] <= 0.01
    assert errors["number_of_word_changes"] > 1000
    assert errors["noise"] == errors["blend"] == errors["half_drawn"] == 0


@pytest.mark.parametrize("color", COLORS)
def test_every_shape_and_colour_is_read_on_every_background(color: str):
    for shape in SHAPES:
        for background in range(len(BACKGROUNDS)):
            image = render(Scene((Object(shape, color, 0.41, 0.55, 0.14),), background))
            (thing,) = read(image).objects
            assert (thing.shape, thing.color) == (shape, color)
            assert (thing.x, thing.y, thing.size) == pytest.approx((0.41, 0.55, 0.14), abs=0.008)


def test_touching_objects_of_two_colours_are_told_apart():
    reading = read(
        render(Scene((Object("square", "red", 0.3, 0.5, 0.15), Object("circle", "blue", 0.565, 0.5, 0.15)), 3))
    )
    assert reading.recognisable
    assert {(thing.shape, thing.color) for thing in reading.objects} == {("square", "red"), ("circle", "blue")}


@pytest.mark.parametrize("size", [64, 256])
def test_other_sizes_are_read_too(size: int):
    rng = np.random.default_rng(0)
    for _ in range(3):
        scene = sample_scene(rng)
        found = read(render(scene, size)).objects
        assert sorted((o.shape, o.color) for o in found) == sorted((o.shape, o.color) for o in scene.objects)


def test_specks_are_overlooked_and_blots_are_not():
    image = render(Scene((Object("circle", "red", 0.3, 0.3, 0.15),), 0))
    image[100:104, 100:104] = COLORS["blue"]
    assert read(image).recognisable
    for color in (COLORS["blue"], (120, 200, 190)):
        image[90:100, 60:100] = color
        reading = read(image)
        assert not reading.recognisable
        assert reading.problem


def test_an_empty_picture_has_nothing_to_recognise():
    assert read(render(Scene((), 0))) == Reading((), False, "nothing but background")


def test_objects_of_one_colour_that_touch_are_not_guessed_at():
    things = [Object("circle", "red", x, 0.5, 0.14) for x in (0.3, 0.55)]
    assert not read(render(Scene(tuple(things), 0))).recognisable


@pytest.mark.parametrize(
    "bad", [np.zeros((8, 8, 3), np.float32), np.zeros((8, 9, 3), np.uint8), np.zeros((8, 8), np.uint8)]
)
def test_other_arrays_are_refused(bad: np.ndarray):
    with pytest.raises(ValueError, match="square uint8 picture"):
        read(bad)


RED_CIRCLE = Object("circle", "red", 0.25, 0.5, 0.15)
BLUE_SQUARE = Object("square", "blue", 0.75, 0.55, 0.15)
RED_SQUARE = Object("square", "red", 0.75, 0.55, 0.15)


@pytest.mark.parametrize(
    ("text", "things", "reason"),
    [
        ("a photo of a circle", (RED_CIRCLE,), ""),
        ("a star", (RED_CIRCLE,), "no star"),
        ("a red circle", (RED_CIRCLE,), ""),
        ("a green circle", (RED_CIRCLE,), "circle is red instead of green"),
        ("a circle and a square", (RED_CIRCLE, BLUE_SQUARE), ""),
        ("a red circle and a blue square", (RED_CIRCLE, BLUE_SQUARE), ""),
        ("a blue circle and a red square", (RED_CIRCLE, BLUE_SQUARE), "circle is red instead of blue"),
        ("a circle to the left of a square", (RED_CIRCLE, BLUE_SQUARE), ""),
        ("a square to the right of a circle", (RED_CIRCLE, BLUE_SQUARE), ""),
        ("a circle above a square", (RED_CIRCLE, BLUE_SQUARE), "circle is not above square"),
        ("a blue square to the left of a red circle", (RED_CIRCLE, BLUE_SQUARE), "square is not left of circle"),
        ("two squares", (BLUE_SQUARE,), "1 of square instead of 2"),
    ],
)
def test_verdicts(text: str, things: tuple[Object, ...], reason: str):
    result = verdict(text, *things)
    assert result.reason == (reason or "as the caption says")
    assert result.correct == result.exact == (not reason)


def test_objects_beyond_the_named_ones_spoil_only_counts():
    result = verdict("a red circle", RED_CIRCLE, BLUE_SQUARE)
    assert result.correct
    assert not result.exact
    three = [Object("square", "red", x, 0.2, 0.1) for x in (0.15, 0.5, 0.85)]
    assert verdict("three squares", *three).exact
    assert verdict("three red squares", *three).exact
    assert not verdict("two squares", *three).correct
    other = Object("square", "blue", 0.5, 0.7, 0.1)
    assert verdict("four squares", *three, other).correct
    assert verdict("four red squares", *three, other).reason == "square is blue instead of red"


def found(x: float, y: float) -> Found:
    return Found("circle", "red", x, y, 0.1, 1.0)


@pytest.mark.parametrize(
    ("x", "y", "expected"),
    [
        (0.2, 0.5, {"left of"}),
        (0.8, 0.5, {"right of"}),
        (0.5, 0.2, {"above"}),
        (0.5, 0.8, {"below"}),
        (0.1, 0.1, {"left of", "above"}),  # diagonal: both hold
        (0.47, 0.5, set()),  # within a tenth of the summed sides
        (0.43, 0.5, set()),  # what remains is less than half of the offset
    ],
)
def test_relations_by_genevals_rule(x: float, y: float, expected: set[str]):
    assert relations(found(x, y).box, found(0.5, 0.5).box) == expected


def test_a_changed_word_is_a_changed_meaning():
    caption = parse("a red circle to the left of a blue square")
    assert caption is not None
    changed = {other.text for other in word_changes(caption)}
    assert "a red circle to the right of a blue square" in changed
    assert "a red star to the left of a blue square" in changed
    assert all(contradiction((), parse(text)) for text in changed)


def test_the_command_prints_one_json_object():
    command = [sys.executable, "-m", "flux_jax.nano.oracle_error", "--count", "3"]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    assert json.loads(run.stdout)["count"] == 3
