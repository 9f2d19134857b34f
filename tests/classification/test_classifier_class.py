"""The class Classifier: images of every kind in, labels out; training, evaluation and export by a call each."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from dat.classification import Classifier, Prediction
from dat.classification.config import ClassificationConfig
from dat.classification.model import build_classifier
from dat.engine.checkpoint import save_checkpoint
from dat.engine.config import from_dict, to_dict
from dat.utils.errors import CheckpointError, ConfigError, DataError

NAMES = ["a", "b", "c"]
PIXELS = np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """A checkpoint with drawn weights, whose scores depend on every pixel."""
    path = tmp_path_factory.mktemp("classifier") / "best.pth"
    settings = {"model": {"backbone": {"name": "test_convnext"}}, "data": {"root": "nowhere", "img_size": 32}}
    config = from_dict(ClassificationConfig, settings, "test")
    torch.manual_seed(0)
    model = build_classifier(config.model.backbone, len(NAMES))
    state = {"kind": "classification", "config": to_dict(config), "class_names": NAMES}
    save_checkpoint(path, {**state, "state_dict": model.state_dict()})
    return path


@pytest.fixture(scope="module")
def classifier(path):
    return Classifier.from_checkpoint(path, device="cpu")


def grey(pixels):
    return np.repeat(pixels[..., :1], 3, axis=2)


def scores(prediction):
    return [dict(prediction.top)[name] for name in NAMES]


def test_a_prediction(classifier, tmp_path):
    Image.fromarray(PIXELS).save(tmp_path / "image.png")
    found = classifier.predict(tmp_path / "image.png")
    assert isinstance(found, Prediction)
    assert found.top[0] == (found.label, found.score)
    assert sum(score for _, score in found.top) == pytest.approx(1, abs=1e-6)
    assert [score for _, score in found.top] == sorted((score for _, score in found.top), reverse=True)
    assert len(classifier.predict(str(tmp_path / "image.png"), top_k=2).top) == 2
    assert found.to_dict()["top"][0] == {"label": found.label, "score": round(found.score, 6)}
    assert set(dict(found.top)) == set(NAMES)


@pytest.mark.parametrize(
    ("source", "rgb"),
    [
        (PIXELS, PIXELS),
        (PIXELS[..., 0], grey(PIXELS)),
        (PIXELS[..., :1], grey(PIXELS)),
        (np.dstack([PIXELS, np.full_like(PIXELS[..., 0], 255)]), PIXELS),
        (PIXELS[:, ::-1], PIXELS[:, ::-1]),
        (torch.from_numpy(PIXELS).permute(2, 0, 1), PIXELS),
        (torch.from_numpy(PIXELS).permute(2, 0, 1) / 255, PIXELS),
        (torch.from_numpy(PIXELS[None, ..., 0]), grey(PIXELS)),
        (Image.fromarray(PIXELS), PIXELS),
        (Image.fromarray(PIXELS[..., 0]), grey(PIXELS)),
        (Image.fromarray(PIXELS).convert("RGBA"), PIXELS),
        (Image.fromarray(PIXELS[..., 0].astype(np.uint16) * 257), grey(PIXELS)),
    ],
    ids=[
        "array",
        "grey",
        "one-channel",
        "opaque",
        "mirrored",
        "tensor",
        "floats",
        "grey-tensor",
        "PIL",
        "L",
        "RGBA",
        "16-bit",
    ],
)
def test_every_kind_of_image_is_the_same_image(classifier, source, rgb, tmp_path):
    Image.fromarray(np.ascontiguousarray(rgb)).save(tmp_path / "rgb.png")
    wanted = scores(classifier.predict(tmp_path / "rgb.png"))
    assert scores(classifier.predict(source)) == pytest.approx(wanted, abs=1e-6)
    # another image has other scores
    assert scores(classifier.predict(255 - rgb)) != pytest.approx(wanted, abs=1e-4)


def test_palettes_and_orientation(classifier, tmp_path):
    palette = Image.fromarray(PIXELS).quantize(32)
    assert scores(classifier.predict(palette)) == scores(classifier.predict(palette.convert("RGB")))
    exif = Image.Exif()
    exif[274] = 6
    Image.fromarray(PIXELS).save(tmp_path / "turned.png", exif=exif)
    turned = scores(classifier.predict(np.rot90(PIXELS, -1)))
    assert scores(classifier.predict(tmp_path / "turned.png")) == turned
    with Image.open(tmp_path / "turned.png") as image:
        assert scores(classifier.predict(image)) == turned


def test_lists_keep_their_order_whatever_the_batch(classifier, tmp_path):
    Image.fromarray(PIXELS).save(tmp_path / "image.png")
    images = [tmp_path / "image.png", 255 - PIXELS, torch.from_numpy(PIXELS[:20]).permute(2, 0, 1)]
    single = [scores(classifier.predict(image)) for image in images]
    for batch_size in (1, 2, 64):
        found = classifier.predict(images, batch_size=batch_size)
        np.testing.assert_allclose([scores(one) for one in found], single, atol=1e-6)
    assert classifier.predict([]) == []


@pytest.mark.parametrize(("name", "number"), [("batch_size", 0), ("batch_size", -1), ("top_k", 0), ("top_k", -1)])
def test_numbers_below_one_are_named(classifier, name, number):
    with pytest.raises(ConfigError, match=f"{name} is {number}, should be at least 1"):
        classifier.predict([PIXELS, PIXELS], **{name: number})


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("nowhere.png", "nowhere.png: no such image"),
        (PIXELS / 255, r"the image is float64 \[40, 50, 3\], should be uint8 \[H, W\] or \[H, W, C\] with 1, 3 or 4"),
        (PIXELS[..., :2], r"the image is uint8 \[40, 50, 2\], should be uint8"),
        (torch.from_numpy(PIXELS), r"the image is uint8 \[40, 50, 3\], should be uint8 \[C, H, W\] with 1, 3 or 4"),
        (torch.from_numpy(PIXELS).permute(2, 0, 1).float(), "the tensor has values 0 to 255, floats should be 0 to 1"),
        (torch.zeros(2, 3, 8, 8), r"the image is uint8 \[2, 3, 8, 8\], should be"),
        (b"bytes", "the image is of type bytes, should be a path, a PIL image, an array or a tensor"),
    ],
)
def test_what_is_no_image_is_named_and_not_the_checkpoint(classifier, source, message):
    with pytest.raises(DataError, match=message) as raised:
        classifier.predict(source)
    assert "best.pth" not in str(raised.value)


def test_exported_files_predict_alike(classifier, tmp_path):
    images = [PIXELS, 255 - PIXELS]
    wanted = [scores(one) for one in classifier.predict(images)]
    for name in ("model.onnx", "model.pt2"):
        classifier.export(tmp_path / name)
        exported = Classifier.from_checkpoint(tmp_path / name, trust=True)
        assert exported.class_names == NAMES
        np.testing.assert_allclose([scores(one) for one in exported.predict(images)], wanted, atol=1e-4)
        with pytest.raises(ConfigError, match=rf"{name} is an exported model; this needs a checkpoint"):
            exported.train()
    with pytest.raises(ConfigError, match="can run any code"):
        Classifier.from_checkpoint(tmp_path / "model.pt2")
    with pytest.raises(ConfigError, match=r"data.img_size=64: .* an exported model cannot be overridden"):
        Classifier.from_checkpoint(tmp_path / "model.onnx", ["data.img_size=64"])


def test_from_the_hub(path, monkeypatch):
    """A stand-in for the hub, which tests do not reach."""
    asked = []

    def hf_hub_download(repository, name, revision, **options):
        asked.append((repository, name, revision))
        if repository == "me/none":
            raise OSError("404: no such\nrepository")
        return str(path)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", hf_hub_download)
    assert Classifier.from_checkpoint("hf-hub:me/mine").class_names == NAMES
    assert Classifier.from_checkpoint("hf-hub:me/mine@v2").class_names == NAMES
    with pytest.raises(
        CheckpointError,
        match=r"hf-hub:me/none: cannot be downloaded .404: no such repository.; fetch https://huggingface.co/me/none/",
    ):
        Classifier.from_checkpoint("hf-hub:me/none")
    assert asked == [
        ("me/mine", "best.pth", None),
        ("me/mine", "best.pth", "v2"),
        *(("me/none", name, None) for name in ("best.pth", "config.json")),
    ]


def test_from_a_configuration_to_metrics(settings, pictures, write_config, tmp_path, caplog):
    classifier = Classifier.from_config(write_config(settings), epochs=1, data__crop_pct=0.9, output="nowhere")
    assert (classifier.config.train.epochs, classifier.config.data.crop_pct) == (1, 0.9)
    with pytest.raises(ConfigError, match="this classifier is not trained yet"):
        classifier.predict(PIXELS)
    with pytest.raises(ConfigError, match="this classifier is not trained yet; this needs a checkpoint"):
        classifier.evaluate()
    output = tmp_path / "run"
    metrics = classifier.train(pictures, output=str(output))
    assert metrics == json.loads((output / "metrics.json").read_text())
    assert classifier.class_names == ["blue", "green", "red"]
    assert classifier.predict(pictures / "val/red/0.png").label in classifier.class_names
    found = classifier.evaluate(out=tmp_path / "out")
    assert found == json.loads((tmp_path / "out/metrics.json").read_text())
    assert (tmp_path / "out/report.html").is_file()
    assert (found["top1"], found["images"]) == (metrics["top1"], 6)
    assert found["per_class"] == metrics["per_class"]
    # class folders, a fifth of which is held out
    assert classifier.evaluate(pictures / "train", workers=0)["images"] == 3
    (pictures / "val/red/0.png").write_bytes(b"")
    assert classifier.evaluate(pictures)["images"] == 5
    assert "1 unreadable images were left out" in caplog.text


def test_training_goes_on_from_the_weights_that_it_has(settings, pictures, write_config, tmp_path):
    first = Classifier.from_config(write_config(settings))
    first.train(epochs=1)
    (pictures / "train/blue").rename(pictures / "train/azure")
    (pictures / "val/blue").rename(pictures / "val/azure")
    classifier = Classifier.from_checkpoint(tmp_path / "run/best.pth")
    with pytest.raises(ConfigError, match="holds a run"):
        classifier.train()
    classifier.train(output=str(tmp_path / "second"), epochs=1, lr=1e-12, min_lr_scale=0, warmup_epochs=0, ema_decay=0)
    assert classifier.class_names == ["azure", "green", "red"]
    for name, value in classifier.trained_model().named_parameters():
        torch.testing.assert_close(value, dict(first.trained_model().named_parameters())[name], msg=name)


def test_named_configurations():
    assert Classifier.from_config("demo").config.model.backbone["name"] == "dat_nano"
    with pytest.raises(ConfigError, match=r"dat_nano_foldr: no such file, nor a configuration .* dat_nano_folder"):
        Classifier.from_config("dat_nano_foldr")
    with pytest.raises(ConfigError, match=r"unknown key 'train.epoch'; did you mean 'train.epochs'"):
        Classifier.from_config("demo", epoch=3)
