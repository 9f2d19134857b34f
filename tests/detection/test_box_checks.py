"""Annotations in which there is nothing to learn stop at once, with the likely mistake; many faults give a warning."""

import json
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from coco_scenes import write_json
from commands import dat

from dat.detection import trainer
from dat.detection.config import DataConfig, TrainDataConfig
from dat.detection.data import read_dataset
from dat.detection.data.box_checks import check_form
from dat.detection.data.objects import Object
from dat.engine.audit import Findings
from dat.engine.command import main_guard
from dat.utils.errors import DataError

TRAIN = TrainDataConfig(annotations="train.json", images="images", sizes=[30, 60], max_size=96)


def edit(scenes, change, split="train", most=None):
    """Changes each annotation, or the first `most`, by `change(annotation, its image)`."""
    data = json.loads((scenes / f"{split}.json").read_text())
    images = {image["id"]: image for image in data["images"]}
    for annotation in data["annotations"][:most]:
        change(annotation, images[annotation["image_id"]])
    write_json(scenes / f"{split}.json", data)


def set_box(function):
    def change(annotation, image):
        annotation["bbox"] = function(*annotation["bbox"], image["width"], image["height"])

    return change


def clear(scenes, split):
    data = json.loads((scenes / f"{split}.json").read_text())
    write_json(scenes / f"{split}.json", {**data, "annotations": []})


# For each fault: the change of an annotation, and the message.
FAULTS = {
    "parts": (
        set_box(lambda x, y, w, h, W, H: [x / W, y / H, w / W, h / H]),
        "8 of 8 boxes are below one pixel: they look like parts of the image's size; COCO's are x, y, width,",
    ),
    "centres in parts": (
        set_box(lambda x, y, w, h, W, H: [(x + w / 2) / W, (y + h / 2) / H, w / W, h / H]),
        "8 of 8 boxes are below one pixel: they look like parts of the image's size",
    ),
    "corners": (
        set_box(lambda x, y, w, h, W, H: [x, y, x + w, y + h]),
        "of 8 boxes reach outside their images: they look like x0, y0, x1, y1; COCO's are x, y, width, height",
    ),
    "other size": (
        set_box(lambda x, y, w, h, W, H: [4 * x + 4 * W, 4 * y, 4 * w, 4 * h]),
        "8 of 8 boxes reach outside their images, most of them by more than half: they look like boxes of images of an",
    ),
    "empty": (
        set_box(lambda x, y, w, h, W, H: [x, y, 0, h]),
        "8 of 8 objects are left out: 8 are empty (COCO's are x, y, width, height in pixels of the file)",
    ),
    "not numbers": (
        set_box(lambda x, y, w, h, W, H: [x, y, w, float("nan")]),
        "8 of 8 objects are left out: 8 are empty",
    ),
    "crowds": (
        lambda annotation, image: annotation.update(iscrowd=1),
        "8 of 8 objects are left out: 8 are crowds (iscrowd should be 0 for single objects)",
    ),
    "small": (
        set_box(lambda x, y, w, h, W, H: [x + 2, y + 2, 0.9, h]),
        "8 of 8 objects are left out: 8 are below one pixel in images resized to a shortest edge of 48",
    ),
}


# Validation data is judged by the same function.
@pytest.mark.parametrize(("split", "fault"), [*product(["train"], FAULTS), ("val", "parts"), ("val", "empty")])
def test_nothing_to_learn_stops_before_a_model_is_built(
    scenes, config_file, tmp_path, monkeypatch, fault, split, capsys
):
    change, message = FAULTS[fault]
    monkeypatch.setattr(trainer, "build_model", lambda *arguments: pytest.fail("built a model"))
    edit(scenes, change, split)
    commands = [[], ["--overfit", "2"]] if split == "train" else [[]]
    for options in commands:
        with pytest.raises(DataError) as raised:
            dat("detect", "train", config_file, "data.train.sizes=[30,48]", *options)
        assert message in str(raised.value)
        assert str(raised.value).startswith(f"{scenes / split}.json: ")
        assert "\n" not in str(raised.value)
        assert not (tmp_path / "run").exists()
    arguments = (scenes, "--config", config_file, "--out", tmp_path / "out", "--samples", 0, "data.train.sizes=[30,48]")
    with pytest.raises(SystemExit) as ended:
        main_guard(lambda: dat("detect", "audit", *arguments))
    assert ended.value.code == 1
    text = capsys.readouterr().out
    assert message in text
    assert "training would stop" in text
    summary = json.loads((tmp_path / "out/audit.json").read_text())[split]
    assert len([problem for problem in summary["problems"] if problem["stops"]]) == 1


@pytest.mark.parametrize("split", ["train", "val"])
def test_no_object_at_all(scenes, config_file, tmp_path, split):
    clear(scenes, split)
    with pytest.raises(DataError, match=rf"{split}.json: no object is annotated in 4 images; is it the right file\?"):
        dat("detect", "train", config_file)
    assert not (tmp_path / "run").exists()


def read_train(scenes):
    return read_dataset(DataConfig(str(scenes), train=TRAIN), "train")


@pytest.mark.parametrize(("count", "warns"), [(1, False), (2, True), (5, True)])
@pytest.mark.parametrize("fault", ["empty", "crowds", "small"])
def test_one_object_in_five_that_is_left_out_gives_a_warning(scenes, fault, count, warns):
    edit(scenes, FAULTS[fault][0], most=count)
    found = read_train(scenes)
    text = f"{count} of 8 objects are left out: {count} are "
    assert (text in found.warning) == warns
    assert found.warning.count(str(scenes)) <= 1


def test_objects_that_cannot_be_read_are_not_absent(scenes, tmp_path, capsys):
    edit(scenes, lambda annotation, image: annotation.pop("bbox"))
    with pytest.raises(SystemExit):
        dat("detect", "audit", scenes, "--out", tmp_path / "out")
    text = capsys.readouterr().out
    assert "malformed annotation (8)" in text
    assert "no object" not in text


def test_some_boxes_of_another_form_give_a_warning(scenes):
    edit(scenes, FAULTS["parts"][0], most=2)
    assert "2 of 8 boxes are below one pixel: they look like parts" in read_train(scenes).warning


def test_nothing_is_left_beside_some_boxes_of_another_form(scenes):
    edit(scenes, FAULTS["crowds"][0])
    edit(scenes, FAULTS["parts"][0], most=2)
    with pytest.raises(DataError, match="8 of 8 objects are left out: 8 are crowds"):
        read_train(scenes)


def test_some_boxes_that_reach_outside_give_a_warning(scenes):
    edit(scenes, set_box(lambda x, y, w, h, W, H: [W - w / 2 - 2, 2, w, h]), most=3)
    assert "3 of 8 boxes reach outside their images by a tenth or more" in read_train(scenes).warning


@pytest.mark.parametrize("scale", [100, 1000])
def test_boxes_in_parts_of_another_size_give_a_warning(scale):
    rng = np.random.default_rng(0)
    corners = np.sort(rng.uniform(0, scale, (20, 2, 2)), axis=1)
    objects = [Object(tuple(box), 0, "a line") for box in corners.reshape(20, 4)]
    for size, count in ((2 * scale, 1), (1.9 * scale, 0)):
        found = Findings()
        check_form(Path("x.json"), [((size, size), objects)], found)
        assert [problem.stops for problem in found.problems.values()] == [False] * count
        assert all(f"are they parts of {scale}?" in problem.examples[0] for problem in found.problems.values())


def test_boxes_that_fill_or_slightly_leave_their_images_are_right(scenes):
    edit(scenes, set_box(lambda x, y, w, h, W, H: [1, 1, W, H]))
    found = read_train(scenes)
    assert sum(len(record.boxes) for record in found.records) == 8
    assert "tenth" not in found.warning


@pytest.mark.parametrize("seed", range(5))
def test_right_boxes_of_yolo_are_never_taken_for_another_form(seed):
    rng = np.random.default_rng(seed)
    for count in (12, 200):
        # Some reach outside by a quarter of their width, on any side.
        corners = np.sort(rng.uniform(0, 100, (count, 2, 2)), axis=1)
        corners[::6] += rng.choice([-1, 1], (len(corners[::6]), 1, 1)) * 30
        found = Findings()
        objects = [Object(tuple(box), 0, "a line") for box in corners.reshape(count, 4)]
        check_form(Path("data.yaml"), [((100, 100), objects)], found, "YOLO")
        assert not found.stops
        assert all("look like" not in problem.examples[0] for problem in found.problems.values())


@pytest.mark.parametrize("seed", range(5))
def test_right_boxes_are_never_taken_for_corners(scenes, seed):
    rng = np.random.default_rng(seed)

    def box(x, y, w, h, W, H):
        x0, x1 = sorted(rng.uniform(0, W, 2))
        y0, y1 = sorted(rng.uniform(0, H, 2))
        return [x0, y0, x1 - x0 + 1, y1 - y0 + 1]

    edit(scenes, set_box(box))
    read_train(scenes)


def test_evaluation_needs_objects(scenes, config_file, tmp_path):
    dat("detect", "train", config_file, "train.epochs=1", "train.pictures=0", "train.worst=0")
    clear(scenes, "val")
    with pytest.raises(DataError, match=r"val.json: no object is annotated in 4 images"):
        dat("detect", "evaluate", tmp_path / "run/best.pth", "--out", tmp_path / "evaluation")
    assert not (tmp_path / "evaluation").exists()
