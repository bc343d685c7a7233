"""Joules that the first GPU has used, from NVML, where it can be read."""


def joules() -> float | None:
    """Since the driver was loaded; None without nvidia-ml-py, without a GPU, or where the GPU does not count them."""
    try:
        import pynvml
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
        return pynvml.nvmlDeviceGetTotalEnergyConsumption(pynvml.nvmlDeviceGetHandleByIndex(0)) / 1e3
    except pynvml.NVMLError:
        return None


def since(before: float | None, count: int) -> float | None:
    """Joules for each of `count` pictures drawn since `before` was read."""
    now = joules()
    return None if before is None or now is None else (now - before) / count
