"""Data sets and loaders for training and evaluation.

What a training sample is depends on (seed, epoch, index) alone, and the order of the samples on (seed, epoch): neither
the number of workers nor an interruption changes them.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler
from torchvision.ops import box_convert

from dat.detection.data.cache import ImageCache
from dat.detection.data.coco import ImageRecord, read_sample
from dat.detection.data.transforms import Canvas, resized_size
from dat.engine.loaders import loader_options
from dat.engine.seeds import isolated_rng

Sample = tuple[Tensor, dict[str, Any]]
Batch = tuple[Tensor, Tensor | None, list[dict[str, Any]]]


class DetectionDataset(Dataset[Sample]):
    """Items are asked for as (epoch, index) or (epoch, index, most rows, most columns): an image [3, H, W], its target.

    A target has "boxes" [n, 4] cxcywh in 0..1 of the image, "labels" [n], "image_id", and "size" (height, width) in
    pixels of the image file.
    """

    def __init__(
        self,
        records: Sequence[ImageRecord],
        transform: Callable[..., Any],
        seed: int,
        cache: ImageCache | None = None,
    ):
        self.records = records
        self.transform = transform
        self.seed = seed
        self.cache = cache

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, key: tuple[int, ...]) -> Sample:
        epoch, index, *canvas = key
        record = self.records[index]
        image, target = read_sample(record, None if self.cache is None else self.cache.get(record.path))
        if canvas:
            target["canvas"] = Canvas(*canvas)
        # without workers this runs in the training process, whose own generator must not move
        with isolated_rng(self.seed, epoch, index):
            image, target = self.transform(image, target)
        height, width = image.shape[-2:]
        boxes = box_convert(target["boxes"].as_subclass(Tensor), "xyxy", "cxcywh")
        return image.as_subclass(Tensor), {
            "boxes": boxes / torch.tensor([width, height, width, height], dtype=boxes.dtype),
            "labels": target["labels"],
            "image_id": record.id,
            "size": (record.height, record.width),
        }


class AspectRatioBatchSampler(Sampler[list[tuple[int, ...]]]):
    """Batches of the keys of a DetectionDataset whose images have similar aspect ratios, so that little is padding.

    An optimizer step takes `batch_size` images for each of its `accumulate` batches and each rank. The steps of an
    epoch, which images they take and in which order, depend on the product of the three alone. Steps are all upright
    or all wide but for the images left over from both kinds; what fills no step is left out of that epoch. Every rank
    gets equally many batches; all have `batch_size` images, unless all images together are fewer than a step takes:
    then they are dealt evenly, and repeated where that is needed.

    Args:
        records: of the data set.
        batch_size: images of a batch of one rank.
        seed: of the run.
        rank, world_size: this process and their number.
        accumulate: batches of a step.
        max_pixels: of a batch with its padding, 0: no limit. Each image is then limited to an equal share of them, of
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
    ):
        self.aspect = np.array([record.width / record.height for record in records])
        self.batch_size = batch_size
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.accumulate = accumulate
        self.max_pixels = max_pixels
        self.pad_multiple = pad_multiple
        self.epoch = 0
        self.start = 0

    def set_position(self, epoch: int, start: int = 0) -> None:
        """The next iteration gives the batches of `epoch`, but for those of the first `start` steps."""
        self.epoch = epoch
        self.start = start

    @property
    def images(self) -> int:
        """Images of a step, over all its batches and ranks."""
        return self.batch_size * self.accumulate * self.world_size

    @property
    def steps(self) -> int:
        """Steps of a whole epoch, whatever `start` is."""
        return max(1, len(self.aspect) // self.images)

    def __len__(self) -> int:
        """Batches of a whole epoch, whatever `start` is."""
        return self.steps * self.accumulate

    def __iter__(self) -> Iterator[list[tuple[int, ...]]]:
        for step in self._steps()[self.start :]:
            batches = step.reshape(self.accumulate, self.world_size, -1)
            for batch in batches[:, self.rank]:
                canvas = self._canvas(batch)
                yield [(self.epoch, int(index), *canvas) for index in batch]

    def _steps(self) -> list[np.ndarray]:
        """The images of every step of the epoch."""
        generator = np.random.default_rng((self.seed, self.epoch))
        order = generator.permutation(len(self.aspect))
        size, parts = self.images, self.accumulate * self.world_size
        if len(order) < size:
            share = -(-len(order) // parts)
            return [np.resize(order, share * parts)]
        wide = self.aspect[order] > 1
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
            some = order[start : start + 10 * self.images]
            some = some[np.argsort(self.aspect[some], kind="stable")]
            steps += np.split(some, len(some) // self.images)
        return steps

    def _canvas(self, batch: np.ndarray) -> tuple[int, ...]:
        """(rows, columns) that an image of the batch may have at most, () without a limit."""
        if not self.max_pixels:
            return ()
        multiple = self.pad_multiple
        share = self.max_pixels / len(batch)
        aspect = math.sqrt(self.aspect[batch].min() * self.aspect[batch].max())
        rows = max(1, math.floor(math.sqrt(share / aspect) / multiple)) * multiple
        return rows, max(1, math.floor(share / rows / multiple)) * multiple


class SameSizeBatchSampler(Sampler[list[tuple[int, ...]]]):
    """Batches, for evaluation, of images that are resized to the same size, so that AP is the same at any batch size.

    Each rank gets every `world_size`-th batch; ranks may differ in how many they get.
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
        by_size = defaultdict(list)
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


class Collate:
    """Pads the images of a batch, with zeros at the right and below, to the largest and a multiple of `pad_multiple`.

    Gives images [B, 3, H, W], mask [B, H, W] bool, True on padding (None where there is none), and a list of targets.
    """

    def __init__(self, pad_multiple: int = 1):
        self.pad_multiple = pad_multiple

    def __call__(self, samples: list[Sample]) -> Batch:
        images = [image for image, _ in samples]
        height, width = (
            -(-max(image.shape[axis] for image in images) // self.pad_multiple) * self.pad_multiple for axis in (1, 2)
        )
        targets = [target for _, target in samples]
        if all(image.shape[1:] == (height, width) for image in images):
            return torch.stack(images), None, targets
        batch = images[0].new_zeros(len(images), 3, height, width)
        mask = torch.ones(len(images), height, width, dtype=torch.bool)
        for i, image in enumerate(images):
            h, w = image.shape[1:]
            batch[i, :, :h, :w] = image
            mask[i, :h, :w] = False
        return batch, mask, targets


def make_loader(
    dataset: DetectionDataset,
    sampler: Sampler[list[tuple[int, ...]]],
    pad_multiple: int,
    workers: int,
    pin_memory: bool,
) -> DataLoader[Batch]:
    return DataLoader(
        dataset,
        batch_sampler=sampler,
        collate_fn=Collate(pad_multiple),
        **loader_options(workers, pin_memory),
    )
