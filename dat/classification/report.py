"""report.html of a run or an evaluation: one page with its metrics, plots and images."""

import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dat.classification.config import ClassificationConfig
from dat.classification.draw import draw_mistakes, draw_predictions
from dat.classification.readers import Split
from dat.classification.results import Results, flat_metrics
from dat.engine.checkpoint import load_checkpoint
from dat.engine.report import Page, Section, Table, confusion_table
from dat.utils.errors import DataError
from dat.utils.images import UNREADABLE
from dat.utils.plots import draw_confusion, draw_curves

CURVES = {
    "loss": [("train", "loss"), ("val", "loss")],
    "accuracy, percent": [("val", "top1"), ("val", "top5")],
    "learning rate": [("train", "lr")],
    "norm of the gradients": [("train", "grad_norm")],
}


def write_report(
    folder: Path,
    config: ClassificationConfig,
    class_names: Sequence[str],
    results: Results | None,
    split: Split | None,
    metrics: dict[str, Any],
    text: str = "",
) -> list[Path]:
    """Draws the plots of a run or an evaluation, and writes report.html; returns the images that it shows.

    Args:
        folder: of the files; its log.jsonl gives the training curves.
        config: of the run.
        class_names: of the model.
        results, split: of the best epoch, and its images; None where there are none.
        metrics: figures of the page; "per_class" as class_metrics gives it.
        text: first paragraph.
    """
    name, top1 = config.model.backbone["name"], metrics.get("top1")
    page = Page(name if top1 is None else f"{name}, top-1 {top1:.2f}%", text)
    paths = {name: folder / f"{name}.png" for name in ("curve", "confusion", "worst", "predictions")}
    if metrics:
        flat, columns = flat_metrics(metrics), ("class", "images", "top-1, percent", "most often taken for")
        rows = [(name, row["images"], row["top1"], row["mistaken_for"]) for name, row in metrics["per_class"].items()]
        tables = [Table(list(flat), [list(flat.values())]), Table(columns, rows)]
        page.sections.append(Section("Figures", tables=tables))
    draw_curves(folder / "log.jsonl", paths["curve"], CURVES)
    page.add_image("Training", paths["curve"])
    if results is not None:
        counts = results.confusion(len(class_names))
        draw_confusion(counts, class_names, class_names, paths["confusion"])
        page.add_image("Confusions", paths["confusion"], tables=[confusion_table(counts, class_names, class_names)])
    if results is not None and split is not None:
        draw_mistakes(results, split, class_names, paths["worst"], config.train.worst)
        page.add_photos("Worst mistakes", [paths["worst"]])
        draw_predictions(results, split, class_names, paths["predictions"], config.train.pictures)
        page.add_photos("Predictions", [paths["predictions"]])
    page.add_config(config)
    page.write(folder / "report.html")
    return [path for path in paths.values() if path.is_file()]


def read_results(folder: Path) -> tuple[Results, list[str]]:
    """Results of a run's best epoch so far, and the class names. Raises DataError or CheckpointError if absent."""
    path = folder / "results.npz"
    if not path.is_file():
        raise DataError(f"{path}: does not exist, the run was not evaluated yet")
    try:
        results = Results.load(path)
    except (*UNREADABLE, zipfile.BadZipFile) as error:
        raise DataError(f"{path}: cannot be read: {error}") from error
    return results, load_checkpoint(folder / "best.pth", kind="classification")["class_names"]
