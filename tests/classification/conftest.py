import pytest
import yaml
from class_folders import make_settings, write_splits


@pytest.fixture
def pictures(tmp_path):
    """tmp_path/pictures/{train,val}/{blue,green,red}/*.png, 8 and 2 per class."""
    return write_splits(tmp_path)


@pytest.fixture
def settings(tmp_path, pictures):
    """As make_settings."""
    return make_settings(tmp_path)


@pytest.fixture(scope="module")
def module_config(tmp_path_factory):
    """The configuration and the pictures of `settings`, the same for all tests of a module."""
    folder = tmp_path_factory.mktemp("module")
    write_splits(folder)
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(make_settings(folder)))
    return path


@pytest.fixture
def write_config(tmp_path):
    """Writes plain settings as YAML and returns the path."""

    def write(settings):
        path = tmp_path / "config.yaml"
        path.write_text(yaml.safe_dump(settings))
        return path

    return write
