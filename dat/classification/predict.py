"""Labels pictures and videos: python -m classification.predict MODEL SOURCE [SOURCE ...] --out DIR [key.path=value ...]

MODEL is a checkpoint, or an .onnx or .pt2 that classification.export wrote; a SOURCE is a picture, a video, a folder or
a pattern such as "day*/*.jpg". Writes DIR/predictions.json, DIR/predictions.csv and DIR/predictions.png, a sheet of the
first pictures with their labels; --crops also puts each picture into a folder of its label.
"""

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm import tqdm

from dat.classification.classifier import Classifier
from dat.classification.sheet import sheet_title
from dat.engine.distributed import setup_distributed
from dat.utils.errors import ConfigError
from dat.utils.files import file_name, write_csv, write_json
from dat.utils.media import Frame, Frames, find_media
from dat.utils.plots import draw_grid, thumbnail

COLUMNS = ("file", "frame", "label", "score")


def predict(
    classifier: Classifier, frames: Frames, batch_size: int, options: argparse.Namespace
) -> tuple[list[dict[str, Any]], list[tuple[Image.Image, str]]]:
    """Labels all frames, and puts them into folders of their labels where `options` asks for that.

    Returns:
        one {"file", "frame" (of a video), "label", "score", "top"} per picture that is wanted, and those of the sheet,
        small, with their titles.
    """
    results: list[dict[str, Any]] = []
    sheet: list[tuple[Image.Image, str]] = []
    with tqdm(unit=" pictures", disable=not sys.stderr.isatty()) as bar:
        for batch in frames.batches(batch_size):
            for frame, result in zip(batch, classifier.predict([frame.picture for frame in batch]), strict=True):
                if result.score < options.threshold or result.label not in (options.classes or [result.label]):
                    continue
                number = {} if frame.number is None else {"frame": frame.number}
                results.append({"file": str(frame.media.path), **number, **result.to_dict()})
                if len(sheet) < options.sheet:
                    sheet.append((thumbnail(frame.picture), sheet_title(result.label, result.score)))
                if options.crops:
                    save(frame, result.label, options.out)
            bar.update(len(batch))
    return results, sheet


def save(frame: Frame, label: str, out: Path) -> None:
    """Writes a picture into the folder of its label."""
    folder = out / "crops" / file_name(label)
    folder.mkdir(parents=True, exist_ok=True)
    frame.picture.save(folder / f"{file_name(frame.name)}.png")


def main() -> None:
    parser = argparse.ArgumentParser(prog="classification.predict", description=__doc__)
    parser.add_argument("model", type=Path, help="best.pth or last.pth of a run, or an exported .onnx or .pt2")
    parser.add_argument(
        "sources", nargs="+", metavar="SOURCE", help="picture, video, folder, pattern, or key.path=value"
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for the results")
    parser.add_argument("--threshold", type=float, default=0.0, help="least score, 0 to 1, of what is kept (0)")
    parser.add_argument("--classes", nargs="+", metavar="NAME", help="keep only pictures with one of these labels")
    parser.add_argument("--crops", action="store_true", help="also put each picture into a folder of its label")
    parser.add_argument("--sheet", type=int, default=48, help="pictures on the sheet (48)")
    parser.add_argument("--batch-size", type=int, default=64, help="pictures that run together (64)")
    parser.add_argument("--every", type=int, default=1, metavar="N", help="only every N-th frame of videos (1)")
    parser.add_argument("--trust", action="store_true", help="load a .pt2, which can run any code")
    options = parser.parse_intermixed_args()
    if options.batch_size < 1 or options.every < 1:
        raise ConfigError("--batch-size and --every should be at least 1")
    overrides, sources = split_overrides(options.sources)
    media = find_media(sources, exclude=options.out)
    device = setup_distributed("auto").device
    classifier = Classifier.from_checkpoint(options.model, overrides, device, options.trust)
    unknown = [name for name in options.classes or () if name not in classifier.class_names]
    if unknown:
        raise ConfigError(f"--classes: no class {unknown[0]!r}, there are {', '.join(classifier.class_names)}")
    frames = Frames(media, options.every)
    results, sheet = predict(classifier, frames, options.batch_size, options)
    if not frames.count:
        raise frames.errors[0]
    options.out.mkdir(parents=True, exist_ok=True)
    write_json(options.out / "predictions.json", results)
    write_csv(options.out / "predictions.csv", results, COLUMNS)
    if sheet:
        draw_grid(sheet, options.out / "predictions.png")
    if frames.errors:
        print(
            f"warning: {len(frames.errors)} unreadable pictures left out, such as {frames.errors[0]}", file=sys.stderr
        )
    print(f"{len(results)} pictures labelled: {options.out}")


def split_overrides(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """key.path=value arguments, and the others; a file of such a name is a file. Raises ConfigError without others."""
    overrides = [text for text in arguments if re.match(r"[\w.]+=", text) and not Path(text).exists()]
    sources = [text for text in arguments if text not in overrides]
    if not sources:
        raise ConfigError("SOURCE: none is given, should be a picture, a video, a folder or a pattern")
    return overrides, sources
