"""Trains variants of one detector in the same way, with several seeds each, and gathers their AP.

Used by `benchmarks.convergence`, `benchmarks.backbones` and `benchmarks.recipes`: the scenes, the pre-training of
backbones as classifiers, the runs, which continue after an interruption, the time of a step of each variant, results
and plot.
"""

import argparse
import os
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import curves
from benchmarks.timing import integers, machine, medians, names_of, write_json
from benchmarks.trainings import arguments, entries, finished, train
from dat.detection.config import DetectionConfig
from dat.detection.data import read_dataset
from dat.detection.trainer import DetectionTrainer
from dat.engine.backbones import without_weights
from dat.engine.config import load_config
from dat.engine.distributed import setup_distributed
from dat.utils.modules import evaluating
from examples.digits import make_crops, make_scenes, make_whole

CONFIG = Path("configs/detection/scenes.yaml")
CLASSIFIER = Path("configs/classification/demo.yaml")
METRICS = ("AP", "APs", "AP50")
Row = dict[str, Any]


@dataclass(frozen=True)
class Sizes:
    """Sizes of the generated data and of the pre-training of backbones."""

    train: int = 500
    val: int = 150
    scene: int = 176
    crops: tuple[int, int] = (6400, 397)
    crop: int = 64
    # Size at which crops are shown, so that digits are about as large as in the scenes.
    shown: int = 48


@dataclass(frozen=True)
class Variant:
    """A detector that differs from CONFIG in some keys.

    Attributes:
        backbone: arguments of the timm model, which is trained to classify digits first.
        features: further arguments of the feature extractor in the detector.
        keys: other keys of the configuration, "key.path" to value.
        classifier: keys of the pre-training.
        times: factor on the number of epochs.
        seeds: number of seeds at most.
    """

    label: str
    backbone: dict[str, Any]
    features: dict[str, Any] = field(default_factory=dict)
    keys: dict[str, Any] = field(default_factory=dict)
    classifier: dict[str, Any] = field(default_factory=dict)
    times: int = 1
    seeds: int | None = None


class Comparison:
    """The runs of variants, below `options.runs`; see `parser` for the options."""

    def __init__(self, variants: Mapping[str, Variant], options: argparse.Namespace, sizes: Sizes) -> None:
        self.variants, self.options, self.sizes = variants, options, sizes
        self.names = options.variants
        self.seeds = {name: options.seeds[: variants[name].seeds] for name in self.names}
        self.data = options.data or options.scenes / "data"
        self.described: dict[str, Row] = {}

    def make_data(self) -> None:
        """Scenes and crops, each whole or not at all."""
        sizes = self.sizes
        crops = partial(make_crops, train=sizes.crops[0], val=sizes.crops[1], size=sizes.crop)
        make_whole(self.options.scenes / "crops", crops)
        if self.options.data is None:
            make_whole(self.data, partial(make_scenes, train=sizes.train, val=sizes.val, size=sizes.scene))

    def pretrained(self, name: str) -> Path:
        """Path of the pre-trained backbone of a variant; variants with the same backbone use the same one."""
        mine = self.variants[name]
        owner = next(
            key
            for key, variant in self.variants.items()
            if (variant.backbone, variant.classifier) == (mine.backbone, mine.classifier)
        )
        return self.options.runs / f"pretrain_{owner}"

    def pretrain(self, name: str) -> None:
        overrides = {
            "data.root": str(self.options.scenes / "crops"),
            "data.img_size": self.sizes.shown,
            "model.backbone": self.variants[name].backbone,
            "train.workers": 0,
            **self.variants[name].classifier,
        }
        folder = self.pretrained(name)
        train("classification.train", CLASSIFIER, folder, self.options.pretrain, overrides, folder.with_suffix(".log"))

    def folder(self, name: str, seed: int) -> Path:
        return self.options.runs / f"{name}_{seed}"

    def epochs(self, name: str) -> int:
        return self.options.epochs * self.variants[name].times

    def overrides(self, name: str) -> dict[str, Any]:
        """Keys in which the runs of a variant differ from CONFIG, except `output`, `seed` and `train.epochs`."""
        variant = self.variants[name]
        backbone = {**variant.backbone, **variant.features}
        return {
            **variant.keys,
            "model.backbone": {**backbone, "checkpoint_path": str(self.pretrained(name) / "best.pth")},
            "data.root": str(self.data),
            "train.decay_epochs": [self.epochs(name) * 4 // 5],
            "train.eval_epochs": max(1, self.epochs(name) // 20),
            # Only the curves are of interest.
            "train.pictures": 0,
            "train.worst": 0,
            **dict(pair.split("=", 1) for pair in self.options.overrides),
        }

    def run(self, name: str, seed: int) -> None:
        folder = self.folder(name, seed)
        overrides = {"seed": seed, **self.overrides(name)}
        train("detection.train", CONFIG, folder, self.epochs(name), overrides, folder.with_name(f"{folder.name}.log"))

    def trainer(self, name: str) -> DetectionTrainer:
        """A trainer of a variant in this process, from random weights."""
        values = self.overrides(name) | {"train.epochs": self.epochs(name), "data.cache": "none"}
        values["model.backbone"] = without_weights(values["model.backbone"])
        config = load_config(DetectionConfig, CONFIG, arguments(values))
        train_set, val_set = read_dataset(config.data, "train"), read_dataset(config.data, "val")
        return DetectionTrainer(config, train_set, val_set, setup_distributed(config.train.device))

    def describe(self) -> None:
        """Parameters, FLOPs of one image and the time of a training step of each variant; steps take turns."""
        steps = {}
        for name in self.names:
            variant, trainer = self.variants[name], self.trainer(name)
            batch = next(iter(trainer.loader))
            steps[name] = partial(trainer.train_step, (batch,))
            self.described[name] = {
                "model": name,
                "label": variant.label,
                "backbone": {**variant.backbone, **variant.features},
                "overrides": variant.keys,
                "epochs": self.epochs(name),
                "steps_per_epoch": trainer.steps_per_epoch,
                "parameters_m": round(sum(p.numel() for p in trainer.model.parameters()) / 1e6, 2),
                "mflops": mflops(trainer.model, batch[0][:1].to(trainer.device)),
                "backbone_mflops": mflops(trainer.model.backbone, batch[0][:1].to(trainer.device)),
            }
        if trainer.device.type == "cpu":
            seconds = medians(
                {}, trainer.device, elsewhere={k: partial(cpu_seconds, step) for k, step in steps.items()}
            )
        else:
            seconds = medians(steps, trainer.device)
        for name, value in seconds.items():
            self.described[name]["ms_per_step"] = round(1e3 * value, 1)

    def rows(self) -> list[Row]:
        """The results of each variant so far."""
        rows = []
        for name, described in self.described.items():
            runs = []
            for seed in self.seeds[name]:
                found = [entry for entry in entries(self.folder(name, seed)) if entry["kind"] == "val"]
                if found:
                    run = {"seed": seed, "finished": finished(self.folder(name, seed), self.epochs(name))}
                    run |= {key: [entry[key] for entry in found] for key in ("epoch", *METRICS)}
                    runs.append(run)
            rows.append({**described, "seeds": self.seeds[name], "runs": runs})
        return rows

    def write(self, reference: str | None, title: str) -> list[Row]:
        """Writes results and plot of the runs so far."""
        rows = self.rows()
        curves.summarise(rows, reference)
        if any(row["runs"] for row in rows):
            write_json(self.options.out or self.options.runs / "results.json", rows)
            curves.draw(rows, machine(), self.options.plot or self.options.runs / "curves.png", title)
        return rows


def cpu_seconds(run: Callable[[], Any], calls: int) -> float:
    """Processor seconds of one of several calls in a row, summed over threads, so that other load hardly matters."""
    start = time.process_time()
    for _ in range(calls):
        run()
    return (time.process_time() - start) / calls


def mflops(model: torch.nn.Module, images: torch.Tensor) -> float:
    """Millions of multiply-adds of a forward pass."""
    with evaluating(model), FlopCounterMode(display=False) as counter:
        model(images)
    return round(counter.get_total_flops() / 2e6, 1)


def parser(doc: str, variants: Mapping[str, Variant], name: str) -> argparse.ArgumentParser:
    """The options of a benchmark `name`, described by the first line of `doc`."""
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument("overrides", nargs="*", metavar="key.path=value", help=f"of {CONFIG}, for all runs")
    parser.add_argument(
        "--variants", type=names_of(variants), default=",".join(variants), help=f"of {','.join(variants)}"
    )
    parser.add_argument("--seeds", type=integers, default="0,1,2")
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--pretrain", type=int, default=4, help="epochs in which backbones learn to classify")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    parser.add_argument("--runs", type=Path, default=Path(f"runs/{name}"), help="where the runs are kept")
    parser.add_argument("--scenes", type=Path, default=Path("runs/scenes"), help="where the scenes are kept")
    parser.add_argument("--data", type=Path, help="folder of data, instead of scenes")
    parser.add_argument("--out", type=Path, help="the results; default: results.json in --runs")
    parser.add_argument("--plot", type=Path, help="default: curves.png in --runs")
    return parser


def on_data(title: str, options: argparse.Namespace) -> str:
    """The title of a plot, with the data of its runs."""
    return f"{title} on {options.data or 'generated scenes'}"


def compare(
    variants: Mapping[str, Variant],
    options: argparse.Namespace,
    reference: str | None,
    title: str,
    sizes: Sizes | None = None,
) -> list[Row]:
    """Trains the missing runs, seed by seed, and writes results and plot after each.

    Raises RuntimeError if a run failed, after the runs beside it have ended.
    """
    comparison = Comparison(variants, options, sizes or Sizes())
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // options.jobs)))
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    comparison.make_data()
    comparison.describe()
    with ThreadPoolExecutor(options.jobs) as pool:
        owners = {comparison.pretrained(name): name for name in comparison.names}
        list(pool.map(comparison.pretrain, owners.values()))
        pairs = [(name, seed) for seed in options.seeds for name in comparison.names if seed in comparison.seeds[name]]
        try:
            for future in as_completed([pool.submit(comparison.run, *pair) for pair in pairs]):
                future.result()
                comparison.write(reference, title)
        except RuntimeError:
            pool.shutdown(cancel_futures=True)
            raise
    rows = comparison.write(reference, title)
    print(curves.table(rows))
    return rows
