"""Trains the nano models and Swin Transformers of equal FLOPs the same way on a small set of images.

    python -m benchmarks.accuracy --data FOLDER --runs runs/accuracy [--seeds 0,1,2] [--epochs 12] [--out FILE]

FOLDER holds train.tar and val.tar, or folders of these names, with one folder of images for each class; `--train` and
`--val` give other names. Every run is the command of configs/classification/small_pictures.yaml. Finished runs are not
repeated, interrupted ones continue. The accuracy is that of the last epoch, not of the best. Training steps are timed
in turns at the end; `--seeds ""` only times them.
"""

import argparse
import math
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

import dat  # noqa: F401  registers its models
from benchmarks.process import Measured
from benchmarks.timing import integers, medians, names_of, write_json
from benchmarks.trainings import last_entries, train

CONFIG = "configs/classification/small_pictures.yaml"
IMG_SIZE, BATCH = 64, 32
SWIN = {"name": "swin_tiny_patch4_window7_224", "img_size": IMG_SIZE, "embed_dim": 32, "num_heads": [1, 2, 4, 8]}
# Swins as wide as the nano models, with the number of blocks that gives the same FLOPs.
MODELS: dict[str, dict[str, Any]] = {
    "dat_pp_nano": {"name": "dat_pp_nano"},
    "swin of dat_pp_nano": {**SWIN, "depths": [2, 2, 4, 2]},
    "dat_nano": {"name": "dat_nano"},
    "swin of dat_nano": {**SWIN, "depths": [2, 2, 2, 2], "mlp_ratio": 3.0},
}


def size_of(arguments: dict[str, Any]) -> dict[str, float]:
    """Millions of parameters, and of multiply-adds for one image."""
    model = create(arguments, device="meta")
    with FlopCounterMode(display=False) as counter:
        model(torch.empty(1, 3, IMG_SIZE, IMG_SIZE, device="meta"))
    parameters = sum(p.numel() for p in model.parameters())
    return {"parameters_m": round(parameters / 1e6, 2), "mflops": round(counter.get_total_flops() / 2e6, 1)}


def create(arguments: dict[str, Any], **more: Any) -> torch.nn.Module:
    options = {key: value for key, value in arguments.items() if key != "name"}
    return timm.create_model(arguments["name"], num_classes=10, **options, **more)


def training_step(model: torch.nn.Module) -> Callable[[], None]:
    """A training step on random images."""
    images, labels = torch.randn(BATCH, 3, IMG_SIZE, IMG_SIZE), torch.arange(BATCH) % 10
    return Measured(model, [images], lambda logits: F.cross_entropy(logits, labels), torch.get_num_threads()).step


def accuracy(name: str, seed: int, options: argparse.Namespace) -> dict[str, float]:
    """Accuracy in percent after the last epoch of one run; trains the epochs that are missing."""
    run = options.runs / f"{name.replace(' ', '_')}_{seed}"
    overrides = {
        "seed": seed, "data.root": str(options.data), "data.train.path": options.train,
        "data.val.path": options.val, "data.img_size": IMG_SIZE,
        "model.backbone": {**MODELS[name], "drop_path_rate": 0.05},
    }  # fmt: skip
    train("classification.train", CONFIG, run, options.epochs, overrides)
    last = last_entries(run)
    return {"top1": last["val"]["top1"], "images_per_second": last["train"]["images_per_second"]}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path)
    parser.add_argument("--train", default="train.tar")
    parser.add_argument("--val", default="val.tar")
    parser.add_argument("--runs", type=Path, default=Path("runs/accuracy"))
    parser.add_argument("--models", type=names_of(MODELS), default=",".join(MODELS), help=f"of {', '.join(MODELS)}")
    parser.add_argument("--seeds", type=integers, default="0,1,2")
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--out", type=Path, help="where to write the rows as JSON, with the machine's description")
    options = parser.parse_args(argv)
    if options.seeds and options.data is None:
        parser.error("--data is needed, the folder of the images")
    results: dict[str, list[dict[str, float]]] = {name: [] for name in options.models}
    for seed in options.seeds:
        for name in options.models:
            results[name].append(accuracy(name, seed, options))
    steps = {name: training_step(create(MODELS[name])) for name in options.models}
    seconds = medians(steps, torch.device("cpu"), repeats=9, budget=math.inf)
    rows = []
    for name, runs in results.items():
        top1 = [run["top1"] for run in runs]
        rows.append({"model": name, "arguments": MODELS[name], "epochs": options.epochs, **size_of(MODELS[name])})
        rows[-1] |= {"top1": top1, "mean": round(statistics.mean(top1), 2)} if top1 else {}
        rows[-1] |= {"step_ms": round(1e3 * seconds[name], 1), "images_per_second": round(BATCH / seconds[name], 1)}
        print(*(f"{key} {value}" for key, value in rows[-1].items() if key != "arguments"), sep="  ")
    if options.out:
        write_json(options.out, rows)


if __name__ == "__main__":
    main()
