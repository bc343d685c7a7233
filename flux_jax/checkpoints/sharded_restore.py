"""Weights from the disk straight into their shards: no process reads or holds more of an array than its devices keep.

In: a module with shapes for arrays, the place of each leaf on a mesh, and `read`, which restores stored weights into
shardings (Orbax reads the chunks in which a process's own shards lie). Out: the module with its weights. A stacked leaf
is filled layer by layer, so that beside the leaves themselves only `GROUP_BYTES` of weights are on the devices at once.

Where a stored matrix joins several projections, a shard is not one piece of it but a share of each (`sections`): rows
are restored in the order of the files and then exchanged between devices, once. For queries, keys and values on two:

    in the files, and as restored      q0 q1 k0 | k1 v0 v1      device 0 | device 1
    as a shard wants it                q0 k0 v0 | q1 k1 v1      heads 0  | heads 1
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from flux_jax.checkpoints.integrity import Table, stored_bytes
from flux_jax.models.params import batches, dotted, layer_names, target_dtype

GROUP_BYTES = 2**30  # of stored weights that are read at a time, over all devices, if a single one is not larger

Read = Callable[[dict[str, jax.ShapeDtypeStruct]], Mapping[str, jax.Array]]
Sections = Callable[[str], tuple[int, ...]]  # path of a leaf -> lengths of what it joins along the axis that is cut


def restore(
    module: nnx.Module,
    table: Table,
    read: Read,
    *,
    places: Mapping[str, NamedSharding],
    dtype: Any = None,
    sections: Sections = lambda path: (),
) -> nnx.Module:
    """The abstract `module` with the weights of `table`. places: of each leaf, by its path. dtype: as in
    `flux_jax.models.params.assemble`. sections: the lengths, along the axis that is cut, of the projections in a leaf
    of which every shard gets a share; () for a leaf whose shards are its pieces in order."""
    definition, state = nnx.split(module)
    flat = nnx.to_flat_state(state)
    asked, places = places, {leaf: automatic(sharding) for leaf, sharding in places.items()}
    filled: dict[str, jax.Array] = {}
    homes: dict[str, tuple[str, int | None]] = {}  # of a stored weight: its leaf, and its layer there
    for path, variable in flat:
        leaf = dotted(path)
        layers = layer_names(leaf, variable.shape[0] if variable.shape else 0)
        homes |= {leaf: (leaf, None)} if layers is None else {name: (leaf, i) for i, name in enumerate(layers)}
        if layers is not None:
            stored = table[layers[0]][0] if layers else variable.dtype  # a model may have no block of a kind
            filled[leaf] = jnp.zeros(variable.shape, target_dtype(leaf, stored, dtype), device=places[leaf])
    for group in batches(homes, functools.partial(stored_bytes, table), GROUP_BYTES):
        wanted, slots = {}, []
        for name in group:
            (leaf, layer), (stored, shape) = homes[name], table[name]
            spec = places[leaf].spec if layer is None else PartitionSpec(*places[leaf].spec[1:])
            where = NamedSharding(places[leaf].mesh, spec)
            wanted[name] = jax.ShapeDtypeStruct(shape, target_dtype(leaf, stored, dtype), sharding=where)
            slots.append(Slot(leaf, layer, sections(leaf), where, places[leaf]))
        weights = dict(read(wanted))
        started = {slot.leaf: filled[slot.leaf] for slot in slots if slot.layer is not None}
        filled |= fill(started, [weights.pop(name) for name in group], tuple(slots))
    leaves = [(path, variable.replace(rewrapped(filled[dotted(path)], asked[dotted(path)]))) for path, variable in flat]
    return nnx.merge(definition, nnx.from_flat_state(leaves))


class Slot(NamedTuple):
    """Where a stored weight goes: the path of a leaf, its layer there (None: the leaf is not stacked), what it joins,
    and how it and the leaf lie on the mesh."""

    leaf: str
    layer: int | None
    sections: tuple[int, ...]
    place: NamedSharding
    leaf_place: NamedSharding


@functools.partial(jax.jit, static_argnames="slots", donate_argnames="leaves")
def fill(leaves: dict[str, Any], weights: list[Any], slots: tuple[Slot, ...]) -> dict[str, jax.Array]:
    """The leaves with the weights in them, stacked ones in the memory that they have: one program for a whole group."""
    found = dict(leaves)
    for weight, slot in zip(weights, slots, strict=True):
        weight = interleave_sections(weight, slot.sections, slot.place) if slot.sections else weight
        whole = weight if slot.layer is None else found[slot.leaf].at[slot.layer].set(weight)
        found[slot.leaf] = jax.lax.with_sharding_constraint(whole, slot.leaf_place)
    return found


def automatic(sharding: NamedSharding) -> NamedSharding:
    """The same on a mesh whose axes are all of type Auto: programs here leave it to XLA how to move what."""
    return NamedSharding(Mesh(sharding.mesh.devices, sharding.mesh.axis_names), sharding.spec)


def rewrapped(array: jax.Array, sharding: NamedSharding) -> jax.Array:
    """The array, whose shards lie as `sharding` says, under that name."""
    shards = [shard.data for shard in array.addressable_shards]
    return jax.make_array_from_single_device_arrays(array.shape, sharding, shards)


def interleave_sections(weight: Any, sections: tuple[int, ...], place: NamedSharding) -> jax.Array:
    """A matrix that joins `sections` along the axis that `place` cuts, in the order of shards: the m-th share of each
    section together, for m = 0, 1, ..."""
    axis, name = next((axis, name) for axis, name in enumerate(place.spec) if name is not None)
    cuts, bounds = place.mesh.shape[name], np.cumsum(sections[:-1])
    shape, pieces = weight.shape, jnp.split(weight, bounds, axis=axis)
    shares = [piece.reshape(*shape[:axis], cuts, -1, *shape[axis + 1 :]) for piece in pieces]
    return jax.lax.with_sharding_constraint(jnp.concatenate(shares, axis=axis + 1).reshape(shape), place)
