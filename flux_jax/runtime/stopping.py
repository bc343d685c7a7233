"""Ctrl-C and SIGTERM, whenever they come: one line, exit status 130 or 143, nothing left behind.

In: signals. Out: while a program runs (`caught`), KeyboardInterrupt or its kin Terminated in the main thread, so that
what was begun is cleared up. In a process of our own (`own_process`) the line and the end at once where nothing is
begun yet or all is decided already, and where a second signal shows that somebody does not want to wait for a compiler.
A signal that whoever started the process chose to ignore (nohup, a shell's background) stays ignored.
"""

import atexit
import contextlib
import logging
import os
import select
import signal
import sys
import threading
import time
import weakref
from collections.abc import Iterator
from types import FrameType
from typing import Any, NoReturn

from flux_jax.runtime.console import flush, say


class Interrupted(KeyboardInterrupt):
    """Ctrl-C."""


class Terminated(KeyboardInterrupt):
    """SIGTERM, or a terminal that went away: whoever clears up behind Ctrl-C does it here, too."""


RAISED = {signal.SIGINT: Interrupted, signal.SIGTERM: Terminated, signal.SIGHUP: Terminated}
TOGETHER = 1.0  # seconds: signals nearer to each other are one; wrappers pass on what the terminal has sent already
AGAIN = 0.05  # seconds until an exception that somebody caught and forgot is raised once more


class _State:
    running = False  # a program runs that wants to clear up
    first = 0  # the signal that stops it
    since = 0.0
    error: weakref.ref[KeyboardInterrupt] | None = None  # what was raised for it
    sentence = "Interrupted."
    said = False
    saying = threading.Lock()
    ours = False  # nothing else lives in this process
    outcome: int | None = None  # the exit status, once it is decided


_now = _State()


def stopped_by(error: BaseException | None = None) -> int:
    """The signal that stopped the program, 0 for none: whatever error comes out behind one is its doing, for
    extension modules turn the interruption into errors of their own."""
    if not _now.first and isinstance(error, KeyboardInterrupt):
        return signal.SIGTERM if isinstance(error, Terminated) else signal.SIGINT
    return _now.first


@contextlib.contextmanager
def caught(sentence: str) -> Iterator[None]:
    """Signals are exceptions inside, in the main thread; `sentence` is what `leave` says."""
    before = {} if _now.ours else _install()
    _now.first, _now.said, _now.sentence = 0, False, sentence
    try:
        _now.running = True
        yield
    finally:
        _now.running = False
        for number, handler in before.items():
            signal.signal(number, handler)


def speak() -> None:
    """Says the sentence, but once."""
    with _now.saying:
        if not _now.said:
            _now.said = True
            say(_now.sentence)


def leave(number: int) -> NoReturn:
    """The end at once: the sentence, and the signal's exit status."""
    speak()
    os._exit(128 + number)


def own_process() -> None:
    """Signals are ours in this process from here to its end; to be called before anything large is imported."""
    _now.ours = True
    _install()
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    threading.Thread(target=_watch, args=(reader,), daemon=True, name="signals").start()
    threading.excepthook = _thread_failed
    sys.unraisablehook = _destructor_failed
    atexit.register(_end)  # runs behind all that others register


def decided(status: int) -> NoReturn:
    """Ends the process of our own with that exit status. An interrupted one waits for no thread."""
    _now.outcome = status
    if _now.first:
        _end()
    sys.exit(status)


def _end() -> None:
    """Without the interpreter's own end, in which handlers are gone and extension modules speak, or crash."""
    if _now.outcome is not None:
        flush()
        os._exit(_now.outcome)


def _install() -> dict[int, Any]:
    """Handles the signals that nobody else does; returns what was there. Only the main thread can."""
    if threading.current_thread() is not threading.main_thread():
        return {}
    defaults = (signal.SIG_DFL, signal.default_int_handler)
    return {number: signal.signal(number, _raise) for number in RAISED if signal.getsignal(number) in defaults}


def _raise(number: int, frame: FrameType | None) -> None:
    """The handler, in the main thread, between two of its instructions."""
    if _now.outcome is not None:
        _end()
    now = time.monotonic()
    if _now.first and (_now.ours or now - _now.since < TOGETHER):
        return  # `_watch` sees to it
    if _now.running:
        _now.first, _now.since = number, now
        if _now.ours:
            logging.disable()  # libraries' threads find what they write to cleared up
        raise _error(number)


def _error(number: int) -> KeyboardInterrupt:
    error = RAISED[signal.Signals(number)]()
    _now.error = weakref.ref(error)  # `_raise` itself keeps no name of it: its frame would keep it alive
    return error


def _forgotten() -> bool:
    """Whether the exception is gone, the program goes on, and clears nothing up: C++ that calls Python, destructors and
    attempts at optional imports end some."""
    if not _now.running or _now.error is None or _now.error() is not None:
        return False
    return sys._current_exceptions().get(threading.main_thread().ident or 0) in (None, (None, None, None))


def _watch(reader: int) -> None:
    """Hears of signals at once, also while the main thread is in a compiler for minutes."""
    first, since = 0, 0.0
    while True:
        if not select.select([reader], [], [], AGAIN if first else None)[0]:
            if _now.first and _forgotten():
                number, first, _now.first, _now.error = first, 0, 0, None
                signal.pthread_kill(threading.main_thread().ident or 0, number)
            continue
        number, now = os.read(reader, 1)[0], time.monotonic()
        if number not in RAISED:
            continue
        if _now.outcome is not None:
            os._exit(_now.outcome)
        if not _now.running or (first and now - since >= TOGETHER):
            leave(first or number)
        if not first:
            first, since = number, now


def _thread_failed(failure: threading.ExceptHookArgs) -> None:
    """Threads fail when what they work on is cleared up."""
    if not _now.first:
        threading.__excepthook__(failure)


def _destructor_failed(failure: Any) -> None:
    """So do destructors."""
    if not _now.first:
        sys.__unraisablehook__(failure)
