"""Which backend and which tiles: decided from the device, the shape and the kind of activations, before any tracing.

In: the device that is compiled for, the m, n, k of a product and what it ends with. Out: the name of a backend, the
kernel's `Settings`.

Settings come from `tuned/<device>.json` where that device and shape were measured, else from `heuristic`, which follows
what the compiler says (registers, spills, shared memory, instructions), for no time was measured yet.
"""

import contextlib
import functools
import json
import re
import sys
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import asdict, dataclass
from pathlib import Path

import jax

from pallas_kernels.packing import LAYOUT_VERSION, TILE, packed_width

ACTIVATIONS = ("bf16", "int8")
EPILOGUES = ("none", "gated_residual", "gelu", "gelu_quantize", "norm_rotary")  # what a product ends with
IMPLEMENTATIONS = ("xla", "triton")
TABLES = Path(__file__).with_name("tuned")
# With more rows than this, floating activations go to XLA, which unpacks to a scratch matrix for cuBLAS. By roofline,
# not measured: the kernel saves 4 bytes of traffic a weight, and has some two thirds of cuBLAS's rate of arithmetic.
FLOATING_ROWS = 512
GEMV_ROWS = 16  # up to here a product is one pass over the weights, and rows are filled up for the tensor cores


@dataclass(frozen=True)
class Settings:
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


@dataclass(frozen=True)
class Target:
    """The device a program is compiled for. platform: as JAX calls it ("cpu", "gpu", "tpu"), or "interpret", which runs
    the Triton kernels on any device in Pallas's interpreter. compute_capability: "9.0" for an H100, "" off NVIDIA."""

    platform: str
    compute_capability: str = ""
    name: str = ""


_TARGET: ContextVar[Target | None] = ContextVar("target", default=None)


def current_target() -> Target:
    """The device that JAX would use now, or what `compiling_for` says."""
    if (told := _TARGET.get()) is not None:
        return told
    device = getattr(jax.config, "jax_default_device", None)
    if not isinstance(device, jax.Device):
        device = jax.devices(device)[0]
    return Target(device.platform, str(getattr(device, "compute_capability", "")), device.device_kind)


@contextlib.contextmanager
def compiling_for(target: Target) -> Iterator[None]:
    """Within it, products are traced for a device that is not here. A function that was traced before, outside of it,
    is not traced again: wrap a new `jax.jit`."""
    token = _TARGET.set(target)
    try:
        yield
    finally:
        _TARGET.reset(token)


def supported(implementation: str, target: Target) -> tuple[bool, str]:
    """Whether a backend runs there, and why not. ValueError for an unknown backend."""
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(
            f"implementation is {implementation!r}: expected None, {' or '.join(map(repr, IMPLEMENTATIONS))}"
        )
    if implementation == "xla":
        return True, ""
    if target.platform not in ("gpu", "cuda", "interpret"):
        return False, f"the Triton kernels need an NVIDIA GPU, and this is a {target.platform}"
    if _capability(target) < (8, 0):
        has = target.compute_capability or "none"
        return False, f"the Triton kernels need compute capability 8.0, and {target.name or 'this GPU'} has {has}"
    return True, ""


def choose(implementation: str | None, target: Target, m: int, operand: str) -> str:
    """The backend of a product with m rows of `operand` ("int8", or the name of a floating dtype).

    None takes Triton where it is supported and pays: int8 always, 16-bit floats up to `FLOATING_ROWS`, float32 never.
    ValueError where the one asked for by name is unknown or unsupported.
    """
    ok, reason = supported(implementation or "triton", target)
    if implementation is not None:
        if not ok:
            raise ValueError(f"implementation is {implementation!r}: {reason}; expected None or 'xla'")
        return implementation
    if not ok:
        _say(f"pallas_kernels: ternary products run in XLA: {reason}")
        return "xla"
    pays = operand == "int8" or (operand != "float32" and m <= FLOATING_ROWS)
    return "triton" if pays else "xla"


def choose_settings(target: Target, m: int, n: int, k: int, operand: str, epilogue: str = "none") -> Settings:
    """Measured settings of this device, operand, epilogue, n and k, of the nearest m within a factor of 2; else
    `heuristic`. epilogue: one of `EPILOGUES`; another number of registers is left to a tile that ends with one."""
    product = {"operand": operand, "epilogue": epilogue, "n": n, "k": k}
    rows = [row for row in read_table(table_path(target.name)) if {key: row[key] for key in product} == product]
    rows = [r for r in rows if r["m"] <= 2 * m and m <= 2 * r["m"]]
    if not rows:
        return heuristic(target, m, n, k, operand, epilogue)
    return Settings(**min(rows, key=lambda r: max(m / r["m"], r["m"] / m))["settings"])


def heuristic(target: Target, m: int, n: int, k: int, operand: str, epilogue: str = "none") -> Settings:
    """Settings for any device and shape: the widest tiles that spill no register and fit the shared memory."""
    width = 4 * packed_width(k)
    if operand == "float32":
        return Settings(16, 32, 128, 4, 2)  # no tensor core multiplies it: products unroll, and compile for long
    if m <= GEMV_ROWS:
        block_k = 512 if width % 512 == 0 else 128
        return Settings(16, 64, block_k, 4, 3) if n >= 64 * 264 else Settings(16, 32, block_k, 4, 4)
    block_m = min(128, max(32, 1 << (m - 1).bit_length()))
    if _capability(target) < (9, 0):
        if operand != "int8":
            return Settings(min(64, block_m), 128, 128, 8, 3)
        # With these a tile of 128 tokens takes so many registers that a multiprocessor holds one block.
        block_m = min(64, block_m) if epilogue in ("gated_residual", "gelu_quantize") else block_m
        return Settings(block_m, 128, 128, 8 if block_m == 128 else 4, 3)
    if operand != "int8" or width % 256:  # a step of 256 codes would end in the middle
        return Settings(block_m, 128, 128, 4 if operand == "int8" else 8, 3)
    if block_m < 64:
        return Settings(block_m, 128, 256, 4, 3)

    def tiles(tokens: int, channels: int) -> int:
        return -(-m // tokens) * -(-n // channels)

    # On some 132 multiprocessors: along a long row, twice the work between two barriers; else two blocks on each, of
    # four warps, so that a barrier holds up one half of the work. A head with its norm and turn is 128 wide.
    if width >= 8192 and width % 512 == 0 and epilogue != "norm_rotary" and tiles(128, 256) >= 132:
        return Settings(128, 256, 512, 8, 2)
    return Settings(64, 256 if tiles(64, 256) >= 264 and epilogue != "norm_rotary" else 128, 256, 4, 3)


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
        rows = [{**row, "settings": asdict(Settings(**row["settings"]))} for row in table["rows"]]
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


def _capability(target: Target) -> tuple[int, ...]:
    return tuple(int(part) for part in target.compute_capability.split(".")) if target.compute_capability else ()


@functools.cache
def _say(line: str) -> None:
    """Once a process."""
    print(line, file=sys.stderr, flush=True)
