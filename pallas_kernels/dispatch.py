"""Which backend runs a product: decided from the device, the number of rows and the kind of activations.

In: the device that is compiled for, the rows of a product. Out: the name of a backend, "triton" or "xla".
"""

import contextlib
import functools
import sys
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass

import jax

ACTIVATIONS = ("bf16", "int8")
IMPLEMENTATIONS = ("xla", "triton")
# With more rows than this, floating activations go to XLA, which unpacks to a scratch matrix for cuBLAS. By roofline,
# not measured: the kernel saves 4 bytes of traffic a weight, and has some two thirds of cuBLAS's rate of arithmetic.
FLOATING_ROWS = 512


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
    if (chosen := _TARGET.get()) is not None:
        return chosen
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
    if capability(target) < (8, 0):
        has = target.compute_capability or "none"
        return False, f"the Triton kernels need compute capability 8.0, and {target.name or 'this GPU'} has {has}"
    return True, ""


def choose_implementation(implementation: str | None, target: Target, m: int, operand: str) -> str:
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


def capability(target: Target) -> tuple[int, ...]:
    return tuple(int(part) for part in target.compute_capability.split(".")) if target.compute_capability else ()


@functools.cache
def _say(line: str) -> None:
    """Once a process."""
    print(line, file=sys.stderr, flush=True)
