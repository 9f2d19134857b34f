"""What files of each format may look like, and what is said of those that are malformed."""

import json
import re
import shutil
import sys
from dataclasses import replace

import numpy as np
import pytest
from formats import coco, cvat, jsonl, labelme, make_scenes, voc, yolo
from PIL import Image

from dat.detection.config import DataConfig, TrainDataConfig, ValDataConfig
from dat.detection.data import describe_sets, read_dataset
from dat.detection.data.audit_split import audit_split
from dat.detection.data.convert import convert_data
from dat.utils.errors import ConfigError, DataError


@pytest.fixture
def scenes(tmp_path):
    return make_scenes(tmp_path / "source", 5)


@pytest.fixture
def write(tmp_path, scenes):
    """Writes text files below a root, and copies all images into its folders."""

    def put(files, *folders):
        root = tmp_path / "root"
        for name, text in files.items():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_text(text, encoding="utf-8")
        for folder in folders:
            (root / folder).mkdir(parents=True, exist_ok=True)
            for scene in scenes:
                shutil.copy(tmp_path / "source" / scene["name"], root / folder)
        return root

    return put


def read(root, name="train", **given):
    train = TrainDataConfig(**{key[6:]: value for key, value in given.items() if key.startswith("train_")})
    val = ValDataConfig(**{key[4:]: value for key, value in given.items() if key.startswith("val_")})
    return read_dataset(DataConfig(str(root), train, val), name)


def boxes(found):
    return {record.path.name: record.boxes.tolist() for record in found.records}


def labels(scenes, folder):
    return {f"{folder}/{scene['name'][:-4]}.txt": yolo(scene) for scene in scenes}


def true_boxes(scenes):
    return {scene["name"]: [[x, y, x + w, y + h] for _, (x, y, w, h) in scene["objects"]] for scene in scenes}


SPLITS, NUMBERS = ("train", "val"), range(1, 6)
YAML = "train: images/train\nval: images/val\nnames:\n  0: blue\n  1: red\n"


@pytest.mark.parametrize(
    ("text", "files"),
    [
        (YAML, {}),
        ("path: C:\\data\\mine\ntrain: ../images/train/\nval: /home/me/data/images/val\nnames: [blue, red]\n", {}),
        ("train: [images/train]\nval: images/val\nnames: {0: blue, 1: red}\nnc: 2\n", {}),
        ("Train: images/train\nValidation: images/val\nnames: {0: blue, 1: red}\npath: .\n", {}),
        (
            "train: train.txt\nval: val.txt\nnames: [blue, red]\n",
            {f"{split}.txt": "".join(f"./images/{split}/scene_{i}.jpg\n" for i in NUMBERS) for split in SPLITS},
        ),
        (
            "train: data/train.txt\nval: images/val\nnames: [blue, red]\n",
            {"train.txt": "".join(f"D:\\x\\images\\train\\scene_{i}.jpg\n" for i in NUMBERS)},
        ),
    ],
)  # fmt: skip
def test_yaml_of_yolo(write, scenes, text, files):
    places = labels(scenes, "labels/train") | labels(scenes, "labels/val")
    root = write({"data.yaml": text, **places, **files}, "images/train", "images/val")
    for name in SPLITS:
        found = read(root, name)
        assert boxes(found) == true_boxes(scenes)
        assert [category.name for category in found.categories] == ["blue", "red"]


@pytest.mark.parametrize("form", ["list", "absolute list", "path", "folder"])
def test_names_of_yolo_lead_outside_only_where_that_is_allowed(write, scenes, tmp_path, form):
    other = tmp_path / "other"
    shutil.copytree(write(labels(scenes, "labels/train"), "images/train"), other)
    texts = {
        "list": YAML.replace("images/train", "train.txt", 1),
        "absolute list": YAML.replace("images/train", "train.txt", 1),
        "path": f"path: {other}\n{YAML}",
        "folder": YAML.replace("images/train", str(other / "images/train"), 1),
    }
    start = other if form == "absolute list" else "../other"
    lines = "".join(f"{start}/images/train/{scene['name']}\n" for scene in scenes)
    root = write({"data.yaml": texts[form], "train.txt": lines, **labels(scenes, "labels/val")}, "images/val")
    # A name that leads nowhere is looked for below the folder instead.
    shutil.rmtree(root / "images/train")
    data = DataConfig(str(root))
    with pytest.raises(DataError, match=r"scene_1.jpg, outside of .*; data.outside=true allows that"):
        read_dataset(data, "train")
    problems = audit_split(data, "train")
    assert problems.problems["image outside of the data folder"].count == len(scenes)
    assert not problems.annotations.records
    assert boxes(read_dataset(replace(data, outside=True), "train")) == true_boxes(scenes)
    with pytest.raises(DataError, match=r"scene_1.jpg, outside of"):
        convert_data(root, tmp_path / "converted", "coco")
    # A link is the decision of who made the folder.
    (root / "linked").symlink_to(other)
    (root / "data.yaml").write_text(YAML.replace("images/train", "linked/images/train", 1))
    assert boxes(read_dataset(data, "train")) == true_boxes(scenes)


def test_class_names_of_darknet_are_read_only_in_its_folder(write, tmp_path):
    (tmp_path / "secret.txt").write_text("secret\n")
    root = write({"obj.data": "train = train.txt\nnames = ../secret.txt\n", "train.txt": ""})
    with pytest.raises(DataError, match=r"secret\.txt"):
        read(root)


def test_the_audit_names_images_of_a_list_that_are_not_there(write, scenes):
    names = "".join(f"obj_train_data/{name}.jpg\n" for name in ("scene_1", "gone"))
    files = {"obj.data": "train = train.txt\nnames = obj.names\n", "obj.names": "blue\nred\n", "train.txt": names}
    root = write({**files, **labels(scenes, "obj_train_data")}, "obj_train_data")
    found = audit_split(DataConfig(str(root)), "train")
    assert "gone.jpg: no such image" in found.problems["missing image file"].examples[0]
    (root / "train.txt").write_text(names + "x" * 3000 + ".jpg\n")
    assert audit_split(DataConfig(str(root)), "train").problems["missing image file"].count == 2


def test_class_names_of_yaml_are_text(write, scenes):
    root = write({"data.yaml": YAML.replace("blue", "no").replace("red", "1e3"), **labels(scenes, "labels/train")},
                 "images/train", "images/val")  # fmt: skip
    assert [category.name for category in read(root).categories] == ["no", "1e3"]


def test_classes_without_names_are_numbers(write, scenes):
    root = write({"data.yaml": "train: images/train\nval: images/val\nnc: 3\n", **labels(scenes, "labels/train")},
                 "images/train", "images/val")  # fmt: skip
    assert [category.name for category in read(root).categories] == ["0", "1", "2"]


def test_a_number_of_classes_that_python_does_not_read_is_none(write, scenes):
    text = f"train: images/train\nval: images/val\nnc: {'9' * 5000}\n"
    root = write({"data.yaml": text, **labels(scenes, "labels/train")}, "images/train", "images/val")
    with pytest.raises(DataError, match=r"root holds data.yaml, images/, labels/; it should hold data of a known"):
        read(root)


def form_lines(form, count, seed=0):
    """Lines of objects of random sizes, of `form(x, y, width, height)` in parts of the image, the corner given."""
    rng = np.random.default_rng(seed)
    sizes = rng.uniform(0.1, 0.4, (count, 2))
    boxes = np.concatenate([rng.uniform(0, 1 - sizes), sizes], axis=1).tolist()
    return "".join(f"0 {' '.join(f'{value:.6f}' for value in form(*box))}\n" for box in boxes)


def test_corners_in_the_place_of_yolos_boxes_stop(write, scenes):
    lines = form_lines(lambda x, y, w, h: (x, y, x + w, y + h), 20)
    root = write({"data.yaml": YAML, "labels/train/scene_1.txt": lines}, "images/train", "images/val")
    message = (
        r"data.yaml: \d+ of 20 boxes reach outside their images: they look like x0, y0, x1, y1; YOLO's are centre x,"
    )
    with pytest.raises(DataError, match=message):
        read(root)


@pytest.mark.parametrize(
    ("form", "question"), [(lambda *box: box, True), (lambda x, y, w, h: (x / 4, y + h / 2, w, h), False)]
)
def test_the_upper_left_in_the_place_of_yolos_centre_is_asked_about(write, scenes, form, question):
    """Not where boxes reach outside at one edge, as those of objects that come in do."""
    root = write({"data.yaml": YAML, "labels/train/scene_1.txt": form_lines(form, 20)}, "images/train", "images/val")
    warning = read(root).warning
    assert ("are they x, y of the upper left, width, height? YOLO's are centre x" in warning) == question
    assert "reach outside" in warning


def test_boxes_of_yolo_that_reach_outside_give_a_warning(write, scenes):
    lines = form_lines(lambda x, y, w, h: (x + 3 * w / 4, y + h / 2, w, h), 20) + "0 0.95 0.5 0.3 0.3\n" * 6
    root = write({"data.yaml": YAML, "labels/train/scene_1.txt": lines}, "images/train", "images/val")
    assert "of 26 boxes reach outside their images by a tenth or more: YOLO's are centre x" in read(root).warning


def test_images_that_share_a_label_file_give_a_warning(write, scenes):
    root = write({"data.yaml": YAML, **labels(scenes, "labels/train")}, "images/train", "images/val")
    Image.new("RGB", (80, 60)).save(root / "images/train/scene_2.png")
    text = r"scene_2.jpg and scene_2.png have one label file, .*labels/train/scene_2.txt, and so the same objects"
    assert re.search(text, read(root).warning)


def test_two_yaml_files_are_one_if_they_agree(write, scenes):
    other = YAML.replace("0: blue\n  1: red", "0: red\n  1: blue")
    same = YAML.replace("names:", "path: elsewhere\nnc: 2\nnames:")
    options = "train: true\nnc: 2\nlr0: 0.1\n"
    files = {"a.yaml": YAML, "b.yaml": same, "._c.yaml": other, "hyp.yaml": options}
    root = write({**files, **labels(scenes, "labels/train")}, "images/train", "images/val")
    assert [category.name for category in read(root).categories] == ["blue", "red"]
    (root / "b.yaml").write_text(other)
    message = (
        r"a.yaml and b.yaml both describe data, but not .*; data.train.annotations and data.val.annotations should"
    )
    with pytest.raises(DataError, match=message):
        read(root)
    assert [category.name for category in read(root, train_annotations="b.yaml").categories] == ["red", "blue"]


def test_lists_of_classes_may_go_on_but_not_differ(write, scenes):
    files = {
        "classes.txt": "blue\nred\n\n",
        "labels/train/classes.txt": "blue\n",
        "labels/val/classes.txt": "blue\nred\na\n",
    }
    root = write({**files, **labels(scenes, "labels/train")}, "images/train", "images/val")
    assert [category.name for category in read(root).categories] == ["blue", "red", "a"]
    (root / "labels/val/classes.txt").write_text("red\nblue\n")
    with pytest.raises(
        DataError, match=r"val/classes.txt: class 0 is 'red', but 'blue' in another list of .*root; lists of"
    ):
        read(root)


def test_hidden_files_beside_labels_are_passed_over(write, scenes):
    root = write(labels(scenes, "labels/train"), "images/train", "images/val")
    (root / "labels/train/._scene_1.txt").write_bytes(b"\0\5\x16\7\xb0")
    assert boxes(read(root)) == true_boxes(scenes)


@pytest.mark.parametrize("yaml", [True, False])
@pytest.mark.parametrize("labels_folder", ["Labels", "labels"])
def test_folders_of_yolo_with_capitals(write, scenes, yaml, labels_folder):
    files = {"data.yaml": YAML.replace("images", "Images")} if yaml else {}
    root = write({**files, **labels(scenes, f"{labels_folder}/train")}, "Images/train", "Images/val")
    assert boxes(read(root)) == true_boxes(scenes)


def test_polygons_become_boxes(write, scenes):
    width, height = scenes[0]["size"]
    text = f"0 {10 / width} {20 / height} {30 / width} {15 / height} {25 / width} {40 / height}\n\n"
    root = write({"data.yaml": YAML, "labels/train/scene_1.txt": text}, "images/train", "images/val")
    found = read(root)
    np.testing.assert_allclose(found.records[0].boxes, [[10, 15, 30, 40]], rtol=1e-6)
    # Images without a file show no objects.
    assert [len(record.boxes) for record in found.records] == [1, 0, 0, 0, 0]


def test_images_without_a_label_file_are_counted(write, scenes):
    files = labels(scenes, "labels/train")
    del files["labels/train/scene_2.txt"], files["labels/train/scene_4.txt"]
    found = read(write({"data.yaml": YAML, **files}, "images/train", "images/val"))
    assert found.warning.endswith("image without a label file, has no object (2)")


@pytest.mark.parametrize("split", ["val", "valid", "validation"])
@pytest.mark.parametrize("yaml", [True, False])
def test_names_of_validation(write, scenes, split, yaml):
    files = labels(scenes, "labels/train") | labels(scenes, f"labels/{split}")
    if yaml:
        files["data.yaml"] = YAML.replace("val: images/val", f"{split}: images/{split}")
    root = write(files, "images/train", f"images/{split}")
    assert describe_sets(read(root), read(root, "val")) == (
        f"{root}: YOLO, images/train/ 5 images, images/{split}/ 5 images, 2 classes"
    )


@pytest.mark.parametrize(
    ("files", "folder"),
    [
        ({"mine.yaml": YAML.replace("images/", ""), "other.yaml": "a: 1\n"}, "{}"),
        ({"train/classes.txt": "blue\nred\n"}, "{}"),
        ({"labels/train/classes.txt": "blue\nred\n"}, "labels/{}"),
    ],
)
def test_where_names_of_classes_are_found(write, scenes, files, folder):
    images = "images/{}" if "labels" in folder else "{}"
    files = files | labels(scenes, folder.format("train")) | labels(scenes, folder.format("val"))
    root = write(files, images.format("train"), images.format("val"))
    assert [category.name for category in read(root).categories] == ["blue", "red"]
    assert boxes(read(root)) == boxes(read(root, "val")) == true_boxes(scenes)


def test_folders_of_roboflow_are_below_its_yaml_whatever_lies_beside(write, scenes):
    names = "names: [blue, red]\n"
    text = f"train: ../train/images\nval: ../valid/images\n{names}"
    files = {"mine/data.yaml": text, **labels(scenes, "mine/train/labels"), **labels(scenes, "mine/valid/labels")}
    root = write(files, "mine/train/images", "mine/valid/images", "train/images", "valid/images")
    assert boxes(read(root / "mine")) == true_boxes(scenes)


def test_yolo_without_yaml(write, scenes):
    root = write(labels(scenes, "labels/train") | labels(scenes, "labels/val"), "images/train", "images/val")
    train, val = read(root), read(root, "val")
    assert boxes(train) == boxes(val) == true_boxes(scenes)
    assert describe_sets(train, val) == f"{root}: YOLO, images/train/ 5 images, images/val/ 5 images, 2 classes"
    assert [category.name for category in train.categories] == ["0", "1"]


def test_turned_images_have_the_size_that_tools_show(write, tmp_path):
    exif = Image.Exif()
    # 6: to be turned by 90 degrees.
    exif[0x0112] = 6
    root = write({"data.yaml": YAML, "labels/train/turned.txt": "0 0.5 0.5 0.5 0.5\n"}, "images/train", "images/val")
    Image.new("RGB", (40, 20)).save(root / "images/train/turned.jpg", exif=exif)
    record = read(root).records[-1]
    assert (record.width, record.height, record.boxes.tolist()) == (20, 40, [[5, 10, 15, 30]])


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            "0 0.5 0.5 0.2",
            r"scene_1.txt:2: '0 0.5 0.5 0.2' has 4 numbers, should be class x y width height, or",
        ),
        ("0 0.5 0.5 0.2 0.2 0.9", r"scene_1.txt:2: .* has 6 numbers, should be class x y width height.* x y \.\.\.$"),
        ("0 0.5 0.5 0.2 0.2 0.5 0.5 2", r"has 8 numbers, .*; for keypoints data.yaml should have kpt_shape$"),
        ("0 0.5 0.5 0.2 0.2 0.5 0.5 2 0.4 0.4 2", r"has coordinates outside 0 to 1, .*; for keypoints data.yaml"),
        ("red 0.5 0.5 0.2 0.2", r"scene_1.txt:2: 'red 0.5 0.5 0.2 0.2', should be numbers: class x y width height"),
        ("2 0.5 0.5 0.2 0.2", r"scene_1.txt:2: .* has class 2, should be 0 to 1, as there are 2 classes"),
        ("0.5 0.5 0.5 0.2 0.2", r"scene_1.txt:2: .* has class 0.5, should be 0 to 1"),
        ("0 40 30 10 10", r"scene_1.txt:2: .* has coordinates outside 0 to 1, should be parts of the image's width"),
        ("0 nan 0.5 0.2 0.2", r"scene_1.txt:2: .* has coordinates outside 0 to 1"),
    ],
)
def test_malformed_lines_of_yolo(write, scenes, line, message):
    files = {"data.yaml": YAML, "labels/train/scene_1.txt": f"0 0.5 0.5 0.2 0.2\n{line}\n"}
    with pytest.raises(DataError, match=message):
        read(write(files, "images/train", "images/val"))


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"data.yaml": "names: [a\n"}, r"data.yaml: not valid YAML"),
        (
            {"data.yaml": YAML.replace("0: blue", "5: blue")},
            r"data.yaml: names is .*, should be class names",
        ),
        ({"data.yaml": YAML.replace("red", "blue")}, r"data.yaml: class 'blue' is listed more than once"),
        ({"data.yaml": YAML.replace("red", "")}, r"data.yaml: names is .*, should be class names"),
        ({"data.yaml": f"{YAML}nc: 3\n"}, r"data.yaml: nc is 3, but names has 2$"),
        ({"data.yaml": f"{YAML}nc: 1\n"}, r"data.yaml: nc is 1, but names has 2$"),
        (
            {"obj.data": "classes = 5\ntrain = images/train\nnames = obj.names\n", "obj.names": "blue\nred\n"},
            r"obj.data: classes is 5, but obj.names has 2$",
        ),
        ({"classes.txt": "blue\n\nred\n"}, r"classes.txt:2: is blank, should be a class name"),
        ({"data.yaml": YAML.replace("images/train", "gone")}, r"gone: no such folder or list of images"),
        ({"data.yaml": YAML}, r"labels/train/scene_1.txt: no such file, nor labels of any other image"),
    ],
)
def test_malformed_files_of_yolo(write, files, message):
    with pytest.raises(DataError, match=message):
        read(write(files, "images/train", "images/val"))


def annotations(scenes, folder="Annotations"):
    return {f"{folder}/{scene['name'][:-4]}.xml": voc(scene) for scene in scenes}


def test_voc_counts_pixels_from_1(write):
    entry = (
        "<object><name>cat</name><difficult>1</difficult>"
        "<part><name>head</name><bndbox><xmin>1</xmin><ymin>1</ymin><xmax>2</xmax><ymax>2</ymax></bndbox></part>"
        "<bndbox><xmin>1</xmin><ymin>1</ymin><xmax>80</xmax><ymax>60</ymax></bndbox></object>"
    )
    entries = entry + entry.replace("<difficult>1", "<difficult>0")
    text = f"<annotation><size><width>80</width><height>60</height></size>{entries}</annotation>"
    root = write({"Annotations/scene_1.xml": text}, "JPEGImages")
    (record,) = read(root, train_annotations=".", val_annotations=".").records
    assert (record.boxes.tolist(), record.crowd.tolist()) == ([[0, 0, 80, 60]] * 2, [True, False])
    # One box at 0 says that the tool counted all edges from 0.
    for name, xmin in (("scene_1", "1"), ("scene_3", "0.0")):
        (root / f"Annotations/{name}.xml").write_text(text.replace("<xmin>1</xmin>", f"<xmin>{xmin}</xmin>"))
    found = read(root, train_annotations=".", val_annotations=".")
    assert [record.boxes.tolist() for record in found.records] == [[[1, 1, 80, 60]] * 2, [[0, 1, 80, 60]] * 2]


@pytest.mark.parametrize(
    ("form", "message"),
    [
        (lambda x, y, w, h: (x / 80, y / 60, (x + w) / 80, (y + h) / 60), r"look like parts of the image's size"),
        # as some tools do: the width and height in the place of the lower right corner
        (lambda x, y, w, h: (x + 40, y + 40, w, h), r"objects are left out: .* empty \(VOC's are xmin, ymin, xmax"),
    ],
)
def test_boxes_of_voc_in_another_form_stop(write, scenes, form, message):
    changed = [
        {**scene, "objects": [(name, corners_to_box(form(*box))) for name, box in scene["objects"]]} for scene in scenes
    ]
    with pytest.raises(DataError, match=message):
        read(write(annotations(changed), "JPEGImages"))


def corners_to_box(corners):
    x0, y0, x1, y1 = corners
    return x0, y0, x1 - x0, y1 - y0


def test_of_images_with_one_stem_voc_takes_the_one_that_is_named(write, scenes):
    root = write(annotations(scenes), "JPEGImages")
    Image.new("RGB", (8, 8)).save(root / "JPEGImages/scene_1.png")
    assert boxes(read(root))["scene_1.jpg"] == true_boxes(scenes)["scene_1.jpg"]


@pytest.mark.parametrize(
    ("files", "folders", "names"),
    [
        ({"ImageSets/Main/trainval.txt": "scene_1\nscene_2\nscene_3\n", "ImageSets/Main/val.txt": "scene_3\n"},
         ("JPEGImages",),
         ("ImageSets/Main/trainval.txt without val.txt 2 images", "ImageSets/Main/val.txt 1 images")),
        ({"ImageSets/Main/trainval.txt": "scene_1\nscene_2\n", "ImageSets/Main/test.txt": "scene_3\n"}, ("JPEGImages",),
         ("ImageSets/Main/trainval.txt 2 images", "ImageSets/Main/test.txt 1 images")),
        ({"ImageSets/Main/train.txt": "scene_1  1\nscene_4 -1\n", "ImageSets/Main/val.txt": "scene_2\n"}, ("images",),
         ("ImageSets/Main/train.txt 2 images", "ImageSets/Main/val.txt 1 images")),
        ({"ImageSets/Main/Train.txt": "scene_1\nscene_2\n", "ImageSets/Main/Validation.txt": "scene_3\n"},
         ("JPEGImages",), ("ImageSets/Main/Train.txt 2 images", "ImageSets/Main/Validation.txt 1 images")),
    ],
)  # fmt: skip
def test_lists_of_voc(write, scenes, files, folders, names):
    root = write(annotations(scenes) | files, *folders)
    assert describe_sets(read(root), read(root, "val")) == f"{root}: Pascal VOC, {', '.join(names)}, 2 classes"
    found = read(root, "val", val_annotations=list(files)[-1])
    assert boxes(found) == {name: true_boxes(scenes)[name] for name in boxes(found)}


def test_voc_beside_its_images(write, scenes):
    root = write(annotations(scenes, "."), ".")
    found = [read(root, name) for name in ("train", "val")]
    rule = "5 images, no validation split: every 5th image, by name, is for validation (1 of 5 images)"
    assert describe_sets(*found) == f"{root}: Pascal VOC, ./ {rule}, 2 classes"
    assert boxes(found[0]) | boxes(found[1]) == true_boxes(scenes)


def test_classes_of_voc_are_in_the_order_of_a_list(write, scenes):
    root = write(annotations(scenes) | {"labelmap.txt": "# label:color:parts:actions\nbackground:0,0,0::\nred:1,2,3::\n"
                                        "blue:4,5,6::\ngreen:7,8,9::\n"}, "JPEGImages")  # fmt: skip
    assert [category.name for category in read(root).categories] == ["red", "blue", "green"]
    (root / "labelmap.txt").unlink()
    assert [category.name for category in read(root).categories] == ["blue", "red"]
    (root / "labels.txt").write_text("red\n")
    with pytest.raises(DataError, match=r"\.xml:\d+: the object's name is 'blue', should be a class: red"):
        read(root)


def test_images_of_voc_without_a_size_are_opened(write, scenes):
    files = {name: text.replace("<width>80</width>", "<width>0</width>") for name, text in annotations(scenes).items()}
    found = read(write(files, "JPEGImages"))
    assert [(record.width, record.height) for record in found.records] == [scene["size"] for scene in scenes[:4]]


BOMB = '<!DOCTYPE x [<!ENTITY a "aaaaaaaaaa"><!ENTITY b "&a;&a;&a;&a;">]>\n'


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text.replace("</name>", ""), r"scene_1.xml:\d+: is not XML: mismatched tag"),
        (lambda text: BOMB + text, r"scene_1.xml:1: has a DOCTYPE, should have none"),
        (lambda text: '<!DOCTYPE x SYSTEM "file:///etc/passwd">\n' + text, r"scene_1.xml:1: has a DOCTYPE"),
        (
            lambda text: text.replace("<xmin>", "<xmin>x"),
            r"scene_1.xml:4: bndbox is \['x.*\], should be numbers xmin",
        ),
        (lambda text: text.replace("bndbox", "robndbox"), r"scene_1.xml:4: bndbox is \['', '', '', ''\], should be"),
        (lambda text: text.encode("utf-16").decode("latin-1"), r"scene_1.xml:1: is not XML"),
    ],
)
def test_malformed_files_of_voc(write, scenes, change, message):
    files = annotations(scenes)
    files["Annotations/scene_1.xml"] = change(files["Annotations/scene_1.xml"])
    with pytest.raises(DataError, match=message) as raised:
        read(write(files, "JPEGImages"))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: f"<!DOCTYPE annotation>{text}", r"scene_1.xml:1: has a DOCTYPE, should have none"),
        (lambda text: text.replace("</name>", ""), r"scene_1.xml:\d+: is not XML: mismatched tag"),
    ],
)
def test_what_is_wrong_in_every_file_of_voc_is_named(write, scenes, change, message):
    files = {name: change(text) for name, text in annotations(scenes).items()}
    with pytest.raises(DataError, match=message):
        read(write(files, "JPEGImages"))


def test_files_that_macos_leaves_are_passed_over(write, scenes):
    hidden = {f"Annotations/._{scene['name'][:-4]}.xml": "\0\5\26\7" for scene in scenes}
    hidden["__MACOSX/Annotations/._scene_1.xml"] = "\0\5\26\7"
    root = write(annotations(scenes) | hidden, "JPEGImages")
    (root / "JPEGImages/._scene_1.jpg").write_bytes(b"\0\5\26\7")
    found = [read(root, name) for name in SPLITS]
    assert boxes(found[0]) | boxes(found[1]) == true_boxes(scenes)
    shutil.rmtree(root)
    files = {"train/labels.json": coco(scenes), "valid/labels.json": coco(scenes), "train/._labels.json": "\0\5\26\7"}
    assert boxes(read(write(files, "train", "valid"))) == true_boxes(scenes)


def test_lists_of_voc_may_lie_beside_its_folders(write, scenes):
    lists = {"train.txt": "scene_1\nscene_2\n", "val.txt": "scene_3\n"}
    root = write(annotations(scenes) | lists, "JPEGImages")
    found = describe_sets(read(root), read(root, "val"))
    assert found == f"{root}: Pascal VOC, train.txt 2 images, val.txt 1 images, 2 classes"
    given = {"train_annotations": "train.txt", "val_annotations": "val.txt"}
    assert describe_sets(read(root, **given), read(root, "val", **given)) == found
    # Other tools write lists of paths there.
    for name, text in lists.items():
        (root / name).write_text(text.replace("scene", "JPEGImages/scene"))
    assert len(read(root).records) == 4


def test_shapes_of_labelme(write, scenes):
    """Those of a group are one object, masks have boxes, circles a centre and a point; others are counted."""
    shapes = [
        {"label": "red", "points": [[30, 20], [33, 24]], "shape_type": "circle"},
        {"label": "blue", "points": [[1, 2], [9, 2], [5, 7]], "group_id": 3},
        {"label": "blue", "points": [[20, 30], [25, 40]], "group_id": 3, "shape_type": "mask", "mask": "iVBOR"},
        {"label": "red", "points": [[5, 6]], "shape_type": "point"},
        {"label": "_background_", "points": [[0, 0], [9, 9]], "shape_type": "rectangle"},
        {"label": "red", "points": [[40.0, 50.0], [10, 12]], "shape_type": "rectangle", "difficult": True},
    ]
    first = {**json.loads(labelme(scenes[0])), "shapes": shapes, "imageHeight": None}
    files = {f"{scene['name'][:-4]}.json": labelme(scene) for scene in scenes[1:]}
    root = write({"scene_1.json": json.dumps(first), **files, "labels.txt": "__ignore__\nred\nblue\ngreen\n"}, "")
    found = read(root, train_annotations=".", val_annotations=".")
    assert [category.name for category in found.categories] == ["red", "blue", "green"]
    record = next(record for record in found.records if record.path.name == "scene_1.jpg")
    assert record.boxes.tolist() == [[25, 15, 35, 25], [1, 2, 25, 40], [10, 12, 40, 50]]
    assert record.labels.tolist() == [0, 1, 0]
    assert record.crowd.tolist() == [False, False, True]
    assert "shape that is no box or polygon, left out (1)" in found.warning


def test_folders_of_labelme_are_splits_with_the_classes_of_all(write, scenes):
    files = {
        f"{'valid' if i == 4 else 'train'}/{scene['name'][:-4]}.json": labelme(scene) for i, scene in enumerate(scenes)
    }
    files["valid/scene_5.json"] = files["valid/scene_5.json"].replace('"red"', '"green"').replace('"blue"', '"green"')
    root = write(files, "train", "valid")
    train, val = read(root), read(root, "val")
    assert (
        [category.name for category in train.categories] == ["blue", "green", "red"] == [c.name for c in val.categories]
    )
    assert (len(train.records), len(val.records)) == (4, 1)


@pytest.mark.parametrize(
    ("folder", "images"),
    [
        ("{}/labels", "{}/images"),
        ("{}/images", "{}/images"),
        ("labels/{}", "images/{}"),
        ("Annotations/{}", "Images/{}"),
        ("{}/red", "{}/red"),
    ],
)
def test_layouts_of_labelme(write, scenes, folder, images):
    files = {f"{folder}/{scene['name'][:-4]}.json": labelme(scene) for scene in scenes}
    files = {name.format(split): text for name, text in files.items() for split in ("train", "val")}
    root = write({**files, "labels.txt": "blue\nred\n"}, images.format("train"), images.format("val"))
    assert boxes(read(root)) == boxes(read(root, "val")) == true_boxes(scenes)
    assert read(root).format == f"{root}: LabelMe"


@pytest.mark.parametrize("kind", ["YOLO", "Pascal VOC", "COCO"])
def test_data_that_holds_labelmes_files_too_is_of_the_other_format(write, scenes, kind):
    stems = [scene["name"][:-4] for scene in scenes]
    beside = {f"{stem}.json": labelme(scene) for stem, scene in zip(stems, scenes, strict=True)}
    others = {
        "YOLO": {"classes.txt": "blue\nred\n", **{f"{s}.txt": yolo(x) for s, x in zip(stems, scenes, strict=True)}},
        "Pascal VOC": {f"{stem}.xml": voc(scene) for stem, scene in zip(stems, scenes, strict=True)},
        "COCO": {"annotations.json": coco(scenes)},
    }
    root = write({**beside, **others[kind]}, "")
    found = read(root, train_annotations=".", val_annotations=".")
    assert found.format == f"{root}: {kind}"
    assert boxes(found) == true_boxes(scenes)


@pytest.mark.parametrize("name", ["..\\images\\scene_1.jpg", "renamed.jpg", ""])
def test_images_of_labelme_are_named_as_the_files_or_by_them(write, scenes, name):
    files = {f"labels/{scene['name'][:-4]}.json": labelme(scene) for scene in scenes}
    files["labels/scene_1.json"] = json.dumps({**json.loads(labelme(scenes[0])), "imagePath": name})
    found = read(write(files, "images"), train_annotations=".", val_annotations=".")
    assert boxes(found) == true_boxes(scenes)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shapes": {}}, r"scene_1.json: shapes is \{\}, should be a list"),
        ({"shapes": [{"points": [[1, 2], [3, 4]]}]}, r"scene_1.json: the label of shape 0 is None, should be the name"),
        ({"shapes": [{"label": "x" * 10**6}]}, r"scene_1.json: the label of shape 0 is 'x.{,300}, should be the name"),
        ({"shapes": [{"label": "red", "points": [1, 2]}]}, r"shape 0: points are \[1, 2\], should be a list of two or"),
        ({"shapes": [{"label": "red", "points": [["a", 2], [3, 4]]}]}, r"shape 0: points are .*, should be a list of"),
        (
            {"shapes": [{"label": "red", "points": [[0.1, 0.2], [0.3, 0.4]]}] * 9},
            r"LabelMe's are points x, y in pixels",
        ),
    ],
)
def test_malformed_files_of_labelme(write, scenes, change, message):
    files = {f"{scene['name'][:-4]}.json": labelme(scene) for scene in scenes}
    files["scene_1.json"] = json.dumps({**json.loads(labelme(scenes[0])), **change})
    if "pixels" in message:
        files = {name: files["scene_1.json"].replace("scene_1.jpg", f"{name[:-5]}.jpg") for name in files}
    with pytest.raises(DataError, match=message):
        read(write(files, ""), train_annotations=".", val_annotations=".")


def test_shapes_of_cvat(write, scenes):
    text = cvat(scenes).replace(
        '<image id="0"',
        '<image id="9" name="scene_1.jpg" width="80" height="60">\n'
        '<box label="blue" xtl="20" ytl="20" xbr="40" ybr="30" rotation="90"/>'
        '<polygon label="red" points="1,2;30,4;20,50.5"/><points label="red" points="1,2"/>'
        '<tag label="red"/></image>\n<image id="0"',
        1,
    )  # fmt: skip
    text = text.replace("</labels>", "<label><name>nose</name><parent>red</parent></label></labels>")
    root = write({"annotations.xml": text}, "images")
    found = read(root, train_annotations="annotations.xml", val_annotations=".")
    assert [category.name for category in found.categories] == ["blue", "red"]
    added = next(record for record in found.records if len(record.boxes) == 2 and record.labels.tolist() == [0, 1]
                 and record.boxes[1].tolist() == [1, 2, 30, 50.5])  # fmt: skip
    np.testing.assert_allclose(added.boxes[0], [25, 15, 35, 35], atol=1e-5)
    assert "shape that is no box or polygon, left out (1)" in found.warning


def test_subsets_of_cvat_are_splits(write, scenes):
    text = cvat(scenes)
    for number in range(5):
        subset = "Validation" if number == 2 else "Train"
        text = text.replace(f'<image id="{number}"', f'<image id="{number}" subset="{subset}"')
    root = write({"annotations.xml": text}, "images")
    found = describe_sets(read(root), read(root, "val"))
    assert (
        found
        == f"{root}: CVAT XML, annotations.xml subset train 4 images, annotations.xml subset val 1 images, 2 classes"
    )


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('xtl="', 'xtl="x', r"annotations.xml:5: box is \['x.*\], should be numbers xtl, ytl, xbr, ybr"),
        ("<name>red</name>", "<name> </name>", r"annotations.xml: class 1 has the name '', should have one"),
        ('label="', 'label="x', r"annotations.xml:5: label is 'x.*', should be one of blue, red"),
        ('width="80"', 'width="0"', r"annotations.xml:4: image has name 'scene_1.jpg', width '0', height '60', should"),
    ],
)
def test_malformed_files_of_cvat(write, scenes, old, new, message):
    with pytest.raises(DataError, match=message):
        read(write({"annotations.xml": cvat(scenes).replace(old, new)}, "images"))


@pytest.mark.parametrize(
    ("form", "message"),
    [
        (
            lambda x, y, w, h: (x / 80, y / 80, w / 80, h / 80),
            "look like parts of the image's size; CVAT XML's are xtl",
        ),
        (
            lambda x, y, w, h: (x * 4 + 300, y * 4, w * 4, h * 4),
            "most of them by more than half: they look like boxes of",
        ),
    ],
)
def test_boxes_of_cvat_in_another_form_stop(write, scenes, form, message):
    changed = [{**scene, "objects": [(k, form(*box)) for k, box in scene["objects"]]} for scene in scenes]
    with pytest.raises(DataError, match=f"annotations.xml: .*{message}"):
        read(write({"annotations.xml": cvat(changed)}, "images"), val_annotations=".")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", r"metadata.jsonl:6: '{.*' is not JSON"),
        ('{"file": "x.jpg"}', r"metadata.jsonl:6: .* should be an object with file_name and objects"),
        (
            '{"file_name": "a.jpg", "objects": {"bbox": [[1, 2, 3]], "categories": [0]}}',
            r"jsonl:6: bbox is \[1, 2, 3\], sh",
        ),
        (
            '{"file_name": "a.jpg", "objects": {"bbox": [[1, 2, 3, 4]]}}',
            r"jsonl:6: objects is .*, should be lists",
        ),
        (
            '{"file_name": "a.jpg", "objects": {"bbox": [[1, 2, 3, 4]], "category": [1.5]}}',
            r"6: category is 1.5, sho",
        ),
        ('{"image": "a.jpg", "objects": []}', r"jsonl:6: .* should be an object with file_name and objects"),
        ("[" * 100_000, r"jsonl:6: .* is not JSON: is nested too deep"),
        (
            '{"file_name": "a.jpg", "objects": {"bbox": [[1, 2, 3, true]], "category": [0]}}',
            r"jsonl:6: bbox is \[1, 2, 3, True\], should be",
        ),
        (
            '{"file_name": "a.jpg", "objects": {"bbox": [[1, 2, 3, 4]], "category": [0], "area": 5}}',
            r"jsonl:6: area is 5, should be a list",
        ),
        (
            '{"file_name": "a.jpg", "objects": {"bbox": [[1, 2, 3, 4]], "category": [0], "area": ["x"]}}',
            r"jsonl:6: iscrowd is None, area 'x', should be",
        ),
        (
            '{"file_name": "a.jpg", "objects": {"bbox": [[1, 2, 3, 4]], "category": [10000000000]}}',
            r"has class 10000000000 without a name, should be below",
        ),
    ],
)
def test_malformed_lines_of_the_hub(write, scenes, line, message):
    root = write({"train/metadata.jsonl": f"{jsonl(scenes)}{line}\n"}, "train")
    Image.new("RGB", (9, 9)).save(root / "train/a.jpg")
    with pytest.raises(DataError, match=message):
        read(root)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda row: {"image": row["file_name"], "objects": row["objects"]}, r"jsonl:1: .* should be an object with"),
        (
            lambda row: row | {"objects": {"bbox": row["objects"]["bbox"], "class": row["objects"]["categories"]}},
            r"jsonl:1: objects is .*, should be lists of equal lengths bbox and categories",
        ),
    ],
)
def test_what_is_wrong_in_every_row_of_the_hub_is_named(write, scenes, change, message):
    rows = "".join(f"{json.dumps(change(json.loads(line)))}\n" for line in jsonl(scenes).splitlines())
    root = write({f"{split}/metadata.jsonl": rows for split in SPLITS}, *SPLITS)
    with pytest.raises(DataError, match=message):
        read(root)


@pytest.mark.parametrize("form", ["C:\\export\\{}", "/home/me/{}", "../{}", "./{}"])
def test_names_of_the_hub_are_searched_as_those_of_coco(write, scenes, tmp_path, form):
    moved = [{**scene, "name": form.format(scene["name"]).upper()} for scene in scenes]
    (tmp_path / "root").mkdir()
    shutil.copy(tmp_path / "source/scene_1.jpg", tmp_path / "root")
    root = write({f"{split}/metadata.jsonl": jsonl(moved) for split in SPLITS}, *SPLITS)
    found = read(root)
    assert boxes(found) == true_boxes(scenes)
    assert {record.path.parent for record in found.records} == {root / "train"}


def test_the_first_row_of_the_hub_may_lack_objects_and_classes_be_whole_floats(write, scenes):
    rows = [json.loads(line) for line in jsonl(scenes).splitlines()]
    del rows[0]["objects"]
    for row in rows[1:]:
        row["objects"]["categories"] = [float(label) for label in row["objects"]["categories"]]
    root = write(
        {f"{split}/metadata.jsonl": "".join(f"{json.dumps(row)}\n" for row in rows) for split in SPLITS}, *SPLITS
    )
    found = read(root)
    assert boxes(found) == true_boxes(scenes) | {"scene_1.jpg": []}
    assert [category.name for category in found.categories] == ["0", "1"]
    assert {label for record in found.records for label in record.labels.tolist()} == {0, 1}


def test_objects_of_the_hub_may_be_named_and_listed(write, scenes):
    names = ("blue", "red")
    rows = [
        {"file_name": scene["name"], "objects": [{"bbox": box, "category": names[k]} for k, box in scene["objects"]]}
        for scene in scenes
    ]
    rows[1].pop("objects")
    root = write({"metadata.jsonl": "".join(f"{json.dumps(row)}\n" for row in rows)}, ".")
    found = read(root, train_annotations="metadata.jsonl", val_annotations="metadata.jsonl")
    assert boxes(found) == true_boxes(scenes) | {"scene_2.jpg": []}
    assert [category.name for category in found.categories] == ["blue", "red"]


@pytest.mark.parametrize(
    ("form", "message"),
    [
        (lambda w, h, box: (box[0], box[1], box[0] + box[2], box[1] + box[3]), "look like x0, y0, x1, y1"),
        (lambda w, h, box: (box[0] / w, box[1] / h, box[2] / w, box[3] / h), "look like parts of the image's size"),
    ],
)
def test_boxes_of_the_hub_in_another_form_stop(write, scenes, form, message):
    changed = [
        {**scene, "objects": [(label, form(*scene["size"], box)) for label, box in scene["objects"]]}
        for scene in scenes
    ]
    with pytest.raises(DataError, match=message):
        read(write({"train/metadata.jsonl": jsonl(changed)}, "train"), val_annotations="none")


def test_parquet_of_the_hub(write, scenes, tmp_path, monkeypatch):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    monkeypatch.setattr("huggingface_hub.constants.HF_ASSETS_CACHE", str(tmp_path / "cache"))
    rows = [
        {
            "image": {"bytes": (tmp_path / "source" / scene["name"]).read_bytes(), "path": scene["name"]},
            "objects": {"bbox": [list(map(float, box)) for _, box in scene["objects"]],
                        "category": [label for label, _ in scene["objects"]]},
        }
        for scene in scenes
    ]  # fmt: skip
    label = {"_type": "ClassLabel", "names": ["azure", "rose"]}
    features = {"features": {"image": {"_type": "Image"}, "objects": {"feature": {"category": label}}}}
    table = pyarrow.Table.from_pylist(rows).replace_schema_metadata({"huggingface": json.dumps({"info": features})})
    root = write({})
    (root / "data").mkdir(parents=True)
    parquet.write_table(table.slice(0, 3), root / "data/train-00000-of-00002.parquet")
    parquet.write_table(table.slice(3, 1), root / "data/train-00001-of-00002.parquet")
    parquet.write_table(table.slice(4, 1), root / "data/validation-00000-of-00001.parquet")
    for _ in range(2):
        train, val = read(root), read(root, "val")
        assert [record.boxes.tolist() for record in (*train.records, *val.records)] == list(true_boxes(scenes).values())
        assert [category.name for category in train.categories] == ["azure", "rose"]
    copied = [record.path.read_bytes() for record in train.records]
    assert copied == [row["image"]["bytes"] for row in rows[:4]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda row: {"image": row["image"], **row["objects"]},
            r"columns image, bbox, category, should have image and",
        ),
        (lambda row: row | {"image": {"bytes": "aGVsbG8="}}, r"row 0: image.bytes is 'aGVsbG8=', should be those of a"),
        (lambda row: row | {"image": {"path": 5}}, r"row 0: image.path is 5, should be text"),
        (lambda row: row | {"image": {"path": ["a.jpg"]}}, r"row 0: image.path is \['a.jpg'\], should be text"),
        (lambda row: row | {"image": {"path": b"a.jpg"}}, r"row 0: image.path is b'a.jpg', should be text"),
        (lambda row: row | {"image": "a.jpg"}, r"row 0: image is 'a.jpg', should have bytes or a path"),
        (lambda row: row | {"objects": {"bbox": row["objects"]["bbox"]}}, r"row 0: objects is .*, should be lists of"),
    ],
)
def test_malformed_rows_of_parquet(write, scenes, tmp_path, monkeypatch, change, message):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    monkeypatch.setattr("huggingface_hub.constants.HF_ASSETS_CACHE", str(tmp_path / "cache"))
    row = {"image": {"path": "scene_1.jpg"}, "objects": {"bbox": [[1.0, 2.0, 20.0, 20.0]], "category": [0]}}
    root = write({}, "data")
    for split, rows in (("train", [change(row)]), ("validation", [row])):
        parquet.write_table(pyarrow.Table.from_pylist(rows), root / f"data/{split}-00000-of-00001.parquet")
    with pytest.raises(DataError, match=message) as raised:
        read(root)
    assert "\n" not in str(raised.value)
    # Images may lie beside the file.
    assert [record.path.name for record in read(root, "val").records] == ["scene_1.jpg"]


def test_parquet_without_pyarrow_is_one_line(write, monkeypatch):
    root = write({"data/train-0.parquet": "PAR1"})
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(
        ConfigError, match=r"train-0.parquet: reading .parquet files needs pyarrow: pip install pyarrow$"
    ):
        read(root)


def test_splits_may_be_of_different_exports(write, scenes):
    files = {"a/annotations.xml": cvat(scenes), "b/result.json": coco(scenes, "images/")}
    root = write(files, "a/images", "b/images")
    given = {"train_annotations": "a", "val_annotations": "b"}
    train, val = read(root, **given), read(root, "val", **given)
    assert boxes(train) == boxes(val) == true_boxes(scenes)
    assert describe_sets(train, val) == (
        f"{root}: CVAT XML, annotations.xml 5 images; {root}: Label Studio COCO, result.json 5 images, 2 classes"
    )
