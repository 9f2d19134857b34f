"""Measures the average precision of a checkpoint on a validation split.

    python -m detection.evaluate CHECKPOINT [key.path=value ...]
    torchrun --nproc-per-node N -m detection.evaluate CHECKPOINT [key.path=value ...]

The overrides change the configuration that the checkpoint carries, for instance data.root or data.val.annotations.
Prints AP by class; writes metrics.json, detections.json, pictures and report.html, a page of them all, into evaluation/
beside the checkpoint, or into `--out`.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from torch.utils.data import DataLoader

from dat.detection.checkpoint import load_detector
from dat.detection.config import DetectionConfig, check_config
from dat.detection.data import (
    Annotations,
    Batch,
    DetectionDataset,
    SameSizeBatchSampler,
    make_loader,
    read_coco,
    val_transform,
)
from dat.detection.data.cache import ImageCache
from dat.detection.evaluation import Evaluation, detect, format_table, gather_results
from dat.detection.report import write_report
from dat.engine.build import checkpoint_errors
from dat.engine.config import apply_overrides
from dat.engine.distributed import Distributed, setup_distributed
from dat.utils.errors import ConfigError
from dat.utils.files import write_json


def val_loader(
    annotations: Annotations, config: DetectionConfig, distributed: Distributed, cache: ImageCache | None = None
) -> DataLoader[Batch]:
    """Batches of this process, resized as `data.val` says."""
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


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m detection.evaluate", description="Measures a detector's AP.")
    parser.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help="best.pth or last.pth of a run")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value", help="replaces a value of its configuration")
    parser.add_argument("--out", type=Path, help="folder for metrics.json (default: evaluation, beside the checkpoint)")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    options = parser.parse_intermixed_args(arguments)
    distributed = setup_distributed(options.device)
    detector = load_detector(options.checkpoint, distributed.device)
    config = apply_overrides(detector.config, options.overrides)
    check_config(config)
    if config.model != detector.config.model:
        raise ConfigError(f"model.* is decided by {options.checkpoint}, should not be overridden")
    data, root = config.data, Path(config.data.root)
    annotations = read_coco(root / data.val.annotations, root / data.val.images, detector.categories)
    if annotations.warning and distributed.main:
        print(f"warning: {annotations.warning}", file=sys.stderr)
    loader = val_loader(annotations, config, distributed)
    with checkpoint_errors(options.checkpoint):
        results = detect(
            detector.model, loader, detector.categories, distributed.device, config.train.amp, config.data.val.top_k
        )
    results = gather_results(results)
    if not distributed.main:
        return
    evaluation = Evaluation.of(annotations, results)
    metrics = evaluation.metrics()
    out = options.out or options.checkpoint.parent / "evaluation"
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "metrics.json", metrics)
    write_json(out / "detections.json", results)
    print(format_table(metrics))
    # last: pictures take their time, and may fail
    write_report(out, config, evaluation, metrics, f"{options.checkpoint} on {annotations.path}")
    print(f"written to {out}")
