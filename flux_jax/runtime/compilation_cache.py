"""JAX's persistent compilation cache in the user's cache folder, so that a program is compiled once per machine and not
once per run.

In: environment variables. Out: the folder, in use. A cache is a comfort: one that cannot be placed, read or written, or
whose entries are damaged, only costs time. Never done at import: a command line calls `enable`, a library user may.
"""

import contextlib
import functools
import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

NAME = "compiled"  # in `folder`; another name for another form of the entries


def folder() -> Path | None:
    """FLUX_JAX_CACHE, or `flux_jax` in XDG_CACHE_HOME, or in ~/.cache; None where that asks for a home folder and there
    is none."""
    own, base = os.environ.get("FLUX_JAX_CACHE"), os.environ.get("XDG_CACHE_HOME")
    with contextlib.suppress(RuntimeError):
        if own:
            return Path(own).expanduser().absolute()
        if base and os.path.isabs(base):  # relative ones are to be ignored, says its specification
            return Path(base) / "flux_jax"
        return Path.home() / ".cache" / "flux_jax"
    return None


def enable() -> Path | None:
    """Keeps every compiled program from now on and returns the folder; None where nothing can be written there. A
    folder that the user chose for JAX itself (JAX_COMPILATION_CACHE_DIR) is used as it is."""
    import jax

    chosen, home = os.environ.get("JAX_COMPILATION_CACHE_DIR"), folder()
    where = Path(chosen) if chosen else home and home / NAME
    if where is None or not _usable(where):
        if chosen:
            jax.config.update("jax_compilation_cache_dir", None)
        return None
    if not chosen:
        _seal_entries(str(where))
        jax.config.update("jax_compilation_cache_dir", str(where))
        # Small programs too: a run consists of a few large ones and dozens that take 20 ms each.
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)
    return where


def _usable(where: Path) -> bool:
    if "://" in str(where):  # a cloud's, which JAX knows
        return True
    try:
        where.mkdir(parents=True, exist_ok=True)
    except OSError:
        return False
    return os.access(where, os.R_OK | os.W_OK | os.X_OK)


class Sealed:
    """A cache of JAX's (jax._src.compilation_cache_interface) whose entries begin with the SHA-256 of their key and of
    what follows: an entry that was damaged, cut short or renamed is not there. JAX itself would hand it to LLVM, which
    ends the process."""

    def __init__(self, base: Any, path: str):
        self._base, self._path = base, path

    def get(self, key: str) -> bytes | None:
        try:
            entry = self._base.get(key)
            if entry is None or entry[:32] == _seal(key, entry[32:]):
                return entry and entry[32:]
            Path(self._path, f"{key}-cache").unlink()  # JAX writes none where one is
        except OSError:
            pass
        return None

    def put(self, key: str, value: bytes) -> None:
        with contextlib.suppress(OSError):
            self._base.put(key, _seal(key, value) + value)


def _seal(key: str, value: bytes) -> bytes:
    return hashlib.sha256(key.encode() + b"\0" + value).digest()


@functools.cache
def _seal_entries(ours: str) -> None:
    """Seals the entries of the cache that JAX will make for that folder. A JAX that makes it in another way keeps them
    as they are."""
    with contextlib.suppress(ImportError, AttributeError):
        from jax._src import compilation_cache as internals

        make: Callable[[str], Any] = internals.get_file_cache

        def sealing(path: str) -> Any:
            made = make(path)
            return (Sealed(made[0], path), path) if made and path == ours else made

        internals.get_file_cache = sealing
