"""Whether annotations hold objects that a detector can learn, and if not, the likely mistake in them."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dat.detection.config import TrainDataConfig
from dat.detection.data.records import Annotations
from dat.detection.data.transforms import resized_size
from dat.engine.audit import Findings

# Problems of single boxes, which readers count.
EMPTY, OUTSIDE, CLIPPED = (
    "empty box, dropped",
    "box outside its image, dropped",
    "box reaches outside its image, clipped",
)
# Problems of a whole split, whose texts have the numbers.
FORM, NOTHING, MANY = "boxes are written in another form", "no object to learn", "objects are left out"
# Two images of one label file.
SHARED = "label file of several images"
WHOLE_KINDS = (FORM, NOTHING, MANY, SHARED)

# The four numbers of a box in each format. The key is how the name of the format ends.
FORMS = {
    "COCO": "x, y, width, height in pixels of the file",
    "Hugging Face": "x, y, width, height in pixels of the file",
    "VOC": "xmin, ymin, xmax, ymax in pixels of the file",
    "LabelMe": "points x, y in pixels of the file",
    "CVAT XML": "xtl, ytl, xbr, ybr in pixels of the file",
    "YOLO": "centre x, centre y, width, height in parts of the image",
}

# The part of all boxes from which a fault gives a warning.
NOTABLE = 0.2

# Fewer boxes than these may reach outside, or end before the middle of their images, by chance.
FEW, MANY_BOXES = 4, 10

# Percentages, and the coordinates of some language models.
SCALES = (100, 1000)


def check_form(
    path: Path, images: Iterable[tuple[tuple[int, int], Sequence[Any]]], problems: Findings, name: str = "COCO"
) -> None:
    """Adds to `problems` that boxes, read as corners in pixels, seem to have been written in another form.

    `images`: (width, height) and objects of each image, whose `box` is (x0, y0, x1, y1). `name`: a format of FORMS.
    """
    form, yolo = f"{name}'s are {FORMS[name]}", name == "YOLO"
    pairs = [(size, entry.box) for size, objects in images for entry in objects]
    count = len(pairs)
    sizes = np.array([size for size, _ in pairs], dtype=np.float64).reshape(-1, 2)
    boxes = np.array([box for _, box in pairs], dtype=np.float64).reshape(-1, 4)
    low, high = boxes[:, :2], boxes[:, 2:]
    valid = np.isfinite(boxes).all(1) & (high > low).all(1)
    sizes, low, high = sizes[valid], low[valid], high[valid]
    if not len(low):
        return
    extent = high - low
    with np.errstate(over="ignore", invalid="ignore"):
        shown = (np.minimum(high, sizes) - np.maximum(low, 0)).clip(0) / extent
    inside = np.nan_to_num(shown).prod(1)
    # YOLO's are parts, so that tiny ones are only tiny.
    parts = (np.abs(low) <= 1).all(1) & (extent <= 1).all(1) & (not yolo)
    first = low + extent / 2 if yolo else low
    # The numbers as they are written: a lower right corner is larger than the upper left one.
    corners = ((extent > first) & (extent < sizes + 1)).all(1) & ("width" in form)
    # With the upper left in the place of the centre, boxes leave their images there only, by up to half of their size.
    upper_left = (first + extent < sizes + 1).all(1) & yolo
    cut, lost = inside < 0.9, inside < 0.5
    reach = f"{path}: {cut.sum()} of {count} boxes reach outside their images"
    many, stops = len(low) >= MANY_BOXES, True
    if parts.mean() >= NOTABLE:
        text = f"{path}: {parts.sum()} of {count} boxes are below one pixel"
        text, stops = f"{text}: they look like parts of the image's size; {form}", bool(parts.mean() >= 0.5)
    elif len(low) < FEW:
        return
    elif cut.mean() >= NOTABLE and corners.mean() > 0.95:
        text = f"{reach}: they look like x0, y0, x1, y1; {form}"
    elif many and (low < -extent / 10).any(0).all() and upper_left.mean() > 0.99:
        # Right boxes may reach outside there too.
        text, stops = f"{reach}: are they x, y of the upper left, width, height? {form}", False
    elif lost.mean() > 0.5 and not yolo:
        text = f"{reach}, most of them by more than half: they look like boxes of images of another size"
    elif cut.mean() >= NOTABLE:
        text, stops = f"{reach} by a tenth or more: {form}", False
    elif scales := [scale for scale in SCALES if many and not yolo and _ends_at(scale, high, sizes)]:
        text = f"{path}: {count} of {count} boxes end at pixel {scales[0]} or before, in images twice as large or more"
        text, stops = f"{text}: are they parts of {scales[0]}? {form}", False
    else:
        return
    problems.add(FORM, text, stops, int(max(parts.sum(), cut.sum(), 1)))


def _ends_at(scale: int, high: np.ndarray, sizes: np.ndarray) -> bool:
    return bool(high.max() <= scale * 1.001 and sizes.min() >= 2 * scale)


def check_objects(found: Annotations, split: Any, problems: Findings) -> None:
    """Adds to `problems`, which has the boxes that reading dropped, that few objects of the split are left, or none.

    Training drops boxes that are below one pixel in the resized image; evaluation keeps them.
    """
    # A form that stops is the reason already.
    if not found.records or (FORM in problems.problems and problems.problems[FORM].stops):
        return
    crowd = np.concatenate([np.zeros(0, bool), *(record.crowd for record in found.records)])
    small, edge = np.zeros_like(crowd), 0
    if isinstance(split, TrainDataConfig):
        edge = max(split.sizes)
        small = (resized_sides(found, edge, split.max_size) < 1) & ~crowd
    dropped = {
        kind: problems.problems[kind].count if kind in problems.problems else 0 for kind in (EMPTY, OUTSIDE, CLIPPED)
    }
    name = next((name for name in FORMS if found.format.endswith(name)), "COCO")
    form, crowds = f"{name}'s are {FORMS[name]}", "are crowds (iscrowd should be 0 for single objects)"
    if name in ("VOC", "LabelMe"):
        crowds = "are difficult (that should be 0 for objects to learn)"
    counts = {
        f"are empty ({form})": dropped[EMPTY],
        f"lie outside their images ({form})": dropped[OUTSIDE],
        crowds: int(crowd.sum()),
        f"are below one pixel in images resized to a shortest edge of {edge} (data.train.sizes)": int(small.sum()),
    }
    useless, total = sum(counts.values()), len(crowd) + dropped[EMPTY] + dropped[OUTSIDE]
    reasons = ", ".join(f"{count} {reason}" for reason, count in counts.items() if count)
    text = f"{found.path}: {useless} of {total} objects are left out: {reasons}"
    if not total:
        # Objects that cannot be read are a problem already.
        if any(problem.stops for problem in problems.problems.values()):
            return
        text = f"{found.path}: no object is annotated in {len(found.records)} images; is it the right file?"
        problems.add(NOTHING, text, stops=True)
    elif useless >= NOTABLE * total:
        # Objects may all but be crowds or small, but such boxes are a mistake.
        stops = useless == total or dropped[EMPTY] + dropped[OUTSIDE] > 0.75 * total
        problems.add(NOTHING if useless == total else MANY, text, stops=stops, count=useless)


def resized_sides(found: Annotations, size: int, max_size: int) -> np.ndarray:
    """The shorter side [n] of every box when images are resized to a shortest edge of `size`, in pixels."""
    sides = [
        (record.boxes[:, 2:] - record.boxes[:, :2]).min(1, initial=np.inf)
        * (resized_size(record.height, record.width, size, max_size)[0] / record.height)
        for record in found.records
    ]
    return np.concatenate([np.zeros(0), *sides])
