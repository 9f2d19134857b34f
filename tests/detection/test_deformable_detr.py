import pytest
import timm
import torch
from detr_inputs import (
    SMALL,
    FixedFeatures,
    check_parity,
    fill,
    fixture_targets,
    formula_inputs,
    load_fixture,
    part,
    run,
)
from torch import nn

from dat.detection import DeformableDETR, HungarianMatcher, SetCriterion, official

VARIANTS = [(False, False), (True, False), (True, True)]


def small_model(maps, box_refine=False, two_stage=False, num_classes=5, **changes):
    torch.manual_seed(0)
    options = SMALL | {"box_refine": box_refine, "two_stage": two_stage} | changes
    backbone = maps if isinstance(maps, nn.Module) else FixedFeatures(maps)
    model = DeformableDETR(backbone, num_classes, **options)
    # Offsets, attention and boxes start constant: shake them, so that everything takes part.
    for parameter in model.parameters():
        nn.init.normal_(parameter, parameter.detach().mean().item(), 0.1)
    return model


def some_maps(batch=2, sizes=((8, 12), (4, 6))):
    torch.manual_seed(1)
    return [torch.randn(batch, 8 * (i + 1), *size) for i, size in enumerate(sizes)]


def some_targets(batch=2):
    torch.manual_seed(2)
    return [{"labels": torch.tensor([i, 3]), "boxes": 0.3 + 0.2 * torch.rand(2, 4)} for i in range(batch)]


def assert_same(ours, theirs, atol=1e-5):
    for key in ("pred_logits", "pred_boxes"):
        torch.testing.assert_close(ours[key], theirs[key], atol=atol, rtol=0)


def test_one_image_with_a_map_of_one_pixel():
    """A group of GroupNorm has one value then, where 32 channels or fewer are in as many groups."""
    model = small_model(some_maps(sizes=((2, 2), (1, 1)))).eval()
    one = small_model([x[:1] for x in some_maps(sizes=((2, 2), (1, 1)))]).eval()
    images = torch.zeros(2, 3, 8, 8)
    both = model(images)
    assert_same(one(images[:1]), {key: both[key][:1] for key in ("pred_logits", "pred_boxes")})


@pytest.mark.parametrize("name", ["deformable_detr_micro", "deformable_detr_refine_micro"])
def test_official_numbers(name, double):
    tensors, c = load_fixture(name)
    model = DeformableDETR(
        FixedFeatures([tensors[f"feature.{i}"] for i in range(3)]),
        c["num_classes"],
        num_queries=c["num_queries"],
        embed_dim=c["d_model"],
        num_heads=c["nheads"],
        encoder_depth=c["enc_layers"],
        decoder_depth=c["dec_layers"],
        mlp_dim=c["dim_feedforward"],
        drop_rate=0.0,
        num_levels=c["num_feature_levels"],
        box_refine=c["with_box_refine"],
    )
    model.load_state_dict(official.convert(part(tensors, "state."), model))
    results = run(model, tensors["mask"], fixture_targets(tensors))
    check_parity(*results, model, tensors, 1e-6)


def test_official_numbers_in_two_stages(double):
    maps, mask, targets = formula_inputs()
    model = DeformableDETR(
        FixedFeatures(maps),
        7,
        num_queries=20,
        encoder_depth=1,
        decoder_depth=2,
        mlp_dim=64,
        drop_rate=0.0,
        box_refine=True,
        two_stage=True,
    )
    fill(model.double())
    tensors, _ = load_fixture("deformable_detr_two_stage")
    # The formula of the inputs multiplies what processors' sines differ by.
    check_parity(*run(model, mask, targets), model, tensors, 1e-6)


@pytest.mark.parametrize("box_refine", [False, True])
def test_padding_changes_nothing(box_refine):
    """An image in the corner of larger maps, whatever lies in the padding, is detected as if it were alone."""
    levels = [torch.randn(1, 32, 6, 7), torch.randn(1, 32, 3, 4)]
    model = small_model(some_maps(), box_refine, num_levels=2).eval()
    padded, masks = [], []
    for level in levels:
        h, w = level.shape[-2:]
        canvas, mask = torch.full((1, 32, h + 3, w + 2), 50.0), torch.ones(1, h + 3, w + 2, dtype=torch.bool)
        canvas[..., :h, :w], mask[..., :h, :w] = level, False
        padded.append(canvas)
        masks.append(mask)
    assert_same(model.detect(padded, masks), model.detect(levels), atol=1e-4)


@pytest.mark.parametrize(("box_refine", "two_stage"), VARIANTS)
def test_no_mask_equals_nothing_padded(box_refine, two_stage):
    model = small_model(some_maps(), box_refine, two_stage).eval()
    images = torch.zeros(2, 3, 64, 96)
    assert_same(model(images), model(images, torch.zeros(2, 64, 96, dtype=torch.bool)))


@pytest.mark.parametrize(("box_refine", "two_stage"), VARIANTS)
def test_batched_equals_single(box_refine, two_stage):
    backbone = timm.create_model("test_resnet", features_only=True, out_indices=(2, 3, 4))
    model = small_model(backbone, box_refine, two_stage).eval()
    images = torch.randn(3, 3, 64, 80)
    batched = model(images)
    for i in range(3):
        single = model(images[i : i + 1])
        assert_same({k: batched[k][i : i + 1] for k in ("pred_logits", "pred_boxes")}, single)


@pytest.mark.parametrize(("box_refine", "two_stage"), VARIANTS)
def test_gradient_reaches_every_parameter(box_refine, two_stage):
    backbone = timm.create_model("test_resnet", features_only=True, out_indices=(2, 3, 4))
    model = small_model(backbone, box_refine, two_stage)
    mask = torch.zeros(2, 64, 64, dtype=torch.bool)
    mask[1, :, 40:] = True
    criterion = SetCriterion(5, HungarianMatcher())
    criterion.total(criterion(model(torch.randn(2, 3, 64, 64), mask), some_targets())).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("test_resnet", {"out_indices": (4,)}),
        ("test_convnext", {}),
        ("test_vit", {"img_size": 64}),
        # NHWC maps
        (
            "swin_tiny_patch4_window7_224",
            {"img_size": 64, "embed_dim": 16, "depths": (1, 1, 1), "num_heads": (1, 2, 4)},
        ),
    ],
)
def test_backbones_of_timm(name, options):
    backbone = timm.create_model(name, features_only=True, **options)
    levels = len(backbone.feature_info.channels())
    outputs = small_model(backbone, num_levels=levels + 1, embed_dim=64)(torch.randn(1, 3, 64, 64))
    assert outputs["pred_logits"].shape == (1, 9, 5)
    assert outputs["pred_boxes"].shape == (1, 9, 4)
    assert outputs["pred_boxes"].min() >= 0
    assert outputs["pred_boxes"].max() <= 1


def test_one_output_per_layer():
    model = small_model(some_maps(), True, True, decoder_depth=3)
    outputs = model(torch.zeros(2, 3, 64, 96))
    assert len(outputs["aux_outputs"]) == 2
    cells = 8 * 12 + 4 * 6 + 2 * 3 + 1 * 2
    assert outputs["enc_outputs"]["pred_logits"].shape == (2, cells, 5)
    assert outputs["enc_outputs"]["pred_boxes"].shape == (2, cells, 4)
    assert "aux_outputs" not in small_model(some_maps(), aux_loss=False)(torch.zeros(2, 3, 64, 96))


def test_two_stage_queries_are_at_most_the_cells():
    model = small_model([torch.randn(1, 8, 1, 3)], True, True, num_levels=1, num_queries=50)
    assert model(torch.zeros(1, 3, 32, 96))["pred_boxes"].shape == (1, 3, 4)


def test_width_that_32_groups_do_not_divide():
    model = small_model(some_maps(), True, True, embed_dim=36, num_heads=3)
    assert model(torch.zeros(2, 3, 64, 96))["pred_boxes"].isfinite().all()


def test_initialisation():
    model = DeformableDETR(FixedFeatures(some_maps()), 5, **SMALL, box_refine=True)
    outputs = model(torch.zeros(2, 3, 64, 96))
    assert 0.002 < outputs["pred_logits"].sigmoid().mean() < 0.05
    # Every layer keeps the first one's guess, sigmoid(-2) wide and high.
    torch.testing.assert_close(outputs["pred_boxes"][..., 2:], torch.full((2, 9, 2), 0.1192), atol=1e-4, rtol=0)
    torch.testing.assert_close(outputs["pred_boxes"], outputs["aux_outputs"][0]["pred_boxes"])
    for name, parameter in model.named_parameters():
        if name.endswith(("linear1.weight", "linear2.weight", "out_proj.weight", "in_proj_weight")):
            fan = sum(parameter.shape)
            assert parameter.std().item() == pytest.approx((2 / fan) ** 0.5, rel=0.1), name


def test_autocast_keeps_boxes_in_float32():
    model = small_model(some_maps(), True, True)
    with torch.autocast("cpu", torch.bfloat16):
        outputs = model(torch.zeros(2, 3, 64, 96), torch.zeros(2, 64, 96, dtype=torch.bool))
    assert outputs["pred_boxes"].dtype == torch.float32
    assert outputs["pred_boxes"].isfinite().all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"two_stage": True}, "two_stage=True needs box_refine=True"),
        ({"embed_dim": 30}, "embed_dim=30 should be a multiple of 4 and of num_heads=4"),
        ({"num_heads": 5}, "embed_dim=32 should be a multiple of 4 and of num_heads=5"),
        ({"num_levels": 1}, "num_levels=1 is fewer than the backbone's 2 feature maps"),
        ({"num_queries": 0}, "num_queries=0 should be at least 1"),
        ({"decoder_depth": 0}, "decoder_depth=0 should be at least 1"),
    ],
)
def test_arguments_that_do_not_fit(options, message):
    with pytest.raises(ValueError, match=message):
        DeformableDETR(FixedFeatures(some_maps()), 5, **(SMALL | options))


def test_mask_of_another_size():
    with pytest.raises(ValueError, match=r"mask has shape \(2, 64, 64\), should be \[B, H, W\] = \(2, 64, 96\)"):
        small_model(some_maps())(torch.zeros(2, 3, 64, 96), torch.zeros(2, 64, 64, dtype=torch.bool))
