"""Data that is unusual but right trains; what is wrong stops with its name and leaves the last checkpoint alone."""

import json
import math

import pytest
import torch
from coco_scenes import write_json
from commands import dat
from test_detection_commands import fails

from dat.detection import plots
from dat.detection.criterion import SetCriterion
from dat.detection.matcher import HungarianMatcher
from dat.engine.checkpoint import load_checkpoint
from dat.engine.command import main_guard


def edit(scenes, change, splits=("train", "val")):
    for split in splits:
        data = json.loads((scenes / f"{split}.json").read_text())
        change(data)
        write_json(scenes / f"{split}.json", data)


def one_class(data):
    """One class of a large id; no object in the second image."""
    data["categories"] = [{"id": 90210, "name": "square"}]
    gone = data["images"][1]["id"]
    data["annotations"] = [a | {"category_id": 90210} for a in data["annotations"] if a["image_id"] != gone]
    for number, image in enumerate(data["images"]):
        for annotation in data["annotations"]:
            if annotation["image_id"] == image["id"]:
                annotation["image_id"] = 10**9 + 7 * number
        image["id"] = 10**9 + 7 * number


def thousand_classes(data):
    data["categories"] = [{"id": 3 * k + 1, "name": f"class {k}"} for k in range(1000)]
    for number, annotation in enumerate(data["annotations"]):
        annotation["category_id"] = 3 * (97 * number % 1000) + 1


def one_object(data):
    """Batches without objects."""
    data["annotations"] = data["annotations"][:1]


def crowds(data):
    for annotation in data["annotations"][1:]:
        annotation["iscrowd"] = 1


def pixels(data):
    for annotation in data["annotations"]:
        annotation["bbox"][2:] = [1, 1]


def many_objects(data):
    """Twenty times the queries."""
    data["annotations"] *= 25
    for number, annotation in enumerate(data["annotations"]):
        data["annotations"][number] = annotation | {"id": number + 1}


@pytest.mark.parametrize(
    ("change", "splits"),
    [
        (one_class, ("train", "val")),
        (thousand_classes, ("train", "val")),
        (one_object, ("train",)),
        (one_object, ("val",)),
        (crowds, ("train", "val")),
        (pixels, ("train", "val")),
        (many_objects, ("train", "val")),
    ],
)
def test_unusual_data_trains_without_an_edit(config_file, scenes, tmp_path, monkeypatch, change, splits):
    # as many are drawn as take no time
    monkeypatch.setattr(plots, "MOST_CLASSES", 5)
    edit(scenes, change, splits)
    dat("detect", "train", config_file, "train.epochs=1")
    run = tmp_path / "run"
    state = load_checkpoint(run / "last.pth")
    assert all(torch.isfinite(value).all() for value in state["state_dict"].values())
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert all(math.isfinite(line["loss"]) for line in lines if line["kind"] == "train")
    categories = json.loads((scenes / "train.json").read_text())["categories"]
    assert state["category_ids"] == sorted(category["id"] for category in categories)
    assert state["state_dict"]["class_embed.0.weight"].shape[0] == len(categories)
    results = json.loads((run / "detections.json").read_text())
    assert results
    assert {result["category_id"] for result in results} <= set(state["category_ids"])
    text = (run / "train.log").read_text()
    assert f"name of {len(categories)} classes" in text
    assert f"    0  {state['category_ids'][0]:>8}  {state['class_names'][0]}" in text


@pytest.mark.parametrize("scores", ["sigmoid", "softmax"])
def test_more_objects_than_queries_match_every_query(scores):
    torch.manual_seed(0)
    logits = torch.randn(2, 4, 3 + (scores == "softmax"), requires_grad=True)
    outputs = {"pred_logits": logits, "pred_boxes": torch.rand(2, 4, 4) * 0.4 + 0.3}
    targets = [{"labels": torch.randint(3, (n,)), "boxes": torch.rand(n, 4) * 0.4 + 0.3} for n in (7, 0)]
    criterion = SetCriterion(3, HungarianMatcher(scores=scores), scores=scores)
    assert [len(query) for query, _ in criterion.matcher(outputs, targets)] == [4, 0]
    total = criterion.total(criterion(outputs, targets))
    total.backward()
    assert torch.isfinite(total)
    assert torch.isfinite(logits.grad).all()


@pytest.mark.parametrize("scores", ["sigmoid", "softmax"])
def test_losses_of_parts_add_up_to_that_of_the_batch(scores):
    torch.manual_seed(0)
    outputs = {
        "pred_logits": torch.randn(4, 5, 3 + (scores == "softmax"), dtype=torch.float64),
        "pred_boxes": torch.rand(4, 5, 4, dtype=torch.float64) * 0.4 + 0.3,
    }
    targets = [{"labels": torch.randint(3, (n,)), "boxes": torch.rand(n, 4) * 0.4 + 0.3} for n in (3, 0, 7, 1)]
    criterion = SetCriterion(3, HungarianMatcher(scores=scores), scores=scores)
    whole = criterion(outputs, targets)
    normalizers = criterion.normalizers(targets, 5, torch.device("cpu"))
    parts = [
        criterion({name: value[part] for name, value in outputs.items()}, targets[part], normalizers)
        for part in (slice(0, 1), slice(1, 4))
    ]
    for name, loss in whole.items():
        torch.testing.assert_close(parts[0][name] + parts[1][name], loss)


def test_boxes_that_become_nan_name_the_step_and_keep_the_checkpoint(config_file, tmp_path, capsys, monkeypatch):
    main_guard(lambda: dat("detect", "train", config_file, "train.steps=2"))
    last, best = tmp_path / "run/last.pth", tmp_path / "run/best.pth"
    before = last.read_bytes(), best.read_bytes()
    forward = torch.nn.Linear.forward

    def broken(self, x):
        y = forward(self, x)
        # the head of the boxes
        return y * math.nan if y.shape[-1] == 4 and self.out_features == 4 and self.in_features == 16 else y

    monkeypatch.setattr(torch.nn.Linear, "forward", broken)
    line = fails(capsys, "train", config_file, "train.steps=5", "train.resume=true")
    assert "step 3, images [10" in line
    assert "first non-finite tensor is output of bbox_embed" in line
    assert (last.read_bytes(), best.read_bytes()) == before
