"""Exported detectors give torch's detections, or nothing is written."""

import json
import shutil

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from commands import dat
from exporting import write_detector
from PIL import Image
from test_predict import noise, read, run

from dat.detection import Detector, export
from dat.detection.checkpoint import load_detector
from dat.detection.config import DataConfig
from dat.detection.graph import DetectorGraph
from dat.detection.post_process import post_process
from dat.export.runtime import load_exported
from dat.utils.errors import CheckpointError, ConfigError, ExportError

pytestmark = pytest.mark.filterwarnings("ignore:# The axis name")
SIZES = ["--sizes", "64", "96"]
ONE_MAP = {"backbone": {"name": "test_resnet", "out_indices": [-1]}, "encoder_depth": 0, "num_levels": 2}
# a stage of a small DAT++, with both kinds of its blocks; those of 2022 are in the classifiers' tests
DAT_PP = {"blocks": "ND", "embed_dims": 16, "num_heads": 2, "kernel_size": 3, "release": "2023", "conv_mlp": True}


@pytest.mark.parametrize(
    "model",
    [
        {"box_refine": True, "two_stage": True},
        {"kind": "detr"},
        {"kind": "dino"},
        {**ONE_MAP, "backbone": {"name": "dat_pp_nano", "out_indices": [0], "stages": [DAT_PP]}},
    ],
    ids=["two-stage", "detr", "dino", "dat-pp"],
)
def test_onnx_gives_torchs_detections_of_any_batch_and_size(tmp_path, model, capsys):
    path = write_detector(tmp_path / "best.pth", **model)
    dat("detect", "export", path, "--out", tmp_path / "model.onnx", "--top-k", "5", *SIZES)
    assert "generated images, shortest edges 64 and 96, batch 1 and 2" in capsys.readouterr().out
    assert sorted(file.name for file in tmp_path.iterdir()) == ["best.pth", "model.onnx"]
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    assert [value.shape for value in session.get_inputs()] == [["batch", 3, "height", "width"], ["batch", 2]]
    for value in session.get_outputs():
        assert value.shape[0] == "batch"
        # In two stages small images have fewer detections.
        assert value.shape[1] == ("detections" if model.get("two_stage") or model.get("kind") == "dino" else 5)
    detector = load_detector(path, torch.device("cpu"))
    # of sizes that the command has not seen, and for whose maps windows have to be padded
    for batch, height, width in ((3, 75, 130), (1, 161, 66)):
        images = torch.randint(0, 256, (batch, 3, height, width), dtype=torch.uint8)
        sizes = torch.tensor([[30, 40], [300, 200], [0, 0]])[-batch:]
        scores, labels, boxes, _ = session.run(None, {"images": images.numpy(), "sizes": sizes.numpy()})
        data = detector.config.data
        mean, std = (torch.tensor(values)[:, None, None] for values in (data.mean, data.std))
        with torch.no_grad():
            outputs = detector.model((images / 255 - mean) / std)
        sizes[-1] = torch.tensor([height, width])
        for i, wanted in enumerate(post_process(outputs, sizes, detector.model.scores, top_k=5)):
            torch.testing.assert_close(torch.from_numpy(scores[i]), wanted["scores"], rtol=0, atol=1e-4)
            assert labels[i].tolist() == wanted["labels"].tolist()
            torch.testing.assert_close(torch.from_numpy(boxes[i]), wanted["boxes"], rtol=0, atol=1e-3)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A checkpoint that pads images to a multiple, which no side of an image here is."""
    return write_detector(tmp_path_factory.mktemp("detector") / "best.pth", pad_multiple=40, **ONE_MAP)


@pytest.fixture(scope="module")
def exported(checkpoint):
    """The ONNX form of `checkpoint`."""
    out = checkpoint.with_name("model.onnx")
    dat("detect", "export", checkpoint, "--out", out, *SIZES)
    return out


def test_an_exported_model_finds_what_its_checkpoint_finds(checkpoint, exported, tmp_path):
    """In images of several sizes, none of which is a multiple that is padded to."""
    (tmp_path / "in/b").mkdir(parents=True)
    for i, (name, size) in enumerate((("1.png", (120, 90)), ("2.png", (120, 90)), ("b/3.png", (80, 130)))):
        noise(size, i).save(tmp_path / "in" / name)
    for name, model in (("a", checkpoint), ("b", exported)):
        run(model, tmp_path / "in", "--out", tmp_path / name)
    wanted, found = (sorted(read(tmp_path / name), key=lambda r: (r["image_id"], -r["score"])) for name in "ab")
    assert len(wanted) == len(found) == 3 * 14
    for a, b in zip(wanted, found, strict=True):
        assert b["score"] == pytest.approx(a["score"], abs=1e-4)
    keys = [
        {(r["image_id"], r["file_name"], r["category_id"], *np.round(r["bbox"])) for r in x} for x in (wanted, found)
    ]
    # boxes beside half a pixel may be rounded the other way
    assert len(keys[0] & keys[1]) > 0.95 * len(keys[0])
    options = {"tiles": 60, "nms": 0.3, "one_class": True}
    a, b = (
        Detector.from_checkpoint(path, device="cpu").predict(tmp_path / "in/1.png", 0.0, **options)
        for path in (checkpoint, exported)
    )
    torch.testing.assert_close(a.scores, b.scores, rtol=0, atol=1e-4)


def test_metadata_says_what_a_program_has_to_know(exported):
    texts = onnxruntime.InferenceSession(exported).get_modelmeta().custom_metadata_map
    metadata = {name: json.loads(text) for name, text in texts.items()}
    assert metadata["class_names"] == ["blue", "red"]
    assert metadata["category_ids"] == [3, 11]
    assert (metadata["size"], metadata["max_size"]) == (64, 256)
    assert metadata["mean"] == pytest.approx([0.485, 0.456, 0.406])


def test_a_program_of_torch_export_is_loaded_only_on_trust(checkpoint, tmp_path):
    out = tmp_path / "model.pt2"
    dat("detect", "export", checkpoint, "--out", out, *SIZES)
    with pytest.raises(ConfigError, match="can run any code"):
        load_exported(out, "detection")
    exported = load_exported(out, "detection", trust=True)
    assert exported.metadata["class_names"] == ["blue", "red"]
    detector = Detector.from_checkpoint(checkpoint, device="cpu")
    # Thin and small images too, below the sizes that the program was traced at.
    for shape in ((3, 3, 70, 90), (1, 3, 1, 50), (2, 3, 17, 300)):
        images, sizes = torch.randint(0, 256, shape, dtype=torch.uint8), torch.tensor([shape[2:]] * shape[0])
        for found, wanted in zip(exported.run(images, sizes)[::2], detector.run(images, sizes)[::2], strict=True):
            torch.testing.assert_close(found, wanted, rtol=0, atol=1e-3)


def test_padding_to_a_multiple_is_part_of_the_graph(checkpoint):
    detector = load_detector(checkpoint, torch.device("cpu"))
    images = torch.randint(0, 256, (1, 3, 70, 90), dtype=torch.uint8)
    sizes = torch.tensor([[70, 90]])
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)
    graph = DetectorGraph(detector.model, DataConfig(mean=mean, std=std, pad_multiple=32), top_k=5)
    x = torch.zeros(1, 3, 96, 96)
    x[..., :70, :90] = (images / 255 - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    mask = torch.ones(1, 96, 96, dtype=torch.bool)
    mask[:, :70, :90] = False
    with torch.no_grad():
        scores, _, boxes, _ = graph(images, sizes)
        (wanted,) = post_process(detector.model(x, mask), sizes, top_k=5)
    torch.testing.assert_close(scores[0], wanted["scores"])
    torch.testing.assert_close(boxes[0], wanted["boxes"], rtol=1e-4, atol=1e-3)


def test_what_is_compiled_is_given_padded_images(tmp_path, monkeypatch):
    """All but the compiler, which takes minutes for the smallest detector."""

    def write(program, inputs, metadata, path):
        assert inputs["images"] == ("torch.uint8", [(1, 4096), (3, 3), (32, 4096), (32, 4096)])
        torch.export.save(program, path, extra_files={"metadata.json": json.dumps(metadata)})

    monkeypatch.setattr("dat.export.export.write_compiled", write)
    path = write_detector(tmp_path / "padded.pth", pad_multiple=32, **ONE_MAP)
    out = tmp_path / "model.pt2"
    dat("detect", "export", path, "--out", out, "--compile", *SIZES)
    image = Image.effect_noise((75, 130), 60).convert("RGB")
    found = Detector.from_checkpoint(out, trust=True).predict(image, threshold=0)
    wanted = Detector.from_checkpoint(path, device="cpu").predict(image, threshold=0)
    torch.testing.assert_close(found.scores, wanted.scores, rtol=0, atol=1e-4)
    torch.testing.assert_close(found.boxes, wanted.boxes, rtol=0, atol=1e-3)


def test_a_file_that_gives_other_results_is_not_left_behind(exported, tmp_path, monkeypatch):
    """The exporter, for once, exports another model."""
    monkeypatch.setattr("dat.export.export._write_onnx", lambda graph, path: shutil.copy(exported, path))
    out = tmp_path / "model.onnx"
    out.write_bytes(b"older")
    checkpoint = write_detector(tmp_path / "best.pth", num_points=3)
    with pytest.raises(ExportError, match=r"of the exported model differ by .* from torch's at inputs"):
        dat("detect", "export", checkpoint, "--out", out, *SIZES)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["best.pth", "model.onnx"]
    assert out.read_bytes() == b"older"


def detections(scores, labels, boxes, queries):
    return (
        torch.tensor([scores]),
        torch.tensor([labels]),
        torch.tensor([[[x, 0.0, 10.0, 10.0] for x in boxes]]),
        torch.tensor([queries]),
    )


@pytest.mark.parametrize(
    ("found", "scores", "boxes"),
    [
        (([0.9, 0.5], [0, 1], [1.0, 2.0], [4, 5]), 0.0, 0.0),
        # equal scores in another order
        (([0.9, 0.5], [0, 1], [1.25, 2.0], [4, 5]), 0.0, 0.25),
        (([0.8, 0.5], [0, 1], [1.0, 2.0], [4, 5]), 0.1, 0.0),
        (([0.9, 0.5], [1, 1], [1.0, 2.0], [4, 5]), float("inf"), 0.0),
        # the last may be another one of the same score
        (([0.9, 0.5], [0, 0], [1.0, 7.0], [4, 6]), 0.0, 0.0),
    ],
)
def test_difference_of_detections(found, scores, boxes):
    wanted = detections([0.9, 0.5], [0, 1], [1.0, 2.0], [4, 5])
    worst = export.difference(wanted, detections(*found))
    assert worst == {"scores": pytest.approx(scores), "boxes": pytest.approx(boxes)}


def test_queries_that_tie_may_change_places():
    wanted = detections([0.9, 0.9, 0.1], [0, 0, 0], [1.0, 300.0, 9.0], [4, 5, 6])
    swapped = detections([0.9, 0.9, 0.1], [0, 0, 0], [300.0, 1.25, 9.0], [4, 5, 6])
    assert export.difference(wanted, swapped) == {"scores": 0.0, "boxes": 0.25}
    apart = detections([0.9, 0.8, 0.1], [0, 0, 0], [1.0, 300.0, 9.0], [4, 5, 6])
    assert export.difference(apart, detections([0.9, 0.8, 0.1], [0, 0, 0], [300.0, 1.0, 9.0], [4, 5, 6]))["boxes"] > 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--out", "{tmp}/model.pb"], r"should end in .onnx \(ONNX\) or .pt2"),
        (["--out", "{tmp}/no/model.onnx"], "a folder that does not exist"),
        (["--out", "{tmp}/model.onnx", "--sizes", "64", "64"], "should be two different sizes"),
    ],
)
def test_mistakes_are_said_and_nothing_is_written(checkpoint, tmp_path, arguments, message):
    with pytest.raises(ConfigError, match=message):
        dat("detect", "export", checkpoint, *(argument.format(tmp=tmp_path) for argument in arguments))
    assert not list(tmp_path.iterdir())


def test_untrusted_files_are_refused_in_one_line(exported, tmp_path):
    path = tmp_path / "model.onnx"
    whole = exported.read_bytes()
    path.write_bytes(whole)
    with pytest.raises(CheckpointError, match="of a detection model, should be a classification model"):
        load_exported(path, "classification")
    for cut in (0, 10, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:cut])
        with pytest.raises(CheckpointError, match=r"model.onnx: (not an ONNX model|without the metadata)"):
            load_exported(path, "detection")
    identity = onnx.parser.parse_model(
        '<ir_version: 8, opset_import: ["": 20]> g (float[1] x) => (float[1] y) {y = Identity(x)}'
    )
    onnx.save(identity, path)
    with pytest.raises(CheckpointError, match="without the metadata of an export"):
        load_exported(path, "detection")
    with pytest.raises(CheckpointError, match="no such file"):
        load_exported(tmp_path / "none.onnx", "detection")
