"""The objects found in an image."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dat.detection.data import Category
from dat.detection.draw import draw_boxes
from dat.detection.evaluation import to_results
from dat.utils.errors import ConfigError


@dataclass(frozen=True)
class Detections:
    """The objects found in one image, by decreasing score; all tensors are on the CPU.

    Attributes:
        image: RGB.
        boxes: [n, 4], (x0, y0, x1, y1) in pixels of the image, clipped to it.
        scores: [n], 0 to 1.
        labels: [n], indices into `categories`.
        queries: [n], the decoder's query that gave each detection.
        categories: classes of the detector, with their ids in the training data.
    """

    image: Image.Image
    boxes: Tensor
    scores: Tensor
    labels: Tensor
    queries: Tensor
    categories: tuple[Category, ...]

    def __len__(self) -> int:
        return len(self.scores)

    @property
    def class_names(self) -> list[str]:
        """The name of each detection's class."""
        return [self.categories[label].name for label in self.labels.tolist()]

    def select(self, index: Tensor | Sequence[int]) -> "Detections":
        """Some of the detections, by a mask [n] or by their indices."""
        index = index if isinstance(index, Tensor) else torch.tensor(index, dtype=torch.long)
        chosen = {name: getattr(self, name)[index] for name in ("boxes", "scores", "labels", "queries")}
        return replace(self, **chosen)

    def draw(self) -> Image.Image:
        """The image with boxes, class names and scores; small images are enlarged."""
        return draw_boxes(self.image, self.to_coco(), self.categories)

    def to_coco(self, image_id: int = 0) -> list[dict[str, Any]]:
        """COCO results: image_id, category_id (of the training data), bbox (x, y, width, height) and score."""
        found = {"boxes": self.boxes, "scores": self.scores, "labels": self.labels}
        return to_results(image_id, (self.image.height, self.image.width), found, self.categories)

    def to_supervision(self) -> Any:
        """The same as `supervision.Detections`. Raises ConfigError if the package supervision is not installed."""
        try:
            import supervision
        except ImportError as error:
            raise ConfigError('this needs the package supervision: pip install "dat-vision[supervision]"') from error
        return supervision.Detections(
            xyxy=self.boxes.numpy(),
            confidence=self.scores.numpy(),
            class_id=self.labels.numpy(),
            data={"class_name": np.array(self.class_names, dtype=str)},
        )
