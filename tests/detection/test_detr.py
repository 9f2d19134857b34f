import pytest
import timm
import torch
import torchvision
from detr_inputs import SMALL, FixedFeatures, check_parity, fill, formula_inputs, load_fixture, part, run
from torch import nn

from dat.detection import DETR, DeformableDETR, HungarianMatcher, SetCriterion

KEYS = ("pred_logits", "pred_boxes")


def small_model(backbone=None, **changes):
    torch.manual_seed(0)
    if backbone is None:
        backbone = timm.create_model("test_resnet", features_only=True, out_indices=(4,))
    return DETR(backbone, 5, **(SMALL | changes))


def a_mask(height=96, width=128):
    mask = torch.zeros(2, height, width, dtype=torch.bool)
    mask[0, 64:], mask[0, :, 96:] = True, True
    return mask


def total_loss(model, outputs):
    """Of two images with two objects each."""
    targets = [{"labels": torch.tensor([i, 3]), "boxes": torch.full((2, 4), 0.3)} for i in range(2)]
    criterion = SetCriterion(model.num_classes, HungarianMatcher(scores=model.scores), model.scores)
    return criterion.total(criterion(outputs, targets))


@pytest.mark.parametrize("pre_norm", [False, True], ids=["post", "pre"])
def test_official_numbers(pre_norm, double):
    maps, mask, targets = formula_inputs()
    model = DETR(FixedFeatures(maps), 7, **SMALL | {"num_queries": 12}, pre_norm=pre_norm)
    fill(model.double())
    theirs = part(load_fixture("detr_norms")[0], "pre." if pre_norm else "post.")
    check_parity(*run(model, mask, targets), model, theirs, 1e-6)


@pytest.mark.parametrize("pre_norm", [False, True])
def test_batched_equals_single_and_no_mask_nothing_padded(pre_norm):
    model = small_model(pre_norm=pre_norm).eval()
    images = torch.randn(3, 3, 64, 96)
    batched, masked = model(images), model(images, torch.zeros(3, 64, 96, dtype=torch.bool))
    for key in KEYS:
        torch.testing.assert_close(batched[key], masked[key], atol=1e-5, rtol=0)
        for i in range(3):
            torch.testing.assert_close(batched[key][i : i + 1], model(images[i : i + 1])[key], atol=1e-5, rtol=0)


def test_padding_changes_nothing():
    """A map in the corner of a larger one, whatever lies in the padding, is detected as if it were alone."""
    model = small_model().eval()
    level, canvas, mask = torch.randn(1, 32, 6, 7), torch.full((1, 32, 9, 9), 50.0), torch.ones(1, 9, 9).bool()
    canvas[..., :6, :7], mask[..., :6, :7] = level, False
    padded, alone = model.detect([canvas], [mask]), model.detect([level])
    for key in KEYS:
        torch.testing.assert_close(padded[key], alone[key], atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", [DETR, DeformableDETR])
def test_an_image_of_padding_alone_is_not_nan(kind):
    backbone = timm.create_model("test_resnet", features_only=True, out_indices=(4,))
    variants = [{}] if kind is DETR else [{}, {"box_refine": True, "two_stage": True}]
    mask = a_mask()
    mask[1] = True
    for options in variants:
        model = kind(backbone, 5, **SMALL, **options)
        outputs = model(torch.randn(2, 3, 96, 128), mask)
        total_loss(model, outputs).backward()
        for layer in (outputs, *outputs["aux_outputs"]):
            assert all(layer[key].isfinite().all() for key in KEYS)
        assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("pre_norm", [False, True])
def test_gradient_reaches_every_parameter(pre_norm):
    model = small_model(pre_norm=pre_norm)
    # What starts at zero keeps others from taking part.
    for parameter in model.parameters():
        nn.init.normal_(parameter, parameter.detach().mean().item(), 0.1)
    total_loss(model, model(torch.randn(2, 3, 96, 128), a_mask())).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        # The first layer normalises zeros.
        assert parameter.grad.abs().sum() > 0 or (pre_norm and name == "decoder.0.norm1.weight"), name


def test_a_backbone_that_cannot_recompute_leaves_that_to_the_transformer():
    backbone = timm.create_model("hrnet_w18_small", features_only=True, out_indices=(4,))
    model = DETR(backbone, 5, **SMALL)
    with pytest.raises(AssertionError):
        backbone.set_grad_checkpointing()
    model.set_grad_checkpointing()
    assert model.grad_checkpointing


@pytest.mark.parametrize("kind", [DETR, DeformableDETR])
def test_gradient_checkpointing_changes_nothing(kind):
    backbone = timm.create_model("test_resnet", features_only=True, out_indices=(4,))
    model = kind(backbone, 5, **SMALL | {"drop_rate": 0.1})
    images, mask, gradients, saved = torch.randn(2, 3, 96, 128), a_mask(), [], []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        kept = []
        torch.manual_seed(3)
        with torch.autograd.graph.saved_tensors_hooks(lambda x, kept=kept: (kept.append(x.numel()), x)[1], lambda x: x):
            loss = total_loss(model, model(images, mask))
        loss.backward()
        saved.append(sum(kept))
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert saved[1] < 0.7 * saved[0]
    for plain, checkpointed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, checkpointed)


def test_dilation_of_timm_is_that_of_torchvision():
    """DETR-DC5's official weights are those of torchvision's replace_stride_with_dilation."""
    theirs = torchvision.models.ResNet(
        torchvision.models.resnet.Bottleneck, [1, 1, 1, 3], replace_stride_with_dilation=[False, False, True]
    ).eval()
    ours = timm.create_model(
        "resnet50", features_only=True, out_indices=(3, 4), output_stride=16, layers=(1, 1, 1, 3)
    ).eval()
    assert ours.feature_info.reduction() == [16, 16]
    state = {name: tensor for name, tensor in theirs.state_dict().items() if not name.startswith("fc.")}
    ours.load_state_dict(state)
    x = torch.randn(1, 3, 96, 64)
    found = ours(x)[1]
    for name, module in theirs.named_children():
        if name == "avgpool":
            break
        x = module(x)
    assert found.shape[-2:] == (6, 4)
    torch.testing.assert_close(found, x)


def test_only_the_last_map_is_used():
    backbone = FixedFeatures([torch.full((2, 8, 4, 4), float("nan")), torch.randn(2, 16, 2, 2)])
    assert small_model(backbone)(torch.zeros(2, 3, 64, 64))["pred_boxes"].isfinite().all()


def test_one_output_per_layer():
    outputs = small_model(decoder_depth=3)(torch.randn(2, 3, 64, 96))
    assert outputs["pred_logits"].shape == (2, 9, 6)
    assert len(outputs["aux_outputs"]) == 2
    assert "aux_outputs" not in small_model(aux_loss=False)(torch.randn(2, 3, 64, 96))


def test_initialisation():
    for name, parameter in small_model(embed_dim=64).named_parameters():
        if name.endswith(("linear1.weight", "linear2.weight", "out_proj.weight", "in_proj_weight")):
            assert parameter.std().item() == pytest.approx((2 / sum(parameter.shape)) ** 0.5, rel=0.1), name


def test_autocast_keeps_boxes_in_float32():
    with torch.autocast("cpu", torch.bfloat16):
        outputs = small_model()(torch.randn(2, 3, 96, 128), a_mask())
    assert outputs["pred_boxes"].dtype == torch.float32
    assert outputs["pred_boxes"].isfinite().all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"embed_dim": 30}, "embed_dim=30 should be a multiple of 4 and of num_heads=4"),
        ({"num_queries": 0}, "num_queries=0 should be at least 1"),
        ({"decoder_depth": 0}, "decoder_depth=0 should be at least 1"),
    ],
)
def test_arguments_that_do_not_fit(options, message):
    with pytest.raises(ValueError, match=message):
        small_model(**options)
