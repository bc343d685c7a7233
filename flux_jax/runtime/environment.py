"""Where the process runs: what JAX reads before it starts, the dtype that suits the device, versions of packages.

In: a device ("cpu", "gpu" or None), a dtype or "auto", a package. Out: environment variables, JAX started or a sentence
why it cannot be, a numpy dtype, a version. The library never calls `set_environment`; programs do, before JAX is
imported.
"""

import functools
import importlib.metadata
import os
import platform
import re
import subprocess
import sys
from typing import Any

from flux_jax.errors import DISTRIBUTION, UserError, pip_install, shortened
from flux_jax.runtime import memory

OURS = ("XLA_PYTHON_CLIENT_PREALLOCATE", "XLA_PYTHON_CLIENT_MEM_FRACTION")  # variables that no start fails of
READ_FLAGS = "from jaxlib import xla_client; xla_client.make_cpu_client()"
PINNED = {  # what would draw other noise from the same seed, or compute nothing at all, is as it is by default
    "JAX_DEFAULT_PRNG_IMPL": ("jax_default_prng_impl", "threefry2x32"),
    "JAX_THREEFRY_PARTITIONABLE": ("jax_threefry_partitionable", True),
    "JAX_DISABLE_JIT": ("jax_disable_jit", False),
    "JAX_TRANSFER_GUARD": ("jax_transfer_guard", "allow"),
}
PATIENCE = 60  # seconds for a process that reads flags, 0.3 usually


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
        if "jax" in sys.modules:  # which has read the variable
            sys.modules["jax"].config.update("jax_platforms", "cpu")


def start_jax() -> None:
    """Imports JAX, with what our programs rely on, and makes it look for its devices. UserError that names the
    variables which keep it from that."""
    try:
        if (flags := os.environ.get("XLA_FLAGS")) and (said := _refused(flags)):
            raise _cannot_start(said)
        import jax

        for variable, (setting, value) in PINNED.items():
            if variable in os.environ:
                jax.config.update(setting, value)
        jax.devices()
    except UserError:
        raise
    except Exception as error:  # whatever a plugin, a driver or a value of a variable makes of it
        raise _cannot_start(str(error) or type(error).__name__) from error


def refusal_to_start(error: Exception) -> UserError | None:
    """For an error that nothing else explains: the sentence of JAX that cannot start, where that was the reason; None
    where JAX starts, or nobody has tried it."""
    if not any(name.partition(".")[0] == "jax" for name in list(sys.modules)):
        return None
    try:
        start_jax()
    except UserError:  # of a second attempt, whose own words say less
        return _cannot_start(str(error) or type(error).__name__)
    return None


@functools.cache
def _refused(flags: str) -> str | None:
    """What XLA says of the value of XLA_FLAGS where it refuses it. It ends the process then, so another one tries."""
    environment = os.environ | {"XLA_FLAGS": flags, "TF_CPP_MIN_LOG_LEVEL": "2"}
    command = [sys.executable, "-c", READ_FLAGS]
    try:
        done = subprocess.run(command, env=environment, capture_output=True, timeout=PATIENCE, stdin=subprocess.DEVNULL)
    except (OSError, subprocess.SubprocessError):
        return None  # it cannot be tried
    said = re.search(r"^[EF]\d{4} .*?\] (.*)", done.stderr.decode("utf-8", "replace"), re.MULTILINE)
    return said[1] if done.returncode and said else None


def _cannot_start(said: str) -> UserError:
    variables = [
        f"{name}={shortened(value, 40, quote=False)}"
        for name, value in sorted(os.environ.items())
        if name.startswith(("JAX_", "XLA_")) and name not in OURS and value
    ]
    said = " ".join(said.partition(" (set JAX_PLATFORMS")[0].split()).removesuffix(".")
    said = shortened(said, 140, quote=False)
    if not variables:
        return UserError(f"JAX cannot start: {said}; reinstall it with {pip_install()}.")
    return UserError(f"JAX cannot start with {', '.join(variables)}: {said}; unset what does not suit this machine.")


def resolve_dtype(dtype: Any) -> Any:
    """ "auto" as the dtype that suits the machine, anything else as a numpy dtype."""
    import jax
    import jax.numpy as jnp

    if isinstance(dtype, str) and dtype == "auto":
        return jnp.dtype(jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16)
    return jnp.dtype(dtype)
