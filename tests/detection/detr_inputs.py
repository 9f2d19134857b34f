"""Inputs shared by the tests of detection."""

import json
from pathlib import Path
from types import SimpleNamespace

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from dat.detection import HungarianMatcher, SetCriterion, official
from dat.detection.criterion import CLASS_WEIGHTS

# Arguments of small detectors.
SMALL = {
    "embed_dim": 32,
    "num_heads": 4,
    "encoder_depth": 1,
    "decoder_depth": 2,
    "mlp_dim": 48,
    "num_queries": 9,
    "drop_rate": 0.0,
}


class FixedFeatures(nn.Module):
    """Stands for a timm model made with features_only=True: returns the maps that it was given."""

    def __init__(self, maps: list[Tensor]):
        super().__init__()
        self.maps = maps
        channels = [x.shape[1] for x in maps]
        self.feature_info = SimpleNamespace(channels=lambda: channels, reduction=lambda: [8, 16, 32][: len(maps)])

    def forward(self, images: Tensor) -> list[Tensor]:
        return [x.to(images.dtype) for x in self.maps]


def scatter(shape: tuple[int, ...], seed: int) -> Tensor:
    """Numbers in -1..1 that look random and depend on no generator: the same on every machine and version."""
    index = torch.arange(torch.Size(shape).numel(), dtype=torch.float64)
    return (((index * 12.9898 + seed * 78.233).sin() * 43758.5453).frac()).reshape(shape)


def fill(model: nn.Module) -> None:
    """Sets every parameter by formula, at a scale at which signals neither vanish nor explode."""
    with torch.no_grad():
        for seed, (name, parameter) in enumerate(sorted(model.named_parameters())):
            values = scatter(tuple(parameter.shape), seed)
            if parameter.dim() > 1:
                values *= (3 / parameter[0].numel()) ** 0.5
            elif "norm" in name and name.endswith("weight"):
                values = 1 + 0.2 * values
            else:
                values *= 0.5
            parameter.copy_(values)


def formula_inputs() -> tuple[list[Tensor], Tensor, list[dict[str, Tensor]]]:
    """Maps, mask [2, 96, 128] and targets (of 7 classes) of the fixtures that hold no inputs."""
    sizes = [(16, 12, 16), (32, 6, 8), (48, 3, 4)]
    maps = [scatter((2, *size), 100 + i) for i, size in enumerate(sizes)]
    mask = torch.zeros(2, 96, 128, dtype=torch.bool)
    mask[0, 80:] = True
    mask[0, :, 96:] = True
    targets = []
    for i, count in enumerate((4, 2)):
        numbers = scatter((count, 4), 200 + i).abs()
        boxes = torch.cat((0.25 + 0.5 * numbers[:, :2], 0.05 + 0.3 * numbers[:, 2:]), 1)
        targets.append({"labels": torch.arange(count) * 3 % 7, "boxes": boxes})
    return maps, mask, targets


def load_fixture(name: str) -> tuple[dict[str, Tensor], dict]:
    """Tensors of tests/data/NAME.safetensors and the official configuration that its metadata holds, if any."""
    path = Path(__file__).parents[1] / "data" / f"{name}.safetensors"
    with safe_open(path, "pt") as file:
        metadata = file.metadata() or {}
    return load_file(path), json.loads(metadata.get("config", "{}"))


def part(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def fixture_targets(tensors: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    return [part(tensors, f"target.{i}.") for i in range(2)]


def relative_error(ours: Tensor, theirs: Tensor) -> float:
    """Largest difference relative to the largest entry."""
    assert ours.shape == theirs.shape
    return ((ours.detach() - theirs).abs().max() / theirs.abs().max().clamp(min=1e-12)).item()


def run(model: nn.Module, mask: Tensor, targets: list[dict[str, Tensor]]) -> tuple[dict, dict[str, Tensor], Tensor]:
    """Outputs, losses and their total in float64, in training."""
    outputs = model.double().train()(torch.zeros(2, 3, *mask.shape[1:]), mask)
    matcher = HungarianMatcher(cost_class=CLASS_WEIGHTS[model.scores], scores=model.scores)
    criterion = SetCriterion(model.num_classes, matcher, model.scores)
    losses = criterion(outputs, targets)
    return outputs, losses, criterion.total(losses)


def check_parity(
    outputs: dict,
    losses: dict[str, Tensor],
    total: Tensor,
    model: nn.Module,
    theirs: dict[str, Tensor],
    tolerance: float,
) -> None:
    """Outputs, losses and gradients are those of a fixture made by the official code."""
    for key in ("pred_logits", "pred_boxes"):
        assert relative_error(outputs[key], theirs[key]) < tolerance, key
        assert relative_error(outputs["aux_outputs"][0][key], theirs[f"aux.0.{key}"]) < tolerance, key
        if "enc_outputs" in outputs:
            assert relative_error(outputs["enc_outputs"][key], theirs[f"enc.{key}"]) < tolerance, key
    for name, loss in losses.items():
        assert relative_error(loss.reshape(1), theirs[f"loss.{name}"]) < tolerance, name
    assert relative_error(total.reshape(1), theirs["total_loss"]) < tolerance
    total.backward()
    ours = {name: p.grad for name, p in model.named_parameters()}
    gradients = official.convert(part(theirs, "grad."), model)
    assert len(gradients) >= 13
    for name, gradient in gradients.items():
        assert relative_error(ours[name], gradient) < tolerance, name
