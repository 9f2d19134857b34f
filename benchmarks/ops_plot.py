"""The bar chart of `benchmarks.ops`: speed-ups of the ops over the usual implementations."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

Row = dict[str, Any]

# Bars are relative to the first of these that was measured on a workload.
BASELINES = ("original CUDA op", "grid_sample", "torchvision")
TITLES = {"attention": "", "dat": "", "dcn": "deformable convolution, "}
PASSES = (("forward", "forward", "#4477aa"), ("forward_backward", "forward + backward", "#cc6677"))


def draw(rows: Sequence[Row], machine: dict[str, Any], path: Path) -> None:
    """Draws the float32 rows of `rows`, measured on `machine`, to `path`, whose suffix gives the format.

    Raises:
        ValueError: no workload was measured beside a baseline.
    """
    bars = _bars(rows)
    if not bars:
        raise ValueError("nothing to plot: no float32 row of a peer that bars could be relative to")
    with matplotlib.rc_context({"font.size": 9}):
        figure = Figure(figsize=(8, 1.4 + 0.42 * len(bars)), layout="constrained")
        axes = figure.add_subplot()
        for i, (name, label, colour) in enumerate(PASSES):
            heights = [bar[name] for bar in bars]
            places = [y + 0.4 * (i - 0.5) for y in range(len(bars))]
            drawn = axes.barh(places, heights, 0.38, label=label, color=colour)
            axes.bar_label(drawn, [f"{h:.1f}x" for h in heights], padding=3)
        axes.set_yticks(range(len(bars)), [f"{bar['label']}\nover {bar['baseline']}" for bar in bars])
        axes.invert_yaxis()
        axes.axvline(1, color="grey", linewidth=0.8, linestyle=":", zorder=0)
        axes.set_xlim(0, 1.12 * max(bar[name] for bar in bars for name, _, _ in PASSES))
        axes.set_xlabel("times as fast (float32)")
        where = machine["gpu"] or f"{machine['cpu']}, {machine['threads']} threads, {machine['cpu_capability']}"
        figure.suptitle(f"dat.ops on {where}, torch {machine['torch']}", fontsize=9)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(loc="lower right", frameon=False)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=150)


def _bars(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """The float32 ratios of each workload to its baseline; of attention the whole, not its sampling again."""
    bars = {}
    for row in rows:
        if row["op"] not in TITLES or row["section"] == "compiled":
            continue
        if row.get("dtype") == "float32" and row["implementation"] in BASELINES:
            rank = BASELINES.index(row["implementation"])
            key = (row["op"], row["work"], row["batch"])
            if key not in bars or rank < bars[key]["rank"]:
                bars[key] = {
                    "rank": rank,
                    "baseline": row["implementation"],
                    "label": f"{TITLES[row['op']]}{row['work']}, batch {row['batch']}",
                    **{name: row[f"{name}_ours"] for name, _, _ in PASSES},
                }
    return list(bars.values())
