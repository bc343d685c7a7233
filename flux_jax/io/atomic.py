"""Files and folders that appear under their names whole or not at all, each written by one process at a time.

In: bytes for a file; or a folder to fill, which then gets its name. Out: UserError in a sentence where something is in
the way, another process is writing the same, or the disk refuses; nothing half-written, also when the process is killed
between any two steps.

What is unfinished lies beside the name asked for, `.NAME.flux-partial`, so that one rename ends the work; what that
replaces is called `.NAME.flux-old` for a moment where the file system cannot exchange two names at once. Nobody else
uses such names: whatever has one was left by a process that was killed, and goes when the next one writes NAME. Which
is alive and which is dead tells a lock, on the unfinished file or, for a folder, on `.NAME.flux-lock`: the system lets
go of a process's locks when it ends. A link at NAME is followed: its target is written.
"""

import contextlib
import ctypes
import errno
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from flux_jax.errors import UserError
from flux_jax.io.locks import clear, exclusive, held
from flux_jax.io.places import beside, cannot_write, check_writable, disk_is_full, followed

PATIENCE = 20.0  # seconds that a file may be in another process's hands: it is written in far less
NO_REPLACE, EXCHANGE = 1, 2  # flags of renameat2(2)
UNKNOWN = (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP)  # this kernel or file system has no such thing


class WholeFolder:
    """A folder, `working` while it is filled, that gets its name by `publish`. A context manager: leaving it without
    that, by an error or an interruption, leaves nothing behind; an error of the system that stopped the writing, or of
    a library that met a full disk, leaves as a UserError.

    UserError where no folder can be made there; and on entering it where the name is taken, if not `overwrite`, or
    taken by something that is not `ours`: what that says of it, or None.
    """

    def __init__(self, folder: Path, *, overwrite: bool = False, ours: Callable[[Path], str | None] = lambda _: None):
        check_writable(folder, folder=True)
        self.folder, self.overwrite, self.ours = folder, overwrite, ours
        self.final = followed(folder)
        self.working = beside(self.final, "partial")
        self._held = contextlib.ExitStack()

    def check(self) -> None:
        """Raises the UserError that entering would raise now: before work whose result could not be kept."""
        if self.final.parent.is_dir():
            with self._ready():
                pass

    def __enter__(self) -> "WholeFolder":
        with contextlib.ExitStack() as held:
            try:
                self.final.parent.mkdir(parents=True, exist_ok=True)
                held.enter_context(self._ready())
                self.working.mkdir()
            except OSError as error:
                raise cannot_write(self.folder, error) from error
            self._held = held.pop_all()
        return self

    @contextlib.contextmanager
    def _ready(self) -> Iterator[None]:
        """The lock is held, nothing that a killed process left is in the way, and the name is free."""
        with exclusive(self.folder):
            clear(self.final)
            self._check_free()
            yield

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        with self._held:
            clear(self.final)
        if isinstance(error, Exception) and not isinstance(error, UserError):
            # An open file's errors do not say its name; those of files elsewhere do.
            ours = isinstance(error, OSError) and (error.filename is None or str(self.working) in str(error))
            if ours or disk_is_full(error):
                raise cannot_write(self.folder, error) from error

    def _check_free(self) -> None:
        if not os.path.lexists(self.final):
            return
        if not self.overwrite:
            raise UserError(f"{self.folder} exists already: choose another name, or give overwrite=True to replace it")
        if wrong := self.ours(self.final):
            raise UserError(f"{self.folder} {wrong}, so it is not overwritten: choose another name")

    def publish(self) -> None:
        """Brings the folder to the disk and gives it its name; one that had the name goes thereafter."""
        sync_tree(self.working)
        if not self.final.exists():
            os.rename(self.working, self.final)
        elif not _rename(self.working, self.final, EXCHANGE):
            os.rename(self.final, beside(self.final, "old"))
            os.rename(self.working, self.final)
        _sync(self.final.parent)


def write_whole(path: Path, data: bytes, *, overwrite: bool) -> None:
    """A file that appears complete under its name or not at all, also when the disk is full or the process killed."""
    check_writable(path)
    final = followed(path)
    working = beside(final, "partial")
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        with held(working, path, PATIENCE) as descriptor:
            with open(descriptor, "wb", closefd=False) as file:
                file.write(data)
                file.flush()
                os.fsync(descriptor)
            if overwrite:
                os.replace(working, final)
            elif not _rename(working, final, NO_REPLACE):
                os.link(working, final)  # fails where the name is taken, too
    except FileExistsError as error:
        raise UserError(f"{path} exists; choose another name, or pass overwrite=True to replace it.") from error
    except OSError as error:
        raise cannot_write(path, error) from error


def sync_tree(directory: Path) -> None:
    """fsync of every file and folder below, so that the rename that follows never names data that is not there."""
    for folder, _, files in os.walk(directory):
        for file in files:
            _sync(Path(folder) / file)
        _sync(Path(folder))


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _rename(source: Path, target: Path, flag: int) -> bool:
    """renameat2(2), which Python does not offer: NO_REPLACE fails where the target is there, EXCHANGE gives each the
    other's name in one step. False where the system cannot do that; OSError where it will not."""
    call = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if call is None:
        return False
    here = -100  # AT_FDCWD
    if call(here, os.fsencode(source), here, os.fsencode(target), flag) == 0:
        return True
    number = ctypes.get_errno()
    if number in UNKNOWN:
        return False
    raise OSError(number, os.strerror(number), str(source), None, str(target))
