from pathlib import Path

import pytest
import torch

from dat.detection import DETR, DINO, DeformableDETR
from dat.detection.config import DetectionConfig, LossConfig, check_config
from dat.detection.criterion import build_criterion
from dat.detection.models import ModelConfig, build_model
from dat.detection.models.deformable_detr import DeformableDETRConfig
from dat.engine.config import apply_overrides, from_dict, load_config
from dat.utils.errors import ConfigError

CONFIGS = sorted((Path(__file__).parents[2] / "configs/detection").glob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_configuration_makes_a_model(path):
    config = load_config(DetectionConfig, path)
    check_config(config)
    with torch.device("meta"):
        model = build_model(config.model, 3, weights=False)
    assert isinstance(model, {"detr": DETR, "dino": DINO}.get(path.stem.split("_")[0], DeformableDETR))
    assert model.num_queries == config.model.num_queries
    # none writes over another's run
    assert config.output == f"runs/{path.stem}"


@pytest.mark.parametrize(
    ("name", "trained", "published"),
    [
        ("detr_r50", 41_302_368, 41),
        ("detr_r50_dc5", 41_302_368, 41),
        ("deformable_detr_r50_single_scale", 33_844_193, 34),
        ("deformable_detr_r50_single_scale_dc5", 33_844_193, 34),
        ("deformable_detr_r50", 39_847_265, 40),
        ("deformable_detr_r50_refine", 40_627_260, 41),
        ("deformable_detr_r50_two_stage", 40_959_129, 41),
        ("dino_r50_4scale", 46_670_526, 47),
        ("dino_r50_5scale", 47_033_150, 47),
    ],
)
def test_parameters_are_those_of_the_papers(name, trained, published):
    """With the 91 classes of the official heads, and without what the backbone's frozen stem and first stage hold."""
    config = load_config(DetectionConfig, CONFIGS[0].with_name(f"{name}.yaml"))
    with torch.device("meta"):
        model = build_model(config.model, 91, weights=False)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == trained
    assert abs(trained / 1e6 / published - 1) < 0.01


@pytest.mark.parametrize(
    ("name", "strides", "levels"),
    [
        ("detr_r50", [32], None),
        ("detr_r50_dc5", [16], None),
        ("deformable_detr_r50_single_scale", [32], 1),
        ("deformable_detr_r50_single_scale_dc5", [16], 1),
        ("deformable_detr_r50_two_stage", [8, 16, 32], 4),
        ("dino_r50_4scale", [8, 16, 32], 4),
        ("dino_r50_5scale", [4, 8, 16, 32], 5),
    ],
)
def test_maps_of_the_variants(name, strides, levels):
    config = load_config(DetectionConfig, CONFIGS[0].with_name(f"{name}.yaml"))
    with torch.device("meta"):
        model = build_model(config.model, 3, weights=False)
    assert model.backbone.feature_info.reduction() == strides
    if levels is not None:
        assert len(model.input_proj) == levels


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_configuration_opens_with_its_command_and_what_to_expect(path):
    head = path.read_text(encoding="utf-8").split("\n\n")[0]
    assert all(line.startswith("#") for line in head.splitlines())
    assert f"detection.train configs/detection/{path.name}" in head
    assert "Expected:" in head
    assert "arXiv" in head


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.train.horizontal_flip=2", "data.train.horizontal_flip is 2.0, should be 0 to 1"),
        ("data.train.sizes=[]", "data.train.sizes is empty"),
        ("data.val.max_size=100", "should be at least the largest shortest edge"),
        ("data.train.crop_max=10", "data.train.crop_max is 10, should be at least crop_min"),
        ("train.batch_size=0", "train.batch_size is 0, should be 1 to 65536"),
        ("train.batch_size=1000000000000", "train.batch_size is 1000000000000, should be 1 to 65536"),
        ("train.accumulate=1025", "train.accumulate is 1025, should be 1 to 1024"),
        ("data.train.sizes=[0, 480]", "data.train.sizes is [0, 480], should be 1 to 4096"),
        ("data.std=[1, 1, 0]", "data.std is (1.0, 1.0, 0.0), should be more than 0"),
        ("model.num_heads=0", "model.num_heads is 0, should be 1 to 65536"),
        ("seed=-1", "seed is -1, should be at least 0"),
        ("train.workers=-1", "train.workers is -1, should be 0 to 256"),
        ("train.pictures=-1", "train.pictures is -1, should be at least 0"),
        ("train.lr=-1", "train.lr is -1.0, should be more than 0"),
        ("train.lr=.nan", "train.lr is nan, should be more than 0"),
        ("train.weight_decay=-1", "train.weight_decay is -1.0, should be at least 0"),
        ("train.ema_decay=1.5", "train.ema_decay is 1.5, should be 0 to 1"),
        ("train.loss.cost_class=-1", "train.loss.cost_class is -1.0, should be at least 0"),
        ("train.loss.no_object_weight=-1", "train.loss.no_object_weight is -1.0, should be at least 0"),
        ("data.val.top_k=0", "data.val.top_k is 0, should be at least 1"),
        ("data.val.tiles=1", "data.val.tiles is 1, should be at least 16"),
        ("data.train.tiles=-800", "data.train.tiles is -800, should be at least 0"),
    ],
)
def test_values_that_cannot_work_are_named(override, message):
    config = load_config(DetectionConfig, CONFIGS[0], [override])
    with pytest.raises(ConfigError) as raised:
        check_config(config)
    assert message in str(raised.value)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["two_stage=true"], "model: two_stage=True needs box_refine=True"),
        (["kind=detr", "box_refine=true"], "model.box_refine is true, which needs kind=deformable_detr; it is detr"),
        (["kind=detr", "two_stage=true"], "model.two_stage is true, which needs kind=deformable_detr; it is detr"),
        (["pre_norm=true"], "model.pre_norm is true, which needs kind=detr; it is deformable_detr"),
        (["num_heads=5"], "model: embed_dim=256 should be a multiple of 4 and of num_heads=5"),
        (
            ["backbone.out_indices=[1, 2, 3, 4]", "num_levels=3"],
            "model: num_levels=3 is fewer than the backbone's 4",
        ),
        (
            ["kind=detr", "backbone.out_indices=[3, 4]"],
            "model.backbone.out_indices gives 2 maps, model.kind=detr",
        ),
        (["backbone.name=dat_tiny", "backbone.output_stride=16"], "unexpected keyword argument 'output_stride'"),
        (["backbone.name=resnet5"], "model.backbone.name: no timm model 'resnet5'"),
        (["backbone={}"], "model.backbone: has no 'name'"),
        (["kind=yolo"], "model.kind is 'yolo', should be one of deformable_detr, detr, dino"),
        (["denoising=100"], "model: denoising=100 needs two_stage=True"),
        (["box_noise=2"], "model.box_noise is 2.0, should be 0 to 1"),
        (["kind=dino", "position_temperature=0"], "model.position_temperature is 0.0, should be more than 0"),
        (["kind=dino", "denoising=-1"], "model.denoising is -1, should be 0 to 65536"),
        (
            ["kind=detr", "denoising=50"],
            "model.denoising is 50, which needs kind=deformable_detr or dino; it is detr",
        ),
    ],
)
def test_models_that_cannot_be_are_refused_before_they_are_made(overrides, message):
    config = load_config(DetectionConfig, CONFIGS[0].with_name("deformable_detr_r50.yaml"))
    with pytest.raises(ConfigError) as raised:
        check_config(apply_overrides(config, [f"model.{override}" for override in overrides]))
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


def test_matching_without_any_cost_is_refused():
    overrides = [f"train.loss.cost_{name}=0" for name in ("class", "box", "giou")]
    check_config(load_config(DetectionConfig, "finetune", overrides[1:]))
    with pytest.raises(ConfigError, match=r"train.loss: cost_class, cost_box and cost_giou are all 0, one should not"):
        check_config(load_config(DetectionConfig, "finetune", overrides))


def test_detr_has_no_iou_aware_loss():
    overrides = ["train.loss.class_loss=varifocal"]
    check_config(load_config(DetectionConfig, "dino_r50_4scale", overrides))
    with pytest.raises(
        ConfigError, match=r"train.loss.class_loss is 'varifocal', should be 'focal' for model.kind=detr"
    ):
        check_config(load_config(DetectionConfig, "detr_r50", overrides))


def test_dinos_class_loss_weighs_less_than_the_cost():
    config = load_config(DetectionConfig, "dino_r50_4scale")
    with torch.device("meta"):
        criterion = build_criterion(build_model(config.model, 3, weights=False), config.train.loss)
    assert (criterion.weight_dict["loss_ce"], criterion.matcher.cost_class) == (1.0, 2.0)


@pytest.mark.parametrize("kind", ["detr", "deformable_detr", "dino"])
def test_keys_of_other_kinds_are_dropped_at_their_defaults(kind):
    """Older files hold the keys of all kinds."""
    flat = {"kind": kind, "pre_norm": False, "num_levels": 4, "num_points": 4, "box_refine": False, "two_stage": False}
    model = from_dict(DetectionConfig, {"model": {**flat, "embed_dim": 64}}, "old.pth").model
    assert type(model) is ModelConfig.variants[kind]
    assert (model.kind, model.embed_dim) == (kind, 64)
    other = {"num_levels": 3} if kind == "detr" else {"pre_norm": True}
    with pytest.raises(ConfigError, match=r"old.pth: model.(pre_norm is true|num_levels is 3), which needs kind="):
        from_dict(DetectionConfig, {"model": flat | other}, "old.pth")


def test_unknown_keys_of_a_model_are_named_with_the_nearest_of_all_kinds():
    with pytest.raises(ConfigError, match=r"unknown key 'model.nun_levels'; did you mean 'model.num_levels'"):
        load_config(DetectionConfig, CONFIGS[0], ["model.nun_levels=3"])
    with pytest.raises(ConfigError, match=r"unknown key 'model.variants'"):
        load_config(DetectionConfig, CONFIGS[0], ["model.variants=3"])


def test_a_frozen_module_that_the_backbone_lacks_is_named():
    with pytest.raises(ConfigError, match=r"model.freeze: the backbone has no module 'layer9', it has conv1, bn1, "):
        build_model(DeformableDETRConfig(backbone={"name": "test_resnet"}, freeze=["layer1", "layer9"]), 3)


def test_loss_weights_are_those_of_the_models_paper():
    base = {"backbone": {"name": "test_resnet"}, "embed_dim": 32}
    for kind, scores, weight in (("deformable_detr", "sigmoid", 2.0), ("detr", "softmax", 1.0)):
        model = build_model(ModelConfig.variants[kind](**base), 3)
        criterion = build_criterion(model, LossConfig(no_object_weight=0.3, weight_box=4.0))
        assert (criterion.scores, criterion.matcher.scores) == (scores, scores)
        assert criterion.weight_dict == {"loss_ce": weight, "loss_bbox": 4.0, "loss_giou": 2.0}
        assert (criterion.matcher.cost_class, criterion.matcher.cost_box) == (weight, 5.0)
        assert criterion.no_object_weight == 0.3
        criterion = build_criterion(model, LossConfig(cost_class=0.0, weight_class=3.0))
        assert (criterion.matcher.cost_class, criterion.weight_dict["loss_ce"]) == (0.0, 3.0)


def test_means_are_of_three_channels():
    with pytest.raises(ConfigError, match=r"data.mean is \[0.5, 0.5\], should be a list"):
        load_config(DetectionConfig, CONFIGS[0], ["data.mean=[0.5, 0.5]"])
