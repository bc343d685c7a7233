"""Kills a piece of work between any two of its steps on the disk, one after the other, and looks at what is left.

In: a class of a test module, with the static methods `work(folder)` and `whole(folder)` and, where something is there
before, `before(folder)`. For n = 1, 2, ... a process of its own does the work in a fresh folder and is killed (SIGKILL)
before the n-th step that changes something there: a file opened for writing, renamed, linked, removed, a folder made or
removed. `whole` then says what lies there, "old", "new" or "nothing", and raises where it is half of something; and the
same work, done once more, must end with "new" and leave no hidden file behind. That ends with the first n that the work
does not reach. Out: the number of steps that were tried.

The steps are seen by an audit hook (PEP 578), so that the code that is tested has no part in it. Every process is
forked from one that has imported everything and used nothing: a step costs milliseconds. Run as
`python tests/crash_windows.py MODULE CLASS FOLDER EVERY`; tests call `survive`.
"""

import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import traceback
import warnings
from pathlib import Path
from typing import Any

CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.symlink", "os.truncate"}


def survive(module: str, name: str, folder: Path, every: int = 1, timeout: int = 600) -> int:
    """The number of steps at which the work of a class in a test module (its `__file__`) was killed, and came through.
    every: only each N-th step, where all would take too long; CRASH_WINDOWS_EVERY=1 is all."""
    every = int(os.environ.get("CRASH_WINDOWS_EVERY", every))
    words = [sys.executable, __file__, module, name, str(folder / "crash"), str(every)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return int(done.stdout.split()[-1])


def is_step(event: str, arguments: tuple[Any, ...], folder: str) -> bool:
    """Whether an audit event is about to change something in the folder."""
    if event == "ctypes.dlsym":  # how renameat2(2) is called
        return arguments[1] == "renameat2"
    if event == "open":
        path, _, flags = arguments
        writes = isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        return bool(writes) and isinstance(path, str | bytes | os.PathLike) and os.fsdecode(path).startswith(folder)
    if event not in CHANGES:
        return False
    named = [os.fsdecode(each) for each in arguments if isinstance(each, str | bytes | os.PathLike)]
    return any(each.startswith(folder) or not os.path.isabs(each) for each in named)  # rmtree's are relative


def die_at(step: int, folder: Path) -> None:
    """From here on this process kills itself before its step of that number in the folder."""
    count, root = 0, str(folder)

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal count
        if is_step(event, arguments, root):
            count += 1
            if count == step:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def forked(function: Any, *arguments: Any) -> int:
    """The exit status of a process that calls the function: 0, 1 with a traceback, or minus the signal that ended
    it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # nothing of JAX runs yet
        child = os.fork()
    if child == 0:
        try:
            function(*arguments)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    return -os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)


def main(module: Path, name: str, folder: Path, every: int) -> int:
    spec = importlib.util.spec_from_file_location("crashing", module)
    assert spec is not None and spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    sys.modules["crashing"] = loaded  # pickles and dataclasses look there
    spec.loader.exec_module(loaded)
    tested = getattr(loaded, name)

    def dying(step: int) -> None:
        die_at(step, folder)
        tested.work(folder)

    def check() -> None:
        assert tested.whole(folder) == "new"
        assert not (left := sorted(folder.rglob(".*"))), left

    step = 1
    while True:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        if hasattr(tested, "before"):
            assert forked(tested.before, folder) == 0
        status = forked(dying, step)
        if status == 0:
            assert forked(check) == 0
            return step - 1
        assert status == -signal.SIGKILL, f"step {step}: exit status {status}"
        assert forked(tested.whole, folder) == 0, f"killed before step {step}: half a result"
        assert forked(tested.work, folder) == 0, f"killed before step {step}: the same work does not go on"
        assert forked(check) == 0, f"killed before step {step}, and done again: another result, or leftovers"
        step += every


if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
    print(main(Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3]), int(sys.argv[4])))
