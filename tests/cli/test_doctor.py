"""`python -m flux_jax.doctor`: a line for each thing, the fix for what is broken, and the truth about all of it."""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from flux_jax.cli import doctor
from flux_jax.runtime import memory

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    monkeypatch.setenv("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")


def test_this_machine_can_make_pictures(capsys):
    assert doctor.main([]) == 0
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert len(lines) == len(doctor.CHECKS)
    assert {line.split()[0] for line in lines} <= {"ok", "note"}
    assert all(line.startswith("ok") or " -> " in line for line in lines)
    for word in ("python", "jax", "driver", "CUDA", "cuDNN", "kernels", "preallocation", "RAM", "disk", "hub token"):
        assert any(line[5:].startswith(word) for line in lines), word
    assert "Pictures can be made here." in err


@pytest.fixture
def versions(monkeypatch):
    """What is installed, and what the package asks for, as the doctor sees it."""
    found = {"jax": "0.10.2", "jaxlib": "0.10.2", "flax": "0.12.8"}
    asked = ["jax<0.11,>=0.10.2; python_version < '4'", "jax>=0.20; python_version >= '4'", "flax<0.13,>=0.12.8"]
    asked += ["jax[cuda13]>=9; extra == 'cuda13'", "jaxtyping>=99"]
    monkeypatch.setattr(doctor, "version_of", found.get)
    monkeypatch.setattr(doctor.importlib.metadata, "requires", lambda name: asked)
    return found


@pytest.mark.parametrize(
    ("installed", "check", "status", "words"),
    [
        ({}, lambda: doctor.package("jax"), "ok", "0.10.2"),
        ({"jax": "0.9.1"}, lambda: doctor.package("jax"), "FAIL", "never tried"),
        ({"jax": None}, lambda: doctor.package("jax"), "FAIL", "not installed"),
        ({"jax": "0.11.0"}, lambda: doctor.package("jax"), "FAIL", "never tried"),
        ({"jax": "0.10.3.dev1", "jaxlib": "0.10.3.dev1"}, lambda: doctor.package("jax"), "ok", "0.10.3.dev1"),
        ({"jaxlib": "0.10.0"}, lambda: doctor.package("jax"), "FAIL", "jaxlib is 0.10.0"),
        ({"flax": "0.11"}, lambda: doctor.package("flax"), "FAIL", "never tried"),
        ({"jax-cuda13-plugin": "0.10.2"}, doctor.cuda, "ok", "0.10.2"),
        ({"jax-cuda13-plugin": "0.9.0"}, doctor.cuda, "FAIL", "plugin 0.9.0 beside jax 0.10.2"),
        ({"jax-cuda13-plugin": "0.10.2"}, doctor.cudnn, "FAIL", "not installed"),
        ({"nvidia-cudnn-cu13": "9.10.0"}, doctor.cudnn, "ok", "9.10.0"),
    ],
)
def test_versions(versions, installed, check, status, words):
    versions |= installed
    finding = check()
    assert finding.status == status
    assert words in finding.text
    assert bool(finding.fix) is (status == "FAIL")


def test_what_is_installed_is_what_the_package_asks_for(monkeypatch):
    """Not a copy of its requirements; and a checkout that was never installed has none to hold against them."""
    for name in ("jax", "flax"):
        assert doctor.package(name).status == "ok"
        assert not doctor.tried(name, "0.1")

    def missing(name):
        raise doctor.importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(doctor.importlib.metadata, "requires", missing)
    assert doctor.tried("jax", "0.1")


def test_driver(monkeypatch, tmp_path):
    file = tmp_path / "version"
    monkeypatch.setattr(doctor, "DRIVER_FILE", file)
    assert doctor.driver().status == "note"
    for version, status in (("535.104.05", "note"), ("580.82.07", "ok")):
        file.write_text(f"NVRM version: NVIDIA UNIX x86_64 Kernel Module  {version}  Sat\nGCC version: 12\n")
        finding = doctor.driver()
        assert (finding.status, finding.text[:3]) == (status, version[:3])
    monkeypatch.delenv("JAX_PLATFORMS")  # a driver, and JAX on the CPU all the same: no silent fallback
    finding = doctor.device()
    assert finding.status == "FAIL"
    assert "cuda13" in finding.fix


def test_kernels_on_an_old_gpu(monkeypatch):
    import pallas_kernels

    for capability, status in (("7.5", "note"), ("8.6", "ok"), ("9.0", "ok")):
        target = pallas_kernels.Target("gpu", capability, "NVIDIA")
        monkeypatch.setattr(pallas_kernels, "current_target", lambda target=target: target)
        finding = doctor.kernels()
        assert (finding.status, capability in finding.text) == (status, True)


def test_memory_disk_and_preallocation(monkeypatch):
    monkeypatch.setattr(memory, "host_memory", lambda field: 10**9)
    assert doctor.ram().status == "FAIL"
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: SimpleNamespace(free=10**8))
    assert doctor.disk().status == "FAIL"
    monkeypatch.setenv("XLA_PYTHON_CLIENT_PREALLOCATE", "true")
    assert doctor.preallocation().status == "note"


@pytest.mark.parametrize(
    "lost", [*(pytest.param(name, marks=pytest.mark.slow) for name in ("orbax", "tokenizers", "packaging")), "jax"]
)
def test_a_library_that_generation_needs_and_that_is_not_there(lost):
    """In a process where importing it fails: never a traceback, never exit status 0."""
    code = f"import sys; sys.modules[{lost!r}] = None; from flux_jax.cli import doctor; sys.exit(doctor.main([]))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2, done.stderr
    failed = [line for line in done.stdout.splitlines() if line.startswith("FAIL")]
    assert any("pip install" in line for line in failed)
    assert all(" -> " in line for line in failed)
    assert "Traceback" not in done.stderr


def test_memory_that_another_program_holds(monkeypatch):
    monkeypatch.setattr(memory, "capacity", lambda device: 8 * 10**10)
    import jax

    monkeypatch.setattr(jax, "local_devices", lambda: [SimpleNamespace(platform="gpu")])
    for free, status in ((10**9, "note"), (7 * 10**10, "ok")):
        monkeypatch.setattr(memory, "free", lambda device, free=free: free)
        assert doctor.device_memory().status == status


def test_one_failure_is_exit_code_2(monkeypatch, capsys):
    def broken():
        raise OSError("no such thing")

    monkeypatch.setattr(doctor, "CHECKS", (doctor.python, broken))
    assert doctor.main([]) == 2
    out, err = capsys.readouterr()
    assert "FAIL broken" in out
    assert "no such thing" in out
    assert "1 to mend: broken" in err
    monkeypatch.setattr(sys, "version_info", (3, 10, 4))
    assert doctor.python().status == "FAIL"
