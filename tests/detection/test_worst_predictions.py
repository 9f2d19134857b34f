import json
from dataclasses import replace

import pytest
from coco_scenes import write_json
from PIL import Image

from dat.detection.data import read_coco
from dat.detection.worst_predictions import draw_worst, find_mistakes


@pytest.fixture
def annotations(scenes):
    """Four images; the objects of the first are a blue and a red square that do not overlap."""
    data = json.loads((scenes / "val.json").read_text())
    first = [a for a in data["annotations"] if a["image_id"] == 100]
    first[0].update(category_id=3, bbox=[5, 5, 20, 20])
    first[1].update(category_id=11, bbox=[50, 30, 20, 20])
    write_json(scenes / "val.json", data)
    return read_coco(scenes / "val.json", scenes / "images")


def result(category_id, bbox, score):
    return {"image_id": 100, "category_id": category_id, "bbox": bbox, "score": score}


def others(annotations):
    """Perfect detections of the other images."""
    found = [a for a in annotations.to_coco()["annotations"] if a["image_id"] != 100]
    return [{key: a[key] for key in ("image_id", "category_id", "bbox")} | {"score": 0.9} for a in found]


def test_mistakes_are_named_and_ordered(annotations):
    results = [
        *others(annotations),
        result(3, [5, 5, 20, 20], 0.8),
        result(3, [6, 5, 20, 20], 0.7),
        result(3, [50, 30, 20, 20], 0.6),
        result(11, [60, 30, 20, 20], 0.5),
        result(11, [40, 2, 9, 9], 0.95),
    ]
    mistakes = find_mistakes(annotations, results)
    missed = [m for m in mistakes if m.missed]
    false = [m for m in mistakes if not m.missed]
    assert len(missed) == 8
    assert (missed[0].record.id, missed[0].score) == (100, 0)
    assert (missed[0].entry["category_id"], missed[0].entry["bbox"]) == (11, [50, 30, 20, 20])
    assert missed[1].score == 0.8
    assert [(m.score, m.reason) for m in false] == [
        (0.95, "nothing is there"),
        (0.7, "found twice"),
        (0.6, "is red"),
        (0.5, "overlap 0.33"),
    ]
    assert (false[2].near["category_id"], false[2].near["bbox"]) == (11, [50, 30, 20, 20])


def test_detections_in_crowds_are_no_mistakes(annotations):
    record = annotations.records[0]
    crowd = replace(annotations, records=(replace(record, crowd=record.labels == 1), *annotations.records[1:]))
    inside = [result(11, [52, 32, 9, 9], 0.9), result(11, [52, 30, 9, 9], 0.8)]
    mistakes = find_mistakes(crowd, [*inside, result(3, [52, 32, 9, 9], 0.7)])
    assert [m.score for m in mistakes if not m.missed] == [0.7]
    assert len([m for m in mistakes if m.missed]) == 7


def test_the_worst_are_drawn(annotations, tmp_path):
    assert not draw_worst(annotations, [*others(annotations), *perfect_first()], tmp_path / "a.png", 6)
    assert not (tmp_path / "a.png").exists()
    assert draw_worst(annotations, [result(3, [40, 2, 9, 9], 0.9)], tmp_path / "b.png", 6)
    assert Image.open(tmp_path / "b.png").width > 600
    assert not draw_worst(annotations, [], tmp_path / "c.png", 0)
    # those of an earlier call do not stay
    assert not draw_worst(annotations, [*others(annotations), *perfect_first()], tmp_path / "b.png", 6)
    assert not (tmp_path / "b.png").exists()


def perfect_first():
    return [result(3, [5, 5, 20, 20], 0.9), result(11, [50, 30, 20, 20], 0.9)]
