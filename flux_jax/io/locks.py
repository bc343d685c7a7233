"""One process at a time writes a file or a folder, or works in one; what a killed process left unfinished goes.

In: a path. Out: a context in which it is ours alone; UserError, one sentence, where another process has it. The lock is
the system's, on a file of our own beside the path: it ends with its process, however that ends, and so tells what is
being written from what was left.
"""

import contextlib
import errno
import fcntl
import os
import re
import stat
import time
from collections.abc import Iterator
from pathlib import Path

from flux_jax.errors import UserError
from flux_jax.io.places import beside, cannot_write, check_writable, followed, remove

UNFINISHED = re.compile(r"\.(.+)\.flux-(?:partial|old|lock)")
NO_LOCKS = (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.ENOLCK)  # of a file system that has none


@contextlib.contextmanager
def exclusive(path: Path, patience: float = 0.0, called: Path | None = None) -> Iterator[None]:
    """One process, and one thread, at a time writes `path`, whose folder is there. UserError, which names what it is
    `called`, where another one still does after `patience` seconds. A file system without locks has none to offer:
    there it is up to the user."""
    with held(beside(followed(path), "lock"), called or path, patience):
        yield


@contextlib.contextmanager
def held(file: Path, path: Path, patience: float = 0.0) -> Iterator[int]:
    """The descriptor of an empty file of ours that only this thread holds, to write `path`; in the end it goes, if it
    still has its name."""
    until = time.monotonic() + patience
    while True:
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
        try:
            if _locked(descriptor) and _is_at(descriptor, file):
                found = os.fstat(descriptor)
                if stat.S_ISREG(found.st_mode) and found.st_size == 0 and found.st_nlink == 1:
                    break
                file.unlink()  # a killed process left it: half written, or linked to its whole file
                until = time.monotonic() + patience
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)
        if time.monotonic() > until:
            raise UserError(f"{path} is being written by another process: wait for it, or choose another name.")
        time.sleep(0.01)
    try:
        yield descriptor
    finally:
        if _is_at(descriptor, file):
            file.unlink()
        os.close(descriptor)


def _locked(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
    return True


def _is_at(descriptor: int, file: Path) -> bool:
    """Whether the open file still has that name: the one before may have removed it as we waited."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(file))
    except FileNotFoundError:
        return False


@contextlib.contextmanager
def alone(folder: Path) -> Iterator[None]:
    """One process at a time works in a folder, from beginning to end, and finds nothing there that one that was killed
    left unfinished. UserError where another one does, or the folder cannot be made; one that stays empty goes."""
    inside = folder / "all"  # not beside it: a folder in which nothing may be written can hold one in which all may
    check_writable(inside)
    with contextlib.ExitStack() as held:
        try:
            (final := followed(folder)).mkdir(parents=True, exist_ok=True)
            held.callback(_remove_empty, final)
            held.enter_context(exclusive(inside, called=folder))
        except OSError as error:
            raise cannot_write(folder, error) from error
        sweep(folder)
        yield


def _remove_empty(folder: Path) -> None:
    with contextlib.suppress(OSError):
        folder.rmdir()


def sweep(folder: Path) -> None:
    """Removes what killed processes left unfinished in a folder and below; what a living one writes stays."""
    for above, folders, files in os.walk(folder):
        ours = {name: found[1] for name in (*folders, *files) if (found := UNFINISHED.fullmatch(name))}
        folders[:] = [name for name in folders if name not in ours]
        for name in sorted(set(ours.values())):
            path = Path(above, name)
            partial = beside(path, "partial")
            with contextlib.suppress(UserError, OSError), exclusive(path):
                if partial.is_file():
                    with held(partial, path):
                        pass
                else:
                    clear(path)


def clear(path: Path) -> None:
    """Removes a folder that was left unfinished, for whoever holds its lock; one that was being replaced gets its name
    again."""
    old = beside(path, "old")
    if old.exists() and not path.exists():
        os.rename(old, path)
    for leftover in (beside(path, "partial"), old):
        remove(leftover)
