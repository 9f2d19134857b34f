"""Exported classifiers of every family give torch's logits, or nothing is written."""

import json

import numpy as np
import onnxruntime
import pytest
import torch
from commands import dat
from PIL import Image

from dat.classification import export
from dat.classification.classifier import Classifier
from dat.classification.config import ClassificationConfig
from dat.classification.model import build_classifier
from dat.engine.checkpoint import save_checkpoint
from dat.engine.config import from_dict, to_dict
from dat.export.export import _write_onnx
from dat.export.graph import Graph
from dat.export.runtime import load_exported
from dat.utils.errors import CheckpointError, ConfigError, ExportError

pytestmark = pytest.mark.filterwarnings("ignore:# The axis name")

NAMES = ["a", "b", "c"]
# a stage of each family, with every kind of its blocks
DAT = {"name": "dat_nano", "stages": [{"blocks": "LSD", "embed_dims": 16, "num_heads": 2}]}
DAT_PLUS = {
    "name": "dat_plus_tiny",
    "stages": [
        {"blocks": "ND", "embed_dims": 16, "num_heads": 2, "kernel_size": 9, "stride": 8, "offset_range_factor": -1.0,
         "release": "2023"},
        {"blocks": "D", "embed_dims": 32, "num_heads": 4, "num_groups": 2, "kernel_size": 3, "stride": 2,
         "release": "2023"},
    ],
}  # fmt: skip
DAT_PP = {
    "name": "dat_pp_nano",
    "stages": [
        {"blocks": "ND", "embed_dims": 16, "num_heads": 2, "kernel_size": 4, "stride": 4, "release": "2023",
         "lpu": True, "conv_mlp": True},
    ],
}  # fmt: skip


def write_classifier(path, backbone, img_size=64):
    config = from_dict(
        ClassificationConfig,
        {"model": {"backbone": backbone}, "data": {"root": "nowhere", "img_size": img_size}},
        "test",
    )
    torch.manual_seed(0)
    model = build_classifier(config.model.backbone, len(NAMES), weights=False)
    state = {"kind": "classification", "config": to_dict(config), "class_names": NAMES}
    save_checkpoint(path, {**state, "state_dict": model.state_dict()})
    return path


@pytest.mark.parametrize(
    "backbone", [DAT, DAT_PLUS, DAT_PP, {"name": "test_resnet"}], ids=["dat", "dat-plus", "dat-pp", "resnet"]
)
def test_onnx_gives_torchs_logits_of_any_batch_and_size(tmp_path, backbone):
    path = write_classifier(tmp_path / "best.pth", backbone)
    dat("classify", "export", path, "--out", tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    classifier = Classifier.from_checkpoint(path, device="cpu")
    data = classifier.config.data
    mean, std = (torch.tensor(values)[:, None, None] for values in (data.mean, data.std))
    # of sizes that the command has not seen, of maps smaller than windows and neighbourhoods too
    for shape in ((3, 3, 90, 75), (1, 3, 20, 131)):
        images = torch.randint(0, 256, shape, dtype=torch.uint8)
        logits, scores, labels = session.run(None, {"images": images.numpy()})
        with torch.no_grad():
            wanted = classifier.model((images / 255 - mean) / std)
        torch.testing.assert_close(torch.from_numpy(logits), wanted, rtol=0, atol=1e-4)
        torch.testing.assert_close(torch.from_numpy(scores), wanted.softmax(1).sort(1, descending=True).values)
        assert labels[:, 0].tolist() == wanted.argmax(1).tolist()


def test_a_program_of_torch_export_takes_images_below_the_usual_sizes(tmp_path):
    path = write_classifier(tmp_path / "best.pth", DAT_PP, img_size=32)
    dat("classify", "export", path, "--out", tmp_path / "model.pt2")
    exported = load_exported(tmp_path / "model.pt2", "classification", trust=True)
    classifier = Classifier.from_checkpoint(path, device="cpu")
    for shape in ((1, 3, 32, 32), (2, 3, 9, 70)):
        images = torch.randint(0, 256, shape, dtype=torch.uint8)
        torch.testing.assert_close(exported.run(images)[0], classifier.run(images)[0], rtol=0, atol=1e-4)


def test_a_model_of_one_size_keeps_it_and_its_file_says_how_to_crop(tmp_path, capsys):
    path = write_classifier(tmp_path / "best.pth", {"name": "test_vit"}, img_size=160)
    (tmp_path / "pictures").mkdir()
    noise = np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "pictures/noise.png")
    out = tmp_path / "model.onnx"
    dat("classify", "export", path, "--out", out, "--images", tmp_path / "pictures")
    assert "pictures, 160 pixels, the only size of the model, batch 1 and 2" in capsys.readouterr().out
    session = onnxruntime.InferenceSession(out)
    assert session.get_inputs()[0].shape == ["batch", 3, 160, 160]
    metadata = {name: json.loads(text) for name, text in session.get_modelmeta().custom_metadata_map.items()}
    assert metadata["class_names"] == NAMES
    assert (metadata["img_size"], metadata["crop_pct"], metadata["crop_mode"]) == (160, 0.875, "center")


def test_a_package_of_machine_code(tmp_path, capsys, monkeypatch):
    out = tmp_path / "model.pt2"
    path = write_classifier(tmp_path / "best.pth", {**DAT, "stages": [{**DAT["stages"][0], "blocks": "D"}]})
    dat("classify", "export", path, "--out", out, "--compile")
    assert "64 pixels, the only size of the package, batch 1 and 2" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="can run any code"):
        load_exported(out, "classification")
    exported = load_exported(out, "classification", trust=True)
    assert exported.metadata["class_names"] == NAMES
    exported_classifier = Classifier.from_checkpoint(out, trust=True)
    pictures = [Image.new("RGB", size, "red") for size in ((70, 90), (64, 64), (200, 50))]
    wanted = Classifier.from_checkpoint(path, device="cpu").predict(pictures)
    found = exported_classifier.predict(pictures)
    assert [one.label for one in found] == [one.label for one in wanted]
    assert [one.score for one in found] == pytest.approx([one.score for one in wanted], abs=1e-4)
    with pytest.raises(CheckpointError, match=r"images are \[2, 3, 64, 66\], should be \[1 to 4096 by 1, 3, 64, 64\]"):
        exported.run(torch.zeros(2, 3, 64, 66, dtype=torch.uint8))
    with pytest.raises(CheckpointError, match=r"images are torch\.float32, should be torch\.uint8"):
        exported.run(torch.zeros(2, 3, 64, 64))
    whole = out.read_bytes()
    for damaged in (whole[: len(whole) // 2], whole[:5000] + b"?" + whole[5001:]):
        (tmp_path / "damaged.pt2").write_bytes(damaged)
        with pytest.raises(CheckpointError, match="damaged"):
            load_exported(tmp_path / "damaged.pt2", "classification", trust=True)
    monkeypatch.setattr("torch.backends.cpu.get_cpu_capability", lambda: "VSX")
    with pytest.raises(CheckpointError, match=r"compiled for processors with .*, this one has VSX"):
        load_exported(out, "classification", trust=True)


def test_what_cannot_be_compiled_is_said_and_not_left(tmp_path, monkeypatch):
    path = write_classifier(tmp_path / "best.pth", {"name": "test_resnet"})
    with pytest.raises(ConfigError, match=r"model.onnx should end in .pt2 with --compile"):
        dat("classify", "export", path, "--out", tmp_path / "model.onnx", "--compile")

    def fail(program, inputs, metadata, path):
        path.write_bytes(b"a half")
        raise RuntimeError("no C++ compiler\nin PATH")

    monkeypatch.setattr("dat.export.export.write_compiled", fail)
    with pytest.raises(ExportError, match=r"AOTInductor cannot compile this model: no C\+\+ compiler in PATH"):
        dat("classify", "export", path, "--out", tmp_path / "model.pt2", "--compile")
    assert [file.name for file in tmp_path.iterdir()] == ["best.pth"]


def test_difference_of_labels_is_judged_by_their_scores():
    logits = torch.tensor([[2.0, 2.0, 0.0]])
    scores = logits.softmax(1).sort(1, descending=True).values
    assert export.difference((logits, scores, None), (logits, scores, torch.tensor([[1, 0, 2]])))["scores"] < 1e-6
    assert export.difference((logits, scores, None), (logits, scores, torch.tensor([[2, 0, 1]])))["scores"] > 0.1


class Repeated(torch.nn.Module):
    def forward(self, x):
        return x, 2 * x, 2 * x


def test_values_keep_their_names_where_the_optimizer_merges_them(tmp_path):
    graph = Graph(
        Repeated().eval(), {"x": {0: "batch"}}, {name: {0: "batch"} for name in ("same", "twice", "again")},
        (torch.ones(2, 3),), {}, lambda ours, theirs: {}, {},
    )  # fmt: skip
    _write_onnx(graph, tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    assert [value.name for value in session.get_inputs()] == ["x"]
    assert [value.name for value in session.get_outputs()] == ["same", "twice", "again"]
    x = np.arange(12, dtype=np.float32).reshape(4, 3)
    for found, wanted in zip(session.run(None, {"x": x}), (x, 2 * x, 2 * x), strict=True):
        np.testing.assert_array_equal(found, wanted)
