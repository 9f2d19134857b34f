"""Exports list a project or a supercategory as a category: it is no class, in new runs; older checkpoints go on."""

import json

import pytest
from coco_scenes import write_json
from commands import dat

from dat.detection import Detector
from dat.detection.config import DataConfig
from dat.detection.data import Category, read_categories, read_coco
from dat.detection.data.formats import coco
from dat.detection.data.readers import read_splits
from dat.engine.checkpoint import load_checkpoint
from dat.engine.config import from_dict
from dat.utils.errors import CheckpointError, DataError

CLASSES = (Category(3, "blue"), Category(11, "red"))


def set_categories(scenes, categories, splits=("train", "val")):
    for split in splits:
        data = json.loads((scenes / f"{split}.json").read_text())
        write_json(scenes / f"{split}.json", {**data, "categories": categories})


def add_root(scenes, splits=("train", "val"), root=0, name="shapes"):
    members = [{"id": c.id, "name": c.name, "supercategory": name} for c in CLASSES]
    set_categories(scenes, [{"id": root, "name": name, "supercategory": "none"}, *members], splits)


def read(scenes, split="train", categories=None):
    return read_coco(scenes / f"{split}.json", scenes / "images", categories)


@pytest.mark.parametrize(("root", "name"), [(0, "shapes"), (5, "shapes"), (99, "shapes"), (0, "red")])
def test_a_root_without_objects_is_no_class(scenes, root, name):
    expected = [record.labels.tolist() for record in read(scenes).records]
    add_root(scenes, root=root, name=name)
    found = read(scenes)
    assert found.categories == CLASSES
    assert found.roots == (Category(root, name),)
    assert found.warnings == [f"{scenes / 'train.json'}: supercategory without objects, no class: {root} {name}"]
    assert [record.labels.tolist() for record in found.records] == expected
    assert read_categories(scenes / "train.json") == CLASSES


def test_the_only_class_may_have_the_name_of_the_project(scenes):
    data = json.loads((scenes / "train.json").read_text())
    for annotation in data["annotations"]:
        annotation["category_id"] = 1
    root, member = (
        {"id": 0, "name": "coin", "supercategory": "none"},
        {"id": 1, "name": "coin", "supercategory": "coin"},
    )
    write_json(scenes / "train.json", {**data, "categories": [root, member]})
    assert read(scenes).categories == (Category(1, "coin"),)


def test_a_supercategory_with_objects_in_one_split_where_validation_lacks_a_class(scenes):
    green = {"id": 20, "name": "green", "supercategory": "shapes"}
    for split in ("val", "train"):
        add_root(scenes)
        data = json.loads((scenes / f"{split}.json").read_text())
        data["annotations"].append({**data["annotations"][0], "id": 999, "category_id": 0})
        write_json(scenes / f"{split}.json", data)
        content = json.loads((scenes / "train.json").read_text())
        write_json(scenes / "train.json", {**content, "categories": [*content["categories"], green]})
        train, val = read_splits(from_dict(DataConfig, {"root": str(scenes)}, "test"))
        assert train.categories == (Category(0, "shapes"), *CLASSES, Category(20, "green"))
        # Validation has its own ids; the class that it lacks has the id of training.
        assert val.categories == train.categories
        lacking = f"{train.path}: no training object of 1 class of data.val, shapes"
        assert [train.warnings, val.warnings] == [[lacking] if split == "val" else [], []]
        data["annotations"].pop()
        write_json(scenes / f"{split}.json", data)


def test_other_categories_without_objects_stay(scenes):
    members = [{"id": c.id, "name": c.name, "supercategory": c.name} for c in CLASSES]
    green = {"id": 20, "name": "green", "supercategory": "green"}
    set_categories(scenes, [*members, green, {"id": 21, "name": "thing"}])
    assert [c.name for c in read(scenes).categories] == ["blue", "red", "green", "thing"]
    plain = [{"id": c.id, "name": c.name, "supercategory": "thing"} for c in CLASSES]
    set_categories(scenes, [*plain, {"id": 20, "name": "red", "supercategory": "thing"}])
    with pytest.raises(DataError, match="category name 'red' is used more than once"):
        read(scenes)


def test_a_supercategory_with_objects_stays(scenes):
    set_categories(scenes, [{"id": 3, "name": "blue"}, {"id": 11, "name": "red", "supercategory": "blue"}])
    assert read(scenes).categories == CLASSES


@pytest.mark.parametrize("split", ["train", "val"])
def test_splits_that_differ_in_the_root_only_are_alike(scenes, split, tmp_path, capsys):
    add_root(scenes, [split])
    assert read(scenes, "val", read(scenes).categories).categories == CLASSES
    dat("detect", "audit", scenes, "--out", tmp_path / "out")
    text = capsys.readouterr().out
    assert "training can start" in text
    assert text.count("supercategory without objects, no class: 0 shapes") == 1


def test_a_supercategory_with_objects_in_one_split_only(scenes, tmp_path, capsys):
    """Validation images may show none of a class that is also a supercategory."""
    add_root(scenes)
    data = json.loads((scenes / "train.json").read_text())
    data["annotations"][0]["category_id"] = 0
    write_json(scenes / "train.json", data)
    classes = (Category(0, "shapes"), *CLASSES)
    alone, found = read(scenes, "val"), read(scenes, "val", classes)
    assert (found.categories, found.warnings) == (classes, [])
    for record, other in zip(found.records, alone.records, strict=True):
        assert record.labels.tolist() == [label + 1 for label in other.labels.tolist()]
    dat("detect", "audit", scenes, "--out", tmp_path / "out")
    assert "no class" not in capsys.readouterr().out


def test_a_supercategory_with_objects_in_validation_only(scenes, config_file, tmp_path, capsys):
    add_root(scenes)
    data = json.loads((scenes / "val.json").read_text())
    data["annotations"][0]["category_id"] = 0
    write_json(scenes / "val.json", data)
    dat("detect", "train", config_file, "train.steps=1")
    assert Detector.from_checkpoint(tmp_path / "run/last.pth").categories == (Category(0, "shapes"), *CLASSES)
    dat("detect", "audit", scenes, "--out", tmp_path / "out")
    assert "training can start" in capsys.readouterr().out
    dat("detect", "convert", scenes, tmp_path / "yolo", "--to", "yolo")
    assert "3 classes" in capsys.readouterr().out


def test_supercategories_with_objects_in_a_split_each_are_converted(scenes, tmp_path, capsys):
    """One of the two has objects only in validation images, the other only in test images."""
    roots = [{"id": 0, "name": "shapes"}, {"id": 5, "name": "beasts"}]
    (scenes / "train.json").replace(scenes / "one.json")
    for split, member in (("train", None), ("val", 0), ("test", 5)):
        data = json.loads((scenes / "one.json").read_text())
        members = [
            {"id": c.id, "name": c.name, "supercategory": root["name"]} for c, root in zip(CLASSES, roots, strict=True)
        ]
        data["categories"] = [*roots, *members]
        if member is not None:
            data["annotations"][0]["category_id"] = member
        write_json(scenes / f"{split}.json", data)
    (scenes / "one.json").unlink()
    dat("detect", "convert", scenes, tmp_path / "yolo", "--to", "yolo")
    assert "4 classes" in capsys.readouterr().out


def test_a_run_says_so_in_its_first_lines(scenes, config_file, tmp_path):
    add_root(scenes)
    dat("detect", "train", config_file, "train.epochs=1", "train.pictures=0", "train.worst=0")
    lines = (tmp_path / "run/train.log").read_text().splitlines()
    assert sum("supercategory without objects, no class: 0 shapes" in line for line in lines[:12]) == 2
    assert load_checkpoint(tmp_path / "run/best.pth")["class_names"] == ["blue", "red"]


@pytest.fixture
def old_run(scenes, config_file, tmp_path, monkeypatch):
    """A run of an earlier version, for which the root was a class, and its configuration."""
    add_root(scenes)
    with monkeypatch.context() as patch:
        patch.setattr(coco, "_roots", lambda data, listed: set())
        dat("detect", "train", config_file, "train.epochs=1", "train.pictures=0", "train.worst=0")
    assert load_checkpoint(tmp_path / "run/best.pth")["category_ids"] == [0, 3, 11]
    return tmp_path / "run"


def test_checkpoints_with_the_root_as_a_class_evaluate_and_predict(scenes, old_run):
    expected = json.loads((old_run / "metrics.json").read_text())
    detector = Detector.from_checkpoint(old_run / "best.pth")
    metrics = detector.evaluate()
    assert (metrics["AP"], list(metrics["per_class"])) == (expected["AP"], ["shapes", "blue", "red"])
    detector.predict(scenes / "images/val_0.jpg")


def test_their_report_is_written_again(old_run, capsys):
    results = json.loads((old_run / "detections.json").read_text())
    results.append({**results[0], "category_id": 0, "score": 0.001})
    write_json(old_run / "detections.json", results)
    dat("detect", "report", old_run)
    assert "Without an evaluation" not in capsys.readouterr().err
    assert ">Confusions</h2>" in (old_run / "report.html").read_text(encoding="utf-8")


@pytest.mark.parametrize("split", ["train", "val"])
def test_their_runs_are_resumed(scenes, config_file, old_run, split):
    # The root may have gone from one of the files.
    set_categories(scenes, [{"id": c.id, "name": c.name, "supercategory": "shapes"} for c in CLASSES], [split])
    arguments = ("detect", "train", config_file, "train.epochs=2", "train.resume=true", "train.pictures=0")
    if split == "train":
        with pytest.raises(CheckpointError, match=r"class_names were .*'shapes'"):
            dat(*arguments)
        return
    dat(*arguments)
    state = load_checkpoint(old_run / "last.pth")
    assert (state["epoch"], state["category_ids"]) == (2, [0, 3, 11])
    assert "no class" not in (old_run / "train.log").read_text()
