"""`python -m bench.machine`: what this machine is: versions, card, driver, and whether a picture's imports succeed.

In: nothing. Out: a row each for versions, host, card, JAX's device, and imports.
"""

import importlib
import os
import platform
import shutil
import subprocess
import tempfile
import time
from collections.abc import Sequence
from typing import Any

from bench import report
from flux_jax.errors import UserError
from flux_jax.runtime.environment import version_of
from flux_jax.runtime.memory import host_memory

PACKAGES = (
    "jax", "jaxlib", "jax-cuda13-plugin", "nvidia-cudnn-cu13", "nvidia-cublas", "flax", "optax", "orbax-checkpoint",
    "numpy", "torch", "diffusers", "jaxtyping", "beartype", "pytest", "pytest-xdist",
)  # fmt: skip
CARD = "name,driver_version,memory.total,power.limit,clocks.max.sm,clocks.sm,temperature.gpu"
GIGABYTE = 1e9


def host() -> dict[str, Any]:
    memory, folder = host_memory("MemAvailable"), tempfile.gettempdir()
    return {
        "cores": os.cpu_count(),
        "memory_gb": memory and memory / GIGABYTE,
        "free_disk_gb": shutil.disk_usage(folder).free / GIGABYTE,
        "folder": folder,
    }


def card() -> dict[str, Any]:
    if shutil.which("nvidia-smi") is None:
        return {"skipped": "no nvidia-smi"}
    words = ["nvidia-smi", f"--query-gpu={CARD}", "--format=csv,noheader"]
    printed = subprocess.run(words, capture_output=True, text=True, timeout=20, check=True).stdout.strip()
    return dict(zip(CARD.split(","), (value.strip() for value in printed.splitlines()[0].split(",")), strict=True))


def device() -> dict[str, Any]:
    import jax

    start, first = time.monotonic(), jax.devices()[0]
    capability = getattr(first, "compute_capability", None)
    return {"device": first.device_kind, "compute_capability": capability, "start_seconds": time.monotonic() - start}


def imports() -> dict[str, Any]:
    """That of everything that a picture, and a benchmark of it, needs."""
    for name in ("flux_jax.sampling.pipeline", "flux_jax.distill.training", "bench.kernels", "bench.denoise"):
        importlib.import_module(name)
    return {"imports": "as they should"}


def main(argv: Sequence[str]) -> None:
    args = report.parser("machine", __doc__, tiny="the same").parse_args(argv)
    journal = report.journal(args)
    versions = {"python": platform.python_version()} | {name: version_of(name) for name in PACKAGES}
    journal.row(versions=", ".join(f"{name} {version}" for name, version in versions.items() if version))
    journal.row(absent=", ".join(name for name, version in versions.items() if not version))
    rows = [journal.attempt({}, job) for job in (host, card, device, imports)]
    report.finish("machine", {"versions": versions, "rows": rows}, save=args.save)
    if any("failure" in row for row in rows):
        raise UserError("not all is as it should be", 1)


if __name__ == "__main__":
    raise SystemExit(report.run(main))
