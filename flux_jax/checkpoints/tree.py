"""The files of a checkpoint, and nothing beyond: what its manifest and its links name lies in its own folder.

In: a checkpoint's directory, and paths that a stranger may have written. Out: paths and files that are safe to open:
none leads out of the checkpoint, none is a pipe or a device, which whoever opens them would wait for.
"""

import os
import stat
from pathlib import Path

from flux_jax.errors import UserError, shortened
from flux_jax.io.reading import LARGE, kind_of, leads_out, reason, unreadable

ARRAYS = "d"  # folders of the files in which arrays lie, of any size and read in parts
AGAIN = "copy or convert the checkpoint again"


def inside(directory: Path, relative: str, where: Path) -> Path:
    """The path of a folder of the checkpoint, whether it is there or not. UserError, which names the file `where` it
    stands, for one that leads out, by its name or by a link, and for what can be no path."""
    path = directory / relative
    if Path(relative).is_absolute() or ".." in Path(relative).parts or leads_out(directory, path):
        raise UserError(f"{where}: the path {shortened(relative)} leaves the checkpoint, which is refused")
    try:
        os.stat(path)
    except FileNotFoundError:
        pass
    except (OSError, ValueError) as error:
        raise UserError(f"{where}: the path {shortened(relative)} cannot be used ({reason(error)})") from error
    return path


def files(directory: Path, folder: Path) -> list[Path]:
    """Every file at or below a folder of the checkpoint, links followed, sorted. UserError for what is no file or
    folder, lies outside the checkpoint, cannot be looked at, or is large without holding arrays."""
    found, seen, todo = [], set(), [folder]
    while todo:
        path = todo.pop()
        if leads_out(directory, path):
            raise unreadable(path, "it leads out of the checkpoint, which is refused", AGAIN)
        try:
            about = os.stat(path)
            if stat.S_ISDIR(about.st_mode):
                if (key := (about.st_dev, about.st_ino)) not in seen:  # a link may lead to a folder above it
                    seen.add(key)
                    todo += path.iterdir()
                continue
        except (OSError, ValueError) as error:
            raise unreadable(path, reason(error), AGAIN) from error
        if not stat.S_ISREG(about.st_mode):
            raise unreadable(path, kind_of(about.st_mode), AGAIN)
        if about.st_size > LARGE and path.parent.name != ARRAYS:  # TensorStore reads it whole
            raise unreadable(path, f"it has more than {LARGE // 2**20} MiB", AGAIN)
        found.append(path)
    return sorted(found)
