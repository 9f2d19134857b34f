import pytest
import timm
import torch
import torchvision
from detr_inputs import FixedFeatures, load_fixture, part

from dat.detection import DeformableDETR, official

SMALL = {"embed_dim": 64, "num_heads": 4, "encoder_depth": 2, "decoder_depth": 2, "mlp_dim": 96, "num_queries": 20}


def small_model(box_refine=False, two_stage=False):
    maps = [torch.randn(1, 16, 4, 4), torch.randn(1, 32, 2, 2), torch.randn(1, 48, 1, 1)]
    return DeformableDETR(FixedFeatures(maps), 7, **SMALL, box_refine=box_refine, two_stage=two_stage)


@pytest.mark.parametrize(
    ("name", "box_refine"), [("deformable_detr_micro", False), ("deformable_detr_refine_micro", True)]
)
def test_covers_every_tensor(name, box_refine):
    state, model = part(load_fixture(name)[0], "state."), small_model(box_refine)
    converted = official.convert(state, model)
    assert converted.keys() == model.state_dict().keys()
    model.load_state_dict(converted, strict=True)
    assert model.bbox_embed[-1][4].weight.equal(state["bbox_embed.1.layers.2.weight"])


def test_names_of_two_stages():
    names = ["enc_output.weight", "pos_trans_norm.bias", "decoder.class_embed.2.bias"]
    converted = official.convert({f"transformer.{name}": torch.zeros(1) for name in names}, small_model(True, True))
    assert list(converted) == ["enc_output.weight", "pos_trans_norm.bias", "class_embed.2.bias"]
    assert converted.keys() <= small_model(True, True).state_dict().keys()


def test_heads_of_box_refinement_do_not_fit_one_for_all():
    state = part(load_fixture("deformable_detr_refine_micro")[0], "state.")
    with pytest.raises(ValueError, match="needs a model with box_refine=True"):
        official.convert(state, small_model(False))


def test_backbone_of_torchvision_is_timms():
    theirs = torchvision.models.resnet18().state_dict()
    state = {f"backbone.0.body.{name}": t for name, t in theirs.items() if not name.startswith("fc.")}
    backbone = timm.create_model("resnet18", features_only=True, out_indices=(2, 3, 4))
    model = DeformableDETR(backbone, 7, **SMALL)
    converted = official.convert(state, model)
    assert converted.keys() == {f"backbone.{name}" for name in backbone.state_dict()}
    model.load_state_dict(converted, strict=False)
    assert model.backbone.conv1.weight.equal(theirs["conv1.weight"])


def test_it_is_found_from_the_recipes_package():
    import detection
    from detection import official as imported

    assert imported is official
    assert detection.official is official
