"""Times `deform_attn` beside the formulation of DAT's official code, and compares how much memory they take.

    python -m benchmarks.deform_attn [--out benchmarks/results/deform_attn_cpu.json]

The work is that of DAT++'s deformable blocks, with a table made for the map's own size and with the table of 224
pixels, which official detectors look up at any other size.
"""

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.timing import medians, peak_bytes, write_json
from dat.ops import deform_attn


class Work(NamedTuple):
    """A deformable block: batch, heads, groups, query map, key map, and the query map at 224 pixels."""

    B: int
    heads: int
    groups: int
    size: tuple[int, int]
    keys: tuple[int, int]
    side: int


WORKS = {
    "DAT++-T stage 1, 224, B 8": Work(8, 2, 1, (56, 56), (7, 7), 56),
    "DAT++-B stage 2, 384, B 2": Work(2, 8, 4, (48, 48), (12, 12), 28),
    "DAT++-T stage 1, 512x672": Work(1, 2, 1, (128, 168), (16, 21), 56),
    "DAT++-T stage 3, 800x1088": Work(1, 8, 4, (50, 68), (25, 34), 14),
}
LARGEST = {"DAT++-T stage 1, 800x1333": Work(1, 2, 1, (200, 334), (25, 42), 56)}


def official_form(
    query: Tensor, key: Tensor, value: Tensor, positions: Tensor, table: Tensor, *, size: tuple[int, int], scale: float
) -> Tensor:
    """DAT++'s attention as its paper's code computes it: displacements, bias, scores and attention all in memory."""
    H, W = size
    B, h, HW, c = query.shape
    groups, N = positions.shape[1:3]
    q, k, v = (t.flatten(0, 1).transpose(1, 2) for t in (query, key, value))
    attention = torch.einsum("b c m, b c n -> b m n", q, k).mul(scale)
    y, x = torch.meshgrid(torch.arange(H, device=q.device), torch.arange(W, device=q.device), indexing="ij")
    grid = torch.stack((y.float() / (H - 1.0) * 2 - 1, x.float() / (W - 1.0) * 2 - 1), -1).to(positions)
    grid = grid[None].expand(B * groups, -1, -1, -1).reshape(B * groups, HW, 2)
    displacement = (grid[:, :, None] - positions.flip(-1).reshape(B * groups, N, 2)[:, None]).mul(0.5)
    tables = table[None].expand(B, -1, -1, -1).reshape(B * groups, h // groups, *table.shape[1:])
    bias = F.grid_sample(tables, displacement[..., (1, 0)], mode="bilinear", align_corners=True)
    attention = attention + bias.reshape(B * h, HW, N)
    out = torch.einsum("b m n, b c n -> b c m", F.softmax(attention, dim=2), v)
    return out.reshape(B, h, c, HW).transpose(2, 3)


def inputs(
    work: Work, own_table: bool, device: torch.device, channels: int = 32
) -> tuple[list[Tensor], dict[str, Any]]:
    """Tensors and keyword arguments of one call, with keys moved by about a cell of their map."""
    B, heads, groups, (H, W), (Hk, Wk), side = work
    generator = torch.Generator().manual_seed(0)
    y, x = torch.meshgrid(torch.arange(Hk), torch.arange(Wk), indexing="ij")
    centres = torch.stack(((x + 0.5) / max(Wk - 1, 1) * 2 - 1, (y + 0.5) / max(Hk - 1, 1) * 2 - 1), -1).flatten(0, 1)
    positions = centres + torch.randn(B, groups, Hk * Wk, 2, generator=generator) / torch.tensor([Wk, Hk])
    T_h, T_w = (2 * H - 1, 2 * W - 1) if own_table else (2 * side - 1, 2 * side - 1)
    tensors = [torch.randn(B, heads, n, channels, generator=generator) for n in (H * W, Hk * Wk, Hk * Wk)]
    tensors += [positions.clamp(-1, 1), torch.randn(heads, T_h, T_w, generator=generator)]
    return [t.to(device) for t in tensors], {"size": work.size, "scale": channels**-0.5}


def forward(function: Callable[..., Tensor], tensors: list[Tensor], kwargs: dict[str, Any]) -> None:
    with torch.no_grad():
        function(*tensors, **kwargs)


def forward_backward(function: Callable[..., Tensor], tensors: list[Tensor], kwargs: dict[str, Any]) -> None:
    leaves = [t.detach().requires_grad_() for t in tensors]
    function(*leaves, **kwargs).sum().backward()


def measure(name: str, work: Work, own_table: bool, device: torch.device) -> dict[str, Any]:
    """Milliseconds, ratios and the largest difference between the two."""
    tensors, kwargs = inputs(work, own_table, device)
    row: dict[str, Any] = {"work": name, "table": "own" if own_table else "224", "device": device.type}
    for mode, run in (("forward", forward), ("forward+backward", forward_backward)):
        runs = {key: partial(run, function, tensors, kwargs) for key, function in FORMS.items()}
        seconds = medians(runs, device, budget=8)
        row[mode] = {f"{key}_ms": round(value * 1e3, 2) for key, value in seconds.items()}
        row[mode]["speedup"] = round(seconds["official"] / seconds["ours"], 2)
    row["difference"] = (deform_attn(*tensors, **kwargs) - official_form(*tensors, **kwargs)).abs().max().item()
    return row


def measure_memory(name: str, work: Work, device: torch.device) -> dict[str, Any]:
    """Megabytes that forward and backward hold at their most, beyond the inputs."""
    tensors, kwargs = inputs(work, False, device)
    row: dict[str, Any] = {"work": name, "device": device.type}
    for mode, run in (("forward", forward), ("forward+backward", forward_backward)):
        peaks = {}
        for key, function in FORMS.items():
            run(function, tensors, kwargs)
            peaks[key] = peak_bytes(partial(run, function, tensors, kwargs), device)
        row[mode] = {f"{key}_mb": round(value / 2**20, 1) for key, value in peaks.items() if value is not None}
    return row


FORMS = {"ours": deform_attn, "official": official_form}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="where to write the rows as JSON, with the machine's description")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--only", default="", help="part of the name of the work to measure")
    args = parser.parse_args()
    device = torch.device(args.device)
    rows = []
    for name, work in WORKS.items():
        for own_table in (True, False) if args.only in name else ():
            rows.append(measure(name, work, own_table, device))
            print(rows[-1], flush=True)
    for name, work in LARGEST.items():
        if args.only in name:
            rows.append(measure_memory(name, work, device))
            print(rows[-1], flush=True)
    if args.out:
        write_json(args.out, rows)


if __name__ == "__main__":
    main()
