"""How much memory a device has, and what to do when it is not enough.

In: a device of JAX, or an error. Out: bytes; or the sentence that names the stage that ran out of memory and the
arguments that make it fit.
"""

from pathlib import Path
from typing import Any

from flux_jax.errors import UserError

FRACTION = 0.95  # of a GPU's memory for programs; XLA's own default is 0.75
STAGES = {"text": "encoding the prompt", "denoise": "denoising", "decode": "decoding the picture"}


def capacity(device: Any) -> int | None:
    """Bytes that programs can use on the device: XLA's limit on a GPU, the machine's memory on a CPU."""
    stats = device.memory_stats()
    return stats.get("bytes_limit") if stats else host_memory("MemTotal")


def free(device: Any) -> int | None:
    """Bytes of `capacity` that nothing lies in now; None where the system does not say."""
    stats = device.memory_stats()
    return stats["bytes_limit"] - stats["bytes_in_use"] if stats else host_memory("MemAvailable")


def peak(device: Any) -> int | None:
    """The most bytes that have lain on the device since JAX started there; None where it does not count them."""
    return (device.memory_stats() or {}).get("peak_bytes_in_use")


def host_memory(field: str) -> int | None:
    """A field of /proc/meminfo in bytes; None on systems without it."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith(f"{field}:")), None)


def is_exhausted(error: BaseException) -> bool:
    """True for Python's error, and for XLA's (jax.errors.JaxRuntimeError, a RuntimeError)."""
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and "RESOURCE_EXHAUSTED" in str(error))


def exhausted(doing: str, remedies: list[str]) -> UserError:
    """The sentence for a device that ran out of memory while `doing` something; `remedies` that would have helped."""
    remedy = " or ".join([*remedies, "a GPU with more memory"])
    return UserError(f"Out of memory while {doing}; try {remedy}.", 4)


def remedies(stage: str, offload: str, vae_tiling: str) -> list[str]:
    """Arguments that lower a stage's peak and are not in use yet, the strongest first."""
    found = []
    if stage == "text" and offload != "layers":
        found.append('offload="layers"')
    if stage != "text" and offload == "none":
        found.append('offload="model"')
    if stage == "decode" and vae_tiling != "on":
        found.insert(0, 'vae_tiling="on"')
    if stage == "denoise":
        found.append("a ternary checkpoint")
    if stage != "text":
        found.append("a smaller size")
    return found
