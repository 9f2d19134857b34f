"""Accuracy of a classifier on a split, and by ImageNet's reassessed labels and on ImageNet-V2."""

import logging
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from timm.data import RealLabelsImagenet
from torch import nn
from torch.utils.data import DataLoader

from dat.classification.config import ClassificationConfig
from dat.classification.data import EvalImages, SkippedImages, make_transform
from dat.classification.readers import Split, open_place
from dat.classification.results import Results
from dat.engine.distributed import Distributed, gather
from dat.engine.loaders import Loader
from dat.engine.optim import amp_context
from dat.utils.errors import DataError
from dat.utils.modules import evaluating

logger = logging.getLogger(__name__)


@torch.no_grad()
def evaluate(
    model: nn.Module, loader: DataLoader[Any], distributed: Distributed, amp: str, skipped: SkippedImages
) -> Results:
    """Predictions for every readable image of a loader, over all processes; each of them returns the same.

    Args:
        model: images [B, 3, H, W] to logits [B, K]; left in the mode in which it came.
        loader: of EvalImages; each process evaluates a part of the images.
        distributed, amp: as in training.
        skipped: collects unreadable images.
    Raises:
        DataError: no image could be read.
    """
    device = distributed.device
    found: list[Results] = []
    with evaluating(model):
        for images, labels, index in loader:
            skipped.add_unlabelled(index, labels)
            readable = labels >= 0
            if readable.any():
                with amp_context(device, amp):
                    # `forward` is not compiled: a compiled model would be compiled again for the last batch.
                    logits = model.forward(images[readable].to(device, non_blocking=True))
                found.append(_results(logits.float(), labels[readable], index[readable]))
    parts = [part for results in gather(found) for part in results]
    if not parts:
        raise DataError("data.val: no image can be read")
    return Results.join(parts)


def _results(logits: torch.Tensor, labels: torch.Tensor, index: torch.Tensor) -> Results:
    on_device = labels.to(logits.device)
    logs = logits.log_softmax(1)
    top = logs.topk(min(5, logits.shape[1]), dim=1)
    losses = F.nll_loss(logs, on_device, reduction="none")
    # mps has no float64.
    values = (top.indices.cpu(), top.values.exp().cpu(), losses.cpu().double())
    return Results(index.numpy(), labels.numpy(), *(value.numpy() for value in values))


def evaluate_split(
    model: nn.Module, config: ClassificationConfig, split: Split, distributed: Distributed
) -> tuple[Results, dict[str, float]]:
    """The results of a split and, with loading, {"images_per_second", "seconds"}; warns of unreadable images."""
    data, train = config.data, config.train
    images = EvalImages(split, make_transform(data, training=False), distributed.rank, distributed.world_size)
    loader = Loader(images, train.workers, distributed.device.type == "cuda", batch_size=train.eval_batch_size)
    skipped = SkippedImages(split, path=None)
    start = time.perf_counter()
    results = evaluate(model, loader, distributed, train.amp, skipped)
    seconds = time.perf_counter() - start
    if warning := skipped.write(distributed):
        logger.warning(f"warning: {warning}")
    return results, {"images_per_second": round(len(results.index) / seconds, 2), "seconds": round(seconds, 2)}


def real_accuracy(results: Results, split: Split, path: str) -> dict[str, float]:
    """{"top1", "top5"} in percent by the reassessed labels of ImageNet's validation images, of those that have any.

    Args:
        results: of ImageNet's validation images, under their own names.
        path: real.json; "" takes the copy that comes with timm.
    Raises:
        DataError: not that file, or other images.
    """
    names = [Path(split.name(int(i))).name for i in results.index]
    try:
        labels = RealLabelsImagenet([split.name(i) for i in range(len(split))], path or None).real_labels
        given = [labels[name] for name in names]
    except (OSError, ValueError, TypeError, AssertionError, KeyError) as error:
        raise DataError(
            f"--real {path}: should be the labels of ImageNet's 50,000 validation images, and data.val these, named "
            f"ILSVRC2012_val_00000001.JPEG and so on; it has {len(split)}, such as {names[0]}"
        ) from error
    rows = [(top, right) for top, right in zip(results.top.tolist(), given, strict=True) if right]
    return {
        f"top{k}": round(100 * float(np.mean([not set(top[:k]).isdisjoint(right) for top, right in rows])), 4)
        for k in (1, 5)
    }


def open_v2(folder: Path, num_classes: int) -> Split:
    """ImageNet-V2, whose folders are named 0 to 999 after the classes in the order of their WordNet ids."""
    return open_place(folder, "--v2", [str(k) for k in range(num_classes)])
