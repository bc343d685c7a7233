"""Equally long arrays on disk, too many for memory: written row by row, whole under their name or not there at all.

In: names with shapes and dtypes, then rows. Out: `FOLDER/<name>.bin` (raw) and `FOLDER/arrays.json`, read as memory
maps, so that a batch costs the reading of its rows only.
"""

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flux_jax.io import atomic
from flux_jax.training import mesh

TABLE = "arrays.json"
Layout = Mapping[str, tuple[tuple[int, ...], Any]]


def bytes_of(layout: Layout) -> int:
    return sum(int(np.prod(shape)) * jnp.dtype(dtype).itemsize for shape, dtype in layout.values())


class MemmapWriter:
    """The folder while it is written: by the leading process alone, but every process must call `finish`."""

    def __init__(self, folder: Path, layout: Layout):
        self.lead = jax.process_index() == 0
        self._whole = atomic.WholeFolder(folder)
        self.folder, self.working = folder, self._whole.working
        if self.lead:
            self._whole.__enter__()
            for name, entry in layout.items():
                with (self.working / f"{name}.bin").open("wb") as file:
                    file.truncate(bytes_of({name: entry}))
            table = {name: [list(shape), jnp.dtype(dtype).name] for name, (shape, dtype) in layout.items()}
            (self.working / TABLE).write_text(json.dumps(table) + "\n")
            self.arrays = _maps(self.working, "r+")

    def write(self, start: int, rows: Mapping[str, np.ndarray]) -> None:
        """Rows from number `start` on, of every array."""
        for name, value in rows.items() if self.lead else ():
            self.arrays[name][start : start + len(value)] = value

    def finish(self) -> None:
        """Brings everything to the disk and gives the folder its name."""
        if self.lead:
            for array in self.arrays.values():
                array.flush()
            self.arrays = {}
            self._whole.publish()
            self._whole.__exit__()
        mesh.barrier(f"store {self.folder.name}")


def save(folder: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """A store of arrays that are there already, of any lengths."""
    writer = MemmapWriter(folder, {name: (value.shape, value.dtype) for name, value in arrays.items()})
    writer.write(0, arrays)
    writer.finish()


def open_store(folder: Path) -> dict[str, np.memmap]:
    return _maps(folder, "r")


def _maps(folder: Path, mode: Any) -> dict[str, np.memmap]:
    table = json.loads((folder / TABLE).read_text())
    return {
        name: np.memmap(folder / f"{name}.bin", jnp.dtype(dtype), mode, shape=tuple(shape))
        for name, (shape, dtype) in table.items()
    }


def remove(folder: Path) -> None:
    """Deletes a folder, if it is there; one that is half deleted has no name that anything reads."""
    mesh.barrier(f"remove {folder.name}")
    if folder.exists() and jax.process_index() == 0:
        gone = folder.with_name(folder.name + ".old")
        shutil.rmtree(gone, ignore_errors=True)
        os.rename(folder, gone)
        shutil.rmtree(gone)
