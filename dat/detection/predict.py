"""Detections of many images and videos, written as annotated images and as tables in COCO's result format."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from dat.detection.detections import Detections
from dat.detection.detector import Detector
from dat.detection.points import Points, detect_with_points, draw_points
from dat.utils.errors import ConfigError
from dat.utils.files import UniqueNames, atomic_write, real_path, short_name
from dat.utils.media import Frame, Frames, Media
from dat.utils.progress import progress_bar
from dat.utils.tables import Tables

COLUMNS = ("image_id", "file_name", "frame", "category_id", "label", "score", "x", "y", "width", "height")


@dataclass(frozen=True)
class Output:
    """The folder of a prediction, and the images that are written to it.

    Attributes:
        folder: of all files.
        targets: for each image its annotated image, for each video the folder of its frames.
        threshold: lowest score of detections that are drawn and cropped.
        crops: the folder in crops/ of each class whose detections are also cut out.
        points: also draw their sampling points.
        names: of the crops so far.
    """

    folder: Path
    targets: dict[Media, Path]
    threshold: float
    crops: Mapping[str, str] = field(default_factory=dict)
    points: bool = False
    names: UniqueNames = field(default_factory=UniqueNames)

    def write(self, frame: Frame, detections: Detections, points: Points | None) -> int:
        """Writes the images of a frame; returns the number of detections drawn."""
        chosen = detections.scores >= self.threshold
        drawn = detections.select(chosen)
        target = self.targets[frame.media]
        if frame.number is not None:
            target = target / f"{frame.number:06d}.png"
        target.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(target) as temporary:
            drawn.draw().save(temporary)
        if self.crops:
            self._cut(drawn, target)
        if points is not None and len(drawn):
            sheet = target.with_name(f"{target.stem}_points.png")
            while sheet in self.taken:
                sheet = sheet.with_name(f"{sheet.stem}_.png")
            draw_points(drawn, points.select(chosen), sheet)
        return len(drawn)

    @cached_property
    def taken(self) -> set[Path]:
        """Files and folders of all media."""
        return set(self.targets.values())

    def _cut(self, drawn: Detections, target: Path) -> None:
        image = drawn.image
        path = target.relative_to(self.folder)
        stem = self.names(short_name("_".join(path.with_suffix("").parts)), str(path))
        for i, (name, box) in enumerate(zip(drawn.class_names, drawn.boxes.tolist(), strict=True), 1):
            # A crop has at least one pixel.
            left, top = min(int(box[0]), image.width - 1), min(int(box[1]), image.height - 1)
            right, bottom = max(round(box[2]), left + 1), max(round(box[3]), top + 1)
            folder = self.folder / "crops" / self.crops[name]
            folder.mkdir(parents=True, exist_ok=True)
            crop = image.crop((left, top, min(right, image.width), min(bottom, image.height)))
            with atomic_write(folder / f"{stem}_{i}.png") as temporary:
                crop.save(temporary)


def choose_targets(media: Sequence[Media], out: Path) -> dict[Media, Path]:
    """The annotated image of each image, and the folder for each video. Raises ConfigError if one is a source."""
    paths = [out / one.name for one in media]

    def choose(stems: Iterable[str]) -> list[Path]:
        return [
            path if one.is_video else path.with_name(f"{short_name(stem)}.png")
            for one, path, stem in zip(media, paths, stems, strict=True)
        ]

    targets = choose(path.stem for path in paths)
    # Some file systems do not distinguish cases.
    if len({str(target).casefold() for target in targets}) < len(targets):
        # Keep the suffix where photo.jpg and photo.png would collide.
        targets = choose(path.name for path in paths)
    sources = {real_path(one.path) for one in media}
    for target in targets:
        if real_path(target) in sources:
            raise ConfigError(f"--out: {target} is one of the images to search, choose another folder")
    return dict(zip(media, targets, strict=True))


def predict(
    detector: Detector, frames: Frames, output: Output, classes: Sequence[str] | None = None, batch_size: int = 8
) -> tuple[int, int]:
    """Detects objects in all frames, and writes images, detections.json and detections.csv.

    The tables hold all detections, of any score; when interrupted, those until then. Images are numbered from 1 in the
    order of their names.

    Args:
        detector: trained.
        frames: images and videos.
        output: where results go.
        classes: names of the classes to keep; None: all.
        batch_size: frames, or tiles of one frame, in memory.

    Returns:
        Numbers of images and of drawn detections.

    Raises:
        ConfigError: a class that the detector does not have.
        DataError: no frame can be read.
    """
    ids = {category.name: category.id for category in detector.categories}
    for name in classes or ():
        if name not in ids:
            raise ConfigError(f"--classes: no class {name!r}, there are {', '.join(ids)}")
    names = {category.id: category.name for category in detector.categories}
    images = drawn = 0
    with (
        Tables(output.folder / "detections", COLUMNS) as tables,
        progress_bar(unit=" images", total=frames.total) as bar,
    ):
        for batch in frames.batches(1 if detector.val.tiles else batch_size):
            for frame, (detections, points) in zip(
                batch, _detect(detector, batch, output.points, batch_size), strict=True
            ):
                images += 1
                if classes is not None:
                    kept = [i for i, name in enumerate(detections.class_names) if name in classes]
                    detections = detections.select(kept)
                    points = None if points is None else points.select(kept)
                drawn += output.write(frame, detections, points)
                for result in detections.to_coco(images):
                    box = dict(zip(("x", "y", "width", "height"), result["bbox"], strict=True))
                    tables.add(result | frame.origin, label=names[result["category_id"]], **box)
            bar.update(len(batch))
            # Before the next batch is read: an image may take a gigabyte.
            del batch, frame, detections, points
    return images, drawn


def _detect(
    detector: Detector, batch: Sequence[Frame], points: bool, batch_size: int
) -> list[tuple[Detections, Points | None]]:
    images = [frame.image for frame in batch]
    if points:
        return [detect_with_points(detector, image) for image in images]
    return [(detections, None) for detections in detector.predict(images, 0.0, batch_size)]
