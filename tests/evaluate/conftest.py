"""The benchmarks' own files, where they lie beside the checkout."""

from pathlib import Path

import pytest


@pytest.fixture
def shared() -> Path:
    folder = Path(__file__).parents[2].parent / "shared"
    if not (folder / "prompts").is_dir():
        pytest.skip("the benchmarks' prompt files are not here")
    return folder
