"""Accuracy of a trained classifier: python -m classification.evaluate CHECKPOINT [key.path=value ...]"""

import argparse
import json
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader

from classification.data import EvalPictures, SkippedPictures, eval_loader, make_transform, open_split
from classification.model import load_classifier
from dat.training.distributed import Distributed, setup_distributed
from dat.training.errors import DataError
from dat.training.loop import amp_context, main_guard


@torch.no_grad()
def evaluate(
    model: nn.Module, loader: DataLoader[Any], distributed: Distributed, amp: str, skipped: SkippedPictures
) -> dict[str, float]:
    """Measures a model on every readable picture of a loader, over all processes.

    Args:
        model: images [B, 3, H, W] to logits [B, K]; left in the mode in which it came.
        loader: see eval_loader; each process holds its share.
        distributed, amp: as in training.
        skipped: told of unreadable pictures.
    Returns:
        {"top1", "top5"} in percent, {"loss"} the mean cross-entropy, {"images"} counted.
    Raises:
        DataError: no picture could be read.
    """
    training = model.training
    model.eval()
    device = distributed.device
    sums = torch.zeros(4, dtype=torch.float64, device=device)
    for images, labels, index in loader:
        skipped.add_unlabelled(index, labels)
        readable = labels >= 0
        images, labels = images[readable].to(device), labels[readable].to(device)
        if len(images) == 0:
            continue
        with amp_context(device, amp):
            logits = model(images)
        logits = logits.float()
        hits = logits.topk(min(5, logits.shape[1]), dim=1).indices == labels[:, None]
        loss = F.cross_entropy(logits, labels, reduction="sum")
        sums += torch.stack([hits[:, 0].sum(), hits.sum(), loss, torch.tensor(len(labels), device=device)])
    model.train(training)
    top1, top5, loss_sum, images_seen = distributed.sum(sums).tolist()
    if images_seen == 0:
        raise DataError("data.val: no picture can be read")
    return {
        "top1": 100 * top1 / images_seen,
        "top5": 100 * top5 / images_seen,
        "loss": loss_sum / images_seen,
        "images": int(images_seen),
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="classification.evaluate", description=__doc__)
    parser.add_argument("checkpoint", help="best.pth or last.pth of a run")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value", help="such as data.root=FOLDER")
    arguments = parser.parse_args()
    device = next((o.partition("=")[2] for o in arguments.overrides if o.startswith("train.device=")), "auto")
    distributed = setup_distributed(device)
    classifier = load_classifier(arguments.checkpoint, arguments.overrides, distributed.device)
    data, train = classifier.config.data, classifier.config.train
    reader, _ = open_split(data.root, data.val.path, "data.val.path", classifier.class_names)
    pictures = EvalPictures(reader, make_transform(data, training=False), distributed.rank, distributed.world_size)
    loader = eval_loader(pictures, train.batch_size, train.workers, distributed.device.type == "cuda")
    skipped = SkippedPictures(reader, path=None)
    metrics = evaluate(classifier.model, loader, distributed, train.amp, skipped)
    if distributed.main:
        if skipped.report():
            print(f"warning: {skipped.report()}")
        print(json.dumps({name: round(value, 4) for name, value in metrics.items()}))


if __name__ == "__main__":
    main_guard(main)
