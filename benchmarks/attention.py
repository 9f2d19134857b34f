"""Measures `deform_attn` and `neighborhood_attn` beside other ways to compute DAT's attentions.

    python -m benchmarks.attention [--only TEXT] [--natten PYTHON] [--out FILE.json]

`deform_attn` is compared with the formulation of DAT's official code, in time and memory; `neighborhood_attn` with
unfolded windows, dense attention with a mask and, if asked for, NATTEN 0.14. All in float32, ours in bfloat16 too;
"over" a peer is its time or memory divided by ours in float32.
"""

import argparse
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks import deform_attn, neighborhood_attn, timing
from benchmarks.natten_peer import Natten
from benchmarks.timing import PASSES, medians, peak_bytes, write_json

Row = dict[str, Any]
OPS = {"deform_attn": deform_attn, "neighborhood_attn": neighborhood_attn}
# Seconds to spend on one pass of all implementations of a workload, unless three turns of each take longer.
BUDGET = 8.0


def measure(op: str, name: str, device: torch.device, natten: Natten | None) -> Row:
    """Milliseconds of one workload, forward and with backward, and the largest error of each output against float64.

    `natten` concerns neighborhood_attn.
    """
    module, work = OPS[op], OPS[op].WORKS[name]
    tensors, forms = module.inputs(work, device), module.forms(work)
    exact = forms["ours"](*(t.double() for t in tensors))
    row: Row = {"op": op, "work": name, "device": device.type}
    outputs = {form: function(*tensors) for form, function in forms.items()}
    if natten is not None and module is neighborhood_attn:
        natten.load(tensors, **neighborhood_attn.options(work))
        row["natten_versions"] = natten.versions
        outputs["natten"] = natten.output()
        row["natten_cores"] = round(natten.cores(), 2)
    row["error"] = {form: (output - exact).abs().max().item() for form, output in outputs.items()}
    half = [*(t.bfloat16() for t in tensors[:3]), *tensors[3:]]
    for pass_name, make in PASSES.items():
        runs = {form: make(function, tensors) for form, function in forms.items()}
        runs["ours_bfloat16"] = make(forms["ours"], half)
        elsewhere = {"natten": partial(natten.seconds, pass_name)} if "natten" in outputs else {}
        seconds = medians(runs, device, budget=BUDGET, elsewhere=elsewhere)
        row[pass_name] = compared({form: 1e3 * s for form, s in seconds.items()}, "ms")
    return row


def measure_memory(name: str, device: torch.device) -> Row:
    """Peak memory of deform_attn beyond its inputs, in MB of 2**20 bytes, forward and with backward."""
    work = deform_attn.MEMORY_WORKS[name]
    tensors = deform_attn.inputs(work, device)
    row: Row = {"op": "deform_attn", "work": f"memory, {name}", "device": device.type}
    for pass_name, make in PASSES.items():
        peaks = {}
        for form, function in deform_attn.forms(work).items():
            run = make(function, tensors)
            run()
            peaks[form] = peak_bytes(run, device)
        row[pass_name] = compared({form: peak / 2**20 for form, peak in peaks.items() if peak is not None}, "mb")
    return row


def compared(amounts: dict[str, float], unit: str) -> dict[str, float]:
    """Amounts by name and unit, and the amounts of peers divided by ours."""
    named = {f"{form}_{unit}": round(amount, 4) for form, amount in amounts.items()}
    peers = [form for form in amounts if not form.startswith("ours") and amounts["ours"] > 0]
    return named | {f"over_{form}": round(amounts[form] / amounts["ours"], 2) for form in peers}


def text(row: Row) -> str:
    """A line for each pass and for the errors, below the heading."""
    lines = [f"{row['op']}: {row['work']}"]
    for key in (*PASSES, "error"):
        if key in row:
            figures = "  ".join(f"{name} {figure:.4g}" for name, figure in row[key].items())
            lines.append(f"  {key:<16}  {figures}")
    if "natten_cores" in row:
        lines.append(f"  {'natten_cores':<16}  {row['natten_cores']}")
    return "\n".join(lines)


def works(device: torch.device, natten: Natten | None) -> dict[str, Callable[[], Row]]:
    """Functions that measure a row, by its heading."""
    runs: dict[str, Callable[[], Row]] = {}
    for op, module in OPS.items():
        runs |= {f"{op}: {name}": partial(measure, op, name, device, natten) for name in module.WORKS}
    for name in deform_attn.MEMORY_WORKS:
        runs[f"deform_attn: memory, {name}"] = partial(measure_memory, name, device)
    return runs


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="where to write the rows as JSON, with the machine's description")
    parser.add_argument("--device", type=timing.device, default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--only", default="", help="part of a heading, such as 'neighborhood_attn: 56x56'")
    parser.add_argument("--natten", metavar="PYTHON", help="a Python 3.10 or later that has NATTEN 0.14, for a CPU")
    args = parser.parse_args(argv)
    if args.natten and args.device.type != "cpu":
        parser.error(f"--natten is measured on a CPU only, got --device {args.device}")
    with ExitStack() as stack:
        natten = None
        if args.natten:
            try:
                natten = stack.enter_context(Natten(args.natten, torch.get_num_threads()))
            except (OSError, RuntimeError) as error:
                parser.error(f"--natten: {error}")
        chosen = {name: run for name, run in works(args.device, natten).items() if args.only in name}
        if not chosen:
            parser.error(f"--only must be part of a heading, as of neighborhood_attn: 56x56, got {args.only}")
        rows = []
        for run in chosen.values():
            rows.append(run())
            print(text(rows[-1]), flush=True)
    if args.out:
        write_json(args.out, rows)


if __name__ == "__main__":
    main()
