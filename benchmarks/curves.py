"""AP of detectors over their trainings: means over seeds, the epoch that reached a level, and the plot."""

import itertools
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

Row = dict[str, Any]

METRICS = {"AP": "AP", "APs": "AP of small objects (below 32 x 32 pixels)"}
COLOURS = ("#222222", "#999999", "#4477aa", "#66ccee", "#228833", "#cc6677", "#aa3377", "#ccbb44")


def curve(row: Row, metric: str) -> list[tuple[int, float, float, float]]:
    """(epoch, mean, lowest, highest) over the finished seeds, or over all of them if none is finished.

    Only epochs that all of them evaluated count. A metric that is null, because there are no such objects, counts as 0.
    """
    runs = [run for run in row["runs"] if run["finished"]] or row["runs"]
    found = [dict(zip(run["epoch"], run[metric], strict=True)) for run in runs]
    epochs = sorted(set.intersection(*map(set, found))) if found else []
    points = []
    for epoch in epochs:
        values = [values[epoch] or 0.0 for values in found]
        points.append((epoch, statistics.mean(values), min(values), max(values)))
    return points


def summarise(rows: Sequence[Row], reference: str | None) -> None:
    """Adds to each row the AP of its last epoch, and the first epoch of at least that of the row `reference`."""
    levels = {}
    for row in rows:
        for metric in METRICS:
            points = curve(row, metric)
            if points:
                epoch, *values = points[-1]
                mean, low, high = (round(value, 4) for value in values)
                row[f"last_{metric}"] = {"epoch": epoch, "mean": mean, "lowest": low, "highest": high}
                if row["model"] == reference:
                    levels[metric] = values[0]
    for row in rows:
        for metric, level in levels.items():
            reached = next((epoch for epoch, mean, *_ in curve(row, metric) if mean >= level), None)
            row[f"epochs_to_{metric}_of_{reference}"] = reached


def table(rows: Sequence[Row]) -> str:
    """The rows as text, after `summarise`."""
    lines = []
    for row in rows:
        done = sum(run["finished"] for run in row["runs"])
        text = f"{row['label']:<36} {row['ms_per_step']:6.1f} ms a step, {done} of {len(row['seeds'])} seeds"
        for metric in METRICS:
            if last := row.get(f"last_{metric}"):
                text += f", {metric} {last['mean']:.3f} ({last['lowest']:.3f} to {last['highest']:.3f})"
        reached = [f"{key.removeprefix('epochs_to_')}: epoch {row[key]}" for key in row if key.startswith("epochs_to_")]
        lines.append(", ".join([text, *reached]))
    return "\n".join(lines)


def draw(rows: Sequence[Row], machine: dict[str, Any], path: Path, title: str) -> None:
    """Draws AP and AP of small objects against epochs and against seconds of training steps to `path`.

    Lines are means over seeds; bands reach from the lowest to the highest. Both horizontal axes are logarithmic if some
    rows train for several times as many epochs as others.
    """
    log = max(row["epochs"] for row in rows) > 3 * min(row["epochs"] for row in rows)
    with matplotlib.rc_context({"font.size": 9}):
        figure = Figure(figsize=(10, 7.5), layout="constrained")
        axes = figure.subplots(2, 2, sharex="col", sharey="row")
        for row, colour in zip(rows, itertools.cycle(COLOURS), strict=False):
            done = sum(run["finished"] for run in row["runs"])
            label = f"{row['label']} ({done} of {len(row['seeds'])} seeds)"
            seconds = row["steps_per_epoch"] * row["ms_per_step"] / 1e3
            for line, metric in zip(axes, METRICS, strict=True):
                points = curve(row, metric)
                if not points:
                    continue
                epochs, means, lows, highs = zip(*points, strict=True)
                for place, scale in zip(line, (1.0, seconds), strict=True):
                    x = [epoch * scale for epoch in epochs]
                    place.plot(x, means, color=colour, marker=".", label=label)
                    place.fill_between(x, lows, highs, color=colour, alpha=0.15, linewidth=0)
        for line, name in zip(axes, METRICS.values(), strict=True):
            line[0].set_ylabel(name)
        for place in axes.flat:
            place.set_ylim(bottom=0)
            place.grid(alpha=0.3)
            place.spines[["top", "right"]].set_visible(False)
            if log:
                place.set_xscale("log")
        axes[1][0].set_xlabel("epochs")
        where = machine["gpu"] or f"CPU ({machine['cpu']}, {machine['threads']} thread(s))"
        axes[1][1].set_xlabel(f"seconds of training steps, {where}")
        figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False)
        figure.suptitle(title, fontsize=10)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=120)
