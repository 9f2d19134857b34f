"""The commands `dat classify ...`: each takes the options that `dat.cli` parsed."""

import argparse
from pathlib import Path
from typing import Any

from dat.classification.classifier import Classifier
from dat.classification.config import ClassificationConfig, check_config
from dat.engine.command import advise_resuming
from dat.engine.config import load_config
from dat.utils.errors import CheckpointError, DataError
from dat.utils.files import check_folder
from dat.utils.text import echo


def train(options: argparse.Namespace) -> None:
    from dat.classification.train import train

    with advise_resuming():
        train(load_config(ClassificationConfig, options.config, options.overrides))


def evaluate(options: argparse.Namespace) -> None:
    from dat.classification.results import format_table

    classifier = Classifier.from_checkpoint(options.checkpoint, options.overrides, options.device)
    out = options.out or Path(str(classifier.path)).parent / "evaluation"
    check_folder(out, "--out")
    metrics = classifier.evaluate(out=out, real=options.real, v2=options.v2)
    if metrics:
        echo(f"{format_table(metrics)}\nwritten to {out}")


def predict(options: argparse.Namespace) -> None:
    from dat.classification.predict import predict
    from dat.utils.media import Frames, find_media

    check_folder(options.out, "--out")
    # Results of an earlier call are left out.
    frames = Frames(*find_media(options.sources, exclude=options.out), options.every)
    classifier = Classifier.from_checkpoint(options.model, options.overrides, options.device, options.trust)
    names = ("out", "threshold", "classes", "crops", "sheet", "batch_size")
    count = predict(classifier, frames, **{name: getattr(options, name) for name in names})
    echo(f"{count} images labelled: {options.out}")
    if left_out := frames.summary():
        echo(left_out)


def export(options: argparse.Namespace) -> None:
    from dat.export.export import check_path

    check_path(options.out, options.compile)
    classifier = Classifier.from_checkpoint(options.checkpoint, device="cpu")
    echo(classifier.export(options.out, compiled=options.compile, images=options.images, sizes=options.sizes))


def audit(options: argparse.Namespace) -> None:
    from dat.classification.audit import audit, draw_samples, format_summaries, read_source, summarize
    from dat.engine.audit import finish_audit

    check_folder(options.out, "--out")
    config = read_source(Path(options.data), options.overrides)
    found = audit(config.data)
    class_names = next((part.split.class_names for part in found.values() if part.split is not None), [])
    summaries = {name: summarize(part, class_names, config.data.img_size) for name, part in found.items()}
    echo(format_summaries(summaries, config.data.img_size))
    options.out.mkdir(parents=True, exist_ok=True)
    for name, part in found.items():
        draw_samples(part, class_names, options.out / f"samples_{name}.png", options.samples)
    finish_audit(summaries, options.out)


def runs(options: argparse.Namespace) -> None:
    from dat.engine.runs import print_runs

    print_runs(options.folder, ClassificationConfig, ("top1", "top5"), options.csv)


def report(options: argparse.Namespace) -> None:
    from dat.classification.readers import open_split
    from dat.classification.report import read_results, write_report
    from dat.engine.lock import lock_run
    from dat.engine.report import read_metrics

    folder = options.run
    config = load_config(ClassificationConfig, folder / "config.yaml", options.overrides)
    check_config(config)
    results, split, text = None, None, ""
    names: list[str] = []
    metrics: dict[str, Any] = {}
    try:
        results, names = read_results(folder)
        metrics = read_metrics(folder) | results.summarize(names)
        opened = open_split(config.data, "val", names)
        if len(opened) <= results.index.max():
            raise DataError(f"data.val has {len(opened)} images, fewer than the results")
        split = opened
    except (DataError, CheckpointError) as error:
        text = f"Not complete: {error}"
        echo(f"warning: {text}", error=True)
    # A training would write the same files.
    with lock_run(folder):
        write_report(folder, config, names, results, split, metrics, text)
    echo(f"written to {folder / 'report.html'}")
