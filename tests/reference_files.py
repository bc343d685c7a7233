"""Files that others published and that tests compare with, where they lie on this machine: benchmarks' prompts, the
names and shapes of FLUX.1's weights, descriptions of GPUs. They are no part of this project.

In: a path inside the folder FLUX_JAX_REFERENCE_FILES, `shared` beside the clone where that is not set:

    prompts/{geneval,parti,t2i_compbench}/    the benchmarks' own files
    reference/flux_configs/                   configs and weight lists of the published models
    gpu_targets/NAME.txtpb                    XLA's descriptions of GPUs

Out: the path. A test skips where it is not there.
"""

import os
from pathlib import Path

import pytest

BESIDE_THE_CLONE = Path(__file__).parents[2] / "shared"
FOLDER = Path(os.environ.get("FLUX_JAX_REFERENCE_FILES", BESIDE_THE_CLONE))


def reference_file(path: str) -> Path:
    """That file or folder; skips the test where there is none."""
    found = FOLDER / path
    if not found.exists():
        pytest.skip(f"{FOLDER} has no {path}: see tests/reference_files.py")
    return found
