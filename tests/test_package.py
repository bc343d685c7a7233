"""What the package declares, and what importing it does."""

import ast
import importlib.metadata
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
PACKAGES = ("convert", "flux_jax", "pallas_kernels")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
REQUIREMENTS = [Requirement(line) for line in PROJECT["dependencies"]]
IMPORT_NAMES = {"orbax-checkpoint": "orbax", "pillow": "PIL"}  # where it is not the distribution's name
OPTIONAL = {"matplotlib", "skimage", "jinja2"}  # used where installed, and said where missed


@pytest.mark.parametrize("python", ["3.11", "3.12", "3.13"])
def test_markers_choose_one_requirement_of_each_name(python):
    names = [r.name for r in REQUIREMENTS if r.marker is None or r.marker.evaluate({"python_version": python})]
    assert {"jax", "flax"} <= set(names)
    assert len(names) == len(set(names))


def test_installed_versions_are_the_declared_ones():
    for requirement in REQUIREMENTS:
        if requirement.marker is None or requirement.marker.evaluate():
            version = importlib.metadata.version(requirement.name)
            assert requirement.specifier.contains(version), f"{requirement} declared, {version} installed"


def test_dependencies_are_exactly_what_is_imported():
    imported = set()
    for path in (path for package in PACKAGES for path in (ROOT / package).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                imported |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                imported.add(node.module.partition(".")[0])
    declared = {IMPORT_NAMES.get(canonicalize_name(r.name), r.name) for r in REQUIREMENTS}
    assert imported - set(sys.stdlib_module_names) - set(PACKAGES) - OPTIONAL == declared


def run(code: str) -> str:
    """Standard output of `python -c code` in a process of its own, started in the clone."""
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_importing_any_module_starts_nothing():
    """Neither torch, transformers nor a JAX backend: an import must not take a GPU, nor seconds."""
    code = f"""
import importlib, pkgutil, sys
for package in {PACKAGES}:
    for module in pkgutil.walk_packages(importlib.import_module(package).__path__, package + "."):
        importlib.import_module(module.name)
from jax._src import xla_bridge
slow = {{"torch", "diffusers", "transformers", "sentencepiece"}}
print(xla_bridge.backends_are_initialized(), sorted(slow & set(sys.modules)))
"""
    assert run(code) == "False []"


def test_command_line_starts_without_slow_imports():
    """`python -m flux_jax.generate` has seconds, and these take seconds: functions that need them import them."""
    slow = {"transformers", "sentencepiece", "huggingface_hub", "matplotlib", "optax", "scipy", "torch", "diffusers"}
    assert run(f"import sys, flux_jax.generate; print(sorted({slow} & set(sys.modules)))") == "[]"
