"""Networks that judge pictures, filled from the files that users bring.

In: an abstract module, the tensors of a safetensors file or folder, and the name there of each weight. Out: the module
in float32 on JAX's default device; but first, from the headers alone, whether the file holds it.
"""

from collections.abc import Callable
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from flax import nnx

from flux_jax.errors import UserError
from flux_jax.io.safetensors import FLOATS, Source
from flux_jax.models.params import assemble, leaf_table

# Reads the weights; returns what measures a pair of pictures uint8 [h, w, 3]: (place among the prompts, a, b) -> scores
Judge = Callable[[], Callable[[int, np.ndarray, np.ndarray], dict[str, float]]]


def open_source(path: Path) -> Source:
    """The tensors at `path`, a file or a folder; UserError where there are none or the files are damaged."""
    if not path.exists():
        raise UserError(f"There is no {path}.")
    source = Source.from_path(path)
    if source.faults:
        raise UserError(f"{source.faults[0]}.")
    return source


def checked(module: nnx.Module, source: Source, name_of: Callable[[str], str], what: str) -> Callable[[], nnx.Module]:
    """A function that reads the weights; UserError now if one is missing, or of another shape or dtype.

    name_of: our name (`flux_jax.models.params`) -> the source's. There a weight may have two more axes of length one.
    """
    shapes = leaf_table(module)
    for ours, shape in shapes.items():
        name = name_of(ours)
        entry = source.entries.get(name)
        if entry is None:
            raise UserError(f"{source.where} does not hold {what}: {name} is missing.")
        if entry.shape not in (shape, (*shape, 1, 1)) or entry.dtype not in FLOATS:
            raise UserError(
                f"{source.where} does not hold {what}: {name} is {entry.dtype} {list(entry.shape)}, "
                f"must be floats {list(shape)}."
            )

    def read(names: list[str]) -> dict[str, np.ndarray]:
        return {ours: source.read(name_of(ours)).reshape(shapes[ours]) for ours in names}

    return lambda: assemble(module, read, dtype=jnp.float32)
