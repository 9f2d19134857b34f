from pathlib import Path

import pytest

from dat.training.config import load_config
from dat.training.errors import ConfigError
from detection.build import build_model
from detection.config import DetectionConfig, check_config

CONFIGS = sorted((Path(__file__).parents[2] / "configs/detection").glob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_configuration_makes_a_model(path):
    config = load_config(DetectionConfig, path)
    check_config(config)
    model = build_model(config.model, 3, weights=False)
    assert model.num_queries == config.model.num_queries


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
        ("train.batch_size=0", "train.batch_size is 0, should be at least 1"),
        ("data.train.sizes=[0, 480]", "data.train.sizes is [0, 480], should be at least 1"),
        ("data.std=[1, 1, 0]", "data.std is (1.0, 1.0, 0.0), should be more than 0"),
        ("model.num_heads=0", "model.num_heads is 0, should be at least 1"),
        ("seed=-1", "seed is -1, should be at least 0"),
        ("train.workers=-1", "train.workers is -1, should be at least 0"),
        ("train.pictures=-1", "train.pictures is -1, should be at least 0"),
        ("train.lr=-1", "train.lr is -1.0, should be more than 0"),
        ("train.lr=.nan", "train.lr is nan, should be more than 0"),
        ("train.weight_decay=-1", "train.weight_decay is -1.0, should be at least 0"),
        ("train.ema_decay=1.5", "train.ema_decay is 1.5, should be 0 to 1"),
    ],
)
def test_values_that_cannot_work_are_named(override, message):
    config = load_config(DetectionConfig, CONFIGS[0], [override])
    with pytest.raises(ConfigError) as raised:
        check_config(config)
    assert message in str(raised.value)


def test_means_are_of_three_channels():
    with pytest.raises(ConfigError, match=r"data.mean is \[0.5, 0.5\], should be a list"):
        load_config(DetectionConfig, CONFIGS[0], ["data.mean=[0.5, 0.5]"])
