"""Detection of small objects in large images: in overlapping tiles, whose detections are merged."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from PIL import Image
from torch import Tensor
from torchvision.ops import box_area, box_iou

from dat.detection.boxes import coverage
from dat.detection.data import tile_windows
from dat.detection.data.tiles import Window
from dat.detection.detections import Detections

# Boxes of one class in different tiles are of one object if they overlap by more than this IoU, or if one that a border
# cuts lies in the other by more than this fraction of its area.
SAME_IOU, SAME_COVERAGE = 0.5, 0.7
# A box touches a border from which it is at most this fraction of the tile's side away.
TOUCH = 0.02


def detect_in_tiles(
    detect: Callable[[Sequence[Image.Image]], list[Detections]],
    image: Image.Image,
    size: int,
    overlap: float = 0.25,
    whole_size: tuple[int, int] | None = None,
    batch_size: int = 8,
    nms: float = 1.0,
) -> Detections:
    """Detects objects in overlapping tiles; an image that fits into one is searched as it is.

    A box that touches the border to a neighbour is dropped if the neighbour shows more of its object: if the box begins
    inside the neighbour, not at its border. An object no larger than the overlap is whole in one of the tiles. A larger
    one may be found in parts; these are dropped where another detection of their class holds them, in another tile or
    in the whole image. Of the detections of one object in several tiles the one of highest score is kept, a tile's
    rather than the reduced image's, and that rather than a part's, unless its score is less than half of the other.

    Args:
        detect: detections of images, of any score, with boxes in pixels of each.
        image: in RGB.
        size: sides of the tiles in pixels.
        overlap: fraction of `size` by which neighbours overlap at least, 0 to less than 1.
        whole_size: (height, width) to which the whole image is reduced and searched too, for objects with a side larger
            than the overlap; None: it is not.
        batch_size: tiles in memory.
        nms: IoU above which boxes of one class in different tiles are of one object, 0.5 at most.

    Returns:
        Detections by decreasing score; `queries` are those of the tile that each was found in.
    """
    windows = tile_windows(image.width, image.height, size, overlap)
    if len(windows) == 1:
        return detect([image])[0]
    parts: list[Detections] = []
    for start in range(0, len(windows), batch_size):
        chosen = windows[start : start + batch_size]
        crops = [image.crop(window) for window in chosen]
        parts += [_place(part, window, image) for part, window in zip(detect(crops), chosen, strict=True)]
    touching = [_touching(part.boxes, window, image.size) for part, window in zip(parts, windows, strict=True)]
    neighbours = _neighbours(windows)
    for i, (part, touches) in enumerate(zip(parts, touching, strict=True)):
        kept = ~_seen_better(part.boxes, touches, neighbours[i])
        parts[i], touching[i] = part.select(kept), touches[kept]
    if whole_size is not None:
        # Pillow needs no copy of the large image, which a tensor would be.
        small = image.resize(whole_size[::-1], Image.Resampling.BILINEAR)
        found = _place(detect([small])[0], (0, 0, *image.size), image)
        sides = found.boxes[:, 2:] - found.boxes[:, :2]
        parts.append(found.select(sides.amax(1) > overlap * size))
        windows.append((0, 0, *image.size))
        touching.append(torch.zeros(len(parts[-1]), 4, dtype=torch.bool))
    return _merge(parts, windows, [touches.any(1) for touches in touching], min(nms, SAME_IOU))


def _place(part: Detections, window: Window, image: Image.Image) -> Detections:
    """The detections of a window, which may have been resized, as detections of the image."""
    left, top, right, bottom = window
    scale = torch.tensor([(right - left) / part.image.width, (bottom - top) / part.image.height] * 2)
    return replace(part, image=image, boxes=part.boxes * scale + torch.tensor([left, top, left, top]))


def _touching(boxes: Tensor, window: Window, size: tuple[int, int]) -> Tensor:
    """Which borders of its tile each box touches, [n, 4] bool; the borders of the image itself cut nothing."""
    edges = torch.tensor(window)
    near = (boxes - edges).abs() <= TOUCH * (edges[2:] - edges[:2]).max()
    return near & (edges != torch.tensor([0, 0, *size]))


def _neighbours(windows: Sequence[Window]) -> list[list[Window | None]]:
    """For each window, which are row by row, its neighbours on the left, above, on the right and below."""
    columns = sum(window[1] == windows[0][1] for window in windows)
    found = []
    for i in range(len(windows)):
        inside = (i % columns > 0, i >= columns, (i + 1) % columns > 0, i + columns < len(windows))
        places = (i - 1, i - columns, i + 1, i + columns)
        found.append([windows[place] if ok else None for place, ok in zip(places, inside, strict=True)])
    return found


def _seen_better(boxes: Tensor, touching: Tensor, neighbours: Sequence[Window | None]) -> Tensor:
    """Which boxes touch a border behind which a neighbour shows more of them, [n] bool."""
    better = torch.zeros(len(boxes), dtype=torch.bool)
    for side, window in enumerate(neighbours):
        if window is not None:
            # The neighbour on the right shows more of a box that begins right of its own left border.
            opposite = (side + 2) % 4
            inwards = 1 if side >= 2 else -1
            margin = TOUCH * max(window[2] - window[0], window[3] - window[1])
            better |= touching[:, side] & (inwards * (boxes[:, opposite] - window[opposite]) > margin)
    return better


def _merge(
    parts: Sequence[Detections], windows: Sequence[Window], cut: Sequence[Tensor], same_iou: float
) -> Detections:
    """The best detection of each object; `cut`: for each window, which of its detections a border cuts."""
    scores, labels, boxes, queries = (
        torch.cat([getattr(part, name) for part in parts]) for name in ("scores", "labels", "boxes", "queries")
    )
    cuts, rank = torch.cat(list(cut)), torch.empty(len(scores), dtype=torch.long)
    # A tile is preferred to the reduced image, and that to a part of an object, unless its score is less than half.
    reduced = [window == (0, 0, *parts[0].image.size) for window in windows]
    weights = torch.cat([part.scores * (0.5 if whole else 1) for part, whole in zip(parts, reduced, strict=True)])
    weights[cuts] /= 4
    # Among equals the largest is first.
    order = box_area(boxes).argsort(descending=True)
    order = order[weights[order].argsort(descending=True, stable=True)]
    rank[order] = torch.arange(len(order))
    members, corners = torch.arange(len(scores)).split([len(part) for part in parts]), torch.tensor(windows)
    kept = []
    for i, own in enumerate(members):
        overlapping = (corners[:, :2] < corners[i, 2:]).all(1) & (corners[i, :2] < corners[:, 2:]).all(1)
        overlapping[i] = False
        other = torch.cat([own[:0], *(members[j] for j in overlapping.nonzero().flatten().tolist())])
        same = box_iou(boxes[own], boxes[other]) > same_iou
        same |= cuts[own, None] & (coverage(boxes[own], boxes[other]) > SAME_COVERAGE)
        same &= (labels[own, None] == labels[other]) & (rank[other] < rank[own, None])
        kept.append(~same.any(1))
    everything = replace(parts[0], scores=scores, labels=labels, boxes=boxes, queries=queries).select(torch.cat(kept))
    return everything.select(everything.scores.argsort(descending=True, stable=True))
