"""Labels pictures of any size, with a checkpoint or with what `classification.export` made of one."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from dat.classification.config import ClassificationConfig, DataConfig, check_config
from dat.classification.data import make_transform
from dat.classification.graph import ClassifierGraph
from dat.classification.model import Classifier, load_classifier
from dat.engine.checkpoint import checkpoint_errors
from dat.engine.config import from_dict
from dat.export.runtime import check_found, is_exported, load_exported
from dat.utils.errors import CheckpointError, ConfigError

# images uint8 [B, 3, H, W] to logits, scores and labels, see ClassifierGraph
Run = Callable[[Tensor], tuple[Tensor, ...]]


@dataclass(frozen=True)
class Labeller:
    """What labels: `labeller(pictures)`.

    Attributes:
        class_names: label i is the i-th.
        data: how pictures are resized and cropped.
        run: see Run.
    """

    class_names: list[str]
    data: DataConfig
    run: Run

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


def labeller_of(classifier: Classifier, device: torch.device, path: Path | str = "the model") -> Labeller:
    """One that runs a classifier on the device that it is on; `path`: of its checkpoint, for messages."""
    data = classifier.config.data
    graph = ClassifierGraph(classifier.model, data, len(classifier.class_names)).to(device).eval()

    @torch.inference_mode()
    def run(images: Tensor) -> tuple[Tensor, ...]:
        with checkpoint_errors(path):
            return graph(images.to(device))

    names = list(classifier.class_names)
    return Labeller(names, data, _checked(run, len(names), path))


def load_labeller(path: Path, overrides: Sequence[str], device: torch.device, trust: bool = False) -> Labeller:
    """A labeller from a checkpoint, or from an exported .onnx or .pt2, which runs on the CPU.

    Raises:
        CheckpointError, ConfigError: not such a file, or overrides of an exported one; see load_classifier and
            load_exported.
    """
    if not is_exported(path):
        return labeller_of(load_classifier(path, overrides, device), device, path)
    if overrides:
        raise ConfigError(f"{overrides[0]}: an exported model has its configuration inside, no override can change it")
    exported = load_exported(path, "classification", trust)
    names = ("img_size", "crop_pct", "crop_mode", "interpolation")
    stored = {name: exported.metadata.get(name) for name in names}
    with checkpoint_errors(path):
        config = from_dict(ClassificationConfig, {"data": stored}, str(path))
        check_config(config)
    class_names = exported.metadata["class_names"]
    return Labeller(class_names, config.data, _checked(exported.run, len(class_names), path))


def _checked(run: Run, classes: int, path: Path | str) -> Run:
    """`run`, whose results are known to be labels. It raises CheckpointError for others."""

    def checked(images: Tensor) -> tuple[Tensor, ...]:
        found = run(images)
        shapes = [list(output.shape) for output in found]
        rows = all(len(shape) == 2 and shape[0] == len(images) and shape[1] for shape in shapes)
        if len(found) != 3 or shapes[1] != shapes[2] or not rows:
            raise CheckpointError(f"{path}: gives {shapes}, should give [B, K], [B, k] and [B, k]")
        _, scores, labels = found
        check_found(labels, classes, (scores,), path)
        return found

    return checked
