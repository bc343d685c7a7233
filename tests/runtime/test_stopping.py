"""Ctrl-C and SIGTERM: one line, 130 or 143, and what was begun is cleared up; in this process and in others."""

import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from flux_jax.cli.main import guarded
from flux_jax.errors import UserError
from flux_jax.runtime import stopping

ROOT = Path(__file__).parents[2]
STATUS = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGHUP: 129}


@pytest.fixture(scope="module", autouse=True)
def heard():
    """No signal is ignored, though whoever started these tests, such as nohup, may have chosen that."""
    defaults = dict.fromkeys(STATUS, signal.SIG_DFL) | {signal.SIGINT: signal.default_int_handler}
    before = {number: signal.signal(number, handler) for number, handler in defaults.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize(("number", "status"), STATUS.items())
def test_a_signal_is_one_line_and_a_status_and_what_was_begun_is_cleared_up(number, status, capsys):
    before, cleared = {each: signal.getsignal(each) for each in STATUS}, []

    def run(argv):
        try:
            signal.raise_signal(number)
        finally:
            signal.raise_signal(number)  # the same once more, from whoever passes it on
            cleared.append(True)

    assert guarded(run, interrupted="Stopped.") == status
    assert cleared == [True]
    assert capsys.readouterr().err == "Stopped.\n"
    assert {each: signal.getsignal(each) for each in STATUS} == before


@pytest.mark.parametrize("error", [ImportError("numpy"), SystemError(), UserError("It failed."), SystemExit(1)])
def test_whatever_comes_out_behind_a_signal_is_its_doing(error, capsys):
    def run(argv):
        try:
            signal.raise_signal(signal.SIGTERM)
        except KeyboardInterrupt:
            raise error from None

    assert guarded(run) == 143
    assert capsys.readouterr().err == "Interrupted.\n"
    assert guarded(lambda argv: None) == 0  # the next one was not stopped
    with pytest.raises(ZeroDivisionError):
        guarded(lambda argv: 1 / 0)


def test_signals_that_others_handle_or_ignore_stay_theirs():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN), signal.signal(signal.SIGTERM, print)
    try:
        assert guarded(lambda argv: (signal.getsignal(signal.SIGINT), signal.raise_signal(signal.SIGINT))[0]) == 1
        assert guarded(lambda argv: signal.getsignal(signal.SIGTERM) is not print) == 0
    finally:
        signal.signal(signal.SIGINT, before[0])
        signal.signal(signal.SIGTERM, before[1])


def test_a_program_in_another_thread_leaves_signals_alone():
    before, found = signal.getsignal(signal.SIGTERM), []
    thread = threading.Thread(
        target=lambda: found.append(guarded(lambda argv: signal.getsignal(signal.SIGTERM) is not before))
    )
    thread.start()
    thread.join()
    assert found == [0]


PROGRAM = """
import atexit, os, signal, sys, threading, time
from flux_jax.runtime import stopping
stopping.TOGETHER = 0.2

def here(*numbers):
    for number in numbers:
        os.kill(os.getpid(), number)
        time.sleep(0.3)

MODE = os.environ["MODE"]
if MODE == "import":
    try:
        here(signal.SIGTERM)
    except BaseException:
        pass
    time.sleep(900)

class Destructor:
    def __del__(self):
        here(signal.SIGTERM)

def failing():
    time.sleep(0.5)
    1 / 0

def run(argv):
    if MODE == "swallowed":
        try:
            here(signal.SIGTERM)
        except BaseException:
            pass
    elif MODE == "destructor":
        Destructor()
    elif MODE == "twice":
        try:
            here(signal.SIGTERM)
        finally:
            time.sleep(0.3)
            here(signal.SIGINT)
            time.sleep(900)
    elif MODE == "thread":
        threading.Thread(target=failing).start()
        here(signal.SIGTERM)
    elif MODE == "outcome":
        atexit.register(here, signal.SIGTERM)
        return 7
    elif MODE == "joined":
        threading.Thread(target=time.sleep, args=(900,)).start()
        threading.Timer(0.3, here, [signal.SIGTERM]).start()
        return 7
    try:
        time.sleep(900)
    finally:
        print("cleared up")

def main(argv=None):
    from flux_jax.cli.main import guarded
    return guarded(run)
"""
ENDS = {  # status, stdout
    "import": (143, ""),
    "swallowed": (143, "cleared up\n"),
    "destructor": (143, "cleared up\n"),
    "twice": (143, ""),
    "thread": (143, ""),
    "outcome": (7, ""),
    "joined": (7, ""),
}


@pytest.fixture(scope="module")
def ended(tmp_path_factory):
    """Each mode of the program above in a process of its own, all at once: (exit status, stdout, stderr). One that does
    not end at once sleeps for longer than anybody waits."""
    folder = tmp_path_factory.mktemp("program")
    (folder / "stopped_program.py").write_text(PROGRAM)
    command = [sys.executable, "-c", "from flux_jax.cli.launch import launch; launch('stopped_program')"]
    paths = os.pathsep.join([str(ROOT), str(folder)])
    started = {}
    for mode in ENDS:
        environment = os.environ | {"MODE": mode, "PYTHONPATH": paths}
        started[mode] = subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
    found = {}
    for mode, process in started.items():
        out, err = process.communicate(timeout=300)
        found[mode] = process.returncode, out, err
    return found


@pytest.mark.parametrize("mode", ENDS)
def test_a_process_of_our_own_ends_at_once_or_when_all_is_cleared_up(mode, ended):
    status, out, err = ended[mode]
    assert (status, out) == ENDS[mode]
    assert err == ("Interrupted.\n" if status == 143 else "")


PROGRAMS = (
    ["-m", "flux_jax.generate", "a red circle", "-o", "a.png", "--seed", "1", "--steps", "2", "--quiet"],
    ["-m", "convert", "nano-bf16", "out", "--ternary", "--quiet"],
    ["-m", "flux_jax", "plan", "--model", "nano"],
)


def ready(pid: int) -> bool:
    """Whether the process handles SIGTERM, or has ended."""
    try:
        found = re.search(r"SigCgt:\s*(\w+)", Path(f"/proc/{pid}/status").read_text())
    except OSError:
        return True
    return found is None or bool(int(found[1], 16) >> (signal.SIGTERM - 1) & 1)


@pytest.mark.slow
@pytest.mark.parametrize("steps", range(0, 90, 7))
def test_programs_interrupted_at_any_moment_leave_one_line_and_nothing_else(steps, tmp_path):
    number, words = (signal.SIGINT, signal.SIGTERM)[steps // 3 % 2], PROGRAMS[steps % 3]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    process = subprocess.Popen(
        [sys.executable, *words],
        cwd=tmp_path,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    while not ready(process.pid):
        time.sleep(0.002)
    time.sleep(0.05 * steps)
    process.send_signal(number)
    _, err = process.communicate(timeout=100)
    if process.returncode == 0:  # it was done before
        return
    lines = err.splitlines()
    assert process.returncode == STATUS[number], err
    assert "nterrupted" in lines[-1]
    assert err.count("nterrupted") == 1
    assert "Traceback" not in err
    left = {path.name for path in tmp_path.iterdir()}
    assert left <= {"out"}  # which was complete, and is whole
    assert not left or (tmp_path / "out" / "SHA256SUMS").exists()


def test_the_exceptions_are_what_clears_up_behind_ctrl_c():
    assert all(issubclass(raised, KeyboardInterrupt) for raised in stopping.RAISED.values())
