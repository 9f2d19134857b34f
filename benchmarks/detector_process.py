"""One detector in a process of its own, which `benchmarks.detection` starts and sends questions to."""

import json
import sys
from collections.abc import Callable
from typing import Any

import fvcore.nn
import torch
import transformers
from torch import Tensor, nn

from benchmarks.process import Measured, serve
from dat.detection.config import DetectionConfig
from dat.detection.criterion import build_criterion
from dat.detection.models import build_model
from dat.engine.config import load_config
from dat.ops.flops import fvcore_handles

CLASSES = 91
OBJECTS = 10


class MeasuredDetector(Measured):
    """A detector, images without padding and objects in them.

    Args:
        spec: "implementation" (a configuration's path, or the name of a class of transformers), "options" (of
            transformers' configuration), "batch", "size" (height, width), "device" and "threads".
    """

    def __init__(self, spec: dict[str, Any]) -> None:
        torch.manual_seed(0)
        device, name = spec["device"], spec["implementation"]
        images = torch.randn(spec["batch"], 3, *spec["size"]).to(device)
        labels = [torch.randint(CLASSES, (OBJECTS,)).to(device) for _ in images]
        boxes = [
            torch.cat((torch.rand(OBJECTS, 2) / 2 + 0.25, torch.rand(OBJECTS, 2) / 2), 1).to(device) for _ in images
        ]
        model = (
            Ours(name, labels, boxes) if name.endswith(".yaml") else Transformers(name, spec["options"], labels, boxes)
        )
        super().__init__(model.to(device), [images], lambda loss: loss, spec["threads"])

    def answers(self) -> dict[str, Callable[..., Any]]:
        return {**super().answers(), "complexity": self.complexity}

    def complexity(self) -> dict[str, float]:
        """Millions of parameters, and billions of multiply-adds for one image by fvcore."""
        self.model.eval()
        analysis = fvcore.nn.FlopCountAnalysis(self.model, self.inputs[0][:1]).set_op_handle(**fvcore_handles())
        analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False).tracer_warnings("none")
        with torch.no_grad():
            flops = analysis.total()
        parameters = sum(p.numel() for p in self.model.parameters())
        return {"parameters_m": round(parameters / 1e6, 2), "gflops": round(flops / 1e9, 1)}


class Ours(nn.Module):
    """The model of a configuration, with random weights: boxes, or in training its loss."""

    def __init__(self, path: str, labels: list[Tensor], boxes: list[Tensor]) -> None:
        super().__init__()
        config = load_config(DetectionConfig, path)
        self.detector = build_model(config.model, CLASSES, weights=False)
        self.criterion = build_criterion(self.detector, config.train.loss)
        self.targets = [{"labels": a, "boxes": b} for a, b in zip(labels, boxes, strict=True)]

    def forward(self, images: Tensor) -> Tensor:
        outputs = self.detector(images, None, self.targets)
        return self.criterion.total(self.criterion(outputs, self.targets)) if self.training else outputs["pred_boxes"]


class Transformers(nn.Module):
    """A model of transformers, with random weights: boxes, or in training the loss that it computes itself."""

    def __init__(self, name: str, options: dict[str, Any], labels: list[Tensor], boxes: list[Tensor]) -> None:
        super().__init__()
        kind = getattr(transformers, name)
        self.detector = kind(kind.config_class(**options, auxiliary_loss=True, num_labels=CLASSES))
        self.labels = [{"class_labels": a, "boxes": b} for a, b in zip(labels, boxes, strict=True)]

    def forward(self, images: Tensor) -> Tensor:
        if self.training:
            return self.detector(images, labels=self.labels).loss
        return self.detector(images).pred_boxes


if __name__ == "__main__":
    serve(MeasuredDetector(json.loads(sys.argv[1])).answers())
