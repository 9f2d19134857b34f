"""Times transformers' Deformable DETR before and after `dat.ops.compat.switch`.

    python -m benchmarks.deformable_detr [--out benchmarks/results/deformable_detr_cpu.json]

The model is that of the paper: ResNet-50, four levels, six encoder and six decoder layers, 300 queries. Weights are
random, with offsets and attention spread as in trained models.
"""

import argparse
import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DeformableDetrConfig, DeformableDetrForObjectDetection

from benchmarks import timing
from benchmarks.timing import medians, write_json
from dat.ops import compat

SIZES = ((480, 640), (800, 1066))


def build(device: torch.device) -> nn.Module:
    torch.manual_seed(0)
    model = DeformableDetrForObjectDetection(DeformableDetrConfig()).eval().to(device)
    for name, module in model.named_modules():
        if name.endswith("sampling_offsets"):
            nn.init.normal_(module.weight, std=3 * module.in_features**-0.5)
        if name.endswith("attention_weights"):
            nn.init.normal_(module.weight, std=module.in_features**-0.5)
    return model


def forward_of(model: nn.Module, images: Tensor) -> Any:
    def run() -> Any:
        with torch.inference_mode():
            return model(images)

    return run


def difference(ours: Any, theirs: Any) -> float:
    """Largest difference of logits or boxes, relative to the largest logit or box."""
    pairs = ((ours.logits, theirs.logits), (ours.pred_boxes, theirs.pred_boxes))
    return max(((a - b).abs().max() / b.abs().max()).item() for a, b in pairs)


def measure(models: dict[str, nn.Module], size: tuple[int, int], batch: int, device: torch.device) -> dict[str, Any]:
    """Milliseconds of a forward pass of each model, and how far apart their outputs are."""
    torch.manual_seed(0)
    images = torch.randn(batch, 3, *size, device=device)
    runs = {name: forward_of(model, images) for name, model in models.items()}
    outputs = {name: run() for name, run in runs.items()}
    seconds = medians(runs, device)
    return {
        "size": f"{size[0]}x{size[1]}",
        "batch": batch,
        "device": device.type,
        **{f"{name}_ms": round(value * 1e3, 1) for name, value in seconds.items()},
        "speedup": round(seconds["transformers"] / seconds["switched"], 2),
        "relative_difference": difference(outputs["switched"], outputs["transformers"]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="where to write the rows as JSON, with the machine's description")
    parser.add_argument("--device", type=timing.device, default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batch", type=int, default=1)
    args = parser.parse_args()
    model = build(args.device)
    models = {"transformers": model, "switched": copy.deepcopy(model)}
    compat.switch(models["switched"])
    rows = []
    for size in SIZES:
        row = measure(models, size, args.batch, args.device)
        rows.append(row)
        print(
            f"{row['size']:>9} transformers {row['transformers_ms']:8.1f} ms  switched {row['switched_ms']:8.1f} ms  "
            f"{row['speedup']:5.2f}x  difference {row['relative_difference']:.1e}"
        )
    if args.out:
        write_json(args.out, rows)


if __name__ == "__main__":
    main()
