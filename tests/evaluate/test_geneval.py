"""GenEval's rules on constructed boxes: counts, colours, positions with their tenth, duplicates."""

import json

import pytest
from reference_files import reference_file

from flux_jax.evaluate.geneval import TAGS, Detection, judge, keep, overlap
from flux_jax.nano.relations import relations


def box(x, y, half=10.0, confidence=0.95, color=None, tall=None):
    """Around (x, y), 2 * half wide and 2 * tall high."""
    tall = half if tall is None else tall
    return Detection((x - half, y - tall, x + half, y + tall), confidence, color)


def test_overlap_counts_whole_pixels():
    assert overlap(Detection((0, 0, 9, 9)), Detection((0, 0, 9, 9))) == 1
    assert overlap(Detection((0, 0, 9, 9)), Detection((5, 0, 14, 9))) == pytest.approx(50 / 150)
    assert overlap(Detection((0, 0, 9, 9)), Detection((10, 0, 19, 9))) == 0
    assert overlap(Detection((0, 0, 9, 9)), Detection((9, 0, 19, 9))) == pytest.approx(10 / 200)  # a column is shared


def test_keep_takes_the_most_certain_above_the_threshold():
    found = [box(0, 0, confidence=c) for c in (0.3, 0.9, 0.31, 0.5)]
    assert [d.confidence for d in keep(found)] == [0.9, 0.5, 0.31]
    assert [d.confidence for d in keep(found, max_objects=2)] == [0.9, 0.5]
    assert keep(found, confidence=0.9) == []


def test_duplicates_go_only_where_an_overlap_is_named():
    near, far = box(0, 0, confidence=0.9), box(100, 0, confidence=0.8)
    twin = box(1, 0, confidence=0.7)
    assert keep([twin, far, near]) == [near, far, twin]
    assert keep([twin, far, near], max_overlap=0.5) == [near, far]
    chain = [box(0, 0, confidence=0.9), box(8, 0, confidence=0.8), box(16, 0, confidence=0.7)]
    assert keep(chain, max_overlap=0.4) == [chain[0], chain[2]]  # what was suppressed suppresses nothing


@pytest.mark.parametrize(
    ("x", "y", "expected"),
    [
        (-40, 0, {"left of"}),
        (40, 0, {"right of"}),
        (0, -40, {"above"}),  # y grows downwards
        (0, 40, {"below"}),
        (40, 40, {"right of", "below"}),
        (0, 0, set()),
        (3.9, 0, set()),  # a tenth of 20 + 20 is 4: nothing is left
        (7.9, 0, set()),  # 3.9 are left, less than half of 7.9
        (8.1, 0, {"right of"}),
        (40, 19, {"right of"}),  # down: 15 left of an offset of 44
    ],
)
def test_relations_of_two_boxes(x, y, expected):
    assert relations(box(100 + x, 100 + y).box, box(100, 100).box) == expected


def test_the_tenth_is_taken_of_each_axis_own_sides():
    wide, other = box(120, 100, half=80, tall=2), box(100, 100)
    assert relations(wide.box, other.box) == set()  # a tenth of 160 + 20 is 18 of 20
    assert relations(box(100, 120, half=80, tall=2).box, other.box) == {"below"}  # a tenth of 4 + 20 is 2.4 of 20


def test_the_unit_does_not_matter():
    """GenEval's boxes are in pixels, those of FLUX-nano's oracle in units of the picture's width."""
    found = set()
    for step in range(1, 40):
        x, y = 0.01 * step, 0.013 * ((step * 7) % 29)
        pixels = box(500 + 1000 * x, 500 - 1000 * y, half=70).box, box(500, 500, half=100).box
        units = (tuple(edge / 1000 for edge in each) for each in pixels)
        assert relations(*units) == relations(*pixels), (x, y)
        found |= relations(*pixels)
    assert found == {"right of", "above"}


def metadata(tag, *include, exclude=()):
    return {"tag": tag, "include": list(include), "exclude": list(exclude), "prompt": ""}


def test_single_and_two_objects_may_have_company():
    wanted = metadata("two_object", {"class": "dog", "count": 1}, {"class": "cat", "count": 1})
    assert judge(wanted, {"dog": [box(0, 0)], "cat": [box(9, 9)], "cow": [box(0, 0)]}) == (True, "")
    right, reason = judge(wanted, {"dog": [box(0, 0), box(50, 0)]})
    assert not right
    assert reason == "0 of cat, 1 expected"


def test_counting_is_exact_and_asks_for_more_certainty():
    wanted = metadata("counting", {"class": "dog", "count": 2}, exclude=[{"class": "dog", "count": 3}])
    dogs = [box(50 * i, 0) for i in range(3)]
    assert judge(wanted, {"dog": dogs[:2]})[0]
    assert not judge(wanted, {"dog": dogs[:1]})[0]
    assert judge(wanted, {"dog": dogs}) == (False, "3 of dog, fewer than 3 expected")
    unsure = box(200, 0, confidence=0.9)  # not above 0.9: no third dog, and no second
    assert judge(wanted, {"dog": [*dogs[:2], unsure]})[0]
    assert not judge(wanted, {"dog": [dogs[0], unsure]})[0]
    assert judge(metadata("two_object", {"class": "dog", "count": 2}), {"dog": [dogs[0], unsure]})[0]


def test_colour_is_that_of_the_most_certain():
    wanted = metadata("colors", {"class": "dog", "count": 1, "color": "red"})
    red, blue = box(0, 0, confidence=0.8, color="red"), box(50, 0, confidence=0.9, color="blue")
    assert judge(wanted, {"dog": [red]})[0]
    assert judge(wanted, {"dog": [red, blue]}) == (False, "dog is blue, red expected")


def test_colours_are_bound_to_their_objects():
    wanted = metadata(
        "color_attr", {"class": "dog", "count": 1, "color": "red"}, {"class": "cat", "count": 1, "color": "blue"}
    )
    assert judge(wanted, {"dog": [box(0, 0, color="red")], "cat": [box(50, 0, color="blue")]})[0]
    right, reason = judge(wanted, {"dog": [box(0, 0, color="blue")], "cat": [box(50, 0, color="red")]})
    assert not right
    assert len(reason.splitlines()) == 2


def test_position_refers_to_the_first_object_and_needs_it():
    wanted = metadata(
        "position", {"class": "cat", "count": 1}, {"class": "dog", "count": 1, "position": ["left of", 0]}
    )
    cat = box(100, 0)
    assert judge(wanted, {"cat": [cat], "dog": [box(0, 0)]})[0]
    assert judge(wanted, {"cat": [cat], "dog": [box(200, 0)]}) == (False, "dog is right of, left of expected")
    assert not judge(wanted, {"dog": [box(0, 0)]})[0]
    more_certain = box(300, 0, confidence=0.99)
    assert not judge(wanted, {"cat": [cat], "dog": [box(0, 0), more_certain]})[0]


def test_official_prompts_have_the_official_counts_and_can_all_be_judged():
    path = reference_file("prompts/geneval/evaluation_metadata.jsonl")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert {tag: sum(row["tag"] == tag for row in rows) for tag in TAGS} == TAGS
    assert sum(TAGS.values()) == len(rows) == 553
    places = {"left of": (-100, 0), "right of": (100, 0), "above": (0, -100), "below": (0, 100)}
    for row in rows:
        ideal = {}
        for wanted in row["include"]:
            x, y = places[wanted["position"][0]] if "position" in wanted else (0, 0)
            ideal[wanted["class"]] = [box(x + 300 * i, y, color=wanted.get("color")) for i in range(wanted["count"])]
        assert judge(row, ideal) == (True, ""), row
        assert not judge(row, {name: found[1:] for name, found in ideal.items()})[0], row
