"""Weights of a classifier under a model with another head, or none."""

import pytest
import timm
import torch

from dat.classification.config import ModelConfig
from dat.engine.backbones import (
    classifier_weights,
    create_timm_model,
    load_classifier_weights,
    starts_from_weights,
    without_weights,
)
from dat.utils.errors import CheckpointError, ConfigError


@pytest.fixture
def saved(tmp_path):
    model = timm.create_model("test_convnext", num_classes=3)
    torch.save({"state_dict": model.state_dict()}, tmp_path / "x.pth")
    return model.state_dict(), tmp_path / "x.pth"


def model(num_classes):
    return timm.create_model("test_convnext", num_classes=num_classes)


def test_the_last_layer_is_kept_where_it_fits(saved):
    expected, path = saved
    same = model(3)
    load_classifier_weights(same, path)
    assert all(torch.equal(value, expected[name]) for name, value in same.state_dict().items())


def test_the_last_layer_stays_new_with_another_number_of_classes(saved):
    expected, path = saved
    other = model(5)
    new = {name: value.clone() for name, value in other.state_dict().items()}
    load_classifier_weights(other, path)
    for name, value in other.state_dict().items():
        assert torch.equal(value, new[name] if name.startswith("head.fc.") else expected[name]), name


def test_a_headless_model_takes_the_rest(saved):
    expected, path = saved
    found = classifier_weights({"name": "test_convnext", "out_indices": [1], "checkpoint_path": "gone.pth"}, path)
    assert found.keys() == model(0).state_dict().keys()
    assert all(torch.equal(value, expected[name]) for name, value in found.items())


def test_unfit_files_are_named(saved, tmp_path):
    state, path = saved
    with pytest.raises(ConfigError, match=r"model.backbone.checkpoint_path: no such file: .*none.pth"):
        load_classifier_weights(model(3), tmp_path / "none.pth")
    for name in ("bad.pth", "bad.safetensors"):
        (tmp_path / name).write_text("hello")
        with pytest.raises(CheckpointError, match=rf"{name}: not a checkpoint, or a truncated one"):
            load_classifier_weights(model(3), tmp_path / name)
    with pytest.raises(CheckpointError, match=r"x.pth: of another architecture"):
        load_classifier_weights(timm.create_model("test_resnet", num_classes=3), path)
    torch.save({f"backbone.{name}": value for name, value in state.items()}, tmp_path / "detector.pth")
    with pytest.raises(CheckpointError, match=r"detector.pth: is of a detector"):
        load_classifier_weights(model(3), tmp_path / "detector.pth")


def test_pickled_objects_are_never_run(tmp_path):
    class Attack:
        def __reduce__(self):
            return (open, (str(tmp_path / "owned"), "w"))

    torch.save({"state_dict": Attack()}, tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match="not a checkpoint"):
        load_classifier_weights(model(3), tmp_path / "x.pth")
    assert not (tmp_path / "owned").exists()


def test_what_fetches_weights_is_left_out():
    assert without_weights({"name": "x", "pretrained": True, "checkpoint_path": "y", "depth": 2}) == {
        "name": "x",
        "depth": 2,
    }


def test_a_model_without_pretrained_weights_names_some_that_have_them():
    with pytest.raises(ConfigError, match=r"timm has no weights of 'dat_tiny'; set model.backbone.checkpoint_path"):
        create_timm_model({"name": "dat_tiny", "pretrained": True})
    with pytest.raises(ConfigError, match=r"timm has no weights of 'resnet18.none'; there are some of resnet18\.\w+"):
        create_timm_model({"name": "resnet18.none", "pretrained": True})
    name = next(name for name in timm.list_models("vit_*") if not timm.models.is_model_pretrained(name))
    with pytest.raises(ConfigError, match=rf"timm has no weights of '{name}'; there are some of vit_"):
        create_timm_model({"name": name, "pretrained": True})


def test_weights_to_start_from_are_recognised():
    models = [ModelConfig({"name": "x"}), ModelConfig({"name": "x", "pretrained": False})]
    assert not any(starts_from_weights(model) for model in models)
    models = [ModelConfig({"name": "x", "pretrained": True}), ModelConfig({"name": "x", "checkpoint_path": "x.pth"})]
    assert all(starts_from_weights(model) for model in models)


def test_without_a_network_the_error_says_what_to_fetch(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    place = "https://huggingface.co/timm/test_convnext.r160_in1k/resolve/main/model.safetensors"
    message = f"cannot be downloaded; fetch {place} and set model.backbone.checkpoint_path to the file, without"
    with pytest.raises(ConfigError, match=message):
        create_timm_model({"name": "test_convnext", "pretrained": True})
