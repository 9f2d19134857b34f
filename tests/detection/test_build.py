import pytest
import timm
import torch

from dat.detection.checkpoint import load_detector
from dat.detection.models import build_model
from dat.detection.models.backbone import build_backbone
from dat.detection.models.deformable_detr import DeformableDETRConfig
from dat.engine.checkpoint import save_checkpoint
from dat.utils.errors import CheckpointError, ConfigError

SMALL = {"num_queries": 5, "embed_dim": 16, "num_heads": 2, "encoder_depth": 1, "decoder_depth": 1, "mlp_dim": 16}


@pytest.fixture
def classifier(tmp_path):
    """A classifier's checkpoint and model: dat_nano, for another image size than the detector's."""
    torch.manual_seed(0)
    model = timm.create_model("dat_nano", num_classes=7, img_size=64)
    path = tmp_path / "classifier.pth"
    save_checkpoint(path, {"kind": "classification", "state_dict": model.state_dict()})
    return path, model.eval()


def test_a_classifiers_weights_give_a_classifiers_features(classifier):
    path, model = classifier
    backbone = build_backbone({"name": "dat_nano", "img_size": 64, "checkpoint_path": str(path)}).eval()
    assert backbone.feature_info.reduction() == [8, 16, 32]
    images = torch.randn(2, 3, 64, 64)
    expected = model.forward_intermediates(images, indices=[1, 2, 3], intermediates_only=True)
    for found, wanted in zip(backbone(images), expected, strict=True):
        torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("name", ["dat_nano", "resnet18"])
def test_a_backbone_gives_strides_8_16_and_32_however_many_levels_it_has(name):
    assert build_backbone({"name": name}).feature_info.reduction() == [8, 16, 32]


def test_averaged_weights_are_preferred(classifier, tmp_path):
    _, model = classifier
    state = model.state_dict()
    averaged = {key: value + 1 for key, value in state.items()}
    path = tmp_path / "both.pth"
    save_checkpoint(path, {"kind": "classification", "state_dict": state, "state_dict_ema": averaged})
    backbone = build_backbone({"name": "dat_nano", "img_size": 64, "checkpoint_path": str(path)})
    key = next(key for key in backbone.state_dict() if key.endswith("patch_embed.norm.weight"))
    assert torch.equal(backbone.state_dict()[key], state["patch_embed.norm.weight"] + 1)


def test_weights_of_another_image_size_are_resampled(classifier):
    path, model = classifier
    backbone = build_backbone({"name": "dat_nano", "img_size": 128, "checkpoint_path": str(path)})
    source = {f"model.{key}": value for key, value in model.state_dict().items()}
    resampled = [key for key, value in backbone.state_dict().items() if source[key].shape != value.shape]
    assert resampled
    assert all("table" in key for key in resampled)
    for key, value in backbone.state_dict().items():
        assert key in resampled or torch.equal(value, source[key])


@pytest.mark.parametrize("name", ["dat_tiny", "test_resnet"])
def test_weights_of_another_model_are_refused(classifier, name):
    with pytest.raises(CheckpointError, match=r"classifier.pth: of another architecture: \S*(it lacks)? ?\S+"):
        build_backbone({"name": name, "checkpoint_path": str(classifier[0])})


def test_missing_or_broken_backbone_weights_are_named(tmp_path):
    with pytest.raises(ConfigError, match=r"checkpoint_path: no such file: .*nothing.pth"):
        build_backbone({"name": "dat_nano", "checkpoint_path": str(tmp_path / "nothing.pth")})
    (tmp_path / "broken.pth").write_bytes(b"PK\x03\x04 truncated")
    with pytest.raises(CheckpointError, match=r"broken.pth: not a checkpoint, or a truncated one"):
        build_backbone({"name": "dat_nano", "checkpoint_path": str(tmp_path / "broken.pth")})


def test_batch_norm_of_the_backbone_is_frozen_on_request():
    config = DeformableDETRConfig(backbone={"name": "test_resnet"}, freeze_batch_norm=True, **SMALL)
    model = build_model(config, 3).train()
    assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in model.modules())
    before = {key: value.clone() for key, value in model.backbone.state_dict().items() if "running" in key}
    model(torch.randn(1, 3, 128, 128))
    assert before
    assert all(torch.equal(value, model.backbone.state_dict()[key]) for key, value in before.items())


def test_numbers_that_do_not_fit_are_one_line():
    with pytest.raises(ConfigError, match=r"model: embed_dim=16 should be a multiple"):
        build_model(DeformableDETRConfig(backbone={"name": "test_resnet"}, **SMALL | {"num_heads": 3}), 3)
    with pytest.raises(ConfigError, match=r"model.backbone.name: no timm model"):
        build_model(DeformableDETRConfig(backbone={"name": "dat_nan"}, **SMALL), 3)


def test_a_classifier_is_not_a_detector(classifier):
    with pytest.raises(CheckpointError, match=r"is a classification checkpoint, should be a detection checkpoint"):
        load_detector(classifier[0], torch.device("cpu"))
