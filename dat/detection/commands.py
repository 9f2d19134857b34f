"""The commands `dat detect ...`: each takes the options that `dat.cli` parsed."""

import argparse
import os
import re
from pathlib import Path
from typing import Any

from dat.detection.config import DetectionConfig, check_config
from dat.detection.detector import Detector
from dat.detection.predictor import OPTIONS
from dat.engine.command import advise_resuming
from dat.engine.config import load_config
from dat.utils.errors import CheckpointError, ConfigError, DataError
from dat.utils.files import check_folder, file_names
from dat.utils.text import echo


def train(options: argparse.Namespace) -> None:
    from dat.detection.overfit import overfit
    from dat.detection.train import train

    config = load_config(DetectionConfig, options.config, options.overrides)
    if options.overfit is None:
        with advise_resuming():
            train(config)
    else:
        overfit(config, options.overfit)


def evaluate(options: argparse.Namespace) -> None:
    from dat.detection.evaluation import format_table

    detector = Detector.from_checkpoint(options.checkpoint, options.overrides, options.device)
    out = options.out or Path(str(detector.path)).parent / "evaluation"
    check_folder(out, "--out")
    metrics = detector.evaluate(out=out, **{f"data.val.{name}": x for name, x in _prediction(options).items()})
    if metrics:
        echo(f"{format_table(metrics)}\nwritten to {out}")


def predict(options: argparse.Namespace) -> None:
    from dat.detection.points import check_points
    from dat.detection.predict import Output, choose_targets, predict
    from dat.utils.media import Frames, find_media

    check_folder(options.out, "--out")
    # Results of an earlier call are left out.
    media, others = find_media(options.sources, exclude=options.out)
    targets = choose_targets(media, options.out)
    detector = Detector.from_checkpoint(options.model, options.overrides, options.device, options.trust, options.top_k)
    detector.val = detector.options(**_prediction(options))
    if options.show_points:
        check_points(detector)
    frames = Frames(media, others, options.every)
    crops = file_names(category.name for category in detector.categories) if options.crops else {}
    output = Output(options.out, targets, options.threshold, crops, options.show_points)
    images, drawn = predict(detector, frames, output, options.classes, options.batch_size)
    echo(f"{drawn} detections with a score of at least {options.threshold} in {images} images: {options.out}")
    if left_out := frames.summary():
        echo(left_out)


def export(options: argparse.Namespace) -> None:
    from dat.export.export import check_path

    check_path(options.out, options.compile)
    detector = Detector.from_checkpoint(options.checkpoint, device="cpu")
    line = detector.export(
        options.out, compiled=options.compile, images=options.images, sizes=options.sizes, top_k=options.top_k
    )
    echo(line)


def serve(options: argparse.Namespace) -> None:
    try:
        from dat.detection.app import Limits, serve
    except ImportError as error:
        raise ConfigError(f'serving needs {error.name}: pip install "dat-vision[serve]"') from error
    detector = Detector.from_checkpoint(options.model, (), options.device, options.trust, options.top_k)
    limits = Limits(
        round(options.max_megabytes * 2**20),
        round(options.max_megapixels * 10**6),
        options.max_waiting,
        rate=options.max_rate,
    )
    detector.val = detector.options(**_prediction(options))
    # A token on the command line is seen by every user of the machine.
    token = os.environ.get("DAT_SERVE_TOKEN") if options.token is None else options.token
    if token is not None and not re.fullmatch("[!-~]+", token):
        raise ConfigError("the token (--token or DAT_SERVE_TOKEN) should be letters, digits and signs of ASCII")
    serve(detector, options.host, options.port, limits, options.allow_host, token)


def audit(options: argparse.Namespace) -> None:
    from dat.detection.audit import audit, draw_samples, draw_sizes, format_summary, summarize
    from dat.detection.data import describe_sets
    from dat.detection.sizes import settle_sizes
    from dat.engine.audit import finish_audit
    from dat.engine.distributed import setup_distributed

    check_folder(options.out, "--out")
    folder = Path(options.data).is_dir()
    source, root = (options.config, [f"data.root={options.data}"]) if folder else (options.data, [])
    config = load_config(DetectionConfig, source, [*root, *options.overrides])
    check_config(config)
    found = audit(config)
    read = [split.annotations for split in found.values() if split.annotations.format]
    if read:
        echo(describe_sets(*read))
    config, why = settle_sizes(config, found["train"].annotations, setup_distributed(config.train.device).device)
    val = config.data.val
    summaries = {name: summarize(split, val.size, val.max_size) for name, split in found.items()}
    for name, summary in summaries.items():
        echo(format_summary(name, summary, val.size))
    if why:
        echo(f"train: {why}")
    options.out.mkdir(parents=True, exist_ok=True)
    for name, split in found.items():
        draw_samples(split, options.out / f"samples_{name}.png", options.samples)
    draw_sizes(found, config, options.out / "boxes.png")
    finish_audit(summaries, options.out)


def runs(options: argparse.Namespace) -> None:
    from dat.engine.runs import print_runs

    print_runs(options.folder, DetectionConfig, ("AP", "AP50"), options.csv)


def report(options: argparse.Namespace) -> None:
    from dat.detection.report import read_evaluation, write_report
    from dat.engine.lock import lock_run
    from dat.engine.report import read_metrics

    config = load_config(DetectionConfig, options.run / "config.yaml", options.overrides)
    check_config(config)
    metrics: dict[str, Any] = {}
    evaluation, text = None, ""
    try:
        evaluation = read_evaluation(options.run, config)
        metrics = read_metrics(options.run) | evaluation.metrics()
    except (CheckpointError, DataError) as error:
        text = f"Without an evaluation: {error}"
        echo(f"warning: {text}", error=True)
    # A training would write the same files.
    with lock_run(options.run):
        write_report(options.run, config, evaluation, metrics, text)
    echo(f"written to {options.run / 'report.html'}")


def convert(options: argparse.Namespace) -> None:
    if options.to is not None or Path(options.source).is_dir():
        convert_data(options)
    else:
        convert_weights(options)


def convert_data(options: argparse.Namespace) -> None:
    from dat.detection.data.convert import convert_data

    if options.to is None:
        raise ConfigError(f"--to is absent, should name the format to write the data in {options.source} in")
    for name in ("annotations", "out"):
        if getattr(options, name) is not None:
            raise ConfigError(f"--{name} is for weights, data is written to DST alone")
    if options.overrides:
        raise ConfigError(f"{options.overrides[0]} is for weights, data has no configuration")
    echo("\n".join(convert_data(Path(options.source), options.target, options.to, options.link)))


def convert_weights(options: argparse.Namespace) -> None:
    from dat.detection.checkpoint import detector_state
    from dat.detection.convert import convert
    from dat.detection.data import read_categories
    from dat.engine.checkpoint import save_checkpoint

    for name in ("annotations", "out"):
        if getattr(options, name) is None:
            raise ConfigError(f"--{name} is absent, should be given to convert weights; data needs --to")
    config = load_config(DetectionConfig, options.source, options.overrides)
    check_config(config)
    categories = read_categories(options.annotations)
    state = convert(config, options.target, categories)
    if not options.out.parent.is_dir():
        raise ConfigError(f"--out: {options.out.parent} should be a folder")
    save_checkpoint(options.out, {**detector_state(config, categories), "state_dict": state})
    echo(f"{options.out}: {len(categories)} classes of {options.annotations}")


def _prediction(options: argparse.Namespace) -> dict[str, Any]:
    """The options of Detector.predict that the command was given."""
    return {name: value for name in OPTIONS if (value := getattr(options, name)) is not None}
