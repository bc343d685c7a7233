"""The four components of a model as tables of weights: what a component needs, and a component assembled from them.

In: a component's name ("transformer", "t5", "clip", "vae") and a `FluxConfig`. Out: `leaf_table`, the shape of every
weight under the name it has outside the program, and `assemble`, the module with those weights in it. A stacked leaf of
the program (`double_blocks.img.qkv.weight` [19, n, k]) is one weight a layer outside (`double_blocks.7.img.qkv.weight`
[n, k]): that is how weights are published, and nothing that converts or loads them has to hold 19 layers at once.
"""

import importlib
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding

from flux_jax.config import FluxConfig

COMPONENTS = {
    "transformer": ("flux_jax.models.transformer", "Transformer"),
    "t5": ("flux_jax.models.t5", "T5Encoder"),
    "clip": ("flux_jax.models.clip", "CLIPText"),
    "vae": ("flux_jax.models.vae", "VAE"),
}
FIXED = {"packed": jnp.dtype(jnp.uint8), "scale": jnp.dtype(jnp.float32)}  # leaves of these names keep these dtypes
STACKED = ("double_blocks", "single_blocks", "layers")  # children whose every leaf has a leading axis of layers
_LAYER = re.compile(rf"^({'|'.join(STACKED)})\.\d+\.")
BATCH_BYTES = 2**30  # weights read at a time, if a single leaf is not larger

T = TypeVar("T")
Placement = Sharding | Mesh | Callable[[str, tuple[int, ...]], Sharding] | None


def dotted(path: tuple) -> str:
    return ".".join(map(str, path))


def abstract_component(
    component: str,
    config: FluxConfig,
    dtype=jnp.float32,
    change: Callable[[nnx.Module], nnx.Module] = lambda module: module,
) -> nnx.Module:
    """The component's module, `change`d into the form wanted, with shapes for arrays: costs no memory and draws no
    random number."""
    module, name = COMPONENTS[component]
    cls = getattr(importlib.import_module(module), name)
    return nnx.eval_shape(lambda: change(cls(getattr(config, component), dtype=dtype, rngs=nnx.Rngs(0))))


def target_dtype(name: str, stored: Any, dtype: Any) -> Any:
    """What a leaf that is `stored` in one dtype becomes where `dtype` is asked for: None is nothing, and the dtype of
    packed codes and scales is part of what they mean."""
    free = jnp.issubdtype(stored, jnp.floating) and name.rpartition(".")[2] not in FIXED
    return dtype if dtype is not None and free else stored


def layer_names(path: str, layers: int) -> list[str] | None:
    """The outside names of a stacked leaf, one a layer; None for a leaf that is not stacked."""
    head, _, rest = path.partition(".")
    return [f"{head}.{i}.{rest}" for i in range(layers)] if head in STACKED else None


def leaf_of(name: str) -> str:
    """The path of the leaf in which the weight of that outside name is, with all layers of its kind where it has one of
    them."""
    return _LAYER.sub(r"\1.", name)


def nbytes(tree: Any) -> int:
    """Bytes of all leaves: arrays, or shapes of arrays."""
    return sum(math.prod(leaf.shape) * jnp.dtype(leaf.dtype).itemsize for leaf in jax.tree.leaves(tree))


def leaf_table(module: nnx.Module) -> dict[str, tuple[int, ...]]:
    """Outside name -> shape, one entry a layer for stacked leaves. `module` may be abstract."""
    table = {}
    for path, variable in nnx.to_flat_state(nnx.state(module)):
        name, shape = dotted(path), variable.shape
        layers = layer_names(name, shape[0] if shape else 0)
        table |= {name: shape} if layers is None else dict.fromkeys(layers, shape[1:])
    return table


def leaves(module: nnx.Module) -> Iterator[tuple[str, np.ndarray]]:
    """Outside name, weight on the host; one stacked leaf at a time comes from the device."""
    for path, variable in nnx.to_flat_state(nnx.state(module)):
        value = np.asarray(jax.device_get(variable[...]))
        layers = layer_names(dotted(path), len(value) if value.ndim else 0)
        yield from [(dotted(path), value)] if layers is None else zip(layers, value, strict=True)


def placement_of(sharding: Placement, path: str, shape: tuple[int, ...]) -> Sharding:
    """The explicit sharding of one leaf: given, asked for, replicated over a mesh, or the default device."""
    if isinstance(sharding, Sharding):
        return sharding
    if isinstance(sharding, Mesh):
        return NamedSharding(sharding, PartitionSpec())
    if sharding is None:
        device = jax.config.jax_default_device  # pyrefly: ignore[missing-attribute] - jax defines it at import
        return SingleDeviceSharding(device if isinstance(device, jax.Device) else jax.local_devices(backend=device)[0])
    return sharding(path, shape)


def assemble(
    module: nnx.Module,
    read: Callable[[list[str]], Mapping[str, np.ndarray]],
    *,
    dtype: Any = None,
    sharding: Placement = None,
) -> nnx.Module:
    """The abstract `module` with weights: `read` gives arrays by outside name, in batches of about a gigabyte.

    dtype converts floating weights after reading (None: as read), but no leaf of `FIXED`; sharding is one for all
    leaves, a mesh to be replicated over, or a function of (path, shape). Host memory: one batch and one stacked leaf.
    """
    definition, state = nnx.split(module)
    filled = []
    for batch in batches(nnx.to_flat_state(state), lambda leaf: 4 * math.prod(leaf[1].shape), BATCH_BYTES):
        layers = {path: layer_names(dotted(path), v.shape[0] if v.shape else 0) for path, v in batch}
        names = {path: [dotted(path)] if each is None else each for path, each in layers.items()}
        weights = dict(read([name for each in names.values() for name in each]))
        for path, variable in batch:
            values = [weights.pop(name) for name in names[path]]
            stored = values[0].dtype if values else variable.dtype  # a model may have no block of a kind
            host = np.empty(variable.shape, target_dtype(dotted(path), stored, dtype))
            for i, value in enumerate(values):
                host[... if layers[path] is None else i] = value
            place = placement_of(sharding, dotted(path), host.shape)
            filled.append((path, variable.replace(jax.make_array_from_callback(host.shape, place, host.__getitem__))))
    return nnx.merge(definition, nnx.from_flat_state(filled))


def batches(items: Iterable[T], size: Callable[[T], int], limit: int) -> Iterator[list[T]]:
    """The items, in order, in lists of at most `limit` bytes; one that is larger has a list of its own."""
    batch, held = [], 0
    for item in items:
        needed = size(item)
        if batch and held + needed > limit:
            yield batch
            batch, held = [], 0
        batch.append(item)
        held += needed
    if batch:
        yield batch
