import math

import pytest
import timm
import torch
from timm.models import create_feature_extractor
from timm.optim import param_groups_layer_decay
from torch import nn
from torch.nn.utils import prune
from torch.utils.flop_counter import FlopCounterMode

from dat.models import StageConfig
from dat.models.blocks import Block

PARAMETERS = {
    "dat_tiny": 28_319_138,
    "dat_small": 49_700_402,
    "dat_base": 87_881_632,
    "dat_base_384": 88_178_272,
    "dat_plus_tiny": 22_772_796,
    "dat_pp_tiny": 23_962_876,
    "dat_pp_small": 53_127_366,
    "dat_pp_base": 93_690_640,
    "dat_pp_base_384": 93_690_640,
}
NANOS = ["dat_nano", "dat_plus_nano", "dat_pp_nano"]
NAMES = timm.list_models("dat_*")
# Every block, every position bias, either stem that has no model of its own, and a stem of other channels.
ZOO = (
    StageConfig("XEN", 16, 2, window_size=3, neighborhood_size=5, lpu=True, layer_scale=0.1),
    StageConfig("PDD", 32, 4, sr_ratio=4, stride=2, position_bias="log_cpb", no_off=True, release="2023"),
    StageConfig("LSD", 32, 4, num_groups=2, stride=2, kernel_size=2, position_bias="fixed_pe", release="2023"),
    StageConfig("DX", 64, 4, offset_range_factor=-1.0, position_bias="dwc_pe", conv_mlp=True),
)


def create(name, **arguments):
    torch.manual_seed(0)
    if name == "zoo":
        return timm.create_model("dat_nano", **{"stages": ZOO, "stem": "overlap", "stem_dims": 24, **arguments})
    return timm.create_model(name, **arguments)


@pytest.fixture(params=NANOS)
def name(request):
    return request.param


@pytest.fixture
def nano(name):
    return create(name, num_classes=7).eval()


@pytest.mark.parametrize("name", PARAMETERS)
def test_official_parameter_counts(name):
    model = timm.create_model(name, device="meta")
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[name]


@pytest.mark.parametrize(
    ("name", "gigaflops"),
    [("dat_tiny", 4.6), ("dat_pp_tiny", 4.3), ("dat_pp_small", 9.4), ("dat_pp_base", 16.6), ("dat_pp_base_384", 49.7)],
)
def test_published_flops(name, gigaflops):
    """The papers count a multiplication and an addition as one."""
    model = timm.create_model(name, device="meta")
    with FlopCounterMode(display=False) as counter:
        model(torch.empty(1, *model.pretrained_cfg["input_size"], device="meta"))
    assert counter.get_total_flops() / 2e9 == pytest.approx(gigaflops, rel=0.01)


def test_nano_is_small(nano):
    assert sum(p.numel() for p in nano.parameters()) < 3e6


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("size", [(97, 61), (800, 1333)])
def test_features_of_every_name(name, size):
    """Shapes only, on tensors without data."""
    model = timm.create_model(name, features_only=True, device="meta")
    features = model(torch.empty(2, 3, *size, device="meta"))
    for feature, channels, reduction in zip(
        features, model.feature_info.channels(), model.feature_info.reduction(), strict=True
    ):
        assert feature.shape == (2, channels, *(math.ceil(side / reduction) for side in size))


@pytest.mark.parametrize("name", NAMES)
def test_every_name_trains(name):
    """Finite outputs and gradients, and an image alone is one in a batch; maps end as a single row."""
    torch.manual_seed(0)
    model = timm.create_model(name, drop_path_rate=0.0)
    images = torch.randn(3, 3, 29, 61)
    logits = model(images)
    logits.square().sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())
    with torch.no_grad():
        torch.testing.assert_close(model(images[1:2]), logits[1:2], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", [*NANOS, "zoo"])
@pytest.mark.parametrize("size", [(97, 61), (32, 32), (1, 1), (3, 70), (160, 223)])
def test_any_size_runs(name, size):
    model = create(name)
    model(torch.randn(2, 3, *size)).square().sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("name", NANOS)
def test_detection_size(name):
    model = timm.create_model(name, features_only=True, out_indices=(1, 2, 3)).eval()
    with torch.no_grad():
        features = model(torch.randn(1, 3, 800, 1333))
    assert [f.shape[1:] for f in features] == [(64, 100, 167), (128, 50, 84), (256, 25, 42)]
    assert all(f.isfinite().all() for f in features)


def test_features_do_not_depend_on_what_is_padded_beyond_the_right_and_bottom():
    """97 columns make 25 patches of 4; the three missing ones are zeros, whether padded here or by the caller."""
    nano = create("dat_nano").eval()
    image = torch.randn(1, 3, 64, 97)
    padded = torch.nn.functional.pad(image, (0, 3))
    with torch.no_grad():
        torch.testing.assert_close(nano(image), nano(padded))


@pytest.mark.parametrize("name", [*NANOS, "zoo"])
def test_image_alone_equals_image_in_batch(name):
    model = create(name).eval()
    images = torch.randn(3, 3, 97, 61)
    with torch.no_grad():
        torch.testing.assert_close(model(images)[1:2], model(images[1:2]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", [*NANOS, "zoo"])
def test_gradient_reaches_every_parameter(name):
    model = create(name)
    model(torch.randn(2, 3, 160, 128)).square().sum().backward()
    # A constant added to all keys cancels in the softmax, so their bias gets rounding errors only.
    without = [
        n
        for n, p in model.named_parameters()
        if p.requires_grad and (p.grad is None or not (p.grad.any() or n.endswith("attn.k.bias")))
    ]
    assert not without
    assert [n for n, p in model.named_parameters() if not p.requires_grad] == (
        ["stages.0.blocks.1.attn.shift.weight"] if name == "zoo" else []
    )


def test_gradient_checkpointing_changes_nothing(nano):
    nano.train()
    image = torch.randn(2, 3, 64, 64)
    plain = torch.autograd.grad(nano(image).square().sum(), list(nano.parameters()))
    nano.set_grad_checkpointing()
    runs = []
    for stage in nano.stages:
        for block in stage.blocks:
            block.register_forward_pre_hook(lambda *_: runs.append(1))
    checkpointed = torch.autograd.grad(nano(image).square().sum(), list(nano.parameters()))
    for a, b in zip(plain, checkpointed, strict=True):
        torch.testing.assert_close(a, b)
    assert sum(runs) == 2 * sum(len(stage.blocks) for stage in nano.stages)


def test_drop_rates_take_effect(name):
    torch.manual_seed(0)
    image = torch.randn(4, 3, 64, 64)
    for rate in ("drop_rate", "proj_drop_rate", "drop_path_rate"):
        model = timm.create_model(name, **{rate: 0.5}).train()
        assert not torch.equal(model(image), model(image))
        model.eval()
        assert torch.equal(model(image), model(image))
    rates = [block.drop_path1.drop_prob for stage in model.stages for block in list(stage.blocks)[1:]]
    assert rates[-1] == 0.5
    assert rates == sorted(rates)


def test_initial_values_are_those_that_trained():
    """torch's defaults everywhere (the official reset_parameters never touches a module), small normal bias tables."""
    model = create("dat_nano")
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
        assert not any(features[3].eq(final).flatten())
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


def test_features_only_equals_intermediates(nano, name):
    extractor = timm.create_model(name, features_only=True, out_indices=(1, 2)).eval()
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


def test_timms_other_feature_extractors():
    """As timm's Swin, they return maps in the layout of the stages, NHWC."""
    image = torch.randn(1, 3, 32, 64)
    model = timm.create_model("dat_nano", features_only=True, out_indices=(1, 2), feature_cls="list").eval()
    maps = model(image)
    assert [f.shape[1:] for f in maps] == [(4, 8, 64), (2, 4, 128)]
    assert model.feature_info.channels() == [64, 128]
    named = timm.create_model("dat_nano", features_only=True, out_indices=(1, 2), feature_cls="dict").eval()
    named.load_state_dict(model.state_dict())
    torch.testing.assert_close(list(named(image).values()), maps)


def test_features_of_other_stages():
    """As many as there are, described by StageConfigs or, as a config.json has them, by their arguments."""
    stages = [StageConfig("LD", 8, 2), {"blocks": "S", "embed_dims": 16, "num_heads": 2}]
    model = timm.create_model("dat_nano", stages=stages, features_only=True)
    assert [f.shape[1:] for f in model(torch.randn(1, 3, 32, 64))] == [(8, 8, 16), (16, 4, 8)]


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


def test_head_hidden_size_is_the_width_of_the_pooled_features(nano):
    """ "catavgmax" doubles it."""
    features = nano.forward_features(torch.randn(1, 3, 64, 64))
    for classes, pool, width in ((5, "catavgmax", 512), (0, None, 512), (5, "avg", 256), (0, "", 256)):
        nano.reset_classifier(classes, pool)
        assert nano.head_hidden_size == nano.forward_head(features, pre_logits=True).shape[1] == width
    assert timm.create_model("dat_nano", img_size=64, global_pool="catavgmax").head_hidden_size == 512


def test_logits_of_every_pixel_without_pooling(nano):
    """As timm's Swin has them, but channels first as the features are."""
    image = torch.randn(2, 3, 64, 96)
    expected = nano(image)
    state = nano.state_dict()
    nano.reset_classifier(7, "")
    nano.load_state_dict(state)
    logits = nano(image)
    assert logits.shape == (2, 7, 2, 3)
    torch.testing.assert_close(logits.mean((2, 3)), expected)


def test_new_classifier_is_where_the_model_is(name):
    """Also after it had none, which leaves a head without parameters."""
    model = timm.create_model(name, device="meta", dtype=torch.float64)
    model.reset_classifier(0)
    model.reset_classifier(3)
    weight = model.get_classifier().weight
    assert (weight.device.type, weight.dtype) == ("meta", torch.float64)


def test_features_without_pooling_or_classifier(name):
    model = timm.create_model(name, num_classes=0, global_pool="")
    assert model(torch.randn(2, 3, 64, 64)).shape == (2, 256, 2, 2)


def test_in_chans(name):
    model = timm.create_model(name, in_chans=1)
    assert model(torch.randn(1, 1, 40, 40)).shape == (1, 1000)


def test_img_size_and_set_input_size(name):
    model = timm.create_model(name, img_size=(160, 96))
    assert model.stages[2].blocks[1].attn.rpe_table.shape == (4, 19, 11)
    model.set_input_size(img_size=224)
    assert model.stages[2].blocks[1].attn.rpe_table.shape == (4, 27, 27)
    assert model.stages[3].blocks[1].attn.rpe_table.shape == (8, 13, 13)
    model.set_input_size()
    assert model.img_size == timm.models.get_model_args(model)["img_size"] == (224, 224)
    assert model(torch.randn(1, 3, 64, 64)).isfinite().all()


def test_input_size_of_fixed_biases():
    """They are resampled for the maps of another size just as a forward pass does."""
    model = create("zoo", img_size=64).eval()
    images = torch.randn(1, 3, 96, 160)
    with torch.no_grad():
        expected = model(images)
        model.set_input_size((96, 160))
        assert model.stages[2].blocks[2].attn.fixed_bias.rpe_table.shape == (4, 6 * 10, 3 * 5)
        torch.testing.assert_close(model(images), expected)


def test_sizes_without_a_model_of_their_own():
    """B++ at 384 keeps the tables for 224; its images may be of any size."""
    tables = {
        name: [tuple(p.shape) for n, p in timm.create_model(name, device="meta").named_parameters() if "rpe_table" in n]
        for name in ("dat_pp_base", "dat_pp_base_384")
    }
    assert tables["dat_pp_base"] == tables["dat_pp_base_384"]
    assert tables["dat_pp_base"][0] == (4, 111, 111)


def test_parameter_groups(nano, name):
    assert len(nano.no_weight_decay()) == (8 if name == "dat_nano" else 7)
    groups = param_groups_layer_decay(nano, 0.05, nano.no_weight_decay(), layer_decay=0.5)
    scales = {id(p): g["lr_scale"] for g in groups for p in g["params"]}
    decays = {id(p): g["weight_decay"] for g in groups for p in g["params"]}
    assert len(scales) == len(list(nano.parameters()))
    table, weight = (nano.get_parameter(f"stages.2.blocks.1.attn.{n}") for n in ("rpe_table", "q.weight"))
    assert (decays[id(table)], decays[id(weight)]) == (0.0, 0.05)
    first, head = nano.pretrained_cfg["first_conv"], nano.get_classifier().weight
    stem = nano.get_parameter(f"{first}.weight")
    assert scales[id(stem)] < scales[id(weight)] < scales[id(head)] == 1


def test_position_biases_have_no_weight_decay():
    """All that the official training calls so: every rpe_table, modules too, and relative_position_bias_table."""
    names = create("zoo").no_weight_decay()
    assert {name.partition("attn.")[2] for name in names} == {
        "relative_position_bias_table",
        "log_cpb.mlp.fc1.weight",
        "log_cpb.mlp.fc1.bias",
        "log_cpb.mlp.fc2.weight",
        "fixed_bias.rpe_table",
        "lepe.weight",
        "lepe.bias",
    }


@pytest.mark.parametrize("name", NAMES)
def test_pretrained_cfg(name):
    model = timm.create_model(name, device="meta")
    assert isinstance(model.get_submodule(model.pretrained_cfg["first_conv"]), nn.Conv2d)
    assert model.get_submodule(model.pretrained_cfg["classifier"]) is model.get_classifier()
    side = 384 if "384" in name else 224
    assert timm.data.resolve_model_data_config(model)["input_size"] == (3, side, side)


@pytest.mark.parametrize(
    ("stage", "arguments", "message"),
    [
        (StageConfig("LQ", 8, 1), {}, "blocks must be letters of L, S, D, N, P, E and X, got 'Q' in 'LQ'"),
        (StageConfig("X", 8, 1, window_size=4), {}, "window_size must be odd for X blocks, got 4"),
        (StageConfig("L", 8, 1), {"stem": "pool"}, "stem must be 'patch', 'overlap' or 'conv', got 'pool'"),
        (StageConfig("L", 8, 1), {"stem": "conv", "patch_size": 8}, "patch_size must be 4 for stem 'conv', got 8"),
    ],
)
def test_errors(stage, arguments, message):
    with pytest.raises(ValueError, match=message):
        timm.create_model("dat_nano", stages=[stage], **arguments)


@pytest.mark.parametrize("name", ["dat_nano", "zoo"])
def test_compiles_to_one_graph(name):
    """The bias table of a block, which the zoo's have not, and the zoo."""
    model = create(name, stages=ZOO if name == "zoo" else [StageConfig("LD", 16, 2)])
    image = torch.randn(2, 3, 72, 64)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    expected, parameters = model(image), [p for p in model.parameters() if p.requires_grad]
    torch.testing.assert_close(compiled(image), expected)
    for a, b in zip(
        torch.autograd.grad(compiled(image).square().sum(), parameters),
        torch.autograd.grad(expected.square().sum(), parameters),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_features_by_torch_fx(nano):
    """timm's tracer, whose graph holds the layers that shapes and dtypes decide about as leaves."""
    graph = create_feature_extractor(nano, {"stages.1": "second", "norm": "last"})
    image = torch.randn(2, 3, 72, 64)
    with torch.no_grad():
        features = nano.forward_intermediates(image, [1], norm=True, output_fmt="NHWC", intermediates_only=True)
        traced = graph(image)
        torch.testing.assert_close(traced["second"], features[0])
        torch.testing.assert_close(traced["last"].permute(0, 3, 1, 2), nano.forward_features(image))


@pytest.mark.parametrize("name", NANOS)
def test_pruned_convolutions_train_and_load(name):
    """A hook of torch's pruning works out a weight before each call."""

    def pruned(seed):
        torch.manual_seed(seed)
        model = timm.create_model(name, num_classes=3)
        for layer in model.modules():
            if isinstance(layer, nn.Conv2d):
                prune.l1_unstructured(layer, "weight", 0.5)
        return model

    model, other = pruned(0), pruned(1)
    images = torch.randn(1, 3, 64, 64)
    for _ in range(2):
        model(images).sum().backward()
    assert all(p.grad is not None for n, p in model.named_parameters() if n.endswith("conv.weight_orig"))
    other.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert torch.equal(model(images), other(images))


def test_state_dicts_keep_the_versions_of_modules():
    class Versioned(nn.Module):
        _version = 2

        def _load_from_state_dict(self, state_dict, prefix, metadata, *args):
            assert metadata["version"] == 2

    model = timm.create_model("dat_nano", num_classes=3)
    model.versioned = Versioned()
    model.load_state_dict(model.state_dict())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("grad", [True, False])
def test_a_trace_serves_other_batches(nano, grad):
    images = torch.randn(3, 3, 64, 64)
    with torch.set_grad_enabled(grad):
        traced = torch.jit.trace(nano.eval(), images[:1])
        torch.testing.assert_close(traced(images), nano(images))


def test_channels_last(nano):
    image = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        expected = nano(image)
        out = nano.to(memory_format=torch.channels_last)(image.to(memory_format=torch.channels_last))
    torch.testing.assert_close(out, expected)


def test_exports(nano):
    image = torch.randn(2, 3, 72, 64)
    with torch.no_grad():
        exported = torch.export.export(nano, (image,)).module()
        torch.testing.assert_close(exported(image), nano(image))


def test_half_precision(nano):
    image = torch.randn(1, 3, 64, 64)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = nano(image)
    with torch.no_grad():
        torch.testing.assert_close(mixed.float(), nano(image), rtol=0.1, atol=0.05)
        assert nano.bfloat16()(image.bfloat16()).dtype == torch.bfloat16


def test_a_block_of_a_large_map_keeps_nine_maps():
    """Stage 4 of dat_pp_tiny at 800x1333: most of what a training step holds, beside the weights' gradients."""
    kernel = {"kernel_size": 3, "offset_range_factor": -1.0, "release": "2023"}
    config = StageConfig("D", 512, 16, num_groups=8, lpu=True, conv_mlp=True, **kernel)
    block = Block("D", config, (7, 7))
    x = torch.randn(1, 25, 42, 512, requires_grad=True)
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        block(x)
    for tensor in (x, *block.parameters()):
        kept.pop(tensor.untyped_storage().data_ptr(), None)
    # LPU, norms, query, samples, key, value, attention and the first sum; besides, some numbers for each query and key.
    assert sum(kept.values()) / x.nbytes < 9.3
