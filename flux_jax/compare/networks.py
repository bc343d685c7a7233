"""Networks that judge pictures, filled from the files that users bring.

In: an abstract module, the tensors of a safetensors file or folder, and the name there of each weight. Out: the module
in float32 on JAX's default device; but first, from the headers alone, whether the files hold it.
"""

import os
from collections.abc import Callable
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from flax import nnx

from flux_jax.errors import UserError
from flux_jax.io.safetensors import Source
from flux_jax.models.params import assemble, leaf_table

FLOATS = ("F64", "F32", "F16", "BF16")  # narrower ones have scales beside them
# Reads the weights; returns what measures a pair of pictures uint8 [h, w, 3]: (place among the prompts, a, b) -> scores
Judge = Callable[[], Callable[[int, np.ndarray, np.ndarray], dict[str, float]]]


def open_tensors(path: Path) -> Source:
    """The tensors of the file `path`, or of the folder `path` with model.safetensors or with an index and its shards.
    UserError where there are none or the files are damaged."""
    index = path / "model.safetensors.index.json"
    if os.path.lexists(index):
        source = Source.of_index(path, index)
    else:
        source = Source.of(path, [path / "model.safetensors" if os.path.isdir(path) else path])
    if source.faults:
        raise UserError(source.faults[0])
    return source


def checked(module: nnx.Module, source: Source, name_of: Callable[[str], str], what: str) -> Callable[[], nnx.Module]:
    """A function that reads the weights; UserError now if one is missing, or of another shape or dtype.

    name_of: our name (`flux_jax.models.params`) -> the source's. There a weight may have two more axes of length one.
    """
    shapes = leaf_table(module)
    for ours, shape in shapes.items():
        name = name_of(ours)
        if (found := source.entries.get(name)) is None:
            raise UserError(f"{source.where} does not hold {what}: {name} is missing.")
        if found.shape not in (shape, (*shape, 1, 1)) or found.dtype not in FLOATS:
            raise UserError(
                f"{source.where} does not hold {what}: {name} is {found.dtype} {list(found.shape)}, must be floats "
                f"{list(shape)}."
            )

    def read(names: list[str]) -> dict[str, np.ndarray]:
        return {ours: source.read(name_of(ours)).reshape(shapes[ours]) for ours in names}

    return lambda: assemble(module, read, dtype=jnp.float32)
