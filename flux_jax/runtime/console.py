"""Standard output and standard error, which can never end a run.

In: lines and values. Out: what the stream takes of them: what its encoding lacks is written as escapes, and a stream
that is closed, full or without a reader takes nothing. A process of our own (`make_unfailing`) promises that for all
that is written to them, by whomever, and tells at its end that something was lost.
"""

import contextlib
import errno
import io
import json
import math
import os
import select
import sys
import threading
from collections.abc import Iterator
from typing import Any

from flux_jax.errors import printable

_turned_away = threading.Lock()  # stderr, which is the process's and not a thread's


def say(text: str) -> None:
    """A line, or several, for a person, on stderr. What a terminal would act on is spelled out."""
    _write(sys.stderr, printable(text))


def output(text: str) -> None:
    """A line, or several, for a script, on stdout; spelled out, too, where that is a terminal."""
    with contextlib.suppress(ValueError, AttributeError):  # closed, or not there
        text = printable(text) if sys.stdout.isatty() else text
    _write(sys.stdout, text)


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


class Unfailing(io.FileIO):
    """A descriptor that takes everything, and keeps the first reason why it did not pass something on."""

    trouble: OSError | None = None

    def write(self, data: Any) -> int:
        try:
            while (count := super().write(data)) is None:  # it is not a blocking one, and full
                select.select([], [self], [])
            return count
        except OSError as error:
            self.trouble = self.trouble or error
            return memoryview(data).nbytes


def make_unfailing() -> None:
    """Replaces the standard streams of this process by some that never fail. A descriptor that is closed leads nowhere
    from here on: a file of ours that got its number would be written to by whoever prints."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # it gets the lowest number that is free: this one
    if sys.stdin is None:
        sys.stdin = io.TextIOWrapper(io.BytesIO())
    for number, name in ((1, "stdout"), (2, "stderr")):
        before = getattr(sys, name)
        stream = io.TextIOWrapper(
            io.BufferedWriter(Unfailing(number, "w", closefd=False)),
            encoding=before.encoding if before else "utf-8",
            errors="backslashreplace",
            line_buffering=before.line_buffering if before else True,
            write_through=before.write_through if before else False,
        )
        setattr(sys, name, stream)


@contextlib.contextmanager
def unheard() -> Iterator[None]:
    """Nothing is written to the process's stderr inside, by whatever writes there past Python: a library written in
    another language, whose failures are raised all the same. One thread at a time turns it away, and back."""
    with _turned_away:
        try:
            kept = os.dup(2)
        except OSError:  # it is closed: nobody hears
            yield
            return
        try:
            with open(os.devnull, "wb") as nowhere:
                os.dup2(nowhere.fileno(), 2)
            yield
        finally:
            os.dup2(kept, 2)
            os.close(kept)


def flush() -> None:
    """Passes on what is left of both."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError, AttributeError):
            stream.flush()


def settled(status: int) -> int:
    """The exit status of a process whose streams `make_unfailing` made: 2 instead of 0 where stdout did not take all,
    as on a full disk. A reader who went away wants no more, and no word of it."""
    flush()
    trouble = getattr(getattr(getattr(sys.stdout, "buffer", None), "raw", None), "trouble", None)
    if trouble is None or trouble.errno in (errno.EPIPE, errno.EBADF):
        return status
    say(f"Not all of standard output was written: {trouble.strerror}.")
    return status or 2


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _write(stream: Any, text: str) -> None:
    try:
        try:
            stream.write(f"{text}\n")
        except UnicodeEncodeError:
            encoding = getattr(stream, "encoding", None) or "ascii"
            stream.write(f"{text.encode(encoding, 'backslashreplace').decode(encoding)}\n")
        stream.flush()
    except (OSError, ValueError, AttributeError):  # nobody reads it, its disk is full; it is closed, or not there
        pass
