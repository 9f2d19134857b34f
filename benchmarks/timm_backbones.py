"""Which of timm's models train as a detector's backbone: the smallest of each of timm's files, for one step.

    python -m benchmarks.timm_backbones [FILE ...]

FILE is one of timm's, such as resnet; by default those that benchmarks/results/timm_backbones.json lacks. Each gets a
process with a limit of time and memory. After each, the results and the table docs/timm_backbones.md are written, so
that an interrupted sweep goes on where it stopped.

The detector is a small Deformable DETR with random weights, and the step is on two images of different odd sizes. A
model counts as trained if the loss is finite and its gradient reaches the first layers of the backbone.
"""

import argparse
import json
import math
import multiprocessing
import resource
from collections import defaultdict
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor
from torch.nn import functional as F

from dat.detection.config import LossConfig
from dat.detection.criterion import build_criterion
from dat.detection.models import build_model, check_model
from dat.detection.models.backbone import SimplePyramid
from dat.detection.models.deformable_detr import DeformableDETRConfig
from dat.utils.errors import ConfigError, one_line

ROOT = Path(__file__).resolve().parents[1]
RESULTS, PAGE = ROOT / "benchmarks/results/timm_backbones.json", ROOT / "docs/timm_backbones.md"
SECONDS, MEMORY = 240, 14 * 2**30
# Sides of the two images, and of the square for models that take only one size.
SIZES, SQUARE = ((151, 90), (103, 146)), 160
SMALL = {"num_queries": 10, "embed_dim": 32, "num_heads": 2, "encoder_depth": 1, "decoder_depth": 1, "mlp_dim": 32}

HEAD = """\
# timm's models as backbones

The smallest model of each of timm's files (timm {version}) as the backbone of a small Deformable DETR with random
weights, for one training step on two images of odd sizes: {trained} of {files} train, the others are
refused by one line before the run starts. `python -m benchmarks.timm_backbones` measures the table.

Padding: sides are padded to a multiple of so many pixels, and the mask follows. Pyramid: all maps of the model have one
stride, so those of the detector are made from the last one, as in [ViTDet](https://arxiv.org/abs/2203.16527). Square:
the model takes one size, `model.backbone.img_size`, and all images are padded to it.
"""

Row = dict[str, Any]


def timm_files() -> dict[str, list[str]]:
    """The models of each of timm's files; this package's own are in none of them."""
    files: dict[str, list[str]] = defaultdict(list)
    for name in timm.list_models(exclude_filters="test_*"):
        module = timm.model_entrypoint(name).__module__
        if module.startswith("timm."):
            files[module.rpartition(".")[2]].append(name)
    return dict(files)


def smallest(names: Sequence[str]) -> tuple[int, str]:
    """Number of parameters and name of the smallest model."""
    with torch.device("meta"):
        return min((sum(p.numel() for p in timm.create_model(name).parameters()), name) for name in names)


def try_model(name: str) -> Row:
    """Trains a step on a model, given `img_size` if it says that it needs it."""
    first = train_step({"name": name})
    if "img_size" not in first.get("refused", ""):
        return first
    again = train_step({"name": name, "img_size": SQUARE})
    return again if "refused" in again else {**again, "img_size": True}


def train_step(backbone: dict[str, Any]) -> Row:
    """The result of one training step: the arguments and padding that it needed, or the line that refuses the model."""
    torch.manual_seed(0)
    config = DeformableDETRConfig(backbone=backbone, **SMALL)
    try:
        check_model(config, SQUARE)
        model = build_model(config, 3).train()
    except ConfigError as error:
        return {"refused": one_line(error)}
    criterion = build_criterion(model, LossConfig())
    images, mask, targets = batch()
    optimizer = torch.optim.SGD(model.parameters(), 1e-4)
    losses = criterion(model(images, mask), targets, criterion.normalizers(targets, model.num_queries, images.device))
    loss = criterion.total(losses)
    loss.backward()
    optimizer.step()
    first = next(p for p in model.backbone.parameters() if p.requires_grad and p.grad is not None)
    if not math.isfinite(loss.item()) or not first.grad.abs().sum() > 0:
        return {"refused": f"the loss is {loss.item()}, the gradient of the first layer {first.grad.abs().sum():.2g}"}
    return {
        "strides": [float(stride) for stride in model.backbone.feature_info.reduction()],
        "pad_multiple": model.pad_multiple,
        "pyramid": isinstance(model.backbone, SimplePyramid),
    }


def batch() -> tuple[Tensor, Tensor, list[dict[str, Tensor]]]:
    """Two images of noise, padded to the same size, with a box each."""
    height, width = (max(sides) for sides in zip(*SIZES, strict=True))
    images = [F.pad(torch.randn(3, h, w), (0, width - w, 0, height - h)) for h, w in SIZES]
    masks = [F.pad(torch.zeros(h, w), (0, width - w, 0, height - h), value=1.0) > 0 for h, w in SIZES]
    target = {"labels": torch.tensor([1]), "boxes": torch.tensor([[0.5, 0.5, 0.3, 0.4]])}
    return torch.stack(images), torch.stack(masks), [target, target]


def measure(names: Sequence[str], results: Connection) -> None:
    """Sends the row of the smallest model, from a process of its own."""
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
    size, name = smallest(names)
    row: Row = {"model": name, "parameters": size, "models": len(names)}
    results.send(row)
    try:
        row |= try_model(name)
    # A failure of any type belongs into the table.
    except Exception as error:
        row["failed"] = f"{type(error).__name__}: {one_line(error, 150)}"
    results.send(row)


def run(names: Sequence[str]) -> Row:
    """The row of a file's models; a process that ends or takes too long is a row too."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=measure, args=(names, sender))
    process.start()
    sender.close()
    row: Row = {"model": names[0], "models": len(names)}
    process.join(SECONDS)
    if process.is_alive():
        process.kill()
        row["failed"] = f"takes more than {SECONDS} s"
    elif process.exitcode:
        row["failed"] = f"its process ended with {process.exitcode}"
    failed = row.copy()
    try:
        while receiver.poll():
            row = receiver.recv()
    except EOFError:
        pass
    process.join()
    return row if "failed" not in failed else {**row, "failed": failed["failed"]}


def page(rows: dict[str, Row]) -> str:
    """The table as a page of the docs."""
    trained = sum("strides" in row for row in rows.values())
    head = HEAD.format(version=timm.__version__, files=len(rows), trained=trained)
    lines = [
        *head.splitlines(),
        "",
        "| file | models | smallest | parameters (M) | trains | strides |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for file, row in sorted(rows.items()):
        needs = [
            *(["pyramid"] if row.get("pyramid") else []),
            *(["square"] if row.get("img_size") else []),
            *([f"padding {row['pad_multiple']}"] if row.get("pad_multiple", 1) > 1 and not row.get("img_size") else []),
        ]
        verdict = row.get("failed") or row.get("refused") or f"yes{': ' if needs else ''}{', '.join(needs)}"
        strides = ", ".join(f"{stride:g}" for stride in row.get("strides", []))
        size = f"{row['parameters'] / 1e6:.1f}" if "parameters" in row else ""
        lines.append(f"| {file} | {row['models']} | `{row['model']}` | {size} | {verdict} | {strides} |")
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> None:
    files = timm_files()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="*", metavar="FILE", help="of timm, such as resnet")
    arguments = parser.parse_args(argv).files
    if unknown := [file for file in arguments if file not in files]:
        parser.error(f"FILE must be of {', '.join(files)}, got {', '.join(unknown)}")
    rows: dict[str, Row] = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    for file in arguments or [file for file in files if file not in rows]:
        rows[file] = run(files[file])
        print(file, rows[file], flush=True)
        RESULTS.write_text(json.dumps(rows, indent=1, sort_keys=True) + "\n")
        PAGE.write_text(page(rows), encoding="utf-8")


if __name__ == "__main__":
    main()
