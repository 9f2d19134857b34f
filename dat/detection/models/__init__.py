"""The DETR family on any timm backbone. A detector is one file of this folder, which registers it under its name."""

from importlib import import_module
from pkgutil import iter_modules

from dat.detection.models.base import BaseDETR, ModelConfig
from dat.detection.models.registry import DETECTORS, build_model, check_model, register

__all__ = ["DETECTORS", "BaseDETR", "ModelConfig", "build_model", "check_model", "register"]

for _module in iter_modules(__path__):
    import_module(f"{__name__}.{_module.name}")
