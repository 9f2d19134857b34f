"""Augmentation that a user gives in Python: callables, and pipelines of Albumentations, which need not be installed."""

from typing import Any

import numpy as np
import torch


def is_albumentations(transform: Any) -> bool:
    """Whether this is an albumentations.Compose."""
    return isinstance(getattr(transform, "processors", None), dict)


def run_albumentations(compose: Any, image: np.ndarray, **inputs: Any) -> dict[str, Any]:
    """Calls an albumentations.Compose on an image uint8 [H, W, 3], with torch's generator as its source of randomness.

    `inputs`: its further arguments, such as bboxes. A sample's augmentation is then a function of seed and counters.
    """
    # Pipelines of version 2 have generators of their own; earlier ones draw from those of Python and numpy.
    if hasattr(compose, "set_random_seed"):
        compose.set_random_seed(int(torch.randint(2**31, ())))
    return compose(image=image, **inputs)


def describe_transform(transform: Any) -> str:
    """A transform as text for the log, "" for None."""
    return "" if transform is None else f", augmented by {type(transform).__name__} first"
