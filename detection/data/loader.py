"""Data sets and loaders for training and evaluation.

What a training sample is depends on (seed, epoch, index) alone, and the order of the samples on (seed, epoch): neither
the number of workers nor an interruption changes them.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler
from torchvision.ops import box_convert

from dat.training.loop import isolated_rng, loader_options

from .coco import ImageRecord, read_sample
from .transforms import resized_size

Sample = tuple[Tensor, dict[str, Any]]
Batch = tuple[Tensor, Tensor | None, list[dict[str, Any]]]


class DetectionDataset(Dataset[Sample]):
    """Items are asked for as (epoch, index), and give an image [3, H, W] and its target.

    A target has "boxes" [n, 4] cxcywh in 0..1 of the image, "labels" [n], "image_id", and "size" (height, width) in
    pixels of the image file.
    """

    def __init__(self, records: Sequence[ImageRecord], transform: Callable[..., Any], seed: int):
        self.records = records
        self.transform = transform
        self.seed = seed

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, key: tuple[int, int]) -> Sample:
        epoch, index = key
        record = self.records[index]
        # without workers this runs in the training process, whose own generator must not move
        with isolated_rng(self.seed, epoch, index):
            image, target = self.transform(*read_sample(record))
        height, width = image.shape[-2:]
        boxes = box_convert(target["boxes"].as_subclass(Tensor), "xyxy", "cxcywh")
        return image.as_subclass(Tensor), {
            "boxes": boxes / torch.tensor([width, height, width, height], dtype=boxes.dtype),
            "labels": target["labels"],
            "image_id": record.id,
            "size": (record.height, record.width),
        }


class AspectRatioBatchSampler(Sampler[list[tuple[int, int]]]):
    """Batches of (epoch, index) whose images are all upright or all wide, so that less of a batch is padding.

    The images left over from both kinds make mixed batches. What fills no batch is left out of that epoch, unless there
    are fewer images than one batch takes. Every rank gets equally many batches; all have `batch_size` images but for
    the case of too few, in which images are repeated where that is needed to give every rank the same number.
    """

    def __init__(self, records: Sequence[ImageRecord], batch_size: int, seed: int, rank: int = 0, world_size: int = 1):
        self.wide = np.array([record.width > record.height for record in records])
        self.batch_size = batch_size
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.epoch = 0
        self.start = 0

    def set_position(self, epoch: int, start: int = 0) -> None:
        """The next iteration gives the batches of `epoch`, but for the first `start`."""
        self.epoch = epoch
        self.start = start

    def __len__(self) -> int:
        """Batches of a whole epoch, whatever `start` is."""
        return max(1, len(self.wide) // (self.batch_size * self.world_size))

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for batch in self._batches()[self.start :]:
            # strided, not sliced: also the ranks' shares of a short batch are equal
            yield [(self.epoch, int(index)) for index in batch[self.rank :: self.world_size]]

    def _batches(self) -> list[np.ndarray]:
        generator = np.random.default_rng((self.seed, self.epoch))
        order = generator.permutation(len(self.wide))
        step = self.batch_size * self.world_size
        if len(order) < step:
            share = -(-len(order) // self.world_size)
            return [np.resize(order, share * self.world_size)]
        batches, rest = [], []
        for kind in (order[self.wide[order]], order[~self.wide[order]]):
            whole = len(kind) // step * step
            batches += np.split(kind[:whole], len(kind) // step) if whole else []
            rest.append(kind[whole:])
        left = np.concatenate(rest)
        batches += np.split(left[: len(left) // step * step], len(left) // step) if len(left) >= step else []
        return [batches[i] for i in generator.permutation(len(batches))]


class SameSizeBatchSampler(Sampler[list[tuple[int, int]]]):
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

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
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
    sampler: Sampler[list[tuple[int, int]]],
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
