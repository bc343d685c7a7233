"""Tiles of the Triton kernel: decided from the device, the shape and the kind of activations, before any tracing.

In: the device that is compiled for, the m, n, k of a product and what it ends with. Out: `TileConfig`: from
`tuned/<device>.json` where that device and shape were measured, else from `heuristic_tiles`, which follows what the
compiler says (registers, spills, shared memory, instructions), for no time was measured yet.
"""

import functools
import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path

from pallas_kernels.dispatch import Target, capability
from pallas_kernels.packing import LAYOUT_VERSION, TILE, packed_width

EPILOGUES = ("none", "gated_residual", "gelu", "gelu_quantize", "norm_rotary")  # what a product ends with


TABLES = Path(__file__).with_name("tuned")


GEMV_ROWS = 16  # up to here a product is one pass over the weights, and rows are filled up for the tensor cores


@dataclass(frozen=True)
class TileConfig:
    """Tiles of the Triton kernel: block_m tokens x block_n channels, block_k codes a step.

    Blocks are powers of two, block_m and block_n from 16 (a tensor core's least), block_k from a tile of the layout
    up; num_warps is 1, 2, 4, 8 or 16; num_stages, the depth of the load pipeline, 1 to 8. ValueError for anything else.
    """

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int

    def __post_init__(self):
        least = {"block_m": 16, "block_n": 16, "block_k": TILE, "num_warps": 1}
        for name, smallest in least.items():
            value = getattr(self, name)
            if not isinstance(value, int) or value < smallest or value & (value - 1):
                raise ValueError(f"{name} is {value!r}: expected a power of two from {smallest} up")
        if self.num_warps > 16 or self.num_stages not in range(1, 9):
            pair = f"{self.num_warps!r} and {self.num_stages!r}"
            raise ValueError(f"num_warps and num_stages are {pair}: expected at most 16, and 1 to 8")


def choose_tiles(target: Target, m: int, n: int, k: int, operand: str, epilogue: str = "none") -> TileConfig:
    """Measured settings of this device, operand, epilogue, n and k, of the nearest m within a factor of 2; else
    `heuristic`. epilogue: one of `EPILOGUES`; another number of registers is left to a tile that ends with one."""
    product = {"operand": operand, "epilogue": epilogue, "n": n, "k": k}
    rows = [row for row in read_table(table_path(target.name)) if {key: row[key] for key in product} == product]
    rows = [r for r in rows if r["m"] <= 2 * m and m <= 2 * r["m"]]
    if not rows:
        return heuristic_tiles(target, m, n, k, operand, epilogue)
    return TileConfig(**min(rows, key=lambda r: max(m / r["m"], r["m"] / m))["settings"])


def heuristic_tiles(target: Target, m: int, n: int, k: int, operand: str, epilogue: str = "none") -> TileConfig:
    """Settings for any device and shape: the widest tiles that spill no register and fit the shared memory."""
    width = 4 * packed_width(k)
    if operand == "float32":
        return TileConfig(16, 32, 128, 4, 2)  # no tensor core multiplies it: products unroll, and compile for long
    if m <= GEMV_ROWS:
        block_k = 512 if width % 512 == 0 else 128
        return TileConfig(16, 64, block_k, 4, 3) if n >= 64 * 264 else TileConfig(16, 32, block_k, 4, 4)
    block_m = min(128, max(32, 1 << (m - 1).bit_length()))
    if capability(target) < (9, 0):
        if operand != "int8":
            return TileConfig(min(64, block_m), 128, 128, 8, 3)
        # With these a tile of 128 tokens takes so many registers that a multiprocessor holds one block.
        block_m = min(64, block_m) if epilogue in ("gated_residual", "gelu_quantize") else block_m
        return TileConfig(block_m, 128, 128, 8 if block_m == 128 else 4, 3)
    if operand != "int8" or width % 256:  # a step of 256 codes would end in the middle
        return TileConfig(block_m, 128, 128, 4 if operand == "int8" else 8, 3)
    if block_m < 64:
        return TileConfig(block_m, 128, 256, 4, 3)

    def tiles(tokens: int, channels: int) -> int:
        return -(-m // tokens) * -(-n // channels)

    # On some 132 multiprocessors: along a long row, twice the work between two barriers; else two blocks on each, of
    # four warps, so that a barrier holds up one half of the work. A head with its norm and turn is 128 wide.
    if width >= 8192 and width % 512 == 0 and epilogue != "norm_rotary" and tiles(128, 256) >= 132:
        return TileConfig(128, 256, 512, 8, 2)
    return TileConfig(64, 256 if tiles(64, 256) >= 264 and epilogue != "norm_rotary" else 128, 256, 4, 3)


def table_path(device: str) -> Path:
    """Where the measured settings of a device, by its name ("NVIDIA A10"), are kept, whether or not there are any."""
    return TABLES / (re.sub("[^a-z0-9]+", "_", device.lower()).strip("_") + ".json")


@functools.cache
def read_table(path: Path) -> list[dict]:
    """The rows {operand, epilogue, m, n, k, settings, ...} of a table of measured settings; none without a file.

    ValueError in one sentence where it is damaged or was measured with another layout.
    """
    if not path.is_file():
        return []
    try:
        table = json.loads(path.read_text())
        rows = [{**row, "settings": asdict(TileConfig(**row["settings"]))} for row in table["rows"]]
        if not all(isinstance(row[key], int) for row in rows for key in "mnk"):
            raise ValueError("each row has integers m, n, k")
        if any("operand" not in row or row["epilogue"] not in EPILOGUES for row in rows):
            raise ValueError(f"each row has an operand, and an epilogue of {', '.join(EPILOGUES)}")
        layout = table["layout"]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is no table of measured settings: {error}; tune again, or remove it") from None
    if layout != LAYOUT_VERSION:
        raise ValueError(
            f"{path} was measured with layout {layout}, and this is {LAYOUT_VERSION}: tune again, or remove it"
        )
    return rows
