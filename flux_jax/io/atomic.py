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
import fcntl
import hashlib
import os
import re
import shutil
import stat
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from flux_jax.errors import UserError

PATIENCE = 20.0  # seconds that a file may be in another process's hands: it is written in far less
NAME_BYTES = 255  # of a file's name, where the system does not say otherwise
NO_REPLACE, EXCHANGE = 1, 2  # flags of renameat2(2)
UNFINISHED = re.compile(r"\.(.+)\.flux-(?:partial|lock)")
UNKNOWN = (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP)  # this kernel or file system has no such thing


class WholeFolder:
    """A folder, `working` while it is filled, that gets its name by `publish`. A context manager: leaving it without
    that, by an error or an interruption, leaves nothing behind.

    UserError where no folder can be made there; and on entering it where the name is taken, if not `overwrite`, or
    taken by something that is not `ours`: what that says of it, or None.
    """

    def __init__(self, folder: Path, *, overwrite: bool = False, ours: Callable[[Path], str | None] = lambda _: None):
        check_writable(folder, folder=True)
        self.folder, self.overwrite, self.ours = folder, overwrite, ours
        self.final = followed(folder)
        self.working, self._old = beside(self.final, "partial"), beside(self.final, "old")
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
            self._clear()
            self._check_free()
            yield

    def __exit__(self, *_: object) -> None:
        with self._held:
            self._clear()

    def _check_free(self) -> None:
        if not os.path.lexists(self.final):
            return
        if not self.overwrite:
            raise UserError(f"{self.folder} exists already: choose another name, or give overwrite=True to replace it")
        if wrong := self.ours(self.final):
            raise UserError(f"{self.folder} {wrong}, so it is not overwritten: choose another name")

    def _clear(self) -> None:
        """Removes what was left unfinished; what was being replaced gets its name again."""
        if self._old.exists() and not self.final.exists():
            os.rename(self._old, self.final)
        for leftover in (self.working, self._old):
            remove(leftover)

    def publish(self) -> None:
        """Brings the folder to the disk and gives it its name; one that had the name goes thereafter. UserError where
        that cannot be done."""
        try:
            sync_tree(self.working)
            if not self.final.exists():
                os.rename(self.working, self.final)
            elif not _rename(self.working, self.final, EXCHANGE):
                os.rename(self.final, self._old)
                os.rename(self.working, self.final)
            _sync(self.final.parent)
        except OSError as error:
            raise cannot_write(self.folder, error) from error


def write_whole(path: Path, data: bytes, *, overwrite: bool) -> None:
    """A file that appears complete under its name or not at all, also when the disk is full or the process killed."""
    check_writable(path)
    final = followed(path)
    working = beside(final, "partial")
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        with _held(working, path, PATIENCE) as descriptor:
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


@contextlib.contextmanager
def exclusive(path: Path, patience: float = 0.0, called: Path | None = None) -> Iterator[None]:
    """One process, and one thread, at a time writes `path`, whose folder is there. UserError, which names what it is
    `called`, where another one still does after `patience` seconds. A file system without locks has none to offer:
    there it is up to the user."""
    with _held(beside(followed(path), "lock"), called or path, patience):
        yield


@contextlib.contextmanager
def _held(file: Path, path: Path, patience: float) -> Iterator[int]:
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
        if error.errno not in (*UNKNOWN, errno.ENOLCK):
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
                if partial.is_dir():
                    remove(partial)
                elif partial.exists():
                    with _held(partial, path, 0.0):
                        pass


def beside(path: Path, what: str) -> Path:
    """Our own name beside a path: of what is unfinished ("partial"), replaced ("old"), or of its "lock"."""
    name = path.name
    if len(os.fsencode(name)) > NAME_BYTES - 20:
        name = hashlib.sha256(os.fsencode(name)).hexdigest()
    return path.with_name(f".{name}.flux-{what}")


def followed(path: Path) -> Path:
    """The absolute path without links: where a file of that name is written."""
    return Path(os.path.realpath(path))


def remove(path: Path) -> None:
    """Deletes a file, a link or a folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def check_writable(path: Path, *, folder: bool = False) -> None:
    """Raises UserError if no file, or `folder`, can be made at `path`, as far as that can be known before trying: its
    names are too long, something else is there, or its folder cannot be written."""
    try:
        final = followed(path)
        if not final.name:
            raise UserError(f"Cannot write {path}: give the name of a file or folder.")
        above = next(parent for parent in final.parents if parent.exists())
        limit = os.pathconf(above, "PC_NAME_MAX") if above.is_dir() else NAME_BYTES
        for name in final.parts:
            if (length := len(os.fsencode(name))) > limit:
                raise UserError(
                    f"Cannot write {path}: {name[:20]}... is a name of {length} bytes, and {limit} are the most."
                )
        final.lstat()
    except FileNotFoundError:
        pass
    except (OSError, ValueError) as error:
        raise cannot_write(path, error) from error
    if not above.is_dir():
        raise UserError(f"Cannot write {path}: {above} is not a folder.")
    if final.exists() and (final.is_dir() if not folder else not final.is_dir()):
        raise UserError(f"Cannot write {path}: it is a {'file' if folder else 'folder'}.")
    if final.exists() and not (folder or final.is_file()):
        raise UserError(f"Cannot write {path}: it is a pipe or a device.")
    if not os.access(above, os.W_OK | os.X_OK):
        raise UserError(f"Cannot write {path}: no permission to write in {above}.")


def check_space(path: Path, needed: int, remedy: str = "free some space") -> None:
    """Raises UserError if the disk that `path` is on, or will be, has fewer than `needed` bytes free."""
    final = followed(path)
    there = next(each for each in (final, *final.parents) if each.exists())
    if (lacking := needed - shutil.disk_usage(there).free) > 0:
        raise UserError(
            f"{path} needs about {amount(needed)}, {amount(lacking)} more than its disk has free: {remedy}."
        )


def amount(size: int) -> str:
    """A number of bytes for people: in GB, or in MB or kB where it is small."""
    unit, name = next((each for each in ((1e9, "GB"), (1e6, "MB")) if size >= each[0]), (1e3, "kB"))
    return f"{size / unit:.1f} {name}"


def cannot_write(path: Path, error: Exception) -> UserError:
    """The sentence for a file or folder that the system refuses."""
    if disk_is_full(error):
        return UserError(f"Cannot write {path}: its disk is full; free some space. Nothing was left behind.")
    return UserError(f"Cannot write {path}: {getattr(error, 'strerror', None) or error}.")


def disk_is_full(error: BaseException) -> bool:
    """True for the operating system's error, and for TensorStore's, which carries it as text."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return True
    return bool(re.search(r"No space left|ENOSPC|Disk quota exceeded|File too large", str(error)))


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
