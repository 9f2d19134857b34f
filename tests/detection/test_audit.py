"""The audit lists what is wrong with a data set, all of it at once."""

import json
import shutil

import numpy as np
import pytest
from coco_scenes import write_json
from commands import dat
from PIL import Image

from dat.detection.data import read_coco, read_sample
from dat.engine.command import main_guard
from dat.utils.images import to_image


def run(scenes, out, *arguments):
    """Exit code and audit.json."""
    with pytest.raises(SystemExit) as ended:
        main_guard(lambda: [dat("detect", "audit", scenes, "--out", out, *arguments), exit(0)])
    return ended.value.code, json.loads((out / "audit.json").read_text())


def kinds(summary):
    return {problem["kind"]: problem["count"] for problem in summary["problems"]}


def test_good_data_is_counted_and_drawn(scenes, tmp_path, capsys):
    Image.new("RGB", (5, 5)).save(scenes / "images/other.png")
    code, found = run(scenes, tmp_path / "out")
    assert code == 0
    train = found["train"]
    assert [train[key] for key in ("images", "objects", "crowds", "without_annotations")] == [4, 8, 0, 0]
    assert train["unlisted_files"] == 1
    assert train["sparse_ids"]
    assert [(c["label"], c["id"], c["name"]) for c in train["classes"]] == [(0, 3, "blue"), (1, 11, "red")]
    assert sum(c["objects"] for c in train["classes"]) == 8
    source = json.loads((scenes / "train.json").read_text())
    sides = [a["bbox"][2] for a in source["annotations"]]
    assert train["box_sides"]["smallest"] == min(sides)
    assert train["box_sides"]["small"] == 8
    assert kinds(train) == {}
    assert "training can start" in capsys.readouterr().out
    for name in ("samples_train.png", "samples_val.png", "boxes.png"):
        assert Image.open(tmp_path / "out" / name).width > 500


def test_everything_that_is_wrong_is_listed_at_once(scenes, tmp_path, capsys):
    images = scenes / "images"
    data = json.loads((scenes / "train.json").read_text())
    annotations = data["annotations"]
    good = annotations[4]
    annotations += [good, good, {**good, "category_id": 5}, {**good, "image_id": 9}, {**good, "bbox": [1, 2]}]
    annotations += [{**good, "bbox": bbox} for bbox in ([1, 1, 0, 5], [500, 1, 5, 5], [-9, 1, 20, 20])]
    annotations += [{**good, "iscrowd": 3}]
    data["images"] += [
        {**data["images"][0], "id": 200},
        {"id": 201, "file_name": "gone.jpg", "width": 5, "height": 5},
        {"id": 202, "file_name": "broken.jpg", "width": 5, "height": 5},
        {"id": 203, "file_name": "turned.jpg", "width": 5, "height": 6},
        {"id": 204, "file_name": "copy.jpg", "width": 80, "height": 60},
        {"id": 205, "file_name": "no size.jpg"},
        {"id": 206, "file_name": "no height.jpg", "width": 5},
        data["images"][1],
    ]
    data["categories"].append({"id": 20, "name": "green"})
    write_json(scenes / "train.json", data)
    (images / "broken.jpg").write_bytes(b"nothing")
    Image.new("RGB", (6, 7)).save(images / "turned.jpg")
    shutil.copy(images / "val_0.jpg", images / "copy.jpg")
    code, found = run(scenes, tmp_path / "out")
    assert code == 1
    assert kinds(found["train"]) == {
        "same annotation twice": 1,
        "malformed annotation": 4,
        "empty box, dropped": 1,
        "box outside its image, dropped": 1,
        "box reaches outside its image, clipped": 1,
        "file listed more than once": 1,
        "image listed again with other objects, each time without the others": 1,
        "image id used twice": 1,
        "malformed image entry": 1,
        "missing image file": 2,
        "unreadable image file": 1,
        "image of another size": 1,
        "class without objects": 1,
    }
    assert found["train"]["without_annotations"] == 6
    assert kinds(found["val"]) == {"image of training in validation": 1}
    text = capsys.readouterr().out
    assert "STOPS TRAINING: missing image file (2)" in text
    assert "gone.jpg" in text
    assert "val_0.jpg is copy.jpg of training" in text
    assert (tmp_path / "out/samples_train.png").exists()


def turn(path, orientation):
    """Stores the image under an EXIF orientation of 3 or 6, so that viewers show it as before."""
    exif = Image.Exif()
    exif[0x112] = orientation
    turns = {3: Image.Transpose.ROTATE_180, 6: Image.Transpose.ROTATE_90}
    with Image.open(path) as image:
        stored = image.transpose(turns[orientation])
    stored.save(path, exif=exif, quality=95)


def test_turned_dull_and_animated_images_are_counted(scenes, tmp_path, capsys):
    images = scenes / "images"
    turn(images / "train_0.jpg", 3)
    turn(images / "train_1.jpg", 6)
    exif = Image.Exif()
    exif[0x112] = 6
    # Only the stored size, 80 x 60, fits the annotations.
    Image.effect_noise((80, 60), 90).save(images / "train_2.jpg", exif=exif)
    Image.new("RGB", (56, 72), "white").save(images / "train_3.jpg")
    for name in (".ipynb_checkpoints/train_0.jpg", "@eaDir/train_0.jpg", "._train_0.jpg"):
        (images / name).parent.mkdir(exist_ok=True)
        (images / name).write_bytes((images / "train_0.jpg").read_bytes())
    code, found = run(scenes, tmp_path / "out")
    assert code == 0
    train = found["train"]
    assert (train["turned_by_exif"], train["unlisted_files"]) == (2, 0)
    assert "2 images are turned or mirrored as EXIF says" in capsys.readouterr().out
    assert {problem["kind"]: problem["examples"] for problem in train["problems"]} == {
        "EXIF orientation followed, though the annotations' size fits the stored image too": ["train_0.jpg"],
        "EXIF orientation ignored, since only the stored size fits the annotations": ["train_2.jpg"],
        "image with hardly any contrast": ["train_3.jpg"],
    }


@pytest.mark.parametrize("orientation", [3, 6])
def test_turned_images_are_trained_and_predicted_alike(scenes, orientation):
    path = scenes / "images/train_0.jpg"
    before = np.asarray(Image.open(path)).astype(int)
    turn(path, orientation)
    annotations = read_coco(scenes / "train.json", scenes / "images")
    record = next(record for record in annotations.records if record.path == path)
    trained = read_sample(record).image.permute(1, 2, 0).numpy()
    np.testing.assert_array_equal(trained, np.asarray(to_image(path)))
    assert np.abs(trained - before).mean() < 8


def test_files_that_are_no_annotations_do_not_end_the_audit(scenes, tmp_path):
    (scenes / "train.json").write_text("{")
    write_json(scenes / "val.json", {"images": [], "annotations": [], "categories": [{"id": 1}]})
    code, found = run(scenes, tmp_path / "out")
    assert code == 1
    assert kinds(found["train"]) == {"annotation file": 1}
    assert found["val"]["stops_training"]
    assert kinds(found["val"])["malformed image entry"] == 1


def test_names_and_configuration_can_be_given(scenes, tmp_path, config_file):
    (scenes / "train.json").rename(scenes / "a.json")
    arguments = ["data.train.annotations=a.json", "--config", str(config_file), "model.num_queries=1"]
    code, found = run(scenes, tmp_path / "out", *arguments)
    assert code == 0
    assert kinds(found["train"]) == {"more objects in an image than model.num_queries": 1}


def test_a_folder_that_is_missing_is_one_line(tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        main_guard(lambda: dat("detect", "audit", tmp_path / "nowhere"))
    assert ended.value.code == 1
    assert "nowhere: no such file, nor a configuration of this name" in capsys.readouterr().err


def test_a_file_in_the_place_of_the_results_ends_the_audit_before_it_starts(tmp_path, capsys):
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit) as ended:
        main_guard(lambda: dat("detect", "audit", tmp_path / "nowhere", "--out", tmp_path / "file"))
    assert ended.value.code == 1
    assert "file is a file or a broken link, should be a folder" in capsys.readouterr().err
