"""`python -m flux_jax.doctor`: can this machine make pictures, and if not, what mends it?

In: nothing. Out: a line for each thing that a generation needs, `ok`, `note` (works, but could be better) or `FAIL`,
with the command that mends it. Exit status 0 only when `python -m flux_jax.generate` can run here; notes do not count.
"""

import dataclasses
import importlib.metadata
import importlib.util
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from flux_jax.cli.main import Parser, guarded, output, program, say
from flux_jax.errors import DISTRIBUTION, UserError, pip_install
from flux_jax.runtime import compilation_cache, memory
from flux_jax.runtime.environment import set_environment, start_jax, version_of

DRIVER_FILE = Path("/proc/driver/nvidia/version")
DRIVER = 580  # the first driver for CUDA 13. Source: NVIDIA's CUDA Toolkit release notes, table of driver versions
GPU_EXTRA = pip_install("cuda13")
CUDNN = ("nvidia-cudnn-cu13", "nvidia-cudnn-cu12")
GIGABYTE = 1e9
DISK = 1.0  # GB that pictures and compiled programs want at least
RAM = 2.0  # GB for JAX, the compiler and a small model
GPU_SHARE = 0.5  # of its memory: less than that is free only where something else uses it


@dataclasses.dataclass(frozen=True)
class Finding:
    """One line. status: "ok", "note" or "FAIL"; fix: what to do about it."""

    name: str
    status: str
    text: str
    fix: str = ""

    def __str__(self) -> str:
        return f"{self.status:4} {self.name:14} {self.text}" + (f" -> {self.fix}" if self.fix else "")


def tried(package: str, version: str) -> bool:
    """Whether pyproject.toml allows that version on this Python; a checkout that was never installed cannot say."""
    from packaging.requirements import Requirement

    try:
        requirements = map(Requirement, importlib.metadata.requires(DISTRIBUTION) or [])
    except importlib.metadata.PackageNotFoundError:
        return True
    ours = (each for each in requirements if each.name == package and (not each.marker or each.marker.evaluate()))
    return all(each.specifier.contains(version, prereleases=True) for each in ours)


def python() -> Finding:
    version = ".".join(map(str, sys.version_info[:3]))
    if not (3, 11) <= sys.version_info[:2] < (3, 14):
        return Finding("python", "FAIL", version, "use Python 3.11, 3.12 or 3.13")
    return Finding("python", "ok", version)


def package(name: str) -> Finding:
    """A library whose versions matter."""
    version, fix = version_of(name), pip_install()
    if version is None:
        return Finding(name, "FAIL", "not installed", fix)
    if not tried(name, version):
        return Finding(name, "FAIL", f"{version}, which was never tried", fix)
    jaxlib = version_of("jaxlib")
    if name == "jax" and jaxlib != version:
        return Finding(name, "FAIL", f"{version}, but jaxlib is {jaxlib}", f"pip install -U jax=={version}")
    return Finding(name, "ok", version)


def driver() -> Finding:
    """NVIDIA's kernel module, and whether JAX has what it needs to use it."""
    try:
        match = re.search(r"Kernel Module.*?\s(\d+)\.(\d+)", DRIVER_FILE.read_text())
    except OSError:
        text = "no NVIDIA driver here: pictures are made on the CPU"
        return Finding("driver", "note", text, f"for an NVIDIA GPU, install driver {DRIVER} or newer")
    if match and int(match[1]) < DRIVER:
        return Finding("driver", "note", f"{match[1]}.{match[2]} is too old for CUDA 13", f"install {DRIVER} or newer")
    return Finding("driver", "ok", f"{match[1]}.{match[2]}" if match else "of an unknown version")


def cuda() -> Finding:
    plugin, jax = version_of("jax-cuda13-plugin") or version_of("jax-cuda12-plugin"), version_of("jax")
    if plugin is None:
        return Finding("CUDA", "note", "JAX's CUDA plugin is not installed", f"for an NVIDIA GPU, {GPU_EXTRA}")
    if plugin != jax:
        return Finding("CUDA", "FAIL", f"plugin {plugin} beside jax {jax}", GPU_EXTRA)
    return Finding("CUDA", "ok", f"JAX's plugin {plugin}")


def cudnn() -> Finding:
    found = next(((name, version) for name in CUDNN if (version := version_of(name))), None)
    if found is not None:
        return Finding("cuDNN", "ok", f"{found[1]} ({found[0]})")
    if version_of("jax-cuda13-plugin") is not None:
        return Finding("cuDNN", "FAIL", "not installed with pip", GPU_EXTRA)
    return Finding("cuDNN", "note", "not installed with pip", f"for an NVIDIA GPU, {GPU_EXTRA}")


def device() -> Finding:
    """What JAX computes on; a device that is here and not used is a failure, not a fallback."""
    try:
        start_jax()
    except UserError as refusal:
        return Finding("device", "FAIL", str(refusal).rstrip("."), GPU_EXTRA)
    import jax
    import jax.numpy as jnp

    try:
        first = jax.local_devices()[0]
        total = float(jax.jit(lambda x: (x @ x).sum())(jnp.ones((64, 64))))
    except Exception as error:  # whatever stops a program of one line stops a picture
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:160]
        return Finding("device", "FAIL", f"JAX cannot compute: {reason}", GPU_EXTRA)
    if total != 64**3:
        return Finding("device", "FAIL", f"{first.device_kind} multiplies wrongly: {total}", "check the hardware")
    if first.platform == "cpu" and DRIVER_FILE.exists() and "cpu" not in os.environ.get("JAX_PLATFORMS", ""):
        return Finding("device", "FAIL", "JAX computes on the CPU although a GPU is here", GPU_EXTRA)
    return Finding("device", "ok", f"{first.device_kind} ({first.platform})")


def kernels() -> Finding:
    """Whether the ternary kernels run on the device."""
    from pallas_kernels import current_target, supported

    runs, why = supported("triton", current_target())
    if runs:
        return Finding("kernels", "ok", f"compute capability {current_target().compute_capability}")
    fix = "they need an NVIDIA GPU of compute capability 8.0 or higher"
    return Finding("kernels", "note", f"{why}: ternary layers run in XLA", fix)


def preallocation() -> Finding:
    value = os.environ.get("XLA_PYTHON_CLIENT_PREALLOCATE", "")
    share = os.environ.get("XLA_PYTHON_CLIENT_MEM_FRACTION", str(memory.FRACTION))
    if value.lower() not in ("false", "0"):
        why = f"XLA_PYTHON_CLIENT_PREALLOCATE={value}: a program takes {share} of the GPU at once"
        return Finding("preallocation", "note", why, "unset it")
    return Finding("preallocation", "ok", f"off; programs may take {share} of the GPU")


def device_memory() -> Finding:
    import jax

    first = jax.local_devices()[0]
    size, free = memory.capacity(first), memory.free(first)
    if first.platform == "cpu" or size is None or free is None:
        return Finding("GPU memory", "ok", "no GPU, none needed")
    text = f"{free / GIGABYTE:.1f} of {size / GIGABYTE:.1f} GB free"
    if free < GPU_SHARE * size:
        return Finding("GPU memory", "note", text, "nvidia-smi says which other program holds it")
    return Finding("GPU memory", "ok", text)


def ram() -> Finding:
    free = memory.host_memory("MemAvailable")
    if free is None:
        return Finding("RAM", "ok", "this system does not say how much is free")
    text = f"{free / GIGABYTE:.1f} GB available"
    if free < RAM * GIGABYTE:
        return Finding("RAM", "FAIL", text, f"close programs: {RAM:.0f} GB are needed")
    return Finding("RAM", "ok", text)


def disk() -> Finding:
    cache = compilation_cache.folder() or Path.cwd()
    folder = next(parent for parent in (cache, *cache.parents) if os.path.exists(parent))
    free = {path: shutil.disk_usage(path).free / GIGABYTE for path in dict.fromkeys((Path.cwd(), folder))}
    text = ", ".join(f"{gigabytes:.1f} GB free in {path}" for path, gigabytes in free.items())
    if min(free.values()) < DISK:
        return Finding("disk", "FAIL", text, f"free {DISK:.0f} GB, or set FLUX_JAX_CACHE to another disk")
    try:
        with tempfile.TemporaryFile(dir=Path.cwd()):
            pass
    except OSError as error:
        return Finding("disk", "FAIL", f"cannot write in {Path.cwd()}: {error.strerror}", "change to another folder")
    return Finding("disk", "ok", text)


def token() -> Finding:
    import huggingface_hub

    if huggingface_hub.get_token():
        return Finding("hub token", "ok", "there is one")
    return Finding("hub token", "note", "none; only gated weights (FLUX.1-dev) need it", "hf auth login")


def model() -> Finding:
    """The model that comes with the package, loaded as a generation loads it."""
    from flux_jax.checkpoints.checkpoint import DEFAULT_MODEL, Checkpoint
    from flux_jax.sampling.pipeline import FluxPipeline

    try:
        stored = Checkpoint.open(DEFAULT_MODEL)
        FluxPipeline.from_pretrained(DEFAULT_MODEL)
    except UserError as error:
        return Finding("model", "FAIL", str(error), f"{pip_install()} --force-reinstall")
    return Finding("model", "ok", f"{stored.config.name} in {stored.directory}")


CHECKS: tuple[Callable[[], Finding], ...] = (
    python, lambda: package("jax"), lambda: package("flax"), driver, cuda, cudnn, device, kernels, preallocation,
    device_memory, ram, disk, token, model,
)  # fmt: skip


def examine() -> list[Finding]:
    """Every finding, in order; a check that breaks is itself a failure."""
    found = []
    for check in CHECKS:
        try:
            found.append(check())
        except Exception as error:  # a doctor must not die of the disease
            name = getattr(check, "__name__", "check").replace("_", " ")
            fix = pip_install() if isinstance(error, ImportError) else "mend what failed above first"
            found.append(Finding(name, "FAIL", f"{type(error).__name__}: {error}".splitlines()[0], fix))
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the findings; 0 if none is a failure, else 2."""
    return guarded(run, argv)


def run(argv: Sequence[str]) -> int:
    Parser(prog=program("doctor"), description=__doc__.partition("\n\n")[0]).parse_args(argv)
    set_environment(None)
    found = examine()
    output("\n".join(map(str, found)))
    failed = [finding.name for finding in found if finding.status == "FAIL"]
    say(f"{len(failed)} to mend: {', '.join(failed)}" if failed else "Pictures can be made here.")
    return 2 if failed else 0
