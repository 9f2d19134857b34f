"""A detector of transformers by its name on the hub, from a cache laid out as huggingface_hub's, without a network."""

import json

import huggingface_hub
import numpy as np
import pytest
import torch
from commands import dat
from PIL import Image
from test_official_transformers import CASES, pair

from dat.detection import Detector
from dat.engine.checkpoint import load_checkpoint
from dat.utils.errors import CheckpointError

NAMES = {0: "N/A", 1: "person", 2: "N/A", 3: "cat", 4: "dog"}


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """Puts a model into the cache as somebody/NAME."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))

    def add(name, **options):
        theirs, _ = pair(**options)
        theirs.config.id2label = NAMES
        folder = tmp_path / f"hub/models--somebody--{name}"
        theirs.save_pretrained(folder / "snapshots/abc")
        (folder / "refs").mkdir()
        (folder / "refs/main").write_text("abc")
        return theirs, folder / "snapshots/abc"

    return add


@pytest.mark.parametrize("case", [name for name in CASES if name != "single scale"])
def test_it_detects_as_transformers_does(case, cache):
    theirs, _ = cache("detector", **CASES[case])
    detector = Detector.from_checkpoint("hf-hub:somebody/detector", device="cpu")
    assert [(c.id, c.name) for c in detector.categories] == [(1, "person"), (3, "cat"), (4, "dog")]
    images = torch.randn(2, 3, 96, 128)
    with torch.no_grad():
        expected, found = theirs(pixel_values=images), detector.model(images)
    torch.testing.assert_close(found["pred_boxes"], expected.pred_boxes, atol=1e-5, rtol=0)
    kept = [1, 3, 4, 5] if CASES[case]["kind"] == "detr" else [1, 3, 4]
    torch.testing.assert_close(found["pred_logits"], expected.logits[..., kept], atol=1e-4, rtol=0)
    assert detector.predict(Image.fromarray(np.zeros((40, 50, 3), np.uint8)), threshold=0).class_names


def test_it_is_fine_tuned_on_other_classes(cache, config_file, tmp_path):
    cache("detector", kind="deformable", timm_names=True, box_refine=True, two_stage=True)
    model = {"embed_dim": 32, "mlp_dim": 24, "num_queries": 9, "backbone": "{name: test_resnet}"}
    arguments = [f"model.{key}={value}" for key, value in model.items()]
    arguments += [
        f"data.{key}" for key in ("train.sizes=[96]", "train.max_size=160", "val.size=96", "val.max_size=160")
    ]
    start = "model.checkpoint_path=hf-hub:somebody/detector"
    dat("detect", "train", config_file, start, "model.freeze_batch_norm=true", "train.steps=1", *arguments)
    state = load_checkpoint(tmp_path / "run/last.pth")
    assert len(state["state_dict"]["class_embed.0.bias"]) == len(state["class_names"])
    assert "starts from hf-hub:somebody/detector" in (tmp_path / "run/train.log").read_text()


def test_files_that_are_missing_or_of_another_model_are_named(cache):
    with pytest.raises(CheckpointError, match=r"fetch https://huggingface.co/somebody/none/resolve/v1/best.pth .of tr"):
        Detector.from_checkpoint("hf-hub:somebody/none@v1", device="cpu")
    _, folder = cache("detector", kind="detr")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "yolos"}))
    with pytest.raises(CheckpointError, match=r"config.json: model_type is 'yolos', should be detr or deformable_detr"):
        Detector.from_checkpoint("hf-hub:somebody/detector", device="cpu")
    for key, value, wanted in (
        ("activation_function", "gelu", "relu"),
        ("decoder_attention_heads", 3, config["encoder_attention_heads"]),
    ):
        (folder / "config.json").write_text(json.dumps(config | {key: value}))
        with pytest.raises(CheckpointError, match=rf"config.json: {key} is {value!r}, should be {wanted!r}"):
            Detector.from_checkpoint("hf-hub:somebody/detector", device="cpu")
    (folder / "config.json").write_text(json.dumps(config | {"d_model": 48}))
    with pytest.raises(CheckpointError, match=r"model.safetensors: of another architecture: "):
        Detector.from_checkpoint(folder / "model.safetensors", device="cpu")
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"model.safetensors: has no config.json beside it"):
        Detector.from_checkpoint(folder / "model.safetensors", device="cpu")
