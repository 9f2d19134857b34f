"""What is drawn, taken from the figures before they become files."""

import json

import numpy as np
import pytest
from PIL import Image

from dat.utils import plots
from dat.utils.plots import draw_confusion, draw_curves

PANELS = {"loss": [("train", "loss"), ("val", "loss")], "AP": [("val", "AP")]}


@pytest.fixture
def figures(monkeypatch):
    """The figures that would be saved."""
    saved = []
    monkeypatch.setattr(plots, "save_plot", lambda figure, path: saved.append(figure))
    return saved


def write_log(path, entries, end=""):
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries) + end)


def lines(figure):
    return {line.get_label(): line.get_xydata().tolist() for axes in figure.axes for line in axes.lines}


def test_curves_of_an_interrupted_run(tmp_path, figures):
    entries = [{"kind": "train", "step": step, "epoch": step / 8, "loss": 9.0 - step} for step in (4, 8, 12)]
    # as NaN is written
    entries[1]["loss"] = None
    entries.append({"kind": "val", "step": 8, "epoch": 1, "loss": 2.0, "AP": 0.5})
    write_log(tmp_path / "log.jsonl", entries, '{"kind": "train", "st')
    assert draw_curves(tmp_path / "log.jsonl", tmp_path / "curve.png", PANELS)
    found = lines(figures[0])
    assert found["loss, train"] == [[0.5, 5.0], [1.5, -3.0]]
    assert found["loss, val"] == [[1.0, 2.0]]
    assert found["AP"] == [[1.0, 0.5]]


def test_logs_that_count_begun_epochs(tmp_path, figures):
    entries = [{"kind": "train", "step": step, "epoch": 1 + (step - 1) // 4, "loss": 1.0} for step in (2, 4, 6, 8)]
    write_log(tmp_path / "log.jsonl", entries)
    draw_curves(tmp_path / "log.jsonl", tmp_path / "curve.png", PANELS)
    assert [x for x, _ in lines(figures[0])["loss, train"]] == [0.5, 1, 1.5, 2]


def test_without_a_log_there_is_no_curve(tmp_path):
    curve = tmp_path / "curve.png"
    curve.write_bytes(b"of an earlier run")
    assert not draw_curves(tmp_path / "log.jsonl", curve, PANELS)
    assert not curve.exists()


@pytest.mark.parametrize(("classes", "named", "numbered"), [(1, True, True), (92, True, False), (150, False, False)])
def test_a_matrix_of_any_number_of_classes(tmp_path, figures, classes, named, numbered):
    names = [f"${i} a name that is rather long" for i in range(classes)]
    draw_confusion(np.eye(classes, dtype=int), names, names, tmp_path / "confusion.png")
    axes = figures[0].axes[0]
    shown = [label.get_text() for label in axes.get_yticklabels()]
    assert (shown == [name[:18] for name in names]) is named
    assert len(axes.texts) == (classes if numbered else 0)
    # a row of names is as high as its letters
    assert not named or figures[0].get_figheight() * 72 / classes > axes.get_yticklabels()[0].get_fontsize()


def test_a_matrix_is_a_picture(tmp_path):
    draw_confusion(np.zeros((2, 2), int), ["<a>", "$b"], ["<a>", "$b"], tmp_path / "confusion.png")
    with Image.open(tmp_path / "confusion.png") as image:
        assert min(image.size) > 300
    assert [path.name for path in tmp_path.iterdir()] == ["confusion.png"]
