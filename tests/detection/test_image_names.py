"""Images are found under the names that exports of other tools, systems and machines give them."""

import json
import os
import unicodedata

import pytest
from coco_scenes import write_json
from commands import dat

from dat.detection.config import DataConfig, TrainDataConfig, ValDataConfig
from dat.detection.data import read_coco, read_dataset
from dat.detection.data.image_names import find_files
from dat.engine.audit import Findings
from dat.utils.errors import DataError


def rename(scenes, change, split="train"):
    data = json.loads((scenes / f"{split}.json").read_text())
    for image in data["images"]:
        image["file_name"] = change(image["file_name"])
    write_json(scenes / f"{split}.json", data)


def find(folder, *names):
    problems = Findings()
    return find_files(folder, names, problems, folder / "x.json"), [p.examples[0] for p in problems.problems.values()]


@pytest.mark.parametrize(
    "form",
    [
        "{}",
        "./{}",
        "images/{}",
        "C:\\export\\images\\{}",
        "\\\\server\\share\\{}",
        "/home/somebody/images/{}",
        "../elsewhere/{}",
        "file:///C:/export/{}",
        "https://host.org/set/{}?size=full#top",
        "https://host.org/download?path=/set/{}",
        "/data/local-files/?d=set/{}",
        "/data/local-files/?d={}",
    ],
)
def test_a_name_of_another_place_is_found_by_its_last_part(scenes, form):
    expected = [record.path for record in read_coco(scenes / "train.json", scenes / "images").records]
    rename(scenes, form.format)
    found = read_coco(scenes / "train.json", scenes / "images").records
    assert [record.path for record in found] == expected
    assert found[0].file_name == form.format("train_0.jpg")


@pytest.mark.parametrize(
    ("file", "name"),
    [
        (unicodedata.normalize("NFC", "né.jpg"), unicodedata.normalize("NFD", "né.jpg")),
        (unicodedata.normalize("NFD", "né.jpg"), unicodedata.normalize("NFC", "né.jpg")),
        ("a.JPG", "a.jpg"),
        ("A.jpg", "images/a.JPG"),
        ("a b.jpg", "a%20b.jpg"),
        ("né.jpg", "http://host/n%C3%A9.jpg"),
        ("100%25.jpg", "x/100%25.jpg"),
        ("a#1.jpg", "x/a#1.jpg"),
        ("a.jpg", " a.jpg"),
    ],
)
def test_spellings_of_a_name(tmp_path, file, name):
    (tmp_path / file).touch()
    assert find(tmp_path, name) == ([tmp_path / file], [])


def test_folders_of_the_name_choose_between_files_of_one_name(tmp_path):
    for folder in ("train", "val/day", "val/night"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "a.jpg").touch()
    assert find(tmp_path, "D:\\set\\train\\a.jpg") == ([tmp_path / "train/a.jpg"], [])
    assert find(tmp_path, "/set/val/night/a.jpg")[0] == [tmp_path / "val/night/a.jpg"]
    for name in ("images/a.jpg", "../val/a.jpg"):
        _, (text,) = find(tmp_path, name)
        assert text.startswith(f"{tmp_path / 'x.json'}: the image {name} may be {tmp_path}/")
        assert "\n" not in text


def test_two_names_of_one_file_are_refused(tmp_path):
    (tmp_path / "a.jpg").touch()
    _, (text,) = find(tmp_path, "left/a.jpg", "right/a.jpg")
    assert text.endswith(f"the images left/a.jpg and right/a.jpg are one file, {tmp_path / 'a.jpg'}")


def test_a_folder_is_listed_only_for_names_that_need_it(tmp_path, monkeypatch):
    (tmp_path / "a.jpg").touch()
    monkeypatch.setattr(os, "walk", lambda *arguments: pytest.fail("listed the folder"))
    assert find(tmp_path, "a.jpg") == ([tmp_path / "a.jpg"], [])


@pytest.mark.parametrize("name", ["../secret.jpg", "{}/secret.jpg", "link/secret.jpg", "sub/../../secret.jpg"])
def test_names_do_not_lead_outside_the_folder(tmp_path, scenes, name):
    (tmp_path / "secret.jpg").write_bytes((scenes / "images/train_0.jpg").read_bytes())
    images = scenes / "images"
    (images / "sub").mkdir()
    (images / "link").symlink_to(tmp_path)
    name = name.format(tmp_path)
    paths, problems = find(images, name)
    assert (paths, problems) == ([images / "secret.jpg"], [])
    rename(scenes, lambda old: name if old == "train_0.jpg" else old)
    with pytest.raises(DataError, match=r"lists the image .*secret.jpg, which is absent from .*images: "):
        read_coco(scenes / "train.json", images)
    # A file of this name inside the folder is the one that is meant.
    (images / "sub/secret.jpg").touch()
    assert find(images, name) == ([images / "sub/secret.jpg"], [])


def test_an_image_file_may_be_a_link(tmp_path, scenes):
    (scenes / "images/train_0.jpg").rename(tmp_path / "kept.jpg")
    (scenes / "images/train_0.jpg").symlink_to(tmp_path / "kept.jpg")
    assert read_coco(scenes / "train.json", scenes / "images").records[0].path == scenes / "images/train_0.jpg"


@pytest.mark.parametrize(
    ("name", "folder"), [("{}", "elsewhere/deep"), ("deep/{}", "elsewhere"), ("C:\\x\\{}", "elsewhere/deep")]
)
def test_an_absent_image_is_one_line_with_the_override_that_finds_it(scenes, tmp_path, name, folder, capsys):
    rename(scenes, name.format)
    (scenes / "elsewhere").mkdir()
    (scenes / "images").rename(scenes / "elsewhere/deep")
    (scenes / "images").mkdir()
    train, first = TrainDataConfig(annotations="train.json", images="images"), name.format("train_0.jpg")
    with pytest.raises(DataError) as raised:
        read_dataset(DataConfig(str(scenes), train=train), "train")
    images = scenes / "images"
    text = f"lists the image {first}, which is absent from {images} (and 3 more of 4): there is no {images / first}; "
    assert str(raised.value) == f"{scenes / 'train.json'}: {text}data.train.images={folder} has it"
    found = DataConfig(str(scenes), train=TrainDataConfig(annotations="train.json", images=folder))
    assert len(read_dataset(found, "train").records) == 4
    with pytest.raises(DataError, match=r"data.val.images=elsewhere/deep has it"):
        read_dataset(DataConfig(str(scenes), val=ValDataConfig(annotations="val.json", images="nowhere")), "val")
    with pytest.raises(SystemExit):
        dat("detect", "audit", scenes, "--out", tmp_path / "out")
    assert f"data.train.images={folder} has it" in capsys.readouterr().out


def test_a_broken_link_is_named(scenes):
    (scenes / "images/train_3.jpg").unlink()
    (scenes / "images/train_3.jpg").symlink_to("gone.jpg")
    train = TrainDataConfig(annotations="train.json", images="images")
    with pytest.raises(DataError, match=r"images: .*images/train_3.jpg is a broken link to gone.jpg$"):
        read_dataset(DataConfig(str(scenes), train=train), "train")


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-le", "utf-32"])
def test_annotations_in_the_encodings_of_windows(scenes, encoding):
    expected = read_coco(scenes / "train.json", scenes / "images").to_coco()
    (scenes / "train.json").write_bytes((scenes / "train.json").read_text().encode(encoding))
    assert read_coco(scenes / "train.json", scenes / "images").to_coco() == expected
