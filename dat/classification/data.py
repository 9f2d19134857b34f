"""Samples and batches of a split's images, with augmentation that depends on (seed, epoch, index) only."""

from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data import Mixup, create_transform
from torch import Tensor
from torch.utils.data import Dataset, default_collate

from dat.classification.config import DataConfig, TrainConfig
from dat.classification.readers import Split, listed_labels
from dat.engine.distributed import Distributed, gather
from dat.engine.pipelines import is_albumentations, run_albumentations
from dat.engine.seeds import isolated_rng
from dat.utils.errors import ConfigError, DataError
from dat.utils.files import atomic_write
from dat.utils.images import UNREADABLE
from dat.utils.text import printable

# More unreadable images than this in a row mean that something else is wrong.
MAX_IN_A_ROW = 100
# The number of classes of which an image is read before training.
TRIED_CLASSES = 100


def make_transform(data: DataConfig, training: bool, normalize: bool = True) -> Any:
    """timm's transform from a PIL image to a tensor [3, img_size, img_size]. Raises ConfigError.

    `normalize` False: the tensor is uint8, for a model whose graph normalises.
    """
    augment = asdict(data.augment) if training else {}
    try:
        transform = create_transform(
            data.img_size, training, mean=data.mean, std=data.std, interpolation=data.interpolation,
            crop_pct=data.crop_pct, crop_mode=data.crop_mode, normalize=normalize, **augment,
        )  # fmt: skip
    except (AssertionError, ValueError, KeyError, IndexError) as error:
        raise ConfigError(f"data.augment: timm cannot make the transform: {error or data.augment}") from error
    # timm's Posterize may keep 0 bits, a black image, which Pillow 13 refuses.
    for step in transform.transforms:
        for operation in [*getattr(step, "ops", ()), *chain.from_iterable(getattr(step, "policy", ()))]:
            if operation.name.startswith("Posterize"):
                operation.level_fn = partial(_at_least_one, operation.level_fn)
    return transform


class UserTransform:
    """Calls a user's augmentation of an image before the other.

    Args:
        first: maps a PIL image in RGB to one, or is an albumentations.Compose.
        then: the other, as make_transform gives it.

    Raises:
        ConfigError: `first` is no function; when called: its result is not a PIL image in RGB.
    """

    def __init__(self, first: Callable[..., Any], then: Callable[[Image.Image], Tensor]) -> None:
        if not callable(first):
            raise ConfigError(f"transform: is of type {type(first).__name__}, should be a function of an image")
        self.first, self.then = first, then

    def __call__(self, image: Image.Image) -> Tensor:
        if is_albumentations(self.first):
            found = run_albumentations(self.first, np.array(image))["image"]
            if isinstance(found, np.ndarray) and found.dtype == np.uint8:
                found = Image.fromarray(found)
        else:
            found = self.first(image)
        if not isinstance(found, Image.Image) or found.mode != "RGB":
            kind = found.mode if isinstance(found, Image.Image) else getattr(found, "dtype", type(found).__name__)
            raise ConfigError(
                f"transform: gave an image of {kind}, should be a PIL image in RGB (albumentations: uint8 [H, W, 3]); "
                "data.mean and data.std normalise it afterwards"
            )
        return self.then(found)


def _at_least_one(level_fn: Any, level: float, hparams: dict[str, Any]) -> tuple[int]:
    return (max(1, *level_fn(level, hparams)),)


def check_classes(split: Split) -> None:
    """Raises DataError unless the images for training are of two classes or more."""
    if len(split.class_names) < 2:
        raise DataError(
            f"data.train: all {len(split)} images are of one class, {', '.join(split.class_names)}; "
            "there should be at least two, each in a folder of its own"
        )


def check_readable(split: Split, name: str) -> None:
    """Raises DataError if no image of a split can be read, or none of many of them."""
    chosen = np.linspace(0, len(split) - 1, min(len(split), MAX_IN_A_ROW)).astype(int)
    reason = _none_readable(split, chosen)
    if reason or not len(split):
        tried = f"{len(chosen)} of {len(split)} were tried" if len(chosen) < len(split) else f"there are {len(split)}"
        raise DataError(f"data.{name}: no image can be read, {tried}, such as {reason}")


def check_readable_classes(split: Split) -> None:
    """Raises DataError if no training image of a class can be read; of more than TRIED_CLASSES, that many are tried."""
    labels = listed_labels(split.reader)
    # Other readers would read every sample for its class, or do not number classes.
    if labels is None or labels.dtype.kind not in "iu":
        return
    labels = labels[split.indices]
    order = np.argsort(labels, kind="stable")
    groups = np.split(order, np.flatnonzero(np.diff(labels[order])) + 1)
    groups = [group for group in groups if (labels[group] >= 0).any()]
    for k in np.linspace(0, len(groups) - 1, min(len(groups), TRIED_CLASSES)).astype(int):
        if reason := _none_readable(split, groups[k]):
            name = split.class_names[labels[groups[k][0]]]
            raise DataError(f"data.train: none of the {len(groups[k])} images of class {name!r} can be read: {reason}")


def _none_readable(split: Split, indices: np.ndarray) -> str:
    """Why the first of some images cannot be read, if none of them can; "": one can."""
    reason = ""
    for index in indices.tolist():
        try:
            split.read(index)
            return ""
        except UNREADABLE as error:
            reason = reason or split.describe_error(index, error)
    return reason


class TrainImages(Dataset[tuple[Tensor, int, int, int, int]]):
    """Item (epoch, index) is (image, label, index, used, epoch); the next readable image replaces an unreadable one.

    An index beyond the number n of images is that of image index % n, with its own augmentation.
    `used` is the index that was read in the end; every image from `index` up to it is unreadable.
    """

    def __init__(self, split: Split, transform: Any, seed: int) -> None:
        self.split, self.transform, self.seed = split, transform, seed

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, item: tuple[int, int]) -> tuple[Tensor, int, int, int, int]:
        epoch, index = item
        most = min(len(self), MAX_IN_A_ROW)
        for used in ((index + step) % len(self) for step in range(most)):
            try:
                image, label = self.split.read(used)
            except UNREADABLE:
                continue
            with isolated_rng(self.seed, epoch, index):
                return self.transform(image), label, index, used, epoch
        raise DataError(f"data.train: no image can be read: {most} in a row from {self.split.name(index)} on")


class EvalImages(Dataset[tuple[Tensor, int, int]]):
    """Item i is (image, label, index) of every world_size-th image; an unreadable one is black, with label -1."""

    def __init__(self, split: Split, transform: Any, rank: int = 0, world_size: int = 1) -> None:
        self.split, self.transform = split, transform
        self.indices = range(rank, len(split), world_size)

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, item: int) -> tuple[Tensor, int, int]:
        index = self.indices[item]
        try:
            image, label = self.split.read(index)
        except UNREADABLE:
            image, label = Image.new("RGB", (32, 32)), -1
        return self.transform(image), label, index


class MixPairs:
    """Collates training samples and mixes them by two, the first with the second and so on, with timm's Mixup.

    The draw for a pair depends on (seed, epoch, index of its first image) only: neither on the other images of the
    batch, nor on how the images of a step are divided into batches of an even number.
    """

    def __init__(self, train: TrainConfig, num_classes: int, seed: int) -> None:
        self.mixup = Mixup(train.mixup, train.cutmix, label_smoothing=train.smoothing, num_classes=num_classes)
        self.seed = seed

    def __call__(self, samples: list[Any]) -> list[Tensor]:
        """Collates samples of TrainImages to a batch with labels [B, num_classes] float."""
        images, labels, index, used, epoch = default_collate(samples)
        targets = []
        for first in range(0, len(images), 2):
            pair = slice(first, first + 2)
            # The third counter makes these draws independent of the image's augmentation.
            with isolated_rng(self.seed, int(epoch[first]), int(index[first]), 1):
                images[pair], mixed = self.mixup(images[pair], labels[pair])
            targets.append(mixed)
        return [images, torch.cat(targets), index, used, epoch]


class SkippedImages:
    """Collects the names of unreadable images, and writes those that all processes met.

    Args:
        split: of the images; files that it left out are in the list from the start.
        path: of the list; None: no file.
        resumed: the list of the run so far is kept.
    """

    def __init__(self, split: Split, path: Path | None, resumed: bool = False) -> None:
        self.split, self.path, self.names = split, path, set(split.left_out)
        if path is not None and resumed and path.is_file():
            self.names.update(path.read_text(encoding="utf-8").splitlines())

    def add(self, index: Tensor, used: Tensor) -> None:
        """Adds the images from index [B] up to used [B], as TrainImages gives them."""
        for first, last in torch.stack([index, used], dim=1)[index != used].tolist():
            count = (last - first) % len(self.split)
            self.names.update(self.split.name((first + i) % len(self.split)) for i in range(count))

    def add_unlabelled(self, index: Tensor, labels: Tensor) -> None:
        """Adds the images index [B] whose label is -1, as EvalImages gives them."""
        self.names.update(self.split.name(i) for i in index[labels < 0].tolist())

    def write(self, distributed: Distributed) -> str | None:
        """Writes the list; returns a warning, None where every image could be read. Every process has to call it."""
        self.names = {printable(name) for name in set().union(*gather(self.names))}
        if not self.names:
            return None
        where = ""
        if self.path is not None:
            if distributed.main:
                with atomic_write(self.path) as temporary:
                    temporary.write_text("".join(f"{name}\n" for name in sorted(self.names)), encoding="utf-8")
            where = f"; they are listed in {self.path}"
        return f"{len(self.names)} unreadable images were left out{where}"
