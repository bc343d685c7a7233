"""Hashes of a checkpoint, so that a byte lost on the way is found before it becomes a picture.

In: a checkpoint's directory. Out: its `SHA256SUMS`, a line for each other file, as `sha256sum -c` reads it too, and its
`crc32.json`, a number for each weight; or, on checking, one sentence with the files that are not what they were.

Hashing every file takes about as long as reading it, so that is done when it is asked for (`check`). What each loading
checks are the small files that say how the others are read (`compare`), and each weight that comes to the host (`crc`).
"""

import hashlib
import os
import re
import zlib
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from flux_jax.checkpoints.manifest import MANIFEST, read_manifest
from flux_jax.checkpoints.tree import AGAIN, files, inside, leads_out
from flux_jax.errors import UserError, shortened
from flux_jax.io.reading import check_regular, read_object, read_text, reason, unreadable

SUMS = "SHA256SUMS"
CRCS = "crc32.json"
SHOWN = 3  # files named before "and N more"

Sums = Mapping[str, str]  # name of a file, as in the list -> SHA-256


def digest(file: Path) -> str:
    """SHA-256 in hexadecimal digits. UserError for what is no file that can be read."""
    check_regular(file)
    try:
        with open(file, "rb") as opened:
            return hashlib.file_digest(opened, "sha256").hexdigest()
    except OSError as error:
        raise unreadable(file, reason(error)) from error


def digests(paths: Iterable[Path]) -> list[str]:
    """Of several files, on all cores: hashing lets other threads run."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(digest, paths))


def crc(value: np.ndarray) -> str:
    """CRC-32 of an array's bytes, row by row, in hexadecimal digits."""
    return f"{zlib.crc32(np.ascontiguousarray(value).reshape(-1).view(np.uint8)):08x}"


def write(directory: Path) -> None:
    """Writes the sums of every file in the directory, sorted by name."""
    paths = sorted(file for file in directory.rglob("*") if file.is_file() and file != directory / SUMS)
    lines = zip(digests(paths), paths, strict=True)
    (directory / SUMS).write_text("".join(f"{sha}  {file.relative_to(directory).as_posix()}\n" for sha, file in lines))


def recorded(directory: Path) -> dict[str, str] | None:
    """What `SHA256SUMS` says; None where there is none. UserError for one that is damaged, or empty."""
    path = directory / SUMS
    if not os.path.lexists(path):
        return None
    damaged = UserError(f"{path} is damaged; {AGAIN}.")
    if leads_out(directory, path):
        raise damaged
    found: dict[str, str] = {}
    for line in read_text(path, remedy=AGAIN).replace("\r\n", "\n").removesuffix("\n").split("\n"):
        entry = re.fullmatch(r"([0-9a-f]{64}) [ *](.+)", line)
        if not entry or entry[2] in found or Path(entry[2]).is_absolute() or ".." in Path(entry[2]).parts:
            raise damaged
        found[entry[2]] = entry[1]
    return found


def compare(directory: Path, sums: Sums | None, paths: Sequence[Path]) -> None:
    """UserError where small files, which were read or will be, are not what the sums say; no sums: nothing to do."""
    if sums is None:
        return
    names = [path.relative_to(directory).as_posix() for path in paths]
    for name, path in zip(names, paths, strict=True):
        if name not in sums:
            raise UserError(f"{directory / SUMS} does not list {name}; {AGAIN}, or, if you added it, delete {SUMS}.")
        if digest(path) != sums[name]:
            raise UserError(
                f"{path} is not what was written; {AGAIN}, or, if you changed it yourself, delete {SUMS} beside it."
            )


def read_crcs(directory: Path, sums: Sums | None, tables: Mapping[str, Iterable[str]]) -> dict[str, dict[str, str]]:
    """Component -> weight -> `crc`; {} for a checkpoint of before they were written. tables: the names of the weights
    of each component. UserError where the file is lost, damaged, or of other weights."""
    path = directory / CRCS
    if not os.path.lexists(path) and CRCS not in (sums or {}):
        return {}
    if leads_out(directory, path):
        raise UserError(f"{path} leads out of the checkpoint, which is refused")
    found = read_object(path, remedy=AGAIN)
    compare(directory, sums, [path])
    for component, names in tables.items():
        rows = found.get(component)
        if not isinstance(rows, dict) or rows.keys() != set(names):
            raise UserError(f"{path} does not list the weights of the {component}; {AGAIN}.")
        if not all(isinstance(row, str) and re.fullmatch("[0-9a-f]{8}", row) for row in rows.values()):
            raise UserError(f"{path} is damaged in the {component}; {AGAIN}.")
    return found


def check(directory: Path) -> int:
    """Compares every listed file with its sum; returns how many there are. UserError where one is missing, or not the
    same, where one that would be read is not listed, and where there are no sums."""
    if (sums := recorded(directory)) is None:
        raise UserError(f"{directory} has no {SUMS} to verify it by; convert it again.")
    faults, present = [], []
    for name in sums:
        path = directory / name
        try:
            check_regular(path)
        except UserError:
            faults.append(f"{name} is missing" if not os.path.lexists(path) else f"{name} is not a file to be read")
            continue
        if leads_out(directory, path):
            faults.append(f"{name} leads out of the checkpoint")
        else:
            present.append(name)
    found = digests(directory / name for name in present)
    faults += [f"{name} is not what was written" for name, sha in zip(present, found, strict=True) if sha != sums[name]]
    if not faults:
        names = [path.relative_to(directory).as_posix() for path in read_files(directory)]
        faults = [f"{shortened(name, quote=False)} is not listed in {SUMS}" for name in names if name not in sums]
    if faults:
        more = f", and {len(faults) - SHOWN} more" if len(faults) > SHOWN else ""
        raise UserError(f"{directory}: {', '.join(faults[:SHOWN])}{more}; {AGAIN}.")
    return len(sums)


def read_files(directory: Path) -> list[Path]:
    """Every file that reading the checkpoint may open, its sums apart."""
    manifest = read_manifest(directory)
    folders = [entry["path"] for entry in manifest["parts"].values()]
    folders += [] if manifest["tokenizers"] is None else [manifest["tokenizers"]]
    places = [inside(directory, folder, directory / MANIFEST) for folder in folders]
    single = [path for path in (directory / MANIFEST, directory / CRCS) if os.path.lexists(path)]
    return single + [file for place in places for file in files(directory, place)]
