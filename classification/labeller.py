"""Labels pictures of any size, with a checkpoint or with what `classification.export` made of one."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from classification.config import ClassificationConfig, DataConfig
from classification.data import make_transform
from classification.graph import ClassifierGraph
from classification.model import Classifier, load_classifier
from dat.deploy.runtime import is_exported, load_exported
from dat.training.config import from_dict
from dat.training.errors import CheckpointError, ConfigError


@dataclass(frozen=True)
class Labeller:
    """What labels: `labeller(pictures)`.

    Attributes:
        class_names: label i is the i-th.
        data: how pictures are resized and cropped.
        run: images uint8 [B, 3, H, W] to logits, scores and labels, see ClassifierGraph.
    """

    class_names: list[str]
    data: DataConfig
    run: Callable[[Tensor], tuple[Tensor, ...]]

    def __call__(self, pictures: Sequence[Image.Image]) -> list[dict[str, Any]]:
        """One {"label", "score", "top": [{"label", "score"}, up to 5]} per RGB picture; scores are 0 to 1."""
        transform = make_transform(self.data, training=False, normalize=False)
        _, scores, labels = self.run(torch.stack([transform(picture) for picture in pictures]))
        results = []
        for row, classes in zip(scores.tolist(), labels.tolist(), strict=True):
            names = [self.class_names[k] for k in classes]
            top = [{"label": label, "score": round(score, 6)} for label, score in zip(names, row, strict=True)]
            results.append({**top[0], "top": top})
        return results


def labeller_of(classifier: Classifier, device: torch.device) -> Labeller:
    """One that runs a classifier on the device that it is on."""
    data = classifier.config.data
    graph = ClassifierGraph(classifier.model, data, len(classifier.class_names)).to(device).eval()

    @torch.inference_mode()
    def run(images: Tensor) -> tuple[Tensor, ...]:
        return graph(images.to(device))

    return Labeller(list(classifier.class_names), data, run)


def load_labeller(path: Path, overrides: Sequence[str], device: torch.device, trust: bool = False) -> Labeller:
    """A labeller from a checkpoint, or from an exported .onnx or .pt2, which runs on the CPU.

    Raises:
        CheckpointError, ConfigError: not such a file, or overrides of an exported one; see load_classifier and
            load_exported.
    """
    if not is_exported(path):
        return labeller_of(load_classifier(path, overrides, device), device)
    if overrides:
        raise ConfigError(f"{overrides[0]}: an exported model has its configuration inside, no override can change it")
    exported = load_exported(path, "classification", trust)
    names = ("img_size", "crop_pct", "crop_mode", "interpolation")
    stored = {name: exported.metadata.get(name) for name in names}
    try:
        data = from_dict(ClassificationConfig, {"data": stored}, str(path)).data
    except ConfigError as error:
        raise CheckpointError(f"{path}: unfit metadata: {error}") from error
    return Labeller(exported.metadata["class_names"], data, exported.run)
