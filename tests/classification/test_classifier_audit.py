"""The audit finds what is wrong with images before they are trained on."""

import importlib.util
import json
import shutil

import pytest
import yaml
from commands import dat
from odd_images import write_odd_images
from PIL import Image


def run(capsys, *arguments, code=0):
    if code:
        with pytest.raises(SystemExit) as ended:
            dat("classify", "audit", *arguments)
        assert ended.value.code == code
    else:
        dat("classify", "audit", *arguments)
    return capsys.readouterr().out


def problems(folder, split):
    return {p["kind"]: p for p in json.loads((folder / "audit.json").read_text())[split]["problems"]}


def test_problems_are_counted_and_named(pictures, tmp_path, capsys):
    (pictures / "train/red/0.png").write_bytes(b"")
    shutil.copy(pictures / "train/red/1.png", pictures / "train/red/again.png")
    shutil.copy(pictures / "train/red/2.png", pictures / "train/blue/other.png")
    shutil.copy(pictures / "train/green/3.png", pictures / "val/green/known.png")
    shutil.rmtree(pictures / "val/blue")
    text = run(capsys, pictures, "--out", tmp_path / "out")
    found = problems(tmp_path / "out", "train")
    assert found["image that cannot be read, left out"]["examples"] == [
        "red/0.png: cannot be read as an image: it has no known format of images"
    ]
    assert found["same image twice"]["examples"] == ["red/1.png, red/again.png"]
    assert found["same image in several classes"]["examples"] == ["blue/other.png, red/2.png"]
    assert found["class of fewer than 10 images"]["count"] == 3
    found = problems(tmp_path / "out", "val")
    assert found["image of training"]["examples"] == ["green/known.png is green/3.png of training"]
    assert found["class without images"]["examples"] == ["blue"]
    summary = json.loads((tmp_path / "out/audit.json").read_text())["train"]
    assert summary["images"] == 26
    assert summary["readable"] == 25
    assert summary["classes"] == [{"name": n, "images": p} for n, p in (("blue", 9), ("green", 8), ("red", 8))]
    assert summary["sides"] == {"smallest": 20, "median": 20.0, "largest": 24, "below_img_size": 25}
    assert "green            8         3" in text
    assert "warning: same image twice (1)" in text
    for name in ("train", "val"):
        with Image.open(tmp_path / f"out/samples_{name}.png") as sheet:
            assert min(sheet.size) > 100


def test_class_folders_are_audited_as_training_shares_them_out(tmp_path, capsys):
    unreadable = write_odd_images(tmp_path / "odd", plain=10, odd=40)
    text = run(capsys, tmp_path / "odd", "--out", tmp_path / "out")
    kinds = [f"{kind}, left out" for kind in ("image that cannot be read", "file that is no image")]
    found = [problems(tmp_path / "out", split) for split in ("train", "val")]
    assert sum(split[kind]["count"] for split in found for kind in kinds if kind in split) == len(unreadable)
    assert "odd has no splits train and val: of each class every 5th image, by name, is for validation (9 of 4" in text
    assert "training can start" in text


def test_odd_images_are_counted(pictures, tmp_path, capsys):
    exif = Image.Exif()
    exif[0x112] = 3
    noise = Image.effect_noise((20, 24), 80).convert("RGB")
    noise.save(pictures / "train/red/turned.jpg", exif=exif)
    noise.save(pictures / "train/red/frames.gif", save_all=True, append_images=[Image.new("RGB", (20, 24))])
    Image.new("RGB", (20, 24), "white").save(pictures / "train/red/white.png")
    (pictures / "train/red/photo.HEIC").write_bytes(b"\0\0\0\x18ftypheic" + bytes(200))
    Image.new("RGB", (1, 1)).save(pictures / "train/red/dot.png")
    text = run(capsys, pictures, "--out", tmp_path / "out")
    assert "1 images are turned or mirrored as EXIF says" in text
    found = {kind: problem["examples"] for kind, problem in problems(tmp_path / "out", "train").items()}
    assert found["image with several frames or pages, the first is read"] == ["red/frames.gif"]
    assert found["image with hardly any contrast"] == ["red/white.png"]
    assert found["image that cannot be read, left out"][0].startswith("red/dot.png: 1x1 pixels are too small; ")
    if importlib.util.find_spec("pillow_heif") is None:
        assert found["HEIC (pip install pillow-heif), left out"] == ["red/photo.HEIC"]


def test_what_stops_training_gives_exit_code_1(pictures, tmp_path, capsys):
    (pictures / "val/red").rename(pictures / "val/crimson")
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump({"data": {"root": str(pictures)}}))
    text = run(capsys, config, "--out", tmp_path / "out", code=1)
    assert "STOPS TRAINING: cannot be opened (1)" in text
    assert "crimson" in problems(tmp_path / "out", "val")["cannot be opened"]["examples"][0]
    for number in range(8):
        (pictures / f"train/red/{number}.png").write_bytes(b"")
    text = run(capsys, config, "--out", tmp_path / "out", code=1)
    assert "STOPS TRAINING: class without an image that can be read (1)" in text
    for path in (pictures / "train").rglob("*.png"):
        path.write_bytes(b"")
    text = run(capsys, config, "--out", tmp_path / "out", code=1)
    assert "STOPS TRAINING: no image can be read (1)" in text
