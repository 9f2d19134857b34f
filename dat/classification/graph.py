"""A classifier with its pre- and post-processing, from pixels to labels: it predicts and is exported."""

from torch import Tensor, nn

from dat.classification.config import DataConfig
from dat.export.graph import Normalize

# Number of classes in the output, the most probable ones.
TOP = 5


class ClassifierGraph(nn.Module):
    """Normalisation, the model (images to logits, in evaluation mode), and the most probable classes."""

    def __init__(self, model: nn.Module, data: DataConfig, num_classes: int) -> None:
        super().__init__()
        self.model, self.top = model, min(TOP, num_classes)
        self.normalize = Normalize(data.mean, data.std)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Images [B, 3, H, W] uint8, RGB, to logits [B, K], highest probabilities [B, k] and their labels [B, k]."""
        logits = self.model(self.normalize(images)).float()
        scores, labels = logits.softmax(1).topk(self.top)
        return logits, scores, labels
