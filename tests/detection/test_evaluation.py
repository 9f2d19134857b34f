import json
import math

import pytest
import torch
from coco_scenes import write_json

from dat.detection.data import Category, read_coco
from dat.detection.evaluation import average_precision, format_table, to_results


@pytest.fixture
def annotations(scenes):
    return read_coco(scenes / "val.json", scenes / "images")


def perfect(annotations):
    found = annotations.to_coco()["annotations"]
    return [{key: a[key] for key in ("image_id", "category_id", "bbox")} | {"score": 0.9} for a in found]


def test_perfect_detections_have_ap_1(annotations):
    metrics = average_precision(annotations, perfect(annotations))
    assert metrics["AP"] == metrics["AP50"] == metrics["AR100"] == 1
    assert metrics["APl"] is None
    assert {name: m["AP"] for name, m in metrics["per_class"].items()} == {"blue": 1, "red": 1}
    assert sum(m["objects"] for m in metrics["per_class"].values()) == 8
    assert "red" in format_table(metrics)


def test_classes_in_another_order_have_the_same_ap(scenes, annotations):
    classes = (*annotations.categories[::-1], Category(7, "grey"))
    other = read_coco(annotations.path, scenes / "images", classes)
    results = [result for result in perfect(annotations) if result["category_id"] == 3]
    expected = average_precision(annotations, results)["per_class"]
    found = average_precision(other, results)["per_class"]
    assert list(found) == ["red", "blue", "grey"]
    assert found["grey"] == {"AP": None, "AP50": None, "objects": 0}
    assert {name: found[name] for name in expected} == expected
    assert (found["blue"]["AP"], found["red"]["AP"]) == (1.0, 0.0)


def test_ap_of_half_the_objects_of_a_class(annotations):
    red = [result for result in perfect(annotations) if result["category_id"] == 11]
    metrics = average_precision(annotations, red[: len(red) // 2])
    recall = (len(red) // 2) / len(red)
    # 101 recall thresholds, those up to the recall have precision 1
    assert metrics["per_class"]["red"]["AP"] == pytest.approx((math.floor(recall * 100) + 1) / 101, abs=1e-4)
    assert metrics["per_class"]["blue"]["AP"] == 0


def test_boxes_that_overlap_by_0_6_count_for_ap50_alone(annotations):
    results = perfect(annotations)
    for result in results:
        x, y, w, h = result["bbox"]
        result["bbox"] = [x, y, w * 0.6, h]
    metrics = average_precision(annotations, results)
    assert metrics["AP50"] == 1
    assert metrics["AP75"] == 0


def test_more_than_100_objects_of_a_class_in_an_image(scenes):
    """COCO's evaluation counts 100 detections of each class; every one counts in large images."""
    data = json.loads((scenes / "val.json").read_text())
    objects = [{"bbox": [i % 10, i // 10, 1, 1], "category_id": 3, "image_id": 100, "id": i + 1} for i in range(150)]
    write_json(scenes / "val.json", data | {"annotations": objects})
    annotations = read_coco(scenes / "val.json", scenes / "images")
    results = perfect(annotations)
    assert average_precision(annotations, results)["AP"] == pytest.approx(67 / 101, abs=1e-3)
    metrics = average_precision(annotations, results, every=True)
    assert metrics["AP"] == 1
    assert metrics["AR100"] == pytest.approx(2 / 3, abs=1e-4)


def test_no_detections_at_all(annotations):
    assert average_precision(annotations, [])["AP"] == 0


def test_detections_in_crowds_are_ignored(scenes):
    data = json.loads((scenes / "val.json").read_text())
    crowd = data["annotations"][0]
    crowd["iscrowd"] = 1
    write_json(scenes / "val.json", data)
    annotations = read_coco(scenes / "val.json", scenes / "images")
    results = [result | {"score": 0.5} for result in perfect(annotations)]
    inside = {"image_id": crowd["image_id"], "category_id": crowd["category_id"], "bbox": crowd["bbox"], "score": 0.99}
    metrics = average_precision(annotations, [inside, inside, *results])
    assert metrics["AP"] == 1
    assert sum(m["objects"] for m in metrics["per_class"].values()) == 7


def test_results_are_in_the_files_ids_and_inside_the_image(annotations):
    detections = {
        "scores": torch.tensor([0.75]),
        "labels": torch.tensor([1]),
        "boxes": torch.tensor([[-5.0, 10, 70, 90]]),
    }
    (result,) = to_results(7, (60, 50), detections, annotations.categories)
    assert result == {"image_id": 7, "category_id": 11, "bbox": [0, 10, 50, 50], "score": 0.75}
