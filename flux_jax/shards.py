"""Weights from the disk straight into their shards: no process reads or holds more of an array than its devices keep.

In: a module with shapes for arrays, the place of each leaf on a mesh, and `read`, which restores stored weights into
shardings (Orbax reads the chunks in which a process's own shards lie). Out: the module with its weights. A stacked leaf
is filled layer by layer, so that beside the leaves themselves only `GROUP_BYTES` of weights are on the devices at once.

Where a stored matrix joins several projections, a shard is not one piece of it but a share of each (`joined`): rows
are restored in the order of the files and then exchanged between devices, once.
"""

import functools
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from flux_jax.parts import dotted, layer_names, target_dtype
from flux_jax.soundness import Table

GROUP_BYTES = 2**30  # of stored weights that are read at a time, over all devices, if a single one is not larger

Read = Callable[[dict[str, jax.ShapeDtypeStruct]], Mapping[str, jax.Array]]
Joined = Callable[[str], tuple[int, ...]]  # path of a leaf -> lengths of what it joins along the axis that is cut


def restore(
    module: nnx.Module,
    table: Table,
    read: Read,
    *,
    place: Callable[[str, tuple[int, ...]], NamedSharding],
    dtype: Any = None,
    joined: Joined = lambda path: (),
) -> nnx.Module:
    """The abstract `module` with the weights of `table`. place: of (path, shape) of a leaf. dtype: as in
    `flux_jax.parts.assemble`. joined: the lengths, along the axis that is cut, of the projections in a leaf of which
    every shard gets a share; () for a leaf whose shards are its pieces in order."""
    definition, state = nnx.split(module)
    flat = dict(nnx.to_flat_state(state))
    places = {path: automatic(place(dotted(path), variable.shape)) for path, variable in flat.items()}
    filled: dict[tuple, jax.Array] = {}
    slots: dict[str, tuple[tuple, int | None]] = {}  # of a stored weight: its leaf, and its layer there
    for path, variable in flat.items():
        layers = layer_names(dotted(path), variable.shape[0] if variable.shape else 0)
        slots |= {dotted(path): (path, None)} if layers is None else {n: (path, i) for i, n in enumerate(layers)}
        if layers is not None:
            stored = table[layers[0]][0] if layers else variable.dtype  # a model may have no block of a kind
            like = target_dtype(dotted(path), stored, dtype)
            filled[path] = jnp.zeros(variable.shape, like, device=places[path])
    for group in groups(slots, table):
        wanted = {}
        for name in group:
            (path, layer), (stored, shape) = slots[name], table[name]
            spec = places[path].spec if layer is None else PartitionSpec(*places[path].spec[1:])
            where = NamedSharding(places[path].mesh, spec)
            wanted[name] = jax.ShapeDtypeStruct(shape, target_dtype(dotted(path), stored, dtype), sharding=where)
        weights = dict(read(wanted))
        for name in group:
            (path, layer), weight, parts = slots[name], weights.pop(name), joined(dotted(slots[name][0]))
            if parts:
                weight = by_shares(weight, parts, wanted[name].sharding)
            filled[path] = weight if layer is None else put_layer(filled[path], weight, np.int32(layer), places[path])
    leaves = [(path, v.replace(rewrapped(filled[path], place(dotted(path), v.shape)))) for path, v in flat.items()]
    return nnx.merge(definition, nnx.from_flat_state(leaves))


def groups(names: Mapping[str, Any], table: Table) -> Iterator[list[str]]:
    """The names, in order, in groups of at most `GROUP_BYTES`."""
    group, held = [], 0
    for name in names:
        dtype, shape = table[name]
        size = math.prod(shape) * dtype.itemsize
        if group and held + size > GROUP_BYTES:
            yield group
            group, held = [], 0
        group.append(name)
        held += size
    if group:
        yield group


def automatic(sharding: NamedSharding) -> NamedSharding:
    """The same on a mesh whose axes are all of type Auto: programs here leave it to XLA how to move what."""
    return NamedSharding(Mesh(sharding.mesh.devices, sharding.mesh.axis_names), sharding.spec)


def rewrapped(array: jax.Array, sharding: NamedSharding) -> jax.Array:
    """The array, whose shards lie as `sharding` says, under that name."""
    shards = [shard.data for shard in array.addressable_shards]
    return jax.make_array_from_single_device_arrays(array.shape, sharding, shards)


@functools.partial(jax.jit, static_argnames="place", donate_argnames="stacked")
def put_layer(stacked: Any, weight: Any, layer: Any, place: NamedSharding) -> jax.Array:
    """`stacked` [L, ...] with `weight` as its layer number `layer`, in the memory of `stacked`."""
    return jax.lax.with_sharding_constraint(stacked.at[layer].set(weight), place)


@functools.partial(jax.jit, static_argnames=("parts", "place"))
def by_shares(weight: Any, parts: tuple[int, ...], place: NamedSharding) -> jax.Array:
    """A matrix that joins `parts` along the axis that `place` cuts, in the order of shards: the m-th share of each
    part together, for m = 0, 1, ..."""
    axis, name = next((axis, name) for axis, name in enumerate(place.spec) if name is not None)
    cuts, bounds = place.mesh.shape[name], np.cumsum(parts[:-1])
    shape, pieces = weight.shape, jnp.split(weight, bounds, axis=axis)
    shares = [piece.reshape(*shape[:axis], cuts, -1, *shape[axis + 1 :]) for piece in pieces]
    return jax.lax.with_sharding_constraint(jnp.concatenate(shares, axis=axis + 1).reshape(shape), place)
