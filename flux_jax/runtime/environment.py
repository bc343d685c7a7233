"""Where the process runs: what JAX reads before it starts, the dtype that suits the device, versions of packages.

In: a device ("cpu", "gpu" or None), a dtype or "auto", a package. Out: environment variables, a numpy dtype, a version.
The library never calls `set_environment`; programs do, before JAX is imported.
"""

import importlib.metadata
import os
import platform
from typing import Any

from flux_jax.errors import DISTRIBUTION
from flux_jax.runtime import memory


def version_of(package: str) -> str | None:
    """Of an installed package, by its name on PyPI; None where it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def version() -> str:
    """Our own; a checkout that was never installed has none."""
    return version_of(DISTRIBUTION) or "unknown"


def provenance(device: Any) -> dict[str, Any]:
    """What a picture's record says of where it was made: the device of JAX, and versions."""
    import jax

    versions = {"flux_jax": version(), "jax": jax.__version__, "python": platform.python_version()}
    return {"device": f"{device.platform} {device.device_kind}", "versions": versions}


def set_environment(device: str | None) -> None:
    """What JAX reads when it is imported, so it must be set before. The user's own values win, but for the
    device that is asked for."""
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # leave the rest of the GPU to others
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", str(memory.FRACTION))
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    if device == "cpu":
        os.environ["JAX_PLATFORMS"] = "cpu"


def resolve_dtype(dtype: Any) -> Any:
    """ "auto" as the dtype that suits the machine, anything else as a numpy dtype."""
    import jax
    import jax.numpy as jnp

    if isinstance(dtype, str) and dtype == "auto":
        return jnp.dtype(jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16)
    return jnp.dtype(dtype)
