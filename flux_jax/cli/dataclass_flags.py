"""A dataclass of options as flags of a command line, and back.

In: a dataclass whose fields are made by `flux_jax.training.options.option`. Out: a flag for each field, of its type and
with its help text; and from the parsed arguments those options that were given.
"""

import argparse
import dataclasses
import typing
from collections.abc import Mapping
from typing import Any


def add_dataclass_flags(parser: Any, options: type, defaults: Mapping[str, Any] | None = None) -> None:
    """Adds the flags to a parser or a group of one. What is not given is None there: `defaults`, the field's own where
    it has none, are only in the help text."""
    hints = typing.get_type_hints(options)
    for field in dataclasses.fields(options):
        kind, default = hints[field.name], (defaults or {}).get(field.name, field.default)
        how: dict[str, Any] = {"type": kind, "metavar": kind.__name__.upper()}
        if kind is bool:
            how = {"action": argparse.BooleanOptionalAction}
        elif choices := typing.get_args(kind):
            how = {"choices": choices}
        text = f"{field.metadata['help']} (default: {default})"
        parser.add_argument(f"--{field.name.replace('_', '-')}", default=None, help=text, **how)


def given(options: type, args: argparse.Namespace) -> dict[str, Any]:
    """The options that the command line names."""
    found = {field.name: getattr(args, field.name) for field in dataclasses.fields(options)}
    return {name: value for name, value in found.items() if value is not None}
