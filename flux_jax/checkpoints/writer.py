"""Writes a checkpoint, weight by weight; it appears under its name when it is complete, hashed and on the disk.

In: a config, weights by outside name, tokenizers, further files. Out: the directory that
`flux_jax.checkpoints.checkpoint` describes, or nothing.
"""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx

from flux_jax.checkpoints import checksums
from flux_jax.checkpoints.manifest import MANIFEST, TOKENIZERS, VERSION, lined_json
from flux_jax.checkpoints.orbax_writer import OrbaxWriter
from flux_jax.config import FluxConfig
from flux_jax.errors import DISTRIBUTION
from flux_jax.io.atomic import WholeFolder
from flux_jax.models.params import leaves
from flux_jax.runtime.environment import version_of

PACKAGES = (DISTRIBUTION, "jax", "flax", "orbax-checkpoint", "numpy")


def save(
    directory: str | Path,
    config: FluxConfig,
    components: Mapping[str, nnx.Module],
    *,
    tokenizers: Path | None = None,
    overwrite: bool = False,
    **about: Any,
) -> Path:
    """Writes modules as a checkpoint, in their own dtypes; it appears under its name only when complete.

    tokenizers: a folder with t5/ and clip/ to copy. about: `quantization`, `source`, `licence`, as in `Writer.finish`.
    """
    with CheckpointWriter(directory, overwrite=overwrite) as writer:
        for component, module in components.items():
            for name, value in leaves(module):
                writer.add(component, name, value)
        writer.finish(config, tokenizers=tokenizers, **about)
    return Path(directory)


def no_checkpoint(folder: Path) -> str | None:
    """Why a checkpoint does not replace what is there; None where it is one, too."""
    return None if (folder / MANIFEST).is_file() else "is not a checkpoint"


class CheckpointWriter:
    """A checkpoint written weight by weight; what that takes of memory: `flux_jax.checkpoints.orbax_writer`.

    A context manager: leaving it without `finish`, by an error or an interruption, leaves nothing behind. The work is
    done in a `WholeFolder`. UserError on entering where the name is taken, or another process writes it.
    """

    def __init__(self, directory: str | Path, *, overwrite: bool = False):
        self.directory = Path(directory)
        self._folder = WholeFolder(self.directory, overwrite=overwrite, ours=no_checkpoint)
        self.working = self._folder.working
        self._tables: dict[str, dict[str, tuple[str, list[int]]]] = {}
        self._crcs: dict[str, dict[str, str]] = {}
        self._tree: OrbaxWriter | None = None  # of the component that is being written

    def __enter__(self) -> "CheckpointWriter":
        self._folder.__enter__()
        return self

    def __exit__(self, kind, error, trace) -> None:
        if self._tree is not None:
            self._tree.abandon()
        self._folder.__exit__(kind, error, trace)

    def add(self, component: str, name: str, value: np.ndarray) -> None:
        """The next weight (outside name, one layer). The weights of a component come one after the other."""
        if self._tree is None or component not in self._tables:
            self._end_part()
            self._tables[component], self._crcs[component] = {}, {}
            self._tree = OrbaxWriter(self.working / component)
        self._tables[component][name] = (value.dtype.name, list(value.shape))
        self._crcs[component][name] = checksums.crc(value)
        self._tree.add(name, value)

    def _end_part(self) -> None:
        if self._tree is not None:
            self._tree.close()

    def finish(
        self,
        config: FluxConfig,
        *,
        tokenizers: Path | None = None,
        quantization: dict[str, Any] | None = None,
        source: dict[str, Any] | None = None,
        licence: str | None = None,
        files: Mapping[str, bytes] | None = None,
    ) -> None:
        """Writes the manifest, brings everything to the disk and gives the directory its name.

        tokenizers: a folder with t5/ and clip/ (copied, unless it is `working`/tokenizers already); source: where it
        came from ({"from": ..., "sha256": {file: hash}}); licence: its SPDX name; files: further files by name
        ("training/curve.png"), such as a licence text.
        """
        self._end_part()
        if tokenizers is not None and tokenizers != self.working / TOKENIZERS:
            shutil.copytree(tokenizers, self.working / TOKENIZERS)
        for name, content in (files or {}).items():
            (self.working / name).parent.mkdir(parents=True, exist_ok=True)
            (self.working / name).write_bytes(content)
        manifest = {
            "format": "flux_jax checkpoint",
            "version": VERSION,
            "name": config.name,
            "licence": licence,
            "configs": config.to_json(),
            "quantization": quantization,
            "source": source,
            "versions": {package: version_of(package) for package in PACKAGES},
            "tokenizers": None if tokenizers is None else TOKENIZERS,
            "parts": {component: {"path": component, "weights": table} for component, table in self._tables.items()},
        }
        (self.working / MANIFEST).write_text(lined_json(manifest) + "\n")
        (self.working / checksums.CRCS).write_text(lined_json(self._crcs) + "\n")
        for note in self.working.glob("*/commit_success.txt"):  # Orbax names a folder of this machine in it
            note.write_text("Checkpoint commit was successful\n")
        checksums.write(self.working)
        self._folder.publish()
