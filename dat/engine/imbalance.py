"""Rare classes: their weights in the loss, and how often their images are drawn."""

import difflib
import math
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from dat.utils.errors import ConfigError

ClassWeights = Literal["balanced"] | dict[str, float]


def class_weights(given: ClassWeights, class_names: Sequence[str], counts: np.ndarray) -> Tensor:
    """The weight [K] of each class in the loss, float32.

    Args:
        given: "balanced": inverse to the number of examples of a class, so that the mean over the examples is 1; or the
            weights of some classes by name, those of the others being 1.
        class_names: of the K classes.
        counts: [K] examples of each class; a class without examples weighs 1 where `given` is "balanced".

    Raises:
        ConfigError: a name that no class has.
    """
    if isinstance(given, Mapping):
        for name in given:
            if name not in class_names:
                near = difflib.get_close_matches(name, class_names, n=1) or list(class_names[:10])
                raise ConfigError(f"train.class_weights has {name!r}, its keys should be class names, as {near[0]!r}")
        return torch.tensor([given.get(name, 1.0) for name in class_names])
    weights = counts.sum() / (np.count_nonzero(counts) * np.maximum(counts, 1))
    return torch.from_numpy(np.where(counts > 0, weights, 1.0)).float()


def repeat_factors(labels: Sequence[np.ndarray], num_classes: int, threshold: float) -> np.ndarray:
    """How often each image is drawn in an epoch, [n] from 1 (LVIS, arXiv:1908.03195, version 2, appendix B.2).

    An image is drawn max_c max(1, sqrt(threshold / f_c)) times, where f_c is the share of images with its class c.

    Args:
        labels: of the objects of each image.
        num_classes: K.
        threshold: share of images, 0 to 1, below which a class is rare.
    """
    present = [np.unique(of_image) for of_image in labels]
    shares = np.bincount(np.concatenate(present), minlength=num_classes) / len(present)
    factors = np.sqrt(threshold / np.maximum(shares, 1 / len(present))).clip(min=1.0)
    return np.array([factors[of_image].max(initial=1.0) for of_image in present])


def balanced_factors(labels: np.ndarray, num_classes: int) -> np.ndarray:
    """How often each of n images with one label [n] is drawn in an epoch of n images that has all classes equally."""
    counts = np.bincount(labels, minlength=num_classes)
    return len(labels) / (np.count_nonzero(counts) * counts[labels])


def draw_images(order: np.ndarray, factors: np.ndarray | None, generator: np.random.Generator) -> np.ndarray:
    """The images of an epoch, shuffled.

    Args:
        order: permutation of n images.
        factors: [n], mean number of times that each is drawn; None: each once.

    Returns:
        `order` without factors; otherwise drawn_images(factors) numbers, image i at its r-th time as i + r * n. Each
        image is drawn its factor of times, rounded up or down at random (systematic sampling).
    """
    if factors is None:
        return order
    total = drawn_images(factors)
    ends = np.cumsum(factors[order])
    ends = np.floor(ends * (total / ends[-1]) + generator.random())
    ends[-1] = total
    counts = np.diff(ends, prepend=0).astype(int)
    times = np.arange(total) - np.repeat(np.cumsum(counts) - counts, counts)
    return generator.permutation(np.repeat(order, counts) + times * len(order))


def drawn_images(factors: np.ndarray) -> int:
    """Number of images in an epoch: the sum of the factors, rounded up."""
    return math.ceil(factors.sum() - 1e-6)
