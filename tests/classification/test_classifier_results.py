"""Numbers, tables and pictures of an evaluation."""

import shutil

import numpy as np
import pytest
from PIL import Image

from dat.classification import draw as drawing
from dat.classification.config import ClassificationConfig, TrainConfig
from dat.classification.evaluate import open_v2, real_accuracy
from dat.classification.readers import open_place
from dat.classification.report import write_report
from dat.classification.results import Results, class_metrics, format_table
from dat.utils.errors import DataError


def results(labels, top, index=None):
    """Results whose scores fall from 0.9 - i / 100 for picture i."""
    n, top = len(labels), np.array(top)
    scores = (0.9 - np.arange(n) / 100)[:, None] / 2.0 ** np.arange(top.shape[1])
    index = np.arange(n) if index is None else np.array(index)
    return Results(index, np.array(labels), top, scores.astype(np.float32), np.full(n, 2.0))


@pytest.fixture
def found():
    """Of five pictures of three classes two are right, one more within two."""
    return results([0, 0, 1, 2, 2], [[0, 1], [1, 2], [1, 0], [0, 2], [1, 0]])


def test_metrics_and_confusion(found):
    assert found.metrics() == {"top1": 40.0, "top5": 60.0, "loss": 2.0, "images": 5}
    assert found.confusion(3).tolist() == [[1, 1, 0], [0, 1, 0], [1, 1, 0]]
    assert found.mistakes().tolist() == [1, 3, 4]


def test_parts_are_joined_in_the_order_of_the_pictures(found):
    parts = [results([1, 2], [[1, 0], [1, 0]], [2, 4]), results([0, 0, 2], [[0, 1], [1, 2], [0, 2]], [0, 1, 3])]
    joined = Results.join(parts)
    for name in ("index", "labels", "top"):
        assert getattr(joined, name).tolist() == getattr(found, name).tolist()


def test_saved_and_read_again(found, tmp_path):
    found.save(tmp_path / "results.npz")
    again = Results.load(tmp_path / "results.npz")
    assert all(np.array_equal(value, vars(again)[name]) for name, value in vars(found).items())
    assert [path.name for path in tmp_path.iterdir()] == ["results.npz"]


def test_classes_are_listed_with_what_they_are_taken_for(found):
    rows = class_metrics(found.confusion(4), ["cat", "dog", "cow", "hen"])
    assert rows == {
        "cat": {"images": 2, "top1": 50.0, "mistaken_for": "dog"},
        "dog": {"images": 1, "top1": 100.0, "mistaken_for": None},
        "cow": {"images": 2, "top1": 0.0, "mistaken_for": "cat"},
        "hen": {"images": 0, "top1": None, "mistaken_for": None},
    }
    lines = format_table({"top1": 40.0, "real": {"top1": 12.5}, "per_class": rows}).splitlines()
    assert lines[1].split() == ["cat", "2", "50.0", "dog"]
    assert lines[4].split() == ["hen", "0", "-"]
    assert lines[5] == "top1 40  real top1 12.5"
    many = {f"c{k}": {"images": 9, "top1": float(k), "mistaken_for": None} for k in reversed(range(99))}
    lines = format_table({"top1": 1.0, "per_class": many}).splitlines()[:-1]
    assert len(lines) == 41
    assert lines[1].startswith("c0 ")


def test_classes_of_one_name_are_kept_apart(found):
    rows = class_metrics(found.confusion(3), ["crane", "dog", "crane"])
    assert {name: row["images"] for name, row in rows.items()} == {"crane": 2, "dog": 1, "crane (2)": 2}


def test_files_of_a_report(pictures, tmp_path, monkeypatch):
    split = open_place(pictures / "val", "here")
    found = results([0, 0, 1, 1, 2, 2], [[0], [0], [1], [2], [2], [1]])
    drawn, draw = [], drawing.draw_grid
    monkeypatch.setattr(
        drawing, "draw_grid", lambda shown, path: (drawn.extend(t for _, t in shown), draw(shown, path))
    )
    config = ClassificationConfig(train=TrainConfig(worst=1))
    names = split.class_names
    metrics = found.summarize(names, epoch=3, real={"top1": 12.5})
    pictures = write_report(tmp_path, config, names, found, split, metrics)
    assert {path.name for path in pictures} == {"confusion.png", "worst.png", "predictions.png"}
    # The worst mistake, then all six predictions.
    assert drawn[0] == "red 87%\n(is green)"
    assert [title.split()[0] for title in drawn[1:]] == ["blue", "blue", "green", "red", "red", "green"]
    assert metrics["top1"] == pytest.approx(66.667, abs=0.01)
    assert metrics["epoch"] == 3
    assert [row["top1"] for row in metrics["per_class"].values()] == [100.0, 50.0, 50.0]
    for path in pictures:
        with Image.open(path) as image:
            assert min(image.size) > 100
    page = (tmp_path / "report.html").read_text()
    assert "dat_tiny, top-1 66.67%" in page
    assert "real top1" in page
    assert page.count('src="data:image/') == 3
    # a perfect model has no mistakes to show, and those of before are not shown again
    perfect = results([0], [[0]])
    write_report(tmp_path, config, names, perfect, split, perfect.summarize(names))
    assert not (tmp_path / "worst.png").exists()


def test_reassessed_labels(pictures, tmp_path):
    folder = tmp_path / "real"
    (folder / "n1").mkdir(parents=True)
    for i in range(4):
        shutil.copy(pictures / "val/red/0.png", folder / f"n1/ILSVRC2012_val_{i + 1:08d}.JPEG")
    split = open_place(folder, "here")
    (tmp_path / "real.json").write_text("[[0, 7], [3], [], [5]]")
    # the third picture has no label any more
    found = results([0, 0, 0, 0], [[7, 1], [2, 3], [0, 1], [1, 2]])
    assert real_accuracy(found, split, str(tmp_path / "real.json")) == {
        "top1": pytest.approx(100 / 3, abs=1e-3), "top5": pytest.approx(200 / 3, abs=1e-3),
    }  # fmt: skip
    with pytest.raises(
        DataError, match=r"--real : should be the labels of ImageNet's 50,000 .*; it has 4, such as ILSV"
    ):
        real_accuracy(found, split, "")
    with pytest.raises(DataError, match=r"--real nowhere.json"):
        real_accuracy(found, split, "nowhere.json")


def test_folders_of_imagenet_v2_are_numbers(pictures, tmp_path):
    for k in (2, 10, 0):
        shutil.copytree(pictures / "val/red", tmp_path / f"v2/{k}")
    split = open_v2(tmp_path / "v2", 1000)
    assert [split.read(i)[1] for i in range(len(split))] == [0, 0, 2, 2, 10, 10]
    (tmp_path / "v2/10").rename(tmp_path / "v2/n01440764")
    with pytest.raises(DataError, match=r"--v2: .* 1 of them .such as 'n01440764'. not among the 1000 classes"):
        open_v2(tmp_path / "v2", 1000)
