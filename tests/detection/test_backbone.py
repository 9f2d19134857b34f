"""timm models for images of one size, of fixed strides or of one stride become a detector's backbone."""

from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
import yaml
from commands import dat
from exporting import write_detector
from PIL import Image
from torch import nn

from dat.detection import Detector
from dat.detection.checkpoint import load_detector
from dat.detection.config import DetectionConfig, check_config
from dat.detection.models import build_model
from dat.detection.models.backbone import SimplePyramid, build_backbone, feature_maps, fit_sizes
from dat.detection.models.base import pad_to_multiple
from dat.detection.models.deformable_detr import DeformableDETRConfig
from dat.engine.checkpoint import load_checkpoint, save_checkpoint
from dat.engine.config import from_dict
from dat.layers import autocast as casts
from dat.utils.errors import ConfigError

SMALL = {"num_queries": 5, "embed_dim": 16, "num_heads": 2, "encoder_depth": 1, "decoder_depth": 1, "mlp_dim": 16}
SWIN = {"name": "swin_tiny_patch4_window7_224", "embed_dim": 8, "depths": [1, 1, 1, 1], "num_heads": [1, 1, 1, 1]}
HIERA = {"name": "hiera_tiny_224", "embed_dim": 8, "stages": [1, 1, 1, 1]}
MAXVIT = {"name": "maxvit_pico_rw_256", "img_size": 64}


@pytest.mark.parametrize(
    ("backbone", "multiple"),
    [
        ({"name": "test_resnet"}, 1),
        ({"name": "test_vit"}, 1),
        (SWIN, 16),
        (MAXVIT, 64),
        ({**HIERA, "img_size": 160}, 160),
    ],
    ids=["resnet", "vit", "swin", "maxvit", "hiera"],
)
def test_images_of_odd_sizes_train(backbone, multiple):
    torch.manual_seed(0)
    model = build_model(DeformableDETRConfig(backbone=backbone, **SMALL), 3)
    assert model.pad_multiple == multiple
    for height, width in ((97, 150), (151, 70)):
        outputs = model(torch.randn(1, 3, height, width))
        outputs["pred_logits"].sum().backward()
    first = next(p for p in model.backbone.parameters() if p.requires_grad)
    assert first.grad.abs().sum() > 0


class Precise(nn.Module):
    """A user's backbone that works in float32 under autocast."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 16, 16, 16)
        self.feature_info = SimpleNamespace(channels=lambda: [16], reduction=lambda: [16])

    def forward(self, x):
        with torch.autocast(x.device.type, enabled=False):
            return [self.conv(x)]


def test_under_autocast_weights_of_resnets_are_cast_together_and_those_of_others_left_alone(monkeypatch):
    seen, original = [], casts._Cast.apply
    monkeypatch.setattr(
        casts._Cast, "apply", lambda dtype, *tensors: seen.append(len(tensors)) or original(dtype, *tensors)
    )
    resnet = timm.create_model("resnet10t", features_only=True)
    convolutions = sum(isinstance(layer, nn.Conv2d) for layer in resnet.modules())
    with torch.autocast("cpu", torch.bfloat16):
        feature_maps(resnet, torch.randn(2, 3, 32, 32))[-1].sum().backward()
        assert seen == [convolutions]
        assert all(parameter.grad is not None for parameter in resnet.parameters())
        feature_maps(Precise(), torch.randn(1, 3, 32, 32))[0].sum().backward()
    assert len(seen) == 1


def test_normed_maps_of_a_swin_are_recomputed_alike():
    torch.manual_seed(0)
    backbone = build_backbone({**SWIN, "depths": [2, 2, 2, 2], "drop_path_rate": 0.0}, norm_maps=True).train()
    assert [x.shape[1:] for x in backbone(torch.zeros(1, 3, 96, 160))] == [(16, 12, 20), (32, 6, 10), (64, 3, 5)]
    gradients = []
    for recompute in (False, True):
        backbone.set_grad_checkpointing(recompute)
        backbone.zero_grad()
        torch.manual_seed(1)
        sum(x.exp().sum() for x in backbone(torch.randn(1, 3, 96, 160))).backward()
        gradients.append([p.grad.clone() for p in backbone.parameters()])
    assert all(grad.abs().sum() > 0 for grad in gradients[0])
    torch.testing.assert_close(*gradients)
    with pytest.raises(ConfigError, match=r"model.norm_maps is true, should be false: test_resnet is no Swin"):
        build_backbone({"name": "test_resnet"}, norm_maps=True)


def test_the_mask_follows_the_padding():
    torch.manual_seed(0)
    model = build_model(DeformableDETRConfig(backbone=SWIN, **SMALL), 3).eval()
    images, mask = torch.randn(2, 3, 97, 150), torch.zeros(2, 97, 150, dtype=torch.bool)
    mask[0, 60:] = True
    padded, larger = pad_to_multiple(images, mask, 16)
    assert padded.shape[-2:] == (112, 160)
    assert larger[1, :97, :150].logical_not().all()
    assert larger.sum() == mask.sum() + 2 * (112 * 160 - 97 * 150)
    with torch.no_grad():
        found, wanted = model(images, mask), model(padded, larger)
    assert torch.equal(found["pred_boxes"], wanted["pred_boxes"])


def test_weights_do_not_depend_on_what_any_size_needs():
    plain = timm.create_model("test_vit", features_only=True).state_dict()
    found = build_backbone({"name": "test_vit", "out_indices": [-1]}).state_dict()
    assert {name: value.shape for name, value in found.items()} == {name: value.shape for name, value in plain.items()}


def test_arguments_of_the_user_stay():
    with pytest.raises(ConfigError, match=r"takes images of 224x224 pixels only: set model.backbone.img_size to"):
        fit_sizes({**SWIN, "strict_img_size": True, "dynamic_img_size": False})
    assert fit_sizes({**SWIN, "strict_img_size": False}).arguments.keys() == {"dynamic_img_size"}


def test_a_model_of_one_size_is_refused_before_anything_is_written(config_file, tmp_path):
    def train(backbone):
        dat("detect", "train", config_file, f"model.backbone={yaml.safe_dump(backbone, default_flow_style=True)}")

    with pytest.raises(
        ConfigError, match=r"'hiera_tiny_224' takes images of 224x224 pixels only: set model.backbone.im"
    ):
        train(HIERA)
    with pytest.raises(
        ConfigError, match=r"model.backbone.img_size is 64, should be at least .* 96: hiera_tiny_224 takes"
    ):
        train({**HIERA, "img_size": 64})
    with pytest.raises(ConfigError, match=r"'efficientformer_l1' takes images of 224x224 pixels only: choose another"):
        train({"name": "efficientformer_l1", "depths": [1, 1, 1, 1], "embed_dims": [8, 8, 8, 8]})
    with pytest.raises(ConfigError, match=r"'img_size': 100.* fails on images of every size .* multiple of 32"):
        train({**HIERA, "img_size": 100})
    assert not (tmp_path / "run").exists()
    config = {"backbone": {**HIERA, "img_size": 96}, **SMALL}
    check_config(from_dict(DetectionConfig, yaml.safe_load(config_file.read_text()) | {"model": config}, "test"))


@pytest.mark.parametrize(
    ("patch", "sizes"),
    [(8, [8, 4, 2]), (16, [8, 4, 2]), (32, [8, 4, 2]), (14, [10, 5, 3])],
    ids=lambda value: str(value),
)
def test_a_plain_vit_gives_a_pyramid(patch, sizes):
    backbone = build_backbone({"name": "test_vit", "patch_size": patch})
    assert isinstance(backbone, SimplePyramid)
    maps = backbone(torch.randn(1, 3, 64, 64))
    assert [x.shape[1] for x in maps] == backbone.feature_info.channels()
    assert [x.shape[-1] for x in maps] == sizes
    scale = patch / 16 if patch == 14 else 1
    assert backbone.feature_info.reduction() == [8 * scale, 16 * scale, 32 * scale]


def test_a_pyramid_of_four_maps_starts_at_stride_4():
    backbone = build_backbone({"name": "test_vit"}, num_maps=4)
    assert backbone.feature_info.reduction() == [4, 8, 16, 32]
    assert [x.shape[-1] for x in backbone(torch.randn(1, 3, 64, 64))] == [16, 8, 4, 2]


def test_chosen_maps_of_a_plain_vit_stay():
    assert not isinstance(build_backbone({"name": "test_vit"}, num_maps=1), SimplePyramid)
    backbone = build_backbone({"name": "test_vit", "out_indices": [2, 3]})
    assert backbone.feature_info.reduction() == [16, 16]


def test_a_plain_vit_without_pyramid_of_an_earlier_version_loads(tmp_path):
    path = write_detector(tmp_path / "old.pth", backbone={"name": "test_vit", "out_indices": [-3, -2, -1]})
    state = load_checkpoint(path)
    del state["config"]["model"]["backbone"]["out_indices"]
    save_checkpoint(path, state)
    assert load_detector(path, torch.device("cpu")).model.backbone.feature_info.reduction() == [16, 16, 16]


@pytest.mark.filterwarnings("ignore:# The axis name")
def test_a_detector_on_a_plain_vit_trains_predicts_and_is_exported(config_file, tmp_path):
    dat(
        "detect",
        "train",
        config_file,
        "model.backbone={name: test_vit, depth: 3}",
        *("model.num_levels=3", "train.epochs=1", "train.layer_decay=0.7"),
        *("model.two_stage=false", "model.box_refine=false", "model.encoder_depth=0", "model.decoder_depth=1"),
    )
    checkpoint, image = tmp_path / "run/best.pth", Image.fromarray(np.full((70, 51, 3), 90, np.uint8))
    found = Detector.from_checkpoint(checkpoint, device="cpu").predict(image, threshold=0)
    assert found.boxes.isfinite().all()
    dat("detect", "export", checkpoint, "--out", tmp_path / "model.onnx", "--sizes", "48", "64")
    exported = Detector.from_checkpoint(tmp_path / "model.onnx").predict(image, threshold=0)
    torch.testing.assert_close(exported.scores, found.scores, atol=1e-4, rtol=0)


def is_frozen(checkpoint):
    state = load_checkpoint(checkpoint)
    counters = any("backbone" in name and name.endswith("num_batches_tracked") for name in state["state_dict"])
    assert state["config"]["model"]["freeze_batch_norm"] is not counters
    return not counters


def test_batch_norm_is_frozen_only_with_weights(config_file, tmp_path):
    run, frozen = tmp_path / "run", "model.freeze_batch_norm=true"
    dat("detect", "train", config_file, "train.epochs=1", frozen)
    assert not is_frozen(run / "best.pth")
    assert "test_resnet from random weights, " in (run / "train.log").read_text().splitlines()[1]
    dat("detect", "train", config_file, "train.epochs=2", frozen, "train.resume=true")
    assert not is_frozen(run / "last.pth")
    assert Detector.from_checkpoint(run / "best.pth", device="cpu").evaluate().keys() >= {"AP"}
    classifier = timm.create_model("test_resnet")
    save_checkpoint(tmp_path / "classifier.pth", {"kind": "classification", "state_dict": classifier.state_dict()})
    weights = f"model.backbone.checkpoint_path={tmp_path / 'classifier.pth'}"
    dat("detect", "train", config_file, "train.epochs=1", frozen, weights, f"output={tmp_path / 'started'}")
    assert is_frozen(tmp_path / "started/best.pth")
    assert "random weights" not in (tmp_path / "started/train.log").read_text()


def test_a_run_that_froze_random_batch_norm_resumes(config_file, tmp_path, monkeypatch):
    """As earlier versions wrote it: the statistics are buffers without counters."""
    frozen = "model.freeze_batch_norm=true"
    with monkeypatch.context() as patched:
        patched.setattr("dat.detection.trainer.settle_batch_norm", lambda model, resume: model)
        dat("detect", "train", config_file, "train.epochs=1", frozen)
    assert is_frozen(tmp_path / "run/last.pth")
    dat("detect", "train", config_file, "train.epochs=2", frozen, "train.resume=true")
    assert is_frozen(tmp_path / "run/last.pth")
    assert load_checkpoint(tmp_path / "run/last.pth")["epoch"] == 2


@pytest.mark.parametrize(
    ("argument", "value", "message"),
    [
        ("out_indices", [-1, -1], r"out_indices is \[-1, -1\], should list maps in the order"),
        ("out_indices", [-1, 3], r"out_indices is \[-1, 3\], should list maps in the order"),
        ("out_indices", [4, -1], r"fails on images of every size"),
        ("out_indices", [], r"out_indices is \[\], should list maps in the order"),
        ("out_indices", 2, r"out_indices is 2, should list maps in the order"),
        ("out_indices", "null", r"out_indices is None, should list maps in the order"),
        ("out_indices", [99], r"timm cannot make 'test_resnet' with .*99"),
        ("drop_path_rate", 2, r"model.backbone.drop_path_rate is 2, should be 0 to 1"),
        ("drop_path_rate", float("nan"), r"model.backbone.drop_path_rate is nan, should be 0 to 1"),
        ("in_chans", 1, r"in_chans is 1, images have 3 channels"),
    ],
)
def test_arguments_that_would_fail_in_training_are_refused_before(config_file, tmp_path, argument, value, message):
    with pytest.raises(ConfigError, match=message):
        dat("detect", "train", config_file, f"model.backbone.{argument}={value}".replace("nan", ".nan"))
    assert not (tmp_path / "run").exists()
