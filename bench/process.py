"""A benchmark in a process of its own, with a time box: whatever becomes of it costs only itself.

In: the arguments behind `python`, seconds, environment variables. Out: `Ended`: how it ended and what it printed. The
process leads a group of its own, which is killed as a whole at the end of its box, so that no compiler or test that it
started lives on; and it dies with the process that started it, whatever ended that. What it prints is read as it comes,
and copied to a log where one is given: the process never meets a full disk or a full pipe.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[1]
LINES = 400  # of its output that are kept
LOG_CHARACTERS = 2**20  # of its output that a log takes as they come; of more, the log gets the end
LINE_CHARACTERS = 2**16  # of a line, which without an end would take all memory
GRACE = 5.0  # seconds for readers of a killed process's output
# What becomes the process: first it asks Linux to be killed when its parent dies (PR_SET_PDEATHSIG, SIGKILL), which
# outlasts exec, and makes sure that the parent has not died before.
START = """import ctypes, os, sys
if sys.platform == "linux":
    ctypes.CDLL(None).prctl(1, 9)
if os.getppid() == int(sys.argv[1]):
    os.execv(sys.executable, [sys.executable, *sys.argv[2:]])
"""


class Ended(NamedTuple):
    """status: the exit status, below zero for a signal, None where the time box ended first."""

    status: int | None
    seconds: float
    out: list[str]
    err: list[str]

    @property
    def failure(self) -> str | None:
        """Why there is no result, in one line; None where it exited with 0."""
        if self.status == 0:
            return None
        if self.status is None:
            return f"killed at its time box, after {self.seconds:.0f} s"
        if self.status < 0:
            return f"killed by {signal.Signals(-self.status).name}"
        reported = [line for line in self.err if line[:1].strip()]  # what is indented only explains
        reported = [line for line in reported if "Error" in line] or reported
        return reported[-1].strip()[:300] if reported else f"exit status {self.status}"

    def result(self) -> dict[str, Any]:
        """The JSON object that it printed last, or {"failure": why}."""
        if self.failure is not None:
            return {"failure": self.failure}
        try:
            return json.loads(self.out[-1])
        except (IndexError, ValueError):
            return {"failure": "printed no JSON object"}


def run(
    arguments: Sequence[str],
    *,
    seconds: float | None = None,
    env: Mapping[str, str] | None = None,
    log: Path | None = None,
) -> Ended:
    """`python ARGUMENTS` in the clone's root, for so many seconds at most (None: as long as it takes). env: variables
    on top of this process's. Never raises for what the process does."""
    begun = time.monotonic()
    child = subprocess.Popen(
        [sys.executable, "-ISc", START, str(os.getpid()), *arguments],
        cwd=ROOT,
        env={**os.environ, **(env or {})},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
        errors="replace",
        start_new_session=True,
    )
    kept = [deque(maxlen=LINES), deque(maxlen=LINES)]
    readers = [
        threading.Thread(target=_copy, args=(pipe, lines, log), daemon=True)
        for pipe, lines in zip((child.stdout, child.stderr), kept, strict=True)
    ]
    for reader in readers:
        reader.start()
    status: int | None = None
    try:
        status = child.wait(seconds)
    except subprocess.TimeoutExpired:
        pass
    finally:  # also where this process is interrupted: nothing that the child started lives on
        _kill(child)
    for reader in readers:
        reader.join(GRACE)
    return Ended(status, time.monotonic() - begun, *map(list, kept))


def _kill(child: subprocess.Popen) -> None:
    with contextlib.suppress(ProcessLookupError):  # where the whole group has ended
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()


def _copy(pipe: Any, lines: deque, log: Path | None) -> None:
    """Reads until the end, whatever the log's disk says."""
    read = 0
    with pipe:
        while line := pipe.readline(LINE_CHARACTERS):
            lines.append(line.rstrip("\n"))
            if read < LOG_CHARACTERS:
                _append(log, line)
            read += len(line)
    if read > LOG_CHARACTERS:
        _append(log, "\n".join(["...", *lines, ""]))


def _append(log: Path | None, text: str) -> None:
    """Where there is room for it: what is kept is enough."""
    if log is not None:
        with contextlib.suppress(OSError), open(log, "a", encoding="utf-8") as file:
            file.write(text)
