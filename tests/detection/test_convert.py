"""Official weights as a checkpoint of this project: classes by their ids."""

import json

import pytest
import torch
from commands import dat
from test_official_load import KINDS, config, new_model, official_names

from dat.detection import convert
from dat.detection.checkpoint import load_detector
from dat.detection.config import DetectionConfig
from dat.detection.data import read_categories
from dat.engine.config import save_config
from dat.utils.errors import CheckpointError

IDS = (2, 3, 6)


@pytest.fixture
def annotations(tmp_path):
    path = tmp_path / "instances.json"
    categories = [{"id": i, "name": f"class {i}"} for i in reversed(IDS)]
    path.write_text(json.dumps({"images": [], "annotations": [], "categories": categories}))
    return path


@pytest.mark.parametrize("kind", KINDS)
def test_scores_of_kept_classes_are_those_of_their_ids(kind, tmp_path, annotations):
    theirs = new_model(1, num_classes=7, **KINDS[kind]).eval()
    for name, tensor in theirs.state_dict().items():
        if name.endswith("running_var"):
            tensor.abs_()
    torch.save({"model": official_names(theirs)}, tmp_path / "official.pth")
    save_config(DetectionConfig(model=config(**KINDS[kind])), tmp_path / "config.yaml")
    out = tmp_path / "converted.pth"
    files = (tmp_path / "config.yaml", tmp_path / "official.pth")
    dat("detect", "convert", *files, "--annotations", annotations, "--out", out, "data.root=elsewhere")
    detector = load_detector(out, torch.device("cpu"))
    assert [(c.id, c.name) for c in detector.categories] == [(i, f"class {i}") for i in IDS]
    assert detector.config.data.root == "elsewhere"
    images = torch.randn(1, 3, 256, 320)
    with torch.no_grad():
        ours, expected = detector.model(images), theirs(images)
    rows = [*IDS, 7] if kind == "detr" else list(IDS)
    torch.testing.assert_close(ours["pred_logits"], expected["pred_logits"][..., rows])
    torch.testing.assert_close(ours["pred_boxes"], expected["pred_boxes"])


@pytest.mark.parametrize(
    ("classes", "message"), [(6, "has classes for the ids 0 to 5, the annotations have the id 6"), (0, "not of a DETR")]
)
def test_weights_without_the_classes_are_refused(classes, message, tmp_path, annotations):
    state = official_names(new_model(1, num_classes=6)) if classes else {"conv1.weight": torch.ones(1)}
    torch.save({"model": state}, tmp_path / "official.pth")
    categories = read_categories(annotations)
    with pytest.raises(CheckpointError, match=message):
        convert.convert(DetectionConfig(model=config()), tmp_path / "official.pth", categories)
