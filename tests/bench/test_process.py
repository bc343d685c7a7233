"""Whatever becomes of a process costs only itself: its end, its output and its result are known."""

import os
import signal
import time
from pathlib import Path

import pytest

from bench import process


def run(code, **options):
    return process.run(["-c", code], **options)


def test_the_result_is_the_last_line():
    ended = run("print('table'); print('{\"value\": 1.5}')")
    assert ended.failure is None and ended.result() == {"value": 1.5} and ended.out[0] == "table"


@pytest.mark.parametrize(
    ("code", "failure"),
    [
        ("raise ValueError('bad\\ntiles')", "ValueError: bad"),
        ("import sys; sys.exit('no GPU')", "no GPU"),
        ("import sys; sys.exit('  RuntimeError: no tile\\n1 of 2 failed')", "1 of 2 failed"),
        ("import sys; sys.exit(3)", "exit status 3"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "killed by SIGKILL"),
        ("import ctypes; ctypes.string_at(0)", "killed by SIGSEGV"),
        ("print('nothing to say')", "printed no JSON object"),
        ("pass", "printed no JSON object"),
    ],
)
def test_a_failure_is_one_line(code, failure):
    assert run(code).result() == {"failure": failure}


def test_a_process_that_hangs_dies_with_those_that_it_started(dies):
    code = "import subprocess, time; print(subprocess.Popen(['sleep', '60']).pid, flush=True); time.sleep(60)"
    begun = time.monotonic()
    ended = run(code, seconds=1)
    assert ended.status is None and ended.failure.startswith("killed at its time box, after ")
    assert time.monotonic() - begun < 50
    assert dies(int(ended.out[0]))


@pytest.mark.parametrize("killed", [True, False])
def test_a_process_within_a_process_dies_with_the_outer_one(killed, dies, tmp_path):
    """At its time box, and where what is between is killed: the GPU that it holds is free for the next step."""
    file = tmp_path / "pid"
    inner = f"""import os, pathlib, signal, time
pathlib.Path({str(file)!r}).write_text(str(os.getpid()))
if {killed}: os.kill(os.getppid(), signal.SIGKILL)
time.sleep(60)"""
    ended = run(f"from bench import process; process.run(['-c', {inner!r}])", seconds=30 if killed else 1.5)
    assert ended.status == (-signal.SIGKILL if killed else None)
    assert dies(int(file.read_text()))


def test_one_that_ends_leaves_nothing_behind(dies):
    code = "import subprocess; print(subprocess.Popen(['sleep', '60'], stdout=-3, stderr=-3).pid)"
    ended = run(code)
    assert ended.status == 0 and dies(int(ended.out[0]))


def test_a_flood_of_output_is_read_and_its_end_kept(tmp_path):
    """More than a pipe holds, on both; nobody waits."""
    code = "import sys\nfor i in range(9000): print('out', i); print('err', i, file=sys.stderr)"
    ended = run(code, seconds=60, log=tmp_path / "log.txt")
    assert ended.status == 0 and len(ended.out) == len(ended.err) == process.LINES
    assert ended.out[-1] == "out 8999" and ended.err[-1] == "err 8999"
    assert len((tmp_path / "log.txt").read_text().splitlines()) == 18000


def test_a_log_takes_the_beginning_and_the_end_of_a_flood(tmp_path, monkeypatch):
    monkeypatch.setattr(process, "LOG_CHARACTERS", 100)
    monkeypatch.setattr(process, "LINE_CHARACTERS", 50)
    run("print('first'); print('x' * 1000); print('last')", log=tmp_path / "log.txt")
    lines = (tmp_path / "log.txt").read_text().split("...\n")
    assert lines[0].startswith("first\nxxx") and len(lines[0]) < 200
    assert lines[1].endswith("\nlast\n") and lines[1].count("x") == 1000


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_log_without_room_costs_the_log_alone():
    assert run("print('{\"value\": 1}')", log=Path("/dev/full")).result() == {"value": 1}


def test_variables_are_added_to_its_own(monkeypatch):
    monkeypatch.setenv("FLUX_OURS", "1")
    code = "import os; print(os.environ['FLUX_OURS'], os.environ['FLUX_MORE'])"
    assert run(code, env={"FLUX_MORE": "2"}).out == ["1 2"]
