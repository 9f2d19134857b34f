"""A detector with its pre- and post-processing, from pixels to boxes in pixels: it predicts and is exported."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dat.detection.config import DataConfig
from dat.detection.models.base import BaseDETR, pad_to_multiple
from dat.detection.post_process import best_detections
from dat.export.graph import Normalize


class DetectorGraph(nn.Module):
    """Normalisation, the padding of the data loader, the model, and the selection of detections.

    Args:
        model: in evaluation mode.
        data: mean, std and pad_multiple.
        top_k: most detections of an image.
    """

    def __init__(self, model: BaseDETR, data: DataConfig, top_k: int) -> None:
        super().__init__()
        self.model, self.pad_multiple, self.top_k = model, data.pad_multiple, top_k
        self.normalize = Normalize(data.mean, data.std)

    def forward(self, images: Tensor, sizes: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Detects objects.

        Args:
            images: [B, 3, H, W] uint8, RGB.
            sizes: [B, 2] int64, the (height, width) of the images that boxes refer to; 0: those of `images`.

        Returns:
            scores, labels, boxes and queries, as best_detections gives them.
        """
        height, width = images.shape[-2:]
        x, mask = pad_to_multiple(self.normalize(images), None, self.pad_multiple)
        rows = torch.arange(2, device=sizes.device)
        inside = (1 - rows) * height + rows * width
        return self._detect(x, mask, inside, sizes)

    def _detect(
        self, x: Tensor, mask: Tensor | None, inside: Tensor, sizes: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Detections in the padded images `x`, whose size without padding is `inside` [B or 1, 2]."""
        return best_detections(
            self.model(x, mask), torch.where(sizes > 0, sizes, inside), self.model.scores, self.top_k
        )


class PaddedDetectorGraph(DetectorGraph):
    """A DetectorGraph whose images are padded already, so that their sides are multiples of a number."""

    def forward(  # type: ignore[override]
        self, images: Tensor, sizes: Tensor, inside: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Detects objects.

        Args:
            images: [B, 3, H, W] uint8, RGB, padded at the right and below, as pad_images does.
            sizes: as for DetectorGraph.
            inside: [B, 2] int64, the (height, width) without padding.
        """
        below, right = (
            torch.arange(side, device=images.device) >= inside[:, axis, None]
            for axis, side in enumerate(images.shape[-2:])
        )
        mask = below[:, :, None] | right[:, None]
        return self._detect(self.normalize(images).masked_fill(mask[:, None], 0), mask, inside, sizes)


def pad_images(images: Tensor, sizes: Tensor, multiple: int) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs of a PaddedDetectorGraph from those of a DetectorGraph; `multiple`: of the padded sides."""
    height, width = images.shape[-2:]
    inside = torch.tensor([[height, width]]).repeat(len(images), 1)
    return F.pad(images, (0, -width % multiple, 0, -height % multiple)), sizes, inside
