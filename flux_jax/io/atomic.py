"""Files and directories that appear under their names whole or not at all.

In: bytes for a file; or a finished working directory, to be brought to the disk and given its name. Out: UserError in a
sentence where something is in the way or the disk refuses; nothing half-written, also when the process is killed.
"""

import contextlib
import errno
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from flux_jax.errors import UserError

MARK = ".flux_jax_partial"  # in an unfinished directory of ours: it may be deleted


def working_name(final: Path) -> Path:
    """Where a directory is written before it gets its name: beside it, so that a rename is enough."""
    return final.with_name(final.name + ".partial")


def begin(working: Path) -> None:
    """An empty working directory; one left by a crash is deleted. UserError where another's is in the way."""
    if working.exists() and not (working / MARK).is_file():
        raise UserError(f"{working} is in the way and not ours: move it elsewhere")
    shutil.rmtree(working, ignore_errors=True)
    try:
        working.mkdir(parents=True)
        (working / MARK).touch()
    except OSError as error:
        raise UserError(f"cannot write {working}: {error.strerror}") from error


def publish(working: Path, final: Path) -> None:
    """Brings a complete working directory to the disk and gives it its name; one that had the name goes thereafter."""
    (working / MARK).unlink()
    sync_tree(working)
    old = final.with_name(final.name + ".old")
    if final.exists():
        os.rename(final, old)
    os.rename(working, final)
    _sync(final.absolute().parent)
    shutil.rmtree(old, ignore_errors=True)


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


def disk_is_full(error: BaseException) -> bool:
    """True for the operating system's error, and for TensorStore's, which carries it as text."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return True
    return bool(re.search(r"No space left|ENOSPC|Disk quota exceeded|File too large", str(error)))


def write_whole(path: Path, data: bytes, *, overwrite: bool) -> None:
    """A file that appears complete under its name or not at all, also when the disk is full or the process killed."""
    check_writable(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _temporary(path.parent) as (descriptor, temporary):
            with os.fdopen(descriptor, "wb") as file:
                file.write(data)
            os.chmod(temporary, 0o666 & ~_umask())
            if overwrite:
                os.replace(temporary, path)
            else:
                _publish_new(temporary, path)
    except FileExistsError as error:
        raise UserError(f"{path} exists; choose another name, or pass overwrite=True to replace it.") from error
    except OSError as error:
        raise UserError(f"Cannot write {path}: {error.strerror or error}.") from error


def check_writable(path: Path) -> None:
    """Raises UserError if no file can be made at `path`, as far as that can be known before trying."""
    folder = next(parent for parent in path.absolute().parents if parent.exists())
    if not folder.is_dir():
        raise UserError(f"Cannot write {path}: {folder} is not a folder.")
    if path.is_dir():
        raise UserError(f"Cannot write {path}: it is a folder.")
    if not os.access(folder, os.W_OK):
        raise UserError(f"Cannot write {path}: no permission to write in {folder}.")


@contextlib.contextmanager
def _temporary(folder: Path) -> Iterator[tuple[int, str]]:
    descriptor, name = tempfile.mkstemp(prefix=".flux-", suffix=".part", dir=folder)
    try:
        yield descriptor, name
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name)


def _publish_new(temporary: str, path: Path) -> None:
    """Rename that fails where `path` exists: a hard link is the portable way to ask for that in one operation."""
    try:
        os.link(temporary, path)
    except FileExistsError:
        raise
    except OSError:  # a file system without hard links
        if path.exists():
            raise FileExistsError(path) from None
        os.replace(temporary, path)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
