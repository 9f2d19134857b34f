"""Detects objects in pictures of any size, with a checkpoint or with what `detection.export` made of one."""

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from dat.detection.checkpoint import Detector, check_categories, load_detector
from dat.detection.data import Category, resized_size
from dat.detection.graph import DetectorGraph, pad_pictures
from dat.engine.build import checkpoint_errors
from dat.engine.config import LARGEST_SIDE
from dat.engine.optim import amp_context
from dat.export.runtime import check_found, is_exported, load_exported
from dat.utils.errors import CheckpointError

# images uint8 [B, 3, h, w] and sizes [B, 2] to scores, labels, boxes and queries, see DetectorGraph
Run = Callable[[Tensor, Tensor], tuple[Tensor, ...]]


@dataclass(frozen=True)
class Predictor:
    """What detects: `predictor(pictures)`.

    Attributes:
        path: of the checkpoint or the exported model.
        categories: label i is the i-th.
        size, max_size: of the shortest and the longest edge of what the model is given, in pixels.
        run: see Run.
        detector: what `run` is made of; None for an exported one.
    """

    path: Path
    categories: tuple[Category, ...]
    size: int
    max_size: int
    run: Run
    detector: Detector | None = None

    def __call__(self, pictures: Sequence[Image.Image]) -> list[dict[str, Tensor]]:
        """Detects objects in RGB pictures; those that become equally large are run together.

        Returns:
            For each picture "scores" [k], falling, "labels" [k], "boxes" [k, 4], xyxy in its pixels, not clipped, and
            "queries" [k], of the decoder, all on the CPU.
        """
        groups: dict[tuple[int, int], list[int]] = defaultdict(list)
        for i, picture in enumerate(pictures):
            groups[self.input_size(picture)].append(i)
        found: dict[int, dict[str, Tensor]] = {}
        for size, members in groups.items():
            images = torch.stack([F.resize(F.pil_to_tensor(pictures[i]), list(size)) for i in members])
            sizes = torch.tensor([(pictures[i].height, pictures[i].width) for i in members])
            outputs = [output.cpu() for output in self.run(images, sizes)]
            names = ("scores", "labels", "boxes", "queries")
            for i, *values in zip(members, *outputs, strict=True):
                found[i] = dict(zip(names, values, strict=True))
        return [found[i] for i in range(len(pictures))]

    def input_size(self, picture: Image.Image) -> tuple[int, int]:
        """(height, width) at which the model sees a picture."""
        return resized_size(picture.height, picture.width, self.size, self.max_size)


def load_predictor(path: Path, device: torch.device, top_k: int = 100, trust: bool = False) -> Predictor:
    """A predictor from a checkpoint, or from an exported .onnx or .pt2.

    Args:
        path: of the file.
        device: that a checkpoint's model runs on; exported models run on the CPU.
        top_k: most detections of a picture, of an exported model at most those that it was exported with.
        trust: see load_exported.

    Raises:
        CheckpointError, ConfigError: not such a file; see load_detector and load_exported.
    """
    if is_exported(path):
        return _load_exported(path, top_k, trust)
    detector = load_detector(path, device)
    data, amp = detector.config.data, detector.config.train.amp
    graph = DetectorGraph(detector.model, data, top_k).to(device).eval()

    @torch.inference_mode()
    def run(images: Tensor, sizes: Tensor) -> tuple[Tensor, ...]:
        with checkpoint_errors(path), amp_context(device, amp):
            return graph(images.to(device), sizes.to(device))

    checked = _checked(run, len(detector.categories), top_k, path)
    return Predictor(path, detector.categories, data.val.size, data.val.max_size, checked, detector)


def _load_exported(path: Path, top_k: int, trust: bool) -> Predictor:
    exported = load_exported(path, "detection", trust)
    ids, names = exported.metadata.get("category_ids"), exported.metadata["class_names"]
    edges = [exported.metadata.get(name) for name in ("size", "max_size")]
    if not all(isinstance(edge, int) and 1 <= edge <= LARGEST_SIDE for edge in edges):
        raise CheckpointError(f"{path}: its metadata lacks size or max_size, integers of 1 to {LARGEST_SIDE}")
    categories = check_categories(ids, names, path)
    # what is compiled does not pad
    multiple = exported.metadata.get("padded_to")
    if multiple is not None and not (isinstance(multiple, int) and 1 <= multiple <= LARGEST_SIDE):
        raise CheckpointError(f"{path}: its metadata has a padded_to that is not an integer of 1 to {LARGEST_SIDE}")

    def run(images: Tensor, sizes: Tensor) -> tuple[Tensor, ...]:
        inputs = (images, sizes) if multiple is None else pad_pictures(images, sizes, multiple)
        return exported.run(*inputs)

    return Predictor(path, categories, *edges, _checked(run, len(categories), top_k, path))


def _checked(run: Run, classes: int, top_k: int, path: Path) -> Run:
    """`run`, whose results are known to be detections, at most top_k. It raises CheckpointError for others."""

    def checked(images: Tensor, sizes: Tensor) -> tuple[Tensor, ...]:
        found = run(images, sizes)
        shape = (len(images), *found[0].shape[1:2]) if found else ()
        wanted = (shape, shape, (*shape, 4), shape)
        if len(shape) < 2 or tuple(tuple(output.shape) for output in found) != wanted:
            shapes = ", ".join(str(list(output.shape)) for output in found)
            raise CheckpointError(f"{path}: gives {shapes}, should give [B, k], [B, k], [B, k, 4] and [B, k]")
        scores, labels, boxes, _ = found
        check_found(labels, classes, (scores, boxes), path)
        return tuple(output[:, :top_k] for output in found)

    return checked
