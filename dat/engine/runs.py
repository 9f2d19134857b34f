"""A table of training runs: how well each did, and what differs in their configurations."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dat.engine.config import IGNORED, flatten, load_config, to_dict
from dat.engine.progress import format_seconds
from dat.engine.report import read_metrics
from dat.utils.errors import ConfigError, DataError
from dat.utils.files import read_jsonl
from dat.utils.safe_yaml import read_yaml
from dat.utils.tables import write_csv
from dat.utils.text import echo

# Files that only a run leaves in its folder.
FILES = ("config.yaml", "log.jsonl", "last.pth")
# A key of `data.train` that only the task's configurations have; those of runs hold every key.
OWN_KEYS = {"detection": "annotations", "classification": "path"}


def print_runs(folder: Path, schema: type, metrics: Sequence[str], csv: Path | None = None) -> None:
    """Prints the table of find_runs, and writes it to the file `csv`; folders that cannot be read are warnings."""
    rows, broken, others = find_runs(folder, schema, metrics)
    if rows:
        echo(format_runs(rows))
    for task, count in others.items():
        echo(f"{count} runs of {task} are not shown", error=True)
    for place, reason in broken:
        echo(f"warning: {place}: {reason.removeprefix(f'{place}/')}", error=True)
    if csv is not None:
        write_csv(csv, rows, list(rows[0]) if rows else [])


def find_runs(
    folder: Path, schema: type, metrics: Sequence[str]
) -> tuple[list[dict[str, Any]], list[tuple[Path, str]], Counter[str]]:
    """The runs below a folder, best first; folders without a readable run, with reasons; counts of other tasks' runs.

    Args:
        folder: to search, with its subfolders.
        schema: dataclass of the task's configuration.
        metrics: columns of the table, of which the first ranks the runs.

    Returns:
        A row for each run: "run" (path below `folder`), the metrics of its best epoch, "epoch", "epochs" (how many it
        trained), "time" ("h:mm:ss", None until it is finished), "state", and every key of the configuration in which
        the runs differ.

    Raises:
        DataError: no run at all.
    """
    places = sorted({path.parent for name in FILES for path in folder.rglob(name)})
    rows, configs, broken, others = [], [], [], Counter[str]()
    for place in places:
        try:
            config = flatten(to_dict(load_config(schema, place / "config.yaml")))
            summary = _summarize(place, metrics)
        except ConfigError as error:
            task = _task(place / "config.yaml")
            if task in (None, getattr(schema, "folder", None)):
                broken.append((place, str(error)))
            else:
                others[task] += 1
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            broken.append((place, f"its log.jsonl or metrics.json cannot be read: {type(error).__name__}: {error}"))
        else:
            configs.append(config)
            rows.append({"run": place.relative_to(folder).as_posix(), **summary})
    if not places:
        raise DataError(f"{folder}: holds no runs, which have {', '.join(FILES)}")
    keys = dict.fromkeys(key for config in configs for key in config if key not in IGNORED)
    for key in keys:
        values = [config.get(key) for config in configs]
        if any(value != values[0] for value in values):
            for row, value in zip(rows, values, strict=True):
                row[key] = value
    return sorted(rows, key=lambda row: (row[metrics[0]] is None, -(row[metrics[0]] or 0.0))), broken, others


def _task(path: Path) -> str | None:
    """The task of a run's configuration; None: it cannot be read, or may be of any."""
    try:
        data = read_yaml(path)["data"]["train"]
        return next((task for task, key in OWN_KEYS.items() if key in data), None)
    except (OSError, ValueError, LookupError, TypeError):
        return None


def _summarize(place: Path, names: Sequence[str]) -> dict[str, Any]:
    entries, final = read_jsonl(place / "log.jsonl"), read_metrics(place)
    step = max((entry["step"] for entry in entries), default=0)
    # A run that goes on after its end has the metrics of that end.
    finished = bool(final) and final["steps"] >= step
    evaluated = [entry for entry in entries if entry["kind"] == "val" and entry.get(names[0]) is not None]
    best = max(evaluated, key=lambda entry: entry[names[0]], default={})
    return {
        **{name: best.get(name) for name in names},
        "epoch": best.get("epoch"),
        "epochs": round(max((entry["epoch"] for entry in entries), default=0), 2),
        "time": format_seconds(final["seconds"]) if finished else None,
        "state": "finished" if finished else "unfinished",
    }


def format_runs(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as a table for the console."""
    columns = list(rows[0]) if rows else []
    lines = [columns, *([_text(row[name]) for name in columns] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)


def _text(value: Any) -> str:
    return "-" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)
