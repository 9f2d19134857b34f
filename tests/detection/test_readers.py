"""Formats of data sets, found by the look of a folder."""

from pathlib import Path

import numpy as np
import pytest

from dat.detection.config import TrainDataConfig, ValDataConfig
from dat.detection.data import Annotations, Category, ImageRecord, read_coco, read_dataset, readers, register_reader
from dat.detection.data.audit_split import audit_split
from dat.utils.errors import DataError

TRAIN = TrainDataConfig(annotations="train.json", images="images")


@pytest.fixture
def boxes_txt(monkeypatch, scenes):
    """A format of one text file: image, label and box in each line; registered for one test, and a folder of it."""

    def read(root, split, problems):
        records = []
        for number, line in enumerate((root / "boxes.txt").read_text().splitlines()):
            name, *numbers = line.split()
            if len(numbers) != 5:
                problems.add("malformed line", f"{root / 'boxes.txt'}: line {number} is {line!r}", stops=True)
                continue
            box, label = np.array([numbers[1:]], np.float32), np.array([numbers[0]], np.int64)
            path = root / "images" / name
            records.append(ImageRecord(number, path, 80, 60, box, label, np.zeros(1, bool), np.ones(1, np.float32)))
        return Annotations(root / "boxes.txt", (Category(0, "red"), Category(1, "blue")), tuple(records))

    monkeypatch.setattr(readers, "READERS", dict(readers.READERS))
    register_reader("boxes.txt", lambda root, split: (root / "boxes.txt").is_file(), read)
    (scenes / "train.json").unlink()
    (scenes / "boxes.txt").write_text("train_0.jpg 1 2 3 20 30\ntrain_2.jpg 0 5 5 9 9\n")
    return scenes


def test_coco_is_recognised_by_its_file(scenes):
    found = read_dataset(scenes, TRAIN)
    expected = read_coco(scenes / "train.json", scenes / "images")
    assert found.to_coco() == expected.to_coco()
    read_dataset(scenes, ValDataConfig(annotations="val.json", images="images"), found.categories)


def test_a_format_is_recognised_by_its_folder(boxes_txt):
    found = read_dataset(boxes_txt, TRAIN)
    assert [record.boxes.tolist() for record in found.records] == [[[2, 3, 20, 30]], [[5, 5, 9, 9]]]
    assert [entry["category_id"] for entry in found.to_coco()["annotations"]] == [1, 0]
    with pytest.raises(DataError, match="categories are 0 red, 1 blue; they should be those of training, 4 cat"):
        read_dataset(boxes_txt, TRAIN, (Category(4, "cat"),))


def test_one_parser_raises_or_collects(boxes_txt):
    with (boxes_txt / "boxes.txt").open("a") as file:
        file.write("train_0.jpg 1\ntrain_0.jpg\ngone.jpg 0 1 1 2 2\n")
    with pytest.raises(DataError, match=r"boxes.txt: line 2 is 'train_0.jpg 1'"):
        read_dataset(boxes_txt, TRAIN)
    found = audit_split(boxes_txt, TRAIN)
    assert {problem.kind: problem.count for problem in found.problems.values()} == {
        "malformed line": 2,
        "missing image file": 1,
    }
    assert len(found.annotations.records) == 3


def test_a_folder_of_no_known_format_is_one_line(tmp_path):
    with pytest.raises(
        DataError, match=r"train.json: no such annotation file, and .* of no known format \(coco"
    ) as raised:
        read_dataset(Path(tmp_path), TRAIN)
    assert "\n" not in str(raised.value)
