"""Recipes of classification. The library is dat.classification, whose names are here too."""

from typing import Any

__all__ = ["Classifier", "Prediction"]


def __getattr__(name: str) -> Any:
    # Imported when used, so that the recipes print their --help at once.
    if name in __all__:
        import dat.classification

        return getattr(dat.classification, name)
    raise AttributeError(f"module 'classification' has no attribute {name!r}")
