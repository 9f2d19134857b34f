"""Data sets and loaders for training and evaluation.

A training sample depends on (seed, epoch, index) only, and the order of the samples on (seed, epoch) only: neither the
number of workers nor an interruption changes them.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, Sampler
from torchvision.ops import box_convert

from dat.detection.config import DetectionConfig
from dat.detection.data.cache import ImageCache
from dat.detection.data.mixing import Mixing
from dat.detection.data.records import Annotations, ImageRecord, Sample, read_sample
from dat.detection.data.transforms import Canvas, resized_size, train_transform, val_transform
from dat.engine.distributed import Distributed
from dat.engine.imbalance import draw_images, repeat_factors
from dat.engine.loaders import EpochBatchSampler, Loader
from dat.engine.seeds import isolated_rng


class Batch(NamedTuple):
    """Images [B, 3, H, W], mask [B, H, W] bool, True on padding (None where there is none), and B targets."""

    images: Tensor
    mask: Tensor | None
    targets: list[dict[str, Any]]


class DetectionDataset(Dataset[Sample]):
    """Images and targets, indexed by (epoch, index) or (epoch, index, maximum height, maximum width).

    An index beyond the number n of images is that of image index % n, with its own augmentation.

    A target has "boxes" [n, 4] cxcywh in 0..1 of the image, "labels" [n], "image_id", "size" (height, width) in pixels
    of the image file, and any other entries that the reader and the transform add.
    """

    def __init__(
        self,
        records: Sequence[ImageRecord],
        transform: Callable[..., Any],
        seed: int,
        cache: ImageCache | None = None,
        mixing: Mixing | None = None,
    ):
        self.records, self.transform, self.seed, self.cache, self.mixing = records, transform, seed, cache, mixing

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, key: tuple[int, ...]) -> Sample:
        epoch, index, *canvas = key
        record = self.records[index % len(self)]
        # Without workers this runs in the training process, whose generator must not advance.
        with isolated_rng(self.seed, epoch, index):
            sample = self._read(record)
            if self.mixing is not None:
                sample = self.mixing(sample, epoch, self._draw)
            image, target = sample
            if canvas:
                target["canvas"] = Canvas(*canvas)
            image, target = self.transform(image, target)
        height, width = image.shape[-2:]
        boxes = box_convert(target["boxes"].as_subclass(Tensor), "xyxy", "cxcywh")
        target["boxes"] = boxes / torch.tensor([width, height, width, height], dtype=boxes.dtype)
        target.pop("canvas", None)
        return Sample(
            image.as_subclass(Tensor), {**target, "image_id": record.id, "size": (record.height, record.width)}
        )

    def _read(self, record: ImageRecord) -> Sample:
        return read_sample(record, None if self.cache is None else self.cache.get(record.path))

    def _draw(self) -> Sample:
        """A random sample, before augmentation."""
        return self._read(self.records[int(torch.randint(len(self), ()))])


class AspectRatioBatchSampler(EpochBatchSampler):
    """Batches of the keys of a DetectionDataset whose images have similar aspect ratios, so that padding is small.

    The steps of an epoch, which images they take and in which order, depend on seed, epoch and the number of images of
    a step only. Steps are all upright or all wide except for the images left over from both kinds; a remainder that
    fills no step is left out of that epoch. All batches have `batch_size` images, unless the data set is smaller than a
    step: then its images are dealt evenly, and repeated where that is needed.

    Args:
        records: of the data set.
        batch_size, seed, rank, world_size, accumulate, factors: see EpochBatchSampler.
        max_pixels: of a batch with its padding, 0: no limit. Each image is then limited to an equal part of them, of
            the mean shape of its batch.
        pad_multiple: of the sides of a batch, in pixels.
    """

    def __init__(
        self,
        records: Sequence[ImageRecord],
        batch_size: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        accumulate: int = 1,
        max_pixels: int = 0,
        pad_multiple: int = 1,
        factors: np.ndarray | None = None,
    ):
        super().__init__(len(records), batch_size, seed, rank, world_size, accumulate, factors)
        self.aspect = np.array([record.width / record.height for record in records])
        self.max_pixels, self.pad_multiple = max_pixels, pad_multiple

    def __iter__(self) -> Iterator[list[tuple[int, ...]]]:
        for step in self._steps()[self.first_step :]:
            batches = step.reshape(self.accumulate, self.world_size, -1)
            for batch in batches[:, self.rank]:
                canvas = self._canvas(batch)
                yield [(self.epoch, int(index), *canvas) for index in batch]

    def _steps(self) -> list[np.ndarray]:
        """The images of every step of the epoch."""
        generator = np.random.default_rng((self.seed, self.epoch))
        order = draw_images(generator.permutation(self.length), self.factors, generator)
        size, parts = self.images, self.accumulate * self.world_size
        if len(order) < size:
            return [np.resize(order, -(-len(order) // parts) * parts)]
        wide = self._aspects(order) > 1
        steps, rest = [], []
        for kind in (order[wide], order[~wide]):
            whole = len(kind) // size * size
            steps += self._similar(kind[:whole])
            rest.append(kind[whole:])
        left = np.concatenate(rest)
        steps += self._similar(left[: len(left) // size * size])
        return [steps[i] for i in generator.permutation(len(steps))]

    def _similar(self, order: np.ndarray) -> list[np.ndarray]:
        """Splits images, a multiple of a step's, into steps of similar aspect ratio: sorted among ten steps' images."""
        steps: list[np.ndarray] = []
        for start in range(0, len(order), 10 * self.images):
            chunk = order[start : start + 10 * self.images]
            chunk = chunk[np.argsort(self._aspects(chunk), kind="stable")]
            steps += np.split(chunk, len(chunk) // self.images)
        return steps

    def _aspects(self, indices: np.ndarray) -> np.ndarray:
        return self.aspect[indices % self.length]

    def _canvas(self, batch: np.ndarray) -> tuple[int, ...]:
        """(rows, columns) that an image of the batch may have at most, () without a limit."""
        if not self.max_pixels:
            return ()
        multiple = self.pad_multiple
        pixels = self.max_pixels / len(batch)
        aspects = self._aspects(batch)
        aspect = math.sqrt(aspects.min() * aspects.max())
        rows = max(1, math.floor(math.sqrt(pixels / aspect) / multiple)) * multiple
        return rows, max(1, math.floor(pixels / rows / multiple)) * multiple


class SameSizeBatchSampler(Sampler[list[tuple[int, ...]]]):
    """Batches, for evaluation, of images that are resized to the same size, so that AP is the same at any batch size.

    Each rank gets every `world_size`-th batch; some ranks may get one more than others.
    """

    def __init__(
        self,
        records: Sequence[ImageRecord],
        batch_size: int,
        size: int,
        max_size: int,
        rank: int = 0,
        world_size: int = 1,
    ):
        by_size: dict[tuple[int, int], list[tuple[int, ...]]] = defaultdict(list)
        for index, record in enumerate(records):
            by_size[resized_size(record.height, record.width, size, max_size)].append((0, index))
        batches = [
            indices[i : i + batch_size] for indices in by_size.values() for i in range(0, len(indices), batch_size)
        ]
        self.batches = batches[rank::world_size]

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[list[tuple[int, ...]]]:
        return iter(self.batches)


def collate(samples: Sequence[Sample], pad_multiple: int = 1) -> Batch:
    """Pads images at the right and below, with zeros, to the largest sides rounded up to a multiple."""
    sizes = [image.shape[-2:] for image, _ in samples]
    height, width = (-(-max(sides) // pad_multiple) * pad_multiple for sides in zip(*sizes, strict=True))
    paddings = [(0, width - w, 0, height - h) for h, w in sizes]
    images, targets = zip(*samples, strict=True)
    if not any(map(any, paddings)):
        return Batch(torch.stack(images), None, list(targets))
    masks = [F.pad(torch.zeros(size, dtype=torch.bool), p, value=True) for size, p in zip(sizes, paddings, strict=True)]
    padded = [F.pad(image, p) for image, p in zip(images, paddings, strict=True)]
    return Batch(torch.stack(padded), torch.stack(masks), list(targets))


def make_loader(
    dataset: Dataset[Any], sampler: Sampler[Any], pad_multiple: int, workers: int, pin_memory: bool
) -> DataLoader[Batch]:
    collate_fn = partial(collate, pad_multiple=pad_multiple)
    return Loader(dataset, workers, pin_memory, batch_sampler=sampler, collate_fn=collate_fn)


def train_loader(
    annotations: Annotations,
    config: DetectionConfig,
    distributed: Distributed,
    cache: ImageCache | None = None,
    first: Callable[..., Any] | None = None,
) -> tuple[DataLoader[Batch], AspectRatioBatchSampler]:
    """The loader of this process's batches, augmented by `first` and then as `data.train` says, and its sampler."""
    data, split, train = config.data, config.data.train, config.train
    factors = None
    if split.balance:
        labels = [record.labels[~record.crowd] for record in annotations.records]
        factors = repeat_factors(labels, len(annotations.categories), split.balance)
    sampler = AspectRatioBatchSampler(
        annotations.records,
        train.batch_size,
        config.seed,
        distributed.rank,
        distributed.world_size,
        train.accumulate,
        split.max_pixels,
        data.pad_multiple,
        factors,
    )
    mixing = None
    if split.mosaic or split.mixup or split.copy_paste or split.scale_jitter:
        mixing = Mixing(split, math.ceil(train.total_steps(sampler.steps) / sampler.steps))
    transform = train_transform(split, data.mean, data.std, first)
    dataset = DetectionDataset(annotations.records, transform, config.seed, cache, mixing)
    return make_loader(dataset, sampler, data.pad_multiple, train.workers, distributed.device.type == "cuda"), sampler


def val_loader(
    annotations: Annotations, config: DetectionConfig, distributed: Distributed, cache: ImageCache | None = None
) -> DataLoader[Batch]:
    """The loader of this process's batches, resized as `data.val` says."""
    data, split, train = config.data, config.data.val, config.train
    transform = val_transform(split, data.mean, data.std)
    dataset = DetectionDataset(annotations.records, transform, config.seed, cache)
    ranks = (distributed.rank, distributed.world_size)
    sampler = SameSizeBatchSampler(annotations.records, train.eval_batch_size, split.size, split.max_size, *ranks)
    return make_loader(dataset, sampler, data.pad_multiple, train.workers, distributed.device.type == "cuda")
