"""What a training leaves behind, and how it stops on bad input."""

import json
import shutil
import tarfile
import unicodedata
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
import yaml
from PIL import Image
from torch import nn
from torchvision.transforms.v2.functional import pil_to_tensor

from dat.classification import Classifier
from dat.classification import draw as drawing
from dat.classification.config import ClassificationConfig, DataConfig, SplitConfig, check_config
from dat.classification.data import (
    EvalImages,
    MixPairs,
    TrainImages,
    UserTransform,
    check_readable_classes,
    make_transform,
)
from dat.classification.readers import open_place, open_split, shared_images
from dat.classification.train import train
from dat.classification.trainer import ClassificationTrainer, Graphed, make_loss
from dat.engine.checkpoint import load_checkpoint
from dat.engine.command import main_guard
from dat.engine.config import from_dict
from dat.engine.distributed import Distributed
from dat.engine.loaders import EpochBatchSampler, Loader
from dat.engine.seeds import isolated_rng
from dat.engine.trainer import Trainer
from dat.utils.errors import ConfigError, DataError, NonFiniteError


def run(settings, **changes):
    settings = {**settings, "train": {**settings["train"], **changes}}
    return train(from_dict(ClassificationConfig, settings, "test"))


def test_it_learns_and_leaves_everything_in_output(settings, tmp_path):
    settings["data"]["augment"] = {"scale": [0.7, 1.0], "color_jitter": 0.0, "auto_augment": None, "re_prob": 0.0}
    settings["model"]["backbone"] = {"name": "test_convnext"}
    result = run(settings, epochs=12, mixup=0, cutmix=0, ema_decay=0, smoothing=0)
    assert result["top1"] > 90
    output = tmp_path / "run"
    names = {path.name for path in output.iterdir()}
    assert names - {"worst.png"} == {
        "best.pth", "last.pth", "previous.pth", "config.yaml", "log.jsonl", "tensorboard", "train.log",
        "predictions.png", "results.npz", "metrics.json", "confusion.png", "curve.png", "report.html",
    }  # fmt: skip
    metrics = json.loads((output / "metrics.json").read_text())
    assert metrics == result
    assert metrics["epochs"] == 12
    assert "most often taken for" in (output / "train.log").read_text()
    lines = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if line["kind"] == "train"]
    assert len(losses) == 48
    assert losses[-1] < 0.5 * losses[0]
    assert max(line["top1"] for line in lines if line["kind"] == "val") == result["top1"]
    assert yaml.safe_load((output / "config.yaml").read_text())["train"]["epochs"] == 12
    assert load_checkpoint(output / "best.pth")["class_names"] == ["blue", "green", "red"]


def test_timm_reads_the_checkpoint(settings, tmp_path):
    run(settings, epochs=1)
    path = tmp_path / "run/best.pth"
    model = timm.create_model("test_convnext", num_classes=3, checkpoint_path=str(path))
    averaged = load_checkpoint(path)["state_dict"]
    assert all(torch.equal(value, averaged[name]) for name, value in model.state_dict().items())


def test_fine_tuning_starts_from_the_weights_of_a_checkpoint(settings, tmp_path, monkeypatch):
    run(settings, epochs=1)
    first = str(tmp_path / "run/best.pth")
    settings["output"] = str(tmp_path / "second")
    settings["model"]["backbone"]["checkpoint_path"] = first
    seen = []
    monkeypatch.setattr(Trainer, "run", lambda self: seen.append(self.model.state_dict()))
    run(settings)
    assert torch.equal(seen[0]["stem.0.weight"], load_checkpoint(first)["state_dict"]["stem.0.weight"])


def test_fine_tuning_takes_another_number_of_classes(settings, pictures, tmp_path):
    run(settings, epochs=1)
    first = str(tmp_path / "run/best.pth")
    for split in ("train", "val"):
        shutil.rmtree(pictures / split / "red")
    settings["output"] = str(tmp_path / "second")
    settings["model"]["backbone"]["checkpoint_path"] = first
    run(settings, epochs=1)
    second = load_checkpoint(tmp_path / "second/last.pth")
    assert second["class_names"] == ["blue", "green"]
    Path(first).unlink()
    assert run(settings, epochs=2, resume=True)["epochs"] == 2


def test_a_sheet_shows_the_best_on_validation_pictures(settings, pictures, tmp_path, monkeypatch):
    (pictures / "val/red/1.png").write_text("not a picture")
    titles = []
    draw = drawing.draw_grid

    def draw_grid(drawn, path):
        titles.extend(title for _, title in drawn)
        draw(drawn, path)

    monkeypatch.setattr(drawing, "draw_grid", draw_grid)
    # worst=0: no other sheet is drawn
    run(settings, epochs=1, pictures=4, worst=0)
    # Images 0, 1, 2 and 4 of the 5 that can be read, in order of classes.
    for title, truth in zip(titles, ("blue", "blue", "green", "red"), strict=True):
        assert title.startswith(truth) or title.endswith(f"(is {truth})")
    with Image.open(tmp_path / "run/predictions.png") as image:
        assert min(image.size) > 100


def test_a_loss_that_is_not_finite_is_traced_without_the_other_processes(settings, monkeypatch):
    calls = []

    class Wrapped(nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module = module

        def forward(self, images):
            calls.append(None)
            return self.module(images)

    def wrap(self, model):
        nn.init.constant_(model.stem[0].weight, 3e38)
        return Wrapped(model)

    monkeypatch.setattr(Distributed, "wrap", wrap)
    with pytest.raises(
        NonFiniteError, match=r"step 1, images \[.*\.png'\]: first non-finite tensor is output of stem.0 "
    ):
        run(settings)
    assert len(calls) == 1


def test_tars_are_read_like_folders(settings, pictures, tmp_path):
    for split in ("train", "val"):
        with tarfile.open(pictures / f"{split}.tar", "w") as tar:
            for path in sorted((pictures / split).rglob("*.png")):
                tar.add(path, path.relative_to(pictures / split))
    run(settings, epochs=1)
    settings["output"] = str(tmp_path / "tar")
    settings["data"].update(train={"path": "train.tar"}, val={"path": "val.tar"})
    run(settings, epochs=1, workers=1)
    folder, tar = load_checkpoint(tmp_path / "run/last.pth"), load_checkpoint(tmp_path / "tar/last.pth")
    assert all(torch.equal(value, tar["state_dict"][name]) for name, value in folder["state_dict"].items())


def test_workers_read_a_tar_each_for_itself(tmp_path):
    """Processes that share an open file move each other's position in it."""
    with tarfile.open(tmp_path / "all.tar", "w") as tar:
        for i in range(200):
            Image.effect_noise((64, 64), 80).save(tmp_path / "noise.png")
            tar.add(tmp_path / "noise.png", f"{'ab'[i % 2]}/{i}.png")
    split = open_place(tmp_path / "all.tar", "here")
    # Before training one image is read in the main process.
    split.read(0)
    first, second = split.open(0)[0], split.open(1)[0]
    assert first.raw.fileobj.fileno() != second.raw.fileobj.fileno()
    loader = Loader(EvalImages(split, pil_to_tensor), 2, False, batch_size=10)
    assert all((labels >= 0).all() for _, labels, _ in loader)


def test_unreadable_pictures_are_replaced_and_listed(settings, pictures, tmp_path):
    whole = (pictures / "train/red/0.png").read_bytes()
    (pictures / "train/red/0.png").write_bytes(whole[: len(whole) // 2])
    (pictures / "train/red/7.png").write_bytes(b"")
    (pictures / "val/red/0.png").write_text("not a picture")
    run(settings, epochs=2)
    output = tmp_path / "run"
    assert (output / "skipped.txt").read_text().split() == ["red/0.png", "red/7.png"]
    assert (output / "skipped_val.txt").read_text().split() == ["red/0.png"]
    assert "warning: 2 unreadable images were left out" in (output / "train.log").read_text()
    lines = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    assert {line["images"] for line in lines if line["kind"] == "val"} == {5}


def test_nothing_readable_is_an_error(settings, pictures, capsys):
    for path in (pictures / "train").rglob("*.png"):
        path.write_bytes(b"")
    with pytest.raises(DataError, match=r"data.train: no image can be read"):
        run(settings)

    def read_in_a_worker():
        split = open_place(pictures / "train", "data.train.path")
        loader = Loader(TrainImages(split, None, 0), workers=1, pin=False, batch_sampler=EpochBatchSampler(24, 6, 0))
        batches = iter(loader)
        try:
            next(batches)
        finally:
            # the traceback keeps the iterator alive, and with it the worker
            batches._shutdown_workers()

    with pytest.raises(SystemExit):
        main_guard(read_in_a_worker)
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: data.train: no image can be read: 24 in a row from ")


def test_a_class_of_which_nothing_can_be_read_stops_training(settings, pictures):
    """One image of a class is enough, in any place."""
    for number in range(8):
        (pictures / f"train/green/{number}.png").write_bytes(b"")
    with pytest.raises(DataError, match=r"none of the 8 images of class 'green' can be read: green/0.png: .* no known"):
        run(settings)
    shutil.copy(pictures / "train/red/7.png", pictures / "train/green/7.png")
    check_readable_classes(open_place(pictures / "train", "here"))


def test_validation_on_training_images_is_said(settings, pictures, tmp_path):
    shutil.copytree(pictures / "val", pictures / "part")
    (pictures / "linked").symlink_to("val")
    for number in range(2):
        (pictures / f"part/red/{number}.png").unlink()
        (pictures / f"part/red/{number}.png").symlink_to(f"../../train/red/{number}.png")
    with tarfile.open(pictures / "all.tar", "w") as tar:
        tar.add(pictures / "train", "train")
    for train_path, val_path, shared in (
        ("train", "train", 24), ("train", "part", 2), ("val", "linked", 6), ("train", "val", 0),
        ("part", "part", 6), (".", "all.tar", 0), ("all.tar", "./all.tar", 24),
    ):  # fmt: skip
        data = DataConfig(str(pictures), SplitConfig(train_path), SplitConfig(val_path, "validation"))
        splits = open_place(pictures / train_path, "here"), open_place(pictures / val_path, "here")
        assert shared_images(data, *splits) == shared, (train_path, val_path)
    # Held-out images of one folder, or .tar, are others.
    for root in (pictures / "train", pictures / "all.tar"):
        data = DataConfig(str(root))
        assert shared_images(data, open_split(data, "train"), open_split(data, "val")) == 0
    settings["data"]["val"] = {"path": "train"}
    run(settings, epochs=1)
    assert "warning: 24 of 24 validation images are training images" in (tmp_path / "run/train.log").read_text()


def test_weights_that_are_not_finite_are_never_saved(settings, tmp_path, monkeypatch):
    step = Trainer.train_step

    def train_step(self, batches):
        result = step(self, batches)
        with torch.no_grad():
            self.model.head.fc.bias[0] = float("nan")
        return result

    monkeypatch.setattr(Trainer, "train_step", train_step)
    with pytest.raises(NonFiniteError, match=r"head.fc.bias"):
        run(settings, checkpoint_steps=1)
    assert not (tmp_path / "run/last.pth").exists()


def test_classes_of_the_splits_must_agree(settings, pictures, tmp_path):
    (pictures / "val/blue").rename(pictures / "val/azure")
    with pytest.raises(DataError, match=r"val has 3 classes, 1 of them .*'azure'.* not among the 3 classes"):
        run(settings)
    for path in (pictures / "val/azure").iterdir():
        path.unlink()
    run(settings, epochs=1)
    assert "no images of 1 classes, such as 'blue'" in (tmp_path / "run/train.log").read_text()


def test_names_of_classes_may_be_composed_or_not(tmp_path):
    """macOS writes é as e and an accent."""
    composed, decomposed = (unicodedata.normalize(form, "café") for form in ("NFC", "NFD"))
    for name in (decomposed, "tea"):
        (tmp_path / name).mkdir()
        Image.new("RGB", (8, 8)).save(tmp_path / name / "1.png")
    split = open_place(tmp_path, "here", ["tea", composed])
    assert [split.read(index)[1] for index in range(2)] == [1, 0]
    assert split.class_names == [composed, "tea"]
    # A data set that has both as classes keeps them apart.
    split = open_place(tmp_path, "here", [decomposed, composed, "tea"])
    assert (split.read(0)[1], split.class_names[0]) == (0, decomposed)


def test_missing_data_is_named(settings, pictures):
    settings["data"]["val"] = {"path": "test"}
    with pytest.raises(DataError, match=r"data.val.path: .*pictures/test does not exist"):
        run(settings)
    (pictures / "test").mkdir()
    with pytest.raises(DataError, match="holds no readable images in class folders"):
        run(settings)
    Image.new("RGB", (8, 8)).save(pictures / "test/a.png")
    with pytest.raises(DataError, match="holds images outside class folders"):
        run(settings)
    (pictures / "x.tar").write_bytes(b"no tar")
    settings["data"]["val"] = {"path": "x.tar"}
    with pytest.raises(DataError, match=r"x.tar is truncated or damaged: truncated header; it should be a whole .tar"):
        run(settings)


@pytest.mark.parametrize(
    ("section", "values", "message"),
    [
        ("train", {"epochs": 0}, "train.epochs is 0, should be at least 1"),
        ("train", {"batch_size": 5}, "train.batch_size is 5, should be even with train.mixup"),
        ("train", {"lr": 0}, "train.lr is 0.0, should be more than 0"),
        ("train", {"workers": -1}, "train.workers is -1"),
        ("train", {"optimizer": "adamq"}, "train.optimizer: timm cannot make 'adamq'"),
        ("data", {"augment": {"hflip": 2}}, "data.augment.hflip is 2.0, should be 0 to 1"),
        ("data", {"augment": {"auto_augment": "nonsense"}}, "data.augment: timm cannot make the transform"),
        ("model", {"backbone": {"name": "dat_huge"}}, "model.backbone.name: no timm model 'dat_huge'; did you mean"),
    ],
)  # fmt: skip
def test_values_that_cannot_work_are_named(settings, section, values, message):
    settings[section].update(values)
    with pytest.raises(ConfigError, match=message):
        run(settings)


def test_the_imagenet_augmentation_takes_every_draw():
    transform = make_transform(replace(ClassificationConfig().data, img_size=16), training=True)
    picture = Image.effect_noise((24, 20), 60).convert("RGB")
    # a few of these draws asked Pillow for 0 bits
    for index in range(2000):
        with isolated_rng(0, index):
            assert transform(picture).shape == (3, 16, 16)
    for policy in ("original", "v0"):
        data = replace(ClassificationConfig().data, img_size=16)
        data.augment = replace(data.augment, auto_augment=policy)
        assert make_transform(data, training=True)(picture).shape == (3, 16, 16)


@pytest.mark.parametrize(("loss", "mixup"), [("cross_entropy", 0), ("cross_entropy", 1), ("bce", 0), ("bce", 1)])
def test_losses_are_least_at_the_smoothed_labels(loss, mixup):
    config = ClassificationConfig()
    config.train.loss, config.train.mixup, config.train.cutmix, config.train.smoothing = loss, mixup, 0, 0.1
    function, targets = make_loss(config.train), torch.tensor([1, 2])
    if mixup:
        mix = MixPairs(config.train, 4, seed=0)
        _, targets, *_ = mix([(torch.zeros(3, 8, 8), int(label), 0, 0, 0) for label in targets])
    soft = targets if mixup else 0.9 * torch.eye(4)[targets] + 0.1 / 4
    right = {"cross_entropy": torch.log, "bce": torch.logit}[loss](soft)
    for k in range(4):
        assert function(right, targets) < function(right + torch.eye(4)[[k, k]], targets)


@pytest.mark.parametrize("soft", [False, True])
def test_class_weights_do_not_depend_on_the_split_of_a_step(soft):
    config = ClassificationConfig()
    config.train.mixup = config.train.cutmix = config.train.smoothing = 0
    function = make_loss(config.train, torch.tensor([0.5, 2.0, 1.0]))
    torch.manual_seed(0)
    logits, labels = torch.randn(6, 3), torch.tensor([0, 1, 1, 0, 2, 0])
    targets = torch.eye(3)[labels] if soft else labels
    expected = (torch.tensor([0.5, 2.0, 1.0])[labels] * -logits.log_softmax(1)[range(6), labels]).mean()
    torch.testing.assert_close(function(logits, targets), expected)
    halves = (function(logits[:3], targets[:3]) + function(logits[3:], targets[3:])) / 2
    torch.testing.assert_close(halves, expected)


def test_training_on_rare_classes(settings, pictures):
    """Two of eight blue images are left; balanced epochs show blue as often as the others."""
    for number in range(2, 8):
        (pictures / f"train/blue/{number}.png").unlink()
    drawn = []

    class Recorded(ClassificationTrainer):
        def compute_loss(self, batch, outputs, normalizers):
            drawn.extend(self.train_set.name(index) for index in batch[3].tolist())
            return super().compute_loss(batch, outputs, normalizers)

    plain = {"epochs": 6, "mixup": 0, "cutmix": 0, "batch_size": 6, "checkpoint_steps": 0}
    settings["train"] |= plain | {"balance": True, "class_weights": {"blue": 3, "red": 0.5}}
    config = from_dict(ClassificationConfig, settings, "test")
    check_config(config)
    splits = [open_place(pictures / name, name, ["blue", "green", "red"]) for name in ("train", "val")]
    trainer = Recorded(config, *splits)
    assert trainer.loss_function.weight.tolist() == [3, 1, 0.5]
    trainer.run()
    assert len(drawn) == 6 * 18
    assert all(abs(sum(name in one for one in drawn) - 36) < 8 for name in ("blue", "green", "red"))
    assert max(Counter(drawn).values()) > 15
    settings["train"]["class_weights"] = "balanced"
    balanced = ClassificationTrainer(from_dict(ClassificationConfig, settings, "test"), *splits)
    torch.testing.assert_close(balanced.loss_function.weight, torch.tensor([3.0, 0.75, 0.75]))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"class_weights": {"pink": 2.0}}, "train.class_weights has 'pink', its keys should be class names"),
        ({"class_weights": {"blue": -1.0}}, "train.class_weights has -1.0 for 'blue', should be at least 0"),
        (
            {"class_weights": "balance"},
            "train.class_weights is 'balance', should be one of balanced or keys and values",
        ),
        ({"class_weights": "balanced", "loss": "bce"}, "train.class_weights needs train.loss=cross_entropy, it is bce"),
        ({"early_stop": -1}, "train.early_stop is -1, should be at least 0"),
        (
            {"cuda_graphs": True},
            "train.cuda_graphs is true, which needs one process on a GPU; device: cpu, processes: 1",
        ),
        ({"cuda_graphs": True, "compile": True}, "train.compile is True, should be False with train.cuda_graphs"),
        ({"cuda_graphs": True, "accumulate": 2}, "train.accumulate is 2, should be 1 with train.cuda_graphs"),
    ],
)
def test_options_that_cannot_work_are_named(settings, changes, message):
    with pytest.raises(ConfigError, match=message):
        run(settings, **changes)


def test_a_capture_leaves_the_model_as_it_was(monkeypatch):
    def capture(module, args):
        with torch.enable_grad():
            assert torch.is_autocast_enabled("cpu")
            assert not torch.is_autocast_cache_enabled()
            assert module.training
            module(*args).sum().backward()

    monkeypatch.setattr(torch.cuda, "make_graphed_callables", capture)
    model, images = timm.create_model("resnet10t", num_classes=3), torch.randn(4, 3, 32, 32)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    graphed = Graphed(model, images, "bf16")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(graphed.eval()(images), model(images))


def test_a_balanced_run_resumes_to_the_same_weights(settings, pictures, tmp_path, monkeypatch):
    (pictures / "train/blue/7.png").unlink()
    options = {"balance": True, "class_weights": "balanced"}
    run(settings | {"output": str(tmp_path / "whole")}, **options, workers=1)
    step = Trainer.train_step

    def stopped(self, batches):
        if self.progress.step == 4:
            raise KeyboardInterrupt
        step(self, batches)

    monkeypatch.setattr(Trainer, "train_step", stopped)
    with pytest.raises(KeyboardInterrupt):
        run(settings, **options)
    monkeypatch.undo()
    run(settings, **options, resume=True)
    whole, resumed = (load_checkpoint(tmp_path / name / "last.pth")["state_dict"] for name in ("whole", "run"))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


class Shifting:
    """Takes and gives what albumentations.Compose does."""

    def __init__(self):
        self.processors = {}

    def set_random_seed(self, seed):
        self.seed = seed % 256

    def __call__(self, image):
        return {"image": (image + self.seed).astype("uint8")}


def test_a_classifier_trains_with_a_pipeline(settings, write_config, tmp_path):
    calls = []

    def transform(image):
        calls.append(image.mode)
        return image.rotate(90)

    def trained(name, transform):
        classifier = Classifier.from_config(write_config(settings), epochs=1, output=str(tmp_path / name))
        classifier.train(transform=transform)
        return load_checkpoint(tmp_path / name / "last.pth")["state_dict"]

    pipelines = {"none": None, "rotated": transform, "a": Shifting(), "b": Shifting()}
    results = [trained(*pipeline) for pipeline in pipelines.items()]
    assert calls == ["RGB"] * 24
    assert "augmented by function first" in (tmp_path / "rotated/train.log").read_text()
    same = [[all(torch.equal(a[name], b[name]) for name in a) for b in results] for a in results]
    assert same == [[True, False, False, False], [False, True, False, False], [False, False, True, True],
                    [False, False, True, True]]  # fmt: skip
    with pytest.raises(ConfigError, match=r"transform: gave an image of torch.uint8, should be a PIL image in RGB"):
        trained("wrong", pil_to_tensor)


def test_albumentations_itself_augments_images(pictures):
    albumentations = pytest.importorskip("albumentations")
    transform = UserTransform(albumentations.Compose([albumentations.HorizontalFlip(p=0.5)]), lambda image: image)
    image = Image.open(pictures / "train/red/0.png").convert("RGB")
    found = []
    for seed in range(10):
        with isolated_rng(seed):
            found.append(transform(image).tobytes())
    assert set(found) == {image.tobytes(), image.transpose(Image.Transpose.FLIP_LEFT_RIGHT).tobytes()}
