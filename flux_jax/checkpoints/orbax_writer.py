"""A tree of weights on disk, written weight by weight: while some are compressed and written, the next are made.

In: weights by dotted name. Out: one Orbax v1 tree, complete when it is closed; each weight in chunks of `CHUNK_BYTES`,
so that whoever needs a part of it, a shard, reads about that part. In memory: the weights that are being written,
`FLUSH_BYTES`, those that wait, no more, and one weight.
"""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
from flax import traverse_util

from flux_jax.checkpoints.silence import silenced

FLUSH_BYTES = 2**28
CHUNK_BYTES = 2**22


class OrbaxWriter:
    """The tree at `path`, which must not exist yet. Whatever goes wrong in writing is raised by the next call."""

    def __init__(self, path: Path):
        self.path = path.absolute()
        self._held: dict[str, np.ndarray] = {}
        self._thread = ThreadPoolExecutor(1)
        self._writing: Future | None = None

    def add(self, name: str, value: np.ndarray) -> None:
        """The next weight, which nobody may change any more."""
        self._held[name] = value
        if sum(held.nbytes for held in self._held.values()) >= FLUSH_BYTES:
            self._flush()

    def close(self) -> None:
        """Brings the rest to the disk; a small tree is written at once."""
        from orbax.checkpoint import v1 as ocp

        if self._writing is None:
            self._write(ocp.save, self._held)
        else:
            if self._held:
                self._flush()
            self._writing.result()
            with silenced():
                ocp.partial.finalize(self.path)
        self._thread.shutdown()

    def abandon(self) -> None:
        """Waits until nothing is written any more, so that what is there can be deleted."""
        self._thread.shutdown(cancel_futures=True)

    def _flush(self) -> None:
        from orbax.checkpoint import v1 as ocp

        if self._writing is not None:
            self._writing.result()
        held, self._held = self._held, {}
        self._writing = self._thread.submit(self._write, ocp.partial.save, held)

    def _write(self, save: Callable, weights: dict[str, np.ndarray]) -> None:
        from orbax.checkpoint import v1 as ocp

        context = ocp.Context()
        context.memory.deepcopy_host_arrays = False  # nobody changes these arrays while they are written
        context.array.saving.storage_options.chunk_byte_size = CHUNK_BYTES
        with context, silenced():
            save(self.path, traverse_util.unflatten_dict(weights, sep="."))
