"""The notebook runs from top to bottom, and what is committed are the results of such a run."""

from pathlib import Path

import pytest

NOTEBOOK = Path(__file__).parents[2] / "notebooks" / "quickstart.ipynb"


def pictures(notebook) -> int:
    outputs = (output for cell in notebook.cells for output in cell.get("outputs", []))
    return sum("image/png" in output.get("data", {}) for output in outputs)


def test_it_runs(monkeypatch):
    nbclient = pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    import nbformat

    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.setenv("PYTHONPATH", str(NOTEBOOK.parents[1]))
    monkeypatch.setenv("PYTHONWARNINGS", "ignore")
    monkeypatch.delenv("MPLBACKEND", raising=False)  # the tests' own would keep the kernel from showing pictures
    committed = nbformat.read(NOTEBOOK, as_version=4)
    assert all(cell.get("outputs") or "import" in cell.source for cell in committed.cells if cell.cell_type == "code")
    fresh = nbformat.from_dict(committed)
    nbclient.NotebookClient(fresh, timeout=900, kernel_name="python3").execute()
    assert pictures(fresh) == pictures(committed) == 3
    assert "three lines" in NOTEBOOK.read_text().lower()
