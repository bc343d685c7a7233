"""What weights become in the checkpoint that is written, and what they were before, for the way back.

In: our weights by outside name, one at a time, in floating dtypes. Out: the arrays to be stored: as they are in another
dtype, or, for the linears of the transformer's blocks, codes packed to two bits and a scale for each output channel.
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from flux_jax.checkpoints.checkpoint import Checkpoint
from flux_jax.models.quantize import is_ternary, ternarize, ternary_paths
from pallas_kernels import LAYOUT_VERSION, pack_ternary, packed_width, unpack_ternary

ROWS = 256  # of a weight that are packed, or multiplied out, at a time
WARNING = "the weights were rounded, not distilled: fit for benchmarks, but pictures made with them are noise"


@dataclass(frozen=True)
class WeightFormat:
    """`dtype` of floating weights, None: each keeps its own; `ternary`: the method of
    `flux_jax.models.quantize.ternarize`, or None to round nothing."""

    dtype: Any = None
    ternary: str | None = None

    def rounds(self, name: str) -> bool:
        """Whether this weight of the transformer becomes codes and scales."""
        path, _, kind = name.rpartition(".")
        return self.ternary is not None and kind == "weight" and is_ternary(path)

    def stored(self, own: Any) -> np.dtype:
        """The dtype that a weight gets whose own it is."""
        return np.dtype(own if self.dtype is None else self.dtype)

    def nbytes(self, name: str, own: Any, shape: tuple[int, ...]) -> int:
        """Size of what `arrays` gives for it."""
        if self.rounds(name):
            return shape[0] * (packed_width(shape[1]) + 4)
        return math.prod(shape) * self.stored(own).itemsize

    def arrays(self, name: str, value: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
        """The weight `name` as it is stored: under its own name, or as `.packed` and `.scale`."""
        if not self.rounds(name):
            yield name, value.astype(self.stored(value.dtype), copy=False)
            return
        path = name.removesuffix(".weight")
        codes, scale = ternarize(value, str(self.ternary))
        with ThreadPoolExecutor() as pool:
            packed = pool.map(pack_ternary, np.array_split(codes, max(1, len(codes) // ROWS)))
            yield f"{path}.packed", np.concatenate([np.asarray(rows) for rows in packed])
        yield f"{path}.scale", scale

    @property
    def quantization(self) -> dict[str, Any] | None:
        """The manifest's entry (see `flux_jax.checkpoints.manifest`)."""
        if self.ternary is None:
            return None
        return {"layout": LAYOUT_VERSION, "method": self.ternary, "distilled": False, "activations": "bf16"}


def dense_table(checkpoint: Checkpoint, component: str) -> dict[str, tuple[np.dtype, tuple[int, ...]]]:
    """`Checkpoint.table` as if no weight were ternary: those that are get the dtype of their layer's bias."""
    table, ternary = checkpoint.table(component), _ternary(checkpoint, component)
    kept = {
        name: row for name, row in table.items() if name.rpartition(".")[0] not in ternary or name.endswith(".bias")
    }
    dense = {  # a stranger's table may lack a piece of one
        f"{path}.weight": (table[f"{path}.bias"][0], shape)
        for path, shape in ternary.items()
        if all(f"{path}.{piece}" in table for piece in ("packed", "scale", "bias"))
    }
    return kept | dense


def dense_stream(checkpoint: Checkpoint, component: str, names: Iterable[str]) -> Iterator[tuple[str, np.ndarray]]:
    """`Checkpoint.stream` with ternary weights multiplied out: codes * scale, rounded to the dtype of `dense_table`."""
    ternary, table = _ternary(checkpoint, component), dense_table(checkpoint, component)
    paths = {name: name.removesuffix(".weight") for name in names}
    stored = [
        [f"{path}.packed", f"{path}.scale"] if path != name and path in ternary else [name]
        for name, path in paths.items()
    ]
    values = checkpoint.stream(component, [name for each in stored for name in each])
    for name, each in zip(paths, stored, strict=True):
        value = next(values)[1]
        if len(each) == 2:
            value = _dense(value, next(values)[1], *table[name])
        yield name, value


def _ternary(checkpoint: Checkpoint, component: str) -> Mapping[str, tuple[int, int]]:
    return (
        ternary_paths(checkpoint.config) if checkpoint.quantization is not None and component == "transformer" else {}
    )


def _dense(packed: np.ndarray, scale: np.ndarray, dtype: np.dtype, shape: tuple[int, ...]) -> np.ndarray:
    out = np.empty(shape, dtype)
    for start in range(0, shape[0], ROWS):
        rows = slice(start, start + ROWS)
        out[rows] = unpack_ternary(packed[rows], shape[1]) * scale[rows, None]
    return out
