"""Pictures of a folder or a tar, one class per folder, with augmentation that depends on (seed, epoch, index) alone."""

import struct
import tarfile
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from timm.data import ImageDataset, create_transform
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from classification.config import DataConfig
from dat.training.errors import ConfigError, DataError
from dat.training.loop import EpochBatchSampler, isolated_rng, loader_options

# PIL reports a broken file in several ways
UNREADABLE = (OSError, SyntaxError, ValueError, struct.error, tarfile.TarError, Image.DecompressionBombError)
# more broken pictures than this in a row: something else is wrong
MAX_IN_A_ROW = 100


def open_split(root: str, path: str, key: str, class_names: Sequence[str] | None = None) -> tuple[Any, list[str]]:
    """Lists the pictures of one split.

    Args:
        root, path: `data.root` and the split's path below it: a folder or a .tar, one folder per class.
        key: of the split in the configuration, for messages.
        class_names: those to number the classes by; None takes the folders' names, sorted naturally.
    Returns:
        timm's reader, item i is (open file, class index), and the class names.
    Raises:
        DataError: nothing there, no pictures, pictures outside class folders, or a class not in class_names.
    """
    place = Path(root) / path
    if not place.exists():
        raise DataError(f"{key}: {place} does not exist; it should be a folder or a .tar with one folder per class")
    if place.is_file() and place.suffix != ".tar":
        raise DataError(f"{key}: {place} is a file that is not a .tar")
    try:
        reader = ImageDataset(str(place)).reader
    # timm gives up on a split without pictures in its own way for folders and for tars
    except (RuntimeError, ValueError, AssertionError, tarfile.TarError) as error:
        raise DataError(f"{key}: {place} holds no readable pictures in class folders") from error
    found = _class_names(reader)
    if not all(found):
        raise DataError(f"{key}: {place} holds pictures outside class folders; it should hold one folder per class")
    if class_names is None:
        return reader, found
    unknown = [name for name in found if name not in class_names]
    if unknown:
        raise DataError(
            f"{key}: {place} has {len(found)} classes, {len(unknown)} of them (such as {unknown[0]!r}) not among the "
            f"{len(class_names)} classes of the training data"
        )
    if found == list(class_names):
        return reader, found
    return ImageDataset(str(place), class_map={name: i for i, name in enumerate(class_names)}).reader, found


def _class_names(reader: Any) -> list[str]:
    indices = reader.class_to_idx if hasattr(reader, "class_to_idx") else reader.class_name_to_idx
    return sorted(indices, key=indices.get)


def make_transform(data: DataConfig, training: bool, normalize: bool = True) -> Any:
    """timm's transform from a PIL picture to a tensor [3, img_size, img_size]. Raises ConfigError.

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
    _keep_one_bit(transform)
    return transform


def _keep_one_bit(transform: Any) -> None:
    # timm's Posterize may ask for 0 bits, a black picture; Pillow 13 refuses that
    for step in transform.transforms:
        operations = [*getattr(step, "ops", ()), *chain.from_iterable(getattr(step, "policy", ()))]
        for operation in operations:
            if operation.name.startswith("Posterize"):
                operation.level_fn = partial(_at_least_one, operation.level_fn)


def _at_least_one(level_fn: Any, level: float, hparams: dict[str, Any]) -> tuple[int]:
    return (max(1, *level_fn(level, hparams)),)


def read_picture(reader: Any, index: int) -> tuple[Image.Image, int]:
    """Picture `index` in RGB and its class. Raises one of UNREADABLE."""
    file, label = reader[index]
    with file, Image.open(file) as picture:
        return picture.convert("RGB"), int(label)


class TrainPictures(Dataset[tuple[Tensor, int, int, int]]):
    """Item (epoch, index) is (image, label, index, used): an unreadable picture is replaced by the next readable one.

    `used` is the index that was read in the end; every picture from `index` up to it is unreadable.
    """

    def __init__(self, reader: Any, transform: Any, seed: int) -> None:
        self.reader, self.transform, self.seed = reader, transform, seed

    def __len__(self) -> int:
        return len(self.reader)

    def __getitem__(self, item: tuple[int, int]) -> tuple[Tensor, int, int, int]:
        epoch, index = item
        for step in range(min(len(self), MAX_IN_A_ROW)):
            used = (index + step) % len(self)
            try:
                picture, label = read_picture(self.reader, used)
            except UNREADABLE:
                continue
            with isolated_rng(self.seed, epoch, index):
                return self.transform(picture), label, index, used
        name = self.reader.filename(index)
        raise DataError(f"data.train: no picture can be read: {min(len(self), MAX_IN_A_ROW)} in a row from {name} on")


class EvalPictures(Dataset[tuple[Tensor, int, int]]):
    """Item i is (image, label, i) of every world_size-th picture; an unreadable one is black, with label -1."""

    def __init__(self, reader: Any, transform: Any, rank: int = 0, world_size: int = 1) -> None:
        self.reader, self.transform = reader, transform
        self.indices = range(rank, len(reader), world_size)

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, item: int) -> tuple[Tensor, int, int]:
        index = self.indices[item]
        try:
            picture, label = read_picture(self.reader, index)
        except UNREADABLE:
            picture, label = Image.new("RGB", (32, 32)), -1
        return self.transform(picture), label, index


def train_loader(pictures: TrainPictures, sampler: EpochBatchSampler, workers: int, pin: bool) -> DataLoader[Any]:
    """Batches (images [B, 3, H, W], labels [B], index [B], used [B]) of the sampler's epoch."""
    return DataLoader(pictures, batch_sampler=sampler, **loader_options(workers, pin))


def eval_loader(pictures: EvalPictures, batch_size: int, workers: int, pin: bool) -> DataLoader[Any]:
    """Batches (images [B, 3, H, W], labels [B], index [B]), in order."""
    return DataLoader(pictures, batch_size, **loader_options(workers, pin))


class SkippedPictures:
    """Collects unreadable pictures, warns of them once by number, and lists them in a file."""

    def __init__(self, reader: Any, path: Path | None) -> None:
        self.reader, self.path = reader, path
        self.names: set[str] = set()

    def add(self, index: Tensor, used: Tensor) -> None:
        """Notes the pictures from index [B] up to used [B], as TrainPictures gives them."""
        for first, last in torch.stack([index, used], dim=1)[index != used].tolist():
            count = (last - first) % len(self.reader)
            self.names.update(self.reader.filename((first + i) % len(self.reader)) for i in range(count))

    def add_unlabelled(self, index: Tensor, labels: Tensor) -> None:
        """Notes the pictures index [B] whose label is -1, as EvalPictures gives them."""
        self.names.update(self.reader.filename(i) for i in index[labels < 0].tolist())

    def report(self) -> str | None:
        """Writes the list; returns a line to warn with, None when every picture could be read."""
        if not self.names:
            return None
        where = ""
        if self.path is not None:
            self.path.write_text("".join(f"{name}\n" for name in sorted(self.names)), encoding="utf-8")
            where = f"; they are listed in {self.path}"
        return f"{len(self.names)} unreadable pictures were left out{where}"
