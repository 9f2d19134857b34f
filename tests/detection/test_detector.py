"""The class Detector: every kind of image, its results, and training, evaluation and export from Python."""

import copy
import pickle
import sys
from types import SimpleNamespace

import huggingface_hub
import numpy as np
import pytest
import torch
from exporting import write_detector
from PIL import Image

from dat.detection import Detector
from dat.utils.errors import CheckpointError, ConfigError, DataError


@pytest.fixture(scope="module")
def detector(tmp_path_factory):
    path = write_detector(tmp_path_factory.mktemp("detector") / "best.pth", box_refine=True)
    return Detector.from_checkpoint(path, device="cpu")


@pytest.fixture(scope="module")
def grey():
    pixels = np.random.default_rng(0).integers(0, 256, (9, 12), dtype=np.uint8)
    return Image.fromarray(pixels).resize((120, 90))


def as_tensor(image):
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)


KINDS = {
    "rgb": lambda image: image.convert("RGB"),
    "grey": lambda image: image,
    "rgba": lambda image: image.convert("RGBA"),
    "palette": lambda image: image.quantize(256).convert("P"),
    "16 bits": lambda image: Image.fromarray(np.array(image).astype(np.uint16) * 257),
    "array": lambda image: np.array(image.convert("RGB")),
    "grey array": np.array,
    "rgba array": lambda image: np.array(image.convert("RGBA")),
    "tensor": as_tensor,
    "grey tensor": lambda image: torch.from_numpy(np.array(image))[None],
    "floating-point tensor": lambda image: as_tensor(image) / 255,
}


@pytest.mark.parametrize("kind", KINDS)
def test_all_kinds_of_images_give_the_same_boxes(detector, grey, kind):
    wanted = detector.predict(grey.convert("RGB"), threshold=0)
    found = detector.predict(KINDS[kind](grey), threshold=0)
    torch.testing.assert_close(found.boxes, wanted.boxes, rtol=0, atol=1e-3)
    assert found.class_names == wanted.class_names
    assert found.image.mode == "RGB"


def test_paths_and_lists(detector, grey, tmp_path):
    grey.save(tmp_path / "a.png")
    images = [tmp_path / "a.png", str(tmp_path / "a.png"), grey.rotate(90, expand=True)]
    found = detector.predict(images, threshold=0, batch_size=2)
    assert [one.image.size for one in found] == [(120, 90), (120, 90), (90, 120)]
    torch.testing.assert_close(found[0].boxes, found[1].boxes)
    assert detector.predict([]) == []
    for option, message in (({"threshold": 2}, "threshold is 2, should be 0 to 1"), ({"batch_size": 0}, "at least 1")):
        with pytest.raises(ConfigError, match=message):
            detector.predict(images, **option)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        ("nowhere.jpg", "nowhere.jpg: no such image"),
        (np.zeros((4, 5, 3)), r"float64 \[4, 5, 3\]"),
        (np.zeros((4, 5, 2), np.uint8), r"uint8 \[4, 5, 2\]"),
        (torch.zeros(2, 3, 4, 5), r"\[2, 3, 4, 5\]"),
        (torch.full((3, 4, 5), 2.0), "0 to 1"),
        (np.zeros((0, 5, 3), np.uint8), r"\[0, 5, 3\]"),
        (7, "type int"),
    ],
)
def test_a_wrong_image_is_not_blamed_on_the_checkpoint(detector, image, message):
    with pytest.raises(DataError, match=message) as raised:
        detector.predict(image)
    assert "best.pth" not in str(raised.value)


def test_results(detector, grey, monkeypatch):
    found = detector.predict(grey, threshold=0)
    assert found.scores.tolist() == sorted(found.scores.tolist(), reverse=True)
    least = float(found.scores[3])
    some = detector.predict(grey, threshold=least)
    assert len(some) == int((found.scores >= least).sum())
    results = some.to_coco(image_id=7)
    assert {result["image_id"] for result in results} == {7}
    for result, box, name in zip(results, some.boxes.tolist(), some.class_names, strict=True):
        x, y, width, height = result["bbox"]
        assert [x, y, x + width, y + height] == pytest.approx(box, abs=0.01)
        assert {3: "blue", 11: "red"}[result["category_id"]] == name
    assert (some.boxes >= 0).all()
    assert (some.boxes <= torch.tensor([120.0, 90, 120, 90])).all()
    drawn = some.draw()
    assert drawn.width / drawn.height == pytest.approx(120 / 90, rel=0.01)
    assert np.abs(np.array(drawn.resize((120, 90)), np.int16) - np.array(grey.convert("RGB"))).max() > 50
    monkeypatch.setitem(sys.modules, "supervision", None)
    with pytest.raises(ConfigError, match="needs the package supervision"):
        some.to_supervision()
    monkeypatch.setitem(sys.modules, "supervision", SimpleNamespace(Detections=lambda **named: named))
    converted = some.to_supervision()
    np.testing.assert_array_equal(converted["xyxy"], some.boxes.numpy())
    assert converted["data"]["class_name"].tolist() == some.class_names


def test_copies_predict_with_their_own_model(detector, grey):
    wanted = detector.predict(grey, threshold=0)
    for other in (copy.deepcopy(detector), pickle.loads(pickle.dumps(detector))):
        assert torch.equal(other.predict(grey, threshold=0).boxes, wanted.boxes)
        for parameter in other.model.parameters():
            torch.nn.init.zeros_(parameter)
        assert not torch.equal(other.predict(grey, threshold=0).boxes, wanted.boxes)
    assert torch.equal(detector.predict(grey, threshold=0).boxes, wanted.boxes)


def test_overrides_do_not_reach_the_model(detector):
    other = Detector.from_checkpoint(detector.path, ["data.val.size=48"], device="cpu")
    assert other.size == 48
    with pytest.raises(ConfigError, match=r"an override should read key\.path=value"):
        Detector.from_checkpoint(detector.path, ["data.val.size"], device="cpu")
    with pytest.raises(ConfigError, match=r"model.\* is decided by .*best.pth"):
        Detector.from_checkpoint(detector.path, ["model.num_queries=3"], device="cpu")


def test_the_number_of_detections_is_that_of_every_result(detector, grey):
    few = Detector.from_checkpoint(detector.path, device="cpu", top_k=2)
    assert few.config.data.val.top_k == 2
    assert len(few.predict(grey, threshold=0)) == 2


@pytest.mark.parametrize("top_k", [0, "5"])
def test_a_wrong_number_of_detections_is_named(detector, top_k):
    with pytest.raises(ConfigError, match=rf"top_k is {top_k!r}, should be an integer of at least 1"):
        Detector.from_checkpoint(detector.path, device="cpu", top_k=top_k)


def test_a_file_in_the_place_of_results_is_named_before_they_are_computed(detector, tmp_path):
    with pytest.raises(ConfigError, match=r"out: .*best.pth is a file or a broken link, should be a folder"):
        detector.evaluate(tmp_path, out=detector.path)


def test_a_name_of_the_hub(detector, monkeypatch):
    asked = []

    def download(repository, file, revision):
        asked.append((repository, file, revision))
        return str(detector.path)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    found = Detector.from_checkpoint("hf-hub:somebody/cells@v2", device="cpu")
    assert found.categories == detector.categories
    assert asked == [("somebody/cells", "best.pth", "v2")]


def test_without_a_network_the_file_to_fetch_is_named(monkeypatch):
    def fail(*args, **named):
        raise huggingface_hub.errors.LocalEntryNotFoundError("no connection")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fail)
    address = "https://huggingface.co/somebody/cells/resolve/main/best.pth"
    with pytest.raises(CheckpointError, match=f"cannot be downloaded .*no connection.*; fetch {address}"):
        Detector.from_checkpoint("hf-hub:somebody/cells")


def test_it_trains_evaluates_and_exports(config_file, scenes, tmp_path):
    small = {"two_stage": False, "box_refine": False, "encoder_depth": 0, "decoder_depth": 1, "num_levels": 1}
    detector = Detector.from_config(
        config_file,
        epochs=1,
        data__val__annotations="train.json",
        data__val__top_k=7,
        model__backbone={"name": "test_resnet", "out_indices": [3]},
        **{f"model__{name}": value for name, value in small.items()},
    )
    with pytest.raises(ConfigError, match="not trained yet"):
        detector.predict(Image.new("RGB", (40, 30)))
    metrics = detector.train(scenes)
    assert [category.name for category in detector.categories] == ["blue", "red"]
    assert detector.evaluate(scenes)["AP"] == pytest.approx(metrics["AP"], abs=1e-3)
    line = detector.export(tmp_path / "model.onnx", sizes=(64, 96))
    assert line.startswith(f"{tmp_path / 'model.onnx'}: ")
    exported = Detector.from_checkpoint(tmp_path / "model.onnx")
    image = Image.effect_noise((64, 48), 60)
    scores = [model.predict(image, threshold=0).scores for model in (detector, exported)]
    torch.testing.assert_close(*scores, rtol=0, atol=1e-4)
    assert len(scores[1]) == 7
    with pytest.raises(ConfigError, match="an exported file"):
        exported.evaluate()
    # Fine-tuning starts from the weights of the checkpoint.
    detector.train(epochs=1, output=str(tmp_path / "again"))
    assert f"starts from {tmp_path}/run/best.pth" in (tmp_path / "again/train.log").read_text()
