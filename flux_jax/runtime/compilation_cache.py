"""JAX's persistent compilation cache in the user's cache folder, so that a program is compiled once per machine and not
once per run.

In: environment variables. Out: the folder, in use. Never done at import: a command line calls `enable`, a library user
may.
"""

import os
from pathlib import Path


def folder() -> Path:
    """FLUX_JAX_CACHE, or `flux_jax` in XDG_CACHE_HOME, or in ~/.cache."""
    if own := os.environ.get("FLUX_JAX_CACHE"):
        return Path(own).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "flux_jax"


def enable() -> Path | None:
    """Keeps every compiled program from now on and returns the folder; None where it cannot be written, which only
    costs time. A folder that the user chose for JAX itself (JAX_COMPILATION_CACHE_DIR) is left as it is."""
    import jax

    if chosen := os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        return Path(chosen)
    where = folder() / "xla"
    try:
        where.mkdir(parents=True, exist_ok=True)
    except OSError:
        return None
    if not os.access(where, os.W_OK):
        return None
    jax.config.update("jax_compilation_cache_dir", str(where))
    # Small programs too: a run consists of a few large ones and dozens that take 20 ms each.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)
    return where
