"""Options of training that are off by default: a single class, rare classes, mixing of images, early stopping."""

import json

import numpy as np
import pytest
import torch
from commands import dat

from dat.detection import Detector
from dat.detection.config import DetectionConfig, check_config
from dat.detection.data import read_dataset
from dat.detection.train import train
from dat.detection.trainer import DetectionTrainer
from dat.engine.checkpoint import load_checkpoint
from dat.engine.config import load_config
from dat.engine.distributed import Distributed
from dat.utils.errors import ConfigError, DataError

ALL = (
    "data.single_class=true", "data.train.balance=0.9", "data.train.mosaic=0.5", "data.train.mixup=0.5",
    "data.train.copy_paste=0.5", "data.train.scale_jitter=[0.5, 1.5]", "data.train.close_mosaic=1",
    "train.class_weights=balanced", "train.early_stop=2",
)  # fmt: skip
QUICK = ("train.pictures=0", "train.worst=0")


def test_all_objects_may_be_of_one_class(config_file, scenes, tmp_path, capsys):
    dat("detect", "train", config_file, "data.single_class=true", "train.epochs=1", *QUICK)
    state = load_checkpoint(tmp_path / "run/best.pth")
    assert (state["class_names"], state["category_ids"]) == (["object"], [1])
    assert set(json.loads((tmp_path / "run/metrics.json").read_text())["per_class"]) == {"object"}
    detector = Detector.from_checkpoint(tmp_path / "run/best.pth", device="cpu")
    assert set(detector.evaluate()["per_class"]) == {"object"}
    assert set(detector.predict(scenes / "images/val_0.jpg", threshold=0).class_names) == {"object"}
    dat("detect", "report", tmp_path / "run")
    with pytest.raises(DataError, match="categories are 3 blue, 11 red; they should be those of training, 1 object"):
        detector.evaluate(data__single_class=False)
    capsys.readouterr()
    dat("detect", "audit", config_file, "data.single_class=true", "--out", tmp_path / "audit")
    assert "1 classes" in capsys.readouterr().out


def build(config_file, *overrides):
    config = load_config(DetectionConfig, config_file, overrides)
    check_config(config)
    sets = [read_dataset(config.data, name) for name in ("train", "val")]
    return DetectionTrainer(config, *sets, Distributed(0, 1, torch.device("cpu")))


def keep_blue_in_one_image(scenes):
    """Leaves objects of the class blue (3) in a single one of the four training images."""
    data = json.loads((scenes / "train.json").read_text())
    first = next(entry["image_id"] for entry in data["annotations"] if entry["category_id"] == 3)
    for entry in data["annotations"]:
        if entry["image_id"] != first:
            entry["category_id"] = 11
    (scenes / "train.json").write_text(json.dumps(data))
    return first, sum(entry["category_id"] == 3 for entry in data["annotations"])


def test_rare_classes_weigh_more_and_their_images_come_more_often(config_file, scenes):
    image, objects = keep_blue_in_one_image(scenes)
    trainer = build(config_file, "train.class_weights=balanced", "data.train.balance=1", "train.batch_size=1")
    weights = trainer.criterion.class_weights
    assert weights.tolist() == pytest.approx([8 / (2 * objects), 8 / (2 * (8 - objects))])
    # Blue is in a quarter of the images, red in the others: 2 + 3 / sqrt(0.75) = 5.5 images.
    assert trainer.steps_per_epoch == 6
    shown = [batch.images for batch in trainer.loader if batch.targets[0]["image_id"] == image]
    assert len(shown) in (2, 3)
    assert len({(images.shape, images.sum().item()) for images in shown}) == len(shown)
    assert build(config_file, "train.class_weights={red: 0.5}").criterion.class_weights.tolist() == [1, 0.5]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.class_weights={reed: 2}", r"train.class_weights has 'reed', its keys should be class names, as 'red'"),
        ("train.class_weights={red: .nan}", r"train.class_weights has nan for 'red', should be at least 0"),
        ("train.early_stop=-1", r"train.early_stop is -1, should be at least 0"),
        ("data.train.balance=2", r"data.train.balance is 2.0, should be 0 to 1"),
        ("data.train.mosaic=1.5", r"data.train.mosaic is 1.5, should be 0 to 1"),
        ("data.train.mixup=-1", r"data.train.mixup is -1.0, should be 0 to 1"),
        ("data.train.copy_paste=7", r"data.train.copy_paste is 7.0, should be 0 to 1"),
        ("data.train.close_mosaic=-1", r"data.train.close_mosaic is -1, should be at least 0"),
        ("data.train.scale_jitter=[2, 0.1]", r"data.train.scale_jitter is \[2.0, 0.1\], should be \[\] or \[smallest"),
        ("data.train.scale_jitter=[1]", r"data.train.scale_jitter is \[1.0\], should be \[\] or \[smallest"),
        ("data.train.scale_jitter=[0, 1]", r"data.train.scale_jitter is \[0.0, 1.0\], should be more than 0"),
        ("data.train.scale_jitter=[1, 50]", r"data.train.scale_jitter is \[1.0, 50.0\], .* at most 8"),
        ("data.val.whole_image=false", r"data.val.whole_image is false \(--tiles-only\), which needs data.val.tiles"),
    ],
)
def test_values_that_cannot_work_are_named(config_file, override, message):
    with pytest.raises(ConfigError, match=message):
        build(config_file, override)


def test_a_run_with_every_option_resumes_to_the_same_weights(config_file, tmp_path, monkeypatch):
    options = [*ALL, *QUICK, "train.epochs=3", "train.checkpoint_steps=1", "train.batch_size=1", "train.accumulate=1"]
    # The run stops between two lines of the log.
    options += ["train.log_steps=4", "train.resume=true"]
    train(load_config(DetectionConfig, config_file, [*options, f"output={tmp_path}/whole", "train.workers=1"]))
    step = DetectionTrainer.train_step

    for stop in (3, 7):

        def stopped(self, batches, stop=stop):
            if self.progress.step == stop:
                raise KeyboardInterrupt
            step(self, batches)

        monkeypatch.setattr(DetectionTrainer, "train_step", stopped)
        with pytest.raises(KeyboardInterrupt):
            train(load_config(DetectionConfig, config_file, options))
    monkeypatch.undo()
    train(load_config(DetectionConfig, config_file, options))
    whole, resumed = (load_checkpoint(tmp_path / name / "last.pth") for name in ("whole", "run"))
    assert whole["step"] == resumed["step"]
    for key in ("state_dict", "state_dict_ema"):
        assert all(torch.equal(value, resumed[key][name]) for name, value in whole[key].items())


def test_epochs_are_as_many_as_make_the_least_number_of_steps(config_file):
    """Two steps an epoch."""
    trainer = build(config_file, "train.epochs=2", "train.least_steps=5")
    assert (trainer.total_steps, trainer.epochs) == (5, 3)
    assert "5 in all (train.least_steps; 2 epochs would be fewer)" in trainer._describe_run()
    assert build(config_file, "train.epochs=3", "train.least_steps=5").total_steps == 6


@pytest.mark.parametrize("length", [["train.steps=5"], ["train.epochs=1", "train.least_steps=5"]])
def test_the_last_epochs_of_a_run_in_steps_are_without_mosaic(config_file, length):
    """Two steps an epoch: five steps are three epochs."""
    trainer = build(config_file, *length, "data.train.mosaic=1", "data.train.close_mosaic=1")
    plain = build(config_file, *length)
    for epoch, same in ((1, False), (2, True)):
        pairs = [(trainer.loader.dataset[epoch, i], plain.loader.dataset[epoch, i]) for i in range(4)]
        assert np.all([a.image.shape == b.image.shape and torch.equal(a.image, b.image) for a, b in pairs]) == same
