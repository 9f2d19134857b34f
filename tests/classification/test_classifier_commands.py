"""The commands as a person runs them: files, exit codes, one line for a mistake."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from commands import dat
from PIL import Image

from dat.classification.data import SkippedImages
from dat.engine.command import main_guard

ROOT = Path(__file__).parents[2]


def command(name, *arguments):
    main_guard(lambda: dat("classify", name, *arguments))


@pytest.fixture(scope="module")
def trained(module_config):
    command("train", module_config, "train.epochs=1")
    return module_config.parent / "run/best.pth"


def test_a_mistake_is_one_line_and_exit_code_1(settings, write_config, tmp_path):
    config = write_config(settings)
    arguments = [sys.executable, "-W", "ignore", "-m", "classification.train", str(config), "train.lrr=1"]
    result = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 1
    assert result.stdout == ""
    assert result.stderr == "error: command line: unknown key 'train.lrr'; did you mean 'train.lr'?\n"
    assert not (tmp_path / "run").exists()


def test_evaluate_repeats_the_metric_of_training(trained, capsys):
    line = json.loads((trained.parent / "log.jsonl").read_text().splitlines()[-1])
    capsys.readouterr()
    command("evaluate", trained)
    text = capsys.readouterr().out
    found = json.loads((trained.parent / "evaluation/metrics.json").read_text())
    for name in ("top1", "top5", "loss", "images"):
        assert found[name] == pytest.approx(line[name], abs=1e-3)
    assert f"top1 {found['top1']:.6g}" in text
    assert list(found["per_class"]) == ["blue", "green", "red"]
    assert found["images_per_second"] > 0
    assert (trained.parent / "evaluation/confusion.png").exists()


def test_predict_writes_labels_and_a_sheet(trained, pictures, tmp_path, capsys):
    (pictures / "val/red/broken.jpg").write_bytes(b"\xff\xd8")
    command("predict", trained, pictures / "val", "--out", tmp_path / "out")
    results = json.loads((tmp_path / "out/predictions.json").read_text())
    assert len(results) == 6
    assert all((pictures / "val" / result["file_name"]).exists() for result in results)
    assert [result["image_id"] for result in results] == list(range(1, 7))
    for result in results:
        assert result["label"] == result["top"][0]["label"]
        assert result["score"] == result["top"][0]["score"]
        assert {entry["label"] for entry in result["top"]} == {"blue", "green", "red"}
        assert sum(entry["score"] for entry in result["top"]) == pytest.approx(1, abs=1e-5)
    with Image.open(tmp_path / "out/predictions.png") as sheet:
        assert min(sheet.size) > 100
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("6 images, 1 left out: 1 that cannot be read: red/broken.jpg (")


def test_names_that_look_alike_lose_no_crop(trained, tmp_path):
    (tmp_path / "in/cam").mkdir(parents=True)
    for name in ("cam/1.png", "cam_1.png", "0.5.png", "0_5.png"):
        Image.new("RGB", (40, 40)).save(tmp_path / "in" / name)
    command("predict", trained, tmp_path / "in", "--out", tmp_path / "out", "--crops")
    assert len(list(tmp_path.rglob("crops/*/*.png"))) == 4


def test_predict_leaves_its_own_pictures_out(trained, pictures, capsys):
    for _ in range(2):
        command("predict", trained, pictures, "--out", pictures / "out")
        assert "30 images labelled" in capsys.readouterr().out


def test_predict_takes_one_picture_and_overrides(trained, pictures, tmp_path):
    picture = pictures / "val/red/0.png"
    command("predict", trained, picture, "data.img_size=48", "--out", tmp_path / "out", "--sheet", 0)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"predictions.json", "predictions.csv"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{trained}", "nowhere"], "error: nowhere: no such image or folder"),
        (["{trained}", "{empty}"], "holds no images"),
        (["nowhere.pth", "{pictures}"], "error: nowhere.pth: no such checkpoint file"),
        (["{pictures}/val/red/0.png", "{pictures}"], "0.png: not a checkpoint, or a truncated one"),
        (["{trained}", "{pictures}", "data.imgsize=3"], "unknown key 'data.imgsize'; did you mean 'data.img_size'?"),
        (["{trained}", "{pictures}", "model.backbone.name=test_vit"], "best.pth: of another architecture"),
    ],
)
def test_predict_names_mistakes(trained, pictures, tmp_path, capsys, arguments, message):
    (tmp_path / "empty").mkdir()
    known = {"trained": trained, "pictures": pictures, "empty": tmp_path / "empty"}
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        command("predict", *(a.format(**known) for a in arguments), "--out", tmp_path / "out")
    error = capsys.readouterr().err
    assert ended.value.code == 1
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["demo", "dat_nano_folder", "dat_tiny_imagenet", "dat_pp_base_imagenet_22k_to_1k"])
def test_shipped_configurations_are_valid(name):
    from dat.classification.config import ClassificationConfig, check_config
    from dat.classification.data import make_transform
    from dat.engine.config import load_config

    config = load_config(ClassificationConfig, ROOT / f"configs/classification/{name}.yaml")
    check_config(config)
    assert make_transform(config.data, training=True)


def test_hostile_names_of_files_are_written_and_shown_without_obeying_them(
    trained, pictures, tmp_path, capsys, monkeypatch
):
    for name in (b"caf\xe9.png", b"=cmd().png", b"new\nline.png", b"esc\x1b[31m.png"):
        Image.new("RGB", (32, 32)).save(pictures / "val/red" / os.fsdecode(name))
    (pictures / "val/red" / os.fsdecode(b"bad\xe9\x1b.png")).write_bytes(b"x")
    command("predict", trained, pictures / "val/red", "--out", tmp_path / "out")
    assert r"bad\udce9\x1b.png" in capsys.readouterr().out
    found = {result["file_name"] for result in json.loads((tmp_path / "out/predictions.json").read_text())}
    assert {"caf\udce9.png", "=cmd().png", "new\nline.png", "esc\x1b[31m.png"} < found
    table = (tmp_path / "out/predictions.csv").read_text(encoding="utf-8")
    assert all(text in table for text in (r"caf\udce9.png", "'=cmd().png", r"new\nline.png", r"esc\x1b[31m.png"))
    command("audit", pictures, "--out", tmp_path / "audit")
    skipped = SkippedImages(SimpleNamespace(left_out=["a\nb\udce9.png"]), tmp_path / "skipped.txt")
    skipped.write(SimpleNamespace(main=True))
    assert (tmp_path / "skipped.txt").read_text(encoding="utf-8") == r"a\nb\udce9.png" + "\n"
    # It is replaced as a whole: a write that fails leaves the list of before.
    monkeypatch.setattr(os, "replace", lambda *_: 1 / 0)
    skipped.names.add("c.png")
    with pytest.raises(ZeroDivisionError):
        skipped.write(SimpleNamespace(main=True))
    assert [path.name for path in tmp_path.glob("*skipped*")] == ["skipped.txt"]
    assert (tmp_path / "skipped.txt").read_text(encoding="utf-8") == r"a\nb\udce9.png" + "\n"
