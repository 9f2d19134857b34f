"""transformers' DETR and Deformable DETR with random weights, converted, find the same boxes."""

import re

import pytest
import timm
import torch
from torch import nn
from transformers import (
    DeformableDetrConfig,
    DeformableDetrForObjectDetection,
    DetrConfig,
    DetrForObjectDetection,
    ResNetConfig,
    TimmBackboneConfig,
)

from dat.detection import DETR, DeformableDETR, official

LAYERS = {"encoder_layers": 1, "decoder_layers": 2, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "num_queries": 9}
HEADS = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "num_labels": 5}
OURS = {"embed_dim": 32, "num_heads": 2, "encoder_depth": 1, "decoder_depth": 2, "mlp_dim": 24, "num_queries": 9}


def their_backbone(timm_names, stages):
    if timm_names:
        return TimmBackboneConfig(backbone="test_resnet", out_indices=[stage + 1 for stage in stages])
    return ResNetConfig(
        embedding_size=64,
        hidden_sizes=[8, 16, 24, 32],
        depths=[1, 1, 2, 1],
        layer_type="bottleneck",
        out_features=[f"stage{stage + 1}" for stage in stages],
    )


def our_backbone(timm_names, stages):
    indices = [stage + 1 for stage in stages]
    if timm_names:
        return timm.create_model("test_resnet", features_only=True, out_indices=indices)
    return timm.create_model(
        "resnet50", features_only=True, out_indices=indices, layers=(1, 1, 2, 1), channels=(2, 4, 6, 8)
    )


def pair(kind, timm_names=False, stages=(1, 2, 3), **options):
    """Their model and ours, not yet with its weights. `stages` count from 0."""
    torch.manual_seed(0)
    backbone = their_backbone(timm_names, stages if kind == "deformable" else stages[-1:])
    if kind == "detr":
        theirs = DetrForObjectDetection(DetrConfig(backbone_config=backbone, d_model=32, **LAYERS, **HEADS))
        ours = DETR(our_backbone(timm_names, stages[-1:]), 5, **OURS)
    else:
        levels = options.get("num_levels", 4)
        config = DeformableDetrConfig(
            backbone_config=backbone,
            d_model=32,
            **LAYERS,
            **HEADS,
            num_feature_levels=levels,
            with_box_refine=options.get("box_refine", False),
            two_stage=options.get("two_stage", False),
            two_stage_num_proposals=9,
        )
        theirs = DeformableDetrForObjectDetection(config)
        ours = DeformableDETR(our_backbone(timm_names, stages), 5, **OURS, **options)
    shake(theirs)
    return theirs.eval(), ours.eval()


def shake(model):
    """Random weights and statistics, for much starts constant: batch norm, offsets, attention, boxes."""
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_floating_point() and tensor.dim() == 1:
            nn.init.normal_(tensor, tensor.detach().mean().item(), 0.1)
    for name, parameter in model.named_parameters():
        if "sampling_offsets" in name or "attention_weights" in name or "bbox" in name:
            nn.init.normal_(parameter, parameter.detach().mean().item(), 0.1)


CASES = {
    "detr": {"kind": "detr"},
    "detr, timm": {"kind": "detr", "timm_names": True},
    "deformable": {"kind": "deformable"},
    "deformable, timm": {"kind": "deformable", "timm_names": True},
    "single scale": {"kind": "deformable", "stages": (3,), "num_levels": 1},
    "refined": {"kind": "deformable", "box_refine": True},
    "two-stage": {"kind": "deformable", "box_refine": True, "two_stage": True},
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_same_boxes(case):
    theirs, ours = pair(**case)
    ours.load_state_dict(official.convert(theirs.state_dict(), ours), strict=True)
    images = torch.randn(2, 3, 96, 128)
    mask = torch.zeros(2, 96, 128, dtype=torch.bool)
    mask[0, 64:], mask[0, :, 96:] = True, True
    with torch.no_grad():
        expected = theirs(pixel_values=images, pixel_mask=(~mask).long())
        found = ours(images, mask)
    torch.testing.assert_close(found["pred_boxes"], expected.pred_boxes, atol=1e-5, rtol=0)
    torch.testing.assert_close(found["pred_logits"], expected.logits, atol=1e-4, rtol=0)
    assert expected.pred_boxes.std() > 0.01


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_names_in_published_files_mean_the_same(case):
    """Files written before transformers 5 have other names, and counters of batch norm that are not used."""
    theirs, ours = pair(**case)
    state = theirs.state_dict()
    old = {}
    for name, tensor in state.items():
        name = name.replace("model.backbone.model.", "model.backbone.conv_encoder.model.")
        name = re.sub(r"(layers\.\d+)\.mlp\.fc", r"\1.fc", name).replace(".o_proj.", ".out_proj.")
        old[name] = tensor
        if name.endswith("running_mean"):
            old[name.replace("running_mean", "num_batches_tracked")] = torch.tensor(7)
    assert old.keys() != state.keys()
    converted, expected = official.convert(old, ours), official.convert(state, ours)
    ours.load_state_dict(converted, strict=True)
    assert converted.keys() == expected.keys()
    assert all(t.equal(expected[name]) for name, t in converted.items() if not name.endswith("num_batches_tracked"))


def test_projections_come_together():
    theirs, ours = pair("detr")
    state = theirs.state_dict()
    del state["model.encoder.layers.0.self_attn.k_proj.weight"]
    with pytest.raises(ValueError, match=r"self_attn\.\w_proj.weight comes without the other two of q_proj"):
        official.convert(state, ours)
