"""Options as the fields of a dataclass: default, what it means, and the numbers that it may be.

In: fields made by `option`. Out: `check`, for `__post_init__`; `flux_jax.cli.dataclass_flags` makes flags of the same.
Pure Python: a wrong flag is answered before JAX is imported.
"""

import dataclasses
import math
import typing
from typing import Any

from flux_jax.errors import UserError


def option(default: Any, about: str, *, least: int | float = -math.inf, most: int | float = math.inf) -> Any:
    """A field with the help text of its flag. The words that it may be are its annotation's, a `Literal`."""
    return dataclasses.field(default=default, metadata={"help": about, "least": least, "most": most})


def check(options: Any) -> None:
    """UserError for the first field that is not what it may be."""
    hints = typing.get_type_hints(type(options))
    for field in dataclasses.fields(options):
        value, allowed = getattr(options, field.name), typing.get_args(hints[field.name])
        given = f'{field.name}="{value}"'
        if allowed and value not in allowed:
            raise UserError(f"{given} must be {' or '.join(allowed)}.")
        least, most = field.metadata["least"], field.metadata["most"]
        if not isinstance(value, str) and not least <= value <= most:
            between = f"at least {least}" if most == math.inf else f"between {least} and {most}"
            raise UserError(f"{given} must be {between}.")
