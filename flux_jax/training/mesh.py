"""Where the arrays of a training lie: batches over all devices, parameters cut over one axis of the mesh.

In: what `--mesh` says, such as "data=2,fsdp=4", and trees of arrays. Out: a mesh with the axes (data, fsdp), and
the same trees on its devices. A batch is cut along its first axis over both mesh axes; a parameter along the largest
of its axes that `fsdp` divides, and so are its gradient, running mean and optimiser state (fully sharded data
parallelism); XLA inserts the collectives. On several processes every host array is whole and equal on each of them.
"""

import math
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from flux_jax.errors import UserError

AXES = ("data", "fsdp")


def make(axes: str | None, batches: dict[str, int]) -> Mesh:
    """The mesh of `axes` (None: all devices along `data`). batches: option -> its number of rows, which the mesh must
    divide. UserError where it does not, or where there are fewer or more devices."""
    sizes = {"data": jax.device_count(), "fsdp": 1} if axes is None else {"data": 1, "fsdp": 1}
    for word in axes.split(",") if axes else []:
        name, _, size = word.partition("=")
        if name not in AXES or not size.isdecimal() or int(size) < 1:
            raise UserError(f'mesh="{axes}" must read such as data=2,fsdp=4.')
        sizes[name] = int(size)
    devices = math.prod(sizes.values())
    if devices != jax.device_count():
        raise UserError(f'mesh="{axes}" needs {devices} devices, and there are {jax.device_count()}.')
    for name, rows in batches.items():
        if rows % devices:
            raise UserError(
                f"{rows} rows of {name} cannot be divided over {devices} devices: choose a multiple, or a mesh."
            )
    return grid(sizes["data"], sizes["fsdp"])


def grid(data: int, fsdp: int = 1) -> Mesh:
    """The first data * fsdp devices."""
    return jax.make_mesh((data, fsdp), AXES, axis_types=(AxisType.Auto,) * 2)


def whole(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def by_row(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec(AXES))


def axis_to_cut(cuts: int, shape: tuple[int, ...]) -> int | None:
    """The largest axis (the last of equals) that `cuts` divides; None where none is, or nothing is to be cut."""
    candidates = [axis for axis, size in enumerate(shape) if cuts > 1 and size % cuts == 0]
    return max(candidates, key=lambda axis: (shape[axis], axis), default=None)


def parameter(mesh: Mesh, shape: tuple[int, ...]) -> NamedSharding:
    """A parameter's place: cut over `fsdp` where an axis can be, else whole on every device."""
    cut = axis_to_cut(mesh.shape["fsdp"], shape)
    return NamedSharding(mesh, PartitionSpec(*(AXES[1] if axis == cut else None for axis in range(len(shape)))))


def put(tree: Any, sharding: Any) -> Any:
    """Host arrays (the same on every process) as global arrays. sharding: one, or a function of a shape."""

    def place(x: Any) -> jax.Array:
        x = np.asarray(x)
        where = sharding(x.shape) if callable(sharding) else sharding
        return jax.make_array_from_callback(x.shape, where, lambda index: x[index])

    return jax.tree.map(place, tree)


def place_parameters(mesh: Mesh, tree: Any) -> Any:
    """Inside a program: every leaf is to lie as `parameter` says."""
    return jax.tree.map(lambda x: jax.lax.with_sharding_constraint(x, parameter(mesh, x.shape)), tree)


def fetch(tree: Any) -> Any:
    """Global arrays as host arrays, whole on every process."""
    if jax.process_count() == 1:
        return jax.device_get(tree)
    from jax.experimental import multihost_utils

    return jax.tree.map(np.asarray, multihost_utils.process_allgather(tree, tiled=True))


def barrier(name: str) -> None:
    """Waits until every process is here."""
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(name)
