"""What becomes of a picture that was drawn: it is written, if not where it was asked for, then elsewhere, and told.

In: a request, its picture and record. Out: a PNG file; its path on stdout, and a line for people on stderr.
"""

import argparse
import contextlib
import os
import shlex
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from flux_jax.cli.main import output, say
from flux_jax.cli.output_paths import beside
from flux_jax.cli.requests import Request, differences
from flux_jax.errors import UserError
from flux_jax.io import png


def keep(request: Request, image: Any, record: png.Record, *, args: argparse.Namespace, seeded: bool) -> Path | None:
    """Writes a picture (PIL) and returns where it is: where it was asked for; beside that, if the name was taken
    meanwhile; in a new folder for temporary files, if nothing can be written there any more. None where another process
    made the same picture of a prompts file meanwhile. seeded: its seed was asked for. UserError where there is no place
    for it at all."""
    wanted = request.output
    try:
        png.write_png(wanted, image, record, overwrite=args.overwrite)
        return wanted
    except UserError as error:
        trouble = error
    if args.prompts_file and not args.overwrite:
        with contextlib.suppress(UserError):
            if not differences(request, seeded, record.model, record.dtype):
                say(f"{wanted} was made by another process meanwhile.")
                return None
    for place in _spare(wanted):
        with contextlib.suppress(UserError):
            png.write_png(place, image, record)
            say(f"{str(trouble).removesuffix('.')}: the picture is {place} now.")
            return place
    raise trouble


def _spare(wanted: Path) -> Iterator[Path]:
    """Where a picture may go that cannot be written where it should be."""
    if os.path.lexists(wanted):
        yield from (beside(wanted, number) for number in range(2, 100))
    with contextlib.suppress(OSError):
        folder = tempfile.mkdtemp(prefix="flux-jax-")
        yield Path(folder, wanted.name)
        os.rmdir(folder)  # it could not be written there either


def tell(args: argparse.Namespace, path: Path, seed: int, model: str) -> None:
    """Where a picture is, for scripts and for people, and how it is made again: with the model of that name."""
    from flux_jax.checkpoints.checkpoint import DEFAULT_MODEL

    if not args.json:
        output(str(path))
    if not args.quiet:
        named = "" if model == DEFAULT_MODEL else f" -m {word(model)}"
        say(f"seed {seed} | {path} | repeat: python -m flux_jax.generate -C {word(path)}{named}")


def word(path: str | Path) -> str:
    """A path as a shell, and then an argument parser, takes it for one."""
    text = str(path)
    return shlex.quote(f"./{text}" if text.startswith(("-", "~")) else text)
