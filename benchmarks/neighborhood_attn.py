"""Times `neighborhood_attn` beside unfolded windows and dense attention with a mask.

    python -m benchmarks.neighborhood_attn [--out benchmarks/results/neighborhood_attn_cpu.json]

The work is DAT++'s: windows of 7 x 7, heads of 32 channels, the maps of a 224 image's stages and a detection map.
NATTEN, which the official code is built on, dropped the position bias in 0.20.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.timing import medians, write_json
from dat.ops import neighborhood_attn
from dat.ops.reference import neighbors

KERNEL, CHANNELS = 7, 32
# Batch, heads, height and width; dense attention to the last would take 24 GB.
WORK = ((8, 2, 56, 56), (8, 4, 28, 28), (8, 8, 16, 16), (8, 8, 14, 14), (1, 2, 200, 272))
DENSE_CELLS = 56 * 56


def unfolded(query: Tensor, key: Tensor, value: Tensor, bias: Tensor, size: tuple[int, int], scale: float) -> Tensor:
    """Every window in memory: the windows inside the map, repeated for the cells near its border."""
    rows, columns = (torch.arange(length).sub(KERNEL // 2).clamp(0, length - KERNEL) for length in size)

    def windows(x: Tensor) -> Tensor:
        inside = x.unflatten(2, size).unfold(2, KERNEL, 1).unfold(3, KERNEL, 1)
        return inside[:, :, rows][:, :, :, columns].flatten(2, 3).flatten(-2)

    _, displacement = neighbors(size, KERNEL, 1, query.device)
    scores = (query.unsqueeze(-2) @ windows(key)).squeeze(-2) * scale + bias.flatten(1)[:, displacement]
    return (windows(value) @ scores.softmax(-1).unsqueeze(-1)).squeeze(-1)


def dense(query: Tensor, key: Tensor, value: Tensor, bias: Tensor, size: tuple[int, int], scale: float) -> Tensor:
    """Attention to every cell of the map, with a bias of minus infinity for those that are no neighbours."""
    cell, displacement = neighbors(size, KERNEL, 1, query.device)
    mask = bias.new_full((bias.shape[0], len(cell), len(cell)), -torch.inf)
    mask = mask.scatter(2, cell.expand(bias.shape[0], -1, -1), bias.flatten(1)[:, displacement])
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask.to(query.dtype), scale=scale)


def ours(query: Tensor, key: Tensor, value: Tensor, bias: Tensor, size: tuple[int, int], scale: float) -> Tensor:
    return neighborhood_attn(query, key, value, bias, size=size, kernel_size=KERNEL, scale=scale)


def work(batch: int, heads: int, size: tuple[int, int], device: torch.device) -> list[Tensor]:
    """Query, key and value as a layer's projection leaves them, and the bias."""
    qkv = torch.randn(batch, size[0] * size[1], 3, heads, CHANNELS, device=device)
    bias = torch.randn(heads, 2 * KERNEL - 1, 2 * KERNEL - 1, device=device)
    return [*qkv.permute(2, 0, 3, 1, 4).unbind(0), bias]


def forward_of(function: Any, tensors: list[Tensor], size: tuple[int, int]) -> Any:
    def run() -> None:
        with torch.no_grad():
            function(*tensors, size, CHANNELS**-0.5)

    return run


def backward_of(function: Any, tensors: list[Tensor], size: tuple[int, int]) -> Any:
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    grad = torch.randn(tensors[0].shape, device=tensors[0].device, dtype=tensors[0].dtype)

    def run() -> None:
        torch.autograd.grad(function(*leaves, size, CHANNELS**-0.5), leaves, grad)

    return run


def measure(shape: tuple[int, int, int, int], device: torch.device) -> dict[str, Any]:
    """Milliseconds and ratios of one shape, and the error of each against float64."""
    torch.manual_seed(0)
    batch, heads, *size = shape
    tensors = work(batch, heads, (size[0], size[1]), device)
    half = [*(tensor.bfloat16() for tensor in tensors[:3]), tensors[3]]
    peers = {"unfold": unfolded, **({"dense": dense} if size[0] * size[1] <= DENSE_CELLS else {})}
    row: dict[str, Any] = {"shape": list(shape), "kernel_size": KERNEL, "channels": CHANNELS, "device": device.type}
    for name, make in (("forward", forward_of), ("forward+backward", backward_of)):
        runs = {key: make(function, tensors, tuple(size)) for key, function in {"ours": ours, **peers}.items()}
        seconds = medians({**runs, "ours_bfloat16": make(ours, half, tuple(size))}, device, repeats=5, budget=6.0)
        row[name] = {f"{key}_ms": round(value * 1e3, 3) for key, value in seconds.items()}
        row[name] |= {f"over_{key}": round(seconds[key] / seconds["ours"], 2) for key in peers}
    exact = ours(*(tensor.double() for tensor in tensors), tuple(size), CHANNELS**-0.5)
    for key, function in {"ours": ours, **peers}.items():
        row[f"{key}_error"] = (function(*tensors, tuple(size), CHANNELS**-0.5) - exact).abs().max().item()
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="where to write the rows as JSON, with the machine's description")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    rows = []
    for shape in WORK:
        row = measure(shape, torch.device(args.device))
        rows.append(row)
        for name in ("forward", "forward+backward"):
            figures = "  ".join(f"{key} {value:g}" for key, value in row[name].items())
            print(f"{shape!s:>18} {name:<17} {figures}", flush=True)
    if args.out:
        write_json(args.out, rows)


if __name__ == "__main__":
    main()
