"""Networks that judge pictures, filled from the files that users bring.

In: an abstract module, the tensors of a safetensors file or folder, and the name there of each weight. Out: the module
in float32 on JAX's default device; but first, from the headers alone, whether the files hold it.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors import SafetensorError, safe_open

from flux_jax.errors import UserError
from flux_jax.io.safetensors import FLOATS
from flux_jax.models.params import assemble, leaf_table

# Reads the weights; returns what measures a pair of pictures uint8 [h, w, 3]: (place among the prompts, a, b) -> scores
Judge = Callable[[], Callable[[int, np.ndarray, np.ndarray], dict[str, float]]]


@dataclass(frozen=True)
class Tensors:
    """Those of a file or a folder. files: a tensor's name -> the file that holds it, opened by the library."""

    where: Path
    files: dict[str, Any]


def open_tensors(path: Path) -> Tensors:
    """The tensors of the file `path`, or of the folder `path` with model.safetensors or with an index and its shards.
    UserError where there are none or the files are damaged."""
    if not path.exists():
        raise UserError(f"There is no {path}.")
    index, files = path / "model.safetensors.index.json", [path if path.is_file() else path / "model.safetensors"]
    tensors = {}
    try:
        if index.is_file():
            files = sorted({path / shard for shard in json.loads(index.read_text())["weight_map"].values()})
        for file in files:
            opened = safe_open(file, "numpy")
            tensors |= dict.fromkeys(opened.keys(), opened)
    except FileNotFoundError as error:
        raise UserError(f"{path}: no .safetensors file here, or not all of its shards ({error}).") from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        raise UserError(f"{path} is truncated or damaged ({error}): copy or download it again.") from error
    return Tensors(path, tensors)


def checked(module: nnx.Module, source: Tensors, name_of: Callable[[str], str], what: str) -> Callable[[], nnx.Module]:
    """A function that reads the weights; UserError now if one is missing, or of another shape or dtype.

    name_of: our name (`flux_jax.models.params`) -> the source's. There a weight may have two more axes of length one.
    """
    shapes = leaf_table(module)
    for ours, shape in shapes.items():
        name = name_of(ours)
        if name not in source.files:
            raise UserError(f"{source.where} does not hold {what}: {name} is missing.")
        header = source.files[name].get_slice(name)
        found, dtype = header.get_shape(), header.get_dtype()
        if tuple(found) not in (shape, (*shape, 1, 1)) or dtype not in FLOATS:
            raise UserError(
                f"{source.where} does not hold {what}: {name} is {dtype} {found}, must be floats {list(shape)}."
            )

    def read(names: list[str]) -> dict[str, np.ndarray]:
        return {ours: source.files[name_of(ours)].get_tensor(name_of(ours)).reshape(shapes[ours]) for ours in names}

    return lambda: assemble(module, read, dtype=jnp.float32)
