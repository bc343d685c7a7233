"""Types and ranges of the fields of a JSON object: one check for PNG records, prompt files and evaluators' results.

In: an object as `reading.parse_json` gives it, and key -> type. Out: the keys that are wrong, or UserError, one
sentence.
"""

from collections.abc import Mapping
from types import UnionType
from typing import Any, get_args

from flux_jax.errors import UserError, shortened
from flux_jax.validation import RANGES, is_number

Types = Mapping[str, type | UnionType]


def wrong_fields(data: Mapping[str, Any], types: Types) -> list[str]:
    """The keys of `types` whose value is of another type, in their order. A missing key has the value None; true and
    false are no numbers, though they are to Python."""
    return [key for key, kind in types.items() if not _fits(data.get(key), kind)]


def check_fields(data: Mapping[str, Any], types: Types, where: str) -> None:
    """Raises UserError, with all `wrong_fields` of what is called `where`, unless there are none."""
    if wrong := wrong_fields(data, types):
        raise UserError(f"{where} lacks, or has the wrong type in: {', '.join(wrong)}.")


def check_ranges(data: Mapping[str, Any], where: str) -> None:
    """Raises UserError where one of the numbers that decide a picture (`validation.RANGES`) is none that any model
    takes, such as an infinite one."""
    for key, (least, most) in RANGES.items():
        if key in data and not is_number(data[key], least, most):
            raise UserError(f"{where}: {key} must be from {least} to {most}, not {shortened(data[key])}.")


def _fits(value: Any, kind: type | UnionType) -> bool:
    return bool in (kind, *get_args(kind)) if isinstance(value, bool) else isinstance(value, kind)
