"""What is wrong with the weights of a checkpoint: their names, shapes, dtypes and size before they are read, then
contents.

In: tables of what a manifest says, of what a module needs and of what lies in the files; weights, or shards of them.
Out: a line for each fault; MemoryError for what is larger than the memory it would lie in; ValueError for codes and
scales that no ternary layer can have.
"""

import math
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.sharding import Sharding

from flux_jax.checkpoints.manifest import MANIFEST
from flux_jax.models.params import FIXED, layer_names, leaf_of, target_dtype
from flux_jax.runtime import memory
from pallas_kernels import packed_width, validate

CODES = 4  # in a byte
Table = Mapping[str, tuple[np.dtype, tuple[int, ...]]]  # outside name -> dtype and shape, as stored


def stored_bytes(table: Table, name: str) -> int:
    dtype, shape = table[name]
    return math.prod(shape) * dtype.itemsize


def faults_of_table(table: Table, needed: Mapping[str, tuple[int, ...]]) -> list[str]:
    """The manifest's table against the shapes that a module needs."""
    faults = [f"missing: {name} {list(shape)}" for name, shape in needed.items() if name not in table]
    faults += [f"unknown: {name}" for name in table if name not in needed]
    kinds: dict[str, np.dtype] = {}  # of the leaves that layers are stacked in: each has one dtype
    for name, (dtype, shape) in table.items():
        if name in needed and shape != needed[name]:
            faults.append(f"wrong shape: {name} is {list(shape)}, must be {list(needed[name])}")
        fixed = FIXED.get(name.rpartition(".")[2])
        if dtype != fixed if fixed is not None else not jnp.issubdtype(dtype, jnp.floating):
            faults.append(f"wrong dtype: {name} is {dtype}, must be {fixed or 'floating'}")
        elif dtype != (first := kinds.setdefault(leaf_of(name), dtype)):
            faults.append(f"wrong dtype: {name} is {dtype}, and the same of another layer {first}: it must be one")
    return faults


def faults_of_files(table: Table, stored: Table) -> list[str]:
    """The manifest's table against that of Orbax's own metadata."""
    faults = [f"missing in the files: {name}" for name in table if name not in stored]
    faults += [f"in the files, but not in {MANIFEST}: {name}" for name in stored if name not in table]
    for name, (dtype, shape) in table.items():
        if name in stored and stored[name] != (dtype, shape):
            files = f"{stored[name][0]} {list(stored[name][1])} in the files"
            faults.append(f"wrong dtype or shape: {name} is {files}, {dtype} {list(shape)} in {MANIFEST}")
    return faults


def check_room(table: Table, leaves: Mapping[str, tuple[int, ...]], places: Mapping[str, Sharding], dtype: Any) -> None:
    """MemoryError where the shards of a module's leaves, path -> shape, are more than a device has free."""
    needed: dict[Any, int] = {}
    for leaf, shape in leaves.items():
        names = layer_names(leaf, shape[0] if shape else 0)
        for name in [leaf] if names is None else names[:1]:
            itemsize = jnp.dtype(target_dtype(leaf, table[name][0], dtype)).itemsize
            for device in places[leaf].addressable_devices:
                needed[device] = needed.get(device, 0) + math.prod(places[leaf].shard_shape(shape)) * itemsize
    for device, nbytes in needed.items():
        check_free(nbytes, device)


def check_free(nbytes: int, device: Any = None) -> None:
    """MemoryError where the device, or the host where it is None, has less memory free than that."""
    free = memory.host_memory("MemAvailable") if device is None else memory.free(device)
    if free is not None and nbytes > free:
        raise MemoryError(f"{nbytes / 1e9:.1f} GB needed, {free / 1e9:.1f} GB free")


def check_ternary(kind: str, value: np.ndarray, columns: int) -> None:
    """ValueError for codes (kind "packed") that are none, and for scales and biases that are not finite.

    value: all of it, or a shard; one that is cut across its rows must hold whole tiles of codes, and is not looked at
    for what lies behind the last of the `columns`."""
    if kind == "packed":
        validate(value, columns if value.shape[-1] == packed_width(columns) else CODES * value.shape[-1])
    elif not np.isfinite(value).all():
        raise ValueError(f"{kind} {list(value.shape)} holds NaN or infinity")
