"""Measures the average precision of a checkpoint on a validation split.

    python -m detection.evaluate CHECKPOINT [key.path=value ...]
    torchrun --nproc-per-node N -m detection.evaluate CHECKPOINT [key.path=value ...]

The overrides change the configuration that the checkpoint carries, for instance data.root or data.val.annotations.
Prints AP by class; writes metrics.json, detections.json, pictures and report.html, a page of them all, into evaluation/
beside the checkpoint, or into `--out`.
"""

from torch.utils.data import DataLoader

from dat.detection.config import DetectionConfig
from dat.detection.data import (
    Annotations,
    Batch,
    DetectionDataset,
    SameSizeBatchSampler,
    make_loader,
    val_transform,
)
from dat.detection.data.cache import ImageCache
from dat.engine.distributed import Distributed


def val_loader(
    annotations: Annotations, config: DetectionConfig, distributed: Distributed, cache: ImageCache | None = None
) -> DataLoader[Batch]:
    """This process's share of the images, resized as `data.val` says."""
    data, train = config.data, config.train
    transform = val_transform(size=data.val.size, max_size=data.val.max_size, mean=data.mean, std=data.std)
    sampler = SameSizeBatchSampler(
        annotations.records,
        train.eval_batch_size,
        data.val.size,
        data.val.max_size,
        distributed.rank,
        distributed.world_size,
    )
    dataset = DetectionDataset(annotations.records, transform, config.seed, cache)
    return make_loader(dataset, sampler, data.pad_multiple, train.workers, distributed.device.type == "cuda")
