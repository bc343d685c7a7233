"""Places to write at: the names that go with one, whether anything can be written there, and what the system says where
it cannot.

In: a path that somebody asked for. Out: UserError in a sentence before work whose result could not be kept: lengths are
counted in bytes, as file systems do, and links are followed, for what is written is their target.
"""

import contextlib
import errno
import hashlib
import os
import re
import shutil
import time
from pathlib import Path

from flux_jax.errors import UserError

NAME_BYTES = 255  # of a file's name, where the system does not say otherwise


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
        for pause in (0, 0.05, 0.1, 0.2, 0.4):  # a library's threads may still write to it, behind an interruption
            time.sleep(pause)
            shutil.rmtree(path, ignore_errors=True)
            if not path.exists():
                break
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
        if not above.is_dir():
            raise UserError(f"Cannot write {path}: {above} is not a folder.")
        limit = os.pathconf(above, "PC_NAME_MAX")
        for name in final.parts:
            if (length := len(os.fsencode(name))) > limit:
                raise UserError(
                    f"Cannot write {path}: {name[:20]}... is a name of {length} bytes, and {limit} are the most."
                )
        with contextlib.suppress(FileNotFoundError):
            final.lstat()
    except (OSError, ValueError) as error:
        raise cannot_write(path, error) from error
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
        return UserError(f"Cannot write {path}: its disk is full; free some space.")
    return UserError(f"Cannot write {path}: {getattr(error, 'strerror', None) or error}.")


def disk_is_full(error: BaseException) -> bool:
    """True for the operating system's error, and for TensorStore's, which carries it as text."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return True
    return bool(re.search(r"No space left|ENOSPC|Disk quota exceeded|File too large", str(error)))
