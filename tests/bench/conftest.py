"""What several tests of processes need."""

import time
from pathlib import Path

import pytest


@pytest.fixture
def dies():
    """Whether a process ends within ten seconds: who is killed needs a moment, and nobody may have read its end."""

    def lives(pid: int) -> bool:
        try:
            return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
        except FileNotFoundError:
            return False

    def dies(pid: int) -> bool:
        end = time.monotonic() + 10
        while lives(pid) and time.monotonic() < end:
            time.sleep(0.01)
        return not lives(pid)

    return dies
