"""Every benchmark's command line: its options agree with those that all have, and no time is taken unasked."""

import importlib
import pkgutil

import jax
import pytest

import bench
from flux_jax.errors import UserError

MODULES = {name: importlib.import_module(f"bench.{name}") for _, name, _ in pkgutil.iter_modules(bench.__path__)}
COMMANDS = sorted(name for name, module in MODULES.items() if hasattr(module, "main"))
TIMED = ("baseline", "correct", "distill_steps", "energy", "fused", "kernels", "mosaic", "tune")


@pytest.mark.parametrize("name", COMMANDS)
def test_options_have_names_of_their_own(name, capsys):
    with pytest.raises(SystemExit) as ended:
        MODULES[name].main(["--help"])
    assert ended.value.code == 0
    assert f"python -m bench.{name}" in capsys.readouterr().out


@pytest.mark.skipif(jax.default_backend() == "gpu", reason="a GPU is here")
@pytest.mark.parametrize("name", TIMED)
def test_without_a_gpu_no_time_is_taken_unasked(name):
    with pytest.raises(UserError, match="add --tiny"):
        MODULES[name].main([])
