import pytest
import torch
from coco_scenes import scenes_in, write_config


@pytest.fixture
def scenes(tmp_path):
    """A folder with train.json, val.json and images/, four images each."""
    return scenes_in(tmp_path)


@pytest.fixture
def config_file(tmp_path, scenes):
    """A configuration of a micro detector on `scenes`, whose runs go to tmp_path/run."""
    return write_config(tmp_path, scenes)


@pytest.fixture(scope="module")
def module_config(tmp_path_factory):
    """As config_file, the same for all tests of a module."""
    folder = tmp_path_factory.mktemp("module")
    return write_config(folder, scenes_in(folder))


@pytest.fixture
def double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)
