from pathlib import Path

import pytest

from dat.training.config import load_config
from dat.training.errors import ConfigError
from detection.build import build_model, without_weights
from detection.config import DetectionConfig, check_config

CONFIGS = sorted((Path(__file__).parents[2] / "configs/detection").glob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_configuration_makes_a_model(path):
    config = load_config(DetectionConfig, path)
    check_config(config)
    model = build_model(without_weights(config.model), 3)
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
        ("data.train.horizontal_flip=2", "data.train.horizontal_flip: 2.0 should be a probability"),
        ("data.train.sizes=[]", "data.train.sizes: "),
        ("data.val.max_size=100", "should be at least the largest shortest edge"),
        ("data.train.crop_max=10", "data.train.crop_max: 10 should be at least crop_min"),
        ("train.batch_size=0", "train.batch_size: 0 should be at least 1"),
    ],
)
def test_values_that_cannot_work_are_named(override, message):
    config = load_config(DetectionConfig, CONFIGS[0], [override])
    with pytest.raises(ConfigError) as raised:
        check_config(config)
    assert message in str(raised.value)
