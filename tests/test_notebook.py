"""examples/notebook.ipynb runs from top to bottom, and shows tables."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def test_the_notebook_runs(tmp_path, monkeypatch):
    pytest.importorskip("nbclient", reason="runs notebooks")
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.read(ROOT / "examples" / "notebook.ipynb", as_version=4)
    nbformat.validate(notebook)
    assert not any(cell.get("outputs") for cell in notebook.cells), "committed without outputs"
    (tmp_path / "models").symlink_to(ROOT / "models")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    NotebookClient(notebook, timeout=120, resources={"metadata": {"path": str(tmp_path)}}).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    shown = [output["data"]["text/html"] for output in outputs if "text/html" in output.get("data", {})]
    for html, word in zip(shown, ("ties", "models/prose", "merged"), strict=True):
        assert "<table" in html
        assert word in html
    printed = "".join(output["text"] for output in outputs if output["output_type"] == "stream")
    assert "12+30=" in printed
    assert (tmp_path / "merged" / "config.json").exists()
    shutil.rmtree(tmp_path / "merged")
    assert os.path.lexists(tmp_path / "models")
