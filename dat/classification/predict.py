"""Labels of many images and videos, written as tables and as a sheet of images."""

from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from dat.classification.classifier import Classifier
from dat.classification.draw import sheet_title
from dat.utils.errors import ConfigError
from dat.utils.files import UniqueNames, atomic_write, file_name, file_names
from dat.utils.media import Frames
from dat.utils.plots import draw_grid, thumbnail
from dat.utils.progress import progress_bar
from dat.utils.tables import Tables

COLUMNS = ("image_id", "file_name", "frame", "label", "score")


def predict(
    classifier: Classifier,
    frames: Frames,
    out: Path,
    threshold: float = 0.0,
    classes: Sequence[str] | None = None,
    crops: bool = False,
    sheet: int = 48,
    batch_size: int = 8,
) -> int:
    """Labels all frames, and writes predictions.json, predictions.csv and predictions.png.

    Images are numbered from 1 in the order of their names. The tables hold what was found until an interruption.

    Args:
        classifier: trained.
        frames: images and videos.
        out: folder of the results.
        threshold: lowest score, 0 to 1, of a prediction that is kept.
        classes: names of the classes to keep; None: all.
        crops: also save each image in a folder of its label.
        sheet: number of images in predictions.png.
        batch_size: images that run together.

    Returns:
        The number of predictions.

    Raises:
        ConfigError: a class that the classifier does not have.
        DataError: no frame can be read.
    """
    for name in classes or ():
        if name not in classifier.class_names:
            raise ConfigError(f"--classes: no class {name!r}, there are {', '.join(classifier.class_names)}")
    shown: list[tuple[Image.Image, str]] = []
    folders, names = file_names(classifier.class_names), UniqueNames()
    images = count = 0
    with Tables(out / "predictions", COLUMNS) as tables, progress_bar(unit=" images", total=frames.total) as bar:
        for batch in frames.batches(batch_size):
            for frame, found in zip(batch, classifier.predict([frame.image for frame in batch]), strict=True):
                images += 1
                if found.score < threshold or (classes is not None and found.label not in classes):
                    continue
                tables.add({"image_id": images, **frame.origin, **found.to_dict()})
                count += 1
                if len(shown) < sheet:
                    shown.append((thumbnail(frame.image), sheet_title(found.label, found.score)))
                if crops:
                    folder = out / "crops" / folders[found.label]
                    folder.mkdir(parents=True, exist_ok=True)
                    with atomic_write(folder / f"{names(file_name(frame.name), frame.name)}.png") as temporary:
                        frame.image.save(temporary)
            bar.update(len(batch))
            # Before the next batch is read: an image may take a gigabyte.
            del batch, frame, found
    if shown:
        draw_grid(shown, out / "predictions.png")
    return count
