import logging

import pytest
import timm
import torch
from timm.models import load_checkpoint, save_for_hf
from torch import nn

from dat.engine.backbones import load_classifier_weights
from dat.models.checkpoint import imagenet_22k_to_1k

NAMES = ["dat_nano", "dat_plus_nano", "dat_pp_nano"]


@pytest.fixture(params=NAMES)
def name(request):
    return request.param


@pytest.fixture
def nano(name):
    torch.manual_seed(0)
    return timm.create_model(name, num_classes=7).eval()


@pytest.fixture
def path(nano, tmp_path):
    path = tmp_path / "nano.pth"
    torch.save({"state_dict": nano.state_dict()}, path)
    return str(path)


@pytest.fixture
def image():
    return torch.randn(1, 3, 64, 64)


@pytest.mark.parametrize("name", [*NAMES, "dat_tiny.in1k"])
@pytest.mark.parametrize("features_only", [False, True])
def test_pretrained_explains_itself(name, features_only):
    with pytest.raises(RuntimeError, match=r"no stable address.*LeapLabTHU/DAT.*checkpoint_path=FILE") as error:
        timm.create_model(name, pretrained=True, features_only=features_only)
    assert "\n" not in str(error.value)


def test_checkpoint_path(nano, name, path, image):
    loaded = timm.create_model(name, num_classes=7, checkpoint_path=path).eval()
    torch.testing.assert_close(loaded(image), nano(image))
    other = timm.create_model(name, num_classes=7).eval()
    load_checkpoint(other, path)
    torch.testing.assert_close(other(image), nano(image))


def test_features_take_a_whole_checkpoint(nano, name, path, image):
    """By checkpoint_path, where pruned stages are left out, and by timm's pretrained weights; their own reload too."""
    extractor = timm.create_model(name, features_only=True, out_indices=(0, 2), checkpoint_path=path).eval()
    expected = nano.forward_intermediates(image, [0, 2], intermediates_only=True)
    for a, b in zip(extractor(image), expected, strict=True):
        torch.testing.assert_close(a, b)
    extractor.load_state_dict(extractor.state_dict())
    overlay = {"file": path, "num_classes": 7}
    whole = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, features_only=True).eval()
    torch.testing.assert_close(whole(image)[3], nano.forward_intermediates(image)[1][3])
    state = nano.state_dict()
    del state["stages.0.blocks.0.norm1.weight"]
    with pytest.raises(RuntimeError, match=r"Missing key.*stages\.0\.blocks\.0\.norm1\.weight"):
        extractor.load_state_dict(state)


def test_classifier_of_other_classes_is_replaced(nano, name, path, image, caplog):
    with caplog.at_level(logging.WARNING):
        other = timm.create_model(name, num_classes=3, checkpoint_path=path).eval()
    assert "the checkpoint has 7 classes: the model keeps its own 3" in caplog.text
    assert other(image).shape == (1, 3)
    torch.testing.assert_close(other.forward_features(image), nano.forward_features(image))
    bare = timm.create_model(name, num_classes=0, checkpoint_path=path).eval()
    torch.testing.assert_close(bare.forward_features(image), nano.forward_features(image))


def test_classifier_of_imagenet_22k(nano, name):
    """Values computed by the official class map, map_22kto1k.pth."""
    index = imagenet_22k_to_1k()
    assert len(index.unique()) == 1000
    assert index[[0, 1, 9, 718, 850, 999]].tolist() == [359, 368, 525, 9212, 5564, 21817]
    nano.head.fc = nn.Linear(256, 21841)
    loaded = timm.create_model(name)
    loaded.load_state_dict(nano.state_dict())
    torch.testing.assert_close(loaded.head.fc.weight, nano.head.fc.weight[index])
    torch.testing.assert_close(loaded.head.fc.bias, nano.head.fc.bias[index])


def test_fine_tuning_begins_with_the_rows_of_an_imagenet_22k_classifier(nano, name, tmp_path):
    """As model.backbone.checkpoint_path of configs/classification/*_22k_to_1k.yaml."""
    nano.head.fc = nn.Linear(256, 21843)
    torch.save({"model": nano.state_dict()}, tmp_path / "22k.pth")
    tuned = timm.create_model(name)
    load_classifier_weights(tuned, tmp_path / "22k.pth")
    torch.testing.assert_close(tuned.head.fc.weight, nano.head.fc.weight[imagenet_22k_to_1k()])
    torch.testing.assert_close(tuned.head.fc.bias, nano.head.fc.bias[imagenet_22k_to_1k()])


def test_tables_are_resampled(nano, name, path):
    larger = timm.create_model(name, num_classes=7, img_size=(320, 256), checkpoint_path=path)
    nano.set_input_size((320, 256))
    for a, b in zip(larger.parameters(), nano.parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_what_does_not_fit_is_an_error(nano):
    truncated = {key: value for key, value in nano.state_dict().items() if key != "norm.weight"}
    with pytest.raises(RuntimeError, match=r"norm\.weight"):
        nano.load_state_dict(truncated)
    with pytest.raises(RuntimeError, match=r"size mismatch for norm\.weight"):
        nano.load_state_dict(nano.state_dict() | {"norm.weight": torch.ones(3)})


def test_folder_of_the_hub(nano, name, tmp_path, image):
    save_for_hf(nano, tmp_path)
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    torch.testing.assert_close(again(image), nano(image))
    features = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, features_only=True).eval()
    torch.testing.assert_close(features(image)[3], nano.forward_intermediates(image)[1][3])
