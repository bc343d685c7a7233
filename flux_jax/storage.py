"""Directories and trees on disk, for whatever is written whole or not at all.

In: a finished working directory, to be brought to the disk and given its name; weights by dotted name, for a tree.
"""

import errno
import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flux_jax.errors import UserError

MARK = ".flux_jax_partial"  # in an unfinished directory of ours: it may be deleted


def nest(flat: Mapping[str, Any]) -> dict[str, Any]:
    """{"a.b": x} -> {"a": {"b": x}}"""
    tree: dict[str, Any] = {}
    for name, value in flat.items():
        *parents, last = name.split(".")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = value
    return tree


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The inverse of `nest`."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat


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


def lined_json(value: Any, indent: str = "") -> str:
    """JSON with a line for each entry of an object and lists kept on theirs, so that a weight is a line."""
    if not isinstance(value, Mapping) or not value:
        return json.dumps(value)
    inner = indent + "  "
    rows = ",\n".join(f"{inner}{json.dumps(key)}: {lined_json(item, inner)}" for key, item in value.items())
    return f"{{\n{rows}\n{indent}}}"
