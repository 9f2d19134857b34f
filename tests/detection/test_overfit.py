"""--overfit overfits a few images, or prints the likely reasons if that fails."""

import json
from dataclasses import replace

import numpy as np
import pytest
from coco_scenes import write_json
from commands import dat
from test_detection_commands import fails

from dat.detection import overfit
from dat.detection.config import DetectionConfig
from dat.detection.data import read_coco
from dat.detection.evaluation import average_precision
from dat.engine.checkpoint import load_checkpoint
from dat.engine.command import main_guard
from dat.engine.config import load_config


@pytest.fixture
def annotations(scenes):
    return read_coco(scenes / "train.json", scenes / "images")


@pytest.fixture
def config(config_file):
    return overfit.overfit_config(load_config(DetectionConfig, config_file), 3)


def test_nothing_random_is_left(config):
    data, train_config = config.data.train, config.train
    assert (data.horizontal_flip, data.crop, data.photometric, config.model.drop_rate) == (0, 0, 0, 0)
    assert data.sizes == [config.data.val.size]
    assert (train_config.ema_decay, train_config.accumulate, train_config.batch_size) == (0, 1, 2)
    assert config.output.endswith("run/overfit")


def test_it_ends_when_it_is_good_enough_and_may_be_repeated(config_file, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(overfit, "STEPS", 40)
    monkeypatch.setattr(overfit, "ENOUGH", 0.0)
    monkeypatch.setattr(overfit, "TARGET", 0.0)
    for _ in range(2):
        dat("detect", "train", config_file, "--overfit", "2", "train.pictures=0")
        assert "on 2 images after" in capsys.readouterr().out
    state = load_checkpoint(tmp_path / "run/overfit/last.pth")
    # evaluated every 20th of the way
    assert state["step"] == 2
    metrics = json.loads((tmp_path / "run/overfit/metrics.json").read_text())
    assert sum(of_class["objects"] for of_class in metrics["per_class"].values()) == 4


def test_it_says_what_is_wrong(config_file, capsys, monkeypatch):
    monkeypatch.setattr(overfit, "STEPS", 4)
    with pytest.raises(SystemExit) as ended:
        main_guard(lambda: dat("detect", "train", config_file, "--overfit", "4", "train.lr=1e-9"))
    assert ended.value.code == 1
    text = capsys.readouterr().err
    assert "on 4 images, should be at least 0.9" in text
    assert "the learning rate does not suit" in text
    assert "the poorest class is" in text


def test_what_cannot_be_learnt_is_refused(config_file, scenes, capsys):
    with pytest.raises(SystemExit):
        dat("detect", "train", config_file, "--overfit", 0)
    assert "argument --overfit: is 0, should be an integer of at least 1" in capsys.readouterr().err
    data = json.loads((scenes / "train.json").read_text())
    write_json(scenes / "train.json", data | {"annotations": []})
    assert "no object is annotated in 4 images" in fails(capsys, "train", config_file, "--overfit", 2)


def diagnosis(config, annotations, results, **changes):
    """The reasons, where AP rises to the end and the loss falls."""
    metrics = average_precision(annotations, results) | changes
    lines = [{"kind": "train", "loss": 9.0}, {"kind": "train", "loss": 1.0}]
    lines += [{"kind": "val", "AP": ap} for ap in (0.1, 0.2, 0.5)]
    return "\n".join(overfit.diagnose(config, annotations, results, metrics, lines))


def perfect(annotations):
    found = annotations.to_coco()["annotations"]
    return [{key: a[key] for key in ("image_id", "category_id", "bbox")} | {"score": 0.9} for a in found]


def test_likely_reasons_are_told_apart(config, annotations):
    swapped = [result | {"category_id": 14 - result["category_id"]} for result in perfect(annotations)]
    text = diagnosis(config, annotations, swapped)
    assert "AP 1.00 if classes do not count" in text
    assert "AP still rose, from 0.20 to 0.50" in text
    assert "learning rate" not in text
    assert "boxes are not exact" not in text
    loose = [result | {"bbox": [*result["bbox"][:3], result["bbox"][3] * 0.7]} for result in perfect(annotations)]
    text = diagnosis(config, annotations, loose)
    assert "their boxes are not exact" in text
    assert "classes do not count" not in text


def test_images_that_cannot_be_learnt_are_named(config, annotations):
    record = annotations.records[0]
    double = replace(
        record,
        boxes=np.concatenate([record.boxes, record.boxes[:1] + 0.1, record.boxes[:1] * 0 + [[1, 1, 4, 9]]]),
        labels=np.zeros(4, np.int64),
        crowd=np.zeros(4, bool),
        areas=np.ones(4, np.float32),
    )
    few = replace(config, model=replace(config.model, num_queries=3))
    text = diagnosis(few, replace(annotations, records=(double,)), [])
    assert "1 images hold more objects than model.num_queries=3, such as image 100" in text
    assert "1 images show objects below 6 pixels at data.val.size=48" in text
    assert "1 images have the same box annotated twice" in text
