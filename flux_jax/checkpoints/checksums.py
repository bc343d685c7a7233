"""Hashes of a checkpoint's files, so that a byte lost on the way is found before it becomes a picture.

In: a checkpoint's directory. Out: its `SHA256SUMS`, a line for each other file, as `sha256sum -c` reads it too; or, on
checking, one sentence with the files that are not what they were.
"""

import hashlib
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from flux_jax.errors import UserError

SUMS = "SHA256SUMS"
SHOWN = 3  # files named before "and N more"


def digest(file: Path) -> str:
    """SHA-256 in hexadecimal digits."""
    with open(file, "rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def digests(files: Iterable[Path]) -> list[str]:
    """Of several files, on all cores: hashing lets other threads run."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(digest, files))


def write(directory: Path) -> None:
    """Writes the sums of every file in the directory, sorted by name; not of hidden ones: marks of work going on."""
    files = sorted(file for file in directory.rglob("[!.]*") if file.is_file() and file != directory / SUMS)
    lines = zip(digests(files), files, strict=True)
    (directory / SUMS).write_text("".join(f"{sha}  {file.relative_to(directory).as_posix()}\n" for sha, file in lines))


def check(directory: Path) -> int:
    """Compares every file with its sum; returns how many there are. UserError where one is missing, or not the same,
    and where there are no sums."""
    try:
        lines = (directory / SUMS).read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{directory} has no readable {SUMS} to verify it by; convert it again.") from error
    expected = {}
    for line in lines:
        sha, _, name = line.partition("  ")
        if len(sha) != 64 or not name or Path(name).is_absolute() or ".." in Path(name).parts:
            raise UserError(f"{directory / SUMS} is damaged; copy or convert the checkpoint again.")
        expected[name] = sha
    present = [name for name in expected if (directory / name).is_file()]
    found = dict(zip(present, digests(directory / name for name in present), strict=True))
    faults = [f"{name} is missing" for name in expected if name not in found]
    faults += [f"{name} is not what was written" for name in present if found[name] != expected[name]]
    if faults:
        more = f", and {len(faults) - SHOWN} more" if len(faults) > SHOWN else ""
        raise UserError(f"{directory}: {', '.join(faults[:SHOWN])}{more}; copy or convert the checkpoint again.")
    return len(expected)
