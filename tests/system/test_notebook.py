# SPDX-License-Identifier: Apache-2.0
"""The example notebook runs from the first cell to the last, and shows its figures."""

from pathlib import Path

import nbformat
from nbclient import NotebookClient


NOTEBOOK = Path(__file__).parents[2] / "docs" / "analysis.ipynb"


def test_the_notebook_runs(run_folder, tmp_path, monkeypatch):
    for name in ("JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR", "IPYTHONDIR"):
        monkeypatch.setenv(name, str(tmp_path / name.lower()))
    monkeypatch.delenv("MPLBACKEND", raising=False)
    text = NOTEBOOK.read_text(encoding="utf-8")
    assert text.count("outputs/digits") == 1
    notebook = nbformat.reads(text.replace("outputs/digits", run_folder), as_version=4)
    nbformat.validate(notebook)
    # Jupyter starts a notebook in its own folder.
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(NOTEBOOK.parent)}}).execute()
    outputs = [cell.outputs for cell in notebook.cells if cell.cell_type == "code"]
    kinds = [kind for cell in outputs for output in cell for kind in output.get("data", {})]
    assert kinds.count("image/png") == 3
    printed = "".join(output.text for cell in outputs for output in cell if output.output_type == "stream")
    assert "2 blocks, 2 heads, 17 tokens" in printed
    assert "adds" in printed
    assert "of the magnitude is negative" in printed
    assert "mean effective rank in block 1" in printed


def test_the_notebook_is_stored_without_outputs():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    assert all(not cell.get("outputs") and cell.get("execution_count") is None for cell in notebook.cells)
