"""Checkpoints on disk: written whole or not at all, read only after everything about them has been checked.

    NAME/flux_jax.json                 format version, configs, quantization, source, licence, versions, weights' table
    NAME/{transformer,t5,clip,vae}/    an Orbax v1 tree each, a leaf per weight and layer (see `flux_jax.models.params`)
    NAME/tokenizers/{t5,clip}/         the tokenizers' own files
    NAME/crc32.json                    a number for each weight, compared as it is read
    NAME/SHA256SUMS                    the hash of every other file (see `flux_jax.checkpoints.checksums`)

In: a directory or an alias. Out: `Checkpoint`, whose `load` gives one component as an NNX module on the devices asked
for. The arrays are stored as numpy arrays, so nothing in the files speaks of devices, and `orbax.checkpoint.v1.load`
reads a component without this package. Version first, then each name, shape and dtype of the manifest and of Orbax's
own metadata, and only then arrays: Orbax would cast a wrong dtype without a word. Nothing outside the
checkpoint's own folder is opened: it may be a stranger's.

In a quantized checkpoint each ternary layer of the transformer has `.packed` (uint8) and `.scale` (float32) where it
had `.weight`, and the manifest has an entry `quantization` (see `flux_jax.checkpoints.manifest`).
"""

import functools
import importlib.resources
import os
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx, traverse_util
from jax.sharding import NamedSharding

from flux_jax.checkpoints import checksums, integrity, sharded_restore, tree
from flux_jax.checkpoints.manifest import MANIFEST, check_layers, read_manifest, with_activations
from flux_jax.checkpoints.silence import silenced
from flux_jax.config import FluxConfig
from flux_jax.errors import UserError, shortened
from flux_jax.io.reading import reason
from flux_jax.models.params import Placement, abstract_component, assemble, batches, dotted, leaf_table, placement_of
from flux_jax.models.quantize import abstract_ternary, ternary_paths
from flux_jax.runtime import memory

READ_BYTES = 2**28  # weights held at a time by `stream`
DEFAULT_MODEL = "nano"
ALIASES = {  # name -> folder in the package's data
    "nano": "nano-1.58bit",
    "nano-1.58bit": "nano-1.58bit",
    "nano-bf16": "nano-bf16",
}


def resolve(name: str | Path) -> Path:
    """A checkpoint's directory: a path, or an alias for one in the package. UserError (exit code 3) where there is
    none."""
    if str(name) in ALIASES:
        return Path(str(importlib.resources.files("flux_jax"))) / "nano" / "data" / ALIASES[str(name)]
    wrong = ""
    try:
        if stat.S_ISDIR(os.stat(name).st_mode):
            return Path(name)
        wrong = " (it is not a folder)"
    except FileNotFoundError:
        pass
    except (OSError, ValueError) as error:  # ValueError: no such path can be
        wrong = f" ({reason(error)})"
    known = ", ".join(sorted(ALIASES))
    what = f"no checkpoint {shortened(str(name))}{wrong}"
    raise UserError(f"{what}: give a directory made by 'python -m convert', or one of: {known}", 3)


def is_checkpoint(name: str | Path) -> bool:
    """Whether `Checkpoint.open` would find a manifest there."""
    return str(name) in ALIASES or os.path.isfile(Path(name) / MANIFEST)


class Checkpoint:
    """An opened checkpoint: `config`, `manifest`, and `load(component)`. Opening reads the manifest only."""

    def __init__(self, directory: Path, manifest: dict[str, Any], config: FluxConfig):
        self.directory, self.manifest, self.config = directory, manifest, config
        self._sound: set[str] = set()  # components whose files were found to be what the manifest says

    @classmethod
    def open(cls, name: str | Path) -> "Checkpoint":
        """A directory or an alias. UserError where it is no checkpoint, of a newer format, or damaged."""
        directory = resolve(name)
        manifest = read_manifest(directory)
        try:
            config = FluxConfig.from_json(manifest["configs"])
        except ValueError as error:
            raise UserError(f"{directory / MANIFEST}: {error}") from None
        check_layers(directory, manifest, config)
        tokenizers = [] if manifest["tokenizers"] is None else [manifest["tokenizers"]]
        for path in [*(entry["path"] for entry in manifest["parts"].values()), *tokenizers]:
            tree.inside(directory, path, directory / MANIFEST)
        stored = cls(directory, manifest, config)
        checksums.compare(directory, stored._sums, [directory / MANIFEST])
        return stored

    @property
    def components(self) -> tuple[str, ...]:
        return tuple(self.manifest["parts"])

    @functools.cached_property
    def digest(self) -> str:
        """SHA-256 of the manifest file, in hexadecimal: what a record tells this checkpoint from others by."""
        return checksums.digest(self.directory / MANIFEST)

    @functools.cached_property
    def _sums(self) -> checksums.Sums | None:
        return checksums.recorded(self.directory)

    @functools.cached_property
    def _crcs(self) -> dict[str, dict[str, str]]:
        parts = self.manifest["parts"]
        return checksums.read_crcs(self.directory, self._sums, {each: parts[each]["weights"] for each in parts})

    @property
    def quantization(self) -> dict[str, Any] | None:
        """What the manifest says about ternary weights; None for a checkpoint without them."""
        return self.manifest["quantization"]

    def using(self, activations: str | None) -> "Checkpoint":
        """The same, its ternary weights multiplied with activations of that kind, "bf16" or "int8"; None: of the kind
        that the manifest says. UserError for another kind, and for a checkpoint without ternary weights."""
        return Checkpoint(self.directory, with_activations(self.manifest, self.directory, activations), self.config)

    @property
    def tokenizers(self) -> Path:
        """The folder with t5/ and clip/. UserError if the checkpoint has none, or other ones than were written."""
        if self.manifest["tokenizers"] is None:
            raise UserError(f"{self.directory} has no tokenizers: convert it again with its tokenizers")
        folder = self.directory / self.manifest["tokenizers"]
        listed = {self.directory / name for name in self._sums or {} if folder in (self.directory / name).parents}
        checksums.compare(self.directory, self._sums, sorted(listed.union(tree.files(self.directory, folder))))
        return folder

    def table(self, component: str) -> dict[str, tuple[np.dtype, tuple[int, ...]]]:
        """Name -> dtype and shape of every stored weight of a component, from the manifest."""
        if component not in self.manifest["parts"]:
            raise UserError(
                f"{self.directory} has no {component}, only {', '.join(self.components) or 'no part at all'}"
            )
        rows = self.manifest["parts"][component]["weights"]
        return {name: (jnp.dtype(dtype), tuple(shape)) for name, (dtype, shape) in rows.items()}

    def load(
        self,
        component: str,
        dtype: Any = None,
        sharding: Placement = None,
        *,
        sections: sharded_restore.Sections = lambda path: (),
    ) -> nnx.Module:
        """One component as a module. dtype: None keeps the stored one, else floating weights are converted after
        reading, scales of ternary weights excepted.

        sharding: None (the default device), a `jax.sharding.Sharding`, a mesh to be replicated over, or a function of
        (path, shape) of each leaf. Over several devices each weight is restored straight into its shards: a process
        reads the parts of the files that its own shards lie in. sections: as in
        `flux_jax.checkpoints.sharded_restore.restore`.

        UserError where a weight is missing, unknown, or of another shape or dtype than the manifest or this version's
        module says: all of them in one message, and before any array is read; where a weight is not what was written,
        which is not known of shards over several devices; and where packed codes or their scales are damaged.
        MemoryError, in the form of a sentence, where it is larger than the free memory of a device, before it is read.
        """
        table, module = self.table(component), self.abstract(component)
        self._check(component, module)
        shapes = {dotted(path): variable.shape for path, variable in nnx.to_flat_state(nnx.state(module))}
        places = {leaf: placement_of(sharding, leaf, shape) for leaf, shape in shapes.items()}
        integrity.check_room(table, shapes, places, dtype)
        on_mesh = {leaf: place for leaf, place in places.items() if isinstance(place, NamedSharding)}
        if len(on_mesh) == len(places) and any(place.mesh.size > 1 for place in on_mesh.values()):
            read = functools.partial(self._restored, component)
            return sharded_restore.restore(module, table, read, places=on_mesh, dtype=dtype, sections=sections)
        return assemble(module, functools.partial(self.read, component), dtype=dtype, sharding=sharding)

    def abstract(self, component: str) -> nnx.Module:
        """The module that `load` fills, with shapes for arrays."""
        if self.quantization is None or component != "transformer":
            return abstract_component(component, self.config)
        return abstract_ternary(self.config, activations=self.quantization["activations"])

    def read(self, component: str, names: Iterable[str]) -> dict[str, np.ndarray]:
        """Some weights of a component by name, as stored, on the host. No other weight is read. UserError as for
        `load`."""
        table, names = self.table(component), set(names)
        if unknown := names - table.keys():
            raise UserError(f"{self.directory} has no {component} weights {shortened(sorted(unknown))}")
        self._check(component)
        integrity.check_free(sum(integrity.stored_bytes(table, name) for name in names))
        weights = self._orbax_load(component, {n: np.empty(s, d) for n, (d, s) in table.items() if n in names})
        written, ternary = self._crcs.get(component, {}), self._ternary(component)
        for name, value in weights.items():
            if name in written and checksums.crc(value) != written[name]:
                raise UserError(f"{self.directory}: {name} of the {component} is damaged, copy the checkpoint again")
            self._inspect(name, value, ternary)
        return weights

    def _orbax_load(self, component: str, wanted: Mapping[str, Any]) -> dict[str, Any]:
        """The named weights, each as the array or shape with sharding that is wanted; nothing else is read."""
        from orbax.checkpoint import v1 as ocp

        target = {name: wanted.get(name, ocp.PLACEHOLDER) for name in self.table(component)}
        tree = self._orbax(component, lambda path: ocp.load(path, traverse_util.unflatten_dict(target, sep=".")))
        return {name: value for name, value in traverse_util.flatten_dict(tree, sep=".").items() if name in wanted}

    def stream(self, component: str, names: Iterable[str]) -> Iterator[tuple[str, np.ndarray]]:
        """The named weights in that order, on the host, `READ_BYTES` (or one weight) at a time."""
        size = functools.partial(integrity.stored_bytes, self.table(component))
        for batch in batches(names, size, READ_BYTES):
            weights = self.read(component, batch)
            for name in batch:
                yield name, weights.pop(name)

    def _restored(self, component: str, wanted: dict[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
        """Weights restored into shardings, and a look at what this process's shards of ternary layers hold."""
        weights, ternary = self._orbax_load(component, wanted), self._ternary(component)
        for name, array in weights.items():
            if name.rpartition(".")[0] in ternary:
                for data in {str(shard.index): shard.data for shard in array.addressable_shards}.values():
                    self._inspect(name, np.asarray(data), ternary)
        return weights

    def _ternary(self, component: str) -> Mapping[str, tuple[int, int]]:
        """Path of each ternary layer of a component -> its weight's shape."""
        return ternary_paths(self.config) if component == "transformer" and self.quantization is not None else {}

    def _inspect(self, name: str, value: np.ndarray, ternary: Mapping[str, tuple[int, int]]) -> None:
        path, _, kind = name.rpartition(".")
        try:
            if path in ternary:
                integrity.check_ternary(kind, value, ternary[path][1])
        except ValueError as error:
            raise UserError(f"{self.directory}: {path} is damaged, copy the checkpoint again: {error}") from None

    def _check(self, component: str, module: nnx.Module | None = None) -> None:
        """The manifest's table against the module, then Orbax's metadata against the manifest; once a component."""
        from orbax.checkpoint import v1 as ocp

        if component in self._sound:
            return
        table = self.table(component)
        faults = integrity.faults_of_table(table, leaf_table(module or self.abstract(component)))
        if not faults:
            tree.files(self.directory, self._path(component))

            def stored(path: Path) -> dict[str, tuple[np.dtype, tuple[int, ...]]]:
                if not (found := ocp.metadata(path).metadata):
                    raise ValueError("its metadata is lost")
                flat: dict[str, Any] = traverse_util.flatten_dict(found, sep=".")
                return {name: (jnp.dtype(each.dtype), tuple(each.shape)) for name, each in flat.items()}

            faults = integrity.faults_of_files(table, self._orbax(component, stored))
        if faults:
            more = f"\n  - and {len(faults) - 20} more" if len(faults) > 20 else ""
            lines = "\n".join(f"  - {fault}" for fault in faults[:20])
            raise UserError(f"{self.directory}: the {component} cannot be loaded, {len(faults)} faults\n{lines}{more}")
        self._sound.add(component)

    def _path(self, component: str) -> Path:
        return self.directory / self.manifest["parts"][component]["path"]

    def _orbax(self, component: str, call: Callable[[Path], Any]) -> Any:
        """`call` on the component's Orbax tree; whatever a damaged tree raises becomes a sentence."""
        path = self._path(component).absolute()
        try:
            with silenced():
                return call(path)
        except Exception as error:  # Orbax and TensorStore raise many kinds, all meaning the same
            if memory.is_exhausted(error):
                raise
            raise UserError(f"{path} cannot be read, {tree.AGAIN}: {reason(error)}") from error
