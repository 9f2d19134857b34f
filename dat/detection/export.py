"""Exports a detector with its pre- and post-processing.

Inputs, of any batch and size: "images" [B, 3, H, W] uint8, RGB, already resized (metadata: "size" of the shortest edge,
"max_size" of the longest), and "sizes" [B, 2] int64, the (height, width) of the images that boxes refer to, 0: those of
"images". Outputs: "scores" [B, k], decreasing, "labels" [B, k] int64, "boxes" [B, k, 4], (x0, y0, x1, y1), and
"queries" [B, k] int64, the decoder's query that gave each detection.

A package of AOTInductor takes "images" that are padded at the right and below until their sides are multiples of a
number (metadata: "padded_to"), and a third input "inside" [B, 2] int64, their (height, width) without padding.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dat.detection.checkpoint import class_state
from dat.detection.config import DataConfig, DetectionConfig
from dat.detection.data import Category
from dat.detection.graph import DetectorGraph, PaddedDetectorGraph, pad_images
from dat.detection.models.base import BaseDETR
from dat.engine.config import LARGEST_SIDE
from dat.export.export import EXAMPLE, Samples, check_path, check_sizes, export_checked
from dat.export.graph import Graph, Tensors
from dat.utils.errors import ConfigError

# Scores closer than this may be in another order in the exported program.
TIE = 2e-4
# Compiled models take sides that the strides of all maps divide: otherwise sizes are rounded up from map to map, and
# inductor reasons about such expressions for hours.
STRIDE = 32


def export_detector(
    model: BaseDETR,
    config: DetectionConfig,
    categories: Sequence[Category],
    path: Path,
    compiled: bool = False,
    images: Path | None = None,
    sizes: Sequence[int] | None = None,
    top_k: int | None = None,
) -> str:
    """Exports a detector, after checking that the file gives torch's results at two sizes, in batches of 1 and 2.

    Args:
        model: in evaluation mode, on the CPU.
        config: its configuration.
        categories: its classes.
        path: .onnx, or .pt2 for torch.export.
        compiled: .pt2 is a package of AOTInductor: machine code for processors such as this one.
        images: an image or a folder to check on; None: the validation data, or generated images where it is missing.
        sizes: two shortest edges to check at; None: that of the configuration and a smaller one.
        top_k: most detections of an image; None: as configured.

    Returns:
        A line with the size of the file and its differences from torch.

    Raises:
        ConfigError: wrong arguments, or a library that is missing.
        ExportError: the model cannot be exported, or the file gives other results.
    """
    check_path(path, compiled)
    data, top_k = config.data, top_k or config.data.val.top_k
    edges = check_sizes(sizes, data.val.size)
    samples = Samples.read(images, Path(data.root) / data.val.images)
    graph = detector_graph(model, data, categories, top_k)
    inputs: list[Tensors] = [
        (batch, torch.tensor([[0, 0], [480, 640]][: len(batch)])) for batch in samples.batches(edges)
    ]
    if compiled:
        multiple = math.lcm(data.pad_multiple, model.pad_multiple, STRIDE)
        if -data.val.max_size // multiple * -multiple > LARGEST_SIDE:
            raise ConfigError(
                f"--compile: sides of data.val.max_size = {data.val.max_size}, padded to a multiple of {multiple} "
                f"(data.pad_multiple = {data.pad_multiple}, the backbone's {model.pad_multiple}), exceed {LARGEST_SIDE}"
            )
        graph = padded_graph(graph, model, data, top_k, multiple)
        inputs = [pad_images(batch, wanted, multiple) for batch, wanted in inputs]
    worst = export_checked(graph, inputs, path, compiled)
    return (
        f"{path}: {path.stat().st_size / 2**20:.1f} MiB; equals torch up to {worst['boxes']:.1e} pixels and "
        f"{worst['scores']:.1e} in scores on {samples.origin}, shortest edges {edges[0]} and {edges[1]}, batch 1 and 2"
    )


def detector_graph(model: BaseDETR, data: DataConfig, categories: Sequence[Category], top_k: int) -> Graph:
    """A detector for the exporter, as ONNX or torch.export program."""
    metadata: dict[str, Any] = {
        "kind": "detection",
        **class_state(categories),
        "size": data.val.size,
        "max_size": data.val.max_size,
        "mean": list(data.mean),
        "std": list(data.std),
        "top_k": top_k,
    }
    return Graph(
        DetectorGraph(model, data, top_k).eval(),
        {"images": {0: "batch", 2: "height", 3: "width"}, "sizes": {0: "batch"}},
        {name: {0: "batch", 1: "detections"} for name in ("scores", "labels", "boxes", "queries")},
        (torch.zeros(EXAMPLE, dtype=torch.uint8), torch.zeros(EXAMPLE[0], 2, dtype=torch.int64)),
        metadata,
        difference,
        # float32 alone moves boxes by 0.005 pixels where maps have few pixels.
        {"scores": 1e-4, "boxes": 0.02},
    )


def padded_graph(graph: Graph, model: BaseDETR, data: DataConfig, top_k: int, multiple: int) -> Graph:
    """The graph of a detector for AOTInductor; it takes padded images whose sides are multiples of a number."""
    images, sizes = graph.example
    return replace(
        graph,
        module=PaddedDetectorGraph(model, data, top_k).eval(),
        inputs={**graph.inputs, "inside": {0: "batch"}},
        example=pad_images(images, sizes, multiple),
        metadata={**graph.metadata, "padded_to": multiple},
        multiples={"height": multiple, "width": multiple},
    )


def difference(wanted: Tensors, found: Tensors) -> dict[str, float]:
    """The largest differences of scores, and of the boxes of equal detections in pixels.

    Equal scores may come in any order, and at the end of the list one may replace another.
    """
    worst = {"scores": 0.0, "boxes": 0.0}
    if any(a.shape != b.shape for a, b in zip(wanted, found, strict=True)):
        return dict.fromkeys(worst, float("inf"))
    for scores, labels, boxes, queries, *others in zip(*wanted, *found, strict=True):
        worst["scores"] = max(worst["scores"], _largest(scores - others[0]))
        own = (labels[:, None] == others[1]) & (queries[:, None] == others[3])
        # Queries of a two-stage model that tie may be swapped: either may have found an object.
        same = own | (labels[:, None] == others[1]) & ((scores[:, None] - others[0]).abs() < TIE)
        # Detections with scores this close to the last one may be missing.
        near = scores - scores[-1:] < TIE
        judged, there = own.any(1) | ~near, same.any(1)
        if not there[judged].all():
            worst["scores"] = float("inf")
        distance = (boxes[:, None] - others[2]).abs().amax(-1).masked_fill(~same, float("inf")).amin(1)
        worst["boxes"] = max(worst["boxes"], _largest(distance[judged & there]))
    return worst


def _largest(values: Tensor) -> float:
    return float(values.abs().max()) if values.numel() else 0.0
