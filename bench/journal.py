"""What a benchmark finds, on disk the moment it is known: a line of JSON for each result, whatever becomes of the rest.

In: rows, as anything that JSON can hold. Out: a file that is only ever appended to, by one process at a time, synced
after every row. A row that the disk has no room for is said on stderr instead, and costs only itself; a line that a
killed process left half is skipped when the rows are read.
"""

import contextlib
import json
import math
import os
import sys
import textwrap
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

SENTENCE = 300  # characters of a failure's message that are kept
FRAMES = 6  # of its traceback that are printed, indented


class Journal:
    """The rows of one benchmark. path: None keeps them in memory alone; label: names the benchmark in every row;
    seconds: after which nothing more is to be begun."""

    def __init__(self, path: Path | None, label: str, seconds: float = math.inf):
        self.path, self.label, self.rows = path, label, []
        self._end = time.monotonic() + seconds

    def left(self) -> float:
        """Seconds until nothing more is to be begun."""
        return self._end - time.monotonic()

    def row(self, **found: Any) -> dict[str, Any]:
        """Keeps and writes one result; returns it."""
        self.rows.append(found)
        if self.path is not None:
            append(self.path, {"step": self.label, "time": round(time.time(), 1), **found})
        return found

    def attempt(self, labels: dict[str, Any], job: Callable[[], dict[str, Any]], least: float = 0.0) -> dict[str, Any]:
        """One row whatever happens: the labels with what `job` returns, with {"failure": why} where it raised, or with
        {"skipped": why} where fewer than `least` seconds are left."""
        if self.left() < least:
            return self.row(**labels, skipped=f"{max(0.0, self.left()):.0f} s left")
        try:
            found = job()
        except Exception as error:  # whatever one result raises must not cost the others
            found = {"failure": sentence(error)}
            trace = "".join(traceback.format_exception(error, limit=-FRAMES))
            print(textwrap.indent(trace, "  "), file=sys.stderr, flush=True)
        return self.row(**labels, **found)


def sentence(error: BaseException) -> str:
    """The kind of an exception and the first line of its message."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:SENTENCE]}" if lines else type(error).__name__


def append(path: Path, row: dict[str, Any]) -> bool:
    """Adds one line, whole or not at all, and syncs it. False, and the row on stderr, where there is no room for it."""
    line = json.dumps(row, default=str)
    try:
        with open(path, "ab+", buffering=0) as file:  # a buffer would try again what found no room
            end = file.seek(0, os.SEEK_END)
            rest = b"\n" * _half_line(file, end) + line.encode() + b"\n"
            try:
                while rest:
                    rest = rest[file.write(rest) :]
                os.fsync(file.fileno())
            except OSError:
                with contextlib.suppress(OSError):
                    file.truncate(end)
                raise
    except OSError as error:
        print(f"not written to {path} ({error.strerror}): {line}", file=sys.stderr, flush=True)
        return False
    return True


def _half_line(file: Any, end: int) -> bool:
    """Whether the last line has no end, as a process that was killed leaves it."""
    if end == 0:
        return False
    file.seek(end - 1)
    return file.read(1) != b"\n"


def read(path: Path) -> list[dict[str, Any]]:
    """The rows of a file, without lines that are not whole; none where there is no such file."""
    rows = []
    for line in path.read_bytes().splitlines() if path.is_file() else []:
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    return rows
