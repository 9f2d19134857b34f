import pytest
import timm
import torch

from dat.detection.config import TrainConfig
from dat.detection.models import build_model
from dat.detection.models.backbone import build_backbone
from dat.detection.models.deformable_detr import DeformableDETRConfig
from dat.detection.param_groups import backbone_scales, parameter_groups

SMALL = {
    "num_queries": 5,
    "drop_rate": 0.0,
    "embed_dim": 16,
    "num_heads": 2,
    "encoder_depth": 1,
    "decoder_depth": 1,
    "mlp_dim": 16,
}


def small(name="dat_nano", classes=3, **backbone):
    return build_model(
        DeformableDETRConfig(backbone={"name": name, **backbone}, two_stage=True, box_refine=True, **SMALL), classes
    )


@pytest.mark.parametrize("name", ["dat_nano", "dat_pp_nano", "resnet18", "convnext_atto"])
def test_rates_of_backbone_layers_fall_towards_the_image(name):
    backbone = build_backbone({"name": name})
    scales = backbone_scales(backbone, {"name": name, "pretrained": True, "out_indices": [1, 2, 3]}, 0.5)
    assert scales.keys() == {name for name, _ in backbone.named_parameters()}
    # as timm's own groups of the whole classifier say
    groups = timm.optim.param_groups_layer_decay(model := timm.create_model(name), layer_decay=0.5)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    timms = {names[id(p)]: group["lr_scale"] for group in groups for p in group["params"]}
    known = {name.replace("_", "."): scale for name, scale in timms.items()}
    for own, scale in scales.items():
        assert scale == known[own.removeprefix("model.").replace("_", ".")]
    assert min(scales.values()) == min(timms.values())


def test_the_optimizer_scales_layers_of_the_backbone_alone():
    model = small()
    train = TrainConfig(layer_decay=0.5, backbone_lr_scale=0.1)
    groups = parameter_groups(model, train, 1.0, {"name": "dat_nano"})
    scales = {id(p): group["lr_scale"] for group in groups for p in group["params"]}
    assert scales[id(model.enc_output.weight)] == 1
    of_backbone = {scales[id(p)] for p in model.backbone.parameters()}
    assert len(of_backbone) > 3
    assert max(of_backbone) < 0.1
    plain = parameter_groups(model, TrainConfig(backbone_lr_scale=0.1), 1.0, {"name": "dat_nano"})
    assert {group["lr_scale"] for group in plain} == {0.1, 1.0}


@pytest.mark.parametrize("name", ["dat_nano", "resnet18", "test_vit"])
def test_recomputed_layers_have_the_same_gradients(name):
    torch.manual_seed(0)
    model = small(name).train()
    images = torch.randn(1, 3, 128, 128)
    found = []
    for recompute in (False, True):
        if recompute:
            model.set_grad_checkpointing()
        model.zero_grad()
        outputs = model(images)
        (outputs["pred_logits"].sum() + outputs["pred_boxes"].sum()).backward()
        found.append([parameter.grad for parameter in model.parameters() if parameter.grad is not None])
    for gradient, recomputed in zip(*found, strict=True):
        torch.testing.assert_close(gradient, recomputed)
    assert any(getattr(module, "grad_checkpointing", False) for module in model.modules())
