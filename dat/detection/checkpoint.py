"""Detectors in checkpoints, which hold configuration and classes beside the weights."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dat.detection.config import DetectionConfig, check_config
from dat.detection.convert import convert
from dat.detection.data import Category
from dat.detection.from_transformers import read_config
from dat.detection.models import BaseDETR, build_model
from dat.engine.checkpoint import (
    build_and_load,
    checkpoint_errors,
    limit_parameters,
    load_checkpoint,
    read_trained,
    read_weights,
)
from dat.engine.config import from_dict, to_dict
from dat.utils.errors import CheckpointError


@dataclass(frozen=True)
class LoadedDetector:
    """The content of a checkpoint: model in evaluation mode, configuration, and classes (label i is the i-th)."""

    model: BaseDETR
    config: DetectionConfig
    categories: tuple[Category, ...]


def detector_state(config: DetectionConfig, categories: Sequence[Category]) -> dict[str, Any]:
    """Entries of a checkpoint beside the weights, from which `load_detector` builds the detector."""
    return {"kind": "detection", "config": to_dict(config), **class_state(categories)}


def class_state(categories: Sequence[Category]) -> dict[str, list[Any]]:
    """The classes as entries of checkpoints and exported files."""
    return {"class_names": [c.name for c in categories], "category_ids": [c.id for c in categories]}


def load_detector(path: Path, device: torch.device) -> LoadedDetector:
    """The detector of a checkpoint, with its averaged weights where it has them, or of transformers' model.safetensors.

    Raises CheckpointError for anything but a detection checkpoint whose weights fit its configuration.
    """
    if path.suffix == ".safetensors":
        return _load_transformers(path, device)
    trained = read_trained(path, "detection")
    categories = check_categories(trained.state.get("category_ids"), trained.class_names, path)
    with checkpoint_errors(path), limit_parameters(trained.weights, path):
        config = from_dict(DetectionConfig, trained.config, str(path))
        if not any(name.startswith("backbone.body.") for name in trained.weights):
            # Earlier versions took the last maps of a plain ViT as they are.
            config.model.backbone.setdefault("out_indices", list(range(-config.model.num_maps, 0)))
        check_config(config)
    model = build_and_load(lambda: build_model(config.model, len(categories), weights=False), trained.weights, path)
    return LoadedDetector(model.to(device).eval(), config, categories)


def read_classes(path: Path) -> tuple[Category, ...]:
    """The classes of a checkpoint of a run. Raises CheckpointError."""
    state = load_checkpoint(path, "detection")
    return check_categories(state.get("category_ids"), state.get("class_names", ()), path)


def _load_transformers(path: Path, device: torch.device) -> LoadedDetector:
    config, categories = read_config(path)
    with checkpoint_errors(path), limit_parameters(read_weights(path), path):
        check_config(config)
        state = convert(config, path, categories)
    model = build_and_load(lambda: build_model(config.model, len(categories), weights=False), state, path)
    return LoadedDetector(model.to(device).eval(), config, categories)


def check_categories(ids: Any, names: Sequence[str], path: Path) -> tuple[Category, ...]:
    """The classes of a file. Raises CheckpointError unless there is one unique integer for each name."""
    integers = isinstance(ids, list) and all(isinstance(i, int) and not isinstance(i, bool) for i in ids)
    if not integers or len(ids) != len(names) or len(set(ids)) < len(ids):
        raise CheckpointError(f"{path}: its category_ids should be {len(names)} different integers, one for each class")
    return tuple(Category(*pair) for pair in zip(ids, names, strict=True))
