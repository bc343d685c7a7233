"""Standard output and standard error, which can never end a run.

In: lines and values. Out: what the stream takes of them: what its encoding lacks is written as escapes, and a stream
that is closed, full or without a reader takes nothing, in silence.
"""

import json
import math
import sys
from typing import Any

from flux_jax.errors import printable


def say(text: str) -> None:
    """A line, or several, for a person, on stderr. What a terminal would act on is spelled out."""
    _write(sys.stderr, printable(text))


def output(text: str) -> None:
    """A line, or several, for a script, on stdout; spelled out, too, where that is a terminal."""
    stream = sys.stdout
    _write(stream, printable(text) if stream is not None and stream.isatty() else text)


def output_json(value: Any) -> None:
    """One JSON value on a line of stdout. Characters are escaped where the stream cannot hold them, or a terminal would
    act on one; a number that is none, which JSON has not, is null."""
    text = json.dumps(_finite(value), ensure_ascii=False)
    try:
        text.encode(getattr(sys.stdout, "encoding", None) or "utf-8")
        whole = text.isprintable()
    except UnicodeError:
        whole = False
    _write(sys.stdout, text if whole else json.dumps(_finite(value)))


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _write(stream: Any, text: str) -> None:
    try:
        try:
            print(text, file=stream, flush=True)
        except UnicodeEncodeError:
            encoding = getattr(stream, "encoding", None) or "ascii"
            print(text.encode(encoding, "backslashreplace").decode(encoding), file=stream, flush=True)
    except (OSError, ValueError):  # nobody reads it, its disk is full, it is closed
        pass
