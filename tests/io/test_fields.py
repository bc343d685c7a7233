"""Which fields of a JSON object are of another type than they must be."""

import pytest

from flux_jax.errors import UserError
from flux_jax.io.fields import check_fields, wrong_fields

TYPES = {"name": str, "count": int, "scale": int | float, "note": str | None, "done": bool}
GOOD = {"name": "a", "count": 1, "scale": 2, "note": None, "done": True}


@pytest.mark.parametrize(
    ("change", "wrong"),
    [
        ({}, []),
        ({"scale": 0.5, "note": "b", "more": []}, []),
        ({"count": True, "scale": False}, ["count", "scale"]),  # no numbers, though they are to Python
        ({"count": 1.0, "done": 1, "name": None}, ["name", "count", "done"]),
    ],
)
def test_types(change, wrong):
    assert wrong_fields(GOOD | change, TYPES) == wrong


def test_what_is_missing_is_wrong_unless_it_may_be_none():
    assert wrong_fields({}, TYPES) == ["name", "count", "scale", "done"]
    check_fields(GOOD, TYPES, "This")
    with pytest.raises(UserError, match="^This lacks, or has the wrong type in: name, count.$"):
        check_fields({"scale": 1, "done": False}, TYPES, "This")
