"""The notebook runs from top to bottom, and what is committed are the results of such a run."""

from pathlib import Path

import pytest

NOTEBOOK = Path(__file__).parents[2] / "notebooks" / "quickstart.ipynb"


def pictures(notebook) -> int:
    outputs = (output for cell in notebook.cells for output in cell.get("outputs", []))
    return sum("image/png" in output.get("data", {}) for output in outputs)


@pytest.fixture
def committed():
    return pytest.importorskip("nbformat").read(NOTEBOOK, as_version=4)


def test_results_are_committed(committed):
    assert all(cell.get("outputs") or "import" in cell.source for cell in committed.cells if cell.cell_type == "code")
    assert pictures(committed) == 3
    assert "three lines" in NOTEBOOK.read_text().lower()


@pytest.mark.slow
def test_it_runs(monkeypatch, committed):
    nbclient = pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")

    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.setenv("PYTHONPATH", str(NOTEBOOK.parents[1]))
    monkeypatch.setenv("PYTHONWARNINGS", "ignore")
    monkeypatch.delenv("MPLBACKEND", raising=False)  # the tests' own would keep the kernel from showing pictures
    fresh = pytest.importorskip("nbformat").from_dict(committed)
    nbclient.NotebookClient(fresh, timeout=900, kernel_name="python3").execute()
    assert pictures(fresh) == pictures(committed)
