"""The notebook runs from top to bottom, and its detector finds what it has learnt."""

import os
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

nbformat = pytest.importorskip("nbformat", reason="needs nbformat, nbclient and ipykernel")
nbclient = pytest.importorskip("nbclient", reason="needs nbformat, nbclient and ipykernel")
pytest.importorskip("ipykernel", reason="needs nbformat, nbclient and ipykernel")


def printed(cell):
    return "".join(output["text"] for output in cell.outputs if output.output_type == "stream")


def test_the_tour(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("PYTHONPATH", str(ROOT), prepend=os.pathsep)
    book = nbformat.read(ROOT / "examples/tour.ipynb", as_version=4)
    cells = [cell for cell in book.cells if cell.cell_type == "code"]
    assert not any(cell.outputs or cell.execution_count for cell in cells)
    nbclient.NotebookClient(book, timeout=600, resources={"metadata": {"path": str(ROOT / "examples")}}).execute()
    text = "\n".join(map(printed, cells))
    assert "features (1, 256, 5, 7)" in text
    # where the point has climbed to
    assert float(re.search(r"step 60: .* value (\d\.\d+)", text)[1]) > 0.95
    losses = [float(loss) for loss in re.findall(r"loss (\d+\.\d+)", text)]
    assert losses[-1] < 0.25 * losses[0]
    images = [output for cell in cells for output in cell.outputs if "image/png" in output.get("data", {})]
    assert len(images) == 3
