"""Detection in images, and in tiles of large ones, with any model: one in training, of a checkpoint or exported."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torchvision.ops import clip_boxes_to_image
from torchvision.transforms.v2 import functional as F

from dat.detection.config import DataConfig, DetectionConfig, ValDataConfig, check_config
from dat.detection.data import Annotations, Batch, Category, resized_size, val_loader
from dat.detection.data.cache import ImageCache
from dat.detection.data.records import load_record
from dat.detection.detections import Detections
from dat.detection.evaluation import detect
from dat.detection.graph import DetectorGraph
from dat.detection.models.base import BaseDETR
from dat.detection.post_process import select_detections
from dat.detection.tiles import detect_in_tiles
from dat.engine.checkpoint import checkpoint_errors
from dat.engine.config import apply_overrides, keyword_overrides
from dat.engine.distributed import Distributed, gather
from dat.engine.optim import amp_context
from dat.utils.errors import CheckpointError, ConfigError
from dat.utils.images import to_image
from dat.utils.modules import evaluating

# Images uint8 [B, 3, h, w] and sizes [B, 2] to scores, labels, boxes and queries, as DetectorGraph.
Run = Callable[[Tensor, Tensor], tuple[Tensor, ...]]

# Keys of data.val that predict takes.
OPTIONS = ("tiles", "tile_overlap", "whole_image", "nms", "one_class")


class Predictor:
    """Detects objects in images with a model.

    Attributes:
        path: of the checkpoint or exported file; None before training.
        categories: the classes; label i is the i-th.
        config: configuration; None for an exported file.
        model: in evaluation mode; None for an exported file and before training.
        size, max_size: pixels of the shortest and longest edge of the model's input.
        val: options of predictions; see `options`.
        run: the model with its pre- and post-processing; see Run.
        distributed: the device, and the processes that evaluate together; not set for an exported file.
    """

    path: Path | None = None
    categories: tuple[Category, ...] = ()
    config: DetectionConfig | None = None
    model: BaseDETR | None = None
    size = max_size = 0
    val = ValDataConfig()
    run: Run | None = None
    distributed: Distributed

    @classmethod
    def of(
        cls,
        model: BaseDETR,
        config: DetectionConfig,
        categories: tuple[Category, ...],
        distributed: Distributed,
        path: Path | None = None,
    ) -> "Predictor":
        """Predictions of a model, which is set to evaluation mode; `path`: the checkpoint that errors name."""
        predictor = cls()
        predictor.path, predictor.categories, predictor.distributed = path, categories, distributed
        predictor._set_model(model, config)
        return predictor

    def predict(self, images: Any, threshold: float = 0.5, batch_size: int = 8, **options: Any) -> Any:
        """Detects objects.

        Args:
            images: an image or a list of images, as `dat.utils.images.to_image` takes them: a path, a PIL image, an
                array [H, W, 3] of uint8, or a tensor [3, H, W].
            threshold: lowest score of a detection, 0 to 1.
            batch_size: images, or tiles of one image, in memory; those of equal input size run together.
            options: tiles=800, tile_overlap=0.25, whole_image=False, nms=0.6, one_class=True: instead of those of the
                configuration; see ValDataConfig.

        Returns:
            Detections of the image, or a list of them.

        Raises:
            DataError: an image that cannot be used.
            ConfigError: an option that does not exist or cannot work.
            CheckpointError: the model fails.
        """
        if not 0 <= threshold <= 1:
            raise ConfigError(f"threshold is {threshold}, should be 0 to 1")
        if batch_size < 1:
            raise ConfigError(f"batch_size is {batch_size}, should be at least 1")
        if not isinstance(images, (list, tuple)):
            return self.predict([images], threshold, batch_size, **options)[0]
        val = self.options(**options)
        detect = partial(self._detect, nms=val.nms, one_class=val.one_class)
        found: list[Detections] = []
        if val.tiles:
            for image in map(to_image, images):
                whole_size = self.input_size(image) if val.whole_image else None
                found.append(
                    detect_in_tiles(detect, image, val.tiles, val.tile_overlap, whole_size, batch_size, val.nms)
                )
        else:
            for start in range(0, len(images), batch_size):
                found += detect([to_image(image) for image in images[start : start + batch_size]])
        return [one.select(one.scores >= threshold) for one in found]

    def options(self, **changes: Any) -> ValDataConfig:
        """The options of predictions (those of the checkpoint, or the defaults for an exported file) with changes.

        detector.val = detector.options(tiles=800) sets them for all predictions; `predict` takes them for one call.

        Raises:
            ConfigError: an option that does not exist or cannot work.
        """
        if not changes:
            return self.val
        unknown = changes.keys() - set(OPTIONS)
        if unknown:
            raise ConfigError(f"predict has no option {min(unknown)!r}, there are {', '.join(OPTIONS)}")
        named = {f"data.val.{name}": value for name, value in changes.items()}
        config = DetectionConfig(data=DataConfig(val=self.val))
        config = apply_overrides(config, keyword_overrides(DetectionConfig, named))
        check_config(config)
        return config.data.val

    def input_size(self, image: Image.Image) -> tuple[int, int]:
        """(height, width) to which an image is resized for the model."""
        return resized_size(image.height, image.width, self.size, self.max_size)

    def _set_model(self, model: BaseDETR, config: DetectionConfig) -> None:
        self.model, self.config, self.val = model, config, config.data.val
        data, amp, device = config.data, config.train.amp, self.distributed.device
        self.size, self.max_size = data.val.size, data.val.max_size
        graph = DetectorGraph(model, data, data.val.top_k).to(device).eval()
        # A closure would keep the model in copies of this, and could not be pickled.
        self.run = partial(_run, graph, device, amp, self.path)

    def _detect(self, images: Sequence[Image.Image], nms: float = 1.0, one_class: bool = False) -> list[Detections]:
        """Detections of any score; images that are resized to equal sizes run together."""
        if self.run is None:
            raise ConfigError("this detector is not trained yet; call train, or use Detector.from_checkpoint")
        groups: dict[tuple[int, int], list[int]] = defaultdict(list)
        for i, image in enumerate(images):
            groups[self.input_size(image)].append(i)
        found: dict[int, Detections] = {}
        for size, members in groups.items():
            batch = torch.stack([F.resize(F.pil_to_tensor(images[i]), list(size)) for i in members])
            sizes = torch.tensor([(images[i].height, images[i].width) for i in members])
            outputs = [output.cpu() for output in self.run(batch, sizes)]
            self._check(outputs, len(batch))
            for i, *values in zip(members, *outputs, strict=True):
                scores, labels, boxes, queries = select_detections(values, nms, one_class)
                clipped = clip_boxes_to_image(boxes.float(), (images[i].height, images[i].width))
                found[i] = Detections(images[i], clipped, scores, labels, queries, self.categories)
        return [found[i] for i in range(len(images))]

    def _check(self, outputs: Sequence[Tensor], batch: int) -> None:
        """Raises CheckpointError unless these are detections of `batch` images."""
        shape = (batch, *outputs[0].shape[1:2]) if outputs else ()
        expected = [shape, shape, (*shape, 4), shape]
        if len(shape) < 2 or [tuple(output.shape) for output in outputs] != expected:
            shapes = ", ".join(str(list(output.shape)) for output in outputs)
            raise CheckpointError(f"{self.path}: gives {shapes}, should give [B, k], [B, k], [B, k, 4] and [B, k]")
        scores, labels, boxes, _ = outputs
        classes, whole = len(self.categories), not labels.is_floating_point() and not labels.is_complex()
        if not whole or (labels.numel() and not 0 <= labels.min() <= labels.max() < classes):
            raise CheckpointError(f"{self.path}: gives labels that are not 0 to {classes - 1}")
        if not (scores.isfinite().all() and boxes.isfinite().all()):
            raise CheckpointError(f"{self.path}: gives numbers that are NaN or infinite")
        if not scores.is_floating_point() or not ((scores >= 0) & (scores <= 1)).all():
            raise CheckpointError(f"{self.path}: gives scores that are not 0 to 1")
        if not boxes.is_floating_point() or not (boxes[..., :2] <= boxes[..., 2:]).all():
            raise CheckpointError(f"{self.path}: gives boxes whose right or bottom edge is before the left or top one")


@torch.inference_mode()
def _run(
    graph: DetectorGraph, device: torch.device, amp: str, path: Path | None, images: Tensor, sizes: Tensor
) -> tuple[Tensor, ...]:
    errors = nullcontext() if path is None else checkpoint_errors(path)
    with errors, amp_context(device, amp):
        return graph(images.to(device), sizes.to(device))


def detect_split(
    model: BaseDETR,
    config: DetectionConfig,
    annotations: Annotations,
    distributed: Distributed,
    loader: Iterable[Batch] | None = None,
    cache: ImageCache | None = None,
    path: Path | None = None,
) -> list[dict[str, Any]]:
    """COCO results of a split as `data.val` says, whole or in tiles; each process detects in a part, and returns all.

    Args:
        model: left in the mode in which it came.
        loader: as val_loader makes it, which is called for None; images that are cut into tiles need none.
        cache: images in memory already.
        path: the checkpoint that errors name.
    """
    val, categories = config.data.val, annotations.categories
    if val.tiles:
        results: list[dict[str, Any]] = []
        with evaluating(model):
            predictor = Predictor.of(model, config, categories, distributed, path)
            for record in annotations.records[distributed.rank :: distributed.world_size]:
                image = load_record(record, None if cache is None else cache.get(record.path))
                found = predictor.predict(F.to_pil_image(image), 0.0, config.train.eval_batch_size)
                results += found.to_coco(record.id)
    else:
        loader = val_loader(annotations, config, distributed, cache) if loader is None else loader
        device, amp = distributed.device, config.train.amp
        results = detect(model, loader, categories, device, amp, val.top_k, val.nms, val.one_class)
    return [result for part in gather(results) for result in part]
