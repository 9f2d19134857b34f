"""A classifier from pixels to labels: what is exported, and what predicts."""

from torch import Tensor, nn

from dat.classification.config import DataConfig
from dat.export.normalize import Normalize

# as many labels as predictions tell
TOP = 5


class ClassifierGraph(nn.Module):
    """Normalisation, the model (images to logits, in evaluation mode), and the most probable classes."""

    def __init__(self, model: nn.Module, data: DataConfig, num_classes: int) -> None:
        super().__init__()
        self.model, self.top = model, min(TOP, num_classes)
        self.normalize = Normalize(data.mean, data.std)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Images [B, 3, H, W], uint8, RGB, to logits [B, K], the highest probabilities [B, k] and their labels."""
        logits = self.model(self.normalize(images)).float()
        scores, labels = logits.softmax(1).topk(self.top)
        return logits, scores, labels
