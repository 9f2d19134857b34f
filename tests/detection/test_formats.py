"""One data set in every format: the same boxes, the same audit, the same training."""

import json
import random
import re

import numpy as np
import pytest
import torch
from coco_scenes import write_config
from commands import dat
from damage import damage
from formats import VAL, write_all

from dat.detection.config import DataConfig
from dat.detection.data import describe_sets, read_dataset
from dat.utils.errors import UserError

FORMATS = {
    "coco": "COCO, train.json 16 images, val.json 4 images, 2 classes",
    "roboflow": "Roboflow COCO, train/ 16 images, valid/ 4 images, 2 classes",
    "yolo": "YOLO, images/train/ 16 images, images/val/ 4 images, 2 classes",
    "voc": "Pascal VOC, ImageSets/Main/train.txt 16 images, ImageSets/Main/val.txt 4 images, 2 classes",
    "cvat_coco": "CVAT COCO, annotations/instances_default.json {rule}, 2 classes",
    "label_studio_coco": "Label Studio COCO, result.json {rule}, 2 classes",
    "cvat_xml": "CVAT XML, annotations.xml {rule}, 2 classes",
    "label_studio_yolo": "YOLO, images/ {rule}, 2 classes",
    "darknet": "YOLO, data/train.txt {rule}, 2 classes",
    "roboflow_voc": "Pascal VOC, train/ 16 images, valid/ 4 images, 2 classes",
    "labelme": "LabelMe, ./ {rule}, 2 classes",
    "huggingface": "Hugging Face, train/metadata.jsonl 16 images, validation/metadata.jsonl 4 images, 2 classes",
}
RULE = "20 images, no validation split: every 5th image, by name, is for validation (4 of 20 images)"
# Files for each split, and one for both, which training cuts.
TRAINED = ("coco", "cvat_coco")
AUDITED = ("coco", "yolo", "voc", "huggingface")


@pytest.fixture(scope="module")
def roots(tmp_path_factory):
    return write_all(tmp_path_factory.mktemp("formats"))


def read_both(root):
    data = DataConfig(str(root))
    train = read_dataset(data, "train")
    return train, read_dataset(data, "val", train.categories)


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_gives_the_same_boxes_in_the_same_order(roots, name):
    found, expected = read_both(roots[name]), read_both(roots["coco"])
    assert describe_sets(*found) == f"{roots[name]}: {FORMATS[name].format(rule=RULE)}"
    assert [record.path.name for record in found[1].records] == [f"scene_{i + 1}.jpg" for i in VAL]
    for split, wanted in zip(found, expected, strict=True):
        assert [category.name for category in split.categories] == ["blue", "red"]
        assert not split.warning
        for record, other in zip(split.records, wanted.records, strict=True):
            assert (record.path.name, record.width, record.height) == (other.path.name, other.width, other.height)
            np.testing.assert_array_equal(record.boxes, other.boxes)
            np.testing.assert_array_equal(record.labels, other.labels)
            np.testing.assert_array_equal(record.crowd, other.crowd)
            np.testing.assert_array_equal(record.areas, other.areas)


def test_trainings_end_with_the_same_weights(roots, tmp_path):
    config = write_config(tmp_path, tmp_path)
    text = re.sub(r"^ +(annotations|images): .*\n", "", config.read_text(), flags=re.M)
    config.write_text(text)
    overrides = ["train.steps=10", "train.eval_epochs=9", "train.pictures=0", "train.worst=0"]
    weights = {}
    for name in TRAINED:
        run = tmp_path / name
        dat("detect", "train", config, f"data.root={roots[name]}", f"output={run}", *overrides)
        first = (run / "train.log").read_text().splitlines()[0]
        assert first.endswith(f"{roots[name]}: {FORMATS[name].format(rule=RULE)}")
        state = torch.load(run / "last.pth", weights_only=True)
        assert state["step"] == 10
        weights[name] = state["state_dict"]
    start = weights.pop("coco")
    for found in weights.values():
        assert found.keys() == start.keys()
        assert all(torch.equal(found[key], start[key]) for key in start)


def test_audits_count_the_same(roots, tmp_path, capsys):
    found = {}
    for name in AUDITED:
        dat("detect", "audit", roots[name], "--out", tmp_path / name, "--samples", 0)
        assert capsys.readouterr().out.startswith(f"{roots[name]}: {FORMATS[name].format(rule=RULE)}\n")
        summary = json.loads((tmp_path / name / "audit.json").read_text())
        for split in summary.values():
            del split["file"]
            for entry in split["classes"]:
                del entry["id"]
            del split["sparse_ids"]
        found[name] = summary
    for name in AUDITED:
        assert found[name] == found["coco"], name


@pytest.mark.parametrize("name", FORMATS)
def test_damaged_files_are_read_or_refused_in_one_line(roots, name):
    rng, messages = random.Random(0), []
    files = [path for path in sorted(roots[name].rglob("*")) if path.is_file() and path.suffix != ".jpg"]
    for _ in range(60):
        file = rng.choice(files)
        content = file.read_bytes()
        file.write_bytes(damage(content, rng))
        try:
            read_both(roots[name])
        except UserError as error:
            messages.append(str(error))
        finally:
            file.write_bytes(content)
    assert len(messages) > 10
    assert not any("\n" in message for message in messages)
