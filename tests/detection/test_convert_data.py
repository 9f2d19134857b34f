"""Data sets in another format and back."""

import json
import os
from itertools import permutations

import numpy as np
import pytest
from commands import dat
from PIL import ExifTags, Image, ImageOps

from dat.detection.config import DataConfig
from dat.detection.data import read_dataset
from dat.detection.data.readers import find_format, read_strictly
from dat.utils.errors import ConfigError, DataError
from dat.utils.images import read_image

# Names are as YAML, XML and text files have to keep them.
NAMES = ("no", "a & <b>", "红色", "10")


def write_coco(root, crowds=False):
    """Three splits of images in folders, with boxes of any float32 coordinates, two of them at the borders."""
    rng = np.random.default_rng(0)
    for split in ("train", "val", "test"):
        images, annotations = [], []
        for number in range(4):
            width, height = ((97, 61), (64, 83))[number % 2]
            name = f"{'night' if number == 3 else 'day'}/{split} {number}.png"
            path = root / "images" / split / name
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (width, height), (number, 0, 0)).save(path)
            images.append({"id": number + 1, "file_name": name, "width": width, "height": height})
            # The last image shows no objects.
            corners = np.sort(rng.random((6 if number < 3 else 0, 2, 2)), axis=1) * (width, height)
            boxes = corners.reshape(-1, 4).astype(np.float32).astype(float)
            if number == 0:
                boxes[0], boxes[1] = (0, 0, width, height), (1e-5, 0, 3, height)
            for k, (x0, y0, x1, y1) in enumerate(boxes.tolist()):
                area = {"area": (x1 - x0) * (y1 - y0) / 2} if crowds and k == 2 else {}
                annotation = {"id": len(annotations) + 1, "image_id": number + 1, "category_id": 2 + 3 * (k % 4)}
                crowd = {"iscrowd": int(crowds and k == 3)}
                annotations.append({**annotation, "bbox": [x0, y0, x1 - x0, y1 - y0], **crowd, **area})
        categories = [{"id": 2 + 3 * k, "name": name} for k, name in enumerate(NAMES)]
        content = {"images": images, "annotations": annotations, "categories": categories}
        (root / "annotations").mkdir(exist_ok=True)
        (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))
    return root


def read_all(root):
    found = find_format(root)
    return {
        name: read_strictly(lambda problems, split=split: split.read(problems, None))
        for name, split in found.splits.items()
    }


def contents(root, crowds=True, areas=True):
    """All that a data set says about its images, by split and name."""
    found = {}
    for name, split in read_all(root).items():
        names = [category.name for category in split.categories]
        for record in split.records:
            parts = [record.boxes, record.areas if areas else record.areas * 0, record.crowd]
            kept = ~record.crowd if not crowds else slice(None)
            content = [part[kept].tolist() for part in parts] + [[names[k] for k in record.labels[kept]]]
            place = "night" if "night" in record.path.parts else "day"
            pixel = Image.open(record.path).getpixel((0, 0))
            found[name, place, record.path.name] = (record.width, record.height, pixel, content)
    return found


def convert(source, target, name, *arguments):
    dat("detect", "convert", source, target, "--to", name, *arguments)
    return target


@pytest.mark.parametrize(("a", "b"), list(permutations(("coco", "yolo", "voc"), 2)))
def test_there_and_back_nothing_changes(tmp_path, a, b):
    source = write_coco(tmp_path / "source")
    first = convert(source, tmp_path / "first", a)
    second = convert(first, tmp_path / "second", b)
    third = convert(second, tmp_path / "third", a)
    expected = contents(source)
    assert len(expected) == 12
    assert contents(first) == contents(second) == contents(third) == expected
    orders = [[c.name for c in read_all(root)["train"].categories] for root in (source, first, second, third)]
    assert orders == [list(NAMES)] * 4
    if a != "coco":
        files = sorted(path.relative_to(first) for path in first.rglob("*") if path.is_file())
        assert files == sorted(path.relative_to(third) for path in third.rglob("*") if path.is_file())
        assert all((first / file).read_bytes() == (third / file).read_bytes() for file in files)


@pytest.mark.parametrize(
    ("name", "crowds", "areas", "lines"),
    [
        ("coco", True, True, []),
        ("voc", True, False, ["9 areas become those of the boxes"]),
        ("yolo", False, False, ["9 crowds are left out, as YOLO has none", "9 areas become those of the boxes"]),
    ],
)
def test_what_a_format_cannot_hold_is_said(tmp_path, capsys, name, crowds, areas, lines):
    source = write_coco(tmp_path / "source", crowds=True)
    target = convert(source, tmp_path / "target", name)
    said = capsys.readouterr().out.splitlines()
    assert said == [
        f"{source}: COCO, annotations/instances_train.json 4 images, annotations/instances_val.json 4 images, "
        "annotations/instances_test.json 4 images, 4 classes",
        *lines,
        f"written to {target}",
    ]
    assert contents(target, crowds, areas) == contents(source, crowds, areas)


@pytest.mark.parametrize(
    ("name", "ending", "orientation"),
    [*(("yolo", "png", turn) for turn in range(1, 9)), ("yolo", "tif", 6), ("voc", "png", 6), ("coco", "png", 6)],
)
def test_boxes_of_images_whose_turn_annotations_leave_out_stay_on_their_objects(tmp_path, name, ending, orientation):
    image = Image.new("RGB", (80, 60))
    image.paste((255, 255, 255), (10, 20, 30, 50))
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    (tmp_path / "a/images/train").mkdir(parents=True)
    path = tmp_path / f"a/images/train/1.{ending}"
    image.save(path, exif=exif)
    # Turns that keep the size are always followed.
    with Image.open(path) as stored:
        x0, y0, x1, y1 = (ImageOps.exif_transpose(stored) if orientation <= 4 else image).getbbox()
    content = {
        "images": [{"id": 1, "file_name": path.name, "width": 80, "height": 60}],
        "annotations": [{"id": 1, "image_id": 1, "category_id": 1, "bbox": [x0, y0, x1 - x0, y1 - y0]}],
        "categories": [{"id": 1, "name": "a"}],
    }
    (tmp_path / "a/annotations").mkdir()
    (tmp_path / "a/annotations/instances_train.json").write_text(json.dumps(content))
    (split,) = read_all(convert(tmp_path / "a", tmp_path / "b", name)).values()
    (record,) = split.records
    shown = read_image(record.path, (record.width, record.height))
    np.testing.assert_allclose(record.boxes[0], shown.getbbox(), atol=1e-4)


def test_images_that_cannot_be_read_are_converted_too(tmp_path):
    source = write_coco(tmp_path / "source")
    (source / "images/val/day/val 1.png").write_bytes(b"damaged")
    convert(source, tmp_path / "target", "yolo")
    assert (tmp_path / "target/images/val/day/val 1.png").read_bytes() == b"damaged"


def test_coco_keeps_its_ids(tmp_path):
    target = convert(write_coco(tmp_path / "source", crowds=True), tmp_path / "target", "coco")
    for name in ("train", "val", "test"):
        before, after = (
            json.loads((root / f"annotations/instances_{name}.json").read_text())
            for root in (tmp_path / "source", target)
        )
        assert after["images"] == before["images"]
        assert after["categories"] == before["categories"]
        assert [a["category_id"] for a in after["annotations"]] == [a["category_id"] for a in before["annotations"]]


def test_images_are_copied_or_linked(tmp_path):
    source = write_coco(tmp_path / "source")
    copied = convert(source, tmp_path / "copied", "yolo")
    linked = convert(source, tmp_path / "linked", "yolo", "--link")
    name = "images/train/day/train 0.png"
    assert not (copied / name).is_symlink()
    assert os.readlink(linked / name) == str(source / name)
    assert contents(copied) == contents(linked)


def test_nothing_is_left_half_written(tmp_path):
    source, target = write_coco(tmp_path / "source"), tmp_path / "target"
    target.mkdir()
    (source / "images/val/day/val 1.jpg").write_bytes((source / "images/val/day/val 1.png").read_bytes())
    path = source / "annotations/instances_val.json"
    content = json.loads(path.read_text())
    content["images"][2]["file_name"] = "day/val 1.jpg"
    path.write_text(json.dumps(content))
    with pytest.raises(DataError, match=r"lists day/val 1.jpg and day/val 1.png, whose labels would be one file"):
        convert(source, target, "yolo")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source", "target"]
    assert not list(target.iterdir())
    # An empty folder is filled.
    convert(source, target, "coco")
    with pytest.raises(ConfigError, match=r"target: exists already, should be absent or an empty folder"):
        convert(source, target, "coco")


def test_equal_names_in_two_splits_stay_apart_in_voc(tmp_path):
    source = write_coco(tmp_path / "source")
    for split in ("train", "val"):
        path = source / f"annotations/instances_{split}.json"
        content = json.loads(path.read_text())
        for entry in content["images"]:
            new = entry["file_name"].replace(f"{split} ", "")
            (source / "images" / split / entry["file_name"]).rename(source / "images" / split / new)
            entry["file_name"] = new
        path.write_text(json.dumps(content))
    assert contents(convert(source, tmp_path / "target", "voc")) == contents(source)


def test_arguments_that_do_not_fit_are_one_line(tmp_path):
    source = write_coco(tmp_path / "source")
    for arguments, message in (
        ((source, tmp_path / "out"), "--to is absent, should name the format"),
        ((source, tmp_path / "out", "--to", "cvat"), "--to is cvat, should be one of coco, voc, yolo"),
        ((source, tmp_path / "out", "--to", "voc", "--out", "x.pth"), "--out is for weights"),
        ((source, tmp_path / "out", "--to", "voc", "seed=1"), "seed=1 is for weights"),
        (("finetune", "weights.pth"), "--annotations is absent, should be given to convert weights"),
    ):
        with pytest.raises(ConfigError, match=message):
            dat("detect", "convert", *arguments)
    with pytest.raises(DataError, match="nowhere: no such folder of data"):
        dat("detect", "convert", tmp_path / "nowhere", tmp_path / "out", "--to", "voc")


def test_one_split_stays_one(tmp_path):
    source = write_coco(tmp_path / "source")
    for name in ("val", "test"):
        (source / f"annotations/instances_{name}.json").unlink()
    for name in ("coco", "yolo", "voc"):
        target = convert(source, tmp_path / name, name)
        with pytest.raises(DataError, match=r"every 5th image, by name, is for validation \(0 of 4 images\), too few"):
            read_dataset(DataConfig(str(target)), "train")
