"""The compilation cache costs time at worst: wherever it is asked for, and whatever became of its entries."""

import os
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax._src import compilation_cache as internals

from flux_jax.runtime import compilation_cache

VARIABLES = ("FLUX_JAX_CACHE", "XDG_CACHE_HOME", "JAX_COMPILATION_CACHE_DIR", "HOME")
SETTINGS = (
    "jax_compilation_cache_dir",
    "jax_persistent_cache_min_compile_time_secs",
    "jax_persistent_cache_min_entry_size_bytes",
)


@pytest.fixture(autouse=True)
def surroundings(monkeypatch, tmp_path):
    """No variable of the machine's; JAX as it was, behind the test."""
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    before = {name: getattr(jax.config, name) for name in SETTINGS}
    internals.reset_cache()
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    internals.reset_cache()


def test_where_it_lies(monkeypatch, tmp_path):
    assert compilation_cache.folder() == tmp_path / "home" / ".cache" / "flux_jax"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert compilation_cache.folder() == tmp_path / "home" / ".cache" / "flux_jax"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert compilation_cache.folder() == tmp_path / "flux_jax"
    monkeypatch.setenv("FLUX_JAX_CACHE", "~/own")
    assert compilation_cache.folder() == tmp_path / "home" / "own"
    monkeypatch.setenv("FLUX_JAX_CACHE", "own")
    assert compilation_cache.folder() == Path.cwd() / "own"
    monkeypatch.setenv("FLUX_JAX_CACHE", "~nobody-of-that-name/own")
    assert compilation_cache.folder() is None


def test_no_home(monkeypatch):
    monkeypatch.setattr(Path, "home", classmethod(lambda cls: cls("~").expanduser()))
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # neither HOME nor an entry of /etc/passwd
    assert compilation_cache.folder() is None
    assert compilation_cache.enable() is None


@pytest.mark.parametrize("name", ["FLUX_JAX_CACHE", "JAX_COMPILATION_CACHE_DIR"])
@pytest.mark.parametrize("where", ["/dev/null", "/dev/null/a", "/proc/a", "file", "dangling", "a" * 300])
def test_where_nothing_can_be_kept(monkeypatch, tmp_path, name, where):
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    Path("dangling").symlink_to("nowhere")
    monkeypatch.setenv(name, where)
    assert compilation_cache.enable() is None
    assert jax.jit(lambda x: x * 5)(jnp.float32(2)) == 10


def compiled(x):
    return jnp.sin(x) * 3 + 1


def entries(folder: Path) -> list[Path]:
    return sorted(folder.glob("*-cache"))


def run(x=0.5) -> float:
    """As a new process would: nothing of it is in memory."""
    jax.clear_caches()
    internals.reset_cache()
    return float(jax.jit(compiled)(jnp.float32(x)))


def test_damaged_entries_are_compiled_anew(monkeypatch, tmp_path):
    monkeypatch.setenv("FLUX_JAX_CACHE", str(tmp_path))
    folder = compilation_cache.enable()
    assert folder == tmp_path / compilation_cache.NAME
    right = run()
    (first, *_), written = entries(folder), {path: path.read_bytes() for path in entries(folder)}
    assert len(written) >= 1
    made = []
    unpack = internals.decompress_executable
    monkeypatch.setattr(internals, "decompress_executable", lambda data: made.append(1) or unpack(data))
    assert run() == right
    assert made, "what was kept is used"
    other = first.with_name(first.name.replace("-cache", "x-cache"))
    damages = {
        "a bit": lambda data: data[:100] + bytes([data[100] ^ 1]) + data[101:],
        "the last bit": lambda data: data[:-1] + bytes([data[-1] ^ 1]),
        "a bit of the sum": lambda data: bytes([data[0] ^ 1]) + data[1:],
        "cut": lambda data: data[: len(data) // 2],
        "empty": lambda data: b"",
        "zeros": lambda data: bytes(len(data)),
        "another's": lambda data: compilation_cache._seal(other.name.removesuffix("-cache"), data[32:]) + data[32:],
        "not sealed": lambda data: data[32:],
    }
    for name, damage in damages.items():
        for path, data in written.items():
            path.write_bytes(damage(data))
        made.clear()
        assert run() == right, name
        assert not made, name
        assert entries(folder) == sorted(written), name  # replaced by what was compiled
        assert run() == right
        assert made, name
