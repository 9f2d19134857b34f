"""Plots and images of a run or an evaluation, and report.html, a page of them all."""

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from dat.detection.checkpoint import read_classes
from dat.detection.config import DetectionConfig, TrainConfig
from dat.detection.criterion import PAPER_WEIGHTS
from dat.detection.data import Annotations, read_dataset
from dat.detection.data.objects import is_box, is_number
from dat.detection.data.readers import read_splits
from dat.detection.draw import draw_boxes, open_record, side_by_side
from dat.detection.evaluation import MATCH_IOU, Evaluation, count_confusions
from dat.detection.plots import draw_box_sizes, draw_precision_recall
from dat.detection.worst_predictions import draw_worst
from dat.engine.report import Page, Section, Table, confusion_table
from dat.utils.errors import DataError, shown
from dat.utils.files import atomic_write, read_json, short_name
from dat.utils.plots import draw_confusion, draw_curves

CURVES = {
    "training loss": [("train", "loss")],
    "parts of the loss, last layer": [("train", name) for name in PAPER_WEIGHTS],
    "average precision": [("val", name) for name in ("AP50", "AP", "APs", "APm", "APl")],
    "learning rate": [("train", "lr")],
}

# Most predictions in the page.
MOST_PREDICTIONS = 16


def write_report(
    folder: Path, config: DetectionConfig, evaluation: Evaluation | None, metrics: dict[str, Any], text: str = ""
) -> list[Path]:
    """Draws the plots of a run or an evaluation and writes report.html; returns the paths of the images.

    Args:
        folder: where the files go; its log.jsonl, if there is one, gives the training curves.
        config: of the run.
        evaluation: of the best epoch; None where there is none.
        metrics: of the evaluation, and other numbers for the page; empty without evaluation.
        text: opens the page.
    """
    model, average = config.model, metrics.get("AP")
    page = Page(f"{model.backbone['name']}, {model.kind}" + ("" if average is None else f", AP {average:.3f}"), text)
    if evaluation is not None:
        shown = {name: value for name, value in metrics.items() if name != "per_class"}
        tables = [Table(list(shown), [list(shown.values())]), _class_table(evaluation, metrics)]
        page.sections.append(Section("Figures", tables=tables))
    images = [folder / "curve.png"]
    draw_curves(folder / "log.jsonl", images[0], CURVES)
    page.add_image("Training", images[0])
    if evaluation is not None:
        images += _add_evaluation(page, folder, config.train, evaluation)
    page.add_config(config)
    page.write(folder / "report.html")
    return [path for path in images if path.is_file()]


def _add_evaluation(page: Page, folder: Path, train: TrainConfig, evaluation: Evaluation) -> list[Path]:
    """Draws an evaluation and adds it to the page; returns the paths of the images."""
    annotations, results, threshold = evaluation.annotations, evaluation.results, train.picture_threshold
    path = {name: folder / f"{name}.png" for name in ("precision_recall", "confusion", "box_sizes", "worst")}
    draw_precision_recall(evaluation, path["precision_recall"])
    page.add_image("Precision and recall", path["precision_recall"])

    counts = count_confusions(annotations, results, threshold)
    names = [category.name for category in annotations.categories]
    rows, columns = [*names, "(nothing)"], [*names, "(missed)"]
    draw_confusion(counts, rows, columns, path["confusion"])
    text = (
        f"Detections of score {threshold:g} or more, whatever their class, and objects that they overlap by at least "
        f"{MATCH_IOU:g}: true class (row) and predicted class (column)."
    )
    page.add_image("Confusions", path["confusion"], text, [confusion_table(counts, rows, columns)])

    draw_box_sizes(evaluation, threshold, path["box_sizes"])
    page.add_image("Box sizes", path["box_sizes"])

    draw_worst(annotations, results, path["worst"], train.worst)
    page.add_photos("Worst mistakes", [path["worst"]])
    predictions = save_predictions(annotations, results, folder / "predictions", train.pictures, threshold)
    text = f"Detections of score {threshold:g} or more beside the annotations."
    page.add_photos("Predictions", predictions[:MOST_PREDICTIONS], text)
    return [*path.values(), *predictions]


def _class_table(evaluation: Evaluation, metrics: dict[str, Any]) -> Table:
    rows = [
        (name, m["objects"], m["AP"], m["AP50"], *(evaluation.best_f1(label) or (None,) * 4))
        for label, (name, m) in enumerate(metrics["per_class"].items())
    ]
    columns = ("class", "objects", "AP", "AP50", "highest F1", "at score", "recall there", "precision there")
    return Table(columns, rows)


def save_predictions(
    annotations: Annotations, results: Sequence[dict[str, Any]], folder: Path, count: int, threshold: float
) -> list[Path]:
    """Writes `count` images, evenly chosen, with predictions scored at least `threshold` beside the annotations."""
    folder.mkdir(parents=True, exist_ok=True)
    by_image: dict[int, list[dict[str, Any]]] = defaultdict(list)
    for result in results:
        if result["score"] >= threshold:
            by_image[result["image_id"]].append(result)
    chosen = torch.linspace(0, len(annotations.records) - 1, min(count, len(annotations.records))).long()
    paths = []
    for record in (annotations.records[i] for i in chosen.tolist()):
        image = open_record(record)
        predicted = draw_boxes(image, by_image[record.id], annotations.categories, "predicted")
        annotated = draw_boxes(image, annotations.objects(record), annotations.categories, "annotated")
        name = short_name(f"{record.id:06d}_{record.path.stem}")
        paths.append(folder / f"{name}.png")
        with atomic_write(paths[-1]) as temporary:
            side_by_side(predicted, annotated).save(temporary)
    return paths


def read_results(path: Path, annotations: Annotations) -> list[dict[str, Any]]:
    """The content of a detections.json. Raises DataError unless it holds COCO's results on `annotations`."""
    results = read_json(path)
    for i, result in enumerate(results if isinstance(results, list) else [results]):
        entry = result if isinstance(result, dict) else {}
        ids, score = [entry.get(key) for key in ("image_id", "category_id")], entry.get("score")
        numbers = [*ids, score] if is_box(entry.get("bbox")) else [None]
        if not all(map(is_number, numbers)) or not all(isinstance(value, int) for value in ids):
            text = "should have integers image_id and category_id, numbers score and bbox"
            raise DataError(f"{path}: entry {i} is {shown(result)}, {text}")
    images, classes = ({x.id for x in group} for group in (annotations.records, annotations.categories))
    if not all(result["image_id"] in images and result["category_id"] in classes for result in results):
        raise DataError(f"{path}: is of other images or classes than {annotations.path}")
    return results


def read_evaluation(folder: Path, config: DetectionConfig) -> Evaluation:
    """The evaluation of a run's best epoch so far.

    Raises DataError where there is none or its data is absent, CheckpointError for a damaged best.pth.
    """
    path = folder / "detections.json"
    if not path.is_file():
        raise DataError(f"{path}: no such file, the run was not evaluated yet")
    weights = folder / "best.pth"
    # Large files may have been left behind.
    if weights.is_file():
        annotations = read_dataset(config.data, "val", read_classes(weights))
    else:
        _, annotations = read_splits(config.data)
    return Evaluation.of(annotations, read_results(path, annotations), every=config.data.val.tiles > 0)
