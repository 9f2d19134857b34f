"""Times `deform_sample` beside the grid_sample formulation that other libraries run on a CPU.

    python -m benchmarks.ops [--out benchmarks/results/ops_cpu.json]

The work is Deformable DETR's: 8 heads of 32 channels, 4 levels at strides 8 to 64, 4 points; the encoder has a query
for every cell, the decoder 300.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.timing import medians, write_json
from dat.ops import deform_sample

SIZES = {
    "480x640": ((60, 80), (30, 40), (15, 20), (8, 10)),
    "800x1066": ((100, 134), (50, 67), (25, 34), (13, 17)),
}


def grid_sample_form(value: Tensor, shapes: Any, locations: Tensor, weights: Tensor) -> Tensor:
    """Multi-scale sampling as one grid_sample for each level, every sample in memory before the weighted sum."""
    B, _, H, D = value.shape
    Q, P = locations.shape[1], locations.shape[4]
    grids = (2 * locations - 1).permute(0, 2, 3, 1, 4, 5)
    samples = []
    for level, (h, w) in enumerate(shapes):
        start = sum(a * b for a, b in shapes[:level])
        image = value[:, start : start + h * w].permute(0, 2, 3, 1).reshape(B * H, D, h, w)
        grid = grids[:, :, level].reshape(B * H, Q, P, 2)
        samples.append(F.grid_sample(image, grid, mode="bilinear", padding_mode="zeros", align_corners=False))
    attention = weights.permute(0, 2, 1, 3, 4).reshape(B * H, 1, Q, -1)
    out = (torch.stack(samples, -2).flatten(-2) * attention).sum(-1)
    return out.view(B, H, D, Q).permute(0, 3, 1, 2)


def sample_work(
    shapes: Any, queries: int | None, dtype: torch.dtype, device: torch.device, batch: int = 1
) -> list[Tensor]:
    """Values, locations around a grid of reference points as trained models have them, and attention weights."""
    cells = sum(h * w for h, w in shapes)
    if queries is None:
        points = [
            torch.stack(torch.meshgrid((torch.arange(w) + 0.5) / w, (torch.arange(h) + 0.5) / h, indexing="xy"), -1)
            for h, w in shapes
        ]
        reference = torch.cat([p.flatten(0, 1) for p in points])
    else:
        reference = torch.rand(queries, 2)
    sizes = torch.tensor([(w, h) for h, w in shapes], dtype=torch.float32)
    offsets = torch.randn(batch, len(reference), 8, len(shapes), 4, 2) * 3 / sizes[:, None]
    locations = (reference[:, None, None, None] + offsets).to(device)
    weights = (
        torch.randn(*locations.shape[:3], len(shapes) * 4).softmax(-1).view(locations.shape[:-1]).to(device, dtype)
    )
    value = torch.randn(batch, cells, 8, 32).to(device, dtype)
    return [value, locations, weights]


def backward_of(function: Any, tensors: list[Tensor], shapes: Any) -> Any:
    value, locations, weights = (t.detach().requires_grad_() for t in tensors)
    with torch.no_grad():
        grad = torch.randn_like(function(value, shapes, locations, weights))

    def run() -> None:
        torch.autograd.grad(function(value, shapes, locations, weights), (value, locations, weights), grad)

    return run


def forward_of(function: Any, tensors: list[Tensor], shapes: Any) -> Any:
    def run() -> None:
        with torch.no_grad():
            function(tensors[0], shapes, *tensors[1:])

    return run


def measure(size: str, queries: int | None, device: torch.device) -> dict[str, Any]:
    """Milliseconds and ratios of one shape, and the error of each against float64."""
    torch.manual_seed(0)
    shapes = SIZES[size]
    tensors = sample_work(shapes, queries, torch.float32, device)
    half = [tensors[0].bfloat16(), tensors[1], tensors[2].bfloat16()]
    row: dict[str, Any] = {"size": size, "queries": queries or "encoder", "device": device.type}
    for name, make in (("forward", forward_of), ("forward+backward", backward_of)):
        seconds = medians(
            {
                "ours": make(deform_sample, tensors, shapes),
                "ours_bfloat16": make(deform_sample, half, shapes),
                "grid_sample": make(grid_sample_form, tensors, shapes),
            },
            device,
        )
        row[name] = {f"{key}_ms": round(value * 1e3, 3) for key, value in seconds.items()}
        row[name]["speedup"] = round(seconds["grid_sample"] / seconds["ours"], 2)
        row[name]["bfloat16_over_float32"] = round(seconds["ours_bfloat16"] / seconds["ours"], 3)
    exact = grid_sample_form(tensors[0].double(), shapes, tensors[1].double(), tensors[2].double())
    for key, function in (("ours", deform_sample), ("grid_sample", grid_sample_form)):
        row[f"{key}_error"] = (function(tensors[0], shapes, *tensors[1:]) - exact).abs().max().item()
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="where to write the rows as JSON, with the machine's description")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    device = torch.device(args.device)
    rows = []
    for size in SIZES:
        for queries in (None, 300):
            row = measure(size, queries, device)
            rows.append(row)
            for name in ("forward", "forward+backward"):
                timed = row[name]
                print(
                    f"{size:>9} {row['queries']!s:>8} {name:<17} ours {timed['ours_ms']:9.2f} ms  "
                    f"bfloat16 {timed['ours_bfloat16_ms']:9.2f} ms  "
                    f"grid_sample {timed['grid_sample_ms']:9.2f} ms  {timed['speedup']:6.1f}x"
                )
    if args.out:
        write_json(args.out, rows)


if __name__ == "__main__":
    main()
