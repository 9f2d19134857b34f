"""Exports a classifier with its pre- and post-processing.

Input: "images" [B, 3, H, W] uint8, RGB, resized and cropped (metadata: "img_size", "crop_pct", "crop_mode",
"interpolation"); any batch, and any size that the model takes, but img_size only where it is compiled. Outputs:
"logits" [B, K], "scores" [B, k], the k <= 5 highest probabilities, decreasing, and their "labels" [B, k] int64.
"""

from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path

import torch
from torch import Tensor, nn

from dat.classification.config import DataConfig
from dat.classification.graph import ClassifierGraph
from dat.export.export import EXAMPLE, Samples, check_path, check_sizes, export_checked
from dat.export.graph import Graph, Tensors


def export_classifier(
    model: nn.Module,
    data: DataConfig,
    class_names: Sequence[str],
    path: Path,
    compiled: bool = False,
    images: Path | None = None,
    sizes: Sequence[int] | None = None,
) -> str:
    """Exports a classifier, after checking that the file gives torch's results at two sizes, in batches of 1 and 2.

    Args:
        model: images [B, 3, H, W] to logits [B, K].
        data: how images are resized and normalised.
        class_names: label i is the i-th.
        path: .onnx, or .pt2 for torch.export.
        compiled: .pt2 is a package of AOTInductor: machine code for processors such as this one.
        images: an image or a folder to check on; None: the validation data, or generated images where it is missing.
        sizes: two shortest edges to check at; None: data.img_size and a smaller one.

    Returns:
        A line with the size of the file and its differences from torch.

    Raises:
        ConfigError: wrong arguments, or a library that is missing.
        ExportError: the model cannot be exported, or the file gives other results.
    """
    check_path(path, compiled)
    model = deepcopy(model).cpu()
    edges = check_sizes(sizes, data.img_size)
    samples = Samples.read(images, Path(data.root) / data.val.path)
    batches = samples.batches(edges)
    any_size = not compiled and takes_any_size(model, batches)
    side = data.img_size
    if not any_size:
        batches = [batch[:, :, :side, :side] for batch in samples.batches([side])]
    graph = classifier_graph(model, data, class_names, any_size)
    worst = export_checked(graph, [(batch,) for batch in batches], path, compiled)
    kind = "package" if compiled else "model"
    at = f"shortest edges {edges[0]} and {edges[1]}" if any_size else f"{side} pixels, the only size of the {kind}"
    return (
        f"{path}: {path.stat().st_size / 2**20:.1f} MiB; equals torch up to {worst['logits']:.1e} in logits "
        f"on {samples.origin}, {at}, batch 1 and 2"
    )


def classifier_graph(model: nn.Module, data: DataConfig, class_names: Sequence[str], any_size: bool) -> Graph:
    """A classifier for the exporter; `any_size`: of images, else only that of the configuration."""
    metadata = {
        "kind": "classification",
        "class_names": list(class_names),
        "img_size": data.img_size,
        "crop_pct": data.crop_pct,
        "crop_mode": data.crop_mode,
        "interpolation": data.interpolation,
        "mean": list(data.mean),
        "std": list(data.std),
    }
    shape = EXAMPLE if any_size else (EXAMPLE[0], 3, data.img_size, data.img_size)
    return Graph(
        ClassifierGraph(model, data, len(class_names)).eval(),
        {"images": {0: "batch", 2: "height", 3: "width"} if any_size else {0: "batch"}},
        {name: {0: "batch"} for name in ("logits", "scores", "labels")},
        (torch.zeros(shape, dtype=torch.uint8),),
        metadata,
        difference,
        {"logits": 1e-4, "scores": 1e-4},
    )


def difference(wanted: Tensors, found: Tensors) -> dict[str, float]:
    """The largest differences of logits and scores; labels may differ where scores are equal."""
    if any(a.shape != b.shape for a, b in zip(wanted[:2], found[:2], strict=True)):
        return {"logits": float("inf"), "scores": float("inf")}
    logits, scores = ((a - b).abs().max() for a, b in zip(wanted[:2], found[:2], strict=True))
    # Probabilities, by torch, of the labels that the exported model gives.
    labelled = wanted[0].softmax(1).gather(1, found[2])
    return {"logits": float(logits), "scores": float(scores.maximum((labelled - found[1]).abs().max()))}


def takes_any_size(model: nn.Module, images: Sequence[Tensor]) -> bool:
    """Whether a model runs on images of other sizes than its own, which many of timm's do not."""
    try:
        with torch.no_grad():
            for batch in images:
                model(batch.float())
    except (AssertionError, RuntimeError, ValueError):
        return False
    return True
