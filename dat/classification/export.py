"""Exports a classifier with its pre- and post-processing.

    python -m classification.export CHECKPOINT --out model.onnx [--images IMAGE_OR_FOLDER]
    python -m classification.export CHECKPOINT --out model.pt2 [--compile]

.onnx is for onnxruntime and the like, .pt2 a torch.export program, or with --compile a package of AOTInductor: machine
code for processors such as this one. Input: "images" [B, 3, H, W] uint8, RGB, resized and cropped (metadata:
"img_size", "crop_pct", "crop_mode", "interpolation"); any batch, and any size that the model takes, but img_size alone
where it is compiled. Outputs: "logits" [B, K], "scores" [B, k], the k <= 5 highest probabilities, falling, and their
"labels" [B, k] int64. The file is put in place only after it gave torch's results on real pictures: --images, the
validation data, or generated ones, at two sizes, alone and in pairs.
"""

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from dat.classification.classifier import Classifier
from dat.classification.graph import ClassifierGraph
from dat.export.export import Graph, Tensors, check_path, export_checked, export_parser
from dat.export.samples import EXAMPLE, check_sizes, sample_batches, sample_pictures


def classifier_graph(classifier: Classifier, any_size: bool) -> Graph:
    """What is exported of a classifier; `any_size`: of the pictures, else that of the configuration."""
    data = classifier.config.data
    metadata = {
        "kind": "classification",
        "class_names": list(classifier.class_names),
        "img_size": data.img_size,
        "crop_pct": data.crop_pct,
        "crop_mode": data.crop_mode,
        "interpolation": data.interpolation,
        "mean": list(data.mean),
        "std": list(data.std),
    }
    axes = {0: "batch", 2: "height", 3: "width"} if any_size else {0: "batch"}
    module = ClassifierGraph(classifier.trained_model(), data, len(classifier.class_names)).eval()
    shape = EXAMPLE if any_size else (EXAMPLE[0], 3, data.img_size, data.img_size)
    return Graph(
        module,
        {"images": axes},
        ("logits", "scores", "labels"),
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
    # the probabilities of the labels that the exported model gives
    labelled = wanted[0].softmax(1).gather(1, found[2])
    return {"logits": float(logits), "scores": float(scores.maximum((labelled - found[1]).abs().max()))}


def takes_any_size(model: nn.Module, images: Sequence[Tensor]) -> bool:
    """Whether a model runs on pictures that are not of the size it was made for, as many of timm's do not."""
    try:
        with torch.no_grad():
            for batch in images:
                model(batch.float())
    except (AssertionError, RuntimeError, ValueError):
        return False
    return True


def export_classifier(
    classifier: Classifier,
    path: Path,
    compiled: bool = False,
    images: Path | None = None,
    sizes: Sequence[int] | None = None,
) -> str:
    """Exports a classifier to `path`, .onnx or .pt2, and returns a line about the file.

    Args:
        classifier: from a checkpoint.
        path: of the file.
        compiled: a .pt2 of machine code.
        images: file or folder of images to check on; None: the validation data.
        sizes: two shortest edges to check at; None: data.img_size and a smaller one.
    Raises:
        ConfigError: a path, size or library.
        ExportError: torch cannot export the model, or the file gives other results.
    """
    check_path(path, compiled)
    model = deepcopy(classifier.trained_model()).cpu()
    data = classifier.config.data
    edges = check_sizes(sizes, data.img_size)
    pictures = sample_pictures(images, Path(data.root) / data.val.path)
    batches = sample_batches(pictures, edges)
    any_size = not compiled and takes_any_size(model, batches)
    side = data.img_size
    if not any_size:
        batches = [batch[:, :, :side, :side] for batch in sample_batches(pictures, [side])]
    graph = classifier_graph(replace(classifier, model=model), any_size)
    worst = export_checked(graph, [(batch,) for batch in batches], path, compiled)
    kind = "package" if compiled else "model"
    at = f"shortest edges {edges[0]} and {edges[1]}" if any_size else f"{side} pixels, the one size of the {kind}"
    return (
        f"{path}: {path.stat().st_size / 2**20:.1f} MiB; as torch to {worst['logits']:.1e} in logits "
        f"on {pictures.origin}, {at}, batch 1 and 2"
    )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = export_parser("python -m classification.export", "Exports a classifier.")
    options = parser.parse_args(arguments)
    check_path(options.out, options.compile)
    classifier = Classifier.from_checkpoint(options.checkpoint, device="cpu")
    print(export_classifier(classifier, options.out, options.compile, options.images, options.sizes))
