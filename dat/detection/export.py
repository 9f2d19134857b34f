"""Exports a detector with its pre- and post-processing.

    python -m detection.export CHECKPOINT --out model.onnx [--images IMAGE_OR_FOLDER]
    python -m detection.export CHECKPOINT --out model.pt2 [--compile]

.onnx is for onnxruntime and the like, .pt2 a torch.export program. Inputs, of any batch and size: "images" [B, 3, H, W]
uint8, RGB, already resized (metadata: "size" of the shortest edge, "max_size" of the longest), and "sizes" [B, 2]
int64, the (height, width) in pixels that boxes are wanted in, 0: in pixels of "images". Outputs: "scores" [B, k],
falling, "labels" [B, k] int64, "boxes" [B, k, 4], (x0, y0, x1, y1), and "queries" [B, k] int64, which of the decoder's
queries it was. The file is put in place only after it gave torch's results on real images: --images, the validation
data, or generated ones, at two sizes, alone and in pairs.

--compile makes .pt2 a package of AOTInductor: machine code for processors such as this one, which takes minutes. It
is given "images" that are padded at the right and below until their sides are multiples of a number (metadata:
"padded_to"), and as a third input "inside" [B, 2] int64, the (height, width) without the padding. It is compared with
the model on pictures that are padded alike, as `data.pad_multiple` does it.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dat.detection.checkpoint import Detector, load_detector
from dat.detection.graph import DetectorGraph, PaddedDetectorGraph, pad_pictures
from dat.engine.config import LARGEST_SIDE
from dat.export.export import Graph, Tensors, check_path, export_checked, export_parser
from dat.export.samples import EXAMPLE, check_sizes, sample_batches, sample_pictures
from dat.utils.errors import ConfigError

# scores that are so near may come in another order from another program
TIE = 2e-4
# Compiled for sides that the strides of all maps divide: for others, sizes are rounded up from map to map, and about
# such expressions inductor reasons for hours.
STRIDE = 32


def detector_graph(detector: Detector, top_k: int) -> Graph:
    """What is exported of a detector."""
    data = detector.config.data
    metadata: dict[str, Any] = {
        "kind": "detection",
        "class_names": [category.name for category in detector.categories],
        "category_ids": [category.id for category in detector.categories],
        "size": data.val.size,
        "max_size": data.val.max_size,
        "mean": list(data.mean),
        "std": list(data.std),
        "top_k": top_k,
    }
    return Graph(
        DetectorGraph(detector.model, data, top_k).eval(),
        {"images": {0: "batch", 2: "height", 3: "width"}, "sizes": {0: "batch"}},
        ("scores", "labels", "boxes", "queries"),
        (torch.zeros(EXAMPLE, dtype=torch.uint8), torch.zeros(EXAMPLE[0], 2, dtype=torch.int64)),
        metadata,
        difference,
        {"scores": 1e-4, "boxes": 1e-3},
    )


def padded_graph(detector: Detector, top_k: int, multiple: int) -> Graph:
    """What is compiled of a detector: a graph of padded pictures, whose sides are multiples of a number."""
    graph = detector_graph(detector, top_k)
    images, sizes = graph.example
    return replace(
        graph,
        module=PaddedDetectorGraph(detector.model, detector.config.data, top_k).eval(),
        inputs={**graph.inputs, "inside": {0: "batch"}},
        example=pad_pictures(images, sizes, multiple),
        metadata={**graph.metadata, "padded_to": multiple},
        multiples={"height": multiple, "width": multiple},
    )


def difference(wanted: Tensors, found: Tensors) -> dict[str, float]:
    """The largest differences of scores and of boxes, in pixels, of detections that are the same.

    Equal scores may come in any order, and at the end of the list the one may be there and the other not.
    """
    worst = {"scores": 0.0, "boxes": 0.0}
    if any(a.shape != b.shape for a, b in zip(wanted, found, strict=True)):
        return dict.fromkeys(worst, float("inf"))
    for scores, labels, boxes, queries, *others in zip(*wanted, *found, strict=True):
        worst["scores"] = max(worst["scores"], _largest(scores - others[0]))
        own = (labels[:, None] == others[1]) & (queries[:, None] == others[3])
        # In two stages queries that tie may have changed places: what the one found is found by the other.
        same = own | (labels[:, None] == others[1]) & ((scores[:, None] - others[0]).abs() < TIE)
        # those that are so near to the last that they may be left out
        near = scores - scores[-1:] < TIE
        judged, there = own.any(1) | ~near, same.any(1)
        if not there[judged].all():
            worst["scores"] = float("inf")
        distance = (boxes[:, None] - others[2]).abs().amax(-1).masked_fill(~same, float("inf")).amin(1)
        worst["boxes"] = max(worst["boxes"], _largest(distance[judged & there]))
    return worst


def _largest(values: Tensor) -> float:
    return float(values.abs().max()) if values.numel() else 0.0


def main(arguments: Sequence[str] | None = None) -> None:
    parser = export_parser("python -m detection.export", "Exports a detector.")
    parser.add_argument("--top-k", type=int, help="most detections per image (those of the configuration)")
    options = parser.parse_args(arguments)
    if options.top_k is not None and options.top_k < 1:
        raise ConfigError(f"--top-k is {options.top_k}, should be at least 1")
    check_path(options.out, options.compile)
    detector = load_detector(options.checkpoint, torch.device("cpu"))
    data = detector.config.data
    sizes = check_sizes(options.sizes, data.val.size)
    pictures = sample_pictures(options.images, Path(data.root) / data.val.images)
    samples: list[Tensors] = [
        (images, torch.tensor([[0, 0], [480, 640]][: len(images)])) for images in sample_batches(pictures, sizes)
    ]
    top_k = options.top_k or data.val.top_k
    graph = detector_graph(detector, top_k)
    if options.compile:
        multiple = math.lcm(data.pad_multiple, STRIDE)
        if -data.val.max_size // multiple * -multiple > LARGEST_SIDE:
            raise ConfigError(
                f"--compile: sides of data.val.max_size = {data.val.max_size} padded to a multiple of {multiple} "
                f"(data.pad_multiple = {data.pad_multiple}) are more than {LARGEST_SIDE}"
            )
        graph = padded_graph(detector, top_k, multiple)
        samples = [pad_pictures(images, wanted, multiple) for images, wanted in samples]
    worst = export_checked(graph, samples, options.out, options.compile)
    print(
        f"{options.out}: {options.out.stat().st_size / 2**20:.1f} MiB; as torch to {worst['boxes']:.1e} pixels and "
        f"{worst['scores']:.1e} in scores on {pictures.origin}, shortest edges {sizes[0]} and {sizes[1]}, batch 1 and 2"
    )
