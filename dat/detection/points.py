"""The sampling points of detections, in the last layer of Deformable DETR's decoder."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from dat.detection.detections import Detections
from dat.detection.detector import Detector
from dat.detection.draw import COLORS
from dat.detection.models.deformable import DeformableModel
from dat.layers import MSDeformAttn
from dat.ops.reference import sampling_points
from dat.utils.errors import ConfigError
from dat.utils.overlays import Backdrop, create_figure, draw_star, draw_weighted, save_figure
from dat.utils.text import printable

# Most detections of a sheet, those with the highest scores.
ROWS = 12
DIAMETER = 11.0


@dataclass(frozen=True)
class Points:
    """Samples of n detections, in H heads, L levels and P points.

    Attributes:
        locations: [n, H, L, P, 2], (x, y) in pixels of the image.
        weights: [n, H, L, P], 0 to 1; those of a head sum to 1.
        references: [n, 2], reference points of the queries, (x, y) in pixels of the image.
    """

    locations: Tensor
    weights: Tensor
    references: Tensor

    def select(self, index: Tensor | Sequence[int]) -> "Points":
        """The points of some detections, by a mask or by their indices."""
        return Points(self.locations[index], self.weights[index], self.references[index])


def has_points(detector: Detector) -> bool:
    """Whether the queries of a detector have sampling points: a checkpoint of Deformable DETR and its successors.

    The points of tiles would be of other images.
    """
    return isinstance(detector.model, DeformableModel) and not detector.val.tiles


def check_points(detector: Detector) -> None:
    """Raises ConfigError for a detector without sampling points."""
    if detector.model is None:
        raise ConfigError(f"{detector.path}: sampling points need a checkpoint, an exported model does not return them")
    if detector.val.tiles:
        tiles = f"tiles of {detector.val.tiles} pixels"
        raise ConfigError(f"sampling points are of whole images, not of {tiles}; --tiles 0 searches none")
    if not has_points(detector):
        raise ConfigError(f"{detector.path}: sampling points need a deformable_detr, this checkpoint is of a detr")


def detect_with_points(detector: Detector, image: Image.Image) -> tuple[Detections, Points]:
    """All detections of an image in RGB, of any score, and their sampling points.

    Raises ConfigError as check_points does.
    """
    check_points(detector)
    model: Any = detector.model
    attention: MSDeformAttn = model.decoder[-1].cross_attn
    calls: list[tuple[Any, ...]] = []
    hook = attention.register_forward_pre_hook(lambda module, inputs: calls.append(inputs))
    try:
        detections: Detections = detector.predict(image, threshold=0.0)
    finally:
        hook.remove()
    (inputs,) = calls
    locations, weights, references = (found.cpu() for found in _samples(attention, *inputs[:4]))
    height, width = detector.input_size(image)
    assert detector.config is not None
    padded = torch.tensor([width, height])
    for multiple in (detector.config.data.pad_multiple, model.pad_multiple):
        padded = -(-padded // multiple) * multiple
    # Converts 0..1 of the model's input, padding included, to pixels of the image.
    factor = padded * torch.tensor([image.width / width, image.height / height])
    queries = detections.queries
    return detections, Points(locations[queries] * factor, weights[queries], references[queries] * factor)


@torch.inference_mode()
def _samples(
    attention: MSDeformAttn, query: Tensor, reference: Tensor, value: Tensor, shapes: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """Locations [Q, H, L, P, 2], weights [Q, H, L, P] and reference points [Q, 2] of the first image, 0 to 1."""
    layout = (query.shape[1], attention.num_heads, attention.num_levels, attention.num_points)
    query = query[:1].float()
    offsets = attention.sampling_offsets(query).view(1, *layout, 2)
    logits = attention.attention_weights(query).view(1, *layout)
    locations, weights = sampling_points(shapes, reference[:1], offsets, logits)
    return locations[0], weights[0], reference[0, :, 0, :2]


def draw_points(detections: Detections, points: Points, path: Path) -> None:
    """Writes a sheet with a row for each detection of highest score: all of its samples, then those of each level."""
    levels = points.weights.shape[2]
    columns = levels + 1 if levels > 1 else 1
    names, backdrop = detections.class_names, Backdrop.of(detections.image)
    figure, axes = create_figure(
        min(len(detections), ROWS), columns, detections.image, "sampling points of each detection, by attention weight"
    )
    for i, row in enumerate(axes.reshape(-1, columns)):
        # Sizes and colours of all panels of a row are on one scale.
        limits = points.weights[i].min().item(), points.weights[i].max().item()
        for level, panel in zip([None, *range(levels)], row, strict=False):
            chosen = slice(None) if level is None else slice(level, level + 1)
            locations, weights = points.locations[i][:, chosen], points.weights[i][:, chosen]
            backdrop.draw(panel)
            _draw_box(panel, detections.boxes[i].tolist(), COLORS[int(detections.labels[i]) % len(COLORS)])
            draw_weighted(panel, locations.flatten(0, -2), weights.flatten(), DIAMETER, limits)
            draw_star(panel, *points.references[i].tolist())
            fraction = weights.sum().item() / points.weights[i].sum().item()
            name = f"{names[i]} {detections.scores[i]:.2f}" if level is None else f"level {level}"
            panel.set_title(f"{printable(name)}, {fraction:.0%}", fontsize=7, parse_math=False)
    save_figure(figure, path)


def _draw_box(axes: Any, box: Sequence[float], color: str) -> None:
    from matplotlib.patches import Rectangle

    x0, y0, x1, y1 = box
    axes.add_patch(Rectangle((x0 - 0.5, y0 - 0.5), x1 - x0, y1 - y0, fill=False, color=color, linewidth=1.2))
