"""JAX's start: a sentence that names the variables which keep it from that, and none of them that changes a picture."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from flux_jax.cli import main
from flux_jax.errors import UserError
from flux_jax.runtime import environment

ROOT = Path(__file__).parents[2]
MUTED = ("JAX_", "XLA_")


@pytest.fixture(autouse=True)
def no_variables(monkeypatch):
    for name in [name for name in os.environ if name.startswith(MUTED)]:
        monkeypatch.delenv(name)


@pytest.mark.parametrize(
    "error", [AssertionError(), RuntimeError("Unable to initialize backend 'a': no.\n b (set JAX_PLATFORMS='')")]
)
def test_whatever_jax_raises_as_it_starts_names_the_variables(error, monkeypatch, capsys):
    monkeypatch.setattr(jax, "devices", lambda: (_ for _ in ()).throw(error))
    monkeypatch.setenv("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # ours
    with pytest.raises(UserError, match="^JAX cannot start: .*reinstall"):
        environment.start_jax()
    monkeypatch.setenv("JAX_PLATFORMS", "typo" * 30)
    monkeypatch.setenv("XLA_FLAGS", "")
    with pytest.raises(UserError, match="^JAX cannot start with JAX_PLATFORMS=typo.*typo: .*; unset what") as refusal:
        main.check_device(None)
    assert len(str(refusal.value)) <= 300
    assert main.guarded(lambda argv: 1 / 0) == 2  # whoever met it first, without the function
    assert "JAX_PLATFORMS" in capsys.readouterr().err


def test_errors_that_are_not_jaxs_start_are_raised():
    assert environment.refusal_to_start(ZeroDivisionError()) is None


@pytest.mark.parametrize(
    "flags", ["--xla_no_such_flag=1", "--xla_force_host_platform_device_count=many", "/no/file", " "]
)
def test_flags_that_xla_would_abort_at_are_refused_before(flags, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", flags)
    with pytest.raises(UserError, match="^JAX cannot start with XLA_FLAGS=.*flag"):
        environment.start_jax()


def test_the_same_seed_is_the_same_noise_whatever_the_variables_say(monkeypatch):
    noise = jax.random.normal(jax.random.key(1), (3,))
    others = {"JAX_DEFAULT_PRNG_IMPL": "rbg", "JAX_THREEFRY_PARTITIONABLE": False, "JAX_DISABLE_JIT": True}
    for variable, value in (others | {"JAX_TRANSFER_GUARD": "disallow"}).items():
        setting, right = environment.PINNED[variable]
        before = getattr(jax.config, setting)
        monkeypatch.setenv(variable, str(value))
        jax.config.update(setting, value)  # as JAX does where it reads the variable
        try:
            environment.start_jax()
            assert getattr(jax.config, setting) == right
            assert (jax.random.normal(jax.random.key(1), (3,)) == noise).all()
        finally:
            jax.config.update(setting, before)


def test_a_value_that_jax_refuses_as_it_is_imported():
    done = subprocess.run(
        [sys.executable, "-m", "flux_jax.plan"],
        env=os.environ | {"JAX_PLATFORMS": "cpu", "JAX_ENABLE_X64": "maybe"},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert "JAX_ENABLE_X64=maybe" in done.stderr


def test_a_gpu_that_a_variable_hides(monkeypatch):
    with pytest.raises(UserError, match="cuda13"):
        main.check_device("gpu")
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    with pytest.raises(UserError, match="JAX_PLATFORMS=cpu keeps"):
        main.check_device("gpu")


def test_a_program_that_computes_on_the_cpu_alone_says_so_to_jax(monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    environment.set_environment("cpu")
    assert os.environ["JAX_PLATFORMS"] == "cpu"
    assert jax.config.jax_platforms == "cpu"
