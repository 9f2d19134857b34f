"""Images of which nothing can be learnt stop a training before it begins."""

import shutil

import pytest
from commands import dat

from dat.classification import trainer
from dat.utils.errors import DataError


def break_images(folder):
    for path in folder.rglob("*.png"):
        path.write_bytes(b"nothing")


def remain(folder, name):
    for other in folder.iterdir():
        if other.name != name:
            shutil.rmtree(other)


@pytest.fixture
def no_model(monkeypatch):
    monkeypatch.setattr(trainer, "build_classifier", lambda *arguments: pytest.fail("built a model"))


def test_one_class_is_refused(pictures, settings, write_config, tmp_path, no_model, capsys):
    for split in ("train", "val"):
        remain(pictures / split, "red")
    with pytest.raises(
        DataError, match=r"data.train: all 8 images are of one class, red; there should be at least two"
    ):
        dat("classify", "train", write_config(settings))
    assert not (tmp_path / "run").exists()
    with pytest.raises(SystemExit):
        dat("classify", "audit", pictures, "--out", tmp_path / "out")
    text = capsys.readouterr().out
    assert "STOPS TRAINING: only one class (1)" in text
    assert "training would stop" in text


@pytest.mark.parametrize(("split", "count"), [("train", 24), ("val", 6)])
def test_images_none_of_which_can_be_read_are_refused(
    pictures, settings, write_config, tmp_path, no_model, split, count
):
    break_images(pictures / split)
    text = rf"data.{split}: no image can be read, there are {count}, such as blue/0.png: cannot be read as an image: "
    with pytest.raises(DataError, match=text) as raised:
        dat("classify", "train", write_config(settings))
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "run").exists()


def test_folders_without_images_are_said(pictures, settings, write_config, tmp_path, capsys):
    settings["train"]["epochs"] = 1
    for split in ("train", "val"):
        for name in ("empty", ".hidden", "red/nested"):
            (pictures / split / name).mkdir(parents=True)
        shutil.copy(pictures / split / "red/0.png", pictures / split / "red/nested/more.png")
    dat("classify", "train", write_config(settings))
    log = (tmp_path / "run/train.log").read_text()
    assert "data.train has 1 folders without images, no classes, such as 'empty'" in log
    assert log.count("has 1 images in folders of class folders; their class is the first folder, such as red of ") == 1
    dat("classify", "audit", pictures, "--out", tmp_path / "out")
    text = capsys.readouterr().out
    assert text.count("warning: folder without images, no class (1)\n      empty") == 2
    deep = "warning: image in a folder of a class folder, its class is the first folder (1)\n      red/nested/more.png"
    assert text.count(deep) == 2
