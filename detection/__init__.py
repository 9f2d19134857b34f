"""Recipes of detection. The library is dat.detection, whose names are here too."""

from typing import Any

__all__ = ["DETR", "DINO", "DeformableDETR", "Detector", "HungarianMatcher", "SetCriterion", "official", "post_process"]


def __getattr__(name: str) -> Any:
    # Imported when used, so that the recipes print their --help at once.
    if name in __all__:
        import dat.detection

        return getattr(dat.detection, name)
    raise AttributeError(f"module 'detection' has no attribute {name!r}")
