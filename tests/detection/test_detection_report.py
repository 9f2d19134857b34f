"""Plots, confusions and the page of a detector's evaluation, and the command that writes them anew."""

import json
from dataclasses import replace

import numpy as np
import pytest
from commands import dat
from PIL import Image

from dat.detection import plots, trainer
from dat.detection.config import DetectionConfig
from dat.detection.data import Category, read_coco
from dat.detection.evaluation import Evaluation, count_confusions
from dat.detection.plots import draw_box_sizes, draw_precision_recall
from dat.detection.report import write_report
from dat.engine.command import main_guard
from dat.engine.config import load_config, save_config
from dat.utils.errors import DataError


@pytest.fixture
def annotations(scenes):
    return read_coco(scenes / "val.json", scenes / "images")


def perfect(annotations, score=0.9):
    found = annotations.to_coco()["annotations"]
    return [{key: a[key] for key in ("image_id", "category_id", "bbox")} | {"score": score} for a in found]


@pytest.fixture
def figures(monkeypatch):
    """The figures that would be saved."""
    saved = []
    monkeypatch.setattr(plots, "save_plot", lambda figure, path: saved.append(figure))
    return saved


def with_classes(annotations, names):
    """The same objects, of the first two of other classes."""
    categories = tuple(Category(number, name) for number, name in enumerate(names))
    return replace(annotations, categories=categories)


def test_confusions_count_other_classes_misses_and_what_is_not_there(annotations):
    results = perfect(annotations)
    ids = [category.id for category in annotations.categories]
    first = annotations.categories.index(next(c for c in annotations.categories if c.id == results[0]["category_id"]))
    second = annotations.categories.index(next(c for c in annotations.categories if c.id == results[1]["category_id"]))
    wanted = np.zeros((3, 3), int)
    for result in results[2:]:
        label = ids.index(result["category_id"])
        wanted[label, label] += 1
    # the first object is taken for the other class, surely, and for its own with less score, which is one too many
    surest = {**results[0], "category_id": ids[1 - first], "score": 0.95}
    wanted[first, 1 - first] += 1
    wanted[2, first] += 1
    # the second is found below the threshold alone
    results[1]["score"] = 0.2
    wanted[second, 2] += 1
    assert count_confusions(annotations, [surest, *results], 0.3).tolist() == wanted.tolist()


def test_crowds_count_nowhere_in_confusions(annotations):
    record = annotations.records[0]
    crowded = replace(record, crowd=np.array([True, *[False] * (len(record.boxes) - 1)]))
    crowd = replace(annotations, records=(crowded, *annotations.records[1:]))
    x0, y0, x1, y1 = (float(v) for v in record.boxes[0])
    inside = {"image_id": record.id, "category_id": 3, "bbox": [x0, y0, (x1 - x0) / 2, y1 - y0], "score": 0.8}
    counts = count_confusions(crowd, [*perfect(annotations), inside], 0.3)
    assert counts.sum() == counts.trace() == len(perfect(annotations)) - 1
    assert count_confusions(annotations, [], 0.3)[:, 2].sum() == len(perfect(annotations))


def test_the_score_of_the_highest_f1(annotations):
    results = perfect(annotations)
    ids = [result["category_id"] for result in results]
    # four objects of this class at least: all are found at 0.4, and more wrong ones below it
    most = max(set(ids), key=ids.count)
    label = [category.id for category in annotations.categories].index(most)
    found = [{**result, "score": 0.4} for result in results if result["category_id"] == most]
    wrong = [{**found[0], "bbox": [0, 0, 2, 2], "score": score} for score in (0.3, 0.2)]
    f1, score, recall, precision = Evaluation.of(annotations, [*found, *wrong]).best_f1(label)
    assert (f1, recall, precision) == (1, 1, 1)
    assert score == pytest.approx(0.4)
    assert Evaluation.of(with_classes(annotations, "abc"), []).best_f1(2) is None


def test_a_panel_for_each_class_also_without_objects(annotations, figures, tmp_path):
    three = with_classes(annotations, ["$a$ & <b>", "b", "nowhere"])
    results = [{**result, "category_id": 0} for result in perfect(three) if result["category_id"] == 0]
    draw_precision_recall(Evaluation.of(three, results), tmp_path / "a.png")
    found, missed, nowhere = figures[0].axes
    assert [axes.get_title() for axes in figures[0].axes] == ["$a$ & <b>", "b", "nowhere"]
    assert found.lines[0].get_ydata().tolist() == [1.0] * 101
    assert missed.lines[0].get_ydata().tolist() == [0.0] * 101
    assert not nowhere.lines
    assert nowhere.texts[0].get_text() == "no objects"


def test_of_many_classes_those_with_most_objects_have_panels(annotations, figures, tmp_path, monkeypatch):
    monkeypatch.setattr(plots, "MOST_CLASSES", 3)
    many = with_classes(annotations, [str(number) for number in range(7)])
    draw_precision_recall(Evaluation.of(many, []), tmp_path / "a.png")
    assert [axes.get_title() for axes in figures[0].axes] == ["0", "1", "2"]
    assert figures[0].get_supxlabel() == "recall (the 3 classes with most objects of 7)"


def test_box_sizes_with_cocos_limits(annotations, figures, tmp_path):
    record = annotations.records[0]
    areas = np.array([31.9**2, 32**2, 95.9**2, 96**2, 500**2])
    boxes, labels = np.zeros((5, 4), np.float32), np.zeros(5, np.int64)
    crowd = np.array([False, False, False, False, True])
    one = replace(record, areas=areas, boxes=boxes, labels=labels, crowd=crowd)
    results = [{"image_id": record.id, "category_id": 3, "bbox": [0, 0, 20, 20], "score": s} for s in (0.3, 0.29)]
    evaluation = replace(Evaluation.of(annotations, results), annotations=replace(annotations, records=(one,)))
    draw_box_sizes(evaluation, 0.3, tmp_path / "a.png")
    assert [text.get_text().split("\n") for text in figures[0].axes[0].texts] == [
        ["small", "1 annotated", "1 predicted"],
        ["medium", "2 annotated", "0 predicted"],
        ["large", "1 annotated", "0 predicted"],
    ]


@pytest.mark.parametrize("found", ["objects", "nothing"])
def test_the_page_of_an_evaluation(annotations, tmp_path, found):
    renamed = replace(annotations, categories=(Category(3, "<b>blue</b>"), Category(11, "$red")))
    results = perfect(renamed)[1:] if found == "objects" else []
    config = DetectionConfig()
    config.train.pictures, config.train.worst = 1, 2
    evaluation = Evaluation.of(renamed, results)
    pictures = write_report(tmp_path, config, evaluation, evaluation.metrics(), "of a test")
    names = {path.relative_to(tmp_path).as_posix() for path in pictures}
    assert {"precision_recall.png", "confusion.png", "box_sizes.png", "worst.png"} < names
    assert len(names) == 5
    for path in pictures:
        with Image.open(path) as image:
            assert min(image.size) > 100
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert page.count('src="data:image/') == 5
    assert "&lt;b&gt;blue&lt;/b&gt;" in page
    assert "<b>" not in page
    assert "picture_threshold: 0.3" in page


@pytest.fixture
def interrupted(config_file, tmp_path):
    """The folder of a run that was stopped after its first evaluation, or what it would have left."""
    config = load_config(DetectionConfig, config_file)
    folder = tmp_path / "run"
    folder.mkdir()
    save_config(config, folder / "config.yaml")
    lines = [{"kind": "train", "step": 2, "epoch": 1.0, "loss": 3.0, "lr": 1e-3}]
    lines.append({"kind": "val", "step": 2, "epoch": 1, "AP": 0.5})
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"kind"')
    annotations = read_coco(tmp_path / "scenes/val.json", tmp_path / "scenes/images")
    (folder / "detections.json").write_text(json.dumps(perfect(annotations)))
    return folder


def test_the_report_of_an_interrupted_run(interrupted, capsys):
    (interrupted / "metrics.json").write_text(json.dumps({"AP": 0.1, "seconds": 77}))
    dat("detect", "report", interrupted, "train.pictures=1")
    assert "report.html" in capsys.readouterr().out
    page = (interrupted / "report.html").read_text(encoding="utf-8")
    assert "AP 1.000" in page
    assert ">77<" in page
    for heading in ("Training", "Precision and recall", "Confusions", "Box sizes", "Predictions", "Configuration"):
        assert f">{heading}</h2>" in page
    assert len(list((interrupted / "predictions").iterdir())) == 1


@pytest.mark.parametrize("lacking", ["detections", "half of them", "data", "other data"])
def test_what_there_is_is_reported(interrupted, lacking, capsys):
    detections = interrupted / "detections.json"
    said = "was not evaluated yet"
    if lacking == "detections":
        detections.unlink()
    elif lacking == "half of them":
        detections.write_text(detections.read_text()[:-40])
        said = "detections.json: is not JSON"
    elif lacking == "data":
        said = "nowhere does not exist"
    else:
        detections.write_text('[{"image_id": 7, "category_id": 3, "bbox": [0, 0, 1, 1], "score": 1}]')
        said = "is of other images or classes than"
    dat("detect", "report", interrupted, *(["data.root=nowhere"] if lacking == "data" else []))
    assert said in capsys.readouterr().err
    page = (interrupted / "report.html").read_text(encoding="utf-8")
    assert said in page
    assert ">Training</h2>" in page
    assert ">Confusions</h2>" not in page


def test_no_run_at_all_is_one_line(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main_guard(lambda: dat("detect", "report", tmp_path))
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert "config.yaml" in error


def test_a_run_survives_its_report(config_file, tmp_path, monkeypatch):
    def fail(*arguments):
        raise DataError("x.jpg: cannot be read as an image")

    monkeypatch.setattr(trainer, "write_report", fail)
    dat("detect", "train", config_file, "train.epochs=1")
    run = tmp_path / "run"
    assert "AP" in json.loads((run / "metrics.json").read_text())
    log = (run / "train.log").read_text()
    assert "warning: the report is not complete: x.jpg: cannot be read" in log
    assert f"dat detect report {run}" in log
    assert log.splitlines()[-1] == f"results are in {run}"
