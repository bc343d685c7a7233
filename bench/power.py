"""Joules, watts and the clock of the first GPU, from the driver's own library, NVML, where they can be read."""

import ctypes
import functools
from typing import Any

SM_CLOCK = 1  # NVML's number for the clock of the multiprocessors


def joules() -> float | None:
    """Since the driver was loaded; None without NVML, without a GPU, or where the GPU does not count them."""
    found = _read("nvmlDeviceGetTotalEnergyConsumption", ctypes.c_ulonglong())
    return None if found is None else found / 1e3


def watts() -> float | None:
    """Of late; None where they cannot be read."""
    found = _read("nvmlDeviceGetPowerUsage", ctypes.c_uint())
    return None if found is None else found / 1e3


def megahertz() -> int | None:
    """The multiprocessors' clock now; None where it cannot be read."""
    return _read("nvmlDeviceGetClockInfo", ctypes.c_uint(), SM_CLOCK)


def since(before: float | None, count: int) -> float | None:
    """Joules for each of `count` pictures drawn since `before` was read."""
    now = joules()
    return None if before is None or now is None else (now - before) / count


def _read(function: str, number: Any, *arguments: int) -> int | None:
    """What a function of NVML writes into `number`; None where it fails."""
    if (found := _first_gpu()) is None:
        return None
    library, gpu = found
    failed = getattr(library, function)(gpu, *arguments, ctypes.byref(number))
    return None if failed else number.value


@functools.cache
def _first_gpu() -> tuple[Any, Any] | None:
    """NVML and its handle of the first GPU; None where there is none."""
    try:
        library = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return None
    gpu = ctypes.c_void_p()
    failed = library.nvmlInit_v2() or library.nvmlDeviceGetHandleByIndex_v2(0, ctypes.byref(gpu))
    return None if failed else (library, gpu)
