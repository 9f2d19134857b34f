"""What a run or an evaluation leaves to look at: plots, pictures, and report.html, a page of them all.

    python -m classification.report RUN [key.path=value ...]

writes it anew for the folder of a run, whole or interrupted: what there is. The overrides change the run's
configuration, for instance data.root where the pictures have moved.
"""

import argparse
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dat.classification.config import ClassificationConfig, check_config
from dat.classification.readers import Split, open_split
from dat.classification.results import Results, class_table
from dat.classification.sheet import sheet_title
from dat.engine.checkpoint import load_checkpoint
from dat.engine.config import load_config
from dat.engine.report import Page, Section, Table, confusion_table, read_metrics
from dat.utils.errors import CheckpointError, DataError
from dat.utils.images import UNREADABLE
from dat.utils.plots import draw_confusion, draw_curves, draw_grid, thumbnail

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
    """Draws all that there is to see of a run or an evaluation, and writes report.html; returns the pictures.

    Args:
        folder: that the files go to; its log.jsonl gives the training curves, its predictions.png belongs to the page.
        config: of what was run.
        class_names: of the model.
        results, split: of the best epoch, and their pictures; None where there are none.
        metrics: what the page should tell in figures; "per_class", the rows of class_table.
        text: that the page opens with.
    """
    top1 = metrics.get("top1")
    name = config.model.backbone["name"]
    page = Page(name if top1 is None else f"{name}, top-1 {top1:.2f}%", text)
    paths = {name: folder / f"{name}.png" for name in ("curve", "confusion", "worst", "predictions")}
    if metrics:
        page.sections.append(Section("Figures", tables=_tables(metrics)))
    draw_curves(folder / "log.jsonl", paths["curve"], CURVES)
    page.add_picture("Training", paths["curve"])
    if results is not None:
        counts = results.confusion(len(class_names))
        draw_confusion(counts, class_names, class_names, paths["confusion"])
        page.add_picture("Confusions", paths["confusion"], tables=[confusion_table(counts, class_names, class_names)])
    if results is not None and split is not None:
        draw_mistakes(results, split, class_names, paths["worst"], config.train.worst)
        page.add_photos("Worst mistakes", [paths["worst"]])
    page.add_photos("Predictions", [paths["predictions"]])
    page.add_config(config)
    page.write(folder / "report.html")
    return [path for path in paths.values() if path.is_file()]


def tell(results: Results, class_names: Sequence[str], more: dict[str, Any]) -> dict[str, Any]:
    """What metrics.json holds: the metrics, `more`, and "per_class", the rows of class_table."""
    return {**results.metrics(), **more, "per_class": class_table(results.confusion(len(class_names)), class_names)}


def _tables(metrics: dict[str, Any]) -> list[Table]:
    shown: dict[str, Any] = {}
    for name, value in metrics.items():
        if isinstance(value, dict):
            shown |= {f"{name} {inner}": number for inner, number in value.items()}
        elif name != "per_class":
            shown[name] = value
    rows = [[row[key] for key in ("name", "images", "top1", "mistaken_for")] for row in metrics["per_class"]]
    return [
        Table(list(shown), [list(shown.values())]),
        Table(("class", "pictures", "top-1, percent", "most often taken for"), rows),
    ]


def draw_mistakes(results: Results, split: Split, class_names: Sequence[str], path: Path, count: int) -> bool:
    """Draws the `count` surest mistakes under what they were taken for and what they are; False if there are none."""
    path.unlink(missing_ok=True)
    pictures = []
    for position in results.mistakes()[:count]:
        picture, _ = split.read(int(results.index[position]))
        found = {"label": class_names[results.top[position, 0]], "score": float(results.scores[position, 0])}
        title = sheet_title(found, class_names[results.labels[position]])
        pictures.append((thumbnail(picture), title))
    if pictures:
        draw_grid(pictures, path)
    return bool(pictures)


def read_results(folder: Path) -> tuple[Results, list[str]]:
    """The results of a run's best epoch so far, and the classes. Raises DataError or CheckpointError without."""
    path = folder / "results.npz"
    if not path.is_file():
        raise DataError(f"{path}: is not there, the run was not evaluated yet")
    try:
        results = Results.load(path)
    except (*UNREADABLE, zipfile.BadZipFile) as error:
        raise DataError(f"{path}: cannot be read: {error}") from error
    return results, load_checkpoint(folder / "best.pth", kind="classification")["class_names"]


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="classification.report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, help="folder of a run, whole or interrupted")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value", help="such as data.root=FOLDER")
    arguments = parser.parse_intermixed_args()
    folder = arguments.run
    config = load_config(ClassificationConfig, folder / "config.yaml", arguments.overrides)
    check_config(config)
    results, split, lacking = None, None, ""
    names: list[str] = []
    metrics: dict[str, Any] = {}
    try:
        results, names = read_results(folder)
        metrics = read_metrics(folder) | tell(results, names, {})
        opened = open_split(config.data, "val", names)
        if len(opened) <= results.index.max():
            raise DataError(f"data.val has {len(opened)} pictures, fewer than the results are of")
        split = opened
    except (DataError, CheckpointError) as error:
        lacking = f"Not complete: {error}"
        print(f"warning: {lacking}", file=sys.stderr)
    write_report(folder, config, names, results, split, metrics, lacking)
    print(f"written to {folder / 'report.html'}")
