import json

import numpy as np
import pytest
import torch
from coco_scenes import write_json
from PIL import Image

from dat.detection.data import Category, load_image, read_coco, read_sample
from dat.detection.data.formats.coco import parse_coco
from dat.engine.audit import Findings
from dat.utils.errors import DataError


def edit(path, change):
    data = json.loads(path.read_text())
    change(data)
    write_json(path, data)
    return path


def read(scenes, split="train", categories=None):
    return read_coco(scenes / f"{split}.json", scenes / "images", categories)


def test_labels_are_contiguous_and_go_back_to_the_files_ids(scenes):
    annotations = read(scenes)
    assert annotations.categories == (Category(3, "blue"), Category(11, "red"))
    source = json.loads((scenes / "train.json").read_text())
    written = annotations.to_coco()
    for key in ("image_id", "category_id", "bbox"):
        assert [a[key] for a in written["annotations"]] == [a[key] for a in source["annotations"]]
    assert {label for record in annotations.records for label in record.labels.tolist()} == {0, 1}


def test_boxes_are_clipped_and_empty_ones_dropped_with_one_warning(scenes):
    image = {"image_id": 100, "category_id": 3}
    bad = [[-10, 5, 30, 20], [70, 50, 50, 50], [5, 5, 0, 10], [5, 5, 10, -3], [90, 5, 10, 10], [float("nan"), 1, 2, 3]]

    def replace(data):
        data["annotations"] = [{"id": i, "bbox": bbox, **image} for i, bbox in enumerate(bad)]

    edit(scenes / "train.json", replace)
    annotations = read(scenes)
    np.testing.assert_allclose(annotations.records[0].boxes, [[0, 5, 20, 25], [70, 50, 80, 60]])
    assert annotations.warning == (
        f"{scenes / 'train.json'}: box reaches outside its image, clipped (2); empty box, dropped (3); "
        "box outside its image, dropped (1)"
    )
    assert read(scenes, "val").warning == ""


def test_numbers_as_pandas_writes_them(scenes):
    wanted = read(scenes).to_coco()

    def change(data):
        for entry in data["images"]:
            entry.update(width=float(entry["width"]), height=float(entry["height"]))
        for entry in data["annotations"]:
            entry.update(category_id=float(entry["category_id"]), iscrowd=None)

    edit(scenes / "train.json", change)
    assert read(scenes).to_coco() == wanted


@pytest.mark.parametrize("absent", [True, False])
def test_sizes_that_are_not_there_are_those_of_the_files(scenes, absent):
    wanted = read(scenes).to_coco()

    def change(data):
        for entry in data["images"][1:]:
            for key in ("width", "height"):
                entry.pop(key) if absent else entry.update({key: None})

    edit(scenes / "train.json", change)
    assert read(scenes).to_coco() == wanted
    (scenes / "images/train_1.jpg").unlink()
    with pytest.raises(DataError, match=r"train_1.jpg, which is absent from .*images: there is no"):
        read(scenes)


def test_an_entry_that_cannot_be_read_is_one_problem_whatever_its_objects(scenes):
    edit(scenes / "train.json", lambda data: data["images"][1].pop("width"))
    problems = Findings()
    parse_coco(scenes / "train.json", scenes / "images", problems)
    assert {kind: problem.count for kind, problem in problems.problems.items()} == {"malformed image entry": 1}


def test_areas_are_the_files_or_those_of_the_boxes(scenes):
    def change(data):
        data["annotations"][0].update(area=12.5)
        data["annotations"][1].update(area=None)

    edit(scenes / "train.json", change)
    record = read(scenes).records[0]
    x0, y0, x1, y1 = record.boxes[1]
    assert record.areas.tolist() == [12.5, (x1 - x0) * (y1 - y0)]


def test_images_without_annotations_are_kept(scenes):
    edit(scenes / "train.json", lambda data: data.update(annotations=[]))
    annotations = read(scenes)
    assert len(annotations.records) == 4
    _, target = read_sample(annotations.records[0])
    assert target["boxes"].shape == (0, 4)
    assert target["labels"].shape == (0,)


def test_crowds_do_not_train(scenes):
    edit(scenes / "train.json", lambda data: data["annotations"][0].update(iscrowd=1))
    record = read(scenes).records[0]
    _, target = read_sample(record)
    assert record.crowd.tolist() == [True, False]
    assert len(target["labels"]) == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data.pop("categories"), "'categories' is absent"),
        (lambda data: data.update(images={}), "'images' is not a list"),
        (lambda data: data["images"][1].pop("width"), r"images\[1\] has no 'width'"),
        (lambda data: data["images"][1].update(width="80"), r"images\[1\] has 'width' '80'; it should be an integer"),
        (lambda data: data["images"][1].update(id=100), "image id 100 is used more than once"),
        (lambda data: data["annotations"][2].pop("bbox"), r"annotations\[2\] has no 'bbox'"),
        (lambda data: data["annotations"][2].update(bbox=[1, 2]), r"annotations\[2\] has 'bbox' \[1, 2\]"),
        (lambda data: data["annotations"][2].update(image_id=5), "'image_id' 5, which 'images' does not list"),
        (lambda data: data["annotations"][2].update(category_id=5), "'category_id' 5, which 'categories' does not"),
        (
            lambda data: data.update(categories=data["categories"] * 2),
            "category id 3 is used more than once|11 is used",
        ),
        (
            lambda data: data["categories"][0].update(name=" "),
            "category with id 11 has the name ' '; it should have one",
        ),
        (lambda data: data["categories"][0].update(name="blue"), "category name 'blue' is used more than once"),
        (lambda data: data["annotations"][2].update(area="abc"), r"annotations\[2\] has 'area' 'abc'; it should be a"),
        (lambda data: data["annotations"][2].update(area=-1), r"annotations\[2\] has 'area' -1"),
        (lambda data: data["annotations"][2].update(area=float("nan")), r"annotations\[2\] has 'area' nan"),
        (
            lambda data: data["annotations"][2].update(iscrowd="0"),
            r"annotations\[2\] has 'iscrowd' '0'; it should be 0",
        ),
        (lambda data: data["annotations"][2].update(area=10**400), r"annotations\[2\] has 'area' 1000"),
        (lambda data: data["annotations"][2].update(area=1e300), r"annotations\[2\] has 'area' 1e\+300"),
        (lambda data: data["annotations"][2].update(bbox=[1, 2, True, 4]), r"annotations\[2\] has 'bbox' \[1, 2, True"),
        (lambda data: data["annotations"][2].update(bbox=[1.5, 0, 10**400, 5]), r"annotations\[2\] has 'bbox' \[1.5"),
        (lambda data: data["images"][1].update(width=10**400), r"images\[1\] has 'width' 1000"),
        (lambda data: data["categories"][0].update(id=2**63), r"categories\[0\] has 'id' 9223372036854775808"),
        (lambda data: data["annotations"][2].update(iscrowd=2), r"annotations\[2\] has 'iscrowd' 2"),
    ],
)
def test_what_is_not_coco_is_named(scenes, change, message):
    edit(scenes / "train.json", change)
    with pytest.raises(DataError, match=message) as raised:
        read(scenes)
    assert str(scenes / "train.json") in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_file_that_is_missing_or_not_json_is_named(scenes):
    with pytest.raises(DataError, match=r"nothing.json: no such annotation file"):
        read(scenes, "nothing")
    (scenes / "train.json").write_text("{")
    with pytest.raises(DataError, match=r"train.json: is not JSON"):
        read(scenes)
    for text in ("[" * 100_000, '{"images": [{"id": ' + "9" * 5000 + "}]}"):
        (scenes / "train.json").write_text(text)
        with pytest.raises(DataError, match=r"train.json: is not JSON"):
            read(scenes)
    (scenes / "train.json").write_text("[]")
    with pytest.raises(DataError, match=r"train.json: is not COCO: holds a list"):
        read(scenes)


def test_absent_images_are_counted(scenes):
    for name in ("train_1.jpg", "train_3.jpg"):
        (scenes / "images" / name).unlink()
    with pytest.raises(DataError, match=r"train_1.jpg, which is absent from .*images \(and 1 more of 4\)"):
        read(scenes)


def test_validation_must_have_the_classes_of_training(scenes):
    classes = read(scenes).categories
    edit(scenes / "val.json", lambda data: data["categories"][0].update(name="green"))
    with pytest.raises(
        DataError, match=r"categories are 3 blue, 11 green; they should be those of training, 3 blue, 11"
    ):
        read(scenes, "val", classes)


def test_classes_of_validation_are_those_of_training_by_name(scenes):
    source = json.loads((scenes / "val.json").read_text())
    names = {category["id"]: category["name"] for category in source["categories"]}
    classes = (Category(3, "red"), Category(11, "green"), Category(12, "blue"), Category(20, "grey"))
    found = read(scenes, "val", classes)
    # Ids stay those of the file; classes that it lacks get others.
    assert found.categories == (Category(11, "red"), Category(21, "green"), Category(3, "blue"), Category(20, "grey"))
    wanted = [names[annotation["category_id"]] for annotation in source["annotations"]]
    assert [classes[label].name for record in found.records for label in record.labels] == wanted
    written = found.to_coco()["annotations"]
    assert [a["category_id"] for a in written] == [a["category_id"] for a in source["annotations"]]


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK", "I;16"])
def test_every_mode_becomes_rgb(tmp_path, mode):
    grey = Image.new("RGB", (9, 6), (200, 200, 200))
    if mode == "I;16":
        source = Image.fromarray(np.full((6, 9), 200 * 257, dtype=np.uint16))
    else:
        source = grey.quantize() if mode == "P" else grey.convert(mode)
    path = tmp_path / f"image.{'tif' if mode == 'CMYK' else 'png'}"
    source.save(path)
    image = load_image(path, (9, 6))
    assert image.shape == (3, 6, 9)
    assert image.dtype == torch.uint8
    assert (image == 200).all()


def test_orientation_follows_the_annotated_size(tmp_path):
    path = tmp_path / "turned.jpg"
    exif = Image.Exif()
    # 6: to be turned by 90 degrees
    exif[0x0112] = 6
    Image.new("RGB", (9, 6)).save(path, exif=exif)
    assert load_image(path, (9, 6)).shape == (3, 6, 9)
    assert load_image(path, (6, 9)).shape == (3, 9, 6)
    assert load_image(path).shape == (3, 9, 6)
    with pytest.raises(DataError, match=r"turned.jpg: is 6x9, but its annotations say 5x5"):
        load_image(path, (5, 5))


def test_a_truncated_image_is_named(scenes):
    path = scenes / "images" / "train_0.jpg"
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(DataError, match=r"train_0.jpg: cannot be read as an image: .*truncated"):
        load_image(path)
