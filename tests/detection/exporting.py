"""Checkpoints of small detectors with weights that tell queries apart."""

import torch

from dat.detection.checkpoint import detector_state
from dat.detection.config import DetectionConfig
from dat.detection.data import Category
from dat.detection.models import build_model
from dat.engine.checkpoint import save_checkpoint
from dat.engine.config import from_dict

CATEGORIES = (Category(3, "blue"), Category(11, "red"))


def write_detector(path, pad_multiple=1, **model):
    """A checkpoint of a detector that was not trained; `model`: of the configuration's model."""
    small = {"embed_dim": 16, "num_heads": 2, "encoder_depth": 1, "decoder_depth": 1, "mlp_dim": 16, "num_queries": 7}
    backbone = {"name": "test_resnet"}
    config = from_dict(
        DetectionConfig,
        {
            "model": {"backbone": backbone, **small, **model},
            "data": {"root": "nowhere", "pad_multiple": pad_multiple, "val": {"size": 64, "max_size": 256}},
        },
        "test",
    )
    torch.manual_seed(0)
    detector = build_model(config.model, len(CATEGORIES), weights=False)
    for name, parameter in detector.named_parameters():
        if "backbone" not in name and parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    save_checkpoint(path, {**detector_state(config, CATEGORIES), "state_dict": detector.state_dict()})
    return path
