import math

import pytest
import timm
import torch
from timm.optim import param_groups_layer_decay
from torch._subclasses.fake_tensor import FakeTensorMode

import dat

PARAMETERS = {
    "dat_tiny": 28_319_138,
    "dat_small": 49_700_402,
    "dat_base": 87_881_632,
    "dat_base_384": 88_178_272,
}
NAMES = ["dat_nano", *PARAMETERS]


@pytest.fixture
def nano():
    torch.manual_seed(0)
    return timm.create_model("dat_nano", num_classes=7).eval()


@pytest.mark.parametrize("name", PARAMETERS)
def test_official_parameter_counts(name):
    model = timm.create_model(name, device="meta")
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[name]


def test_nano_is_small(nano):
    assert sum(p.numel() for p in nano.parameters()) < 3e6


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("size", [(224, 224), (97, 61), (800, 1333)])
def test_features_of_every_name(name, size):
    """Shapes only, on tensors without data."""
    with FakeTensorMode():
        model = timm.create_model(name, features_only=True)
        features = model(torch.empty(2, 3, *size))
    for feature, channels, reduction in zip(
        features, model.feature_info.channels(), model.feature_info.reduction(), strict=True
    ):
        assert feature.shape == (2, channels, *(math.ceil(side / reduction) for side in size))


@pytest.mark.parametrize("size", [(97, 61), (32, 32), (1, 1), (3, 70), (160, 223)])
def test_any_size_runs(nano, size):
    with torch.no_grad():
        assert nano(torch.randn(2, 3, *size)).isfinite().all()


def test_detection_size():
    model = timm.create_model("dat_nano", features_only=True, out_indices=(1, 2, 3)).eval()
    with torch.no_grad():
        features = model(torch.randn(1, 3, 800, 1333))
    assert [f.shape[1:] for f in features] == [(64, 100, 167), (128, 50, 84), (256, 25, 42)]
    assert all(f.isfinite().all() for f in features)


def test_features_do_not_depend_on_what_is_padded_beyond_the_right_and_bottom(nano):
    """97 columns make 25 cells of 4; the three missing ones are zeros, whoever adds them."""
    image = torch.randn(1, 3, 64, 97)
    padded = torch.nn.functional.pad(image, (0, 3))
    with torch.no_grad():
        torch.testing.assert_close(nano(image), nano(padded))


def test_image_alone_equals_image_in_batch(nano):
    images = torch.randn(3, 3, 97, 61)
    with torch.no_grad():
        torch.testing.assert_close(nano(images)[1:2], nano(images[1:2]), rtol=1e-4, atol=1e-5)


def test_gradient_reaches_every_parameter(nano):
    nano.train()
    nano(torch.randn(2, 3, 96, 64)).square().sum().backward()
    # A constant added to all keys cancels in the softmax, so their bias gets rounding errors only.
    without = [
        n for n, p in nano.named_parameters() if p.grad is None or not (p.grad.any() or n.endswith("attn.k.bias"))
    ]
    assert not without
    assert all(p.grad.isfinite().all() for p in nano.parameters())


def test_gradient_checkpointing_changes_nothing(nano):
    nano.train()
    image = torch.randn(2, 3, 64, 64)
    plain = torch.autograd.grad(nano(image).square().sum(), list(nano.parameters()))
    nano.set_grad_checkpointing()
    checkpointed = torch.autograd.grad(nano(image).square().sum(), list(nano.parameters()))
    for a, b in zip(plain, checkpointed, strict=True):
        torch.testing.assert_close(a, b)
    assert all(stage.grad_checkpointing for stage in nano.stages)


def test_drop_rates_take_effect():
    torch.manual_seed(0)
    image = torch.randn(4, 3, 64, 64)
    for rate in ("drop_rate", "proj_drop_rate", "drop_path_rate"):
        model = timm.create_model("dat_nano", **{rate: 0.5}).train()
        assert not torch.equal(model(image), model(image))
        model.eval()
        assert torch.equal(model(image), model(image))
    rates = [block.drop_path1.drop_prob for stage in model.stages for block in list(stage.blocks)[1:]]
    assert rates[-1] == 0.5
    assert rates == sorted(rates)


def test_initial_values_are_those_that_trained():
    """torch's defaults everywhere (the official reset_parameters never touches a module), small normal bias tables."""
    torch.manual_seed(0)
    model = timm.create_model("dat_nano")
    weight = model.stages[3].blocks[0].mlp.fc1.weight.detach()
    bound = weight.shape[1] ** -0.5
    assert weight.abs().max() <= bound
    assert weight.std() == pytest.approx(bound / 3**0.5, rel=0.02)
    for name in model.no_weight_decay():
        assert model.get_parameter(name).detach().std() == pytest.approx(0.01, rel=0.15)


def test_intermediates(nano):
    image = torch.randn(2, 3, 97, 61)
    with torch.no_grad():
        final, features = nano.forward_intermediates(image)
        torch.testing.assert_close(final, nano.forward_features(image))
        assert [f.shape[1:] for f in features] == [(32, 25, 16), (64, 13, 8), (128, 7, 4), (256, 4, 2)]
        last_two = nano.forward_intermediates(image, indices=2, intermediates_only=True)
        for a, b in zip(last_two, features[2:], strict=True):
            torch.testing.assert_close(a, b)
        early = nano.forward_intermediates(
            image, indices=[1], stop_early=True, output_fmt="NHWC", intermediates_only=True
        )
        torch.testing.assert_close(early[0], features[1].permute(0, 2, 3, 1))
        normed = nano.forward_intermediates(image, norm=True, intermediates_only=True)
        torch.testing.assert_close(normed[3], final)
        torch.testing.assert_close(normed[2], features[2])
    with pytest.raises(ValueError, match="output_fmt must be 'NCHW' or 'NHWC', got 'NLC'"):
        nano.forward_intermediates(image, output_fmt="NLC")


def test_features_only_equals_intermediates(nano):
    extractor = timm.create_model("dat_nano", features_only=True, out_indices=(1, 2)).eval()
    assert len(extractor.model.stages) == 3
    extractor.model.load_state_dict(nano.state_dict(), strict=False)
    image = torch.randn(1, 3, 64, 80)
    with torch.no_grad():
        for a, b in zip(
            extractor(image), nano.forward_intermediates(image, [1, 2], intermediates_only=True), strict=True
        ):
            torch.testing.assert_close(a, b)
    assert extractor.feature_info.channels() == [64, 128]
    assert extractor.feature_info.reduction() == [8, 16]


def test_prune_intermediate_layers(nano):
    image = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        expected = nano.forward_intermediates(image, [0, 1], intermediates_only=True)
        assert nano.prune_intermediate_layers([0, 1]) == [0, 1]
        pruned = nano.forward_intermediates(image, [0, 1], intermediates_only=True)
        for a, b in zip(pruned, expected, strict=True):
            torch.testing.assert_close(a, b)
        assert nano.num_features == 64
        assert nano(image).shape == (1, 64, 8, 8)


def test_classifier(nano):
    image = torch.randn(2, 3, 64, 64)
    assert nano.get_classifier().out_features == nano.num_classes == 7
    features = nano.forward_features(image)
    assert features.shape == (2, 256, 2, 2)
    assert nano.forward_head(features, pre_logits=True).shape == (2, nano.head_hidden_size)
    torch.testing.assert_close(nano.forward_head(features), nano(image))
    nano.reset_classifier(3)
    assert nano(image).shape == (2, 3)
    nano.reset_classifier(5, "max")
    torch.testing.assert_close(nano(image), nano.get_classifier()(features.amax((2, 3))))
    nano.reset_classifier(0)
    torch.testing.assert_close(nano(image), features.amax((2, 3)))
    nano.reset_classifier(0, "")
    torch.testing.assert_close(nano(image), features)
    assert timm.create_model("dat_nano", num_classes=0, global_pool="")(image).shape == (2, 256, 2, 2)


def test_in_chans():
    model = timm.create_model("dat_nano", in_chans=1)
    assert model(torch.randn(1, 1, 40, 40)).shape == (1, 1000)


def test_img_size_and_set_input_size():
    model = timm.create_model("dat_nano", img_size=(160, 96))
    assert model.stages[2].blocks[1].attn.rpe_table.shape == (4, 19, 11)
    model.set_input_size(img_size=224)
    assert model.stages[2].blocks[1].attn.rpe_table.shape == (4, 27, 27)
    assert model.stages[3].blocks[1].attn.rpe_table.shape == (8, 13, 13)
    assert model.patch_embed.img_size == (224, 224)
    assert model(torch.randn(1, 3, 64, 64)).isfinite().all()


def test_parameter_groups(nano):
    assert len(nano.no_weight_decay()) == 8
    groups = param_groups_layer_decay(nano, 0.05, nano.no_weight_decay(), layer_decay=0.5)
    scales = {id(p): g["lr_scale"] for g in groups for p in g["params"]}
    decays = {id(p): g["weight_decay"] for g in groups for p in g["params"]}
    assert len(scales) == len(list(nano.parameters()))
    table, weight = (nano.get_parameter(f"stages.2.blocks.1.attn.{n}") for n in ("rpe_table", "q.weight"))
    assert (decays[id(table)], decays[id(weight)]) == (0.0, 0.05)
    stem, head = nano.patch_embed.proj.weight, nano.get_classifier().weight
    assert scales[id(stem)] < scales[id(weight)] < scales[id(head)] == 1


def test_pretrained_cfg(nano):
    config = timm.data.resolve_model_data_config(timm.create_model("dat_base_384", device="meta"))
    assert config["input_size"] == (3, 384, 384)
    assert nano.get_submodule(nano.pretrained_cfg["first_conv"]) is nano.patch_embed.proj
    assert nano.get_submodule(nano.pretrained_cfg["classifier"]) is nano.get_classifier()
    assert set(NAMES) <= set(timm.list_models("dat_*"))


def test_pretrained_explains_itself():
    with pytest.raises(RuntimeError, match=r"no stable address.*LeapLabTHU/DAT.*checkpoint_path=FILE") as error:
        timm.create_model("dat_tiny", pretrained=True)
    assert "\n" not in str(error.value)


def test_own_checkpoints(nano, tmp_path):
    image = torch.randn(1, 3, 64, 64)
    path = tmp_path / "nano.pth"
    torch.save({"state_dict": nano.state_dict()}, path)
    loaded = timm.create_model("dat_nano", num_classes=7, checkpoint_path=str(path)).eval()
    torch.testing.assert_close(loaded(image), nano(image))
    # timm's way into a feature extractor, and into a classifier of other classes.
    overlay = {"file": str(path), "num_classes": 7}
    extractor = timm.create_model(
        "dat_nano", pretrained=True, pretrained_cfg_overlay=overlay, features_only=True
    ).eval()
    torch.testing.assert_close(extractor(image)[3], nano.forward_intermediates(image)[1][3])
    other = timm.create_model("dat_nano", pretrained=True, pretrained_cfg_overlay=overlay, num_classes=3).eval()
    torch.testing.assert_close(other.forward_features(image), nano.forward_features(image))
    truncated = {key: value for key, value in nano.state_dict().items() if key != "norm.weight"}
    with pytest.raises(RuntimeError, match=r"norm\.weight"):
        nano.load_state_dict(truncated)


def test_unknown_letter():
    stages = [dat.models.StageConfig("LX", 8, 1)]
    with pytest.raises(ValueError, match="blocks must be letters of L, S and D, got 'X' in 'LX'"):
        timm.create_model("dat_nano", stages=stages)


def test_compiles_to_one_graph(nano):
    image = torch.randn(2, 3, 72, 64)
    torch._dynamo.reset()
    compiled = torch.compile(nano, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(image), nano(image))


def test_half_precision(nano):
    image = torch.randn(1, 3, 64, 64)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = nano(image)
    with torch.no_grad():
        torch.testing.assert_close(mixed.float(), nano(image), rtol=0.1, atol=0.05)
        assert nano.bfloat16()(image.bfloat16()).dtype == torch.bfloat16
