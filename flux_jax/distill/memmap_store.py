"""Equally long arrays on disk, too many for memory: written row by row, whole under their name or not there at all.

In: names with shapes and dtypes, then rows. Out: `FOLDER/<name>.bin` (raw) and `FOLDER/arrays.json`, read as memory
maps, so that a batch costs the reading of its rows only. UserError in a sentence where a store is not what was written:
a map of a file that is too short would end the process without a word.
"""

import contextlib
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import jax
import jax.numpy as jnp
import numpy as np

from flux_jax.errors import UserError
from flux_jax.io import atomic, places, reading
from flux_jax.training import mesh

TABLE = "arrays.json"
Layout = Mapping[str, tuple[tuple[int, ...], Any]]


def bytes_of(layout: Layout) -> int:
    return sum(math.prod(shape) * jnp.dtype(dtype).itemsize for shape, dtype in layout.values())


class StoreWriter:
    """The folder while it is written: by the leading process alone, but every process must call `finish`.

    A context manager: leaving it without `finish` leaves nothing behind. What has the name already is replaced: a run
    writes a store again only where another one that belongs to it was lost. UserError where it cannot be written.
    """

    def __init__(self, folder: Path, layout: Layout):
        self.folder, self.layout = folder, layout
        self.lead = jax.process_index() == 0
        self._held = contextlib.ExitStack()
        self._files: dict[str, BinaryIO] = {}

    def __enter__(self) -> "StoreWriter":
        if not self.lead:
            return self
        with contextlib.ExitStack() as held:
            self._whole = held.enter_context(atomic.WholeFolder(self.folder, overwrite=True))
            table = {name: [list(shape), jnp.dtype(dtype).name] for name, (shape, dtype) in self.layout.items()}
            (self._whole.working / TABLE).write_text(json.dumps(table) + "\n")
            for name, entry in self.layout.items():
                file = held.enter_context((self._whole.working / f"{name}.bin").open("wb"))
                file.truncate(bytes_of({name: entry}))
                self._files[name] = file
            self._held = held.pop_all()
        return self

    def __exit__(self, *error: Any) -> None:
        self._held.__exit__(*error)

    def write(self, start: int, rows: Mapping[str, np.ndarray]) -> None:
        """Rows from number `start` on, of every array."""
        for name, value in rows.items() if self.lead else ():  # to files: to a map a full disk is a signal, no error
            shape, dtype = self.layout[name]
            self._files[name].seek(start * bytes_of({name: (shape[1:], dtype)}))
            self._files[name].write(np.ascontiguousarray(value, dtype).reshape(-1).view(np.uint8).data)

    def finish(self) -> None:
        """Brings everything to the disk and gives the folder its name."""
        if self.lead:
            for file in self._files.values():
                file.close()
            self._whole.publish()
        mesh.barrier(f"store {self.folder.name}")


def save(folder: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """A store of arrays that are there already, of any lengths."""
    with StoreWriter(folder, {name: (value.shape, value.dtype) for name, value in arrays.items()}) as writer:
        writer.write(0, arrays)
        writer.finish()


def open_store(folder: Path, *needed: str) -> dict[str, np.memmap]:
    """The arrays of a store by name, to be read. UserError where one that is `needed` or a file is missing, or a file
    is of another size than it was."""
    remedy = "delete its folder, and the same call makes it again"
    arrays = {}
    for name, entry in reading.read_object(folder / TABLE, remedy=remedy).items():
        file = folder / f"{name}.bin"
        try:
            shape, dtype = tuple(entry[0]), jnp.dtype(entry[1])
            if file.parent != folder or not jnp.issubdtype(dtype, jnp.number):
                raise ValueError(entry)
            if not shape or any(type(length) is not int or length < 1 for length in shape):
                raise ValueError(entry)
        except (TypeError, ValueError, LookupError) as error:
            raise UserError(f"{folder / TABLE} is damaged: {remedy}.") from error
        written = bytes_of({name: (shape, dtype)})
        if (found := reading.check_regular(file, remedy=remedy).st_size) != written:
            raise UserError(f"{file} has {found} bytes, and {written} were written: {remedy}.")
        arrays[name] = np.memmap(file, dtype, "r", shape=shape)
    if lacking := [name for name in needed if name not in arrays]:
        raise UserError(f"{folder / TABLE} lacks {lacking[0]}: {remedy}.")
    return arrays


def remove(folder: Path) -> None:
    """Deletes a folder, if it is there; one that is half deleted has no name that anything reads, and goes with what
    else was left unfinished."""
    mesh.barrier(f"remove {folder.name}")
    if jax.process_index() == 0:
        gone = places.beside(folder, "partial")
        places.remove(gone)
        if folder.exists():
            os.rename(folder, gone)
            places.remove(gone)
