"""Sizes of images are raised where objects are small."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from commands import dat

from dat.detection.config import DetectionConfig, check_config
from dat.detection.data import Annotations, Category
from dat.detection.data.records import ImageRecord
from dat.detection.sizes import settle_sizes
from dat.engine.checkpoint import load_checkpoint
from dat.engine.config import load_config

CPU, GPU = torch.device("cpu"), torch.device("cuda")


def annotations(side, height=960, width=1280, images=10):
    """Images with one object of `side` pixels each, and one image with a tiny one."""
    records = []
    for i in range(images):
        x, y = 100.0, 50.0
        boxes = np.array([[x, y, x + (2.0 if i == 0 else side), y + 3 * side]], np.float32)
        nothing = np.zeros(1, np.int64), np.zeros(1, bool), np.ones(1, np.float32)
        records.append(ImageRecord(i, Path(f"{i}.jpg"), width, height, boxes, *nothing))
    return Annotations(Path("a.json"), (Category(0, "object"),), tuple(records))


def crowds(side):
    found = annotations(side)
    return replace(found, records=tuple(replace(record, crowd=np.ones(1, bool)) for record in found.records))


def settled(found, device=GPU, *overrides):
    config, why = settle_sizes(load_config(DetectionConfig, "finetune", overrides), found, device)
    return config.data, why


def test_all_sizes_grow_by_one_factor():
    # 12 pixels of the file are 3.2 at a shortest edge of 256: a factor of 2.5.
    data, why = settled(annotations(12, images=20))
    before = load_config(DetectionConfig, "finetune").data
    assert (data.val.size, data.val.max_size) == (640, 960)
    assert data.train.sizes == [480, 512, 544, 576, 640, 672, 704]
    assert (data.train.max_size, data.train.crop_min, data.train.crop_max) == (960, 448, 800)
    assert data.train.crop_resize == [640, 800, 928]
    assert data.train.max_pixels == round(2.5**2 * before.train.max_pixels)
    assert "sizes are 2.5 times the configuration's, data.val.size=640: at 256 a tenth of the objects has" in why
    assert "below 3.2 pixels, should be data.least_side=8" in why
    assert "windows" not in why


@pytest.mark.parametrize(
    ("found", "device", "size"),
    [
        (annotations(12, images=20), CPU, 512),
        # no larger than the files
        (annotations(4, 400, 600, images=20), GPU, 384),
        # long images, which max_size shows at an eighth of their size
        (annotations(40, 300, 3000, images=20), GPU, 448),
        # no side above 1333 pixels
        (annotations(4, 4000, 4000, images=20), GPU, 832),
    ],
    ids=["cpu", "files", "long files", "longest"],
)
def test_limits_are_named_with_what_is_left(found, device, size):
    data, why = settled(found, device)
    assert data.val.size == size
    assert ("; still below " in why) == (size != 448)


def test_sides_are_never_rounded_down_or_up_to_what_cannot_be():
    before = load_config(DetectionConfig, "finetune").data
    for overrides in (["data.pad_multiple=512"], ["data.pad_multiple=256"], ["data.pad_multiple=7"]):
        data, why = settled(annotations(12, images=20), GPU, *overrides)
        assert all(new >= old for new, old in zip(data.train.sizes, before.train.sizes, strict=True))
        assert data.train.max_size <= 1333
        assert data.val.size <= data.val.max_size
        assert bool(why) == (data.val.size != 256)
        check_config(replace(load_config(DetectionConfig, "finetune"), data=data))


@pytest.mark.parametrize(
    ("found", "overrides"),
    [
        # one object of twenty is small
        (annotations(40, images=20), []),
        # larger images would show no more
        (annotations(4, 250, 250), []),
        (annotations(12), ["data.val.size=256"]),
        (annotations(12), ["data.train.max_pixels=100000"]),
        (crowds(5), []),
        (annotations(12), ["data.least_side=0"]),
        (replace(annotations(12), records=()), []),
        # a backbone for images of one size
        (annotations(12), ["model.backbone={name: hiera_tiny_224, img_size: 384}"]),
    ],
    ids=["large enough", "small files", "size given", "pixels given", "crowds", "off", "empty", "one size"],
)
def test_sizes_stay(found, overrides):
    data, why = settled(found, GPU, *overrides)
    assert why == ""
    assert data == replace(load_config(DetectionConfig, "finetune", overrides).data, least_side=0)


def test_a_resumed_run_keeps_its_sizes(config_file, tmp_path):
    values = yaml.safe_load(config_file.read_text())
    values["data"]["val"]["size"], values["data"]["train"]["sizes"] = 32, [32, 48]
    config_file.write_text(yaml.safe_dump(values))
    dat("detect", "train", config_file, "data.least_side=100", "train.epochs=1")
    log = (tmp_path / "run/train.log").read_text()
    assert "sizes are 1.75 times the configuration's, data.val.size=56: at 32 a tenth of the objects has a side" in log
    dat("detect", "train", config_file, "data.least_side=100", "train.epochs=2", "train.resume=true")
    config = load_checkpoint(tmp_path / "run/last.pth")["config"]["data"]
    assert (config["val"]["size"], config["train"]["sizes"], config["least_side"]) == (56, [56, 84], 0)
