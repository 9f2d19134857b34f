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

from dat.classification.classifier import Classifier
from dat.classification.data import EvalImages, SkippedImages, eval_loader, make_transform
from dat.classification.readers import Split, open_place, open_split
from dat.classification.report import write_report
from dat.classification.results import Results
from dat.engine.checkpoint import checkpoint_errors
from dat.engine.distributed import Distributed, gather
from dat.engine.optim import amp_context
from dat.utils.errors import DataError
from dat.utils.files import write_json

logger = logging.getLogger(__name__)


@torch.no_grad()
def evaluate(
    model: nn.Module, loader: DataLoader[Any], distributed: Distributed, amp: str, skipped: SkippedImages
) -> Results:
    """Predictions for every readable image of a loader, over all processes; each of them returns the same.

    Args:
        model: images [B, 3, H, W] to logits [B, K]; left in the mode in which it came.
        loader: see eval_loader; each process evaluates a part of the images.
        distributed, amp: as in training.
        skipped: collects unreadable images.
    Raises:
        DataError: no image could be read.
    """
    training = model.training
    model.eval()
    device = distributed.device
    found: list[Results] = []
    for images, labels, index in loader:
        skipped.add_unlabelled(index, labels)
        readable = labels >= 0
        if readable.any():
            with amp_context(device, amp):
                # `forward` is not compiled: a compiled model would be compiled again for the last batch.
                logits = model.forward(images[readable].to(device, non_blocking=True))
            found.append(_results(logits.float(), labels[readable], index[readable]))
    model.train(training)
    parts = [part for results in gather(found) for part in results]
    if not parts:
        raise DataError("data.val: no image can be read")
    return Results.join(parts)


def _results(logits: torch.Tensor, labels: torch.Tensor, index: torch.Tensor) -> Results:
    on_device = labels.to(logits.device)
    logs = logits.log_softmax(1)
    top = logs.topk(min(5, logits.shape[1]), dim=1)
    losses = F.nll_loss(logs, on_device, reduction="none")
    values = (top.indices, top.values.exp(), losses.double())
    return Results(index.numpy(), labels.numpy(), *(value.cpu().numpy() for value in values))


def evaluate_split(classifier: Classifier, split: Split) -> tuple[Results, dict[str, float]]:
    """The results of a split and, with loading, {"images_per_second", "seconds"}; warns of unreadable images."""
    data, train, distributed = classifier.config.data, classifier.config.train, classifier.distributed
    images = EvalImages(split, make_transform(data, training=False), distributed.rank, distributed.world_size)
    loader = eval_loader(images, train.eval_batch_size, train.workers, distributed.device.type == "cuda")
    skipped = SkippedImages(split, path=None)
    start = time.perf_counter()
    with checkpoint_errors(classifier.path or "the model"):
        results = evaluate(classifier.trained_model(), loader, distributed, train.amp, skipped)
    seconds = time.perf_counter() - start
    if warning := skipped.write(distributed):
        logger.warning(f"warning: {warning}")
    return results, {"images_per_second": round(len(results.index) / seconds, 2), "seconds": round(seconds, 2)}


def evaluate_classifier(
    classifier: Classifier, out: Path | None = None, real: str | None = None, v2: Path | None = None
) -> dict[str, Any]:
    """See Classifier.evaluate; the configuration is that of `classifier`."""
    names = classifier.class_names
    split = open_split(classifier.config.data, "val", names)
    results, more = evaluate_split(classifier, split)
    metrics = results.summarize(names, **more)
    if real is not None:
        metrics["real"] = real_accuracy(results, split, real)
    if v2 is not None:
        metrics["v2"] = evaluate_split(classifier, open_v2(v2, len(names)))[0].metrics()
    if not classifier.distributed.main:
        return {}
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        write_json(out / "metrics.json", metrics)
        # The report is written last, since drawing takes time and may fail.
        text = f"{classifier.path} on {len(results.index)} images\n{split.note}".strip()
        write_report(out, classifier.config, names, results, split, metrics, text)
    return metrics


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
