"""Formats of data sets, found by the look of a folder."""

import json
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from dat.detection.config import DataConfig, TrainDataConfig, ValDataConfig
from dat.detection.data import (
    Annotations,
    Category,
    ImageRecord,
    describe_sets,
    read_coco,
    read_dataset,
    readers,
    register_reader,
)
from dat.detection.data.audit_split import audit_split
from dat.utils.errors import DataError


def data_at(root, train="", val="", images=""):
    return DataConfig(str(root), TrainDataConfig(train, images), ValDataConfig(val, images))


@pytest.fixture
def boxes_txt(monkeypatch, scenes):
    """A format of one text file: image, label and box in each line; registered for one test, and a folder of it."""

    def find(path):
        def read(problems, images):
            records = []
            for number, line in enumerate((path / "boxes.txt").read_text().splitlines()):
                name, *numbers = line.split()
                if len(numbers) != 5:
                    problems.add("malformed line", f"{path / 'boxes.txt'}: line {number} is {line!r}", stops=True)
                    continue
                box, label = np.array([numbers[1:]], np.float32), np.array([numbers[0]], np.int64)
                file = (images or path / "images") / name
                records.append(ImageRecord(number, file, 80, 60, box, label, np.zeros(1, bool), np.ones(1, np.float32)))
            return Annotations(path / "boxes.txt", (Category(0, "red"), Category(1, "blue")), tuple(records))

        split = readers.Split("boxes.txt", read)
        return readers.Found("boxes", {"train": split, "val": split}) if (path / "boxes.txt").is_file() else None

    monkeypatch.setattr(readers, "READERS", dict(readers.READERS))
    register_reader("boxes", find, "boxes.txt")
    (scenes / "train.json").unlink()
    (scenes / "val.json").unlink()
    (scenes / "boxes.txt").write_text("train_2.jpg 0 5 5 9 9\ntrain_0.jpg 1 2 3 20 30\n")
    return scenes


def test_coco_is_recognised_by_its_files(scenes):
    train, val = (read_dataset(data_at(scenes), name) for name in ("train", "val"))
    for name, found in (("train", train), ("val", val)):
        assert found.to_coco() == read_coco(scenes / f"{name}.json", scenes / "images").to_coco()
    assert describe_sets(train, val) == f"{scenes}: COCO, train.json 4 images, val.json 4 images, 2 classes"


def test_paths_that_are_given_win(scenes):
    (scenes / "images").rename(scenes / "photos")
    (scenes / "val.json").rename(scenes / "other.json")
    train = read_dataset(data_at(scenes, val="other.json", images="photos"), "train")
    val = read_dataset(data_at(scenes, val="other.json", images="photos"), "val")
    assert describe_sets(train, val) == f"{scenes}: COCO, train.json 4 images, other.json 4 images, 2 classes"
    with pytest.raises(DataError, match=r"no.json: no such annotation file; .*scenes is COCO, which is read without"):
        read_dataset(data_at(scenes, train="no.json"), "train")


def test_images_are_in_the_order_of_their_names_in_every_format(scenes, boxes_txt):
    found = read_dataset(data_at(scenes), "train")
    assert [record.path.name for record in found.records] == ["train_0.jpg", "train_2.jpg"]
    assert [record.boxes.tolist() for record in found.records] == [[[2, 3, 20, 30]], [[5, 5, 9, 9]]]


def test_files_in_another_order_give_the_same_order(scenes):
    expected = [record.path.name for record in read_dataset(data_at(scenes), "train").records]
    content = json.loads((scenes / "train.json").read_text())
    content["images"].reverse()
    (scenes / "train.json").write_text(json.dumps(content))
    assert [record.path.name for record in read_dataset(data_at(scenes), "train").records] == expected


def test_validation_must_have_the_classes_of_training(boxes_txt):
    with pytest.raises(DataError, match="categories are 0 red, 1 blue; they should be those of training, 4 cat"):
        read_dataset(data_at(boxes_txt), "val", (Category(4, "cat"),))


def test_one_parser_raises_or_collects(boxes_txt):
    with (boxes_txt / "boxes.txt").open("a") as file:
        file.write("train_0.jpg 1\ntrain_0.jpg\ngone.jpg 0 1 1 2 2\n")
    with pytest.raises(DataError, match=r"boxes.txt: line 2 is 'train_0.jpg 1'"):
        read_dataset(data_at(boxes_txt), "train")
    found = audit_split(data_at(boxes_txt), "train")
    assert {problem.kind: problem.count for problem in found.problems.values()} == {
        "malformed line": 2,
        "missing image file": 1,
    }
    assert len(found.annotations.records) == 3


def test_a_single_split_is_split_by_name(scenes):
    """As classification does it: every fifth image."""
    content = json.loads((scenes / "train.json").read_text())
    content["images"] = [{**content["images"][0], "id": i, "file_name": f"x{i}.jpg"} for i in range(1, 13)]
    box = {"category_id": 3, "bbox": [1, 1, 20, 20], "area": 400, "iscrowd": 0}
    content["annotations"] = [{**box, "id": i, "image_id": i} for i in range(1, 13)]
    for entry in content["images"]:
        (scenes / "images" / entry["file_name"]).write_bytes((scenes / "images/train_0.jpg").read_bytes())
    (scenes / "train.json").write_text(json.dumps(content))
    (scenes / "val.json").unlink()
    train, val = (read_dataset(data_at(scenes), name) for name in ("train", "val"))
    assert [record.id for record in val.records] == [5, 10]
    assert [record.id for record in train.records] == [1, 2, 3, 4, 6, 7, 8, 9, 11, 12]
    rule = "every 5th image, by name, is for validation (2 of 12 images)"
    assert describe_sets(train, val) == (
        f"{scenes}: COCO, train.json 12 images, no validation split: {rule}, 2 classes"
    )
    # A split that the configuration names is whole.
    given = data_at(scenes, train="train.json", val="train.json")
    assert len(read_dataset(given, "train").records) == len(read_dataset(given, "val").records) == 12
    with pytest.raises(DataError, match=r"has train.json only; data.val.annotations should name another split"):
        read_dataset(data_at(scenes, train="train.json"), "val")
    content["images"], content["annotations"] = content["images"][:4], content["annotations"][:4]
    (scenes / "train.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match=r"\(0 of 4 images\), too few; data.val.annotations should name a validation"):
        read_dataset(data_at(scenes), "train")


def test_images_without_annotations_do_not_train(scenes):
    content = json.loads((scenes / "val.json").read_text())
    del content["annotations"]
    (scenes / "val.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match=r"val.json: has no annotations, data.val needs them"):
        read_dataset(data_at(scenes), "val")
    found = read_dataset(data_at(scenes), "val", annotated=False)
    assert [len(record.boxes) for record in found.records] == [0] * 4
    problems = audit_split(data_at(scenes), "val").problems
    assert problems["no annotations"].stops


def test_a_folder_of_no_known_format_is_one_line(tmp_path):
    (tmp_path / "notes.txt").write_text("")
    (tmp_path / "pictures").mkdir()
    with pytest.raises(
        DataError, match=r"holds notes.txt, pictures/; it should hold data of a known format \(coco: train.json and"
    ) as raised:
        read_dataset(data_at(tmp_path), "train")
    assert "\n" not in str(raised.value)
    with pytest.raises(DataError, match=r"data.root: .*nowhere does not exist"):
        read_dataset(data_at(tmp_path / "nowhere"), "train")
    with pytest.raises(DataError, match=r"data.root: .*notes.txt is not a folder"):
        read_dataset(data_at(tmp_path / "notes.txt"), "train")


@pytest.mark.parametrize(
    ("files", "images", "text"),
    [
        (("annotations/instances_train2017.json", "annotations/instances_val2017.json"), ("train2017", "val2017"),
         "COCO, annotations/instances_train2017.json 4 images, annotations/instances_val2017.json 4 images"),
        (("annotations/instances_train.json", "annotations/instances_val.json"), ("images/train", "images/val"),
         "COCO, annotations/instances_train.json 4 images, annotations/instances_val.json 4 images"),
        (("annotations/instances_Train.json", "annotations/instances_Validation.json"),
         ("images/Train", "images/Validation"),
         "COCO, annotations/instances_Train.json 4 images, annotations/instances_Validation.json 4 images"),
        (("train/_annotations.coco.json", "valid/_annotations.coco.json"), ("train", "valid"),
         "Roboflow COCO, train/ 4 images, valid/ 4 images"),
        (("train/labels.json", "test/labels.json"), ("train/data", "test/data"),
         "COCO, train/labels.json 4 images, test/labels.json 4 images"),
        (("train.json", "val.json"), (".", "."), "COCO, train.json 4 images, val.json 4 images"),
    ],
)  # fmt: skip
def test_folders_of_coco(scenes, tmp_path, files, images, text):
    root = tmp_path / "moved"
    for name, file, folder in zip(("train", "val"), files, images, strict=True):
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        (root / folder).mkdir(parents=True, exist_ok=True)
        (root / file).write_bytes((scenes / f"{name}.json").read_bytes())
        for image in (scenes / "images").glob(f"{name}_*"):
            (root / folder / image.name).write_bytes(image.read_bytes())
    sets = [read_dataset(data_at(root), name) for name in ("train", "val")]
    assert describe_sets(*sets) == f"{root}: {text}, 2 classes"
    for name, found, folder in zip(("train", "val"), sets, images, strict=True):
        assert {record.path.parent for record in found.records} == {root / folder}
        expected = read_coco(scenes / f"{name}.json", scenes / "images")
        assert replace(found, path=expected.path).to_coco() == expected.to_coco()


def test_two_files_that_could_be_a_split_are_named(scenes):
    (scenes / "train.json").unlink()
    for name in ("instances_train2014.json", "instances_train2017.json"):
        (scenes / name).write_bytes((scenes / "val.json").read_bytes())
    with pytest.raises(DataError, match=r"holds instances_train2014.json, instances_train2017.json, of which any"):
        read_dataset(data_at(scenes), "train")


def change(path, edit):
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))


def warnings(scenes):
    return [split.warnings for split in readers.read_splits(data_at(scenes))]


def test_images_of_training_in_validation_are_a_warning(scenes):
    assert warnings(scenes) == [[], []]
    text = "validation images are training images, such as"
    (scenes / "images/val_1.jpg").unlink()
    (scenes / "images/val_1.jpg").symlink_to("train_1.jpg")
    found = f"{scenes / 'val.json'}: 1 of 4 {text} train_1.jpg: their AP says little about others"
    assert warnings(scenes) == [[], [found]]
    (scenes / "val.json").write_bytes((scenes / "train.json").read_bytes())
    found = f"{scenes / 'val.json'}: 4 of 4 {text} train_0.jpg: their AP says little about others"
    assert warnings(scenes) == [[], [found]]


def test_classes_that_only_validation_shows_are_a_warning(scenes):
    change(scenes / "train.json", lambda data: [entry.update(category_id=11) for entry in data["annotations"]])
    assert warnings(scenes) == [[f"{scenes / 'train.json'}: no training object of 1 class of data.val, blue"], []]
    # A list of classes may be longer than either split needs.
    change(scenes / "val.json", lambda data: [entry.update(category_id=11) for entry in data["annotations"]])
    assert warnings(scenes) == [[], []]


def test_equal_objects_and_images_listed_once_for_each_object_are_warnings(scenes):
    wanted = read_coco(scenes / "train.json", scenes / "images")
    change(scenes / "train.json", lambda data: data.update(annotations=data["annotations"] * 2))
    assert warnings(scenes) == [[f"{scenes / 'train.json'}: same annotation twice (8)"], []]

    def list_each(data):
        names = {image["id"]: image for image in data["images"]}
        pairs = list(enumerate(data["annotations"][:8]))
        data["images"] = [{**names[entry["image_id"]], "id": number} for number, entry in pairs]
        data["annotations"] = [{**entry, "image_id": number} for number, entry in pairs]

    change(scenes / "train.json", list_each)
    text = "image listed again with other objects, each time without the others (4)"
    assert warnings(scenes) == [[f"{scenes / 'train.json'}: {text}"], []]

    # An image may be listed again to count for more.
    def repeat(data):
        data.update(wanted.to_coco())
        data["images"] += [{**image, "id": image["id"] + 1000} for image in data["images"]]
        data["annotations"] += [{**entry, "image_id": entry["image_id"] + 1000} for entry in data["annotations"]]

    change(scenes / "train.json", repeat)
    assert warnings(scenes) == [[], []]


@pytest.mark.parametrize(("train", "val"), [("caf\u00e9", "cafe\u0301"), ("red", " red "), ("red ", "red")])
def test_class_names_that_look_the_same_are_the_same(scenes, train, val):
    for name, text in (("train", train), ("val", val)):
        change(scenes / f"{name}.json", lambda data, text=text: data["categories"][0].update(name=text))
    found = readers.read_splits(data_at(scenes))
    assert [[category.name for category in split.categories] for split in found] == [["blue", train]] * 2
    change(scenes / "val.json", lambda data: data["categories"][0].update(name=val.upper()))
    with pytest.raises(DataError, match="they should be those of training"):
        readers.read_splits(data_at(scenes))


def test_data_in_the_only_folder_of_a_folder_is_named(scenes, tmp_path):
    outer = tmp_path / "outer"
    (outer / "__MACOSX").mkdir(parents=True)
    (outer / "notes.txt").touch()
    (outer / "a").mkdir()
    scenes.rename(outer / "a/b")
    with pytest.raises(DataError, match=rf"outer holds .*notes.txt; {outer}/a/b is COCO: data.root={outer}/a/b$"):
        read_dataset(data_at(outer), "train")


@pytest.mark.parametrize(("split", "size"), [("train", (60, 80)), ("val", (80, 61)), ("val", None)])
def test_files_that_do_not_fit_their_annotations_stop_before_training(scenes, split, size):
    path = scenes / f"images/{split}_2.jpg"
    if size:
        Image.new("RGB", size).save(path)
    else:
        path.write_bytes(b"nothing")
    text = f"is {size[0]}x{size[1]}, but its annotations say 80x60" if size else "cannot be read as an image"
    with pytest.raises(DataError, match=f"{path}: {text}"):
        readers.read_splits(data_at(scenes))


def test_turned_images_may_have_the_stored_size(scenes):
    exif = Image.Exif()
    # 6: to be turned by 90 degrees
    exif[0x0112] = 6
    Image.new("RGB", (80, 60)).save(scenes / "images/train_0.jpg", exif=exif)
    Image.new("RGB", (60, 80)).save(scenes / "images/train_2.jpg", exif=exif)
    assert warnings(scenes) == [[], []]
