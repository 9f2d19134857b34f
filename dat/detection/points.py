"""Where detections looked: the sampling points of their queries in the last layer of Deformable DETR's decoder."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from dat.detection.checkpoint import Detector
from dat.detection.data import Category
from dat.detection.draw import COLORS
from dat.detection.models.deformable_detr import DeformableDETR
from dat.detection.predictor import Predictor
from dat.layers import MSDeformAttn
from dat.ops.reference import sampling_points
from dat.utils.errors import ConfigError
from dat.visualize import create_figure, draw_picture, draw_star, draw_weighted, save_figure

# most detections of a sheet, the most certain ones
ROWS = 12
DIAMETER = 11.0


@dataclass(frozen=True)
class Points:
    """Samples of n detections, in H heads, L levels and P points.

    Attributes:
        locations: [n, H, L, P, 2], (x, y) in pixels of the picture.
        weights: [n, H, L, P], 0 to 1; those of a head sum to 1.
        references: [n, 2], where the queries are, (x, y) in pixels of the picture.
    """

    locations: Tensor
    weights: Tensor
    references: Tensor

    def select(self, detections: Sequence[int]) -> "Points":
        """Those of some detections."""
        index = list(detections)
        return Points(self.locations[index], self.weights[index], self.references[index])


def check_points(predictor: Predictor) -> Detector:
    """What a predictor is made of. Raises ConfigError for one whose queries have no sampling points."""
    if predictor.detector is None:
        raise ConfigError(
            f"{predictor.path}: sampling points need a checkpoint, an exported model does not tell of them"
        )
    if not isinstance(predictor.detector.model, DeformableDETR):
        raise ConfigError(f"{predictor.path}: sampling points need a deformable_detr, this checkpoint is of a detr")
    return predictor.detector


def detect_with_points(predictor: Predictor, picture: Image.Image) -> tuple[dict[str, Tensor], Points]:
    """The detections of a picture, as the predictor gives them, and the points of each of them.

    Raises ConfigError as check_points does.
    """
    detector = check_points(predictor)
    attention: MSDeformAttn = detector.model.decoder[-1].cross_attn
    calls: list[tuple[Any, ...]] = []
    hook = attention.register_forward_pre_hook(lambda module, inputs: calls.append(inputs))
    try:
        (detections,) = predictor([picture])
    finally:
        hook.remove()
    (inputs,) = calls
    locations, weights, references = (found.cpu() for found in _samples(attention, *inputs[:4]))
    height, width = predictor.input_size(picture)
    multiple = detector.config.data.pad_multiple
    # from 0..1 of what the model was given, padding included, to pixels of the picture
    padded = torch.tensor([-(-side // multiple) * multiple for side in (width, height)])
    factor = padded * torch.tensor([picture.width / width, picture.height / height])
    queries = detections["queries"]
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


def draw_points(
    picture: Image.Image,
    results: Sequence[dict[str, Any]],
    points: Points,
    categories: Sequence[Category],
    path: Path,
) -> None:
    """Writes a sheet with a row for each of the most certain detections: all of its samples, then those of each level.

    Args:
        picture: RGB.
        results: in COCO's format, of any number of detections.
        points: of them.
        categories: of the detector.
        path: of the sheet.
    """
    order = sorted(range(len(results)), key=lambda i: -results[i]["score"])[:ROWS]
    labels = {category.id: label for label, category in enumerate(categories)}
    levels = points.weights.shape[2]
    columns = levels + 1 if levels > 1 else 1
    figure, axes = create_figure(len(order), columns, picture, "where each detection sampled, by weight")
    for i, row in zip(order, axes.reshape(-1, columns), strict=True):
        label = labels[results[i]["category_id"]]
        # sizes and colours of all panels of a row on one scale
        limits = points.weights[i].min().item(), points.weights[i].max().item()
        for level, panel in zip([None, *range(levels)], row, strict=False):
            chosen = slice(None) if level is None else slice(level, level + 1)
            locations, weights = points.locations[i][:, chosen], points.weights[i][:, chosen]
            draw_picture(panel, picture)
            _draw_box(panel, results[i]["bbox"], COLORS[label % len(COLORS)])
            share = weights.sum().item() / points.weights[i].sum().item()
            draw_weighted(panel, locations.flatten(0, -2), weights.flatten(), DIAMETER, limits)
            draw_star(panel, *points.references[i].tolist())
            name = f"{categories[label].name} {results[i]['score']:.2f}" if level is None else f"level {level}"
            panel.set_title(f"{name}, {share:.0%}", fontsize=7, parse_math=False)
    save_figure(figure, path)


def _draw_box(axes: Any, box: Sequence[float], color: str) -> None:
    from matplotlib.patches import Rectangle

    axes.add_patch(Rectangle((box[0] - 0.5, box[1] - 0.5), box[2], box[3], fill=False, color=color, linewidth=1.2))
