import pytest
import torch
import yaml
from coco_scenes import write_scenes


def write_config(folder, scenes):
    config = {
        "output": str(folder / "run"),
        "model": {
            # strides 4, 8 and 16: the images are tiny
            "backbone": {"name": "test_resnet", "out_indices": [1, 2, 3]},
            "num_queries": 10,
            "embed_dim": 16,
            "num_heads": 2,
            "encoder_depth": 1,
            "decoder_depth": 2,
            "mlp_dim": 32,
            "box_refine": True,
            "two_stage": True,
            "freeze_batch_norm": False,
        },
        "data": {
            "root": str(scenes),
            "train": {
                "annotations": "train.json",
                "images": "images",
                "sizes": [48, 64],
                "max_size": 96,
                "crop_resize": [60],
                "crop_min": 30,
                "crop_max": 60,
                "photometric": 0.5,
            },
            "val": {"annotations": "val.json", "images": "images", "size": 48, "max_size": 96},
        },
        "train": {
            "epochs": 2,
            "batch_size": 2,
            "lr": 1e-3,
            "workers": 0,
            "ema_decay": 0.9,
            "log_steps": 1,
            "pictures": 2,
            "worst": 2,
            "device": "cpu",
        },
    }
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    return path


def scenes_in(folder):
    root = folder / "scenes"
    write_scenes(root, "train", 4)
    write_scenes(root, "val", 4, seed=1)
    return root


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
